// L_fake, the velocity correction and their statistics in one pass; both gradients in another, or in the same.
#include "cuda/kernels.h"
#include "cuda/map.cuh"
#include "cuda/reduce.cuh"
#include "math/shifted_velocity_loss.h"

namespace apex_fast::cuda {

namespace {

// inputs: v_shift, v_real, target and, with guidance, v_uncond
template <class C, bool Guided>
struct Settings {
  C guidance_scale, clip;

  __device__ C guided(const C (&in)[3 + Guided]) const {
    if constexpr (Guided)
      return math::guided_velocity(in[1], in[3], guidance_scale);
    else
      return in[1];
  }
};

struct None {};

template <class C, bool Guided>
struct ShiftedVelocityLoss {
  static constexpr int inputs = 3 + Guided, outputs = 0;
  using Sums = math::ShiftedVelocitySums<C>;
  static constexpr int count = Sums::count;
  Settings<C, Guided> settings;

  __device__ None coefficients(int64_t) const { return {}; }
  __device__ void add(None, const C (&in)[inputs], Sums& sums) const {
    sums.add(in[0], in[1], settings.guided(in), in[2], settings.clip);
  }
};

template <class C>
struct Weights {
  C correction, fake;
};

// 2 upstream / n, on the device: nothing is read back to the host.
struct Upstream {
  Times fake, correction;
  double factor;  // 2 / n

  template <class C>
  __device__ Weights<C> weights(int64_t sample) const {
    return {static_cast<C>(factor * time_at(correction, sample)), static_cast<C>(factor * time_at(fake, sample))};
  }
};

// outputs: gradients of v_gen, v_shift and target
template <class C, bool Guided>
struct ShiftedVelocityLossBackward {
  static constexpr int inputs = 3 + Guided, outputs = 3;
  Settings<C, Guided> settings;
  Upstream upstream;

  __device__ Weights<C> coefficients(int64_t sample) const { return upstream.weights<C>(sample); }
  __device__ void apply(const Weights<C>& k, const C (&in)[inputs], C (&out)[3]) const {
    out[0] = math::correction_gradient(in[0], settings.guided(in), settings.clip, k.correction);
    out[1] = math::fake_gradient(in[0], in[2], k.fake);
    out[2] = math::fake_gradient(in[0], in[2], -k.fake);
  }
};

// outputs: gradients of v_gen and v_shift
template <class C, bool Guided>
struct ShiftedVelocityLossWithGradients {
  static constexpr int inputs = 3 + Guided, outputs = 2;
  using Sums = math::ShiftedVelocitySums<C>;
  static constexpr int count = Sums::count;
  Settings<C, Guided> settings;
  Upstream upstream;

  __device__ Weights<C> coefficients(int64_t sample) const { return upstream.weights<C>(sample); }
  __device__ void add(const Weights<C>&, const C (&in)[inputs], Sums& sums) const {
    sums.add(in[0], in[1], settings.guided(in), in[2], settings.clip);
  }
  __device__ void write(const Weights<C>& k, const C (&in)[inputs], C (&out)[2]) const {
    out[0] = math::correction_gradient(in[0], settings.guided(in), settings.clip, k.correction);
    out[1] = math::fake_gradient(in[0], in[2], k.fake);
  }
};

struct Finish {
  ShiftedVelocityResults results;
  double scale;  // 1 / n

  __device__ void operator()(int64_t sample, const double* totals) const {
    store_number(math::fake_loss(totals, scale), results.fake, results.dtype, sample);
    store_number(math::correction_loss(totals, scale), results.correction, results.dtype, sample);
    for (int k = 0; k < math::shifted_velocity_stats; ++k)
      store_number(math::shifted_velocity_stat(totals, k, scale), results.stats, results.dtype,
                   sample * math::shifted_velocity_stats + k);
  }
};

template <class C, bool Guided>
struct Launch {
  const Geometry& geometry;
  Operand inputs[3 + Guided];
  Settings<C, Guided> settings;
  double scale;  // 1 / n
  void* stream;

  Launch(const Geometry& geometry, const ShiftedVelocities& v, void* stream)
      : geometry(geometry),
        inputs{v.v_shift, v.v_real, v.target},
        settings{static_cast<C>(v.guidance_scale), static_cast<C>(v.clip)},
        scale(1.0 / static_cast<double>(geometry.sample_size())),
        stream(stream) {
    if constexpr (Guided) inputs[3] = v.v_uncond;
  }

  Upstream upstream(const Times& fake, const Times& correction) const {
    return {fake, correction, 2.0 / static_cast<double>(geometry.sample_size())};
  }

  int losses(double* partials, const ShiftedVelocityResults& results) const {
    using Body = ShiftedVelocityLoss<C, Guided>;
    return reduce<C, Body>(geometry, inputs, nullptr, {settings}, Finish{results, scale}, partials, stream);
  }

  int gradients(const Times& fake, const Times& correction, const Operand (&outputs)[3]) const {
    using Body = ShiftedVelocityLossBackward<C, Guided>;
    return map<C, Body>(geometry, inputs, outputs, {settings, upstream(fake, correction)}, stream);
  }

  int both(const Times& fake, const Times& correction, double* partials, const ShiftedVelocityResults& results,
           const Operand (&outputs)[2]) const {
    using Body = ShiftedVelocityLossWithGradients<C, Guided>;
    return reduce<C, Body>(geometry, inputs, outputs, {settings, upstream(fake, correction)}, Finish{results, scale},
                           partials, stream);
  }
};

// Calls `run` with the launcher of one of the four variants.
template <class Run>
int with_launch(const Geometry& geometry, const ShiftedVelocities& velocities, bool wide, void* stream,
                const Run& run) {
  if (velocities.v_uncond.data)
    return wide ? run(Launch<double, true>(geometry, velocities, stream))
                : run(Launch<float, true>(geometry, velocities, stream));
  return wide ? run(Launch<double, false>(geometry, velocities, stream))
              : run(Launch<float, false>(geometry, velocities, stream));
}

}  // namespace

int shifted_velocity_loss(const Geometry& geometry, const ShiftedVelocities& velocities, double* partials,
                          const ShiftedVelocityResults& results, bool wide, void* stream) {
  return with_launch(geometry, velocities, wide, stream,
                     [&](const auto& launch) { return launch.losses(partials, results); });
}

int shifted_velocity_loss_backward(const Geometry& geometry, const ShiftedVelocities& velocities,
                                   const Times& grad_fake, const Times& grad_correction, const Operand (&gradients)[3],
                                   bool wide, void* stream) {
  return with_launch(geometry, velocities, wide, stream,
                     [&](const auto& launch) { return launch.gradients(grad_fake, grad_correction, gradients); });
}

int shifted_velocity_loss_with_gradients(const Geometry& geometry, const ShiftedVelocities& velocities,
                                         const Times& weight_fake, const Times& weight_correction, double* partials,
                                         const ShiftedVelocityResults& results, const Operand (&gradients)[2],
                                         bool wide, void* stream) {
  return with_launch(geometry, velocities, wide, stream, [&](const auto& launch) {
    return launch.both(weight_fake, weight_correction, partials, results, gradients);
  });
}

}  // namespace apex_fast::cuda
