// What a linear layer makes of c and of a c + b, from one read of W c.
#include "math/projected_condition_shift.h"

#include "cpu/kernels/entries.h"
#include "cpu/kernels/rows.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

double number(const Operand& parameter) {
  return channel_values<double>(parameter, 1).data()[0];
}

template <class C>
void projected_condition_shift_typed(const ProjectedConditionShiftProblem& p, const Operand& real,
                                     const Operand& shifted) {
  using V = Vec<C>;
  const int64_t channels = p.channels;
  const ChannelBuffer<C> linear_bias = channel_values<C>(p.linear_bias, channels);
  ChannelBuffer<C> offset(channels);
  const ChannelBuffer<double> row_sums = channel_values<double>(p.row_sums, channels),
                              wide_bias = channel_values<double>(p.linear_bias, channels);
  const double bias = number(p.bias);
  for (int64_t i = 0; i < channels; ++i)
    offset.data()[i] = static_cast<C>(bias * row_sums.data()[i] + wide_bias.data()[i]);
  const V scale(static_cast<C>(number(p.scale)));
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, channels));
  at::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
    RowBuffer<C> projected(channels), out(channels);
    for (int64_t row = begin; row < end; ++row) {
      const C* const in[3] = {projected.read(p.projected, row), linear_bias.data(), offset.data()};
      const auto write = [&](const Operand& output, auto&& body) {
        if (!output.data) return;
        C* const target[1] = {out.target(output, row)};
        map_tile<C, 3, 1>(in, target, channels, body);
        out.finish(output, row);
      };
      const auto as_it_is = [](const V(&v)[3], V(&r)[1]) { r[0] = math::projected_real(v[0], v[1]); };
      write(real, as_it_is);
      if (p.mask && !p.mask[row])
        write(shifted, as_it_is);
      else
        write(shifted, [&](const V(&v)[3], V(&r)[1]) { r[0] = math::projected_shift(v[0], scale, v[2]); });
    }
  });
}

template <class C, bool Sums>
void projected_condition_shift_backward_typed(const ProjectedConditionShiftProblem& p, const Operand& grad_real,
                                              const Operand& grad_shifted, const Operand& grad_projected,
                                              double* partial_product, double* partial_shifted, double* partial_all) {
  using V = Vec<C>;
  const int64_t channels = p.channels;
  const C shift_scale = static_cast<C>(number(p.scale));
  const int64_t chunk_rows = rows_per_chunk(channels), chunks = (p.rows + chunk_rows - 1) / chunk_rows;
  at::parallel_for(0, chunks, 1, [&](int64_t first_chunk, int64_t last_chunk) {
    RowBuffer<C> projected(channels), real_in(channels), shifted_in(channels), out(channels);
    ColumnSums<C> product_sums(channels, Sums), shifted_sums(channels, Sums), all_sums(channels, Sums);
    const ChannelBuffer<C> zeros(channels);
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      for (int64_t row = chunk * chunk_rows; row < std::min(p.rows, (chunk + 1) * chunk_rows); ++row) {
        const bool kept = p.mask && !p.mask[row];
        const V scale(kept ? C(1) : shift_scale);
        const C* const g_real = grad_real.data ? real_in.read(grad_real, row) : zeros.data();
        const C* const g_shifted = grad_shifted.data ? shifted_in.read(grad_shifted, row) : zeros.data();
        if (grad_projected.data) {
          const C* const in[2] = {g_real, g_shifted};
          C* const target[1] = {out.target(grad_projected, row)};
          map_tile<C, 2, 1>(in, target, channels, [&](const V(&v)[2], V(&r)[1]) {
            r[0] = math::projected_shift_backward(v[0], v[1], scale);
          });
          out.finish(grad_projected, row);
        }
        if constexpr (Sums) {
          // A token that is not shifted says nothing about the shift, whatever stands in it.
          const C* const c = p.projected.data && !kept ? projected.read(p.projected, row) : zeros.data();
          const C* const g = kept ? zeros.data() : g_shifted;
          const C* const in[7] = {g_real,           g_shifted, g, c, product_sums.recent(), shifted_sums.recent(),
                                  all_sums.recent()};
          C* const target[3] = {product_sums.recent(), shifted_sums.recent(), all_sums.recent()};
          map_tile<C, 7, 3>(in, target, channels, [](const V(&v)[7], V(&r)[3]) {
            r[0] = v[4] + v[2] * v[3];
            r[1] = v[5] + v[2];
            r[2] = v[6] + (v[0] + v[1]);
          });
          product_sums.row_done();
          shifted_sums.row_done();
          all_sums.row_done();
        }
      }
      if constexpr (Sums) {
        product_sums.store(partial_product + chunk * channels);
        shifted_sums.store(partial_shifted + chunk * channels);
        all_sums.store(partial_all + chunk * channels);
      }
    }
  });
}

}  // namespace

void projected_condition_shift(const ProjectedConditionShiftProblem& p, const Operand& real, const Operand& shifted) {
  (p.wide ? projected_condition_shift_typed<double> : projected_condition_shift_typed<float>)(p, real, shifted);
}

void projected_condition_shift_backward(const ProjectedConditionShiftProblem& p, const Operand& grad_real,
                                        const Operand& grad_shifted, const Operand& grad_projected,
                                        double* partial_product, double* partial_shifted, double* partial_all) {
  const auto run = partial_product ? (p.wide ? projected_condition_shift_backward_typed<double, true>
                                             : projected_condition_shift_backward_typed<float, true>)
                                   : (p.wide ? projected_condition_shift_backward_typed<double, false>
                                             : projected_condition_shift_backward_typed<float, false>);
  run(p, grad_real, grad_shifted, grad_projected, partial_product, partial_shifted, partial_all);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
