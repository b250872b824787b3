// What the torch glue of the row ops shares: both branches of a condition, and the gradients of parameters.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>

#include "common/rows.h"
#include "cuda/glue.h"
#include "cuda/kernels.h"

namespace apex_fast::cuda {

// The outputs for the real and the shifted branch: two tensors, or one with both if stacked.
struct Branches {
  at::Tensor first, second;

  Branches(const at::Tensor& rows, bool stacked, std::array<bool, 2> output_mask)
      : stacked_(stacked), mask_(output_mask) {
    const auto make = [&](bool wanted) {
      return wanted ? at::empty(branch_sizes(rows, stacked), rows.options()) : nothing_like(rows);
    };
    first = make(output_mask[0]);
    second = make(output_mask[1] && !stacked);
  }

  bool any() const { return mask_[0] || mask_[1]; }
  Operand real() const { return mask_[0] ? dense_rows(first) : absent_rows; }
  Operand shifted() const {
    if (stacked_) return second_half(first);
    return mask_[1] ? dense_rows(second) : absent_rows;
  }

 private:
  bool stacked_;
  std::array<bool, 2> mask_;
};

// Their upstream gradients, dense.
class BranchGradients {
 public:
  BranchGradients(const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& second, bool stacked)
      : first_(first ? first->contiguous() : at::Tensor()),
        second_(second ? second->contiguous() : at::Tensor()),
        stacked_(stacked) {}

  bool wide() const {
    const auto is_double = [](const at::Tensor& grad) { return grad.defined() && grad.scalar_type() == at::kDouble; };
    return is_double(first_) || is_double(second_);
  }
  Operand real() const { return first_.defined() ? dense_rows(first_) : absent_rows; }
  Operand shifted() const {
    if (stacked_) return second_half(first_);
    return second_.defined() ? dense_rows(second_) : absent_rows;
  }

 private:
  at::Tensor first_, second_;
  bool stacked_;
};

// Gradients that are sums over rows: tensors like their parameters, [0] where not wanted, zero where there are no rows.
template <size_t Count>
struct ParameterGradients {
  std::array<at::Tensor, Count> tensors;
  ColumnGradient gradients[Count];
  // Before add(): how many numbers of workspace a sum takes, and their type.
  std::function<int64_t(bool is_vector)> numbers;
  at::ScalarType partials_type = at::kDouble;

  explicit ParameterGradients(bool empty) : empty_(empty) {}

  void add(int k, bool wanted, const at::Tensor& parameter, at::ScalarType type) {
    const auto options = parameter.options().dtype(type);
    if (!wanted || empty_) {
      tensors[k] = wanted ? at::zeros(parameter.sizes(), options) : at::empty({0}, options);
      return;
    }
    const bool is_vector = parameter.dim() > 0;
    tensors[k] = at::empty(parameter.sizes(), options);
    partials_[k] = at::empty({numbers(is_vector)}, parameter.options().dtype(partials_type));
    gradients[k] = {partials_[k].mutable_data_ptr(), tensors[k].mutable_data_ptr(), dtype_of(type), is_vector};
  }

  bool any() const {
    return std::any_of(partials_.begin(), partials_.end(), [](const at::Tensor& t) { return t.defined(); });
  }

 private:
  bool empty_;
  std::array<at::Tensor, Count> partials_;
};

}  // namespace apex_fast::cuda
