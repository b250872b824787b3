#pragma once

#include <c10/util/BFloat16.h>
#include <cuda_runtime.h>

struct __nv_bfloat16 {
  c10::BFloat16 value;
};
inline float __bfloat162float(__nv_bfloat16 bfloat) {
  return bfloat.value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {c10::BFloat16(value)};
}
inline __nv_bfloat16 __double2bfloat16(double value) {
  return {c10::BFloat16(static_cast<float>(value))};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 bfloat) {
  return bfloat.value.x;
}
