// Layer norm modulated per sample: statistics and output from one read of the hidden state.
#include "math/modulated_layer_norm.h"

#include <cmath>

#include "cpu/kernels/entries.h"
#include "cpu/kernels/rows.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

template <class C>
ChannelBuffer<C> one_plus(const Operand& scale, int64_t sample, int64_t channels) {
  ChannelBuffer<C> values = channel_values<C>(scale, channels, sample * scale.batch_stride);
  for (int64_t i = 0; i < channels; ++i)
    values.data()[i] += C(1);
  return values;
}

template <class C>
void modulated_layer_norm_typed(const ModulatedLayerNormProblem& p, const Operand& out, void* mean, void* rstd) {
  using V = Vec<C>;
  const int64_t channels = p.channels, rows = p.batch * p.rows_per_sample;
  const double count = static_cast<double>(channels);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, channels));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    RowBuffer<C> hidden(channels), result(channels);
    ChannelBuffer<C> scale, shift;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / p.rows_per_sample;
      if (row == begin || row % p.rows_per_sample == 0) {
        scale = one_plus<C>(p.scale, sample, channels);
        shift = channel_values<C>(p.shift, channels, sample * p.shift.batch_stride);
      }
      const C* const h = hidden.read(p.hidden, row);
      const C* const alone[1] = {h};
      const auto [sum] = row_sums<C, 1, 1>(alone, channels, [](const V(&v)[1], V(&s)[1]) { s[0] = s[0] + v[0]; });
      const C center = static_cast<C>(sum / count);
      // Around the mean, not E[h^2] - E[h]^2, which cancels. Whole vectors only: the zeros that a tail is filled up
      // with have a distance from the mean too.
      const V middle(center);
      const int64_t whole = channels - channels % V::size();
      auto [squares] = row_sums<C, 1, 1>(alone, whole, [&](const V(&v)[1], V(&s)[1]) {
        const V distance = v[0] - middle;
        s[0] = s[0] + distance * distance;
      });
      for (int64_t i = whole; i < channels; ++i)
        squares += static_cast<double>(h[i] - center) * static_cast<double>(h[i] - center);
      const C inverse = static_cast<C>(1.0 / std::sqrt(squares / count + p.eps));
      static_cast<C*>(mean)[row] = center;
      static_cast<C*>(rstd)[row] = inverse;
      const V factor(inverse);
      const C* const in[3] = {h, scale.data(), shift.data()};
      C* const target[1] = {result.target(out, row)};
      map_tile<C, 3, 1>(in, target, channels, [&](const V(&v)[3], V(&r)[1]) {
        r[0] = math::modulated(math::normalised(v[0], middle, factor), v[1], v[2]);
      });
      result.finish(out, row);
    }
  });
}

template <class C, bool Sums>
void modulated_layer_norm_backward_typed(const ModulatedLayerNormProblem& p, const Operand& grad, const void* mean,
                                         const void* rstd, const Operand& grad_hidden, double* partial_scale,
                                         double* partial_shift) {
  using V = Vec<C>;
  const int64_t channels = p.channels;
  const int64_t chunk_rows = rows_per_chunk(channels), chunks = (p.rows_per_sample + chunk_rows - 1) / chunk_rows;
  at::parallel_for(0, p.batch * chunks, 1, [&](int64_t first, int64_t last) {
    RowBuffer<C> hidden(channels), grad_in(channels), result(channels);
    ColumnSums<C> scale_sums(channels, Sums), shift_sums(channels, Sums);
    for (int64_t task = first; task < last; ++task) {
      const int64_t sample = task / chunks, chunk = task % chunks;
      const ChannelBuffer<C> scale = one_plus<C>(p.scale, sample, channels);
      const int64_t end = std::min(p.rows_per_sample, (chunk + 1) * chunk_rows);
      for (int64_t i = chunk * chunk_rows; i < end; ++i) {
        const int64_t row = sample * p.rows_per_sample + i;
        const C* const h = hidden.read(p.hidden, row);
        const C* const g = grad_in.read(grad, row);
        const V middle(static_cast<const C*>(mean)[row]), factor(static_cast<const C*>(rstd)[row]);
        C *const ds = Sums ? scale_sums.recent() : nullptr, *const dt = Sums ? shift_sums.recent() : nullptr;
        std::array<double, 2> means{};
        if (grad_hidden.data) {
          const C* const in[3] = {h, g, scale.data()};
          means = row_sums<C, 2, 3>(in, channels, [&](const V(&v)[3], V(&s)[2]) {
            const V weighted = v[1] * v[2];
            s[0] = s[0] + weighted;
            s[1] = s[1] + weighted * math::normalised(v[0], middle, factor);
          });
        }
        const V mean_grad(static_cast<C>(means[0] / static_cast<double>(channels)));
        const V mean_product(static_cast<C>(means[1] / static_cast<double>(channels)));
        if constexpr (Sums) {
          const C* const in[4] = {h, g, ds, dt};
          C* const out[2] = {ds, dt};
          map_tile<C, 4, 2>(in, out, channels, [&](const V(&v)[4], V(&r)[2]) {
            r[0] = v[2] + v[1] * math::normalised(v[0], middle, factor);
            r[1] = v[3] + v[1];
          });
          scale_sums.row_done();
          shift_sums.row_done();
        }
        if (grad_hidden.data) {
          const C* const in[3] = {h, g, scale.data()};
          C* const out[1] = {result.target(grad_hidden, row)};
          map_tile<C, 3, 1>(in, out, channels, [&](const V(&v)[3], V(&r)[1]) {
            r[0] = math::layer_norm_backward(v[1] * v[2], math::normalised(v[0], middle, factor), factor, mean_grad,
                                             mean_product);
          });
          result.finish(grad_hidden, row);
        }
      }
      if constexpr (Sums) {
        scale_sums.store(partial_scale + task * channels);
        shift_sums.store(partial_shift + task * channels);
      }
    }
  });
}

}  // namespace

void modulated_layer_norm(const ModulatedLayerNormProblem& p, const Operand& out, void* mean, void* rstd) {
  (p.wide ? modulated_layer_norm_typed<double> : modulated_layer_norm_typed<float>)(p, out, mean, rstd);
}

void modulated_layer_norm_backward(const ModulatedLayerNormProblem& p, const Operand& grad, const void* mean,
                                   const void* rstd, const Operand& grad_hidden, double* partial_scale,
                                   double* partial_shift) {
  const auto run = partial_scale ? (p.wide ? modulated_layer_norm_backward_typed<double, true>
                                           : modulated_layer_norm_backward_typed<float, true>)
                                 : (p.wide ? modulated_layer_norm_backward_typed<double, false>
                                           : modulated_layer_norm_backward_typed<float, false>);
  run(p, grad, mean, rstd, grad_hidden, partial_scale, partial_shift);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
