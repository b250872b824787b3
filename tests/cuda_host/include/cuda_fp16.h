#pragma once

#include <c10/util/Half.h>
#include <cuda_runtime.h>

struct __half {
  c10::Half value;
};
inline float __half2float(__half half) {
  return half.value;
}
inline __half __float2half_rn(float value) {
  return {c10::Half(value)};
}
inline __half __double2half(double value) {
  return {c10::Half(static_cast<float>(value))};
}
inline uint16_t __half_as_ushort(__half half) {
  return half.value.x;
}
inline __half __ushort_as_half(uint16_t bits) {
  return {c10::Half(bits, c10::Half::from_bits())};
}
