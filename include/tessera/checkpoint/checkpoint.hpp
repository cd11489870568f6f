// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The whole checkpoint room: sharded saves, elastic loads, models of Hugging Face. Needs nlohmann/json and xxHash
/// (link `tessera::checkpoint`) and a POSIX system, so no other room and not `tessera.hpp` includes it.

#include <tessera/checkpoint/device_memory.hpp>
#include <tessera/checkpoint/directory.hpp>
#include <tessera/checkpoint/element_type.hpp>
#include <tessera/checkpoint/hugging_face.hpp>
#include <tessera/checkpoint/io.hpp>
#include <tessera/checkpoint/load.hpp>
#include <tessera/checkpoint/manifest.hpp>
#include <tessera/checkpoint/piece.hpp>
#include <tessera/checkpoint/placed_pieces.hpp>
#include <tessera/checkpoint/plan.hpp>
#include <tessera/checkpoint/read_plan.hpp>
#include <tessera/checkpoint/safetensors.hpp>
#include <tessera/checkpoint/save.hpp>
#include <tessera/checkpoint/train_state.hpp>
