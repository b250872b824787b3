// The generator's sample noised again (APEX, Eq. 11 and 1), the velocity of that path (Eq. 3), and the gradient of
// both.
#include "cuda/kernels.h"
#include "cuda/map.cuh"
#include "math/renoise.h"

namespace apex_fast::cuda {

namespace {

template <class C>
struct Renoise {
  static constexpr int inputs = 3, outputs = 2;
  struct Coefficients {
    C s, t, one_minus_t;
  };
  Times s, t;

  __device__ Coefficients coefficients(int64_t sample) const {
    const double time = time_at(t, sample);
    return {static_cast<C>(time_at(s, sample)), static_cast<C>(time), static_cast<C>(1.0 - time)};
  }
  __device__ void apply(const Coefficients& k, const C (&in)[3], C (&out)[2]) const {
    const auto renoised = math::renoise(in[0], in[1], in[2], k.s, k.t, k.one_minus_t);
    out[0] = renoised.x_fake_t;
    out[1] = renoised.target;
  }
};

template <class C>
struct RenoiseBackward {
  static constexpr int inputs = 2, outputs = 1;
  struct Coefficients {
    C minus_s_one_minus_t, s;
  };
  Times s, t;

  __device__ Coefficients coefficients(int64_t sample) const {
    const double start = time_at(s, sample);
    return {static_cast<C>(-start * (1.0 - time_at(t, sample))), static_cast<C>(start)};
  }
  __device__ void apply(const Coefficients& k, const C (&in)[2], C (&out)[1]) const {
    out[0] = math::renoise_backward(in[0], in[1], k.minus_s_one_minus_t, k.s);
  }
};

}  // namespace

int renoise(const Geometry& geometry, const Operand& velocity, const Operand& x_s, const Operand& z, const Times& s,
            const Times& t, const Operand& x_fake_t, const Operand& target, bool wide, void* stream) {
  return wide ? map<double, Renoise<double>>(geometry, {velocity, x_s, z}, {x_fake_t, target}, {s, t}, stream)
              : map<float, Renoise<float>>(geometry, {velocity, x_s, z}, {x_fake_t, target}, {s, t}, stream);
}

int renoise_backward(const Geometry& geometry, const Operand& grad_x_fake_t, const Operand& grad_target, const Times& s,
                     const Times& t, const Operand& grad_velocity, bool wide, void* stream) {
  return wide ? map<double, RenoiseBackward<double>>(geometry, {grad_x_fake_t, grad_target}, {grad_velocity}, {s, t},
                                                     stream)
              : map<float, RenoiseBackward<float>>(geometry, {grad_x_fake_t, grad_target}, {grad_velocity}, {s, t},
                                                   stream);
}

}  // namespace apex_fast::cuda
