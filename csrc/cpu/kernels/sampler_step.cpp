// One step of Euler, re-noising or anything between; guidance inside.
#include "math/sampler_step.h"
#include "cpu/kernels/entries.h"
#include "cpu/kernels/simd.h"
#include "math/shifted_velocity_loss.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

template <class C, bool Guided, bool Noised>
void sampler_step_typed(const Geometry& g, const Operand& x, const Operand& velocity, const Operand& v_uncond,
                        const Operand& noise, const Times& t, const Times& t_next, double guidance_scale,
                        double stochasticity, const Operand& out) {
  using V = Vec<C>;
  constexpr int count = 2 + Guided + Noised;
  Operand inputs[count] = {x, velocity};
  if constexpr (Guided) inputs[2] = v_uncond;
  if constexpr (Noised) inputs[2 + Guided] = noise;
  const auto renewal = math::noise_renewal(stochasticity);
  map_samples<C, count, 1>(g, inputs, {out}, [&](int64_t b) {
    const auto k = math::step_coefficients(time_at(t, b), time_at(t_next, b), renewal);
    const V x_factor(static_cast<C>(k.x)), velocity_factor(static_cast<C>(k.velocity)),
        noise_factor(static_cast<C>(k.noise));
    const V guidance(static_cast<C>(guidance_scale));
    return [=](const V(&in)[count], V(&result)[1]) {
      V v = in[1];
      if constexpr (Guided) v = math::guided_velocity(in[1], in[2], guidance);
      if constexpr (Noised)
        result[0] = math::sampler_step_noised(in[0], v, in[2 + Guided], x_factor, velocity_factor, noise_factor);
      else
        result[0] = math::sampler_step(in[0], v, x_factor, velocity_factor);
    };
  });
}

template <class C>
void sampler_step_any(const Geometry& g, const Operand& x, const Operand& velocity, const Operand& v_uncond,
                      const Operand& noise, const Times& t, const Times& t_next, double guidance_scale,
                      double stochasticity, const Operand& out) {
  const auto run = v_uncond.data
                       ? (noise.data ? sampler_step_typed<C, true, true> : sampler_step_typed<C, true, false>)
                       : (noise.data ? sampler_step_typed<C, false, true> : sampler_step_typed<C, false, false>);
  run(g, x, velocity, v_uncond, noise, t, t_next, guidance_scale, stochasticity, out);
}

}  // namespace

void sampler_step(const Geometry& g, const Operand& x, const Operand& velocity, const Operand& v_uncond,
                  const Operand& noise, const Times& t, const Times& t_next, double guidance_scale,
                  double stochasticity, const Operand& out, bool wide) {
  (wide ? sampler_step_any<double> : sampler_step_any<float>)(g, x, velocity, v_uncond, noise, t, t_next,
                                                              guidance_scale, stochasticity, out);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
