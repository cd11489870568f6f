# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DROOT=<repository> -DCLANG_FORMAT=<program> -P format.cmake
# All C++ and CUDA files are as clang-format 14 writes them; other versions write them differently.

cmake_minimum_required(VERSION 3.24)

if(NOT CLANG_FORMAT)
  message("skipped: clang-format 14 is not installed (Debian: clang-format-14)")
  return()
endif()
execute_process(COMMAND "${CLANG_FORMAT}" --version OUTPUT_VARIABLE version OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT version MATCHES "version 14\\.")
  message("skipped: clang-format 14 is needed, this is ${version}")
  return()
endif()

set(files "")
foreach(folder IN ITEMS include tests bench examples)
  foreach(kind IN ITEMS hpp cuh cpp cu)
    file(GLOB_RECURSE found "${ROOT}/${folder}/*.${kind}")
    list(APPEND files ${found})
  endforeach()
endforeach()
execute_process(COMMAND "${CLANG_FORMAT}" --dry-run -Werror ${files}
  RESULT_VARIABLE result OUTPUT_VARIABLE text ERROR_VARIABLE text)
if(NOT result EQUAL 0)
  string(REGEX MATCHALL "[^\n]*: error: code should be clang-formatted" places "${text}")
  list(TRANSFORM places REPLACE ":[0-9]+:[0-9]+: error.*" "")
  list(REMOVE_DUPLICATES places)
  list(JOIN places "\n  " places)
  message(FATAL_ERROR "these files are not formatted (clang-format-14 -i mends them):\n  ${places}")
endif()
