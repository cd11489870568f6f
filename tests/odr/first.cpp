// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include "units.hpp"

std::vector<std::size_t> sizes_in_first() { return sizes_here(); }

float first_element(tessera::matrix_view<const tessera::bfloat16> view) { return view(0, 0); }

void throw_in_first() { tessera::expect_matrix(tessera::matrix_view<const float>(), 1, 1, "nothing"); }
