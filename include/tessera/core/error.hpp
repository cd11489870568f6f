// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The exceptions of host calls, and the check that throws them.

#include <concepts>
#include <cstddef>
#include <cstdio>
#include <iosfwd>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// Root of everything the library throws. Its text says what was wrong, with the values, and what would be right.
/// Unless a function states otherwise, throwing leaves the caller's state as it was.
class error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument, a shape, a buffer or an input value that the call cannot work with.
class invalid_argument : public error {
 public:
  using error::error;
};

/// A call of the CUDA runtime or driver failed.
class cuda_error : public error {
 public:
  using error::error;
};

/// A call of NCCL failed, or a communicator reported an asynchronous error.
class nccl_error : public error {
 public:
  using error::error;
};

/// A rank did not do its part: it failed, or it did not arrive in time.
class comm_error : public error {
 public:
  /// @param what  The whole sentence, ranks and phase included.
  /// @param rank  The rank that reports.
  /// @param peer  The rank at fault, -1 where it is not known.
  /// @param phase The operation during which it happened, for example "all_to_all_v".
  comm_error(const std::string& what, int rank, int peer, std::string phase)
      : error(what), rank_(rank), peer_(peer), phase_(std::move(phase)) {}

  /// The rank that reports.
  int rank() const noexcept { return rank_; }
  /// The rank at fault, -1 where it is not known.
  int peer() const noexcept { return peer_; }
  /// The operation during which it happened.
  const std::string& phase() const noexcept { return phase_; }

 private:
  int rank_;
  int peer_;
  std::string phase_;
};

/// A checkpoint that cannot be read or written.
class checkpoint_error : public error {
 public:
  using error::error;
};

namespace detail {

// A message is a list of values on the caller's stack. Nothing is formatted before somebody asks for the text, so that
// a check costs its caller, and the compiler, a few calls that are never made; and no file needs streams to have
// checks. Texts are those of a `std::ostream` as it is made. Values live until the end of the full expression.
class message {
 public:
  message() noexcept : count_(0) {}

  [[gnu::noinline, gnu::cold]] message& operator<<(const char* chars) { return *this << std::string_view(chars); }
  template <class T>
  message& operator<<(const T& value) {
    if constexpr (std::is_same_v<T, char>)
      return add_number(form::character, value);
    else if constexpr (std::is_same_v<T, bool> || (std::unsigned_integral<T> && sizeof(T) > 1))
      return add_number(form::natural, static_cast<long long>(value));
    else if constexpr (sizeof(T) > 1 && std::is_convertible_v<T, long long> &&
                       (std::signed_integral<T> || std::is_enum_v<T>))
      return add_number(form::number, value);
    else if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
      return add_real(value);
    else if constexpr (std::is_convertible_v<const T&, std::string_view>)
      return add_characters(std::string_view(value));
    else if constexpr (std::is_convertible_v<const T&, const void*>)
      return add_object(value, nullptr);
    else
      return add_object(&value, print<T>);
  }

  [[gnu::cold]] std::string text() const {
    std::string result;
    for (int i = 0; i < count_ && i < most_values; ++i) values_[i].append_to(result);
    if (count_ > most_values) result += "...";
    return result;
  }

 private:
  enum class form { character, number, natural, real, text, object };
  using print_function = void (*)(std::string&, const void*);

  struct item {
    form as;
    union {
      std::size_t size;
      print_function print_object;
    };
    union {
      long long number;
      double real;
      const void* object;
    };

    void append_to(std::string& out) const {
      if (as == form::text) {
        out.append(static_cast<const char*>(object), size);
      } else if (as == form::object && print_object != nullptr) {
        print_object(out, object);
      } else {
        char digits[32] = "0";
        if (as == form::character) {
          digits[0] = static_cast<char>(number);
        } else if (as == form::number) {
          std::snprintf(digits, sizeof(digits), "%lld", number);
        } else if (as == form::natural) {
          std::snprintf(digits, sizeof(digits), "%llu", static_cast<unsigned long long>(number));
        } else if (as == form::real) {
          std::snprintf(digits, sizeof(digits), "%g", real);
        } else if (object != nullptr) {
          std::snprintf(digits, sizeof(digits), "%p", object);
        }
        out += digits;
      }
    }
  };
  static constexpr int most_values = 32;

  // Apart from the functions that check: their code stays small.
  [[gnu::noinline, gnu::cold]] message& add_number(form as, long long number) {
    item& v = next(as);
    v.number = number;
    return *this;
  }
  [[gnu::noinline, gnu::cold]] message& add_real(double real) {
    next(form::real).real = real;
    return *this;
  }
  [[gnu::noinline, gnu::cold]] message& add_characters(std::string_view chars) {
    item& v = next(form::text);
    v.size = chars.size();
    v.object = chars.data();
    return *this;
  }
  [[gnu::noinline, gnu::cold]] message& add_object(const void* object, print_function with) {
    item& v = next(form::object);
    v.print_object = with;
    v.object = object;
    return *this;
  }
  // What follows too many values overwrites the last one, which `text` leaves out.
  item& next(form as) {
    item& v = values_[count_ < most_values ? count_ : most_values];
    ++count_;
    v.as = as;
    return v;
  }

  // What else a stream takes: the file that hands it over has <sstream>.
  template <class T, class Stream = std::ostringstream>
  static void print(std::string& out, const void* value) {
    Stream text;
    text << *static_cast<const T*>(value);
    out += text.str();
  }

  int count_;
  item values_[most_values + 1];
};

// Apart from the checks, which are in many functions.
template <class Exception>
[[noreturn, gnu::noinline, gnu::cold]] void throw_message(const message& what) {
  throw Exception(what.text());
}

}  // namespace detail

TESSERA_NAMESPACE_END

/// Throws `Exception` with the streamed message when `condition` does not hold:
/// `TESSERA_EXPECTS_AS(invalid_argument, k <= n, "top_k = " << k << " exceeds num_experts = " << n)`. What the standard
/// library has no text for needs its stream header where it is streamed.
#define TESSERA_EXPECTS_AS(Exception, condition, ...)                                           \
  do {                                                                                          \
    if (!(condition)) [[unlikely]]                                                              \
      ::tessera::detail::throw_message<Exception>(::tessera::detail::message() << __VA_ARGS__); \
  } while (false)

/// `TESSERA_EXPECTS_AS` with `tessera::invalid_argument`.
#define TESSERA_EXPECTS(condition, ...) TESSERA_EXPECTS_AS(::tessera::invalid_argument, condition, __VA_ARGS__)
