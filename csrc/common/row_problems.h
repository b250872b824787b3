// What the kernels of the row ops are told. No torch header: CPU and CUDA kernels share it.
#pragma once

#include <cstdint>

#include "common/geometry.h"

namespace apex_fast {

// Parameters are outer_stride elements apart; an outer_stride of 0 spreads a single number over the channels.

// A text path that starts with a norm: [rows, channels], dense.
struct ConditionShiftRmsNormProblem {
  int64_t rows;
  int64_t channels;
  Operand condition;
  Operand scale;        // [1] or [channels]
  Operand bias;         // [1] or [channels]
  Operand weight;       // [channels]
  const uint8_t* mask;  // [rows], nonzero = shift this token; nullptr = all
  double eps;
  bool wide;  // compute in fp64
};

// A text path that starts with a linear layer: [rows, channels], dense.
struct ProjectedConditionShiftProblem {
  int64_t rows;
  int64_t channels;
  Operand projected;    // W c
  Operand row_sums;     // [channels], W 1
  Operand linear_bias;  // [channels] or absent
  Operand scale;        // [1]
  Operand bias;         // [1]
  const uint8_t* mask;  // [rows], nonzero = shift this token; nullptr = all
  bool wide;
};

// hidden is [batch, rows_per_sample, channels], dense; scale and shift are [batch, channels] with strides.
struct ModulatedLayerNormProblem {
  int64_t batch;
  int64_t rows_per_sample;
  int64_t channels;
  Operand hidden;
  Operand scale;
  Operand shift;
  double eps;
  bool wide;
};

}  // namespace apex_fast
