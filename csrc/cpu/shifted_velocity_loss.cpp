#include <ATen/ops/empty.h>

#include "common/layout.h"
#include "common/registration.h"
#include "common/shifted_velocity_loss_arguments.h"
#include "cpu/kernels.h"
#include "cpu/partial_sums.h"
#include "math/shifted_velocity_loss.h"

namespace apex_fast::cpu {

namespace {

template <class T>
void store(const PartialSums& sums, double scale, at::Tensor& fake, at::Tensor& correction, at::Tensor& stats) {
  T* const fake_out = fake.mutable_data_ptr<T>();
  T* const correction_out = correction.mutable_data_ptr<T>();
  T* row = stats.mutable_data_ptr<T>();
  for (int64_t b = 0; b < sums.batch; ++b, row += math::shifted_velocity_stats) {
    double totals[math::ShiftedVelocitySums<double>::count];
    for (int k = 0; k < math::ShiftedVelocitySums<double>::count; ++k)
      totals[k] = sums.total(b, k);
    fake_out[b] = static_cast<T>(math::fake_loss(totals, scale));
    correction_out[b] = static_cast<T>(math::correction_loss(totals, scale));
    for (int k = 0; k < math::shifted_velocity_stats; ++k)
      row[k] = static_cast<T>(math::shifted_velocity_stat(totals, k, scale));
  }
}

struct Losses {
  at::Tensor fake, correction, stats;

  Losses(const at::Tensor& v_shift, at::ScalarType type)
      : fake(at::empty({v_shift.size(0)}, v_shift.options().dtype(type))),
        correction(at::empty({v_shift.size(0)}, fake.options())),
        stats(at::empty({v_shift.size(0), math::shifted_velocity_stats}, fake.options())) {}

  void zero() { fake.zero_(), correction.zero_(), stats.zero_(); }

  void take(const PartialSums& sums, const Geometry& g) {
    const double scale = 1.0 / static_cast<double>(g.sample_size());
    (fake.scalar_type() == at::kDouble ? store<double> : store<float>)(sums, scale, fake, correction, stats);
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> shifted_velocity_loss_cpu(
    const std::optional<at::Tensor>& v_gen, const at::Tensor& v_shift, const at::Tensor& v_real,
    const at::Tensor& target, const std::optional<at::Tensor>& v_uncond, double guidance_scale,
    std::optional<double> clip) {
  constexpr auto op = "shifted_velocity_loss";
  check_shifted_velocities(op, v_shift, v_real, target, v_uncond, guidance_scale, clip);
  check_generated_velocity(op, v_gen, v_shift);
  const auto type = compute_type(v_shift, v_real, target, v_uncond);
  Losses losses(v_shift, type);
  if (v_shift.numel() == 0) {
    losses.zero();
  } else {
    SampleLayout layout(v_shift);
    const Geometry& g = layout.geometry();
    PartialSums sums(g, math::ShiftedVelocitySums<double>::count);
    table().shifted_velocity_loss(g, layout.operand(v_shift), layout.operand(v_real), layout.operand(v_uncond),
                                  layout.operand(target), guidance_scale, clip.value_or(no_clip), sums.values.data(),
                                  type == at::kDouble);
    losses.take(sums, g);
  }
  return {losses.fake, losses.correction, losses.stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> shifted_velocity_loss_backward_cpu(
    const at::Tensor& grad_fake, const at::Tensor& grad_correction, const at::Tensor& v_shift, const at::Tensor& v_real,
    const at::Tensor& target, const std::optional<at::Tensor>& v_uncond, double guidance_scale,
    std::optional<double> clip, std::array<bool, 3> output_mask, std::optional<at::ScalarType> grad_gen_dtype) {
  constexpr auto op = "shifted_velocity_loss_backward";
  check_shifted_velocities(op, v_shift, v_real, target, v_uncond, guidance_scale, clip);
  check_loss_derivatives(op, "grad_fake", grad_fake, "grad_correction", grad_correction, v_shift, grad_gen_dtype);
  SampleLayout layout(v_shift);
  const at::ScalarType types[3] = {grad_gen_dtype.value_or(v_shift.scalar_type()), v_shift.scalar_type(),
                                   target.scalar_type()};
  at::Tensor gradients[3];
  Operand outputs[3] = {SampleLayout::absent, SampleLayout::absent, SampleLayout::absent};
  bool wide = compute_type(v_shift, v_real, target, v_uncond) == at::kDouble;
  for (int k = 0; k < 3; ++k) {
    gradients[k] = output_mask[k] ? layout.make(types[k]) : at::empty({0}, v_shift.options().dtype(types[k]));
    if (output_mask[k]) outputs[k] = layout.output(gradients[k]);
    wide = wide || (output_mask[k] && types[k] == at::kDouble);
  }
  if (v_shift.numel() > 0 && (output_mask[0] || output_mask[1] || output_mask[2])) {
    const double factor = 2.0 / static_cast<double>(layout.geometry().sample_size());
    const auto weight_correction = per_sample(grad_correction, factor), weight_fake = per_sample(grad_fake, factor);
    table().shifted_velocity_loss_backward(layout.geometry(), layout.operand(v_shift), layout.operand(v_real),
                                           layout.operand(v_uncond), layout.operand(target), guidance_scale,
                                           clip.value_or(no_clip), weight_correction.data(), weight_fake.data(),
                                           outputs[0], outputs[1], outputs[2], wide);
  }
  return {gradients[0], gradients[1], gradients[2]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> shifted_velocity_loss_with_gradients_cpu(
    const at::Tensor& weight_fake, const at::Tensor& weight_correction, const at::Tensor& v_shift,
    const at::Tensor& v_real, const at::Tensor& target, const std::optional<at::Tensor>& v_uncond,
    double guidance_scale, std::optional<double> clip, std::array<bool, 2> output_mask,
    std::optional<at::ScalarType> grad_gen_dtype) {
  constexpr auto op = "shifted_velocity_loss_with_gradients";
  check_shifted_velocities(op, v_shift, v_real, target, v_uncond, guidance_scale, clip);
  check_loss_derivatives(op, "weight_fake", weight_fake, "weight_correction", weight_correction, v_shift,
                         grad_gen_dtype);
  const auto type = compute_type(v_shift, v_real, target, v_uncond);
  const at::ScalarType types[2] = {grad_gen_dtype.value_or(v_shift.scalar_type()), v_shift.scalar_type()};
  Losses losses(v_shift, type);
  SampleLayout layout(v_shift);
  const Geometry& g = layout.geometry();
  at::Tensor gradients[2];
  Operand outputs[2] = {SampleLayout::absent, SampleLayout::absent};
  bool wide = type == at::kDouble;
  for (int k = 0; k < 2; ++k) {
    gradients[k] = output_mask[k] ? layout.make(types[k]) : at::empty({0}, v_shift.options().dtype(types[k]));
    if (output_mask[k]) outputs[k] = layout.output(gradients[k]);
    wide = wide || (output_mask[k] && types[k] == at::kDouble);
  }
  if (v_shift.numel() == 0) {
    losses.zero();
  } else {
    PartialSums sums(g, math::ShiftedVelocitySums<double>::count);
    const double factor = 2.0 / static_cast<double>(g.sample_size());
    const auto correction = per_sample(weight_correction, factor), fake = per_sample(weight_fake, factor);
    table().shifted_velocity_loss_with_gradients(g, layout.operand(v_shift), layout.operand(v_real),
                                                 layout.operand(v_uncond), layout.operand(target), guidance_scale,
                                                 clip.value_or(no_clip), correction.data(), fake.data(),
                                                 sums.values.data(), outputs[0], outputs[1], wide);
    losses.take(sums, g);
  }
  return {losses.fake, losses.correction, losses.stats, gradients[0], gradients[1]};
}

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("shifted_velocity_loss", &apex_fast::cpu::shifted_velocity_loss_cpu);
  m.impl("shifted_velocity_loss_backward", &apex_fast::cpu::shifted_velocity_loss_backward_cpu);
  m.impl("shifted_velocity_loss_with_gradients", &apex_fast::cpu::shifted_velocity_loss_with_gradients_cpu);
}
