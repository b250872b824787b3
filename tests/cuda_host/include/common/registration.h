// Takes the place of csrc/common/registration.h: the CUDA kernels register themselves for CPU tensors.
#pragma once

#include <torch/library.h>

#define APEX_FAST_KERNELS_FOR(device, m) TORCH_LIBRARY_IMPL(apex_fast, CPU, m)
