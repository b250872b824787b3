# Whether the CUDA kernels are built. Decides and changes nothing else, so it also runs alone (cmake -P). APEX_FAST_CUDA,
# in upper or lower case:
#
#   auto   build them if torch has CUDA and an nvcc of the same major version is found
#   on     the same, and stop with a message if they cannot be built
#   off    CPU only
#   check  compile them and link nothing: for machines without a GPU or with a CPU build of torch
#
# Sets APEX_CUDA_COMPILED (compile them), APEX_CUDA_BUILT (and link them), APEX_NVCC, APEX_CUDA_ARCHITECTURES and
# APEX_CUDA_DECISION, the reason in one line.

function(apex_find_nvcc)
  # CUDACXX is what CMake users set, CUDA_HOME what torch users set.
  set(nvcc "$ENV{CUDACXX}")
  if(NOT nvcc)
    unset(nvcc)
    find_program(nvcc nvcc HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" PATHS /usr/local/cuda/bin NO_CACHE)
  endif()
  set(version "")
  if(nvcc)
    execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET)
    if(text MATCHES "release ([0-9]+\\.[0-9]+)")
      set(version "${CMAKE_MATCH_1}")
    endif()
  endif()
  set(APEX_NVCC "${nvcc}" PARENT_SCOPE)
  set(APEX_NVCC_VERSION "${version}" PARENT_SCOPE)
endfunction()

string(TOLOWER "${APEX_FAST_CUDA}" APEX_CUDA_MODE)
if(NOT APEX_CUDA_MODE MATCHES "^(auto|on|off|check)$")
  message(FATAL_ERROR "APEX_FAST_CUDA is '${APEX_FAST_CUDA}': expected auto, on, off or check.")
endif()

set(APEX_CUDA_BUILT OFF)
set(APEX_CUDA_COMPILED OFF)
set(APEX_CUDA_ARCHITECTURES "")
set(obstacle "")
if(APEX_CUDA_MODE STREQUAL "off")
  set(APEX_CUDA_DECISION "off: APEX_FAST_CUDA=off")
else()
  apex_find_nvcc()
  string(REGEX MATCH "^[0-9]+" torch_major "${APEX_TORCH_CUDA_VERSION}")
  string(REGEX MATCH "^[0-9]+" nvcc_major "${APEX_NVCC_VERSION}")
  if(NOT APEX_CUDA_MODE STREQUAL "check" AND NOT APEX_TORCH_CUDA_VERSION)
    set(obstacle "torch ${APEX_TORCH_VERSION} has no CUDA")
    set(remedy "Install a torch with CUDA, or set APEX_FAST_CUDA=check to compile only.")
  elseif(NOT APEX_NVCC_VERSION)
    set(obstacle "no nvcc on PATH, in CUDA_HOME or CUDACXX")
    string(STRIP "CUDA toolkit ${APEX_TORCH_CUDA_VERSION}" toolkit)
    set(remedy "Install the ${toolkit}, or name its compiler: CUDACXX=/path/to/nvcc.")
  elseif(NOT APEX_CUDA_MODE STREQUAL "check" AND NOT torch_major STREQUAL nvcc_major)
    set(obstacle "torch is built for CUDA ${APEX_TORCH_CUDA_VERSION} and ${APEX_NVCC} is ${APEX_NVCC_VERSION}")
    set(remedy "The major versions must agree: install the CUDA toolkit ${torch_major} and set CUDACXX to its nvcc.")
  endif()
  if(obstacle AND APEX_CUDA_MODE STREQUAL "auto")
    set(APEX_CUDA_DECISION "off: ${obstacle}")
  elseif(obstacle)
    message(FATAL_ERROR "APEX_FAST_CUDA=${APEX_CUDA_MODE}, but ${obstacle}. ${remedy}")
  else()
    set(APEX_CUDA_COMPILED ON)
    set(APEX_CUDA_ARCHITECTURES "${APEX_FAST_CUDA_ARCHS}")
    if(NOT APEX_CUDA_ARCHITECTURES)
      # Machine code for A100, H100/H200, B200 and RTX 50; the newest also as PTX, for what comes after it.
      set(APEX_CUDA_ARCHITECTURES 80-real 90-real 100-real 120)
      if(APEX_NVCC_VERSION VERSION_LESS 12.8)
        set(APEX_CUDA_ARCHITECTURES 80-real 90)
      endif()
    endif()
    string(REPLACE ";" ", " text "${APEX_CUDA_ARCHITECTURES}")
    set(APEX_CUDA_DECISION "on: nvcc ${APEX_NVCC_VERSION}, architectures ${text}")
    if(APEX_CUDA_MODE STREQUAL "check")
      set(APEX_CUDA_DECISION "compiled and not linked (check): nvcc ${APEX_NVCC_VERSION}, architectures ${text}")
    else()
      set(APEX_CUDA_BUILT ON)
    endif()
  endif()
endif()
message(STATUS "apex_fast: torch ${APEX_TORCH_VERSION}, CUDA kernels ${APEX_CUDA_DECISION}")
