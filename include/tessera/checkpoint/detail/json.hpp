// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Strict reading of JSON that may come from anywhere: duplicate keys, deep nesting and wrong types are errors that
/// name the file.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

using json = nlohmann::json;

/// Deepest nesting that any of our files has need of, with room to spare.
inline constexpr std::size_t max_json_depth = 16;

/// Builds a value from a parser's events, refusing what a lenient parser would let pass.
class strict_json_builder {
 public:
  strict_json_builder(json& root, const std::string& source) : root_(root), source_(source) {}

  bool null() { return put(nullptr); }
  bool boolean(bool value) { return put(value); }
  bool number_integer(json::number_integer_t value) { return put(value); }
  bool number_unsigned(json::number_unsigned_t value) { return put(value); }
  bool number_float(json::number_float_t value, const std::string&) { return put(value); }
  bool string(std::string& value) { return put(std::move(value)); }
  bool binary(json::binary_t&) { return false; }
  bool start_object(std::size_t) { return open(json::object()); }
  bool start_array(std::size_t) { return open(json::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  bool key(std::string& name) {
    json& object = *open_.back();
    const auto [place, is_new] = object.get_ref<json::object_t&>().emplace(name, nullptr);
    TESSERA_EXPECTS_AS(checkpoint_error, is_new, source_ << ": the key '" << name << "' stands twice in one object");
    next_ = &place->second;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& e) {
    throw checkpoint_error(source_ + ": not valid JSON at byte " + std::to_string(position) + ": " + e.what());
  }

 private:
  json* put(json&& value, bool) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_array()) {
      auto& array = open_.back()->get_ref<json::array_t&>();
      array.push_back(std::move(value));
      return &array.back();
    }
    *next_ = std::move(value);
    return next_;
  }
  template <class T>
  bool put(T&& value) {
    put(json(std::forward<T>(value)), true);
    return true;
  }
  bool open(json&& value) {
    TESSERA_EXPECTS_AS(checkpoint_error, open_.size() < max_json_depth,
                       source_ << ": JSON is nested more than " << max_json_depth << " deep");
    open_.push_back(put(std::move(value), true));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  json& root_;
  const std::string& source_;
  std::vector<json*> open_;  // a value does not move while it is open: only its last element can grow
  json* next_ = nullptr;
};

/// Parses `text`. @throws checkpoint_error naming `source`.
inline json parse_json(std::string_view text, const std::string& source) {
  json root;
  strict_json_builder builder(root, source);
  const bool complete = json::sax_parse(text.begin(), text.end(), &builder);
  TESSERA_EXPECTS_AS(checkpoint_error, complete, source << ": not valid JSON");
  return root;
}

/// `value` as text. @throws invalid_argument naming `what` if a string in it is not UTF-8.
inline std::string dump_json(const json& value, const char* what) {
  try {
    return value.dump();
  } catch (const json::exception& e) {
    throw invalid_argument(std::string(what) + " cannot be written as JSON: " + e.what());
  }
}

/// Reads members of JSON values; errors name where they stand.
class json_reader {
 public:
  json_reader(const json& value, std::string where) : value_(value), where_(std::move(where)) {}

  [[noreturn]] void fail(const std::string& what) const { throw checkpoint_error(where_ + ": " + what); }
  const json& value() const { return value_; }
  const std::string& where() const { return where_; }

  void expect_object() const {
    if (!value_.is_object()) fail("an object is expected");
  }
  const json::object_t& object() const {
    expect_object();
    return value_.get_ref<const json::object_t&>();
  }
  const json::array_t& array(const char* key) const {
    const json& member = at(key);
    if (!member.is_array()) fail(std::string("'") + key + "' must be an array");
    return member.get_ref<const json::array_t&>();
  }
  const json& at(const char* key) const {
    expect_object();
    const auto& members = value_.get_ref<const json::object_t&>();
    const auto place = members.find(key);
    if (place == members.end()) fail(std::string("'") + key + "' is missing");
    return place->second;
  }
  const std::string& text(const char* key) const {
    const json& member = at(key);
    if (!member.is_string()) fail(std::string("'") + key + "' must be a string");
    return member.get_ref<const std::string&>();
  }
  std::int64_t integer(const char* key) const { return as_integer(at(key), key); }
  double number(const char* key) const {
    const json& member = at(key);
    if (!member.is_number()) fail(std::string("'") + key + "' must be a number");
    return member.get<double>();
  }
  std::vector<std::int64_t> integers(const char* key) const {
    std::vector<std::int64_t> result;
    for (const json& item : array(key)) result.push_back(as_integer(item, key));
    return result;
  }

 private:
  // All our integers are sizes and offsets, which leave room for a sum.
  std::int64_t as_integer(const json& number, const char* key) const {
    constexpr std::uint64_t most = std::uint64_t{1} << 62;
    if (!number.is_number_unsigned() || number.get<std::uint64_t>() > most) {
      fail(std::string("'") + key + "' must be whole numbers in [0, 2^62]");
    }
    return static_cast<std::int64_t>(number.get<std::uint64_t>());
  }

  const json& value_;
  std::string where_;
};

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
