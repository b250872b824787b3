// factor[b] * grad, once per output.
#include "cpu/kernels/entries.h"
#include "cpu/kernels/simd.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

template <class C>
void scaled_copies_typed(const Geometry& g, const Operand& grad, int count, const double* const* factors,
                         const Operand* out) {
  using V = Vec<C>;
  for_each_chunk(g, [&](int64_t b, int64_t, int64_t begin, int64_t end) {
    Tile<C> in_tile, out_tile;
    for (int64_t j = begin; j < end; j += tile_size) {
      const int64_t length = std::min(tile_size, end - j);
      const C* in[1] = {read_tile(g, grad, b, j, length, in_tile)};
      for (int k = 0; k < count; ++k) {
        const V factor(static_cast<C>(factors[k][b]));
        C* result[1] = {output_tile(g, out[k], b, j, out_tile)};
        map_tile<C, 1, 1>(in, result, length, [&](const V(&v)[1], V(&r)[1]) { r[0] = factor * v[0]; });
        finish_tile(g, out[k], b, j, length, out_tile);
      }
    }
  });
}

}  // namespace

void scaled_copies(const Geometry& g, const Operand& grad, int count, const double* const* factors, const Operand* out,
                   bool wide) {
  (wide ? scaled_copies_typed<double> : scaled_copies_typed<float>)(g, grad, count, factors, out);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
