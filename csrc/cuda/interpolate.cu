// x_t = t z + (1 - t) x (APEX, Eq. 1) and its gradients (1 - t) g and t g. One pass, bound by memory.
#include "cuda/kernels.h"
#include "cuda/map.cuh"
#include "math/interpolate.h"

namespace apex_fast::cuda {

namespace {

template <class C>
struct TimePair {
  C t;
  C one_minus_t;

  static __device__ TimePair at(const Times& times, int64_t sample) {
    const double t = time_at(times, sample);
    return {static_cast<C>(t), static_cast<C>(1.0 - t)};
  }
};

template <class C>
struct Interpolate {
  static constexpr int inputs = 2, outputs = 1;
  Times t;

  __device__ TimePair<C> coefficients(int64_t sample) const { return TimePair<C>::at(t, sample); }
  __device__ void apply(const TimePair<C>& k, const C (&in)[2], C (&out)[1]) const {
    out[0] = math::interpolate(in[0], in[1], k.t, k.one_minus_t);
  }
};

template <class C>
struct InterpolateBackward {
  static constexpr int inputs = 1, outputs = 2;
  Times t;

  __device__ TimePair<C> coefficients(int64_t sample) const { return TimePair<C>::at(t, sample); }
  __device__ void apply(const TimePair<C>& k, const C (&in)[1], C (&out)[2]) const {
    out[0] = k.one_minus_t * in[0];
    out[1] = k.t * in[0];
  }
};

}  // namespace

int interpolate(const Geometry& geometry, const Operand& x, const Operand& z, const Times& t, const Operand& x_t,
                bool wide, void* stream) {
  return wide ? map<double, Interpolate<double>>(geometry, {x, z}, {x_t}, {t}, stream)
              : map<float, Interpolate<float>>(geometry, {x, z}, {x_t}, {t}, stream);
}

int interpolate_backward(const Geometry& geometry, const Operand& grad, const Times& t, const Operand& grad_x,
                         const Operand& grad_z, bool wide, void* stream) {
  return wide ? map<double, InterpolateBackward<double>>(geometry, {grad}, {grad_x, grad_z}, {t}, stream)
              : map<float, InterpolateBackward<float>>(geometry, {grad}, {grad_x, grad_z}, {t}, stream);
}

}  // namespace apex_fast::cuda
