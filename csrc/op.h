// What the files that register operators share. Schemas are Python's (comeba_ext/ops); here are implementations only:
// for CUDA tensors, or with -DCOMEBA_EMULATE for CPU tensors, by the same kernels run on the host.
#pragma once

// Not ATen.h, which declares every operator there is: a file that uses it takes half as long again to compile.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#if defined(COMEBA_EMULATE)
#define COMEBA_DISPATCH_KEY CPU
#else
#include <c10/cuda/CUDAStream.h>
#define COMEBA_DISPATCH_KEY CUDA
#endif

namespace comeba {

// Kernels launched in this scope run on the tensor's device.
class DeviceGuard {
 public:
  explicit DeviceGuard(const at::Tensor& tensor) : guard_(tensor.device()) {}

 private:
  c10::DeviceGuard guard_;
};

// The stream that torch uses for the tensor's device now, a cudaStream_t.
inline void* current_stream([[maybe_unused]] const at::Tensor& tensor) {
#if defined(COMEBA_EMULATE)
  return nullptr;
#else
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
#endif
}

}  // namespace comeba
