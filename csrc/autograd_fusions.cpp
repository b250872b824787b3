// Derivatives of the ops that stand in for parts of a network: a condition shift inside the text path, and the head
// that makes the velocity. The head is made of other ops, with one body for every device, and that body is here too.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "autograd.h"
#include "common/rows.h"

namespace apex_fast {

namespace {

// Outputs that were not asked for are empty and have no history.
void without_history(AutogradContext* ctx, const Tensor& first, const Tensor& second, bool stacked,
                     std::array<bool, 2> output_mask) {
  variable_list constant;
  if (!output_mask[0]) constant.push_back(first);
  if (!output_mask[1] || stacked) constant.push_back(second);
  if (!constant.empty()) ctx->mark_non_differentiable(constant);
  ctx->set_materialize_grads(false);
}

// ---- condition_shift_rms_norm

using RmsNormSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                                                    const OptionalTensor&, bool, std::array<bool, 2>);
using RmsNormBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const OptionalTensor&,
                                                                            const OptionalTensor&, const Tensor&,
                                                                            const Tensor&, const Tensor&, const Tensor&,
                                                                            double, const OptionalTensor&, bool,
                                                                            std::array<bool, 4>);

const auto& rms_norm_op() {
  static const auto op = find<RmsNormSignature>("apex_fast::condition_shift_rms_norm");
  return op;
}

const auto& rms_norm_backward_op() {
  static const auto op = find<RmsNormBackwardSignature>("apex_fast::condition_shift_rms_norm_backward");
  return op;
}

struct ConditionShiftRmsNorm : Function<ConditionShiftRmsNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& condition, const Tensor& scale, const Tensor& bias,
                               const Tensor& weight, double eps, const OptionalTensor& mask, bool stacked,
                               std::array<bool, 2> output_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["wanted"] = std::vector<bool>{condition.requires_grad(), scale.requires_grad(),
                                                  bias.requires_grad(), weight.requires_grad()};
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["stacked"] = stacked;
    ctx->save_for_backward({condition, scale, bias, weight, saved(mask)});
    auto [normed, shifted] = rms_norm_op().call(condition, scale, bias, weight, eps, mask, stacked, output_mask);
    without_history(ctx, normed, shifted, stacked, output_mask);
    return {normed, shifted};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(8);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto kept = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toBoolList();
    const auto [condition, scale, bias, weight] = rms_norm_backward_op().call(
        restored(grads[0]), restored(grads[1]), kept[0], kept[1], kept[2], kept[3], ctx->saved_data["eps"].toDouble(),
        restored(kept[4]), ctx->saved_data["stacked"].toBool(), {wanted[0], wanted[1], wanted[2], wanted[3]});
    result[0] = if_wanted(wanted[0], condition);
    result[1] = if_wanted(wanted[1], scale);
    result[2] = if_wanted(wanted[2], bias);
    result[3] = if_wanted(wanted[3], weight);
    return result;
  }
};

std::tuple<Tensor, Tensor> condition_shift_rms_norm_autograd(const Tensor& condition, const Tensor& scale,
                                                             const Tensor& bias, const Tensor& weight, double eps,
                                                             const OptionalTensor& mask, bool stacked,
                                                             std::array<bool, 2> output_mask) {
  refuse_forward_mode("condition_shift_rms_norm", condition, scale, bias, weight);
  if (any_wants_gradient(condition, scale, bias, weight)) {
    const auto out = ConditionShiftRmsNorm::apply(condition, scale, bias, weight, eps, mask, stacked, output_mask);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return rms_norm_op().call(condition, scale, bias, weight, eps, mask, stacked, output_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> condition_shift_rms_norm_backward_autograd(
    const OptionalTensor& grad_normed, const OptionalTensor& grad_shifted, const Tensor& condition, const Tensor& scale,
    const Tensor& bias, const Tensor& weight, double eps, const OptionalTensor& mask, bool stacked,
    std::array<bool, 4> output_mask) {
  const auto compute = [&]() -> variable_list {
    auto [a, b, c, d] = rms_norm_backward_op().call(grad_normed, grad_shifted, condition, scale, bias, weight, eps,
                                                    mask, stacked, output_mask);
    return {a, b, c, d};
  };
  const auto out = once_differentiable("condition_shift_rms_norm", compute, grad_normed, grad_shifted, condition, scale,
                                       bias, weight);
  return {out[0], out[1], out[2], out[3]};
}

// ---- projected_condition_shift

using ProjectedSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                      const OptionalTensor&, const OptionalTensor&, bool,
                                                      std::array<bool, 2>);
using ProjectedBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
    const OptionalTensor&, bool, at::ScalarType, std::array<bool, 5>);

const auto& projected_op() {
  static const auto op = find<ProjectedSignature>("apex_fast::projected_condition_shift");
  return op;
}

const auto& projected_backward_op() {
  static const auto op = find<ProjectedBackwardSignature>("apex_fast::projected_condition_shift_backward");
  return op;
}

struct ProjectedConditionShift : Function<ProjectedConditionShift> {
  static variable_list forward(AutogradContext* ctx, const Tensor& projected, const Tensor& scale, const Tensor& bias,
                               const Tensor& row_sums, const OptionalTensor& linear_bias, const OptionalTensor& mask,
                               bool stacked, std::array<bool, 2> output_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["wanted"] =
        std::vector<bool>{projected.requires_grad(), scale.requires_grad(), bias.requires_grad(),
                          row_sums.requires_grad(), wants_gradient(linear_bias)};
    ctx->saved_data["stacked"] = stacked;
    ctx->saved_data["linear_bias_dtype"] =
        static_cast<int64_t>(linear_bias ? linear_bias->scalar_type() : row_sums.scalar_type());
    // The gradient of scale alone reads the projection; a shift that is not trained keeps nothing of that size.
    ctx->save_for_backward({scale.requires_grad() ? projected : Tensor(), scale, bias, row_sums, saved(mask)});
    auto [real, shifted] =
        projected_op().call(projected, scale, bias, row_sums, linear_bias, mask, stacked, output_mask);
    without_history(ctx, real, shifted, stacked, output_mask);
    return {real, shifted};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(8);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto kept = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toBoolList();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["linear_bias_dtype"].toInt());
    const auto [projected, scale, bias, row_sums, linear_bias] = projected_backward_op().call(
        restored(grads[0]), restored(grads[1]), restored(kept[0]), kept[1], kept[2], kept[3], restored(kept[4]),
        ctx->saved_data["stacked"].toBool(), dtype, {wanted[0], wanted[1], wanted[2], wanted[3], wanted[4]});
    result[0] = if_wanted(wanted[0], projected);
    result[1] = if_wanted(wanted[1], scale);
    result[2] = if_wanted(wanted[2], bias);
    result[3] = if_wanted(wanted[3], row_sums);
    result[4] = if_wanted(wanted[4], linear_bias);
    return result;
  }
};

std::tuple<Tensor, Tensor> projected_condition_shift_autograd(const Tensor& projected, const Tensor& scale,
                                                              const Tensor& bias, const Tensor& row_sums,
                                                              const OptionalTensor& linear_bias,
                                                              const OptionalTensor& mask, bool stacked,
                                                              std::array<bool, 2> output_mask) {
  refuse_forward_mode("projected_condition_shift", projected, scale, bias, row_sums, linear_bias);
  if (any_wants_gradient(projected, scale, bias, row_sums, linear_bias)) {
    const auto out =
        ProjectedConditionShift::apply(projected, scale, bias, row_sums, linear_bias, mask, stacked, output_mask);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return projected_op().call(projected, scale, bias, row_sums, linear_bias, mask, stacked, output_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> projected_condition_shift_backward_autograd(
    const OptionalTensor& grad_real, const OptionalTensor& grad_shifted, const OptionalTensor& projected,
    const Tensor& scale, const Tensor& bias, const Tensor& row_sums, const OptionalTensor& mask, bool stacked,
    at::ScalarType linear_bias_dtype, std::array<bool, 5> output_mask) {
  const auto compute = [&]() -> variable_list {
    auto [a, b, c, d, e] = projected_backward_op().call(grad_real, grad_shifted, projected, scale, bias, row_sums, mask,
                                                        stacked, linear_bias_dtype, output_mask);
    return {a, b, c, d, e};
  };
  const auto out = once_differentiable("projected_condition_shift", compute, grad_real, grad_shifted, projected, scale,
                                       bias, row_sums);
  return {out[0], out[1], out[2], out[3], out[4]};
}

// ---- modulated_layer_norm

using LayerNormSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double);
using LayerNormBackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                      const Tensor&, const Tensor&, at::ScalarType,
                                                                      std::array<bool, 3>);

const auto& layer_norm_op() {
  static const auto op = find<LayerNormSignature>("apex_fast::modulated_layer_norm");
  return op;
}

const auto& layer_norm_backward_op() {
  static const auto op = find<LayerNormBackwardSignature>("apex_fast::modulated_layer_norm_backward");
  return op;
}

struct ModulatedLayerNorm : Function<ModulatedLayerNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& scale, const Tensor& shift,
                               double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["wanted"] = std::vector<bool>{hidden.requires_grad(), scale.requires_grad(), shift.requires_grad()};
    ctx->saved_data["shift_dtype"] = static_cast<int64_t>(shift.scalar_type());
    auto [out, mean, rstd] = layer_norm_op().call(hidden, scale, shift, eps);
    ctx->mark_non_differentiable({mean, rstd});
    ctx->save_for_backward({hidden, scale, mean, rstd});
    return {out, mean, rstd};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto kept = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toBoolList();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["shift_dtype"].toInt());
    const auto [hidden, scale, shift] = layer_norm_backward_op().call(grads[0], kept[0], kept[1], kept[2], kept[3],
                                                                      dtype, {wanted[0], wanted[1], wanted[2]});
    return {if_wanted(wanted[0], hidden), if_wanted(wanted[1], scale), if_wanted(wanted[2], shift), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm_autograd(const Tensor& hidden, const Tensor& scale,
                                                                 const Tensor& shift, double eps) {
  refuse_forward_mode("modulated_layer_norm", hidden, scale, shift);
  if (any_wants_gradient(hidden, scale, shift)) {
    const auto out = ModulatedLayerNorm::apply(hidden, scale, shift, eps);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return layer_norm_op().call(hidden, scale, shift, eps);
}

std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm_backward_autograd(const Tensor& grad, const Tensor& hidden,
                                                                          const Tensor& scale, const Tensor& mean,
                                                                          const Tensor& rstd,
                                                                          at::ScalarType shift_dtype,
                                                                          std::array<bool, 3> output_mask) {
  const auto compute = [&]() -> variable_list {
    auto [a, b, c] = layer_norm_backward_op().call(grad, hidden, scale, mean, rstd, shift_dtype, output_mask);
    return {a, b, c};
  };
  const auto out = once_differentiable("modulated_layer_norm", compute, grad, hidden, scale, mean, rstd);
  return {out[0], out[1], out[2]};
}

// ---- velocity_head

using HeadSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                         const OptionalTensor&, double);
using HeadBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                                 const Tensor&, const Tensor&,
                                                                                 const Tensor&, const Tensor&,
                                                                                 const Tensor&, double,
                                                                                 std::array<bool, 5>);

const auto& head_op() {
  static const auto op = find<HeadSignature>("apex_fast::velocity_head");
  return op;
}

const auto& head_backward_op() {
  static const auto op = find<HeadBackwardSignature>("apex_fast::velocity_head_backward");
  return op;
}

void check_projection(const char* op, const char* name, const Tensor& tensor, const Tensor& hidden) {
  TORCH_CHECK(tensor.scalar_type() == hidden.scalar_type(), op, ": ", name, " must have the dtype of hidden, got ",
              tensor.scalar_type(), " and ", hidden.scalar_type(), "; cast one of them");
  check_device(op, name, tensor, "hidden", hidden);
}

std::tuple<Tensor, Tensor, Tensor> velocity_head(const Tensor& hidden, const Tensor& scale, const Tensor& shift,
                                                 const Tensor& weight, const OptionalTensor& bias, double eps) {
  constexpr auto op = "velocity_head";
  TORCH_CHECK(hidden.dim() >= 2, op, ": hidden must be [B, ..., D], got ", hidden.sizes());
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == hidden.size(-1), op,
              ": weight must be [O, D] with D = ", hidden.size(-1), ", the last dimension of hidden, got ",
              weight.sizes());
  check_projection(op, "weight", weight, hidden);
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": bias must be [O] with O = ", weight.size(0),
                ", the rows of weight, got ", bias->sizes());
    check_projection(op, "bias", *bias, hidden);
  }
  // As everywhere in the library: what comes in decides the dtype, not autocast.
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  auto [out, mean, rstd] = layer_norm_op().call(hidden, scale, shift, eps);
  return {at::linear(out, weight, bias), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> velocity_head_backward(const Tensor& grad, const Tensor& hidden,
                                                                          const Tensor& scale, const Tensor& shift,
                                                                          const Tensor& weight, const Tensor& mean,
                                                                          const Tensor& rstd, double eps,
                                                                          std::array<bool, 5> output_mask) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto nothing = [](const Tensor& like) { return at::empty({0}, like.options()); };
  const Tensor upstream = grad.flatten(0, -2);
  Tensor grad_weight = nothing(weight), grad_bias = nothing(weight);
  if (output_mask[3]) {
    // Made anew from hidden, and gone before the gradient of the same size is made.
    const Tensor out = std::get<0>(layer_norm_op().call(hidden, scale, shift, eps));
    grad_weight = at::mm(upstream.t(), out.flatten(0, -2));
  }
  if (output_mask[4]) grad_bias = at::sum(upstream, at::IntArrayRef{0});
  Tensor grad_hidden = nothing(hidden), grad_scale = nothing(scale), grad_shift = nothing(shift);
  if (output_mask[0] || output_mask[1] || output_mask[2])
    std::tie(grad_hidden, grad_scale, grad_shift) =
        layer_norm_backward_op().call(at::matmul(grad, weight), hidden, scale, mean, rstd, shift.scalar_type(),
                                      {output_mask[0], output_mask[1], output_mask[2]});
  return {grad_hidden, grad_scale, grad_shift, grad_weight, grad_bias};
}

// Shapes alone, for compilers. Here and not in Python, with the body that they belong to.
Tensor empty_like_if(bool wanted, const Tensor& like) {
  return wanted ? at::empty_symint(like.sym_sizes(), like.options()) : at::empty({0}, like.options());
}

std::tuple<Tensor, Tensor, Tensor> velocity_head_meta(const Tensor& hidden, const Tensor&, const Tensor&,
                                                      const Tensor& weight, const OptionalTensor&, double) {
  std::vector<c10::SymInt> rows = hidden.sym_sizes().vec();
  rows.pop_back();
  std::vector<c10::SymInt> velocity = rows;
  velocity.push_back(weight.sym_size(0));
  const auto statistics = hidden.options().dtype(hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return {at::empty_symint(velocity, hidden.options()), at::empty_symint(rows, statistics),
          at::empty_symint(rows, statistics)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> velocity_head_backward_meta(const Tensor&, const Tensor& hidden,
                                                                               const Tensor& scale, const Tensor& shift,
                                                                               const Tensor& weight, const Tensor&,
                                                                               const Tensor&, double,
                                                                               std::array<bool, 5> output_mask) {
  const Tensor bias =
      output_mask[4] ? at::empty_symint({weight.sym_size(0)}, weight.options()) : at::empty({0}, weight.options());
  return {empty_like_if(output_mask[0], hidden), empty_like_if(output_mask[1], scale),
          empty_like_if(output_mask[2], shift), empty_like_if(output_mask[3], weight), bias};
}

struct VelocityHead : Function<VelocityHead> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& scale, const Tensor& shift,
                               const Tensor& weight, const OptionalTensor& bias, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["wanted"] = std::vector<bool>{hidden.requires_grad(), scale.requires_grad(), shift.requires_grad(),
                                                  weight.requires_grad(), wants_gradient(bias)};
    ctx->saved_data["eps"] = eps;
    auto [velocity, mean, rstd] = head_op().call(hidden, scale, shift, weight, bias, eps);
    ctx->mark_non_differentiable({mean, rstd});
    ctx->save_for_backward({hidden, scale, shift, weight, mean, rstd});
    return {velocity, mean, rstd};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto kept = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toBoolList();
    const auto [hidden, scale, shift, weight, bias] = head_backward_op().call(
        grads[0], kept[0], kept[1], kept[2], kept[3], kept[4], kept[5], ctx->saved_data["eps"].toDouble(),
        {wanted[0], wanted[1], wanted[2], wanted[3], wanted[4]});
    return {if_wanted(wanted[0], hidden), if_wanted(wanted[1], scale), if_wanted(wanted[2], shift),
            if_wanted(wanted[3], weight), if_wanted(wanted[4], bias),  Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> velocity_head_autograd(const Tensor& hidden, const Tensor& scale,
                                                          const Tensor& shift, const Tensor& weight,
                                                          const OptionalTensor& bias, double eps) {
  refuse_forward_mode("velocity_head", hidden, scale, shift, weight, bias);
  if (any_wants_gradient(hidden, scale, shift, weight, bias)) {
    const auto out = VelocityHead::apply(hidden, scale, shift, weight, bias, eps);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return head_op().call(hidden, scale, shift, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> velocity_head_backward_autograd(
    const Tensor& grad, const Tensor& hidden, const Tensor& scale, const Tensor& shift, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, double eps, std::array<bool, 5> output_mask) {
  const auto compute = [&]() -> variable_list {
    auto [a, b, c, d, e] = head_backward_op().call(grad, hidden, scale, shift, weight, mean, rstd, eps, output_mask);
    return {a, b, c, d, e};
  };
  const auto out = once_differentiable("velocity_head", compute, grad, hidden, scale, shift, weight, mean, rstd);
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace

}  // namespace apex_fast

TORCH_LIBRARY_IMPL(apex_fast, Autograd, m) {
  m.impl("condition_shift_rms_norm", &apex_fast::condition_shift_rms_norm_autograd);
  m.impl("condition_shift_rms_norm_backward", &apex_fast::condition_shift_rms_norm_backward_autograd);
  m.impl("projected_condition_shift", &apex_fast::projected_condition_shift_autograd);
  m.impl("projected_condition_shift_backward", &apex_fast::projected_condition_shift_backward_autograd);
  m.impl("modulated_layer_norm", &apex_fast::modulated_layer_norm_autograd);
  m.impl("modulated_layer_norm_backward", &apex_fast::modulated_layer_norm_backward_autograd);
  m.impl("velocity_head", &apex_fast::velocity_head_autograd);
  m.impl("velocity_head_backward", &apex_fast::velocity_head_backward_autograd);
}

TORCH_LIBRARY_IMPL(apex_fast, CompositeExplicitAutograd, m) {
  m.impl("velocity_head", &apex_fast::velocity_head);
  m.impl("velocity_head_backward", &apex_fast::velocity_head_backward);
}

TORCH_LIBRARY_IMPL(apex_fast, Meta, m) {
  m.impl("velocity_head", &apex_fast::velocity_head_meta);
  m.impl("velocity_head_backward", &apex_fast::velocity_head_backward_meta);
}
