// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

/// @file
/// Corpus and baselines against cases worked out by hand.

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

#include <unistd.h>

#include <doctest/doctest.h>

#include <tessera/core/error.hpp>

#include "../baselines.hpp"
#include "../corpus.hpp"
#include "../random.hpp"

namespace {

using namespace train_lm;
namespace fs = std::filesystem;

/// A folder that goes away with the test.
struct temporary_folder {
  fs::path path = fs::temp_directory_path() / ("train_lm_text_test_" + std::to_string(::getpid()));
  temporary_folder() { fs::create_directories(path); }
  ~temporary_folder() { fs::remove_all(path); }
  temporary_folder(const temporary_folder&) = delete;
  temporary_folder& operator=(const temporary_folder&) = delete;
  void write(const std::string& name, const std::string& text) const { std::ofstream(path / name) << text; }
};

/// Text without repetitions, different for each key.
std::string words(std::uint64_t key, std::size_t bytes) {
  const random_stream random(key, "words");
  std::string text;
  for (std::uint64_t i = 0; text.size() < bytes; ++i) {
    const std::uint64_t bits = random.bits(i);
    for (int j = 0; j < 6; ++j) text.push_back(static_cast<char>('a' + (bits >> (5 * j)) % 26));
    text.push_back(i % 40 == 39 ? '\n' : ' ');
    if (i % 80 == 79) text.push_back('\n');
  }
  return text;
}

}  // namespace

TEST_CASE("the order-2 model gives Witten and Bell's numbers on a text small enough for a pencil") {
  const std::string text = "abab";
  const witten_bell model(text, 2);
  // Order 0: a, b, a, b: 4 bytes of 2 kinds. p(a) = (2 + 2/256) / (4 + 2).
  const double p_a = (2.0 + 2.0 / 256) / 6.0, p_b = p_a;
  CHECK(model.probability("", 'a') == doctest::Approx(p_a).epsilon(1e-14));
  // After a: b twice, one kind. p(b | a) = (2 + 1 p(b)) / (2 + 1). After b: a once.
  const double p_b_after_a = (2 + p_b) / 3, p_a_after_b = (1 + p_a) / 2;
  CHECK(model.probability("a", 'b') == doctest::Approx(p_b_after_a).epsilon(1e-14));
  CHECK(model.probability("b", 'a') == doctest::Approx(p_a_after_b).epsilon(1e-14));
  // After ab: a once; after ba: b once.
  const double p_a_after_ab = (1 + p_a_after_b) / 2, p_b_after_ba = (1 + p_b_after_a) / 2;
  CHECK(model.probability("xxab", 'a') == doctest::Approx(p_a_after_ab).epsilon(1e-14));
  // Contexts never seen fall back to shorter ones.
  CHECK(model.probability("zb", 'a') == doctest::Approx(p_a_after_b).epsilon(1e-14));
  CHECK(model.probability("zz", 'a') == doctest::Approx(p_a).epsilon(1e-14));
  CHECK(model.bits_per_byte("abab") ==
        doctest::Approx(-(std::log2(p_a) + std::log2(p_b_after_a) + std::log2(p_a_after_ab) + std::log2(p_b_after_ba)) /
                        4)
            .epsilon(1e-14));
}

TEST_CASE("the order-2 model's probabilities sum to 1 in every context") {
  const witten_bell model(words(1, 5000), 2);
  for (const char* context : {"", "a", "qz", "e ", "\x01\x02"}) {
    double sum = 0;
    for (int byte = 0; byte < 256; ++byte) sum += model.probability(context, static_cast<unsigned char>(byte));
    CAPTURE(context);
    CHECK(sum == doctest::Approx(1.0).epsilon(1e-12));
  }
}

TEST_CASE("the compressor needs nearly nothing for text it has just seen, and much for new text") {
  const temporary_folder folder;
  const std::string training = words(1, 40000);
  const auto seen = compress_validation(training, training.substr(1000, 20000), folder.path.string());
  if (!seen) {
    MESSAGE("skipped: xz is not installed");
    return;
  }
  CHECK(seen->bits_per_byte < 0.1);
  const auto fresh = compress_validation(training, words(2, 20000), folder.path.string());
  REQUIRE(fresh.has_value());
  CHECK(fresh->bits_per_byte > 3.0);
  CHECK(fs::is_empty(folder.path));
}

TEST_CASE("paragraphs end at empty lines and at Debian's dots") {
  const auto paragraphs = split_paragraphs("one\ntwo\n\n \t\nthree\r\n .\n four\n");
  CHECK(paragraphs == std::vector<std::string>{"one\ntwo\n", "three\n", " four\n"});
}

TEST_CASE("a paragraph repeated in another file, other layout and case, is dropped; files go to one part each") {
  const temporary_folder folder;
  const std::string shared =
      "Permission is hereby granted, free of charge, to any person who reads the text of 1999.\n";
  const std::string relaid =
      "  PERMISSION is hereby granted free of charge\n  to any person who reads the text of 2024!\n";
  for (char name = 'a'; name < 'u'; ++name)
    folder.write(std::string(1, name),
                 (name == 'a' ? shared : relaid) + "\n" + words(static_cast<unsigned char>(name), 3000));
  folder.write("copy", words('b', 3000));                        // all of it is in file b
  folder.write("binary", std::string("text\0with a zero", 16));  // not text
  const corpus text = read_corpus({.paths = {folder.path.string()}});
  CHECK(text.files_found == 21);
  CHECK(text.files_used == 20);
  const std::string all = text.training + text.validation;
  CHECK(all.find("Permission is hereby") != std::string::npos);
  CHECK(all.find("PERMISSION") == std::string::npos);
  CHECK(text.validation.size() * 20 > all.size());
  CHECK(text.validation.size() * 4 < all.size());
  CHECK(text.validation_files >= 2);
  CHECK(read_corpus({.paths = {folder.path.string()}}).fingerprint == text.fingerprint);
  // A word of the validation part is in no training file: the parts share no text.
  CHECK(text.training.find(text.validation.substr(0, 30)) == std::string::npos);
}

TEST_CASE("one file is split in two, and the bound on bytes holds") {
  const temporary_folder folder;
  folder.write("book", words(5, 300000));
  const corpus text = read_corpus({.paths = {(folder.path / "book").string()}, .max_bytes = 100000});
  CHECK(text.training.size() + text.validation.size() == 100000);
  CHECK(text.validation.size() > 4000);
  CHECK(text.validation.size() < 16000);
}

TEST_CASE("missing, empty and too small inputs are told apart by name") {
  const temporary_folder folder;
  const auto message = [](const corpus_options& options) -> std::string {
    try {
      read_corpus(options);
    } catch (const tessera::error& e) {
      return e.what();
    }
    return {};
  };
  CHECK(message({.paths = {"/no/such/file"}}).find("there is no file or folder '/no/such/file'") != std::string::npos);
  CHECK(message({.paths = {folder.path.string()}}).find("holds 0 bytes") != std::string::npos);
  folder.write("short", "only a few words");
  CHECK(message({.paths = {folder.path.string()}}).find("at least") != std::string::npos);
}
