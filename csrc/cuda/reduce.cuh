// Sums over the samples in two stages of fixed order (slots.h), optionally with outputs that are written on the way.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/slots.h"
#include "cuda/vector_io.cuh"

namespace apex_fast::cuda {

// Adds up one number per lane; every lane gets the sum. All 32 lanes of the warp must come here together.
template <class T>
__device__ __forceinline__ T add_lanes(T value) {
#pragma unroll
  for (int distance = warp_size / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// A body of a reduction:
//   static constexpr int inputs, outputs, count;  // count sums
//   __device__ Coefficients coefficients(int64_t sample) const;
//   __device__ void add(const Coefficients&, const C (&in)[inputs], Sums&) const;  // zeros must add zero
//   __device__ void write(const Coefficients&, const C (&in)[inputs], C (&out)[outputs]) const;  // if outputs > 0
// where Sums has `C sum(int k) const` and starts as zeros.
template <class C, class Body>
struct ReduceProblem {
  Slots slots;
  Chunks chunks;
  Operand in[Body::inputs];
  Operand out[Body::outputs > 0 ? Body::outputs : 1];  // one without data is not written
  Body body;
  double* partials;  // [batch, count, chunks]
};

// First stage: a block per (sample, chunk).
template <class C, class Body>
__global__ void __launch_bounds__(block_size, blocks_at_once<C>)
    reduce_kernel(const __grid_constant__ ReduceProblem<C, Body> p) {
  static_assert(Body::count <= block_size / warp_size, "a warp adds up one of the sums");
  __shared__ C sums_of_threads[Body::count][block_size];
  const int64_t chunks = p.chunks.per_sample.divisor;
  const int64_t sample = p.chunks.per_sample.divide(blockIdx.x);
  const int64_t chunk = blockIdx.x - sample * chunks;
  const int64_t begin = chunk * p.chunks.slots;
  int64_t end = begin + p.chunks.slots;
  if (end > p.slots.per_sample) end = p.slots.per_sample;

  const auto coefficients = p.body.coefficients(sample);
  typename Body::Sums sums;
#pragma unroll 1  // the loads of one slot are enough in flight, those of several cost registers
  for (int64_t index = begin + threadIdx.x; index < end; index += block_size) {
    const Slot slot = p.slots.at(sample, index);
    if (slot.count == 0) continue;
    Raw<C> raw[Body::inputs];
    load_slot(p.in, slot, raw);
    C in[Body::inputs][slot_size];
    widen_slot(p.in, raw, in);
    C out[Body::outputs > 0 ? Body::outputs : 1][slot_size];
#pragma unroll
    for (int i = 0; i < slot_size; ++i) {
      C element[Body::inputs];
#pragma unroll
      for (int k = 0; k < Body::inputs; ++k)
        element[k] = in[k][i];
      p.body.add(coefficients, element, sums);
      if constexpr (Body::outputs > 0) {
        C result[Body::outputs];
        p.body.write(coefficients, element, result);
#pragma unroll
        for (int k = 0; k < Body::outputs; ++k)
          out[k][i] = result[k];
      }
    }
#pragma unroll
    for (int k = 0; k < Body::outputs; ++k)
      store_slot(out[k], p.out[k], slot);
  }

  // Threads without work leave zeros. No thread has returned, so all of the block meet at the barrier.
#pragma unroll
  for (int k = 0; k < Body::count; ++k)
    sums_of_threads[k][threadIdx.x] = sums.sum(k);
  __syncthreads();
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  if (warp < Body::count) {
    const double total = add_lanes(lane_total(sums_of_threads[warp], block_size, lane));
    if (lane == 0) p.partials[(sample * Body::count + warp) * chunks + chunk] = total;
  }
}

// Second stage: a block per sample, a warp per sum. `finish(sample, totals)` writes the results.
template <int Count, class Finish>
__global__ void __launch_bounds__(Count* warp_size)
    finish_kernel(const double* partials, int64_t chunks, const __grid_constant__ Finish finish) {
  __shared__ double totals[Count];
  const int64_t sample = blockIdx.x;
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  const double total = add_lanes(lane_total(partials + (sample * Count + warp) * chunks, chunks, lane));
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  if (threadIdx.x == 0) finish(sample, totals);
}

// `partials` has partial_sums(geometry, in[0], Body::count) numbers.
template <class C, class Body, class Finish>
int reduce(const Geometry& geometry, const Operand (&in)[Body::inputs], const Operand* out, const Body& body,
           const Finish& finish, double* partials, void* stream) {
  ReduceProblem<C, Body> problem{slots_of(geometry, in[0]), {}, {}, {}, body, partials};
  problem.chunks = chunks_of(geometry, problem.slots);
  // A grid has at most 2^31 - 1 blocks; with 2,048 elements or more each that is beyond any memory, but samples may be
  // tiny and many.
  if (problem.chunks.blocks >> 31) return cudaErrorInvalidConfiguration;
  for (int k = 0; k < Body::inputs; ++k)
    problem.in[k] = in[k];
  for (int k = 0; k < Body::outputs; ++k)
    problem.out[k] = out[k];
  const int64_t chunks = problem.chunks.per_sample.divisor;
  const int error =
      launch(reduce_kernel<C, Body>, static_cast<unsigned>(problem.chunks.blocks), block_size, stream, problem);
  if (error != cudaSuccess) return error;
  const auto samples = static_cast<unsigned>(geometry.batch);
  return launch(finish_kernel<Body::count, Finish>, samples, Body::count * warp_size, stream, partials, chunks, finish);
}

}  // namespace apex_fast::cuda
