// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The room of multi-token prediction: the chain, ready parts for it, its loss, and drafts at inference.

#include <tessera/mtp/chain.hpp>
#include <tessera/mtp/concat.hpp>
#include <tessera/mtp/embedding.hpp>
#include <tessera/mtp/head.hpp>
#include <tessera/mtp/linear.hpp>
#include <tessera/mtp/loss.hpp>
#include <tessera/mtp/norm.hpp>
#include <tessera/mtp/parts.hpp>
#include <tessera/mtp/residual_moe.hpp>
#include <tessera/mtp/rows.hpp>
#include <tessera/mtp/speculative.hpp>
