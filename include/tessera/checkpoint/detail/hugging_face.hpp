// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of hugging_face.hpp.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <tessera/checkpoint/detail/agree.hpp>
#include <tessera/checkpoint/detail/files.hpp>
#include <tessera/checkpoint/detail/json.hpp>
#include <tessera/checkpoint/detail/tiling.hpp>
#include <tessera/checkpoint/hugging_face.hpp>
#include <tessera/checkpoint/safetensors.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

namespace detail {

inline std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

/// Which file each tensor of a model is in.
inline std::map<std::string, std::string> weight_map_of(const std::string& folder, const io_observer& observer) {
  std::map<std::string, std::string> files;
  const std::string index = join(folder, index_name);
  if (!std::filesystem::exists(index)) {
    const std::string only = "model.safetensors";
    for (const safetensors_entry& entry : read_safetensors_header(join(folder, only), observer).entries) {
      files.emplace(entry.name, only);
    }
    return files;
  }
  const json root = parse_json(read_text(index, max_manifest_bytes, observer), index);
  const json_reader reader(root, index);
  const json_reader map(reader.at("weight_map"), index + ": weight_map");
  for (const auto& [name, file] : map.object()) {
    if (!file.is_string() || !is_plain_name(file.get_ref<const std::string&>())) {
      map.fail("tensor '" + name + "' must have the name of a file in the same folder");
    }
    files.emplace(name, file.get_ref<const std::string&>());
  }
  return files;
}

/// A file of an export.
struct export_file {
  std::string name;
  std::vector<std::pair<const mapped_tensor*, const foreign_tensor*>> tensors;
  std::int64_t bytes = 0;
};

inline std::string five_digits(std::size_t number) {
  const std::string digits = std::to_string(number);
  return std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
}

/// Divides the tensors of a map over files.
inline std::vector<export_file> plan_export(const manifest& content, const name_map& names, const std::string& source,
                                            std::int64_t max_file_bytes) {
  std::vector<export_file> files;
  std::set<std::string_view> taken;
  for (const auto& [name, tensor] : names.tensors()) {
    const manifest_tensor* stored = content.find(name);
    TESSERA_EXPECTS_AS(checkpoint_error, stored != nullptr, source << ": there is no tensor '" << name << "'");
    TESSERA_EXPECTS_AS(checkpoint_error, stored->whole == tensor.whole,
                       source << ": tensor '" << name << "' is " << text_of(stored->whole) << ", the names are for "
                              << text_of(tensor.whole));
    std::vector<box> parts;
    for (const foreign_tensor& foreign : tensor.parts) {
      TESSERA_EXPECTS_AS(checkpoint_error, taken.insert(foreign.name).second,
                         "the name '" << foreign.name << "' stands for two parts");
      const std::int64_t bytes = foreign.part.volume() * size_of(stored->type);
      if (files.empty() || files.back().bytes + bytes > max_file_bytes) files.emplace_back();
      files.back().tensors.push_back({&tensor, &foreign});
      files.back().bytes += bytes;
      parts.push_back(foreign.part);
    }
    const std::string wrong = find_tiling_error(tensor.whole, parts);
    TESSERA_EXPECTS_AS(checkpoint_error, wrong.empty(),
                       "the names for tensor '" << name << "' do not cover it once: " << wrong);
  }
  for (std::size_t i = 0; i < files.size(); ++i) {
    files[i].name = files.size() == 1
                        ? "model.safetensors"
                        : "model-" + five_digits(i + 1) + "-of-" + five_digits(files.size()) + ".safetensors";
  }
  return files;
}

}  // namespace detail

inline name_map& name_map::part(const std::string& name, const box& extents, foreign_tensor part) {
  mapped_tensor& tensor = tensors_.try_emplace(name, mapped_tensor{name, extents, {}}).first->second;
  TESSERA_EXPECTS(tensor.whole == extents, "tensor '" << name << "' has names for " << detail::text_of(tensor.whole)
                                                      << ", others cannot be for " << detail::text_of(extents));
  expect_piece({name, element_type::u8, extents, part.part, {}});
  std::vector<std::int64_t> here;
  std::vector<std::int64_t> there;
  for (int i = 0; i < part.part.rank; ++i) {
    if (part.part.size[i] != 1) here.push_back(part.part.size[i]);
  }
  for (const std::int64_t extent : part.shape) {
    if (extent != 1) there.push_back(extent);
  }
  TESSERA_EXPECTS(here == there, "tensor '" << part.name << "' of the model is " << detail::shape_text(part.shape)
                                            << ", which are other extents than those of " << detail::text_of(part.part)
                                            << " of '" << name << "'");
  tensor.parts.push_back(std::move(part));
  return *this;
}

inline name_map& name_map::whole(const std::string& name, const box& extents, const std::string& foreign) {
  return part(name, extents, {foreign, {extents.size, extents.size + extents.rank}, extents});
}

inline name_map& name_map::per_expert(const std::string& name, const box& extents, std::int64_t first_row,
                                      std::int64_t rows, std::string_view pattern) {
  const std::size_t place = pattern.find("{}");
  TESSERA_EXPECTS(place != std::string_view::npos,
                  "the pattern '" << pattern << "' has no {} where the expert's number stands");
  TESSERA_EXPECTS(extents.rank == 2 || extents.rank == 3, "tensor '" << name << "' has " << extents.rank
                                                                     << " dimensions, per_expert needs [E, rows] or "
                                                                     << "[E, rows, cols]");
  for (std::int64_t expert = 0; expert < extents.size[0]; ++expert) {
    foreign_tensor one;
    one.name = std::string(pattern.substr(0, place)) + std::to_string(expert) + std::string(pattern.substr(place + 2));
    one.part = extents;
    one.part.offset[0] = expert;
    one.part.size[0] = 1;
    one.part.offset[1] = first_row;
    one.part.size[1] = rows;
    one.shape.assign(one.part.size + 1, one.part.size + extents.rank);
    part(name, extents, std::move(one));
  }
  return *this;
}

inline manifest hugging_face_manifest(const std::string& folder, const name_map& names, const io_observer& observer) {
  const std::map<std::string, std::string> files = detail::weight_map_of(folder, observer);
  manifest content;
  content.block_bytes = std::int64_t{4} << 20;
  struct opened {
    std::int32_t index;
    safetensors_header header;
  };
  std::map<std::string, opened> headers;
  for (const auto& [name, tensor] : names.tensors()) {
    manifest_tensor& target = content.tensors.emplace_back();
    target.name = name;
    target.whole = tensor.whole;
    target.placement = "of a Hugging Face model";
    for (const foreign_tensor& foreign : tensor.parts) {
      const auto place = files.find(foreign.name);
      TESSERA_EXPECTS_AS(checkpoint_error, place != files.end(),
                         folder << ": the model has no tensor '" << foreign.name << "', which '" << name << "' needs");
      const std::string path = detail::join(folder, place->second);
      auto header = headers.find(place->second);
      if (header == headers.end()) {
        safetensors_header read = read_safetensors_header(path, observer);
        content.files.push_back({place->second, read.data_begin + read.data_bytes, read.data_begin, 0});
        header =
            headers.emplace(place->second, opened{static_cast<std::int32_t>(headers.size()), std::move(read)}).first;
      }
      const safetensors_entry* entry = header->second.header.find(foreign.name);
      TESSERA_EXPECTS_AS(checkpoint_error, entry != nullptr, path << ": there is no tensor '" << foreign.name << "'");
      TESSERA_EXPECTS_AS(checkpoint_error, entry->shape == foreign.shape,
                         path << ": tensor '" << foreign.name << "' is " << detail::shape_text(entry->shape)
                              << ", expected " << detail::shape_text(foreign.shape));
      if (target.chunks.empty()) target.type = entry->type;
      TESSERA_EXPECTS_AS(checkpoint_error, target.type == entry->type,
                         path << ": tensor '" << foreign.name << "' has elements " << name_of(entry->type)
                              << ", the others of '" << name << "' have " << name_of(target.type));
      target.chunks.push_back(
          {foreign.part, header->second.index, foreign.name, header->second.header.data_begin + entry->begin, {}});
    }
  }
  expect_manifest(content, folder);
  return content;
}

template <host_communicator Comm>
manifest hugging_face_manifest(Comm& comm, const std::string& folder, const name_map& names,
                               const io_observer& observer) {
  std::string text;
  detail::together(comm, [&] {
    if (comm.rank() == 0) text = to_json(hugging_face_manifest(folder, names, observer));
  });
  return parse_manifest(detail::broadcast_bytes(comm, std::move(text), 0), folder);
}

template <host_communicator Comm>
void export_hugging_face(Comm& comm, const std::string& path, const name_map& names, const std::string& folder,
                         const export_options& options) {
  std::string text;
  const std::string manifest_path = detail::join(path, manifest_name);
  const std::string unfinished = folder + std::string(detail::unfinished_mark) + "export";
  detail::together(comm, [&] {
    if (comm.rank() != 0) return;
    text = to_json(read_manifest(path, options.observer));
    TESSERA_EXPECTS_AS(checkpoint_error, !std::filesystem::exists(folder), folder << ": it exists");
    detail::remove_tree(unfinished, options.observer);
    detail::create_directory(unfinished, options.observer);
  });
  const manifest content = parse_manifest(detail::broadcast_bytes(comm, std::move(text), 0), manifest_path);
  std::vector<detail::export_file> files;
  try {
    detail::together(comm, [&] { files = detail::plan_export(content, names, path, options.max_file_bytes); });
    const auto ranks = static_cast<std::size_t>(comm.size());
    for (std::size_t first = 0; first < files.size(); first += ranks) {
      const std::size_t mine = first + static_cast<std::size_t>(comm.rank());
      std::vector<safetensors_entry> entries;
      std::vector<target_piece> targets;
      std::unique_ptr<std::byte[]> data;
      std::int64_t bytes = 0;
      detail::together(comm, [&] {
        if (mine >= files.size()) return;
        auto tensors = files[mine].tensors;
        const auto type_of = [&](const auto& t) { return content.find(t.first->name)->type; };
        // wide elements first, so that all are aligned to their size
        std::stable_sort(tensors.begin(), tensors.end(),
                         [&](const auto& a, const auto& b) { return size_of(type_of(a)) > size_of(type_of(b)); });
        data = std::make_unique_for_overwrite<std::byte[]>(static_cast<std::size_t>(files[mine].bytes));
        for (const auto& t : tensors) {
          const std::int64_t size = t.second->part.volume() * size_of(type_of(t));
          entries.push_back({t.second->name, type_of(t), t.second->shape, bytes, bytes + size});
          targets.push_back({{t.first->name, type_of(t), t.first->whole, t.second->part, {}}, data.get() + bytes});
          bytes += size;
        }
      });
      load(comm, path, content, targets, {{}, options.observer});
      detail::together(comm, [&] {
        if (mine >= files.size()) return;
        detail::file target = detail::file::create(detail::join(unfinished, files[mine].name), options.observer);
        const std::string header = make_safetensors_header(entries, {{"format", "pt"}});
        const auto begin = static_cast<std::int64_t>(header.size());
        target.write(header.data(), begin, 0, options.observer);
        target.write(data.get(), bytes, begin, options.observer);
        target.sync(options.observer);
        target.close();
      });
    }
    detail::together(comm, [&] {
      if (comm.rank() != 0) return;
      if (files.size() != 1) {
        detail::json weight_map = detail::json::object();
        std::int64_t total = 0;
        for (const detail::export_file& file : files) {
          total += file.bytes;
          for (const auto& t : file.tensors) weight_map[t.second->name] = file.name;
        }
        detail::json index = {{"metadata", {{"total_size", total}}}};
        index["weight_map"] = std::move(weight_map);
        detail::write_text(detail::join(unfinished, index_name), detail::dump_json(index, "an index") + "\n",
                           options.observer);
      }
      detail::sync_directory(unfinished, options.observer);
      detail::rename_path(unfinished, folder, options.observer);
      detail::sync_directory(detail::parent_of(folder), options.observer);
      options.log(log_level::info, "exported ", path, " to ", folder);
    });
  } catch (...) {
    if (comm.rank() == 0) detail::attempt([&] { detail::remove_tree(unfinished, {}); });
    throw;
  }
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
