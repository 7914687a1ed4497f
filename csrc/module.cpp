// The Python module of the compiled library: importing it registers the operators; build() tells how it was built.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#if !defined(COMEBA_EMULATE)
#include <cuda_runtime_api.h>
#endif

#if !defined(COMEBA_ARCH)
#define COMEBA_ARCH ""
#endif

PYBIND11_MODULE(COMEBA_MODULE, module) {
  module.def("build", [] {
    pybind11::dict build;
    build["torch"] = TORCH_VERSION;
    build["arch"] = COMEBA_ARCH;
#if defined(COMEBA_EMULATE)
    build["emulated"] = true;
    build["cuda"] = pybind11::none();
#else
    build["emulated"] = false;
    build["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#endif
    return build;
  });
}
