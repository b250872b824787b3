// RMS norm of c and of A c + b (APEX, Eq. 9) from one read of c, and the gradients of both from one read of c and of
// each upstream gradient. row_reduce.cuh has the kernel.
//
// A token that is not shifted has the norm of c in both outputs, whatever the shift is.
#include "cuda/kernels.h"
#include "cuda/row_reduce.cuh"
#include "math/condition_shift.h"
#include "math/condition_shift_rms_norm.h"

namespace apex_fast::cuda {

namespace {

// parameters: scale, bias, weight
template <class C>
struct Shift {
  const uint8_t* mask;  // [rows], nonzero = shift this token; nullptr = all
  C one_over_channels, eps;

  __device__ bool kept(int64_t row) const { return mask && __ldg(mask + row) == 0; }
  static __device__ C value(bool kept, C condition, const C (&k)[3]) {
    return kept ? condition : math::condition_shift(condition, k[0], k[1]);
  }
  __device__ C reciprocal(C squares) const { return reciprocal_root(squares * one_over_channels + eps); }
};

// input: condition. outputs: the norm of it, and of the shifted condition
template <class C>
struct RmsNorms {
  static constexpr int inputs = 1, outputs = 2, parameters = 3, columns = 0, rounds = 1, count = 2;
  struct State {
    C reciprocal, reciprocal_shifted;
    bool kept;
  };
  Shift<C> shift;

  __device__ State begin(int64_t row) const { return {C(0), C(0), shift.kept(row)}; }
  template <int>
  __device__ void add(const State& row, const C (&in)[1], const C (&k)[3], C (&sums)[2]) const {
    const C shifted = shift.value(row.kept, in[0], k);
    sums[0] += in[0] * in[0];
    sums[1] += shifted * shifted;
  }
  template <int>
  __device__ void finish(State& row, const C (&totals)[2]) const {
    row.reciprocal = shift.reciprocal(totals[0]);
    row.reciprocal_shifted = shift.reciprocal(totals[1]);
  }
  __device__ void row_done(const State&, int64_t) const {}
  __device__ void write(const State& row, const C (&in)[1], const C (&k)[3], C (&out)[2]) const {
    out[0] = math::rms_norm(in[0], row.reciprocal, k[2]);
    out[1] = math::rms_norm(shift.value(row.kept, in[0], k), row.reciprocal_shifted, k[2]);
  }
};

// inputs: condition, gradients of both norms. output: gradient of condition. columns: gradients of the parameters
template <class C>
struct RmsNormsBackward {
  static constexpr int inputs = 3, outputs = 1, parameters = 3, columns = 3, rounds = 1, count = 4;
  struct Norm {
    C reciprocal, projection;
  };
  struct State {
    Norm real, shifted;
    bool kept;
  };
  Shift<C> shift;
  bool has_real, has_shifted;  // upstream gradients

  __device__ State begin(int64_t row) const { return {{C(0), C(0)}, {C(0), C(0)}, shift.kept(row)}; }
  template <int>
  __device__ void add(const State& row, const C (&in)[3], const C (&k)[3], C (&sums)[4]) const {
    const C shifted = shift.value(row.kept, in[0], k);
    sums[0] += in[0] * in[0];
    sums[1] += in[0] * in[1] * k[2];
    sums[2] += shifted * shifted;
    sums[3] += shifted * in[2] * k[2];
  }
  template <int>
  __device__ void finish(State& row, const C (&totals)[4]) const {
    row.real = norm(totals[0], totals[1]);
    row.shifted = norm(totals[2], totals[3]);
  }
  __device__ void row_done(const State&, int64_t) const {}
  // The gradient of A c + b.
  __device__ C through_norm(const State& row, C shifted, C grad, C weight) const {
    return math::rms_norm_backward(grad, shifted, row.shifted.reciprocal, weight, row.shifted.projection);
  }
  __device__ void write(const State& row, const C (&in)[3], const C (&k)[3], C (&out)[1]) const {
    out[0] = 0;
    if (has_real) out[0] = math::rms_norm_backward(in[1], in[0], row.real.reciprocal, k[2], row.real.projection);
    if (has_shifted) {
      const C grad = through_norm(row, shift.value(row.kept, in[0], k), in[2], k[2]);
      out[0] += row.kept ? grad : k[0] * grad;
    }
  }
  __device__ void column(const State& row, const C (&in)[3], const C (&k)[3], C (&terms)[3]) const {
    terms[0] = terms[1] = terms[2] = 0;
    if (has_real) terms[2] = in[1] * in[0] * row.real.reciprocal;
    if (has_shifted) {
      const C shifted = shift.value(row.kept, in[0], k);
      terms[2] += in[2] * shifted * row.shifted.reciprocal;
      if (!row.kept) {
        terms[1] = through_norm(row, shifted, in[2], k[2]);
        terms[0] = terms[1] * in[0];
      }
    }
  }

 private:
  __device__ Norm norm(C squares, C product) const {
    const C reciprocal = shift.reciprocal(squares);
    return {reciprocal, product * one_over_channels() * reciprocal * reciprocal};
  }
  __device__ C one_over_channels() const { return shift.one_over_channels; }
};

template <class C>
Shift<C> shift_of(const ConditionShiftRmsNormProblem& p) {
  return {p.mask, static_cast<C>(1.0 / static_cast<double>(p.channels)), static_cast<C>(p.eps)};
}

template <class C>
int forward(const ConditionShiftRmsNormProblem& p, const Operand& normed, const Operand& normed_shifted, void* stream) {
  return row_reduce<C, RmsNorms<C>>(row_tasks(1, p.rows, false), p.channels, {p.condition}, {normed, normed_shifted},
                                    {p.scale, p.bias, p.weight}, nullptr, {shift_of<C>(p)}, stream);
}

template <class C>
int backward(const ConditionShiftRmsNormProblem& p, const Operand& grad_normed, const Operand& grad_shifted,
             const Operand& grad_condition, const ColumnGradient (&gradients)[3], void* stream) {
  const RmsNormsBackward<C> body{shift_of<C>(p), grad_normed.data != nullptr, grad_shifted.data != nullptr};
  return row_reduce<C, RmsNormsBackward<C>>(row_tasks(1, p.rows, true), p.channels,
                                            {p.condition, grad_normed, grad_shifted}, {grad_condition},
                                            {p.scale, p.bias, p.weight}, gradients, body, stream);
}

}  // namespace

int condition_shift_rms_norm(const ConditionShiftRmsNormProblem& problem, const Operand& normed,
                             const Operand& normed_shifted, void* stream) {
  return (problem.wide ? forward<double> : forward<float>)(problem, normed, normed_shifted, stream);
}

int condition_shift_rms_norm_backward(const ConditionShiftRmsNormProblem& problem, const Operand& grad_normed,
                                      const Operand& grad_shifted, const Operand& grad_condition,
                                      const ColumnGradient (&gradients)[3], void* stream) {
  return (problem.wide ? backward<double> : backward<float>)(problem, grad_normed, grad_shifted, grad_condition,
                                                             gradients, stream);
}

}  // namespace apex_fast::cuda
