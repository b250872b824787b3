// The kernel of every op that works element by element: one thread per slot, each input read once, each output written
// once.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/slots.h"
#include "cuda/vector_io.cuh"

namespace apex_fast::cuda {

// A body says what happens to one element:
//   static constexpr int inputs, outputs;
//   __device__ Coefficients coefficients(int64_t sample) const;
//   __device__ void apply(const Coefficients&, const C (&in)[inputs], C (&out)[outputs]) const;
template <class C, class Body>
struct MapProblem {
  Slots slots;
  Operand in[Body::inputs];
  Operand out[Body::outputs];  // one without data is not written
  Body body;
};

template <class C, class Body>
__global__ void __launch_bounds__(block_size, blocks_at_once<C>)
    map_kernel(const __grid_constant__ MapProblem<C, Body> p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * block_size;
#pragma unroll 1
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * block_size + threadIdx.x; index < p.slots.count;
       index += step) {
    const Slot slot = p.slots.at(index);
    if (slot.count == 0) continue;
    Raw<C> raw[Body::inputs];
    load_slot(p.in, slot, raw);
    const auto coefficients = p.body.coefficients(slot.sample);
    C in[Body::inputs][slot_size], out[Body::outputs][slot_size];
    widen_slot(p.in, raw, in);
#pragma unroll
    for (int i = 0; i < slot_size; ++i) {
      C element[Body::inputs], result[Body::outputs];
#pragma unroll
      for (int k = 0; k < Body::inputs; ++k)
        element[k] = in[k][i];
      p.body.apply(coefficients, element, result);
#pragma unroll
      for (int k = 0; k < Body::outputs; ++k)
        out[k][i] = result[k];
    }
#pragma unroll
    for (int k = 0; k < Body::outputs; ++k)
      store_slot(out[k], p.out[k], slot);
  }
}

// Slots are anchored at an output: those come fresh from the allocator, all with one layout.
template <class C, class Body>
int map(const Geometry& geometry, const Operand (&in)[Body::inputs], const Operand (&out)[Body::outputs],
        const Body& body, void* stream) {
  const Operand* const anchor =
      std::find_if(out, out + Body::outputs, [](const Operand& operand) { return operand.data != nullptr; });
  if (anchor == out + Body::outputs) return cudaSuccess;
  MapProblem<C, Body> problem{slots_of(geometry, *anchor), {}, {}, body};
  if (problem.slots.count == 0) return cudaSuccess;
  std::copy(in, in + Body::inputs, problem.in);
  std::copy(out, out + Body::outputs, problem.out);
  return launch(map_kernel<C, Body>, blocks_for(problem.slots.count), block_size, stream, problem);
}

}  // namespace apex_fast::cuda
