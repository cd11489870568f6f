# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DWORK=<scratch folder> -P self_test.cmake
# The floors check is itself checked: each small tree below breaks one rule, and the check must name it.

cmake_minimum_required(VERSION 3.24)

set(preamble "// SPDX-FileCopyrightText: someone\n// SPDX-License-Identifier: Apache-2.0\n#pragma once\n")

# expect(<sentence, or "" for a good tree> <header> <content after the preamble>)
function(expect sentence header content)
  file(REMOVE_RECURSE "${WORK}")
  set(dir "${WORK}/include/tessera")
  file(WRITE "${dir}/core/config.hpp" "${preamble}#if defined(__CUDACC__)\n#endif\n")
  file(WRITE "${dir}/core/core.hpp" "${preamble}#include <tessera/core/config.hpp>\n")
  file(WRITE "${dir}/comm/self.hpp" "${preamble}#include <tessera/core/config.hpp>\n")
  file(WRITE "${dir}/comm/self.cuh" "${preamble}#include <cuda_runtime.h>\n")
  file(WRITE "${dir}/comm/comm.hpp" "${preamble}#include <tessera/comm/self.hpp>\n")
  file(WRITE "${dir}/gemm/gemm.hpp" "${preamble}#include <vector>\n")
  file(WRITE "${dir}/moe/moe.hpp" "${preamble}#include <vector>\n")
  file(WRITE "${dir}/checkpoint/checkpoint.hpp" "${preamble}#include <vector>\n")
  file(WRITE "${dir}/tessera.hpp" "${preamble}#include <tessera/comm/comm.hpp>\n#include <tessera/core/core.hpp>\n\
#include <tessera/gemm/gemm.hpp>\n#include <tessera/moe/moe.hpp>\n")
  file(WRITE "${WORK}/include/tessera/${header}" "${content}")
  execute_process(COMMAND "${CMAKE_COMMAND}" -DROOT=${WORK} -P "${CMAKE_CURRENT_LIST_DIR}/floors.cmake"
    RESULT_VARIABLE result ERROR_VARIABLE text OUTPUT_VARIABLE text)
  if(sentence STREQUAL "")
    if(NOT result EQUAL 0)
      message(FATAL_ERROR "a tree that keeps all rules was refused:\n${text}")
    endif()
    return()
  endif()
  string(FIND "${text}" "${sentence}" position)
  if(result EQUAL 0 OR position LESS 0)
    message(FATAL_ERROR "expected '${sentence}' of ${header}, got:\n${text}")
  endif()
endfunction()

expect("" moe/moe.hpp "${preamble}#include <cstdint>\n\n#include <tessera/comm/self.hpp>\n")
expect("" comm/mpi.hpp "${preamble}#include <mpi.h>\n")
expect("" tessera.cuh "${preamble}#include <tessera/tessera.hpp>\n#include <tessera/comm/self.cuh>\n")
expect("<tessera/comm/self.hpp> is on floor 1; core" core/upward.hpp "${preamble}#include <tessera/comm/self.hpp>\n")
expect("<tessera/gemm/gemm.hpp> is on floor 1; comm" comm/beside.hpp
  "${preamble}#include <tessera/gemm/gemm.hpp>\n")
expect("<tessera/gemm/gone.hpp> does not exist" moe/gone.hpp "${preamble}#include <tessera/gemm/gone.hpp>\n")
expect("<tessera/tessera.hpp>: the umbrella" moe/all.hpp "${preamble}#include <tessera/tessera.hpp>\n")
expect("'#include \"x.hpp\"'" moe/quoted.hpp "${preamble}#include \"x.hpp\"\n")
expect("a .hpp compiles without nvcc" moe/device.hpp "${preamble}#include <tessera/comm/self.cuh>\n")
expect("<mpi.h> belongs in the header of its optional part" moe/mpi.hpp "${preamble}#include <mpi.h>\n")
expect("<cuda_runtime.h>: a .hpp uses" moe/cuda.hpp "${preamble}#include <cuda_runtime.h>\n")
expect("it asks for the CUDA compiler" moe/chooses.hpp "${preamble}#if defined(__CUDACC__)\n#endif\n")
expect("the room 'attic' stands on no floor" attic/box.hpp "${preamble}#include <vector>\n")
expect("only tessera.hpp and tessera.cuh" loose.hpp "${preamble}#include <vector>\n")
expect("needs an optional dependency" moe/uses_mpi.hpp "${preamble}#include <tessera/comm/mpi.hpp>\n")
expect("layout/layout.hpp: the room layout needs this header" layout/block.hpp "${preamble}#include <vector>\n")
expect("comm/comm.hpp: it does not include <tessera/comm/other.hpp>" comm/other.hpp "${preamble}#include <vector>\n")
expect("tessera.hpp: it does not include <tessera/layout/layout.hpp>" layout/layout.hpp "${preamble}#include <vector>\n")
expect("" checkpoint/detail/json.hpp "${preamble}#include <nlohmann/json.hpp>\n")
expect("<nlohmann/json.hpp> belongs in the header of its optional part" moe/json.hpp
  "${preamble}#include <nlohmann/json.hpp>\n")
expect("it starts with the two SPDX lines" moe/bare.hpp "#pragma once\n#include <vector>\n\n")
file(REMOVE_RECURSE "${WORK}")
