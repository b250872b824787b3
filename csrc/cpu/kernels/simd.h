// SIMD vectors for csrc/math, and tiles: a run of a tensor, as the arithmetic type wants it, without a copy of the
// tensor.
//
// Every operand of a kernel may have a dtype of its own. Rather than one loop per combination, a kernel walks tiles of
// `tile_size` elements: an operand that already has the arithmetic type is read in place, any other is converted into a
// buffer that stays in the first-level cache. Outputs leave through the same door. That also serves operands whose
// samples are not one block in memory.
#pragma once

#include <algorithm>
#include <tuple>
#include <type_traits>

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "common/geometry.h"
#include "cpu/kernels.h"
#include "cpu/kernels/isa.h"
#include "math/arithmetic.h"

namespace apex_fast::math {

template <class T>
struct Arithmetic<at::vec::Vectorized<T>> {
  using V = at::vec::Vectorized<T>;
  static APEX_HD V clamp(V v, V low, V high) { return at::vec::clamp(v, low, high); }
  static APEX_HD V absolute(V v) { return v.abs(); }
  static APEX_HD V exceeds(V v, V limit) { return v.gt(limit); }
};

}  // namespace apex_fast::math

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

constexpr int64_t tile_size = 512;  // seven fp32 tiles fit a 32 KB first-level cache with room to spare

template <class C>
using Vec = at::vec::Vectorized<C>;

template <class C>
struct alignas(64) Tile {
  C values[tile_size];
};

template <class C>
constexpr DType arithmetic_dtype = std::is_same_v<C, double> ? DType::F64 : DType::F32;

// ---- conversion of a run of elements; `stride` is the distance between source (destination) elements

template <class C, class T>
static void widen(const T* source, int64_t stride, C* destination, int64_t length) {
  int64_t i = 0;
  if constexpr (std::is_same_v<C, float> && (std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>)) {
    if (stride == 1) {
      constexpr int64_t step = Vec<T>::size();
      for (; i + step <= length; i += step) {
        const auto [low, high] = at::vec::convert_to_float<T>(Vec<T>::loadu(source + i));
        low.store(destination + i);
        high.store(destination + i + step / 2);
      }
    }
  }
  for (; i < length; ++i)
    destination[i] = static_cast<C>(source[i * stride]);
}

template <class C, class T>
static void narrow(const C* source, T* destination, int64_t stride, int64_t length) {
  int64_t i = 0;
  if constexpr (std::is_same_v<C, float> && (std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>)) {
    if (stride == 1) {
      constexpr int64_t step = Vec<T>::size();
      for (; i + step <= length; i += step)
        at::vec::convert_from_float<T>(Vec<float>::loadu(source + i), Vec<float>::loadu(source + i + step / 2))
            .store(destination + i);
    }
  }
  for (; i < length; ++i)
    destination[i * stride] = static_cast<T>(source[i]);
}

template <class C>
static void widen_any(const void* source, DType dtype, int64_t offset, int64_t stride, C* destination, int64_t length) {
  switch (dtype) {
    case DType::F32:
      return widen(static_cast<const float*>(source) + offset, stride, destination, length);
    case DType::F64:
      return widen(static_cast<const double*>(source) + offset, stride, destination, length);
    case DType::F16:
      return widen(static_cast<const c10::Half*>(source) + offset, stride, destination, length);
    case DType::BF16:
      return widen(static_cast<const c10::BFloat16*>(source) + offset, stride, destination, length);
  }
}

template <class C>
static void narrow_any(const C* source, void* destination, DType dtype, int64_t offset, int64_t stride,
                       int64_t length) {
  switch (dtype) {
    case DType::F32:
      return narrow(source, static_cast<float*>(destination) + offset, stride, length);
    case DType::F64:
      return narrow(source, static_cast<double*>(destination) + offset, stride, length);
    case DType::F16:
      return narrow(source, static_cast<c10::Half*>(destination) + offset, stride, length);
    case DType::BF16:
      return narrow(source, static_cast<c10::BFloat16*>(destination) + offset, stride, length);
  }
}

// Calls `run(offset, first, length)` for the runs of memory that hold elements [begin, begin + length) of sample b.
template <class F>
static void for_each_run(const Geometry& g, const Operand& operand, int64_t b, int64_t begin, int64_t length, F&& run) {
  for (int64_t done = 0; done < length;) {
    const int64_t o = (begin + done) / g.inner, i = (begin + done) % g.inner;
    const int64_t here = std::min(length - done, g.inner - i);
    run(o * operand.outer_stride + b * operand.batch_stride + i, done, here);
    done += here;
  }
}

// Converting a tile and computing on it do not overlap, so memory would idle while the arithmetic runs: fetch what
// comes two tiles later. Beyond the end of the tensor this asks for lines that nobody reads, which is harmless.
static inline void prefetch_tile(const Operand& operand, int64_t offset) {
  const int64_t size = operand.dtype == DType::F32 ? 4 : operand.dtype == DType::F64 ? 8 : 2;
  const char* const first = static_cast<const char*>(operand.data) + offset * size;
  for (int64_t byte = 0; byte < tile_size * size; byte += 64)
    __builtin_prefetch(first + byte);
}

template <class C>
static const C* read_tile(const Geometry& g, const Operand& operand, int64_t b, int64_t begin, int64_t length,
                          Tile<C>& tile) {
  if (g.outer == 1) {
    const int64_t offset = b * operand.batch_stride + begin;
    if (operand.dtype == arithmetic_dtype<C>) return static_cast<const C*>(operand.data) + offset;
    prefetch_tile(operand, offset + 2 * tile_size);
    widen_any(operand.data, operand.dtype, offset, 1, tile.values, length);
  } else if (g.inner == 1) {  // the batch is the fastest dimension: one strided run
    const int64_t offset = begin * operand.outer_stride + b * operand.batch_stride;
    widen_any(operand.data, operand.dtype, offset, operand.outer_stride, tile.values, length);
  } else {
    for_each_run(g, operand, b, begin, length, [&](int64_t offset, int64_t first, int64_t here) {
      widen_any(operand.data, operand.dtype, offset, 1, tile.values + first, here);
    });
  }
  return tile.values;
}

// Where a kernel writes its tile: the output itself, or the buffer that finish_tile stores.
template <class C>
static C* output_tile(const Geometry& g, const Operand& operand, int64_t b, int64_t begin, Tile<C>& tile) {
  if (g.outer == 1 && operand.dtype == arithmetic_dtype<C>)
    return static_cast<C*>(operand.data) + b * operand.batch_stride + begin;
  return tile.values;
}

template <class C>
static void finish_tile(const Geometry& g, const Operand& operand, int64_t b, int64_t begin, int64_t length,
                        const Tile<C>& tile) {
  if (g.outer == 1) {
    if (operand.dtype == arithmetic_dtype<C>) return;
    narrow_any(tile.values, operand.data, operand.dtype, b * operand.batch_stride + begin, 1, length);
  } else if (g.inner == 1) {
    narrow_any(tile.values, operand.data, operand.dtype, begin * operand.outer_stride + b * operand.batch_stride,
               operand.outer_stride, length);
  } else {
    for_each_run(g, operand, b, begin, length, [&](int64_t offset, int64_t first, int64_t here) {
      narrow_any(tile.values + first, operand.data, operand.dtype, offset, 1, here);
    });
  }
}

// Reductions run in two stages of fixed order: SIMD lanes over one tile, flushed into double sums per chunk, and the
// chunks of a sample added up in order by the caller. Nothing depends on the number of threads.

// Cuts [batch, sample] into pieces of `reduction_chunk` elements and calls `piece(b, chunk, begin, end)` for each, in
// parallel.
template <class F>
static void for_each_chunk(const Geometry& g, F&& piece) {
  const int64_t sample = g.sample_size(), chunks = chunks_per_sample(g);
  const int64_t grain =
      std::max<int64_t>(1, 2 * reduction_chunk / std::max<int64_t>(1, std::min(sample, reduction_chunk)));
  at::parallel_for(0, g.batch * chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / chunks, chunk = task % chunks;
      piece(b, chunk, chunk * reduction_chunk, std::min(sample, (chunk + 1) * reduction_chunk));
    }
  });
}

// One tile: in[k] and out[k] are pointers to `length` values, `body` maps SIMD vectors. The tail is loaded with zeros
// behind it.
template <class C, int In, int Out, class Body>
static void map_tile(const C* const (&in)[In], C* const (&out)[Out], int64_t length, Body&& body) {
  using V = Vec<C>;
  constexpr int64_t step = V::size();
  int64_t i = 0;
  for (; i + step <= length; i += step) {
    V loaded[In], result[Out];
    for (int k = 0; k < In; ++k)
      loaded[k] = V::loadu(in[k] + i);
    body(loaded, result);
    for (int k = 0; k < Out; ++k)
      result[k].store(out[k] + i);
  }
  if (i < length) {
    V loaded[In], result[Out];
    for (int k = 0; k < In; ++k)
      loaded[k] = V::loadu(in[k] + i, length - i);
    body(loaded, result);
    for (int k = 0; k < Out; ++k)
      result[k].store(out[k] + i, length - i);
  }
}

// Elementwise kernel: `prepare(b)` returns the body for sample b, with its coefficients already in vectors.
template <class C, int In, int Out, class Prepare>
static void map_samples(const Geometry& g, const Operand (&inputs)[In], const Operand (&outputs)[Out],
                        Prepare&& prepare) {
  for_each_chunk(g, [&](int64_t b, int64_t, int64_t begin, int64_t end) {
    Tile<C> in_tiles[In], out_tiles[Out];
    const auto body = prepare(b);
    for (int64_t j = begin; j < end; j += tile_size) {
      const int64_t length = std::min(tile_size, end - j);
      const C* in[In];
      C* out[Out];
      for (int k = 0; k < In; ++k)
        in[k] = read_tile(g, inputs[k], b, j, length, in_tiles[k]);
      for (int k = 0; k < Out; ++k)
        out[k] = output_tile(g, outputs[k], b, j, out_tiles[k]);
      map_tile<C, In, Out>(in, out, length, body);
      for (int k = 0; k < Out; ++k)
        finish_tile(g, outputs[k], b, j, length, out_tiles[k]);
    }
  });
}

// Loads the SIMD vector at i of each tile; behind the end come zeros, which add nothing to any of the sums.
template <class C, int In, class Body>
static void visit_tile(const C* const (&in)[In], int64_t length, Body&& body) {
  using V = Vec<C>;
  constexpr int64_t step = V::size();
  V loaded[In];
  int64_t i = 0;
  for (; i + step <= length; i += step) {
    for (int k = 0; k < In; ++k)
      loaded[k] = V::loadu(in[k] + i);
    body(loaded);
  }
  if (i < length) {
    for (int k = 0; k < In; ++k)
      loaded[k] = V::loadu(in[k] + i, length - i);
    body(loaded);
  }
}

template <class C, int In>
static void read_tiles(const Geometry& g, const Operand (&inputs)[In], int64_t b, int64_t begin, int64_t length,
                       Tile<C> (&tiles)[In], const C* (&in)[In]) {
  for (int k = 0; k < In; ++k)
    in[k] = read_tile(g, inputs[k], b, begin, length, tiles[k]);
}

// Double sums of `Count` quantities, one per SIMD lane: flushing a tile into them is two vector instructions each,
// where adding the lanes up every time would cost as much as the tile itself.
template <class C, int Count>
class LaneTotals {
 public:
  void add(int k, const Vec<C>& sum) {
    C lanes[width];
    sum.store(lanes);
    for (int i = 0; i < width; ++i)
      totals_[k][i] += static_cast<double>(lanes[i]);
  }
  double total(int k) const {
    double sum = 0;
    for (const double lane : totals_[k])
      sum += lane;
    return sum;
  }

 private:
  static constexpr int width = Vec<C>::size();
  double totals_[Count][width] = {};
};

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
