// Argument checks of the ops. Each says what was expected, what came and, where there is one, the remedy.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "common/geometry.h"

namespace apex_fast {

inline bool is_half(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16;
}

inline DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::F32;
    case at::kDouble:
      return DType::F64;
    case at::kHalf:
      return DType::F16;
    case at::kBFloat16:
      return DType::BF16;
    default:
      TORCH_CHECK(false, "apex_fast: no kernel for ", type);
  }
}

inline void check_float_type(const char* op, const char* name, at::ScalarType type) {
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || is_half(type), op, ": ", name,
              " must be float32, float64, bfloat16 or float16, got ", type);
}

inline void check_float(const char* op, const char* name, const at::Tensor& tensor) {
  check_float_type(op, name, tensor.scalar_type());
}

// A sample tensor [B, ...] like `reference`.
inline void check_sample(const char* op, const char* name, const at::Tensor& tensor, const char* reference_name,
                         const at::Tensor& reference) {
  check_float(op, name, tensor);
  TORCH_CHECK(tensor.sizes() == reference.sizes(), op, ": ", name, " must have the shape of ", reference_name, ", got ",
              tensor.sizes(), " and ", reference.sizes());
  TORCH_CHECK(tensor.device() == reference.device(), op, ": ", name, " must be on the device of ", reference_name,
              ", got ", tensor.device(), " and ", reference.device());
}

inline void check_batched(const char* op, const char* name, const at::Tensor& tensor) {
  check_float(op, name, tensor);
  TORCH_CHECK(tensor.dim() >= 1, op, ": ", name, " must be [B, ...], got a tensor without dimensions");
}

// x, z and target carry the sample itself: fp32, fp64 or the half type that the velocity has.
inline void check_state(const char* op, const char* name, const at::Tensor& state, const char* velocity_name,
                        const at::Tensor& velocity) {
  TORCH_CHECK(!is_half(state.scalar_type()) || state.scalar_type() == velocity.scalar_type(), op, ": ", name,
              " must be float32, float64 or have the dtype of ", velocity_name, " (", velocity.scalar_type(), "), got ",
              state.scalar_type(), "; cast it with ", name, ".float()");
}

inline void check_same_dtype(const char* op, const char* name, const at::Tensor& tensor, const char* reference_name,
                             const at::Tensor& reference) {
  TORCH_CHECK(tensor.scalar_type() == reference.scalar_type(), op, ": ", name, " must have the dtype of ",
              reference_name, ", got ", tensor.scalar_type(), " and ", reference.scalar_type(), "; cast one of them");
}

// A vector [B] of fp32 or fp64: times, or upstream gradients of per-sample losses.
inline void check_per_sample(const char* op, const char* name, const at::Tensor& values, const char* reference_name,
                             const at::Tensor& reference) {
  TORCH_CHECK(!is_half(values.scalar_type()), op, ": ", name, " must be float32 or float64, got ", values.scalar_type(),
              ": half precision rounds 0.999 to 1; pass ", name, ".float(), made before any cast to half");
  TORCH_CHECK(values.scalar_type() == at::kFloat || values.scalar_type() == at::kDouble, op, ": ", name,
              " must be float32 or float64, got ", values.scalar_type(), "; pass ", name, ".float()");
  TORCH_CHECK(values.dim() == 1 && values.size(0) == reference.size(0), op, ": ", name,
              " must be [B] with the batch of ", reference_name, " (", reference.size(0), "), got ", values.sizes(),
              values.dim() == 0 ? "; repeat a single time for the batch with t.expand(B)" : "");
  TORCH_CHECK(values.device() == reference.device(), op, ": ", name, " must be on the device of ", reference_name,
              ", got ", values.device(), " and ", reference.device());
}

}  // namespace apex_fast
