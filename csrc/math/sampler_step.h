// x' = (1 - t') x_hat + t' (sqrt(1 - eta) z_hat + sqrt(eta) noise) with x_hat = x - t v, z_hat = x + (1 - t) v,
// collected as x' = a x + b v + c noise.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace apex_fast::math {

struct StepCoefficients {
  double x;
  double velocity;
  double noise;
};

// How much of the noise estimate stays and how much fresh noise comes in: the same for all samples, so the roots are
// taken once, on the host.
struct NoiseRenewal {
  double keep;   // sqrt(1 - eta)
  double fresh;  // sqrt(eta)
};

inline NoiseRenewal noise_renewal(double stochasticity) {
  return {std::sqrt(1.0 - stochasticity), std::sqrt(stochasticity)};
}

APEX_HD StepCoefficients step_coefficients(double t, double t_next, const NoiseRenewal& renewal) {
  const double keep = renewal.keep;
  return {(1.0 - t_next) + t_next * keep, t_next * keep * (1.0 - t) - (1.0 - t_next) * t, t_next * renewal.fresh};
}

template <class V>
APEX_HD V sampler_step(V x, V velocity, V a, V b) {
  return a * x + b * velocity;
}

template <class V>
APEX_HD V sampler_step_noised(V x, V velocity, V noise, V a, V b, V c) {
  return a * x + b * velocity + c * noise;
}

}  // namespace apex_fast::math
