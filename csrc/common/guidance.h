#pragma once

#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "common/checks.h"

namespace apex_fast {

inline void check_guidance(const char* op, const std::optional<at::Tensor>& v_uncond, double guidance_scale,
                           const char* reference_name, const at::Tensor& reference) {
  if (v_uncond) check_sample(op, "v_uncond", *v_uncond, reference_name, reference);
  TORCH_CHECK(v_uncond || guidance_scale == 1.0, op, ": guidance_scale ", guidance_scale,
              " needs v_uncond, the velocity under the negative condition; pass it, or leave guidance_scale at 1");
}

}  // namespace apex_fast
