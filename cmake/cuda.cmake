# CUDA kernels. csrc/cuda/*.cu hold kernels and include no torch header; csrc/cuda/*.cpp is the glue to torch, compiled
# by the host compiler. Sets APEX_CUDA_OPS, the ops that are linked in.

include(cmake/cuda_decision.cmake)

if(APEX_CUDA_COMPILED)
  set(CMAKE_CUDA_COMPILER "${APEX_NVCC}")
  set(CMAKE_CUDA_ARCHITECTURES "${APEX_CUDA_ARCHITECTURES}")
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
endif()

function(apex_add_cuda_kernels library)
  set(APEX_CUDA_OPS "" PARENT_SCOPE)
  if(NOT APEX_CUDA_COMPILED)
    return()
  endif()
  file(GLOB kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
  file(GLOB glue CONFIGURE_DEPENDS csrc/cuda/*.cpp)

  add_library(apex_cuda_kernels OBJECT ${kernels})
  set_target_properties(apex_cuda_kernels PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
  target_include_directories(apex_cuda_kernels PRIVATE csrc)
  # -lineinfo names source lines in profilers and costs nothing at run time.
  target_compile_options(apex_cuda_kernels PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo -Werror=all-warnings>)
  # The compile check prints what each kernel takes; tests/test_cuda_resources.py reads it.
  if(NOT APEX_CUDA_BUILT)
    target_compile_options(apex_cuda_kernels PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
  endif()

  add_library(apex_cuda_glue OBJECT ${glue})
  target_include_directories(apex_cuda_glue PRIVATE csrc)
  target_compile_options(apex_cuda_glue PRIVATE -Wall -Wextra)
  target_link_libraries(apex_cuda_glue PRIVATE apex_torch_headers CUDA::cudart)

  if(NOT APEX_CUDA_BUILT)
    # A CPU build of torch has every CUDA header but the one that records how its CUDA half was configured.
    set(stand_in "${CMAKE_CURRENT_BINARY_DIR}/check")
    # Unlike file(WRITE) this leaves an equal file alone, and the next build recompiles nothing for it.
    file(CONFIGURE OUTPUT "${stand_in}/c10/cuda/impl/cuda_cmake_macros.h"
      CONTENT "#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    target_include_directories(apex_cuda_glue SYSTEM PRIVATE "${stand_in}")
    return()
  endif()
  # The runtime that torch has loaded, not a second one linked in.
  set_target_properties(${library} PROPERTIES CUDA_RUNTIME_LIBRARY Shared)
  target_sources(${library} PRIVATE $<TARGET_OBJECTS:apex_cuda_kernels> $<TARGET_OBJECTS:apex_cuda_glue>)
  target_link_libraries(${library} PRIVATE
    CUDA::cudart "${TORCH_ROOT}/lib/libtorch_cuda.so" "${TORCH_ROOT}/lib/libc10_cuda.so")
  list(TRANSFORM kernels REPLACE ".*/([a-z_]+)\\.cu$" "\\1")
  set(APEX_CUDA_OPS "${kernels}" PARENT_SCOPE)
endfunction()
