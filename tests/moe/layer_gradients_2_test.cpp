// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include "../support/pairwise_rows.hpp"

TEST_CASE("gradients equal central differences: rows 10 to 19 of the pairwise table") {
  tessera_test::pairwise::check_rows<10>(std::make_index_sequence<10>{});
}
