// Launchers of the CUDA kernels. No torch header and no CUDA header: the glue in csrc/cuda/*.cpp calls them,
// csrc/cuda/*.cu define them. Each takes the stream as an opaque pointer and returns the cudaError_t of its launch as
// an int (0 is success).
#pragma once

#include "common/geometry.h"

namespace apex_fast::cuda {

// x, z and x_t share one dtype.
int interpolate(const Geometry& geometry, const Operand& x, const Operand& z, const Times& t, const Operand& x_t,
                void* stream);

// grad, grad_x and grad_z share one dtype. An output whose data is nullptr is not written.
int interpolate_backward(const Geometry& geometry, const Operand& grad, const Times& t, const Operand& grad_x,
                         const Operand& grad_z, void* stream);

}  // namespace apex_fast::cuda
