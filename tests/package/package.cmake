# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DROOT=<repository> -DCASE=<way to use the library> -DBUILD=<build tree> -DWORK=<scratch folder>
#       -DCOMPILER=<C++ compiler> [-DCUDA_COMPILER=<nvcc> -DCUDA_ARCHITECTURES=<list>] [-DPARTS=<a,b>] -P package.cmake
# Uses the library as one kind of user does, with sources that stand in this folder, and runs the program.

cmake_minimum_required(VERSION 3.24)
file(REMOVE_RECURSE "${WORK}")
file(MAKE_DIRECTORY "${WORK}")

function(run)
  execute_process(COMMAND ${ARGV} WORKING_DIRECTORY "${WORK}" RESULT_VARIABLE result
    OUTPUT_VARIABLE text ERROR_VARIABLE text)
  if(NOT result EQUAL 0)
    list(JOIN ARGV " " command)
    message(FATAL_ERROR "${command}\n${text}")
  endif()
  set(output "${text}" PARENT_SCOPE)
endfunction()

# Configures and builds a consumer project, and runs its programs.
function(build_consumer folder)
  run("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}/${folder}" -B "${WORK}/build" -G "${GENERATOR}"
    "-DCMAKE_CXX_COMPILER=${COMPILER}" -DCMAKE_BUILD_TYPE=Debug ${ARGN})
  run("${CMAKE_COMMAND}" --build "${WORK}/build")
  run("${WORK}/build/consumer")
  if(EXISTS "${WORK}/build/parts")
    run("${WORK}/build/parts")
  endif()
endfunction()

# Installs into one place and moves the result to another: the package must not know where it was.
function(install_and_move)
  run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${WORK}/staged")
  file(RENAME "${WORK}/staged" "${WORK}/moved")
  file(GLOB_RECURSE package_files "${WORK}/moved/share/*.cmake" "${WORK}/moved/share/*.pc")
  if(NOT package_files)
    message(FATAL_ERROR "no package files were installed under share/")
  endif()
  foreach(file IN LISTS package_files)
    file(READ "${file}" text)
    foreach(path IN ITEMS "${ROOT}" "${BUILD}" "${WORK}")
      string(FIND "${text}" "${path}" position)
      if(position GREATER_EQUAL 0)
        message(FATAL_ERROR "${file} names the folder ${path} of this machine")
      endif()
    endforeach()
  endforeach()
endfunction()

if(CASE STREQUAL "find_package")
  install_and_move()
  file(GLOB_RECURSE here RELATIVE "${ROOT}/include" "${ROOT}/include/*.hpp" "${ROOT}/include/*.cuh")
  file(GLOB_RECURSE there RELATIVE "${WORK}/moved/include" "${WORK}/moved/include/*")
  list(SORT here)
  list(SORT there)
  if(NOT here STREQUAL there)
    message(FATAL_ERROR "the installed headers are not those of the repository:\n${there}\nagainst\n${here}")
  endif()
  build_consumer(find_package "-DCMAKE_PREFIX_PATH=${WORK}/moved" "-DPARTS=${PARTS}")

elseif(CASE STREQUAL "build_tree")
  build_consumer(find_package "-Dtessera_ROOT=${BUILD}" -DPARTS=)

elseif(CASE STREQUAL "add_subdirectory")
  build_consumer(add_subdirectory "-DTESSERA_SOURCE=${ROOT}")

elseif(CASE STREQUAL "fetch_content")
  build_consumer(add_subdirectory -DVIA=fetch_content "-DFETCHCONTENT_SOURCE_DIR_TESSERA=${ROOT}")

elseif(CASE STREQUAL "cuda")
  install_and_move()
  build_consumer(cuda "-DCMAKE_PREFIX_PATH=${WORK}/moved" "-DCMAKE_CUDA_COMPILER=${CUDA_COMPILER}"
    "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES}")

elseif(CASE STREQUAL "copy")
  # The whole of it: a copy of include/ and a compiler.
  file(COPY "${ROOT}/include" DESTINATION "${WORK}")
  run("${COMPILER}" -std=c++20 -I include "${CMAKE_CURRENT_LIST_DIR}/consumer.cpp" -o consumer)
  run("${WORK}/consumer")

elseif(CASE STREQUAL "pkg_config")
  find_program(pkg_config NAMES pkg-config pkgconf)
  if(NOT pkg_config)
    message("skipped: pkg-config is not installed")
    return()
  endif()
  install_and_move()
  set(ENV{PKG_CONFIG_PATH} "${WORK}/moved/share/pkgconfig")
  run("${pkg_config}" --modversion tessera)
  file(READ "${ROOT}/include/tessera/core/version.hpp" text)
  string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+)\n.*" "\\1.\\2.\\3" version "${text}")
  string(STRIP "${output}" output)
  if(NOT output STREQUAL version)
    message(FATAL_ERROR "pkg-config says version '${output}', the header says '${version}'")
  endif()
  run("${pkg_config}" --cflags --libs tessera)
  separate_arguments(flags UNIX_COMMAND "${output}")
  run("${COMPILER}" -std=c++20 "${CMAKE_CURRENT_LIST_DIR}/consumer.cpp" ${flags} -o consumer)
  run("${WORK}/consumer")

elseif(CASE MATCHES "^extern_template_(host|device|device_cuda)$")
  # The engine's file is compiled by the C++ compiler; the layer comes from one other file, or the link fails.
  set(sources "${CMAKE_CURRENT_LIST_DIR}/extern_template")
  set(space host)
  if(NOT CASE STREQUAL "extern_template_host")
    set(space device)
  endif()
  set(compile -std=c++20 "-I${ROOT}/include" "-I${sources}" -DENGINE_SPACE=tessera::space::${space})
  run("${COMPILER}" ${compile} -c "${sources}/engine.cpp" -o engine.o)
  if(CASE STREQUAL "extern_template_device_cuda")
    configure_file("${sources}/instantiation_device.cpp" "${WORK}/instantiation.cu" COPYONLY)
    run("${CUDA_COMPILER}" ${compile} -c instantiation.cu -o instantiation.o)
    run("${CUDA_COMPILER}" engine.o instantiation.o -o engine)
  else()
    run("${COMPILER}" ${compile} -c "${sources}/instantiation_${space}.cpp" -o instantiation.o)
    run("${COMPILER}" engine.o instantiation.o -o engine)
  endif()
  run("${WORK}/engine")

  function(expect_undefined pattern)
    execute_process(COMMAND "${COMPILER}" ${ARGN} -o wrong WORKING_DIRECTORY "${WORK}" RESULT_VARIABLE result
      OUTPUT_VARIABLE text ERROR_VARIABLE text)
    if(result EQUAL 0 OR NOT text MATCHES "undefined reference to [^\n]*${pattern}")
      message(FATAL_ERROR "expected an undefined reference to ${pattern}, the linker said (${result}):\n${text}")
    endif()
  endfunction()
  expect_undefined("moe_layer<.*>::forward" engine.o)
  if(CASE STREQUAL "extern_template_device")
    # An engine that forgets `extern` compiles the layer itself, and finds no device half: never the host's instead.
    run("${COMPILER}" ${compile} -DENGINE_FORGETS_EXTERN -c "${sources}/engine.cpp" -o forgetful.o)
    expect_undefined("layer_forward<" forgetful.o)
  endif()

else()
  message(FATAL_ERROR "there is no case '${CASE}'")
endif()
file(REMOVE_RECURSE "${WORK}")
