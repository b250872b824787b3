// Checks and descriptions of tensors that are walked row by row: [..., D], a row being the D channels of one token.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "common/checks.h"
#include "common/geometry.h"

namespace apex_fast {

inline void check_rows(const char* op, const char* name, const at::Tensor& tensor) {
  check_float(op, name, tensor);
  TORCH_CHECK(tensor.dim() >= 1, op, ": ", name, " must be [..., D], got a tensor without dimensions");
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor, const char* reference_name,
                         const at::Tensor& reference) {
  TORCH_CHECK(tensor.device() == reference.device(), op, ": ", name, " must be on the device of ", reference_name,
              ", got ", tensor.device(), " and ", reference.device());
}

// One number per channel of `rows`.
inline void check_channels(const char* op, const char* name, const at::Tensor& values, const char* rows_name,
                           const at::Tensor& rows) {
  check_float(op, name, values);
  TORCH_CHECK(values.dim() == 1 && values.size(0) == rows.size(-1), op, ": ", name,
              " must be [D] with D = ", rows.size(-1), ", the last dimension of ", rows_name, ", got ", values.sizes());
  check_device(op, name, values, rows_name, rows);
}

// One number, or one per channel.
inline void check_number_or_channels(const char* op, const char* name, const at::Tensor& values, const char* rows_name,
                                     const at::Tensor& rows) {
  check_float(op, name, values);
  TORCH_CHECK(values.dim() == 0 || (values.dim() == 1 && values.size(0) == rows.size(-1)), op, ": ", name,
              " must be [] or [D] with D = ", rows.size(-1), ", the last dimension of ", rows_name, ", got ",
              values.sizes());
  check_device(op, name, values, rows_name, rows);
}

inline void check_mask(const char* op, const std::optional<at::Tensor>& mask, const char* rows_name,
                       const at::Tensor& rows) {
  if (!mask) return;
  const auto expected = rows.sizes().slice(0, rows.dim() - 1);
  TORCH_CHECK(mask->sizes() == expected, op, ": mask must have the shape of ", rows_name, " without D, ", expected,
              ", got ", mask->sizes());
  check_device(op, "mask", *mask, rows_name, rows);
}

inline void check_eps(const char* op, double eps) {
  TORCH_CHECK(eps >= 0, op, ": eps must not be negative, got ", eps);
}

// Both branches of one condition: two tensors like it, or, stacked, one with twice its batch.
inline void check_branches(const char* op, const char* rows_name, const at::Tensor& rows, bool stacked,
                           std::array<bool, 2> output_mask) {
  if (!stacked) return;
  TORCH_CHECK(rows.dim() >= 2, op, ": ", rows_name, " must be [B, ..., D] to be stacked, got ", rows.sizes());
  TORCH_CHECK(output_mask[0] && output_mask[1], op,
              ": stacked holds both branches, so output_mask must be [True, True]; leave one of them out");
}

inline std::vector<int64_t> branch_sizes(const at::Tensor& rows, bool stacked) {
  std::vector<int64_t> sizes = rows.sizes().vec();
  if (stacked) sizes[0] *= 2;
  return sizes;
}

inline void check_branch_gradients(const char* op, const std::optional<at::Tensor>& grad_first, const char* first_name,
                                   const std::optional<at::Tensor>& grad_second, const char* second_name,
                                   const char* rows_name, const at::Tensor& rows, bool stacked) {
  TORCH_CHECK(grad_first || grad_second, op, ": ", first_name, " or ", second_name, " must be given");
  TORCH_CHECK(!stacked || !grad_second, op, ": stacked has one gradient, ", first_name, "; leave ", second_name,
              " out");
  const auto check = [&](const char* name, const std::optional<at::Tensor>& grad) {
    if (!grad) return;
    check_float(op, name, *grad);
    const auto expected = branch_sizes(rows, stacked);
    TORCH_CHECK(grad->sizes() == at::IntArrayRef(expected), op, ": ", name, " must be ", at::IntArrayRef(expected),
                stacked ? ", both branches of " : ", the shape of ", rows_name, ", got ", grad->sizes());
    check_device(op, name, *grad, rows_name, rows);
  };
  check(first_name, grad_first);
  check(second_name, grad_second);
}

// ---- descriptions; the tensors must outlive them

constexpr Operand absent_rows{nullptr, DType::F32, 0, 0};

// A dense tensor as rows.
inline Operand dense_rows(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), dtype_of(tensor.scalar_type()), 0, 0};
}

// The second half of a dense tensor that holds both branches.
inline Operand second_half(const at::Tensor& tensor) {
  Operand rows = dense_rows(tensor);
  rows.data = static_cast<char*>(rows.data) + tensor.numel() / 2 * static_cast<int64_t>(tensor.element_size());
  return rows;
}

// [], [D] or [B, D] as numbers per channel.
inline Operand per_channel(const at::Tensor& values) {
  const int64_t dims = values.dim();
  return {const_cast<void*>(values.const_data_ptr()), dtype_of(values.scalar_type()), dims == 2 ? values.stride(0) : 0,
          dims ? values.stride(-1) : 0};
}

// bool [rows], dense: one byte per token, where a row has D numbers.
inline at::Tensor dense_mask(const std::optional<at::Tensor>& mask) {
  if (!mask) return {};
  return (mask->scalar_type() == at::kBool ? *mask : mask->ne(0)).contiguous();
}

inline const uint8_t* mask_bytes(const at::Tensor& dense) {
  return dense.defined() ? reinterpret_cast<const uint8_t*>(dense.const_data_ptr<bool>()) : nullptr;
}

inline at::Tensor nothing_like(const at::Tensor& tensor) {
  return at::empty({0}, tensor.options());
}

}  // namespace apex_fast
