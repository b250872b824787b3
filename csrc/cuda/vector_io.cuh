// 16-byte accesses, conversions between storage and arithmetic types, and the cutting of tensors into 16-byte slots.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/geometry.h"

namespace apex_fast::cuda {

// The type that arithmetic is done in: fp32, or fp64 for fp64.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ double widen(double value) {
  return value;
}
__device__ __forceinline__ float widen(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <class T>
__device__ __forceinline__ T narrow(Compute<T> value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Elements of T that one 16-byte access moves.
template <class T>
constexpr int vector_size = 16 / sizeof(T);

template <class T>
struct alignas(16) Vector {
  T values[vector_size<T>];
};

template <class T>
__device__ __forceinline__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* pointer) {
  Vector<T> vector;
  *reinterpret_cast<uint4*>(&vector) = __ldg(reinterpret_cast<const uint4*>(pointer));
  return vector;
}

template <class T>
__device__ __forceinline__ void store_vector(T* pointer, const Vector<T>& vector) {
  *reinterpret_cast<uint4*>(pointer) = *reinterpret_cast<const uint4*>(&vector);
}

// a / b for 0 <= a, 0 < b. The 32-bit division is several times quicker and serves all but huge tensors.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// One thread's share: up to vector_size<T> neighbouring elements of one row, a row being a run of `inner` elements that
// lie side by side. Slots are cut at the 16-byte boundaries of the row of an anchor operand, so that an odd row length
// or a pointer that is off by one element costs a scalar head and tail and not the vectors between them.
struct Slot {
  int64_t sample;
  int64_t outer;
  int64_t begin;  // first element of the row
  int count;      // may be 0: a row with an unaligned start has one slot more than one without
};

template <class T>
__host__ __device__ int64_t slots_per_row(const Geometry& geometry) {
  return (geometry.inner + 2 * vector_size<T> - 2) / vector_size<T>;
}

template <class T>
__device__ __forceinline__ T* row_of(const Operand& operand, int64_t sample, int64_t outer) {
  return static_cast<T*>(operand.data) + sample * operand.batch_stride + outer * operand.outer_stride;
}

template <class T>
__device__ __forceinline__ Slot slot_at(const Geometry& geometry, const Operand& anchor, int64_t index) {
  constexpr int width = vector_size<T>;
  const int64_t per_row = slots_per_row<T>(geometry);
  const int64_t row = divide(index, per_row);
  const int64_t outer = divide(row, geometry.batch);
  const int64_t sample = row - outer * geometry.batch;
  const int64_t head = reinterpret_cast<uintptr_t>(row_of<T>(anchor, sample, outer)) % 16 / sizeof(T);
  int64_t begin = (index - row * per_row) * width - head;
  int64_t end = begin + width;
  if (begin < 0) begin = 0;
  if (end > geometry.inner) end = geometry.inner;
  return {sample, outer, begin, end > begin ? static_cast<int>(end - begin) : 0};
}

// t and 1 - t of a sample. 1 - t is formed in the precision of t and rounded once, as on the CPU.
template <class C>
struct TimePair {
  C t;
  C one_minus_t;
};

template <class C>
__device__ __forceinline__ TimePair<C> time_of(const Times& times, int64_t sample) {
  const int64_t at = sample * times.stride;
  if (times.dtype == DType::F64) {
    const double t = __ldg(static_cast<const double*>(times.data) + at);
    return {static_cast<C>(t), static_cast<C>(1.0 - t)};
  }
  const C t = __ldg(static_cast<const float*>(times.data) + at);
  return {t, C(1) - t};
}

// Blocks for `slots` threads of work. A kernel strides over its grid, so the cap only matters to tensors of 2^39 slots.
inline unsigned blocks_for(int64_t slots, int threads) {
  const int64_t blocks = (slots + threads - 1) / threads;
  constexpr int64_t most = (int64_t(1) << 31) - 1;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

}  // namespace apex_fast::cuda
