// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The version, stated once: CMake, the package files and the inline namespace all read it from here.

/// Changes when a release breaks the public interface.
#define TESSERA_VERSION_MAJOR 0
/// Changes when a release adds to the public interface; while the major number is 0, it may break it too.
#define TESSERA_VERSION_MINOR 1
/// Changes when a release mends something.
#define TESSERA_VERSION_PATCH 0

/// `major * 10000 + minor * 100 + patch`, for comparisons in the preprocessor.
#define TESSERA_VERSION (TESSERA_VERSION_MAJOR * 10000 + TESSERA_VERSION_MINOR * 100 + TESSERA_VERSION_PATCH)
