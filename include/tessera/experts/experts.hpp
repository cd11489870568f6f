// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The experts room: activations, weight layouts, the expert MLP and shared experts.

#include <tessera/experts/activation.hpp>
#include <tessera/experts/expert_container.hpp>
#include <tessera/experts/expert_mlp.hpp>
#include <tessera/experts/expert_weights.hpp>
#include <tessera/experts/shared_experts.hpp>
#include <tessera/experts/weight_layout.hpp>
