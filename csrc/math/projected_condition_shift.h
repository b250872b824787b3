// What a linear layer W, beta makes of c and of the shifted condition a c + b, from p = W c alone (APEX, Eq. 9):
// W (a c + b) + beta = a p + (b W 1 + beta).
#pragma once

#include "common/macros.h"

namespace apex_fast::math {

template <class V>
APEX_HD V projected_real(V projected, V linear_bias) {
  return projected + linear_bias;
}

// offset = b W 1 + beta, one number per channel, formed in double by the caller.
template <class V>
APEX_HD V projected_shift(V projected, V scale, V offset) {
  return scale * projected + offset;
}

template <class V>
APEX_HD V projected_shift_backward(V grad_real, V grad_shifted, V scale) {
  return grad_real + scale * grad_shifted;
}

}  // namespace apex_fast::math
