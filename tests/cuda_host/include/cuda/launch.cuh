// Takes the place of csrc/cuda/launch.cuh: runs the blocks one after the other.
#pragma once

#include <cuda_runtime.h>

namespace apex_fast::cuda {

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void*, const Arguments&... arguments) {
  if (grid.y > 65535 || grid.z > 65535 || grid.x == 0 || grid.y == 0) return cudaErrorInvalidConfiguration;
  auto& machine = emulator::Machine::one();
  machine.grid = grid;
  machine.block = block;
  machine.body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      machine.block_index = dim3(x, y, 0);
      machine.run_block();
    }
  return cudaSuccess;
}

}  // namespace apex_fast::cuda
