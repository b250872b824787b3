// Flow matching and L_mix (APEX, Eq. 24): the loss of every sample, and its gradients.
#include "cuda/kernels.h"
#include "cuda/map.cuh"
#include "cuda/reduce.cuh"
#include "math/mixed_velocity_loss.h"

namespace apex_fast::cuda {

namespace {

// inputs: velocity, x, z and, with a mix, v_fake
template <class C, bool Mixed>
struct Residual {
  C mix_weight, one_minus_mix_weight;

  __device__ C at(const C (&in)[3 + Mixed]) const {
    if constexpr (Mixed)
      return math::mixed_residual(in[0], in[1], in[2], in[3], mix_weight, one_minus_mix_weight);
    else
      return math::flow_residual(in[0], in[1], in[2]);
  }
};

template <class C, bool Mixed>
struct MixedVelocityLoss {
  static constexpr int inputs = 3 + Mixed, outputs = 0, count = 1;
  struct Sums {
    C squared = 0;
    __device__ C sum(int) const { return squared; }
  };
  struct None {};
  Residual<C, Mixed> residual;

  __device__ None coefficients(int64_t) const { return {}; }
  __device__ void add(None, const C (&in)[inputs], Sums& sums) const {
    const C r = residual.at(in);
    sums.squared += r * r;
  }
};

struct FinishMean {
  void* loss;
  DType dtype;
  double scale;

  __device__ void operator()(int64_t sample, const double* totals) const {
    store_number(totals[0] * scale, loss, dtype, sample);
  }
};

// outputs: gradients of velocity, x and z
template <class C, bool Mixed>
struct MixedVelocityLossBackward {
  static constexpr int inputs = 3 + Mixed, outputs = 3;
  struct Coefficients {
    C velocity, x, z;
  };
  Residual<C, Mixed> residual;
  Times grad;
  double factor;      // 2 / n
  double mix_weight;  // 0 without a mix

  __device__ Coefficients coefficients(int64_t sample) const {
    const double weight = factor * time_at(grad, sample);
    return {static_cast<C>(weight), static_cast<C>((1.0 - mix_weight) * weight),
            static_cast<C>((mix_weight - 1.0) * weight)};
  }
  __device__ void apply(const Coefficients& k, const C (&in)[inputs], C (&out)[3]) const {
    const C r = residual.at(in);
    out[0] = k.velocity * r;
    out[1] = k.x * r;
    out[2] = k.z * r;
  }
};

template <class C, bool Mixed>
struct Launch {
  const Geometry& geometry;
  Operand inputs[3 + Mixed];
  double mix_weight;
  void* stream;

  Launch(const Geometry& geometry, const Operand& velocity, const Operand& x, const Operand& z, const Operand& v_fake,
         double mix_weight, void* stream)
      : geometry(geometry), inputs{velocity, x, z}, mix_weight(mix_weight), stream(stream) {
    if constexpr (Mixed) inputs[3] = v_fake;
  }

  Residual<C, Mixed> residual() const { return {static_cast<C>(mix_weight), static_cast<C>(1.0 - mix_weight)}; }

  int loss(double* partials, void* loss, DType dtype) const {
    using Body = MixedVelocityLoss<C, Mixed>;
    const FinishMean finish{loss, dtype, 1.0 / static_cast<double>(geometry.sample_size())};
    return reduce<C, Body>(geometry, inputs, nullptr, {residual()}, finish, partials, stream);
  }

  int gradients(const Times& grad, const Operand (&outputs)[3]) const {
    using Body = MixedVelocityLossBackward<C, Mixed>;
    const double factor = 2.0 / static_cast<double>(geometry.sample_size());
    return map<C, Body>(geometry, inputs, outputs, {residual(), grad, factor, mix_weight}, stream);
  }
};

// Calls `run` with the launcher of one of the four variants.
template <class Run>
int with_launch(const Geometry& geometry, const Operand& velocity, const Operand& x, const Operand& z,
                const Operand& v_fake, double mix_weight, bool wide, void* stream, const Run& run) {
  if (v_fake.data)
    return wide ? run(Launch<double, true>(geometry, velocity, x, z, v_fake, mix_weight, stream))
                : run(Launch<float, true>(geometry, velocity, x, z, v_fake, mix_weight, stream));
  return wide ? run(Launch<double, false>(geometry, velocity, x, z, v_fake, mix_weight, stream))
              : run(Launch<float, false>(geometry, velocity, x, z, v_fake, mix_weight, stream));
}

}  // namespace

int mixed_velocity_loss(const Geometry& geometry, const Operand& velocity, const Operand& x, const Operand& z,
                        const Operand& v_fake, double mix_weight, double* partials, void* loss, DType loss_dtype,
                        bool wide, void* stream) {
  return with_launch(geometry, velocity, x, z, v_fake, mix_weight, wide, stream,
                     [&](const auto& launch) { return launch.loss(partials, loss, loss_dtype); });
}

int mixed_velocity_loss_backward(const Geometry& geometry, const Operand& velocity, const Operand& x, const Operand& z,
                                 const Operand& v_fake, double mix_weight, const Times& grad,
                                 const Operand (&gradients)[3], bool wide, void* stream) {
  return with_launch(geometry, velocity, x, z, v_fake, mix_weight, wide, stream,
                     [&](const auto& launch) { return launch.gradients(grad, gradients); });
}

}  // namespace apex_fast::cuda
