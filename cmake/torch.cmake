# Torch as a plain target. find_package(Torch) would, for a torch with CUDA, turn the CUDA language on by itself and ask
# for cuBLAS, cuFFT, cuRAND and other parts of a full toolkit that nothing here uses.

add_library(apex_torch_headers INTERFACE)
target_include_directories(apex_torch_headers SYSTEM INTERFACE "${TORCH_ROOT}/include")

add_library(apex_torch INTERFACE)
target_link_libraries(apex_torch INTERFACE
  apex_torch_headers "${TORCH_ROOT}/lib/libtorch_cpu.so" "${TORCH_ROOT}/lib/libc10.so")
