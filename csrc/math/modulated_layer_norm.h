// Layer norm without parameters of its own, modulated per sample: (h - mean) / std * (1 + scale) + shift. The
// statistics of a row are formed by the caller: `rstd` is 1 / sqrt(variance + eps).
#pragma once

#include "common/macros.h"

namespace apex_fast::math {

template <class V>
APEX_HD V normalised(V hidden, V mean, V rstd) {
  return (hidden - mean) * rstd;
}

template <class V>
APEX_HD V modulated(V normalised, V one_plus_scale, V shift) {
  return normalised * one_plus_scale + shift;
}

// `grad` is that of the normalised value; the means are over the row: of grad, and of grad * normalised.
template <class V>
APEX_HD V layer_norm_backward(V grad, V normalised, V rstd, V mean_grad, V mean_product) {
  return rstd * (grad - mean_grad - normalised * mean_product);
}

}  // namespace apex_fast::math
