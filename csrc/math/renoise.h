// x_fake = x_s - s F (APEX, Eq. 11), noised again to time t, and the velocity z - x_fake of that path (Eq. 3).
#pragma once

#include "common/macros.h"
#include "math/interpolate.h"

namespace apex_fast::math {

template <class V>
struct Renoised {
  V x_fake_t;
  V target;
};

template <class V>
APEX_HD Renoised<V> renoise(V velocity, V x_s, V z, V s, V t, V one_minus_t) {
  const V x_fake = x_s - s * velocity;
  return {interpolate(x_fake, z, t, one_minus_t), z - x_fake};
}

// d x_fake_t / d F = -s (1 - t), d target / d F = s
template <class V>
APEX_HD V renoise_backward(V grad_x_fake_t, V grad_target, V minus_s_one_minus_t, V s) {
  return minus_s_one_minus_t * grad_x_fake_t + s * grad_target;
}

}  // namespace apex_fast::math
