// L_fake, the velocity correction and their statistics in one pass; both gradients in another.
#include "math/shifted_velocity_loss.h"
#include "cpu/kernels/entries.h"
#include "cpu/kernels/simd.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

// inputs: v_shift, v_real, target and, with guidance, v_uncond
template <class C, bool Guided>
void shifted_velocity_loss_typed(const Geometry& g, const Operand (&inputs)[3 + Guided], double guidance_scale,
                                 double clip, double* partials) {
  using V = Vec<C>;
  using Sums = math::ShiftedVelocitySums<V>;
  const int64_t chunks = chunks_per_sample(g);
  const V guidance(static_cast<C>(guidance_scale)), limit(static_cast<C>(clip));
  for_each_chunk(g, [&](int64_t b, int64_t chunk, int64_t begin, int64_t end) {
    Tile<C> tiles[3 + Guided];
    const C* in[3 + Guided];
    LaneTotals<C, Sums::count> totals;
    for (int64_t j = begin; j < end; j += tile_size) {
      const int64_t length = std::min(tile_size, end - j);
      read_tiles(g, inputs, b, j, length, tiles, in);
      Sums sums;
      visit_tile(in, length, [&](const V(&v)[3 + Guided]) {
        V guided = v[1];
        if constexpr (Guided) guided = math::guided_velocity(v[1], v[3], guidance);
        sums.add(v[0], v[1], guided, v[2], limit);
      });
      const V lanes[Sums::count] = {sums.residual_squared, sums.dv_squared,     sums.clipped_dv_squared,
                                    sums.clipped_count,    sums.shift_dot_real, sums.shift_squared,
                                    sums.real_squared,     sums.guided_distance};
      for (int k = 0; k < Sums::count; ++k)
        totals.add(k, lanes[k]);
    }
    for (int k = 0; k < Sums::count; ++k)
      partials[(b * chunks + chunk) * Sums::count + k] = totals.total(k);
  });
}

template <class C>
void shifted_velocity_loss_any(const Geometry& g, const Operand& v_shift, const Operand& v_real,
                               const Operand& v_uncond, const Operand& target, double guidance_scale, double clip,
                               double* partials) {
  if (v_uncond.data)
    shifted_velocity_loss_typed<C, true>(g, {v_shift, v_real, target, v_uncond}, guidance_scale, clip, partials);
  else
    shifted_velocity_loss_typed<C, false>(g, {v_shift, v_real, target}, guidance_scale, clip, partials);
}

template <class C, bool Guided>
void shifted_velocity_loss_backward_typed(const Geometry& g, const Operand (&inputs)[3 + Guided], double guidance_scale,
                                          double clip, const double* weight_correction, const double* weight_fake,
                                          const Operand& grad_gen, const Operand& grad_shift,
                                          const Operand& grad_target) {
  using V = Vec<C>;
  const V guidance(static_cast<C>(guidance_scale)), limit(static_cast<C>(clip));
  for_each_chunk(g, [&](int64_t b, int64_t, int64_t begin, int64_t end) {
    Tile<C> tiles[3 + Guided], out_tile;
    const C* in[3 + Guided];
    const V correction(static_cast<C>(weight_correction[b])), fake(static_cast<C>(weight_fake[b])),
        minus_fake(static_cast<C>(-weight_fake[b]));
    const auto write = [&](const Operand& output, int64_t j, int64_t length, auto&& body) {
      if (!output.data) return;
      C* const out[1] = {output_tile(g, output, b, j, out_tile)};
      map_tile<C, 3 + Guided, 1>(in, out, length, body);
      finish_tile(g, output, b, j, length, out_tile);
    };
    for (int64_t j = begin; j < end; j += tile_size) {
      const int64_t length = std::min(tile_size, end - j);
      read_tiles(g, inputs, b, j, length, tiles, in);
      write(grad_gen, j, length, [&](const V(&v)[3 + Guided], V(&out)[1]) {
        V guided = v[1];
        if constexpr (Guided) guided = math::guided_velocity(v[1], v[3], guidance);
        out[0] = math::correction_gradient(v[0], guided, limit, correction);
      });
      write(grad_shift, j, length,
            [&](const V(&v)[3 + Guided], V(&out)[1]) { out[0] = math::fake_gradient(v[0], v[2], fake); });
      write(grad_target, j, length,
            [&](const V(&v)[3 + Guided], V(&out)[1]) { out[0] = math::fake_gradient(v[0], v[2], minus_fake); });
    }
  });
}

template <class C>
void shifted_velocity_loss_backward_any(const Geometry& g, const Operand& v_shift, const Operand& v_real,
                                        const Operand& v_uncond, const Operand& target, double guidance_scale,
                                        double clip, const double* weight_correction, const double* weight_fake,
                                        const Operand& grad_gen, const Operand& grad_shift,
                                        const Operand& grad_target) {
  if (v_uncond.data)
    shifted_velocity_loss_backward_typed<C, true>(g, {v_shift, v_real, target, v_uncond}, guidance_scale, clip,
                                                  weight_correction, weight_fake, grad_gen, grad_shift, grad_target);
  else
    shifted_velocity_loss_backward_typed<C, false>(g, {v_shift, v_real, target}, guidance_scale, clip,
                                                   weight_correction, weight_fake, grad_gen, grad_shift, grad_target);
}

}  // namespace

void shifted_velocity_loss(const Geometry& g, const Operand& v_shift, const Operand& v_real, const Operand& v_uncond,
                           const Operand& target, double guidance_scale, double clip, double* partials, bool wide) {
  (wide ? shifted_velocity_loss_any<double> : shifted_velocity_loss_any<float>)(g, v_shift, v_real, v_uncond, target,
                                                                                guidance_scale, clip, partials);
}

void shifted_velocity_loss_backward(const Geometry& g, const Operand& v_shift, const Operand& v_real,
                                    const Operand& v_uncond, const Operand& target, double guidance_scale, double clip,
                                    const double* weight_correction, const double* weight_fake, const Operand& grad_gen,
                                    const Operand& grad_shift, const Operand& grad_target, bool wide) {
  (wide ? shifted_velocity_loss_backward_any<double>
        : shifted_velocity_loss_backward_any<float>)(g, v_shift, v_real, v_uncond, target, guidance_scale, clip,
                                                     weight_correction, weight_fake, grad_gen, grad_shift, grad_target);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
