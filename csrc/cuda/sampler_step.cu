// One step of Euler, re-noising or anything between, guidance inside; and its gradients, one multiple of the upstream
// gradient per input.
#include "cuda/kernels.h"
#include "cuda/map.cuh"
#include "math/sampler_step.h"
#include "math/shifted_velocity_loss.h"

namespace apex_fast::cuda {

namespace {

// inputs: x, velocity, then v_uncond and noise where they are there
template <class C, bool Guided, bool Noised>
struct SamplerStep {
  static constexpr int inputs = 2 + Guided + Noised, outputs = 1;
  struct Coefficients {
    C x, velocity, noise;
  };
  Times t, t_next;
  math::NoiseRenewal renewal;
  C guidance_scale;

  __device__ Coefficients coefficients(int64_t sample) const {
    const auto k = math::step_coefficients(time_at(t, sample), time_at(t_next, sample), renewal);
    return {static_cast<C>(k.x), static_cast<C>(k.velocity), static_cast<C>(k.noise)};
  }
  __device__ void apply(const Coefficients& k, const C (&in)[inputs], C (&out)[1]) const {
    C v = in[1];
    if constexpr (Guided) v = math::guided_velocity(in[1], in[2], guidance_scale);
    if constexpr (Noised)
      out[0] = math::sampler_step_noised(in[0], v, in[2 + Guided], k.x, k.velocity, k.noise);
    else
      out[0] = math::sampler_step(in[0], v, k.x, k.velocity);
  }
};

template <class C, bool Guided, bool Noised>
int step(const Geometry& geometry, const Operand& x, const Operand& velocity, const Operand& v_uncond,
         const Operand& noise, const Times& t, const Times& t_next, double guidance_scale, double stochasticity,
         const Operand& out, void* stream) {
  using Body = SamplerStep<C, Guided, Noised>;
  Operand inputs[Body::inputs] = {x, velocity};
  if constexpr (Guided) inputs[2] = v_uncond;
  if constexpr (Noised) inputs[2 + Guided] = noise;
  const Body body{t, t_next, math::noise_renewal(stochasticity), static_cast<C>(guidance_scale)};
  return map<C, Body>(geometry, inputs, {out}, body, stream);
}

// outputs: gradients of x, velocity, v_uncond and noise
template <class C>
struct SamplerStepBackward {
  static constexpr int inputs = 1, outputs = 4;
  struct Coefficients {
    C factor[4];
  };
  Times t, t_next;
  math::NoiseRenewal renewal;
  double conditional;  // the share of v_real in the guided velocity

  __device__ Coefficients coefficients(int64_t sample) const {
    const auto k = math::step_coefficients(time_at(t, sample), time_at(t_next, sample), renewal);
    return {static_cast<C>(k.x), static_cast<C>(k.velocity * conditional),
            static_cast<C>(k.velocity * (1.0 - conditional)), static_cast<C>(k.noise)};
  }
  __device__ void apply(const Coefficients& k, const C (&in)[1], C (&out)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out[i] = k.factor[i] * in[0];
  }
};

}  // namespace

int sampler_step(const Geometry& geometry, const Operand& x, const Operand& velocity, const Operand& v_uncond,
                 const Operand& noise, const Times& t, const Times& t_next, double guidance_scale, double stochasticity,
                 const Operand& out, bool wide, void* stream) {
  const auto choose = [&]<class C>(C) {
    if (v_uncond.data) return noise.data ? step<C, true, true> : step<C, true, false>;
    return noise.data ? step<C, false, true> : step<C, false, false>;
  };
  return (wide ? choose(double{}) : choose(float{}))(geometry, x, velocity, v_uncond, noise, t, t_next, guidance_scale,
                                                     stochasticity, out, stream);
}

int sampler_step_backward(const Geometry& geometry, const Operand& grad, const Times& t, const Times& t_next,
                          double guidance_scale, double stochasticity, bool guided, const Operand (&gradients)[4],
                          bool wide, void* stream) {
  const auto renewal = math::noise_renewal(stochasticity);
  const double conditional = guided ? guidance_scale : 1.0;
  return wide ? map<double, SamplerStepBackward<double>>(geometry, {grad}, gradients, {t, t_next, renewal, conditional},
                                                         stream)
              : map<float, SamplerStepBackward<float>>(geometry, {grad}, gradients, {t, t_next, renewal, conditional},
                                                       stream);
}

}  // namespace apex_fast::cuda
