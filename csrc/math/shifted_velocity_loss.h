// L_fake (APEX, Eq. 12), the velocity correction dv = v_shift - v_guided (Eq. 17) and the statistics of both, element
// by element.
#pragma once

#include "common/macros.h"
#include "math/arithmetic.h"

namespace apex_fast::math {

// Classifier-free guidance of the real branch.
template <class V>
APEX_HD V guided_velocity(V v_real, V v_uncond, V guidance_scale) {
  return v_uncond + guidance_scale * (v_real - v_uncond);
}

// Sums over the elements of a sample. The order is the order of the partial sums in every reduction workspace.
template <class V>
struct ShiftedVelocitySums {
  V residual_squared{0};    // (v_shift - target)^2
  V dv_squared{0};          // dv^2
  V clipped_dv_squared{0};  // clamp(dv)^2
  V clipped_count{0};       // |dv| > clip
  V shift_dot_real{0};      // v_shift v_real
  V shift_squared{0};       // v_shift^2
  V real_squared{0};        // v_real^2
  V guided_distance{0};     // |v_guided - target|: DMD's normaliser

  static constexpr int count = 8;

  APEX_HD V sum(int k) const {
    const V sums[count] = {residual_squared, dv_squared,    clipped_dv_squared, clipped_count,
                           shift_dot_real,   shift_squared, real_squared,       guided_distance};
    return sums[k];
  }

  APEX_HD void add(V v_shift, V v_real, V v_guided, V target, V clip) {
    using A = Arithmetic<V>;
    const V residual = v_shift - target;
    const V dv = v_shift - v_guided;
    const V clipped = A::clamp(dv, -clip, clip);
    residual_squared = residual_squared + residual * residual;
    dv_squared = dv_squared + dv * dv;
    clipped_dv_squared = clipped_dv_squared + clipped * clipped;
    clipped_count = clipped_count + A::exceeds(A::absolute(dv), clip);
    shift_dot_real = shift_dot_real + v_shift * v_real;
    shift_squared = shift_squared + v_shift * v_shift;
    real_squared = real_squared + v_real * v_real;
    guided_distance = guided_distance + A::absolute(v_guided - target);
  }
};

// What the op returns, from the totals of a sample in the order above and scale = 1 / n.
APEX_HD double fake_loss(const double* totals, double scale) {
  return totals[0] * scale;
}

APEX_HD double correction_loss(const double* totals, double scale) {
  return totals[2] * scale;
}

constexpr int shifted_velocity_stats = 7;

// Column k of the statistics: sum k + 1, two of them as means.
APEX_HD double shifted_velocity_stat(const double* totals, int k, double scale) {
  return k == 2 || k == 6 ? totals[k + 1] * scale : totals[k + 1];
}

// weight = 2 * upstream / n in both.
template <class V>
APEX_HD V correction_gradient(V v_shift, V v_guided, V clip, V weight) {
  return weight * Arithmetic<V>::clamp(v_shift - v_guided, -clip, clip);
}

template <class V>
APEX_HD V fake_gradient(V v_shift, V target, V weight) {
  return weight * (v_shift - target);
}

}  // namespace apex_fast::math
