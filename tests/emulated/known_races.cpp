// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// What ThreadSanitizer need not report.

extern "C" const char* __tsan_default_suppressions();

extern "C" const char* __tsan_default_suppressions() {
  return
      // The word that tells of a failure is read by volatile reads: whoever sees it late does a little more.
      "race:symmetric::failed\n"
      "race:write_down\n";
}
