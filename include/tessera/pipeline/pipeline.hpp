// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The room of pipelines: schedules as data, their simulation and drawing, and their execution.

#include <tessera/pipeline/action.hpp>
#include <tessera/pipeline/communication.hpp>
#include <tessera/pipeline/costs.hpp>
#include <tessera/pipeline/dualpipe.hpp>
#include <tessera/pipeline/dualpipev.hpp>
#include <tessera/pipeline/execution_plan.hpp>
#include <tessera/pipeline/executor.hpp>
#include <tessera/pipeline/gradient_order.hpp>
#include <tessera/pipeline/lanes.hpp>
#include <tessera/pipeline/memory.hpp>
#include <tessera/pipeline/mirrored_gradients.hpp>
#include <tessera/pipeline/moe_chunk.hpp>
#include <tessera/pipeline/moe_chunk_device.hpp>
#include <tessera/pipeline/one_f_one_b.hpp>
#include <tessera/pipeline/overlap.hpp>
#include <tessera/pipeline/overlap_order.hpp>
#include <tessera/pipeline/schedule.hpp>
#include <tessera/pipeline/schedules.hpp>
#include <tessera/pipeline/simulator.hpp>
#include <tessera/pipeline/stage.hpp>
#include <tessera/pipeline/timeline_svg.hpp>
#include <tessera/pipeline/validate.hpp>
#include <tessera/pipeline/zb1p.hpp>
