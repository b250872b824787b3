// c_fake = A c + b (APEX, Eq. 9) for one channel.
#pragma once

#include "common/macros.h"

namespace apex_fast::math {

template <class V>
APEX_HD V condition_shift(V condition, V scale, V bias) {
  return scale * condition + bias;
}

}  // namespace apex_fast::math
