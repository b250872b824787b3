// Layer norm modulated per sample: statistics and output from one read of the hidden state, and the gradients from one
// read of it and of the upstream gradient. row_reduce.cuh has the kernel.
#include "cuda/kernels.h"
#include "cuda/row_reduce.cuh"
#include "math/modulated_layer_norm.h"

namespace apex_fast::cuda {

namespace {

// input: hidden. parameters: scale, shift
template <class C>
struct LayerNorm {
  static constexpr int inputs = 1, outputs = 1, parameters = 2, columns = 0, rounds = 2, count = 2;
  struct State {
    C mean, rstd;
  };
  C one_over_channels, eps;
  C *mean, *rstd;  // [rows]

  __device__ State begin(int64_t) const { return {C(0), C(0)}; }
  // The variance around the mean, not E[h^2] - E[h]^2, which cancels. The second round finds, too, what the rounding of
  // the first left of the mean.
  template <int Round>
  __device__ void add(const State& row, const C (&in)[1], const C (&)[2], C (&sums)[2]) const {
    const C distance = in[0] - row.mean;
    sums[0] += distance;
    if constexpr (Round == 1) sums[1] += distance * distance;
  }
  template <int Round>
  __device__ void finish(State& row, const C (&totals)[2]) const {
    const C distance = totals[0] * one_over_channels;
    row.mean += distance;
    if constexpr (Round == 1) {
      // A sum that is not finite stays so, rather than become a variance of zero.
      const C square = totals[1] * one_over_channels, variance = square - distance * distance;
      row.rstd = reciprocal_root((std::isfinite(square) ? (variance > C(0) ? variance : C(0)) : square) + eps);
    }
  }
  __device__ void row_done(const State& row, int64_t index) const {
    mean[index] = row.mean;
    rstd[index] = row.rstd;
  }
  __device__ void write(const State& row, const C (&in)[1], const C (&k)[2], C (&out)[1]) const {
    out[0] = math::modulated(math::normalised(in[0], row.mean, row.rstd), C(1) + k[0], k[1]);
  }
};

// inputs: hidden and the upstream gradient. parameter: scale. output: gradient of hidden. columns: of scale, of shift
template <class C>
struct LayerNormBackward {
  static constexpr int inputs = 2, outputs = 1, parameters = 1, columns = 2, rounds = 1, count = 2;
  struct State {
    C mean, rstd, mean_grad, mean_product;
  };
  C one_over_channels;
  const void *mean, *rstd;  // [rows]
  DType statistics;

  __device__ State begin(int64_t row) const {
    return {static_cast<C>(load_number(mean, statistics, row)), static_cast<C>(load_number(rstd, statistics, row)),
            C(0), C(0)};
  }
  template <int>
  __device__ void add(const State& row, const C (&in)[2], const C (&k)[1], C (&sums)[2]) const {
    const C weighted = in[1] * (C(1) + k[0]);
    sums[0] += weighted;
    sums[1] += weighted * math::normalised(in[0], row.mean, row.rstd);
  }
  template <int>
  __device__ void finish(State& row, const C (&totals)[2]) const {
    row.mean_grad = totals[0] * one_over_channels;
    row.mean_product = totals[1] * one_over_channels;
  }
  __device__ void row_done(const State&, int64_t) const {}
  __device__ void write(const State& row, const C (&in)[2], const C (&k)[1], C (&out)[1]) const {
    out[0] = math::layer_norm_backward(in[1] * (C(1) + k[0]), math::normalised(in[0], row.mean, row.rstd), row.rstd,
                                       row.mean_grad, row.mean_product);
  }
  __device__ void column(const State& row, const C (&in)[2], const C (&)[1], C (&terms)[2]) const {
    terms[0] = in[1] * math::normalised(in[0], row.mean, row.rstd);
    terms[1] = in[1];
  }
};

template <class C>
C one_over_channels(const ModulatedLayerNormProblem& p) {
  return static_cast<C>(1.0 / static_cast<double>(p.channels));
}

template <class C>
int forward(const ModulatedLayerNormProblem& p, const Operand& out, void* mean, void* rstd, void* stream) {
  const LayerNorm<C> body{one_over_channels<C>(p), static_cast<C>(p.eps), static_cast<C*>(mean), static_cast<C*>(rstd)};
  return row_reduce<C, LayerNorm<C>>(row_tasks(p.batch, p.rows_per_sample, false), p.channels, {p.hidden}, {out},
                                     {p.scale, p.shift}, nullptr, body, stream);
}

template <class C>
int backward(const ModulatedLayerNormProblem& p, const Operand& grad, const void* mean, const void* rstd,
             DType statistics, const Operand& grad_hidden, const ColumnGradient (&gradients)[2], void* stream) {
  const LayerNormBackward<C> body{one_over_channels<C>(p), mean, rstd, statistics};
  return row_reduce<C, LayerNormBackward<C>>(row_tasks(p.batch, p.rows_per_sample, true), p.channels, {p.hidden, grad},
                                             {grad_hidden}, {p.scale}, gradients, body, stream);
}

}  // namespace

int modulated_layer_norm(const ModulatedLayerNormProblem& problem, const Operand& out, void* mean, void* rstd,
                         void* stream) {
  return (problem.wide ? forward<double> : forward<float>)(problem, out, mean, rstd, stream);
}

int modulated_layer_norm_backward(const ModulatedLayerNormProblem& problem, const Operand& grad, const void* mean,
                                  const void* rstd, DType statistics, const Operand& grad_hidden,
                                  const ColumnGradient (&gradients)[2], void* stream) {
  return (problem.wide ? backward<double> : backward<float>)(problem, grad, mean, rstd, statistics, grad_hidden,
                                                             gradients, stream);
}

}  // namespace apex_fast::cuda
