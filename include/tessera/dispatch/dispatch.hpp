// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The dispatch room: tokens to the owners of their experts and back.

#include <tessera/dispatch/capacity.hpp>
#include <tessera/dispatch/combine.hpp>
#include <tessera/dispatch/handle.hpp>
#include <tessera/dispatch/host_plan.hpp>
#include <tessera/dispatch/host_sized.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/dispatch/replicas.hpp>
#include <tessera/dispatch/routing_exchange.hpp>
#include <tessera/dispatch/rows.hpp>
#include <tessera/dispatch/symmetric.hpp>
#include <tessera/dispatch/transport.hpp>
#include <tessera/dispatch/transport_cost.hpp>
