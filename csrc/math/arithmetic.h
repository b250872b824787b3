// The few operations that scalars and SIMD vectors spell differently. csrc/cpu/kernels/simd.h adds the vector types.
#pragma once

#include "common/macros.h"

namespace apex_fast::math {

template <class V>
struct Arithmetic {
  static APEX_HD V clamp(V v, V low, V high) { return v < low ? low : (v > high ? high : v); }  // NaN stays NaN
  static APEX_HD V absolute(V v) { return v < V(0) ? -v : v; }
  static APEX_HD V exceeds(V v, V limit) { return v > limit ? V(1) : V(0); }
};

}  // namespace apex_fast::math
