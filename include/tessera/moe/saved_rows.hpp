// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Whether a layer between ranks keeps the rows that it received until backward.

#include <cstdint>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// Where the rows of other ranks' tokens are, which the gradients of the experts' weights need. The gradients are the
/// same bits either way. At one rank experts read x where it is, and both are the same.
enum class saved_rows : std::uint8_t {
  received,  ///< In saved memory, from forward to backward.
  resend,    ///< Nowhere: `backward_input` sends x again, under its products, into deferred memory. Saved memory is
             ///< smaller by `sizeof(storage) * R * T * d` bytes, deferred memory and forward's workspace larger.
};

TESSERA_NAMESPACE_END
