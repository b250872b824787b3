// CUDA glue of shifted_velocity_loss. The kernels are in shifted_velocity_loss.cu.
#include <tuple>

#include "math/shifted_velocity_loss.h"

#include "common/registration.h"
#include "common/shifted_velocity_loss_arguments.h"
#include "cuda/glue.h"
#include "cuda/kernels.h"

namespace apex_fast::cuda {

namespace {

struct Losses {
  at::Tensor fake, correction, stats, partials;

  Losses(const at::Tensor& v_shift, at::ScalarType type)
      : fake(at::empty({v_shift.size(0)}, v_shift.options().dtype(type))),
        correction(at::empty({v_shift.size(0)}, fake.options())),
        stats(at::empty({v_shift.size(0), math::shifted_velocity_stats}, fake.options())) {}

  void zero() { fake.zero_(), correction.zero_(), stats.zero_(); }

  double* make_partials(const Geometry& geometry, const Operand& v_shift) {
    partials = workspace(partial_sums(geometry, v_shift, math::ShiftedVelocitySums<double>::count), fake);
    return partials.mutable_data_ptr<double>();
  }

  ShiftedVelocityResults results() {
    return {fake.mutable_data_ptr(), correction.mutable_data_ptr(), stats.mutable_data_ptr(),
            dtype_of(fake.scalar_type())};
  }
};

ShiftedVelocities velocities_of(SampleLayout& layout, const at::Tensor& v_shift, const at::Tensor& v_real,
                                const at::Tensor& target, const std::optional<at::Tensor>& v_uncond,
                                double guidance_scale, std::optional<double> clip) {
  return {layout.operand(v_shift),  layout.operand(v_real), layout.operand(target),
          layout.operand(v_uncond), guidance_scale,         clip.value_or(no_clip)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> shifted_velocity_loss_cuda(
    const std::optional<at::Tensor>& v_gen, const at::Tensor& v_shift, const at::Tensor& v_real,
    const at::Tensor& target, const std::optional<at::Tensor>& v_uncond, double guidance_scale,
    std::optional<double> clip) {
  constexpr auto op = "shifted_velocity_loss";
  check_shifted_velocities(op, v_shift, v_real, target, v_uncond, guidance_scale, clip);
  check_generated_velocity(op, v_gen, v_shift);
  const c10::cuda::CUDAGuard guard(v_shift.device());
  const auto type = compute_type(v_shift, v_real, target, v_uncond);
  Losses losses(v_shift, type);
  if (v_shift.numel() == 0) {
    losses.zero();
  } else {
    SampleLayout layout(v_shift);
    const auto velocities = velocities_of(layout, v_shift, v_real, target, v_uncond, guidance_scale, clip);
    double* const partials = losses.make_partials(layout.geometry(), velocities.v_shift);
    check_launch(shifted_velocity_loss(layout.geometry(), velocities, partials, losses.results(), type == at::kDouble,
                                       current_stream()));
  }
  return {losses.fake, losses.correction, losses.stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> shifted_velocity_loss_backward_cuda(
    const at::Tensor& grad_fake, const at::Tensor& grad_correction, const at::Tensor& v_shift, const at::Tensor& v_real,
    const at::Tensor& target, const std::optional<at::Tensor>& v_uncond, double guidance_scale,
    std::optional<double> clip, std::array<bool, 3> output_mask, std::optional<at::ScalarType> grad_gen_dtype) {
  constexpr auto op = "shifted_velocity_loss_backward";
  check_shifted_velocities(op, v_shift, v_real, target, v_uncond, guidance_scale, clip);
  check_loss_derivatives(op, "grad_fake", grad_fake, "grad_correction", grad_correction, v_shift, grad_gen_dtype);
  const c10::cuda::CUDAGuard guard(v_shift.device());
  SampleLayout layout(v_shift);
  const auto type = v_shift.scalar_type();
  const Gradients<3> gradients(layout, v_shift, {grad_gen_dtype.value_or(type), type, target.scalar_type()},
                               output_mask);
  if (v_shift.numel() > 0 && gradients.any) {
    const bool wide = gradients.wide || compute_type(v_shift, v_real, target, v_uncond) == at::kDouble;
    check_launch(shifted_velocity_loss_backward(
        layout.geometry(), velocities_of(layout, v_shift, v_real, target, v_uncond, guidance_scale, clip),
        times_of(grad_fake), times_of(grad_correction), gradients.operands, wide, current_stream()));
  }
  return {gradients.tensors[0], gradients.tensors[1], gradients.tensors[2]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> shifted_velocity_loss_with_gradients_cuda(
    const at::Tensor& weight_fake, const at::Tensor& weight_correction, const at::Tensor& v_shift,
    const at::Tensor& v_real, const at::Tensor& target, const std::optional<at::Tensor>& v_uncond,
    double guidance_scale, std::optional<double> clip, std::array<bool, 2> output_mask,
    std::optional<at::ScalarType> grad_gen_dtype) {
  constexpr auto op = "shifted_velocity_loss_with_gradients";
  check_shifted_velocities(op, v_shift, v_real, target, v_uncond, guidance_scale, clip);
  check_loss_derivatives(op, "weight_fake", weight_fake, "weight_correction", weight_correction, v_shift,
                         grad_gen_dtype);
  const c10::cuda::CUDAGuard guard(v_shift.device());
  const auto type = compute_type(v_shift, v_real, target, v_uncond);
  Losses losses(v_shift, type);
  SampleLayout layout(v_shift);
  const Gradients<2> gradients(layout, v_shift, {grad_gen_dtype.value_or(v_shift.scalar_type()), v_shift.scalar_type()},
                               output_mask);
  if (v_shift.numel() == 0) {
    losses.zero();
  } else {
    const auto velocities = velocities_of(layout, v_shift, v_real, target, v_uncond, guidance_scale, clip);
    double* const partials = losses.make_partials(layout.geometry(), velocities.v_shift);
    check_launch(shifted_velocity_loss_with_gradients(
        layout.geometry(), velocities, times_of(weight_fake), times_of(weight_correction), partials, losses.results(),
        gradients.operands, gradients.wide || type == at::kDouble, current_stream()));
  }
  return {losses.fake, losses.correction, losses.stats, gradients.tensors[0], gradients.tensors[1]};
}

}  // namespace apex_fast::cuda

APEX_FAST_KERNELS_FOR(CUDA, m) {
  m.impl("shifted_velocity_loss", &apex_fast::cuda::shifted_velocity_loss_cuda);
  m.impl("shifted_velocity_loss_backward", &apex_fast::cuda::shifted_velocity_loss_backward_cuda);
  m.impl("shifted_velocity_loss_with_gradients", &apex_fast::cuda::shifted_velocity_loss_with_gradients_cuda);
}
