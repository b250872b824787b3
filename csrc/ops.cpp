// The schemas of all ops. Kernels register themselves in csrc/cpu and csrc/cuda, derivatives in csrc/autograd.cpp, fake
// kernels and the plain torch twins in apex_fast/ops/registration.py. What each op computes is documented on the
// functions of apex_fast/ops.
#include <torch/library.h>

#include "cpu/kernels.h"

namespace apex_fast {

std::string cpu_isa() {
  return cpu::table().isa;
}

}  // namespace apex_fast

TORCH_LIBRARY(apex_fast, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};

  m.def("condition_shift(Tensor condition, Tensor scale, Tensor bias, *, Tensor? mask=None) -> Tensor", tags);
  m.def(
      "condition_shift_backward(Tensor grad, Tensor condition, Tensor scale, Tensor bias, *, Tensor? mask=None, "
      "bool[3] output_mask) "
      "-> (Tensor grad_condition, Tensor grad_scale, Tensor grad_bias)",
      tags);

  m.def("interpolate(Tensor x, Tensor z, Tensor t) -> Tensor", tags);
  m.def("interpolate_backward(Tensor grad, Tensor t, *, bool[2] output_mask) -> (Tensor grad_x, Tensor grad_z)", tags);

  m.def("renoise(Tensor velocity, Tensor x_s, Tensor s, Tensor z, Tensor t) -> (Tensor x_fake_t, Tensor target)", tags);
  m.def(
      "renoise_backward(Tensor grad_x_fake_t, Tensor grad_target, Tensor s, Tensor t, *, ScalarType velocity_dtype) -> "
      "Tensor",
      tags);

  m.def(
      "shifted_velocity_loss(Tensor? v_gen, Tensor v_shift, Tensor v_real, Tensor target, *, Tensor? v_uncond=None, "
      "float guidance_scale=1.0, float? clip=1.0) -> (Tensor fake, Tensor correction, Tensor stats)",
      tags);
  m.def(
      "shifted_velocity_loss_backward(Tensor grad_fake, Tensor grad_correction, Tensor v_shift, Tensor v_real, Tensor "
      "target, *, "
      "Tensor? v_uncond=None, float guidance_scale=1.0, float? clip=1.0, bool[3] output_mask=[True, True, False], "
      "ScalarType? grad_gen_dtype=None) -> (Tensor grad_gen, Tensor grad_shift, Tensor grad_target)",
      tags);

  m.def(
      "shifted_velocity_loss_with_gradients(Tensor weight_fake, Tensor weight_correction, Tensor v_shift, Tensor "
      "v_real, Tensor target, *, Tensor? v_uncond=None, float guidance_scale=1.0, float? clip=1.0, bool[2] "
      "output_mask=[True, True], ScalarType? grad_gen_dtype=None) -> (Tensor fake, Tensor correction, Tensor stats, "
      "Tensor grad_gen, Tensor grad_shift)",
      tags);

  m.def(
      "mixed_velocity_loss(Tensor velocity, Tensor x, Tensor z, *, Tensor? v_fake=None, float mix_weight=0.0) -> "
      "Tensor",
      tags);
  m.def(
      "mixed_velocity_loss_backward(Tensor grad, Tensor velocity, Tensor x, Tensor z, *, Tensor? v_fake=None, float "
      "mix_weight=0.0, "
      "bool[3] output_mask) -> (Tensor grad_velocity, Tensor grad_x, Tensor grad_z)",
      tags);

  m.def(
      "sampler_step(Tensor x, Tensor velocity, Tensor t, Tensor t_next, *, Tensor? noise=None, Tensor? v_uncond=None, "
      "float guidance_scale=1.0, float stochasticity=0.0) -> Tensor",
      tags);
  m.def(
      "sampler_step_backward(Tensor grad, Tensor t, Tensor t_next, *, float guidance_scale=1.0, float "
      "stochasticity=0.0, "
      "bool guided=False, ScalarType velocity_dtype, ScalarType? uncond_dtype=None, ScalarType? noise_dtype=None, "
      "bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_velocity, Tensor grad_v_uncond, Tensor grad_noise)",
      tags);

  m.def(
      "condition_shift_rms_norm(Tensor condition, Tensor scale, Tensor bias, Tensor weight, float eps, *, Tensor? "
      "mask=None, bool stacked=False, bool[2] output_mask=[True, True]) -> (Tensor normed, Tensor normed_shifted)",
      tags);
  m.def(
      "condition_shift_rms_norm_backward(Tensor? grad_normed, Tensor? grad_shifted, Tensor condition, Tensor scale, "
      "Tensor bias, Tensor weight, float eps, *, Tensor? mask=None, bool stacked=False, bool[4] output_mask) -> "
      "(Tensor "
      "grad_condition, Tensor grad_scale, Tensor grad_bias, Tensor grad_weight)",
      tags);

  m.def(
      "projected_condition_shift(Tensor projected, Tensor scale, Tensor bias, Tensor row_sums, *, Tensor? "
      "linear_bias=None, Tensor? mask=None, bool stacked=False, bool[2] output_mask=[True, True]) -> (Tensor real, "
      "Tensor shifted)",
      tags);
  m.def(
      "projected_condition_shift_backward(Tensor? grad_real, Tensor? grad_shifted, Tensor? projected, Tensor scale, "
      "Tensor bias, Tensor row_sums, *, Tensor? mask=None, bool stacked=False, ScalarType linear_bias_dtype, bool[5] "
      "output_mask) -> (Tensor grad_projected, Tensor grad_scale, Tensor grad_bias, Tensor grad_row_sums, Tensor "
      "grad_linear_bias)",
      tags);

  m.def(
      "modulated_layer_norm(Tensor hidden, Tensor scale, Tensor shift, float eps) -> (Tensor out, Tensor mean, Tensor "
      "rstd)",
      tags);
  m.def(
      "modulated_layer_norm_backward(Tensor grad, Tensor hidden, Tensor scale, Tensor mean, Tensor rstd, *, ScalarType "
      "shift_dtype, bool[3] output_mask) -> (Tensor grad_hidden, Tensor grad_scale, Tensor grad_shift)",
      tags);

  m.def(
      "velocity_head(Tensor hidden, Tensor scale, Tensor shift, Tensor weight, Tensor? bias, float eps) -> (Tensor "
      "velocity, Tensor mean, Tensor rstd)",
      tags);
  m.def(
      "velocity_head_backward(Tensor grad, Tensor hidden, Tensor scale, Tensor shift, Tensor weight, Tensor mean, "
      "Tensor rstd, float eps, *, bool[5] output_mask) -> (Tensor grad_hidden, Tensor grad_scale, Tensor grad_shift, "
      "Tensor grad_weight, Tensor grad_bias)",
      tags);

  m.def("cpu_isa() -> str", &apex_fast::cpu_isa);
}
