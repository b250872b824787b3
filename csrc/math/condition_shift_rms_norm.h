// RMS norm of a condition c and of the shifted one A c + b (APEX, Eq. 9), channel by channel. The statistics of a row
// are formed by the caller: `reciprocal` is 1 / sqrt(mean(v^2) + eps).
#pragma once

#include "common/macros.h"

namespace apex_fast::math {

template <class V>
APEX_HD V rms_norm(V value, V reciprocal, V weight) {
  return value * reciprocal * weight;
}

// d/dv of the sum over a row of grad * rms_norm(v); `projection` is mean(grad * weight * v) * reciprocal^2.
template <class V>
APEX_HD V rms_norm_backward(V grad, V value, V reciprocal, V weight, V projection) {
  return reciprocal * (grad * weight - value * projection);
}

}  // namespace apex_fast::math
