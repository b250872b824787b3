#include <limits>

#include <ATen/ops/empty.h>

#include "common/checks.h"
#include "common/guidance.h"
#include "common/layout.h"
#include "common/registration.h"
#include "cpu/kernels.h"
#include "cpu/partial_sums.h"
#include "math/shifted_velocity_loss.h"

namespace apex_fast::cpu {

namespace {

void check_arguments(const char* op, const at::Tensor& v_shift, const at::Tensor& v_real, const at::Tensor& target,
                     const std::optional<at::Tensor>& v_uncond, double guidance_scale, std::optional<double> clip) {
  check_batched(op, "v_shift", v_shift);
  check_sample(op, "v_real", v_real, "v_shift", v_shift);
  check_sample(op, "target", target, "v_shift", v_shift);
  check_state(op, "target", target, "v_shift", v_shift);
  check_guidance(op, v_uncond, guidance_scale, "v_shift", v_shift);
  TORCH_CHECK(!clip || *clip > 0, op, ": clip must be positive, got ", *clip, "; clip=None switches it off");
}

constexpr double no_clip = std::numeric_limits<double>::infinity();

template <class T>
void store(const PartialSums& sums, int64_t n, at::Tensor& fake, at::Tensor& correction, at::Tensor& stats) {
  T* const fake_out = fake.mutable_data_ptr<T>();
  T* const correction_out = correction.mutable_data_ptr<T>();
  T* row = stats.mutable_data_ptr<T>();
  const double scale = 1.0 / static_cast<double>(n);
  for (int64_t b = 0; b < sums.batch; ++b, row += 7) {
    fake_out[b] = static_cast<T>(sums.total(b, 0) * scale);
    correction_out[b] = static_cast<T>(sums.total(b, 2) * scale);
    row[0] = static_cast<T>(sums.total(b, 1));
    row[1] = static_cast<T>(sums.total(b, 2));
    row[2] = static_cast<T>(sums.total(b, 3) * scale);
    row[3] = static_cast<T>(sums.total(b, 4));
    row[4] = static_cast<T>(sums.total(b, 5));
    row[5] = static_cast<T>(sums.total(b, 6));
    row[6] = static_cast<T>(sums.total(b, 7) * scale);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> shifted_velocity_loss_cpu(
    const std::optional<at::Tensor>& v_gen, const at::Tensor& v_shift, const at::Tensor& v_real,
    const at::Tensor& target, const std::optional<at::Tensor>& v_uncond, double guidance_scale,
    std::optional<double> clip) {
  constexpr auto op = "shifted_velocity_loss";
  check_arguments(op, v_shift, v_real, target, v_uncond, guidance_scale, clip);
  if (v_gen) {
    check_sample(op, "v_gen", *v_gen, "v_shift", v_shift);
    check_same_dtype(op, "v_gen", *v_gen, "v_shift", v_shift);
  }
  const auto type = compute_type(v_shift, v_real, target, v_uncond);
  const int64_t batch = v_shift.size(0);
  at::Tensor fake = at::empty({batch}, v_shift.options().dtype(type));
  at::Tensor correction = at::empty({batch}, fake.options());
  at::Tensor stats = at::empty({batch, 7}, fake.options());
  if (v_shift.numel() == 0) {
    fake.zero_(), correction.zero_(), stats.zero_();
    return {fake, correction, stats};
  }
  SampleLayout layout(v_shift);
  const Geometry& g = layout.geometry();
  PartialSums sums(g, math::ShiftedVelocitySums<double>::count);
  table().shifted_velocity_loss(g, layout.operand(v_shift), layout.operand(v_real), layout.operand(v_uncond),
                                layout.operand(target), guidance_scale, clip.value_or(no_clip), sums.values.data(),
                                type == at::kDouble);
  if (type == at::kDouble)
    store<double>(sums, g.sample_size(), fake, correction, stats);
  else
    store<float>(sums, g.sample_size(), fake, correction, stats);
  return {fake, correction, stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> shifted_velocity_loss_backward_cpu(
    const at::Tensor& grad_fake, const at::Tensor& grad_correction, const at::Tensor& v_shift, const at::Tensor& v_real,
    const at::Tensor& target, const std::optional<at::Tensor>& v_uncond, double guidance_scale,
    std::optional<double> clip, std::array<bool, 3> output_mask, std::optional<at::ScalarType> grad_gen_dtype) {
  constexpr auto op = "shifted_velocity_loss_backward";
  check_arguments(op, v_shift, v_real, target, v_uncond, guidance_scale, clip);
  if (grad_gen_dtype) check_float_type(op, "grad_gen_dtype", *grad_gen_dtype);
  check_per_sample(op, "grad_fake", grad_fake, "v_shift", v_shift);
  check_per_sample(op, "grad_correction", grad_correction, "v_shift", v_shift);
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

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("shifted_velocity_loss", &apex_fast::cpu::shifted_velocity_loss_cpu);
  m.impl("shifted_velocity_loss_backward", &apex_fast::cpu::shifted_velocity_loss_backward_cpu);
}
