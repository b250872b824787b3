// x_t = t z + (1 - t) x (APEX, Eq. 1) and its gradients (1 - t) g and t g. One pass, bound by memory.
#include "cuda/kernels.h"
#include "cuda/vector_io.cuh"
#include "math/interpolate.h"

namespace apex_fast::cuda {

namespace {

constexpr int threads = 256;

template <class T>
__global__ void __launch_bounds__(threads)
    interpolate_kernel(Geometry geometry, Operand x, Operand z, Times t, Operand x_t, int64_t slots) {
  constexpr int width = vector_size<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; index < slots; index += step) {
    const Slot slot = slot_at<T>(geometry, x_t, index);
    if (slot.count == 0) continue;
    const auto time = time_of<Compute<T>>(t, slot.sample);
    const T* const from_x = row_of<const T>(x, slot.sample, slot.outer) + slot.begin;
    const T* const from_z = row_of<const T>(z, slot.sample, slot.outer) + slot.begin;
    T* const to = row_of<T>(x_t, slot.sample, slot.outer) + slot.begin;
    const auto mix = [&](T x_value, T z_value) {
      return narrow<T>(math::interpolate(widen(x_value), widen(z_value), time.t, time.one_minus_t));
    };
    if (slot.count == width && is_aligned(from_x) && is_aligned(from_z) && is_aligned(to)) {
      const Vector<T> x_values = load_vector(from_x);
      const Vector<T> z_values = load_vector(from_z);
      Vector<T> mixed;
#pragma unroll
      for (int i = 0; i < width; ++i)
        mixed.values[i] = mix(x_values.values[i], z_values.values[i]);
      store_vector(to, mixed);
    } else {
      for (int i = 0; i < slot.count; ++i)
        to[i] = mix(from_x[i], from_z[i]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(threads) interpolate_backward_kernel(Geometry geometry, Operand grad, Times t,
                                                                       Operand grad_x, Operand grad_z, int64_t slots) {
  constexpr int width = vector_size<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; index < slots; index += step) {
    const Slot slot = slot_at<T>(geometry, grad, index);
    if (slot.count == 0) continue;
    const auto time = time_of<Compute<T>>(t, slot.sample);
    const T* const from = row_of<const T>(grad, slot.sample, slot.outer) + slot.begin;
    const auto scale_to = [&](const Operand& out, Compute<T> factor) {
      if (out.data == nullptr) return;
      T* const to = row_of<T>(out, slot.sample, slot.outer) + slot.begin;
      if (slot.count == width && is_aligned(from) && is_aligned(to)) {
        const Vector<T> values = load_vector(from);
        Vector<T> scaled;
#pragma unroll
        for (int i = 0; i < width; ++i)
          scaled.values[i] = narrow<T>(factor * widen(values.values[i]));
        store_vector(to, scaled);
      } else {
        for (int i = 0; i < slot.count; ++i)
          to[i] = narrow<T>(factor * widen(from[i]));
      }
    };
    // The second reading of `from` comes from the cache.
    scale_to(grad_x, time.one_minus_t);
    scale_to(grad_z, time.t);
  }
}

template <class Launch>
int dispatch(DType dtype, const Geometry& geometry, Launch launch) {
  if (geometry.batch == 0 || geometry.outer == 0 || geometry.inner == 0) return cudaSuccess;
  switch (dtype) {
    case DType::F32:
      launch(float{});
      break;
    case DType::F64:
      launch(double{});
      break;
    case DType::F16:
      launch(__half{});
      break;
    case DType::BF16:
      launch(__nv_bfloat16{});
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

int interpolate(const Geometry& geometry, const Operand& x, const Operand& z, const Times& t, const Operand& x_t,
                void* stream) {
  return dispatch(x.dtype, geometry, [&](auto tag) {
    using T = decltype(tag);
    const int64_t slots = geometry.batch * geometry.outer * slots_per_row<T>(geometry);
    interpolate_kernel<T>
        <<<blocks_for(slots, threads), threads, 0, static_cast<cudaStream_t>(stream)>>>(geometry, x, z, t, x_t, slots);
  });
}

int interpolate_backward(const Geometry& geometry, const Operand& grad, const Times& t, const Operand& grad_x,
                         const Operand& grad_z, void* stream) {
  return dispatch(grad.dtype, geometry, [&](auto tag) {
    using T = decltype(tag);
    const int64_t slots = geometry.batch * geometry.outer * slots_per_row<T>(geometry);
    interpolate_backward_kernel<T><<<blocks_for(slots, threads), threads, 0, static_cast<cudaStream_t>(stream)>>>(
        geometry, grad, t, grad_x, grad_z, slots);
  });
}

}  // namespace apex_fast::cuda
