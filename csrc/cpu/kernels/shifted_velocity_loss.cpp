// L_fake, the velocity correction and their statistics in one pass; both gradients in another, or in the same.
#include "math/shifted_velocity_loss.h"
#include "cpu/kernels/entries.h"
#include "cpu/kernels/simd.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

// The settings of all three kernels, as vectors. Inputs are v_shift, v_real, target and, with guidance, v_uncond.
template <class C, bool Guided>
struct Settings {
  static constexpr int inputs = 3 + Guided;
  using V = Vec<C>;
  using Sums = math::ShiftedVelocitySums<V>;
  V guidance, limit;

  Settings(double guidance_scale, double clip)
      : guidance(static_cast<C>(guidance_scale)), limit(static_cast<C>(clip)) {}

  APEX_HD V guided(const V (&v)[inputs]) const {
    if constexpr (Guided)
      return math::guided_velocity(v[1], v[3], guidance);
    else
      return v[1];
  }

  void add_tile(const C* const (&in)[inputs], int64_t length, LaneTotals<C, Sums::count>& totals) const {
    Sums sums;
    visit_tile(in, length, [&](const V(&v)[inputs]) { sums.add(v[0], v[1], guided(v), v[2], limit); });
    for (int k = 0; k < Sums::count; ++k)
      totals.add(k, sums.sum(k));
  }
};

// The gradients of one sample.
template <class C, bool Guided>
struct Gradients {
  static constexpr int inputs = 3 + Guided;
  using V = Vec<C>;
  const Geometry& g;
  const Settings<C, Guided>& settings;
  int64_t b;
  V correction, fake, minus_fake;

  Gradients(const Geometry& g, const Settings<C, Guided>& settings, int64_t b, double weight_correction,
            double weight_fake)
      : g(g),
        settings(settings),
        b(b),
        correction(static_cast<C>(weight_correction)),
        fake(static_cast<C>(weight_fake)),
        minus_fake(static_cast<C>(-weight_fake)) {}

  template <class Body>
  void write(const Operand& output, const C* const (&in)[inputs], int64_t j, int64_t length, Body&& body) const {
    if (!output.data) return;
    Tile<C> tile;
    C* const out[1] = {output_tile(g, output, b, j, tile)};
    map_tile<C, inputs, 1>(in, out, length, body);
    finish_tile(g, output, b, j, length, tile);
  }
  void to_generator(const Operand& output, const C* const (&in)[inputs], int64_t j, int64_t length) const {
    write(output, in, j, length, [&](const V(&v)[inputs], V(&out)[1]) {
      out[0] = math::correction_gradient(v[0], settings.guided(v), settings.limit, correction);
    });
  }
  void to_shifted(const Operand& output, const C* const (&in)[inputs], int64_t j, int64_t length) const {
    write(output, in, j, length,
          [&](const V(&v)[inputs], V(&out)[1]) { out[0] = math::fake_gradient(v[0], v[2], fake); });
  }
  void to_target(const Operand& output, const C* const (&in)[inputs], int64_t j, int64_t length) const {
    write(output, in, j, length,
          [&](const V(&v)[inputs], V(&out)[1]) { out[0] = math::fake_gradient(v[0], v[2], minus_fake); });
  }
};

template <class C, bool Guided>
void store_totals(const Geometry& g, int64_t b, int64_t chunk,
                  const LaneTotals<C, Settings<C, Guided>::Sums::count>& totals, double* partials) {
  constexpr int count = Settings<C, Guided>::Sums::count;
  for (int k = 0; k < count; ++k)
    partials[(b * chunks_per_sample(g) + chunk) * count + k] = totals.total(k);
}

template <class C, bool Guided>
void shifted_velocity_loss_typed(const Geometry& g, const Operand (&inputs)[3 + Guided], double guidance_scale,
                                 double clip, double* partials) {
  const Settings<C, Guided> settings(guidance_scale, clip);
  for_each_chunk(g, [&](int64_t b, int64_t chunk, int64_t begin, int64_t end) {
    Tile<C> tiles[3 + Guided];
    const C* in[3 + Guided];
    LaneTotals<C, Settings<C, Guided>::Sums::count> totals;
    for (int64_t j = begin; j < end; j += tile_size) {
      const int64_t length = std::min(tile_size, end - j);
      read_tiles(g, inputs, b, j, length, tiles, in);
      settings.add_tile(in, length, totals);
    }
    store_totals<C, Guided>(g, b, chunk, totals, partials);
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
  const Settings<C, Guided> settings(guidance_scale, clip);
  for_each_chunk(g, [&](int64_t b, int64_t, int64_t begin, int64_t end) {
    Tile<C> tiles[3 + Guided];
    const C* in[3 + Guided];
    const Gradients<C, Guided> gradients(g, settings, b, weight_correction[b], weight_fake[b]);
    for (int64_t j = begin; j < end; j += tile_size) {
      const int64_t length = std::min(tile_size, end - j);
      read_tiles(g, inputs, b, j, length, tiles, in);
      gradients.to_generator(grad_gen, in, j, length);
      gradients.to_shifted(grad_shift, in, j, length);
      gradients.to_target(grad_target, in, j, length);
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

// While a tile is in the cache, it gives its sums and both gradients.
template <class C, bool Guided>
void shifted_velocity_loss_with_gradients_typed(const Geometry& g, const Operand (&inputs)[3 + Guided],
                                                double guidance_scale, double clip, const double* weight_correction,
                                                const double* weight_fake, double* partials, const Operand& grad_gen,
                                                const Operand& grad_shift) {
  const Settings<C, Guided> settings(guidance_scale, clip);
  for_each_chunk(g, [&](int64_t b, int64_t chunk, int64_t begin, int64_t end) {
    Tile<C> tiles[3 + Guided];
    const C* in[3 + Guided];
    LaneTotals<C, Settings<C, Guided>::Sums::count> totals;
    const Gradients<C, Guided> gradients(g, settings, b, weight_correction[b], weight_fake[b]);
    for (int64_t j = begin; j < end; j += tile_size) {
      const int64_t length = std::min(tile_size, end - j);
      read_tiles(g, inputs, b, j, length, tiles, in);
      settings.add_tile(in, length, totals);
      gradients.to_generator(grad_gen, in, j, length);
      gradients.to_shifted(grad_shift, in, j, length);
    }
    store_totals<C, Guided>(g, b, chunk, totals, partials);
  });
}

template <class C>
void shifted_velocity_loss_with_gradients_any(const Geometry& g, const Operand& v_shift, const Operand& v_real,
                                              const Operand& v_uncond, const Operand& target, double guidance_scale,
                                              double clip, const double* weight_correction, const double* weight_fake,
                                              double* partials, const Operand& grad_gen, const Operand& grad_shift) {
  if (v_uncond.data)
    shifted_velocity_loss_with_gradients_typed<C, true>(g, {v_shift, v_real, target, v_uncond}, guidance_scale, clip,
                                                        weight_correction, weight_fake, partials, grad_gen, grad_shift);
  else
    shifted_velocity_loss_with_gradients_typed<C, false>(g, {v_shift, v_real, target}, guidance_scale, clip,
                                                         weight_correction, weight_fake, partials, grad_gen,
                                                         grad_shift);
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

void shifted_velocity_loss_with_gradients(const Geometry& g, const Operand& v_shift, const Operand& v_real,
                                          const Operand& v_uncond, const Operand& target, double guidance_scale,
                                          double clip, const double* weight_correction, const double* weight_fake,
                                          double* partials, const Operand& grad_gen, const Operand& grad_shift,
                                          bool wide) {
  (wide ? shifted_velocity_loss_with_gradients_any<double>
        : shifted_velocity_loss_with_gradients_any<float>)(g, v_shift, v_real, v_uncond, target, guidance_scale, clip,
                                                           weight_correction, weight_fake, partials, grad_gen,
                                                           grad_shift);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
