// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The folder of a run's checkpoints: `step-<N>` for each complete one, `latest` with the name of the newest, and
/// names with `.tmp-` for what is not complete.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <tessera/checkpoint/io.hpp>
#include <tessera/checkpoint/manifest.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/log.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// Name of the file with the name of the newest checkpoint.
inline constexpr std::string_view latest_name = "latest";

/// Name of a checkpoint's folder, `step-<N>`. @param step At least 0.
std::string step_name(std::int64_t step);

/// The step of a folder with this name; nothing if it is not that of a complete checkpoint.
std::optional<std::int64_t> step_of(std::string_view name);

/// The steps of which there is a folder, in ascending order. What is in the folders is not looked at.
/// @param directory Folder of checkpoints; one that does not exist has none.
/// @throws checkpoint_error if the folder cannot be read.
std::vector<std::int64_t> list_steps(const std::string& directory);

/// Reads the manifest of a checkpoint and checks that its files are there with the right sizes. The elements are not
/// read.
/// @param path     Folder of one checkpoint, `<directory>/step-<N>`.
/// @param observer Sees the accesses.
/// @throws checkpoint_error saying what is missing or wrong.
manifest read_manifest(const std::string& path, const io_observer& observer = {});

/// The checkpoint to go on from: the one that `latest` names, or the newest that is whole where there is no such file
/// or it names one that is not. A folder that is being written, or was when its writer died, is never chosen.
/// @param directory Folder of checkpoints.
/// @param log       Gets a note about everything that was passed over.
/// @param observer  Sees the accesses.
/// @return The folder of the checkpoint; nothing if there is none.
/// @throws checkpoint_error if the folder cannot be read, or if there are checkpoints, if only one that `latest` names
/// and that is gone, and none is whole, saying why.
std::optional<std::string> find_checkpoint(const std::string& directory, const log_sink& log = {},
                                           const io_observer& observer = {});

/// The same on all ranks: rank 0 looks. Collective.
/// @param comm      Any ranks.
/// @param directory As above; only read on rank 0.
/// @param log       As above; only used on rank 0.
/// @param observer  As above; only used on rank 0.
/// @throws checkpoint_error on all ranks; comm_error if a rank does not come.
template <host_communicator Comm>
std::optional<std::string> find_checkpoint(Comm& comm, const std::string& directory, const log_sink& log = {},
                                           const io_observer& observer = {});

}  // namespace checkpoint

TESSERA_NAMESPACE_END

#include <tessera/checkpoint/detail/directory.hpp>
