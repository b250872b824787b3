// Slots between memory and registers. Operands have dtypes of their own: a kernel first issues the loads of all of
// them, as raw words, and converts afterwards, so that several 16-byte loads are in flight whatever the dtypes are.
//
// Branches on a dtype or on alignment are the same for (nearly) all threads of a warp. An operand that is not on a
// 16-byte boundary where a slot begins, and a slot of fewer than 8 elements, is read and written element by element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/geometry.h"
#include "cuda/slots.h"

namespace apex_fast::cuda {

// Blocks that share a multiprocessor at least, which caps the registers of a thread: 80 in fp32, where three blocks
// keep more loads in flight than the memory needs; fp64 takes what it wants.
template <class C>
constexpr int blocks_at_once = sizeof(C) == 4 ? 3 : 1;

// The bits of one slot of one operand, packed from word 0. Elements that a short slot lacks are zero.
template <class C>
struct Raw {
  static constexpr int words = slot_size * sizeof(C) / 4;
  uint32_t word[words];
};

__device__ __forceinline__ bool on_16_bytes(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// 16-byte loads of `Bytes` bytes each for 8 elements.
template <int Bytes, class C>
__device__ __forceinline__ void load_words(Raw<C>& raw, const void* from) {
  const auto* const vectors = static_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < slot_size * Bytes / 16; ++i) {
    const uint4 four = __ldg(vectors + i);
    raw.word[4 * i] = four.x;
    raw.word[4 * i + 1] = four.y;
    raw.word[4 * i + 2] = four.z;
    raw.word[4 * i + 3] = four.w;
  }
}

// One after the other, on purpose: predicated loads that are all in flight made the compiler spill in other paths.
template <int Bytes, class C>
__device__ __forceinline__ void load_elements(Raw<C>& raw, const void* from, int64_t stride, int count) {
#pragma unroll
  for (int i = 0; i < Raw<C>::words; ++i)
    raw.word[i] = 0;
#pragma unroll
  for (int i = 0; i < slot_size; ++i) {
    if (i >= count) break;
    if constexpr (Bytes == 2) {
      const uint32_t half = __ldg(static_cast<const uint16_t*>(from) + i * stride);
      raw.word[i / 2] |= half << (16 * (i % 2));
    } else if constexpr (Bytes == 4) {
      raw.word[i] = __ldg(static_cast<const uint32_t*>(from) + i * stride);
    } else {
      const uint2 two = __ldg(static_cast<const uint2*>(from) + i * stride);
      raw.word[2 * i] = two.x;
      raw.word[2 * i + 1] = two.y;
    }
  }
}

template <int Bytes, class C>
__device__ __forceinline__ void load_sized(Raw<C>& raw, const void* data, int64_t offset, int64_t stride, int count) {
  const void* const from = static_cast<const char*>(data) + offset * Bytes;
  if (count == slot_size && stride == 1 && on_16_bytes(from))
    load_words<Bytes>(raw, from);
  else
    load_elements<Bytes>(raw, from, stride, count);
}

// Elements offset, offset + stride, ... of an operand. With C = float no operand is fp64: the glue asks for fp64
// arithmetic as soon as one is.
template <class C>
__device__ __forceinline__ void load(Raw<C>& raw, const void* data, DType dtype, int64_t offset, int64_t stride,
                                     int count) {
  if constexpr (std::is_same_v<C, double>) {
    if (dtype == DType::F64) return load_sized<8>(raw, data, offset, stride, count);
  }
  if (dtype == DType::F32)
    load_sized<4>(raw, data, offset, stride, count);
  else
    load_sized<2>(raw, data, offset, stride, count);
}

template <class C>
__device__ __forceinline__ void widen(const Raw<C>& raw, DType dtype, C (&values)[slot_size]) {
  if constexpr (std::is_same_v<C, double>) {
    if (dtype == DType::F64) {
#pragma unroll
      for (int i = 0; i < slot_size; ++i)
        values[i] = __hiloint2double(static_cast<int>(raw.word[2 * i + 1]), static_cast<int>(raw.word[2 * i]));
      return;
    }
  }
  if (dtype == DType::F32) {
#pragma unroll
    for (int i = 0; i < slot_size; ++i)
      values[i] = static_cast<C>(__uint_as_float(raw.word[i]));
  } else if (dtype == DType::BF16) {
#pragma unroll
    for (int i = 0; i < slot_size; ++i)  // bf16 is the upper half of an fp32
      values[i] = static_cast<C>(__uint_as_float(i % 2 ? raw.word[i / 2] & 0xffff0000u : raw.word[i / 2] << 16));
  } else {
#pragma unroll
    for (int i = 0; i < slot_size; ++i)
      values[i] =
          static_cast<C>(__half2float(__ushort_as_half(static_cast<uint16_t>(raw.word[i / 2] >> (16 * (i % 2))))));
  }
}

__device__ __forceinline__ uint32_t half_bits(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ uint32_t half_bits(double value) {
  return __half_as_ushort(__double2half(value));
}
__device__ __forceinline__ uint32_t bfloat_bits(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ __forceinline__ uint32_t bfloat_bits(double value) {
  return __bfloat16_as_ushort(__double2bfloat16(value));
}

template <int Bytes, class C>
__device__ __forceinline__ void store_sized(const Raw<C>& raw, void* data, int64_t offset, int64_t stride, int count) {
  void* const to = static_cast<char*>(data) + offset * Bytes;
  if (count == slot_size && stride == 1 && on_16_bytes(to)) {
#pragma unroll
    for (int i = 0; i < slot_size * Bytes / 16; ++i)
      static_cast<uint4*>(to)[i] =
          make_uint4(raw.word[4 * i], raw.word[4 * i + 1], raw.word[4 * i + 2], raw.word[4 * i + 3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < slot_size; ++i) {
    if (i >= count) break;
    if constexpr (Bytes == 2)
      static_cast<uint16_t*>(to)[i * stride] = static_cast<uint16_t>(raw.word[i / 2] >> (16 * (i % 2)));
    else if constexpr (Bytes == 4)
      static_cast<uint32_t*>(to)[i * stride] = raw.word[i];
    else
      static_cast<uint2*>(to)[i * stride] = make_uint2(raw.word[2 * i], raw.word[2 * i + 1]);
  }
}

// Rounds once, to the operand's dtype.
template <class C>
__device__ __forceinline__ void store(const C (&values)[slot_size], void* data, DType dtype, int64_t offset,
                                      int64_t stride, int count) {
  Raw<C> raw;
  if constexpr (std::is_same_v<C, double>) {
    if (dtype == DType::F64) {
#pragma unroll
      for (int i = 0; i < slot_size; ++i) {
        raw.word[2 * i] = static_cast<uint32_t>(__double2loint(values[i]));
        raw.word[2 * i + 1] = static_cast<uint32_t>(__double2hiint(values[i]));
      }
      return store_sized<8>(raw, data, offset, stride, count);
    }
  }
  if (dtype == DType::F32) {
#pragma unroll
    for (int i = 0; i < slot_size; ++i)
      raw.word[i] = __float_as_uint(static_cast<float>(values[i]));
    return store_sized<4>(raw, data, offset, stride, count);
  }
  if (dtype == DType::BF16) {
#pragma unroll
    for (int i = 0; i < slot_size; i += 2)
      raw.word[i / 2] = bfloat_bits(values[i]) | bfloat_bits(values[i + 1]) << 16;
  } else {
#pragma unroll
    for (int i = 0; i < slot_size; i += 2)
      raw.word[i / 2] = half_bits(values[i]) | half_bits(values[i + 1]) << 16;
  }
  store_sized<2>(raw, data, offset, stride, count);
}

// Single numbers, of any dtype: parameters and results.
__device__ __forceinline__ double load_number(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::F64:
      return __ldg(static_cast<const double*>(data) + offset);
    case DType::F32:
      return __ldg(static_cast<const float*>(data) + offset);
    case DType::F16:
      return __half2float(static_cast<const __half*>(data)[offset]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[offset]);
  }
}

__device__ __forceinline__ void store_number(double value, void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::F64:
      static_cast<double*>(data)[offset] = value;
      break;
    case DType::F32:
      static_cast<float*>(data)[offset] = static_cast<float>(value);
      break;
    case DType::F16:
      static_cast<__half*>(data)[offset] = __double2half(value);
      break;
    default:
      static_cast<__nv_bfloat16*>(data)[offset] = __double2bfloat16(value);
  }
}

// Where a slot begins in an operand laid out as the Geometry says.
__device__ __forceinline__ int64_t offset_of(const Operand& operand, const Slot& slot) {
  return slot.sample * operand.batch_stride + slot.outer * operand.outer_stride + slot.begin;
}

// All operands of a slot. What a kernel can do without them stands between the two calls, while the loads are in
// flight.
template <class C, int N>
__device__ __forceinline__ void load_slot(const Operand (&operands)[N], const Slot& slot, Raw<C> (&raw)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k)
    load(raw[k], operands[k].data, operands[k].dtype, offset_of(operands[k], slot), 1, slot.count);
}

template <class C, int N>
__device__ __forceinline__ void widen_slot(const Operand (&operands)[N], const Raw<C> (&raw)[N],
                                           C (&values)[N][slot_size]) {
#pragma unroll
  for (int k = 0; k < N; ++k)
    widen(raw[k], operands[k].dtype, values[k]);
}

template <class C>
__device__ __forceinline__ void store_slot(const C (&values)[slot_size], const Operand& operand, const Slot& slot) {
  if (operand.data) store(values, operand.data, operand.dtype, offset_of(operand, slot), 1, slot.count);
}

}  // namespace apex_fast::cuda
