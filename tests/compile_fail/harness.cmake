# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DROOT=<repository> -DCOMPILER=<C++ compiler> -DSOURCE=<file> -P harness.cmake
# Compiles SOURCE twice. With TESSERA_EXPECT_FAILURE it must fail, and an error must contain the text that the first line
# names (`// expect: <text>`; further `// expect:` lines directly below are required too). Without, its twin must compile,
# so that a file which fails for another reason is seen.

cmake_minimum_required(VERSION 3.24)

file(READ "${SOURCE}" text)
set(expected "")
while(text MATCHES "^// expect: ([^\n]+)\n")
  set(line "${CMAKE_MATCH_1}")
  string(LENGTH "${CMAKE_MATCH_0}" length)
  string(SUBSTRING "${text}" ${length} -1 text)
  string(STRIP "${line}" line)
  list(APPEND expected "${line}")
endwhile()
if(NOT expected)
  message(FATAL_ERROR "${SOURCE}: the first line must read '// expect: <text of the error>'")
endif()
if(NOT text MATCHES "TESSERA_EXPECT_FAILURE")
  message(FATAL_ERROR "${SOURCE}: the code that must fail stands under #if defined(TESSERA_EXPECT_FAILURE)")
endif()

set(compile "${COMPILER}" -std=c++20 -fsyntax-only -Wall -Wextra "-I${ROOT}/include")
execute_process(COMMAND ${compile} "${SOURCE}" RESULT_VARIABLE result ERROR_VARIABLE errors)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${SOURCE}: the twin that is right must compile:\n${errors}")
endif()

execute_process(COMMAND "${CMAKE_COMMAND}" -E env LC_ALL=C ${compile} -DTESSERA_EXPECT_FAILURE "${SOURCE}"
  RESULT_VARIABLE result ERROR_VARIABLE errors)
if(result EQUAL 0)
  message(FATAL_ERROR "${SOURCE}: this must not compile, and it does")
endif()

# What the compiler says counts, not the source lines it shows: those hold the text in any case.
string(REPLACE ";" "," errors_list "${errors}")
string(REGEX REPLACE "[][]" "|" errors_list "${errors_list}")
string(REPLACE "\n" ";" errors_list "${errors_list}")
list(FILTER errors_list EXCLUDE REGEX "^ *[0-9]* +[|]")
foreach(line IN LISTS expected)
  string(REPLACE ";" "," wanted "${line}")
  string(REGEX REPLACE "[][]" "|" wanted "${wanted}")
  string(FIND "${errors_list}" "${wanted}" position)
  if(position LESS 0)
    message(FATAL_ERROR "${SOURCE}: no error says '${line}'. The compiler said:\n${errors}")
  endif()
endforeach()
