// How the CUDA kernels cut their work: slots, chunks, and the order in which sums are formed. Arithmetic only and no
// CUDA header, so that tests/cuda_host walks it without a GPU and the glue sizes its workspaces by the same functions.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/macros.h"

namespace apex_fast::cuda {

constexpr int block_size = 256;  // threads of a block
constexpr int warp_size = 32;
constexpr int slot_size = 8;  // a power of two; elements of a slot: 16 bytes of a half type, 32 of fp32

constexpr int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// n / divisor for 0 <= n. Every thread finds its slot with one or two of these; a multiplication and a shift (Granlund
// and Montgomery) serve all numbers below 2^31, a real division the rest.
struct Divider {
  int64_t divisor = 1;
  uint32_t multiplier = 1;  // 0: the divisor has more than 31 bits
  uint32_t shift = 0;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(by) {
    if (by >> 31) {
      multiplier = 0;
      return;
    }
    while ((int64_t{1} << shift) < by)
      ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(by);
    multiplier = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(by) + 1);
  }

  APEX_HD int64_t divide(int64_t n) const {
    if (multiplier == 0 || (n >> 31) != 0) return n / divisor;
    const uint32_t small = static_cast<uint32_t>(n);
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(small) * multiplier) >> 32);
    return (high + small) >> shift;
  }
};

// One thread's share of a row, a row being `inner` elements that lie side by side.
struct Slot {
  int64_t sample;
  int64_t outer;
  int64_t begin;  // first element, counted from the start of the row
  int count;      // up to slot_size, may be 0
};

// Rows are cut at every eighth element of an anchor operand's memory, not of the row: where rows have an odd length or
// a pointer is off by one element, that costs a partial slot at either end of a row and leaves the others aligned.
struct Slots {
  int64_t inner = 0;
  Divider per_row;         // slots
  int64_t per_sample = 0;  // slots
  int64_t count = 0;       // slots of all samples
  Divider batch;
  // of the anchor, in elements
  int64_t batch_stride = 0;
  int64_t outer_stride = 0;
  int64_t origin = 0;  // distance of its first element from an address that is a multiple of 8 elements

  APEX_HD Slot in_row(int64_t sample, int64_t outer, int64_t index) const {
    const int64_t head = (origin + sample * batch_stride + outer * outer_stride) & (slot_size - 1);
    int64_t begin = index * slot_size - head;
    int64_t end = begin + slot_size;
    if (begin < 0) begin = 0;
    if (end > inner) end = inner;
    return {sample, outer, begin, end > begin ? static_cast<int>(end - begin) : 0};
  }

  // Neighbouring indices are neighbours in memory, across samples where the batch is the fastest dimension.
  APEX_HD Slot at(int64_t index) const {
    const int64_t row = per_row.divide(index);
    const int64_t outer = batch.divide(row);
    return in_row(row - outer * batch.divisor, outer, index - row * per_row.divisor);
  }

  APEX_HD Slot at(int64_t sample, int64_t index) const {
    const int64_t outer = per_row.divide(index);
    return in_row(sample, outer, index - outer * per_row.divisor);
  }
};

inline int64_t size_of(DType dtype) {
  return dtype == DType::F64 ? 8 : dtype == DType::F32 ? 4 : 2;
}

inline Slots slots_of(const Geometry& geometry, const Operand& anchor) {
  Slots slots;
  slots.inner = geometry.inner;
  slots.batch = Divider(geometry.batch);
  slots.batch_stride = anchor.batch_stride;
  slots.outer_stride = anchor.outer_stride;
  slots.origin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(anchor.data) / size_of(anchor.dtype) % slot_size);
  // A row that may begin anywhere needs a slot more than one that begins on a boundary.
  const bool aligned = slots.origin == 0 && slots.batch_stride % slot_size == 0 && slots.outer_stride % slot_size == 0;
  const int64_t per_row = ceil_divide(geometry.inner + (aligned ? 0 : slot_size - 1), slot_size);
  slots.per_row = Divider(per_row);
  slots.per_sample = geometry.outer * per_row;
  slots.count = geometry.batch * slots.per_sample;
  return slots;
}

// Blocks for one thread per slot. The kernels stride over their grid, so the cap only matters beyond 2^39 slots.
inline unsigned blocks_for(int64_t slots) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  const int64_t blocks = ceil_divide(slots, block_size);
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// A reduction runs in two stages, without atomics: a block adds up one chunk of one sample, then one block per sample
// adds up its chunks. The problem alone decides how samples are cut, never the device, so that sums repeat bit for bit.
struct Chunks {
  Divider per_sample;
  int64_t slots = 0;  // of a chunk
  int64_t blocks = 0;
};

inline Chunks chunks_of(const Geometry& geometry, const Slots& slots) {
  // Latents of real models are small: enough blocks to fill a GPU come first, long runs of work per thread second. A
  // thread adds at most 16 slots in the arithmetic type before its sum goes on in fp64.
  constexpr int64_t enough_blocks = 512, most_slots_per_thread = 16;
  int64_t per_thread = 1;
  while (per_thread < most_slots_per_thread && slots.count >= 2 * per_thread * block_size * enough_blocks)
    per_thread *= 2;
  Chunks chunks;
  chunks.slots = per_thread * block_size;
  chunks.per_sample = Divider(ceil_divide(slots.per_sample, chunks.slots));
  chunks.blocks = geometry.batch * chunks.per_sample.divisor;
  return chunks;
}

// fp64 numbers of workspace that `count` sums per sample need: [batch, count, chunks].
inline int64_t partial_sums(const Geometry& geometry, const Operand& anchor, int count) {
  return chunks_of(geometry, slots_of(geometry, anchor)).blocks * count;
}

// Both stages add `length` numbers with one warp: each lane its own in this order, then the lanes pairwise (add_lanes
// on the device, the same order on the host in tests/cuda_host).
template <class T>
APEX_HD double lane_total(const T* values, int64_t length, int lane) {
  double sum = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 8  // loads in flight
#endif
  for (int64_t i = lane; i < length; i += warp_size)
    sum += static_cast<double>(values[i]);
  return sum;
}

}  // namespace apex_fast::cuda
