// From torch tensors [B, ...] to the Geometry and Operands of a kernel, without a copy wherever the memory allows it.
//
// The primary tensor decides the order in which memory is walked:
//   - each sample dense in some order of its dimensions, the batch dimension anywhere outside (contiguous,
//   channels_last, a slice of the
//     batch, expanded over the batch): one block per sample, a batch stride per operand;
//   - the whole tensor dense with the batch dimension inside (x.transpose(0, 1)): [outer, B, inner];
//   - anything else (a slice of the channels, say) is copied once into a dense tensor, and so is any other operand
//   whose samples are not
//     laid out as the primary's. These are the only copies that the ops make.
#pragma once

#include <algorithm>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include "common/checks.h"
#include "common/geometry.h"

namespace apex_fast {

class SampleLayout {
 public:
  explicit SampleLayout(const at::Tensor& primary) : like_(primary) {
    if (!adopt(primary)) {
      like_ = at::empty_like(primary);
      TORCH_INTERNAL_ASSERT(adopt(like_));
      source_ = primary;
    }
  }

  static constexpr Operand absent{nullptr, DType::F32, 0, 0};

  const Geometry& geometry() const { return geometry_; }

  // `tensor` has the primary's shape. Keeps whatever it has to copy alive as long as the layout lives.
  Operand operand(const at::Tensor& tensor) {
    if (matches(tensor)) return describe(tensor);
    at::Tensor copy = at::empty_like(like_, like_.options().dtype(tensor.scalar_type()));
    copy.copy_(tensor);
    copies_.push_back(copy);
    return describe(copy);
  }

  Operand operand(const std::optional<at::Tensor>& tensor) { return tensor ? operand(*tensor) : absent; }

  // For writing: `tensor` comes from make().
  Operand output(const at::Tensor& tensor) const {
    TORCH_INTERNAL_ASSERT(matches(tensor));
    return describe(tensor);
  }

  // A new dense tensor in the primary's order.
  at::Tensor make(at::ScalarType type) const {
    const at::Tensor& like = source_.defined() ? source_ : like_;
    return at::empty_like(like, like.options().dtype(type));
  }

 private:
  Operand describe(const at::Tensor& tensor) const {
    // Nothing is written through the operands of inputs; one struct for both keeps the kernel interface small.
    void* const data = const_cast<void*>(tensor.const_data_ptr());
    const int64_t batch_stride = tensor.size(0) > 1 ? tensor.stride(0) : 0;
    return {data, dtype_of(tensor.scalar_type()), batch_stride,
            geometry_.outer == 1 ? 0 : geometry_.batch * geometry_.inner};
  }

  bool adopt(const at::Tensor& tensor) {
    geometry_ = {tensor.size(0), 1, 1};
    for (int64_t d = 1; d < tensor.dim(); ++d)
      geometry_.inner *= tensor.size(d);
    strides_.assign(tensor.strides().begin(), tensor.strides().end());
    if (tensor.numel() == 0) return true;
    std::vector<int64_t> order;  // dimensions of a sample, slowest first
    for (int64_t d = 1; d < tensor.dim(); ++d)
      if (tensor.size(d) > 1) order.push_back(d);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return tensor.stride(a) > tensor.stride(b); });

    int64_t expected = 1;
    bool dense = true;
    for (auto d = order.rbegin(); d != order.rend(); ++d) {
      dense = dense && tensor.stride(*d) == expected;
      expected *= tensor.size(*d);
    }
    if (dense) {
      // Outputs come from empty_like, which must lay the samples out as here; after a slice or an expand that is not
      // certain.
      return tensor.is_non_overlapping_and_dense() ||
             matches(at::empty_like(tensor, tensor.options().device(at::kMeta)));
    }
    if (!tensor.is_non_overlapping_and_dense()) return false;
    // Dense as a whole, so the batch dimension lies between the dimensions of a sample.
    geometry_.inner = tensor.stride(0);
    geometry_.outer = tensor.numel() / (geometry_.batch * geometry_.inner);
    return true;
  }

  bool matches(const at::Tensor& tensor) const {
    if (tensor.numel() == 0) return true;
    for (int64_t d = 1; d < tensor.dim(); ++d)
      if (tensor.size(d) > 1 && tensor.stride(d) != strides_[d]) return false;
    return geometry_.outer == 1 || tensor.size(0) <= 1 || tensor.stride(0) == strides_[0];
  }

  at::Tensor like_;    // what the strides below describe
  at::Tensor source_;  // the primary, where it had to be copied
  std::vector<int64_t> strides_;
  std::vector<at::Tensor> copies_;
  Geometry geometry_{};
};

inline Times times_of(const at::Tensor& times) {
  return {times.const_data_ptr(), dtype_of(times.scalar_type()), times.size(0) > 1 ? times.stride(0) : 0};
}

// fp64 as soon as one tensor is fp64, else fp32.
template <class... Tensors>
at::ScalarType compute_type(const Tensors&... tensors) {
  const auto is_double = [](const auto& tensor) {
    if constexpr (std::is_same_v<std::decay_t<decltype(tensor)>, at::Tensor>)
      return tensor.scalar_type() == at::kDouble;
    else
      return tensor.has_value() && tensor->scalar_type() == at::kDouble;
  };
  return (is_double(tensors) || ...) ? at::kDouble : at::kFloat;
}

}  // namespace apex_fast
