// expect: the assertion inside of a function template is seen
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

template <class T>
int f() {
  static_assert(sizeof(T) == 1, "the assertion inside of a function template is seen");
  return 0;
}

#if defined(TESSERA_EXPECT_FAILURE)
int g() { return f<int>(); }
#else
int g() { return f<char>(); }
#endif
