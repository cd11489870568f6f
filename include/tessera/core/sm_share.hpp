// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// How products share a device with kernels of another stream.

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// How the products of a call share the device with kernels of another stream.
struct sm_share {
  /// Whether there are such kernels, which take multiprocessors where they find them, and leave them at any time:
  /// blocks of products that begin late take what is left to do.
  bool shares = false;
  /// Most multiprocessors of the first product, so that kernels that begin with it find room; what it leaves or lets go
  /// is theirs until it has ended, all of the device's included. 0: all, for the next product, too.
  int first_sms = 0;
};

TESSERA_NAMESPACE_END
