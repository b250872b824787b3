// The one place that launches kernels: on the current device and the given stream, and with the error of the launch.
#pragma once

#include <cuda_runtime.h>

namespace apex_fast::cuda {

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, const Arguments&... arguments) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace apex_fast::cuda
