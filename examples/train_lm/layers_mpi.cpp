// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

/// @file
/// The layers of ranks that are processes, instantiated once.

#include <memory>

#include <tessera/comm/mpi.hpp>

#include "layers.hpp"

template std::unique_ptr<train_lm::moe_block<float>> train_lm::make_block(const settings&, balance_kind,
                                                                          const chunk_calls&, ts::comm::mpi&,
                                                                          ts::comm::mpi&);
