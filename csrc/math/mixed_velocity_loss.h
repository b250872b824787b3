// F - [(1 - lambda) (z - x) + lambda v_fake] (APEX, Eq. 24 in velocity space); lambda = 0 is flow matching.
#pragma once

#include "common/macros.h"

namespace apex_fast::math {

template <class V>
APEX_HD V flow_residual(V velocity, V x, V z) {
  return velocity - (z - x);
}

template <class V>
APEX_HD V mixed_residual(V velocity, V x, V z, V v_fake, V mix_weight, V one_minus_mix_weight) {
  return velocity - (one_minus_mix_weight * (z - x) + mix_weight * v_fake);
}

}  // namespace apex_fast::math
