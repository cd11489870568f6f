# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DROOT=<repository> -DCOMPILER=<C++ compiler> -P self_test.cmake
# The harness is itself checked: it must accept the good file here and refuse the others, each for its own reason.

cmake_minimum_required(VERSION 3.24)

function(expect sentence file)
  execute_process(COMMAND "${CMAKE_COMMAND}" "-DROOT=${ROOT}" "-DCOMPILER=${COMPILER}"
      "-DSOURCE=${CMAKE_CURRENT_LIST_DIR}/${file}" -P "${CMAKE_CURRENT_LIST_DIR}/../harness.cmake"
    RESULT_VARIABLE result OUTPUT_VARIABLE text ERROR_VARIABLE text)
  if(sentence STREQUAL "")
    if(NOT result EQUAL 0)
      message(FATAL_ERROR "${file} must be accepted:\n${text}")
    endif()
    return()
  endif()
  string(REGEX REPLACE "[ \n]+" " " text "${text}")
  string(FIND "${text}" "${sentence}" position)
  if(result EQUAL 0 OR position LESS 0)
    message(FATAL_ERROR "${file} must be refused with '${sentence}', the harness said:\n${text}")
  endif()
endfunction()

expect("" good.cpp)
expect("this must not compile, and it does" compiles.cpp)
expect("no error says 'a sentence of the source'" other_error.cpp)
expect("the twin that is right must compile" broken_twin.cpp)
expect("the first line must read" no_expectation.cpp)
