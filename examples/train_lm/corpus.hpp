// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Real text from files: read, deduplicated, split by file.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace train_lm {

/// What to read and how much of it to keep.
struct corpus_options {
  std::vector<std::string> paths;                 ///< Files or folders; empty means the texts of the Debian system.
  std::size_t max_bytes = 4u << 20;               ///< Bound of training plus validation, in bytes.
  std::size_t max_file_bytes = 32u << 10;         ///< What one file may contribute, so that no file dominates.
  std::size_t max_validation_bytes = 192u << 10;  ///< Bound of the validation part (else a tenth of the text).
};

/// Training and validation text, and how they came about.
struct corpus {
  std::string training;                ///< Bytes.
  std::string validation;              ///< Bytes; no file contributes to both parts.
  std::string source;                  ///< What was read, for people.
  std::size_t files_found = 0;         ///< Readable text files.
  std::size_t files_used = 0;          ///< Files left with text of their own.
  std::size_t validation_files = 0;    ///< Of those, in the validation part.
  std::size_t bytes_found = 0;         ///< Of all readable text files.
  std::size_t bytes_deduplicated = 0;  ///< What was dropped as a repetition.
  std::uint64_t fingerprint = 0;       ///< Hash of both parts: the same number means the same task.
};

/// Reads the text of `options`.
///
/// Licence texts repeat each other, and a model could then "predict" validation paragraphs that it has seen word by
/// word. So text is deduplicated by paragraph over all files, training and validation alike: of paragraphs
/// with the same letters (whitespace, case, digits and punctuation ignored) the first one stays, in the order of
/// paths. Files are then put in the order of their content's hash, which mixes the kinds of text; the first ones, a
/// tenth of the text but no more than `max_validation_bytes`, are the validation part. A single file is split at a
/// paragraph instead. The result depends on the texts alone.
/// @throws tessera::error if a path cannot be read, or too little text is found.
corpus read_corpus(const corpus_options& options);

/// Paragraphs of `text`, in order, without the empty lines between them. Debian's " ." lines count as empty.
std::vector<std::string> split_paragraphs(const std::string& text);

}  // namespace train_lm
