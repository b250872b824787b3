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
#
# setup.py may pass, from build_backend/apex_nvcc.py: APEX_FAST_NVCC, the compiler of the Python packages for a machine
# that has none that fits; or, where they are not there either, APEX_NVCC_COMMAND, which installs them.

function(apex_find_nvcc)
  # The same places in the same order as machine_nvcc in build_backend/apex_nvcc.py. CUDACXX is what CMake users set,
  # CUDA_HOME what torch users set. /usr/local/cuda is where toolkits install themselves; the tests move it to hide one.
  set(nvcc "${APEX_FAST_NVCC}")
  if(NOT nvcc)
    set(nvcc "$ENV{CUDACXX}")
  endif()
  if(NOT nvcc)
    unset(nvcc)
    set(homes "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}")
    list(FILTER homes EXCLUDE REGEX "^$")
    list(TRANSFORM homes APPEND "/bin")
    set(local "$ENV{APEX_FAST_LOCAL_CUDA}")
    if(NOT local)
      set(local /usr/local/cuda)
    endif()
    # Not the folders that CMake would add: what is said to be missing from PATH must not have been found elsewhere.
    find_program(nvcc nvcc PATHS ${homes} ENV PATH "${local}/bin" NO_DEFAULT_PATH NO_CACHE)
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
    if(torch_major EQUAL 12)
      string(APPEND remedy " pip can bring the nvcc of CUDA 13, of 12 it has none.")
    endif()
  elseif(NOT APEX_CUDA_MODE STREQUAL "check" AND NOT torch_major STREQUAL nvcc_major)
    set(obstacle "torch is built for CUDA ${APEX_TORCH_CUDA_VERSION} and ${APEX_NVCC} is ${APEX_NVCC_VERSION}")
    set(remedy "The major versions must agree: install the CUDA toolkit ${torch_major} and set CUDACXX to its nvcc.")
  endif()
  if(obstacle AND APEX_NVCC_COMMAND)
    # Reached without build isolation only: with it they have been fetched.
    string(APPEND remedy " Or without a toolkit: ${APEX_NVCC_COMMAND}. Without --no-build-isolation pip"
      " fetches them for the build by itself.")
  endif()
  if(obstacle AND APEX_CUDA_MODE STREQUAL "auto")
    set(APEX_CUDA_DECISION "off: ${obstacle}")
    message(STATUS "apex_fast: for CUDA kernels: ${remedy}")
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
    set(text "nvcc ${APEX_NVCC_VERSION}, architectures ${text}")
    if(APEX_FAST_NVCC)
      string(APPEND text ", package nvidia-cuda-nvcc")
    endif()
    set(APEX_CUDA_DECISION "on: ${text}")
    if(APEX_CUDA_MODE STREQUAL "check")
      set(APEX_CUDA_DECISION "compiled and not linked (check): ${text}")
    else()
      set(APEX_CUDA_BUILT ON)
    endif()
  endif()
endif()
message(STATUS "apex_fast: torch ${APEX_TORCH_VERSION}, CUDA kernels ${APEX_CUDA_DECISION}")
