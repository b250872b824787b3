// x_t = t z + (1 - t) x (APEX, Eq. 1). Coefficients are formed in double by the caller and rounded once.
#pragma once

#include "common/macros.h"

namespace apex_fast::math {

template <class V>
APEX_HD V interpolate(V x, V z, V t, V one_minus_t) {
  return t * z + one_minus_t * x;
}

}  // namespace apex_fast::math
