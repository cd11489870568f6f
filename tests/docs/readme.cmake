# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# The README's first C++ example must be the marked part of examples/moe_minimal.cpp, which is compiled and run.
# cmake -DROOT=<repository> -P readme.cmake

file(READ "${ROOT}/README.md" readme)
file(READ "${ROOT}/examples/moe_minimal.cpp" example)

function(part_between text begin end out)
  string(FIND "${text}" "${begin}" from)
  if(from EQUAL -1)
    message(FATAL_ERROR "'${begin}' was not found")
  endif()
  string(LENGTH "${begin}" length)
  math(EXPR from "${from} + ${length}")
  string(SUBSTRING "${text}" ${from} -1 rest)
  string(FIND "${rest}" "${end}" to)
  if(to EQUAL -1)
    message(FATAL_ERROR "'${begin}' is not closed by '${end}'")
  endif()
  string(SUBSTRING "${rest}" 0 ${to} part)
  set(${out} "${part}" PARENT_SCOPE)
endfunction()

part_between("${readme}" "```cpp\n" "```" shown)
part_between("${example}" "//! [minimal]\n" "//! [minimal]" compiled)
if(NOT shown STREQUAL compiled)
  message(FATAL_ERROR "README.md shows other code than examples/moe_minimal.cpp has between its markers:\n${shown}")
endif()
