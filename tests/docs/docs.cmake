# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DROOT=<repository> -DDOXYGEN=<program> -DOUTPUT=<folder> -P docs.cmake
# Builds the documentation; a warning is a failure, and so is documentation that lacks what must be in it.

cmake_minimum_required(VERSION 3.24)

if(NOT DOXYGEN)
  message("skipped: doxygen is not installed")
  return()
endif()

# The theme is a package of its own (Debian: doxygen-awesome-css); without it the pages look plainer.
find_file(theme doxygen-awesome.css PATHS /usr/share/doxygen-awesome-css /usr/local/share/doxygen-awesome-css)
file(READ "${ROOT}/Doxyfile" settings)
string(APPEND settings "\nOUTPUT_DIRECTORY = \"${OUTPUT}\"\nWARN_AS_ERROR = FAIL_ON_WARNINGS\n")
if(theme)
  string(APPEND settings "HTML_EXTRA_STYLESHEET = \"${theme}\"\n")
endif()
file(REMOVE_RECURSE "${OUTPUT}")
file(WRITE "${OUTPUT}/Doxyfile" "${settings}")
execute_process(COMMAND "${DOXYGEN}" "${OUTPUT}/Doxyfile" WORKING_DIRECTORY "${ROOT}"
  RESULT_VARIABLE result OUTPUT_VARIABLE text ERROR_VARIABLE text)
if(NOT result EQUAL 0 OR text MATCHES "warning: ")
  message(FATAL_ERROR "doxygen is not content:\n${text}")
endif()

# A setting that hides everything would pass without a warning.
foreach(page IN ITEMS structtessera_1_1bfloat16.html classtessera_1_1memory__builder.html index.html)
  if(NOT EXISTS "${OUTPUT}/html/${page}")
    message(FATAL_ERROR "the documentation has no ${page}")
  endif()
endforeach()
