// APEX_FAST_KERNELS=reference asks for the plain torch twins on every device: then no compiled kernel registers itself.
#pragma once

#include <torch/library.h>

#include <cstdlib>
#include <cstring>

namespace apex_fast {

inline bool kernels_wanted() {
  const char* setting = std::getenv("APEX_FAST_KERNELS");
  return !setting || std::strcmp(setting, "reference") != 0;
}

}  // namespace apex_fast

// APEX_FAST_KERNELS_FOR(CPU, m) { m.impl(...); }
#define APEX_FAST_KERNELS_FOR(device, m)                        \
  static void register_kernels(torch::Library& m);              \
  TORCH_LIBRARY_IMPL(apex_fast, device, library) {              \
    if (apex_fast::kernels_wanted()) register_kernels(library); \
  }                                                             \
  static void register_kernels(torch::Library& m)
