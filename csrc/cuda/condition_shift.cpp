// CUDA glue of condition_shift. The kernels are in condition_shift.cu.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "common/condition_shift_arguments.h"
#include "common/registration.h"
#include "cuda/glue.h"
#include "cuda/kernels.h"

namespace apex_fast::cuda {

namespace {

static_assert(max_row_dims + 1 == max_condition_dims);

RowOperand row_operand(const at::Tensor& tensor) {
  RowOperand operand;
  operand.data = const_cast<void*>(tensor.const_data_ptr());
  operand.dtype = dtype_of(tensor.scalar_type());
  operand.channel_stride = tensor.stride(-1);
  return operand;
}

Parameter parameter_of(const at::Tensor& parameter) {
  const bool is_vector = parameter.dim() == 1;
  return {parameter.const_data_ptr(), dtype_of(parameter.scalar_type()), is_vector,
          is_vector ? parameter.stride(0) : 0};
}

// The problem and its [..., D] tensors, all of one shape, with the leading dimensions joined where they can be.
template <size_t Count>
struct Problem : ConditionShift {
  RowOperand operands[Count];

  Problem(const std::array<const at::Tensor*, Count>& tensors, const at::Tensor& scale_, const at::Tensor& bias_,
          const std::optional<at::Tensor>& mask_) {
    const at::Tensor& condition = *tensors[0];
    channels = condition.size(-1);
    rows = condition.numel() / channels;
    scale = parameter_of(scale_);
    bias = parameter_of(bias_);
    mask = nullptr;
    if (mask_) {
      keep_ = mask_bytes(*mask_);
      mask = reinterpret_cast<const uint8_t*>(keep_.const_data_ptr<bool>());
    }
    const int64_t* strides[Count];
    for (size_t k = 0; k < Count; ++k) {
      operands[k] = row_operand(*tensors[k]);
      strides[k] = tensors[k]->strides().data();
    }
    dims = join_dims(static_cast<int>(condition.dim()) - 1, condition.sizes().data(), strides, operands);
  }

 private:
  at::Tensor keep_;
};

}  // namespace

at::Tensor condition_shift_cuda(const at::Tensor& condition, const at::Tensor& scale, const at::Tensor& bias,
                                const std::optional<at::Tensor>& mask) {
  check_condition_shift("condition_shift", condition, scale, bias, mask);
  const c10::cuda::CUDAGuard guard(condition.device());
  at::Tensor shifted = at::empty_like(condition);
  if (condition.numel() == 0) return shifted;
  const Problem<2> problem({&condition, &shifted}, scale, bias, mask);
  check_launch(condition_shift(problem, problem.operands[0], problem.operands[1],
                               condition.scalar_type() == at::kDouble, current_stream()));
  return shifted;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> condition_shift_backward_cuda(
    const at::Tensor& grad, const at::Tensor& condition, const at::Tensor& scale, const at::Tensor& bias,
    const std::optional<at::Tensor>& mask, std::array<bool, 3> output_mask) {
  constexpr auto op = "condition_shift_backward";
  check_condition_shift(op, condition, scale, bias, mask);
  check_sample(op, "grad", grad, "condition", condition);
  const c10::cuda::CUDAGuard guard(condition.device());
  at::Tensor grad_condition = output_mask[0] ? at::empty_like(condition) : at::empty({0}, condition.options());
  if (condition.numel() == 0) {  // no token: the sums over the tokens are zero
    const auto nothing = [](bool wanted, const at::Tensor& parameter) {
      return wanted ? at::zeros(parameter.sizes(), parameter.options()) : at::empty({0}, parameter.options());
    };
    return {grad_condition, nothing(output_mask[1], scale), nothing(output_mask[2], bias)};
  }
  const auto make = [](bool wanted, const at::Tensor& parameter) {
    return wanted ? at::empty(parameter.sizes(), parameter.options()) : at::empty({0}, parameter.options());
  };
  at::Tensor grad_scale = make(output_mask[1], scale), grad_bias = make(output_mask[2], bias);
  if (!output_mask[0] && !output_mask[1] && !output_mask[2]) return {grad_condition, grad_scale, grad_bias};

  const Problem<3> problem({&condition, &grad, output_mask[0] ? &grad_condition : &condition}, scale, bias, mask);
  RowOperand out = problem.operands[2];
  if (!output_mask[0]) out.data = nullptr;
  const RowChunks chunks = row_chunks(problem.rows, problem.channels);
  at::Tensor partials[2];
  const auto gradient = [&](int k, const Parameter& parameter, at::Tensor& result) -> ParameterGradient {
    if (!output_mask[k + 1]) return {nullptr, nullptr};
    partials[k] = workspace(parameter_partials(chunks, problem.channels, parameter.is_vector), condition);
    return {partials[k].mutable_data_ptr<double>(), result.mutable_data_ptr()};
  };
  const ParameterGradient to_scale = gradient(0, problem.scale, grad_scale);
  const ParameterGradient to_bias = gradient(1, problem.bias, grad_bias);
  // The kernels read no fp64 slots in fp32 arithmetic, so an fp64 gradient asks for fp64 as well.
  const bool wide = condition.scalar_type() == at::kDouble || grad.scalar_type() == at::kDouble;
  check_launch(condition_shift_backward(problem, problem.operands[0], problem.operands[1], out, to_scale, to_bias, wide,
                                        current_stream()));
  return {grad_condition, grad_scale, grad_bias};
}

}  // namespace apex_fast::cuda

APEX_FAST_KERNELS_FOR(CUDA, m) {
  m.impl("condition_shift", &apex_fast::cuda::condition_shift_cuda);
  m.impl("condition_shift_backward", &apex_fast::cuda::condition_shift_backward_cuda);
}
