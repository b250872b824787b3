// Flow matching and L_mix.
#include "math/mixed_velocity_loss.h"
#include "cpu/kernels/entries.h"
#include "cpu/kernels/simd.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

// inputs: velocity, x, z and, with a mix, v_fake
template <class C, bool Mixed>
APEX_HD Vec<C> residual(const Vec<C> (&v)[3 + Mixed], const Vec<C>& mix, const Vec<C>& rest) {
  if constexpr (Mixed)
    return math::mixed_residual(v[0], v[1], v[2], v[3], mix, rest);
  else
    return math::flow_residual(v[0], v[1], v[2]);
}

template <class C, bool Mixed>
void mixed_velocity_loss_typed(const Geometry& g, const Operand (&inputs)[3 + Mixed], double mix_weight,
                               double* partials) {
  using V = Vec<C>;
  const int64_t chunks = chunks_per_sample(g);
  const V mix(static_cast<C>(mix_weight)), rest(static_cast<C>(1.0 - mix_weight));
  for_each_chunk(g, [&](int64_t b, int64_t chunk, int64_t begin, int64_t end) {
    Tile<C> tiles[3 + Mixed];
    const C* in[3 + Mixed];
    LaneTotals<C, 1> totals;
    for (int64_t j = begin; j < end; j += tile_size) {
      const int64_t length = std::min(tile_size, end - j);
      read_tiles(g, inputs, b, j, length, tiles, in);
      V sum(static_cast<C>(0));
      visit_tile(in, length, [&](const V(&v)[3 + Mixed]) {
        const V r = residual<C, Mixed>(v, mix, rest);
        sum = sum + r * r;
      });
      totals.add(0, sum);
    }
    partials[b * chunks + chunk] = totals.total(0);
  });
}

template <class C, bool Mixed>
void mixed_velocity_loss_backward_typed(const Geometry& g, const Operand (&inputs)[3 + Mixed], double mix_weight,
                                        const double* weight, const Operand& grad_velocity, const Operand& grad_x,
                                        const Operand& grad_z) {
  using V = Vec<C>;
  const V mix(static_cast<C>(mix_weight)), rest(static_cast<C>(1.0 - mix_weight));
  for_each_chunk(g, [&](int64_t b, int64_t, int64_t begin, int64_t end) {
    Tile<C> tiles[3 + Mixed], out_tile;
    const C* in[3 + Mixed];
    for (int64_t j = begin; j < end; j += tile_size) {
      const int64_t length = std::min(tile_size, end - j);
      read_tiles(g, inputs, b, j, length, tiles, in);
      const auto write = [&](const Operand& output, double factor) {
        if (!output.data) return;
        const V w(static_cast<C>(factor * weight[b]));
        C* const out[1] = {output_tile(g, output, b, j, out_tile)};
        map_tile<C, 3 + Mixed, 1>(
            in, out, length, [&](const V(&v)[3 + Mixed], V(&r)[1]) { r[0] = w * residual<C, Mixed>(v, mix, rest); });
        finish_tile(g, output, b, j, length, out_tile);
      };
      write(grad_velocity, 1.0);
      write(grad_x, 1.0 - mix_weight);
      write(grad_z, mix_weight - 1.0);
    }
  });
}

template <class C>
void mixed_velocity_loss_any(const Geometry& g, const Operand& velocity, const Operand& x, const Operand& z,
                             const Operand& v_fake, double mix_weight, double* partials) {
  if (v_fake.data)
    mixed_velocity_loss_typed<C, true>(g, {velocity, x, z, v_fake}, mix_weight, partials);
  else
    mixed_velocity_loss_typed<C, false>(g, {velocity, x, z}, mix_weight, partials);
}

template <class C>
void mixed_velocity_loss_backward_any(const Geometry& g, const Operand& velocity, const Operand& x, const Operand& z,
                                      const Operand& v_fake, double mix_weight, const double* weight,
                                      const Operand& grad_velocity, const Operand& grad_x, const Operand& grad_z) {
  if (v_fake.data)
    mixed_velocity_loss_backward_typed<C, true>(g, {velocity, x, z, v_fake}, mix_weight, weight, grad_velocity, grad_x,
                                                grad_z);
  else
    mixed_velocity_loss_backward_typed<C, false>(g, {velocity, x, z}, mix_weight, weight, grad_velocity, grad_x,
                                                 grad_z);
}

}  // namespace

void mixed_velocity_loss(const Geometry& g, const Operand& velocity, const Operand& x, const Operand& z,
                         const Operand& v_fake, double mix_weight, double* partials, bool wide) {
  (wide ? mixed_velocity_loss_any<double> : mixed_velocity_loss_any<float>)(g, velocity, x, z, v_fake, mix_weight,
                                                                            partials);
}

void mixed_velocity_loss_backward(const Geometry& g, const Operand& velocity, const Operand& x, const Operand& z,
                                  const Operand& v_fake, double mix_weight, const double* weight,
                                  const Operand& grad_velocity, const Operand& grad_x, const Operand& grad_z,
                                  bool wide) {
  (wide ? mixed_velocity_loss_backward_any<double>
        : mixed_velocity_loss_backward_any<float>)(g, velocity, x, z, v_fake, mix_weight, weight, grad_velocity, grad_x,
                                                   grad_z);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
