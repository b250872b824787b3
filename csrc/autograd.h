// What the derivatives in csrc/autograd*.cpp share: looking ops up, asking who wants a gradient, and refusing what has
// no formula. Everything is inline and for those files alone.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace apex_fast {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool wants_gradient(const Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad();
}
bool wants_gradient(const OptionalTensor& tensor) {
  return tensor && wants_gradient(*tensor);
}

template <class... Tensors>
bool any_wants_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (wants_gradient(tensors) || ...);
}

bool has_tangent(const Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}
bool has_tangent(const OptionalTensor& tensor) {
  return tensor && has_tangent(*tensor);
}

// Without a formula a tangent would be dropped, and the result of forward mode be zero without a word.
template <class... Tensors>
void refuse_forward_mode(const char* op, const Tensors&... tensors) {
  TORCH_CHECK(!(has_tangent(tensors) || ...), op,
              ": forward-mode derivatives are not implemented; use reverse mode, or the plain torch formula of the "
              "same name in "
              "apex_fast.ops.reference");
}

template <class... Tensors>
void refuse_gradient(const char* message, const Tensors&... tensors) {
  TORCH_CHECK(!any_wants_gradient(tensors...), message);
}

Tensor saved(const OptionalTensor& tensor) {
  return tensor ? *tensor : Tensor();
}
OptionalTensor restored(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// An empty tensor stands for a gradient that was not asked for.
Tensor if_wanted(bool wanted, const Tensor& gradient) {
  return wanted ? gradient : Tensor();
}

// ---- second derivatives: refused when they are used, not silently zero

struct OnceDifferentiable : Function<OnceDifferentiable> {
  template <class Compute>
  static variable_list forward(AutogradContext* ctx, at::TensorList, const Compute& compute, const char* op) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["op"] = std::string(op);
    return compute();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(false, "apex_fast::", ctx->saved_data["op"].toStringRef(),
                " cannot be differentiated a second time: the ops have first derivatives only. For second derivatives "
                "use the plain torch "
                "formula of the same name in apex_fast.ops.reference.");
  }
};

template <class Compute, class... Tensors>
variable_list once_differentiable(const char* op, const Compute& compute, const Tensors&... inputs) {
  if (!any_wants_gradient(inputs...)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return compute();
  }
  variable_list tensors;
  const auto keep = [&](const auto& tensor) {
    const Tensor value = saved(tensor);
    if (value.defined()) tensors.push_back(value);
  };
  (keep(OptionalTensor(inputs)), ...);
  return OnceDifferentiable::apply(at::TensorList(tensors), compute, op);  // a TensorList is what the engine looks into
}

}  // namespace

}  // namespace apex_fast
