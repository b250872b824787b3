// Derivatives of the ops, in C++ under the Autograd key: at real latent sizes the host time of a Python-registered
// formula is of the order of the kernel itself. Each formula calls the public *_backward op, so that compilers see ops
// and no opaque node.
//
// No device code and no sizes here: the same functions trace with fake tensors and symbolic shapes.
#include <ATen/ops/zeros_like.h>

#include "autograd.h"

namespace apex_fast {

namespace {

// ---- condition_shift

using ConditionShiftSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&);
using ConditionShiftBackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                           const Tensor&, const OptionalTensor&,
                                                                           std::array<bool, 3>);

const auto& condition_shift_op() {
  static const auto op = find<ConditionShiftSignature>("apex_fast::condition_shift");
  return op;
}

const auto& condition_shift_backward_op() {
  static const auto op = find<ConditionShiftBackwardSignature>("apex_fast::condition_shift_backward");
  return op;
}

struct ConditionShift : Function<ConditionShift> {
  static Tensor forward(AutogradContext* ctx, const Tensor& condition, const Tensor& scale, const Tensor& bias,
                        const OptionalTensor& mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["wanted"] =
        std::vector<bool>{condition.requires_grad(), scale.requires_grad(), bias.requires_grad()};
    ctx->save_for_backward({condition, scale, bias, saved(mask)});
    return condition_shift_op().call(condition, scale, bias, mask);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto kept = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toBoolList();
    const auto [condition, scale, bias] = condition_shift_backward_op().call(
        grads[0], kept[0], kept[1], kept[2], restored(kept[3]), {wanted[0], wanted[1], wanted[2]});
    return {if_wanted(wanted[0], condition), if_wanted(wanted[1], scale), if_wanted(wanted[2], bias), Tensor()};
  }
};

Tensor condition_shift_autograd(const Tensor& condition, const Tensor& scale, const Tensor& bias,
                                const OptionalTensor& mask) {
  refuse_forward_mode("condition_shift", condition, scale, bias);
  if (any_wants_gradient(condition, scale, bias)) return ConditionShift::apply(condition, scale, bias, mask);
  at::AutoDispatchBelowADInplaceOrView below;
  return condition_shift_op().call(condition, scale, bias, mask);
}

std::tuple<Tensor, Tensor, Tensor> condition_shift_backward_autograd(const Tensor& grad, const Tensor& condition,
                                                                     const Tensor& scale, const Tensor& bias,
                                                                     const OptionalTensor& mask,
                                                                     std::array<bool, 3> output_mask) {
  const auto compute = [&]() -> variable_list {
    auto [a, b, c] = condition_shift_backward_op().call(grad, condition, scale, bias, mask, output_mask);
    return {a, b, c};
  };
  const auto out = once_differentiable("condition_shift", compute, grad, condition, scale, bias);
  return {out[0], out[1], out[2]};
}

// ---- interpolate

using InterpolateSignature = Tensor(const Tensor&, const Tensor&, const Tensor&);
using InterpolateBackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, std::array<bool, 2>);

const auto& interpolate_op() {
  static const auto op = find<InterpolateSignature>("apex_fast::interpolate");
  return op;
}

const auto& interpolate_backward_op() {
  static const auto op = find<InterpolateBackwardSignature>("apex_fast::interpolate_backward");
  return op;
}

struct Interpolate : Function<Interpolate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& z, const Tensor& t) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["wanted"] = std::vector<bool>{x.requires_grad(), z.requires_grad()};
    ctx->save_for_backward({t});
    return interpolate_op().call(x, z, t);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto wanted = ctx->saved_data["wanted"].toBoolList();
    const auto [x, z] = interpolate_backward_op().call(grads[0], ctx->get_saved_variables()[0], {wanted[0], wanted[1]});
    return {if_wanted(wanted[0], x), if_wanted(wanted[1], z), Tensor()};
  }
};

Tensor interpolate_autograd(const Tensor& x, const Tensor& z, const Tensor& t) {
  refuse_forward_mode("interpolate", x, z);
  refuse_gradient("interpolate: t has no derivative; detach it", t);
  if (any_wants_gradient(x, z)) return Interpolate::apply(x, z, t);
  at::AutoDispatchBelowADInplaceOrView below;
  return interpolate_op().call(x, z, t);
}

std::tuple<Tensor, Tensor> interpolate_backward_autograd(const Tensor& grad, const Tensor& t,
                                                         std::array<bool, 2> output_mask) {
  const auto compute = [&]() -> variable_list {
    auto [a, b] = interpolate_backward_op().call(grad, t, output_mask);
    return {a, b};
  };
  const auto out = once_differentiable("interpolate", compute, grad);
  return {out[0], out[1]};
}

// ---- renoise

using RenoiseSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                    const Tensor&);
using RenoiseBackwardSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::ScalarType);

const auto& renoise_op() {
  static const auto op = find<RenoiseSignature>("apex_fast::renoise");
  return op;
}

const auto& renoise_backward_op() {
  static const auto op = find<RenoiseBackwardSignature>("apex_fast::renoise_backward");
  return op;
}

struct Renoise : Function<Renoise> {
  static variable_list forward(AutogradContext* ctx, const Tensor& velocity, const Tensor& x_s, const Tensor& s,
                               const Tensor& z, const Tensor& t) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["velocity_dtype"] = static_cast<int64_t>(velocity.scalar_type());
    ctx->save_for_backward({s, t});
    auto [x_fake_t, target] = renoise_op().call(velocity, x_s, s, z, t);
    return {x_fake_t, target};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto kept = ctx->get_saved_variables();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["velocity_dtype"].toInt());
    return {renoise_backward_op().call(grads[0], grads[1], kept[0], kept[1], dtype), Tensor(), Tensor(), Tensor(),
            Tensor()};
  }
};

std::tuple<Tensor, Tensor> renoise_autograd(const Tensor& velocity, const Tensor& x_s, const Tensor& s, const Tensor& z,
                                            const Tensor& t) {
  refuse_forward_mode("renoise", velocity, x_s, z);
  refuse_gradient(
      "renoise: differentiable in velocity only; detach x_s, s, z and t (apex_fast.path has plain torch formulas)", x_s,
      s, z, t);
  if (any_wants_gradient(velocity)) {
    const auto out = Renoise::apply(velocity, x_s, s, z, t);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return renoise_op().call(velocity, x_s, s, z, t);
}

Tensor renoise_backward_autograd(const Tensor& grad_x_fake_t, const Tensor& grad_target, const Tensor& s,
                                 const Tensor& t, at::ScalarType velocity_dtype) {
  const auto compute = [&]() -> variable_list {
    return {renoise_backward_op().call(grad_x_fake_t, grad_target, s, t, velocity_dtype)};
  };
  return once_differentiable("renoise", compute, grad_x_fake_t, grad_target)[0];
}

// ---- shifted_velocity_loss

using ShiftedVelocityLossSignature = std::tuple<Tensor, Tensor, Tensor>(const OptionalTensor&, const Tensor&,
                                                                        const Tensor&, const Tensor&,
                                                                        const OptionalTensor&, double,
                                                                        std::optional<double>);
using ShiftedVelocityLossBackwardSignature = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double,
    std::optional<double>, std::array<bool, 3>, std::optional<at::ScalarType>);

const auto& shifted_velocity_loss_op() {
  static const auto op = find<ShiftedVelocityLossSignature>("apex_fast::shifted_velocity_loss");
  return op;
}

const auto& shifted_velocity_loss_backward_op() {
  static const auto op = find<ShiftedVelocityLossBackwardSignature>("apex_fast::shifted_velocity_loss_backward");
  return op;
}

struct ShiftedVelocityLoss : Function<ShiftedVelocityLoss> {
  static variable_list forward(AutogradContext* ctx, const OptionalTensor& v_gen, const Tensor& v_shift,
                               const Tensor& v_real, const Tensor& target, const OptionalTensor& v_uncond,
                               double guidance_scale, std::optional<double> clip) {
    at::AutoDispatchBelowADInplaceOrView below;
    // v_gen's values are never read and its dtype is v_shift's, so it is not kept.
    const bool generator = wants_gradient(v_gen), shifted = v_shift.requires_grad(),
               target_wanted = target.requires_grad();
    ctx->saved_data["wanted"] = std::vector<bool>{generator, shifted, target_wanted};
    ctx->saved_data["guidance_scale"] = guidance_scale;
    if (clip) ctx->saved_data["clip"] = *clip;
    ctx->save_for_backward({v_shift, v_real, target, saved(v_uncond)});
    ctx->set_materialize_grads(false);
    auto [fake, correction, stats] =
        shifted_velocity_loss_op().call(v_gen, v_shift, v_real, target, v_uncond, guidance_scale, clip);
    variable_list constant{stats};
    if (!generator) constant.push_back(correction);
    if (!shifted && !target_wanted) constant.push_back(fake);
    ctx->mark_non_differentiable(constant);
    return {fake, correction, stats};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto kept = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toBoolList();
    const bool has_fake = grads[0].defined(), has_correction = grads[1].defined();
    variable_list result(7);
    if (!has_fake && !has_correction) return result;
    const std::array<bool, 3> mask{wanted[0] && has_correction, wanted[1] && has_fake, wanted[2] && has_fake};
    const auto clip =
        ctx->saved_data.count("clip") ? std::optional<double>(ctx->saved_data["clip"].toDouble()) : std::nullopt;
    const Tensor grad_fake = has_fake ? grads[0] : at::zeros_like(grads[1]);
    const Tensor grad_correction = has_correction ? grads[1] : at::zeros_like(grads[0]);
    const auto [gen, shift, target] = shifted_velocity_loss_backward_op().call(
        grad_fake, grad_correction, kept[0], kept[1], kept[2], restored(kept[3]),
        ctx->saved_data["guidance_scale"].toDouble(), clip, mask, std::nullopt);
    result[0] = if_wanted(mask[0], gen);
    result[1] = if_wanted(mask[1], shift);
    result[3] = if_wanted(mask[2], target);
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> shifted_velocity_loss_autograd(const OptionalTensor& v_gen, const Tensor& v_shift,
                                                                  const Tensor& v_real, const Tensor& target,
                                                                  const OptionalTensor& v_uncond, double guidance_scale,
                                                                  std::optional<double> clip) {
  refuse_forward_mode("shifted_velocity_loss", v_gen, v_shift, target);
  // v_real and v_uncond stand under a stop-gradient by definition (Eq. 17): no error, no gradient.
  if (any_wants_gradient(v_gen, v_shift, target)) {
    const auto out = ShiftedVelocityLoss::apply(v_gen, v_shift, v_real, target, v_uncond, guidance_scale, clip);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return shifted_velocity_loss_op().call(v_gen, v_shift, v_real, target, v_uncond, guidance_scale, clip);
}

std::tuple<Tensor, Tensor, Tensor> shifted_velocity_loss_backward_autograd(
    const Tensor& grad_fake, const Tensor& grad_correction, const Tensor& v_shift, const Tensor& v_real,
    const Tensor& target, const OptionalTensor& v_uncond, double guidance_scale, std::optional<double> clip,
    std::array<bool, 3> output_mask, std::optional<at::ScalarType> grad_gen_dtype) {
  const auto compute = [&]() -> variable_list {
    auto [a, b, c] =
        shifted_velocity_loss_backward_op().call(grad_fake, grad_correction, v_shift, v_real, target, v_uncond,
                                                 guidance_scale, clip, output_mask, grad_gen_dtype);
    return {a, b, c};
  };
  const auto out = once_differentiable("shifted_velocity_loss", compute, grad_fake, grad_correction, v_shift, v_real,
                                       target, v_uncond);
  return {out[0], out[1], out[2]};
}

using ShiftedVelocityLossWithGradientsSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double,
    std::optional<double>, std::array<bool, 2>, std::optional<at::ScalarType>);

const auto& shifted_velocity_loss_with_gradients_op() {
  static const auto op =
      find<ShiftedVelocityLossWithGradientsSignature>("apex_fast::shifted_velocity_loss_with_gradients");
  return op;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shifted_velocity_loss_with_gradients_autograd(
    const Tensor& weight_fake, const Tensor& weight_correction, const Tensor& v_shift, const Tensor& v_real,
    const Tensor& target, const OptionalTensor& v_uncond, double guidance_scale, std::optional<double> clip,
    std::array<bool, 2> output_mask, std::optional<at::ScalarType> grad_gen_dtype) {
  refuse_forward_mode("shifted_velocity_loss_with_gradients", weight_fake, weight_correction, v_shift, v_real, target,
                      v_uncond);
  refuse_gradient(
      "shifted_velocity_loss_with_gradients: returns its gradients and is not differentiable; detach the inputs or "
      "call "
      "it under torch.no_grad()",
      weight_fake, weight_correction, v_shift, v_real, target, v_uncond);
  at::AutoDispatchBelowADInplaceOrView below;
  return shifted_velocity_loss_with_gradients_op().call(weight_fake, weight_correction, v_shift, v_real, target,
                                                        v_uncond, guidance_scale, clip, output_mask, grad_gen_dtype);
}

// ---- mixed_velocity_loss

using MixedVelocityLossSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double);
using MixedVelocityLossBackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                              const Tensor&, const Tensor&,
                                                                              const OptionalTensor&, double,
                                                                              std::array<bool, 3>);

const auto& mixed_velocity_loss_op() {
  static const auto op = find<MixedVelocityLossSignature>("apex_fast::mixed_velocity_loss");
  return op;
}

const auto& mixed_velocity_loss_backward_op() {
  static const auto op = find<MixedVelocityLossBackwardSignature>("apex_fast::mixed_velocity_loss_backward");
  return op;
}

struct MixedVelocityLoss : Function<MixedVelocityLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& velocity, const Tensor& x, const Tensor& z,
                        const OptionalTensor& v_fake, double mix_weight) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["wanted"] = std::vector<bool>{velocity.requires_grad(), x.requires_grad(), z.requires_grad()};
    ctx->saved_data["mix_weight"] = mix_weight;
    ctx->save_for_backward({velocity, x, z, saved(v_fake)});
    return mixed_velocity_loss_op().call(velocity, x, z, v_fake, mix_weight);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto kept = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toBoolList();
    const auto [velocity, x, z] = mixed_velocity_loss_backward_op().call(
        grads[0], kept[0], kept[1], kept[2], restored(kept[3]), ctx->saved_data["mix_weight"].toDouble(),
        {wanted[0], wanted[1], wanted[2]});
    return {if_wanted(wanted[0], velocity), if_wanted(wanted[1], x), if_wanted(wanted[2], z), Tensor(), Tensor()};
  }
};

Tensor mixed_velocity_loss_autograd(const Tensor& velocity, const Tensor& x, const Tensor& z,
                                    const OptionalTensor& v_fake, double mix_weight) {
  refuse_forward_mode("mixed_velocity_loss", velocity, x, z);
  // v_fake stands under a stop-gradient by definition (Eq. 24): no error, no gradient.
  if (any_wants_gradient(velocity, x, z)) return MixedVelocityLoss::apply(velocity, x, z, v_fake, mix_weight);
  at::AutoDispatchBelowADInplaceOrView below;
  return mixed_velocity_loss_op().call(velocity, x, z, v_fake, mix_weight);
}

std::tuple<Tensor, Tensor, Tensor> mixed_velocity_loss_backward_autograd(const Tensor& grad, const Tensor& velocity,
                                                                         const Tensor& x, const Tensor& z,
                                                                         const OptionalTensor& v_fake,
                                                                         double mix_weight,
                                                                         std::array<bool, 3> output_mask) {
  const auto compute = [&]() -> variable_list {
    auto [a, b, c] = mixed_velocity_loss_backward_op().call(grad, velocity, x, z, v_fake, mix_weight, output_mask);
    return {a, b, c};
  };
  const auto out = once_differentiable("mixed_velocity_loss", compute, grad, velocity, x, z, v_fake);
  return {out[0], out[1], out[2]};
}

// ---- sampler_step

using SamplerStepSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                    const OptionalTensor&, double, double);
using SamplerStepBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, double, double, bool, at::ScalarType, std::optional<at::ScalarType>,
    std::optional<at::ScalarType>, std::array<bool, 4>);

const auto& sampler_step_op() {
  static const auto op = find<SamplerStepSignature>("apex_fast::sampler_step");
  return op;
}

const auto& sampler_step_backward_op() {
  static const auto op = find<SamplerStepBackwardSignature>("apex_fast::sampler_step_backward");
  return op;
}

struct SamplerStep : Function<SamplerStep> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& velocity, const Tensor& t,
                        const Tensor& t_next, const OptionalTensor& noise, const OptionalTensor& v_uncond,
                        double guidance_scale, double stochasticity) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["wanted"] =
        std::vector<bool>{x.requires_grad(), velocity.requires_grad(), wants_gradient(v_uncond), wants_gradient(noise)};
    ctx->saved_data["guidance_scale"] = guidance_scale;
    ctx->saved_data["stochasticity"] = stochasticity;
    ctx->saved_data["guided"] = v_uncond.has_value();
    ctx->saved_data["velocity_dtype"] = static_cast<int64_t>(velocity.scalar_type());
    if (v_uncond) ctx->saved_data["uncond_dtype"] = static_cast<int64_t>(v_uncond->scalar_type());
    if (noise) ctx->saved_data["noise_dtype"] = static_cast<int64_t>(noise->scalar_type());
    ctx->save_for_backward({t, t_next});
    return sampler_step_op().call(x, velocity, t, t_next, noise, v_uncond, guidance_scale, stochasticity);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto kept = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toBoolList();
    const auto dtype = [&](const char* name) -> std::optional<at::ScalarType> {
      if (!ctx->saved_data.count(name)) return std::nullopt;
      return static_cast<at::ScalarType>(ctx->saved_data[name].toInt());
    };
    const auto [x, velocity, v_uncond, noise] = sampler_step_backward_op().call(
        grads[0], kept[0], kept[1], ctx->saved_data["guidance_scale"].toDouble(),
        ctx->saved_data["stochasticity"].toDouble(), ctx->saved_data["guided"].toBool(), *dtype("velocity_dtype"),
        dtype("uncond_dtype"), dtype("noise_dtype"), {wanted[0], wanted[1], wanted[2], wanted[3]});
    return {if_wanted(wanted[0], x),     if_wanted(wanted[1], velocity), Tensor(), Tensor(),
            if_wanted(wanted[3], noise), if_wanted(wanted[2], v_uncond), Tensor(), Tensor()};
  }
};

Tensor sampler_step_autograd(const Tensor& x, const Tensor& velocity, const Tensor& t, const Tensor& t_next,
                             const OptionalTensor& noise, const OptionalTensor& v_uncond, double guidance_scale,
                             double stochasticity) {
  refuse_forward_mode("sampler_step", x, velocity, noise, v_uncond);
  refuse_gradient("sampler_step: t and t_next have no derivative; detach them", t, t_next);
  if (any_wants_gradient(x, velocity, noise, v_uncond))
    return SamplerStep::apply(x, velocity, t, t_next, noise, v_uncond, guidance_scale, stochasticity);
  at::AutoDispatchBelowADInplaceOrView below;
  return sampler_step_op().call(x, velocity, t, t_next, noise, v_uncond, guidance_scale, stochasticity);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sampler_step_backward_autograd(
    const Tensor& grad, const Tensor& t, const Tensor& t_next, double guidance_scale, double stochasticity, bool guided,
    at::ScalarType velocity_dtype, std::optional<at::ScalarType> uncond_dtype,
    std::optional<at::ScalarType> noise_dtype, std::array<bool, 4> output_mask) {
  const auto compute = [&]() -> variable_list {
    auto [a, b, c, d] = sampler_step_backward_op().call(grad, t, t_next, guidance_scale, stochasticity, guided,
                                                        velocity_dtype, uncond_dtype, noise_dtype, output_mask);
    return {a, b, c, d};
  };
  const auto out = once_differentiable("sampler_step", compute, grad);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace

}  // namespace apex_fast

TORCH_LIBRARY_IMPL(apex_fast, Autograd, m) {
  m.impl("condition_shift", &apex_fast::condition_shift_autograd);
  m.impl("condition_shift_backward", &apex_fast::condition_shift_backward_autograd);
  m.impl("interpolate", &apex_fast::interpolate_autograd);
  m.impl("interpolate_backward", &apex_fast::interpolate_backward_autograd);
  m.impl("renoise", &apex_fast::renoise_autograd);
  m.impl("renoise_backward", &apex_fast::renoise_backward_autograd);
  m.impl("shifted_velocity_loss", &apex_fast::shifted_velocity_loss_autograd);
  m.impl("shifted_velocity_loss_backward", &apex_fast::shifted_velocity_loss_backward_autograd);
  m.impl("shifted_velocity_loss_with_gradients", &apex_fast::shifted_velocity_loss_with_gradients_autograd);
  m.impl("mixed_velocity_loss", &apex_fast::mixed_velocity_loss_autograd);
  m.impl("mixed_velocity_loss_backward", &apex_fast::mixed_velocity_loss_backward_autograd);
  m.impl("sampler_step", &apex_fast::sampler_step_autograd);
  m.impl("sampler_step_backward", &apex_fast::sampler_step_backward_autograd);
}
