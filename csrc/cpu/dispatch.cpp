#include <cstdlib>
#include <string>

#include <c10/util/Exception.h>

#include "cpu/kernels.h"

namespace apex_fast::cpu {

namespace {

const KernelTable& choose() {
  const char* setting = std::getenv("APEX_FAST_CPU_ISA");
  const std::string limit = setting ? setting : "";
  TORCH_CHECK(limit.empty() || limit == "default" || limit == "avx2" || limit == "avx512",
              "APEX_FAST_CPU_ISA must be default, avx2 or avx512, got '", limit,
              "'; unset it to use the best that this processor has");
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && (limit.empty() || limit == "avx512")) return table_avx512();
  if (avx2 && limit != "default") return table_avx2();
#endif
  return table_default();
}

}  // namespace

const KernelTable& table() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace apex_fast::cpu
