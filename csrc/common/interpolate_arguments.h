// Argument checks of interpolate and interpolate_backward, for every device.
#pragma once

#include "common/checks.h"

namespace apex_fast {

inline void check_interpolate(const at::Tensor& x, const at::Tensor& z, const at::Tensor& t) {
  constexpr auto op = "interpolate";
  check_batched(op, "x", x);
  check_sample(op, "z", z, "x", x);
  check_same_dtype(op, "z", z, "x", x);
  check_per_sample(op, "t", t, "x", x);
}

inline void check_interpolate_backward(const at::Tensor& grad, const at::Tensor& t) {
  constexpr auto op = "interpolate_backward";
  check_batched(op, "grad", grad);
  check_per_sample(op, "t", t, "grad", grad);
}

}  // namespace apex_fast
