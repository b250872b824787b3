// apex_fast._build: how the library was built. Includes no torch header and links no torch library, so that it can be
// read where the op library does not load, and say why.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_config.h"

namespace py = pybind11;

namespace {

py::tuple split(const char* semicolon_separated) {
  py::list items;
  std::istringstream stream(semicolon_separated);
  for (std::string item; std::getline(stream, item, ';');)
    if (!item.empty()) items.append(item);
  return py::tuple(items);
}

py::dict facts() {
  return py::dict(py::arg("torch_version") = APEX_BUILD_TORCH_VERSION,
                  py::arg("cuda_version") = APEX_BUILD_CUDA_VERSION,
                  py::arg("cuda_decision") = APEX_BUILD_CUDA_DECISION,
                  py::arg("cuda_architectures") = split(APEX_BUILD_CUDA_ARCHITECTURES),
                  py::arg("cuda_ops") = split(APEX_BUILD_CUDA_OPS), py::arg("compiler") = APEX_BUILD_COMPILER,
                  py::arg("build_type") = APEX_BUILD_TYPE, py::arg("cpu_isas") = split(APEX_BUILD_CPU_ISAS));
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "How the compiled part of apex_fast was built.";
  m.attr("torch_version") = APEX_BUILD_TORCH_VERSION;
  m.def("facts", &facts, "All facts by name: torch and CUDA versions, compiler, instruction sets, CUDA decision.");
}
