# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DROOT=<repository> -DSHELLCHECK=<program> -P shell.cmake
# Shell scripts pass bash -n and shellcheck.

cmake_minimum_required(VERSION 3.24)

file(GLOB_RECURSE scripts "${ROOT}/tests/*.sh" "${ROOT}/bench/*.sh" "${ROOT}/examples/*.sh")
list(APPEND scripts "${ROOT}/.ci/run")
foreach(script IN LISTS scripts)
  execute_process(COMMAND bash -n "${script}" COMMAND_ERROR_IS_FATAL ANY)
endforeach()
if(NOT SHELLCHECK)
  message("skipped: shellcheck is not installed")
  return()
endif()
execute_process(COMMAND "${SHELLCHECK}" ${scripts} RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "shellcheck found something to mend in the scripts above")
endif()
