// RMS norm of c and of A c + b from one read of c.
#include "math/condition_shift_rms_norm.h"

#include <cmath>

#include "cpu/kernels/entries.h"
#include "cpu/kernels/rows.h"
#include "math/condition_shift.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

template <class C>
struct Parameters {
  explicit Parameters(const ConditionShiftRmsNormProblem& p)
      : scale(channel_values<C>(p.scale, p.channels)),
        bias(channel_values<C>(p.bias, p.channels)),
        weight(channel_values<C>(p.weight, p.channels)) {}
  ChannelBuffer<C> scale, bias, weight;
};

template <class C>
C reciprocal_of(double squares, const ConditionShiftRmsNormProblem& p) {
  return static_cast<C>(1.0 / std::sqrt(squares / static_cast<double>(p.channels) + p.eps));
}

template <class C>
Vec<C> shifted_value(const Vec<C>& c, const Vec<C>& scale, const Vec<C>& bias) {
  return math::condition_shift(c, scale, bias);
}

template <class C>
void condition_shift_rms_norm_typed(const ConditionShiftRmsNormProblem& p, const Operand& normed,
                                    const Operand& normed_shifted) {
  using V = Vec<C>;
  const Parameters<C> parameters(p);
  const C *const scale = parameters.scale.data(), *const bias = parameters.bias.data(),
                 *const weight = parameters.weight.data();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.channels));
  at::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
    RowBuffer<C> condition(p.channels), out(p.channels), out_shifted(p.channels);
    for (int64_t row = begin; row < end; ++row) {
      const C* const c = condition.read(p.condition, row);
      const bool kept = p.mask && !p.mask[row];
      if (normed.data || kept) {
        const auto [squares] =
            row_sums<C, 1, 1>({c}, p.channels, [](const V(&v)[1], V(&s)[1]) { s[0] = s[0] + v[0] * v[0]; });
        const V reciprocal(reciprocal_of<C>(squares, p));
        const auto body = [&](const V(&v)[2], V(&r)[1]) { r[0] = math::rms_norm(v[0], reciprocal, v[1]); };
        for (const auto& [output, buffer] : {std::pair{&normed, &out}, std::pair{&normed_shifted, &out_shifted}}) {
          if (!output->data || (output == &normed_shifted && !kept)) continue;
          const C* const in[2] = {c, weight};
          C* const target[1] = {buffer->target(*output, row)};
          map_tile<C, 2, 1>(in, target, p.channels, body);
          buffer->finish(*output, row);
        }
      }
      if (!normed_shifted.data || kept) continue;
      const auto [squares] = row_sums<C, 1, 3>({c, scale, bias}, p.channels, [](const V(&v)[3], V(&s)[1]) {
        const V u = shifted_value<C>(v[0], v[1], v[2]);
        s[0] = s[0] + u * u;
      });
      const V reciprocal(reciprocal_of<C>(squares, p));
      const C* const in[4] = {c, scale, bias, weight};
      C* const target[1] = {out_shifted.target(normed_shifted, row)};
      map_tile<C, 4, 1>(in, target, p.channels, [&](const V(&v)[4], V(&r)[1]) {
        r[0] = math::rms_norm(shifted_value<C>(v[0], v[1], v[2]), reciprocal, v[3]);
      });
      out_shifted.finish(normed_shifted, row);
    }
  });
}

template <class C>
struct ParameterSums {
  ParameterSums(int64_t channels, bool scale, bool bias, bool weight)
      : scale(channels, scale), bias(channels, bias), weight(channels, weight), nowhere(channels) {}

  // Where a channel's share is added; sums that nobody wants share one place, so that the loops have no branch.
  C* of(ColumnSums<C>& sums) { return sums.wanted() ? sums.recent() : nowhere.data(); }
  void row_done() {
    scale.row_done();
    bias.row_done();
    weight.row_done();
  }

  ColumnSums<C> scale, bias, weight;
  ChannelBuffer<C> nowhere;
};

template <class C>
struct RowStatistics {
  RowStatistics(const std::array<double, 2>& sums, const ConditionShiftRmsNormProblem& p) {
    const C inverse = reciprocal_of<C>(sums[0], p);
    reciprocal = Vec<C>(inverse);
    const double mean = sums[1] / static_cast<double>(p.channels);
    projection = Vec<C>(static_cast<C>(mean * static_cast<double>(inverse) * static_cast<double>(inverse)));
  }
  Vec<C> reciprocal, projection;
};

// d = gradient of the row c from the gradient g of its norm.
template <class C, bool Sums>
void real_row_backward(const ConditionShiftRmsNormProblem& p, const C* c, const C* g, const C* weight, C* d,
                       ParameterSums<C>& sums) {
  using V = Vec<C>;
  const RowStatistics<C> row(row_sums<C, 2, 3>({c, g, weight}, p.channels,
                                               [](const V(&v)[3], V(&s)[2]) {
                                                 s[0] = s[0] + v[0] * v[0];
                                                 s[1] = s[1] + v[0] * v[1] * v[2];
                                               }),
                             p);
  C* const dw = sums.of(sums.weight);
  const C* const in[4] = {c, g, weight, dw};
  const auto gradient = [&](const V(&v)[4]) {
    return math::rms_norm_backward(v[1], v[0], row.reciprocal, v[2], row.projection);
  };
  if constexpr (Sums) {
    C* const out[2] = {d, dw};
    map_tile<C, 4, 2>(in, out, p.channels, [&](const V(&v)[4], V(&r)[2]) {
      r[0] = gradient(v);
      r[1] = v[3] + v[1] * v[0] * row.reciprocal;
    });
  } else {
    C* const out[1] = {d};
    map_tile<C, 4, 1>(in, out, p.channels, [&](const V(&v)[4], V(&r)[1]) { r[0] = gradient(v); });
  }
}

// d += gradient of the row c from the gradient g of the norm of u = A c + b.
template <class C, bool Sums>
void shifted_row_backward(const ConditionShiftRmsNormProblem& p, const C* c, const C* g,
                          const Parameters<C>& parameters, C* d, ParameterSums<C>& sums) {
  using V = Vec<C>;
  const C *const scale = parameters.scale.data(), *const bias = parameters.bias.data(),
                 *const weight = parameters.weight.data();
  const RowStatistics<C> row(row_sums<C, 2, 5>({c, g, weight, scale, bias}, p.channels,
                                               [](const V(&v)[5], V(&s)[2]) {
                                                 const V u = shifted_value<C>(v[0], v[3], v[4]);
                                                 s[0] = s[0] + u * u;
                                                 s[1] = s[1] + u * v[1] * v[2];
                                               }),
                             p);
  if constexpr (Sums) {
    C *const dw = sums.of(sums.weight), *const da = sums.of(sums.scale), *const db = sums.of(sums.bias);
    const C* const in[9] = {c, g, weight, scale, bias, d, dw, da, db};
    C* const out[4] = {d, dw, da, db};
    map_tile<C, 9, 4>(in, out, p.channels, [&](const V(&v)[9], V(&r)[4]) {
      const V u = shifted_value<C>(v[0], v[3], v[4]);
      const V du = math::rms_norm_backward(v[1], u, row.reciprocal, v[2], row.projection);
      r[0] = v[5] + v[3] * du;
      r[1] = v[6] + v[1] * u * row.reciprocal;
      r[2] = v[7] + du * v[0];
      r[3] = v[8] + du;
    });
  } else {
    const C* const in[6] = {c, g, weight, scale, bias, d};
    C* const out[1] = {d};
    map_tile<C, 6, 1>(in, out, p.channels, [&](const V(&v)[6], V(&r)[1]) {
      const V u = shifted_value<C>(v[0], v[3], v[4]);
      r[0] = v[5] + v[3] * math::rms_norm_backward(v[1], u, row.reciprocal, v[2], row.projection);
    });
  }
}

template <class C, bool Sums>
void condition_shift_rms_norm_backward_typed(const ConditionShiftRmsNormProblem& p, const Operand& grad_normed,
                                             const Operand& grad_shifted, const Operand& grad_condition,
                                             double* partial_scale, double* partial_bias, double* partial_weight) {
  using V = Vec<C>;
  const Parameters<C> parameters(p);
  const C* const weight = parameters.weight.data();
  const int64_t channels = p.channels;
  const int64_t chunk_rows = rows_per_chunk(channels), chunks = (p.rows + chunk_rows - 1) / chunk_rows;
  at::parallel_for(0, chunks, 1, [&](int64_t first_chunk, int64_t last_chunk) {
    RowBuffer<C> condition(channels), real_in(channels), shifted_in(channels), out(channels);
    ParameterSums<C> sums(channels, partial_scale, partial_bias, partial_weight);
    ChannelBuffer<C> joined(channels), unwanted(channels);
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      for (int64_t row = chunk * chunk_rows; row < std::min(p.rows, (chunk + 1) * chunk_rows); ++row) {
        const C* const c = condition.read(p.condition, row);
        const C* g_real = grad_normed.data ? real_in.read(grad_normed, row) : nullptr;
        const C* g_shifted = grad_shifted.data ? shifted_in.read(grad_shifted, row) : nullptr;
        if (p.mask && !p.mask[row] && g_shifted) {  // both outputs of this token are the norm of c
          if (g_real) {
            const C* const in[2] = {g_real, g_shifted};
            C* const sum[1] = {joined.data()};
            map_tile<C, 2, 1>(in, sum, channels, [](const V(&v)[2], V(&r)[1]) { r[0] = v[0] + v[1]; });
            g_real = joined.data();
          } else {
            g_real = g_shifted;
          }
          g_shifted = nullptr;
        }
        C* const d = grad_condition.data ? out.target(grad_condition, row) : unwanted.data();
        if (g_real)
          real_row_backward<C, Sums>(p, c, g_real, weight, d, sums);
        else
          std::fill(d, d + channels, C(0));
        if (g_shifted) shifted_row_backward<C, Sums>(p, c, g_shifted, parameters, d, sums);
        if (grad_condition.data) out.finish(grad_condition, row);
        if constexpr (Sums) sums.row_done();
      }
      if (partial_scale) sums.scale.store(partial_scale + chunk * channels);
      if (partial_bias) sums.bias.store(partial_bias + chunk * channels);
      if (partial_weight) sums.weight.store(partial_weight + chunk * channels);
    }
  });
}

template <class C>
void condition_shift_rms_norm_backward_any(const ConditionShiftRmsNormProblem& p, const Operand& grad_normed,
                                           const Operand& grad_shifted, const Operand& grad_condition,
                                           double* partial_scale, double* partial_bias, double* partial_weight) {
  const bool any = partial_scale || partial_bias || partial_weight;
  (any ? condition_shift_rms_norm_backward_typed<C, true>
       : condition_shift_rms_norm_backward_typed<C, false>)(p, grad_normed, grad_shifted, grad_condition, partial_scale,
                                                            partial_bias, partial_weight);
}

}  // namespace

void condition_shift_rms_norm(const ConditionShiftRmsNormProblem& p, const Operand& normed,
                              const Operand& normed_shifted) {
  (p.wide ? condition_shift_rms_norm_typed<double> : condition_shift_rms_norm_typed<float>)(p, normed, normed_shifted);
}

void condition_shift_rms_norm_backward(const ConditionShiftRmsNormProblem& p, const Operand& grad_normed,
                                       const Operand& grad_shifted, const Operand& grad_condition,
                                       double* partial_scale, double* partial_bias, double* partial_weight) {
  (p.wide ? condition_shift_rms_norm_backward_any<double>
          : condition_shift_rms_norm_backward_any<float>)(p, grad_normed, grad_shifted, grad_condition, partial_scale,
                                                          partial_bias, partial_weight);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
