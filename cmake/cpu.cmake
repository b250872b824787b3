# CPU kernels: the loops in csrc/cpu/kernels are compiled once per instruction set and csrc/cpu/dispatch.cpp picks one
# set when the program runs.

# -fopenmp when compiling, or at::parallel_for is serial without a word. Not when linking: the runtime that torch has
# loaded is the one to share.
# -Wno-psabi: notes about how vectors are passed between functions, which are all inlined here.
set(APEX_CPU_OPTIONS -fopenmp -Wall -Wextra -Wno-psabi)

set(APEX_CPU_ISAS default)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND APEX_CPU_ISAS avx2 avx512)
endif()
# -ffp-contract=fast: the sums of the losses are limited by arithmetic, not memory, and fused multiply-adds halve it; one
# rounding instead of two. -Wno-maybe-uninitialized: g++ 12 takes the don't-care operand of its own intrinsics for one.
set(APEX_CPU_FLAGS_default "")
set(APEX_CPU_FLAGS_avx2 -mavx2 -mfma -mf16c -ffp-contract=fast -Wno-maybe-uninitialized)
set(APEX_CPU_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -ffp-contract=fast
    -Wno-maybe-uninitialized)

function(apex_add_cpu_kernels library)
  file(GLOB sources CONFIGURE_DEPENDS csrc/cpu/kernels/*.cpp)
  # In this order: where two sets hold the same inline function, the linker keeps the first, which must be the one that
  # runs on every processor.
  foreach(isa IN LISTS APEX_CPU_ISAS)
    string(TOUPPER ${isa} capability)
    add_library(apex_cpu_${isa} OBJECT ${sources})
    target_include_directories(apex_cpu_${isa} PRIVATE csrc)
    target_link_libraries(apex_cpu_${isa} PRIVATE apex_torch_headers)
    target_compile_definitions(apex_cpu_${isa} PRIVATE
      APEX_ISA=${isa} CPU_CAPABILITY=${capability} CPU_CAPABILITY_${capability})
    target_compile_options(apex_cpu_${isa} PRIVATE ${APEX_CPU_OPTIONS} ${APEX_CPU_FLAGS_${isa}})
    target_sources(${library} PRIVATE $<TARGET_OBJECTS:apex_cpu_${isa}>)
  endforeach()
endfunction()
