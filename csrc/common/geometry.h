// What a kernel is told about its tensors. No torch header: CPU and CUDA kernels share it.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace apex_fast {

enum class DType : int32_t { F32 = 0, F64 = 1, F16 = 2, BF16 = 3 };

// A tensor [B, ...] is walked as [outer, B, inner] in memory order: `inner` elements lie side by side, and element j of
// sample b stands at
//   (j / inner) * outer_stride + b * batch_stride + j % inner.
// outer == 1 is the usual case (each sample is one block). outer > 1 is a dense permuted tensor whose batch dimension
// is not the slowest.
struct Geometry {
  int64_t batch;
  int64_t outer;
  int64_t inner;
  APEX_HD int64_t sample_size() const { return outer * inner; }
};

struct Operand {
  void* data;  // [batch] samples laid out as Geometry says; nullptr: the operand is absent
  DType dtype;
  int64_t batch_stride;  // in elements
  int64_t outer_stride;  // in elements
};

struct Times {
  const void* data;  // [batch], F32 or F64
  DType dtype;
  int64_t stride;  // in elements
};

APEX_HD double time_at(const Times& times, int64_t b) {
  return times.dtype == DType::F64 ? static_cast<const double*>(times.data)[b * times.stride]
                                   : static_cast<double>(static_cast<const float*>(times.data)[b * times.stride]);
}

}  // namespace apex_fast
