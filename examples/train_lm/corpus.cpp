// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#include "corpus.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <unordered_set>
#include <utility>

#include <tessera/core/error.hpp>

#include "random.hpp"

namespace train_lm {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t largest_file = std::size_t{64} << 20;  // a file beyond this is data, not text
constexpr std::size_t shingle_words = 6;                     // run of words that tells a repetition
constexpr std::size_t least_text = 16u << 10;                // less cannot be split into anything meaningful

struct text_file {
  std::string text;
  std::uint64_t hash = 0;
};

std::vector<fs::path> debian_texts() {
  std::vector<fs::path> paths;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator("/usr/share/common-licenses", ignored)) {
    if (entry.is_regular_file(ignored)) paths.push_back(entry.path());
  }
  for (const auto& entry : fs::directory_iterator("/usr/share/doc", ignored)) {
    const fs::path file = entry.path() / "copyright";
    if (fs::is_regular_file(file, ignored)) paths.push_back(file);
  }
  TESSERA_EXPECTS_AS(tessera::error, !paths.empty(),
                     "neither /usr/share/common-licenses nor /usr/share/doc/*/copyright can be read here: name a text "
                     "file or a folder of text with --data");
  return paths;
}

std::vector<fs::path> list_files(const std::vector<std::string>& given) {
  std::vector<fs::path> paths;
  for (const std::string& name : given) {
    std::error_code code;
    const fs::file_status status = fs::status(name, code);
    TESSERA_EXPECTS_AS(tessera::error, fs::exists(status), "there is no file or folder '" << name << "'");
    if (fs::is_directory(status)) {
      const auto options = fs::directory_options::skip_permission_denied;
      for (const auto& entry : fs::recursive_directory_iterator(name, options, code)) {
        std::error_code ignored;
        if (entry.is_regular_file(ignored)) paths.push_back(entry.path());
      }
      TESSERA_EXPECTS_AS(tessera::error, !code, "the folder '" << name << "' cannot be read: " << code.message());
    } else {
      paths.emplace_back(name);
    }
  }
  return paths;
}

/// The bytes of a file; empty if it cannot be read, is no text (holds a zero byte) or is too large.
std::string read_text(const fs::path& path) {
  std::error_code code;
  const auto size = fs::file_size(path, code);
  if (code || size > largest_file) return {};
  std::ifstream in(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (!in.good() && !in.eof()) return {};
  if (text.find('\0') != std::string::npos) return {};
  return text;
}

bool is_separator(std::string_view line) {
  const auto first = line.find_first_not_of(" \t\r");
  if (first == std::string_view::npos) return true;
  return line[first] == '.' && line.find_first_not_of(" \t\r", first + 1) == std::string_view::npos;
}

/// Hashes of every run of `shingle_words` words of a paragraph (of all its words if it has fewer). Only letters make
/// words, in lower case, so that layout, numbers and punctuation do not hide a repetition.
std::vector<std::uint64_t> shingles(std::string_view paragraph) {
  std::vector<std::uint64_t> words, result;
  std::string word;
  for (std::size_t i = 0; i <= paragraph.size(); ++i) {
    const char c = i < paragraph.size() ? paragraph[i] : ' ';
    if (c >= 'A' && c <= 'Z') {
      word.push_back(static_cast<char>(c - 'A' + 'a'));
    } else if ((c >= 'a' && c <= 'z') || (static_cast<unsigned char>(c) & 0x80u) != 0) {
      word.push_back(c);
    } else if (!word.empty()) {
      words.push_back(hash_bytes(word));
      word.clear();
    }
  }
  for (std::size_t i = 0; i == 0 || i + shingle_words <= words.size(); ++i) {
    std::uint64_t h = 0;
    for (std::size_t j = i; j < std::min(words.size(), i + shingle_words); ++j) h = mix(h ^ words[j]) * 3;
    result.push_back(h);
  }
  return result;
}

/// Whether at least half of the shingles have been seen before; those of a paragraph that stays are seen from now on.
bool is_repetition(std::string_view paragraph, std::unordered_set<std::uint64_t>& seen) {
  const std::vector<std::uint64_t> own = shingles(paragraph);
  const auto known = std::count_if(own.begin(), own.end(), [&](std::uint64_t h) { return seen.count(h) != 0; });
  if (2 * static_cast<std::size_t>(known) >= own.size()) return true;
  seen.insert(own.begin(), own.end());
  return false;
}

}  // namespace

std::vector<std::string> split_paragraphs(const std::string& text) {
  std::vector<std::string> paragraphs;
  std::string current;
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    std::string_view line(text.data() + begin, end - begin);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (is_separator(line)) {
      if (!current.empty()) paragraphs.push_back(std::exchange(current, {}));
    } else {
      current.append(line).push_back('\n');
    }
    begin = end + 1;
  }
  if (!current.empty()) paragraphs.push_back(std::move(current));
  return paragraphs;
}

corpus read_corpus(const corpus_options& options) {
  corpus result;
  std::vector<fs::path> paths = options.paths.empty() ? debian_texts() : list_files(options.paths);
  std::sort(paths.begin(), paths.end());
  paths.erase(std::unique(paths.begin(), paths.end()), paths.end());

  std::vector<text_file> files;
  std::unordered_set<std::uint64_t> seen_files, seen_shingles;
  for (const fs::path& path : paths) {
    const std::string text = read_text(path);
    if (text.empty()) continue;
    ++result.files_found;
    result.bytes_found += text.size();
    if (!seen_files.insert(hash_bytes(text)).second) {
      result.bytes_deduplicated += text.size();
      continue;
    }
    text_file file;
    for (const std::string& paragraph : split_paragraphs(text)) {
      if (is_repetition(paragraph, seen_shingles)) {
        result.bytes_deduplicated += paragraph.size();
        continue;
      }
      // One file alone is the whole text, so only the bound of the whole applies to it.
      if (paths.size() > 1 && file.text.size() + paragraph.size() >= options.max_file_bytes) break;
      file.text.append(paragraph).push_back('\n');
    }
    if (file.text.empty()) continue;
    file.hash = hash_bytes(file.text);
    files.push_back(std::move(file));
  }

  const std::string where = options.paths.empty() ? "the Debian system's licence and copyright files"
                            : options.paths.size() == 1
                                ? "'" + options.paths.front() + "'"
                                : "the " + std::to_string(options.paths.size()) + " paths given with --data";
  std::size_t total = 0;
  for (const text_file& file : files) total += file.text.size();
  TESSERA_EXPECTS_AS(tessera::error, total >= least_text,
                     where << " holds " << total << " bytes of text without repetitions in " << files.size()
                           << " files; at least " << least_text << " bytes are needed");
  std::sort(files.begin(), files.end(), [](const text_file& a, const text_file& b) {
    return a.hash != b.hash ? a.hash < b.hash : a.text < b.text;
  });

  result.source = where;
  const std::size_t kept = std::min(total, options.max_bytes);
  const std::size_t wanted = std::min(kept / 10, options.max_validation_bytes);
  if (files.size() == 1) {
    const std::string& text = files.front().text;
    std::size_t cut = text.find("\n\n", kept - wanted - wanted / 2);
    if (cut == std::string::npos || cut > kept - wanted / 2) cut = kept - wanted;
    result.training = text.substr(0, cut);
    result.validation = text.substr(cut, kept - cut);
    result.files_used = result.validation_files = 1;
  } else {
    for (const text_file& file : files) {
      const std::size_t room =
          options.max_bytes - std::min(options.max_bytes, result.training.size() + result.validation.size());
      if (room == 0) break;
      // The last file always trains, so that both parts have text however few files there are.
      const bool validates = result.validation.size() < wanted && &file != &files.back();
      std::string& part = validates ? result.validation : result.training;
      part.append(file.text, 0, room);
      ++result.files_used;
      result.validation_files += validates ? 1 : 0;
    }
    // A large last validation file must not take more than its share; what is cut off is dropped, not trained on.
    if (result.validation.size() > 2 * wanted) result.validation.resize(2 * wanted);
  }
  TESSERA_EXPECTS_AS(tessera::error, !result.training.empty() && !result.validation.empty(),
                     where << " cannot be split into training and validation text: give more files with --data");
  result.fingerprint = hash_bytes(result.training) ^ mix(hash_bytes(result.validation));
  return result;
}

}  // namespace train_lm
