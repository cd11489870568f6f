# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# The README's C++ examples of a layer and of a pipeline must be the marked parts of examples/moe_minimal.cpp and
# examples/pipeline_minimal.cpp, which are compiled and run; of the latter without the indentation.
# cmake -DROOT=<repository> -P readme.cmake

file(READ "${ROOT}/README.md" readme)

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

macro(expect_shown name)
  if(NOT shown STREQUAL compiled)
    message(FATAL_ERROR "README.md shows other code than examples/${name}.cpp has between its markers:\n${shown}")
  endif()
endmacro()

file(READ "${ROOT}/examples/moe_minimal.cpp" example)
part_between("${readme}" "```cpp\n" "```" shown)
part_between("${example}" "//! [minimal]\n" "//! [minimal]" compiled)
expect_shown(moe_minimal)

file(READ "${ROOT}/examples/pipeline_minimal.cpp" example)
string(FIND "${readme}" "\n## Pipelines\n" from)
string(SUBSTRING "${readme}" ${from} -1 section)
part_between("${section}" "```cpp\n" "```" shown)
part_between("${example}" "  //! [pipeline]\n" "  //! [pipeline]" compiled)
string(REPLACE "\n  " "\n" compiled "\n${compiled}")
string(SUBSTRING "${compiled}" 1 -1 compiled)
expect_shown(pipeline_minimal)
