// What the torch glue of the CUDA ops shares. ATen/cuda/CUDAContext.h is left out on purpose: it asks for headers of a
// whole CUDA toolkit.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>

#include "common/layout.h"

namespace apex_fast::cuda {

// Asynchronous errors of earlier work surface here too; what this reports for certain is a launch that was refused.
inline void check_launch(int error) {
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
}

// To be asked for under a device guard.
inline void* current_stream() {
  return c10::cuda::getCurrentCUDAStream().stream();
}

// fp64 numbers on the device of `like`. Freed when the glue returns: the allocator hands memory out again in the order
// of the stream, also while a graph is captured.
inline at::Tensor workspace(int64_t numbers, const at::Tensor& like) {
  return at::empty({numbers}, like.options().dtype(at::kDouble));
}

// The gradients that an op returns: in the layout of its primary, or empty tensors of shape [0] where not wanted.
template <size_t Count>
struct Gradients {
  std::array<at::Tensor, Count> tensors;
  Operand operands[Count];
  bool any = false;
  bool wide = false;  // one of them is fp64

  Gradients(const SampleLayout& layout, const at::Tensor& primary, const std::array<at::ScalarType, Count>& types,
            const std::array<bool, Count>& wanted) {
    for (size_t k = 0; k < Count; ++k) {
      operands[k] = SampleLayout::absent;
      if (wanted[k]) {
        tensors[k] = layout.make(types[k]);
        operands[k] = layout.output(tensors[k]);
        any = true;
        wide = wide || types[k] == at::kDouble;
      } else {
        tensors[k] = at::empty({0}, primary.options().dtype(types[k]));
      }
    }
  }
};

}  // namespace apex_fast::cuda
