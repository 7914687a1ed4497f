// What operators ask of their tensors before a kernel gets their pointers.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>

#include "dtype.h"

namespace comeba {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    default: TORCH_CHECK(false, "comeba: ", name, " must be float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

// The same share of alpha as SLACK in ops/hooked_linear.py.
inline float slack_of(DType type) { return type == DType::f32 ? 1e-5f : type == DType::f16 ? 4e-3f : 3e-2f; }

inline void check_same_device(const Tensor& expected, const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.device() == expected.device(), "comeba: ", name, " is on ", tensor.device(), ", expected ",
              expected.device());
}

// Dense rows that start at 16-byte boundaries, as the kernels load them.
inline Tensor rows_of(const Tensor& tensor, int64_t width) {
  Tensor rows = tensor.reshape({-1, tensor.size(-1)});
  if (width > tensor.size(-1)) rows = at::constant_pad_nd(rows, {0, width - tensor.size(-1)});
  rows = rows.contiguous();
  return reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 == 0 ? rows : rows.clone();
}

// The width of rows that kernels load in chunks of 16 bytes.
inline int64_t loaded_width(const Tensor& x) {
  const int64_t chunk = 16 / x.element_size();
  return (x.size(-1) + chunk - 1) / chunk * chunk;
}

inline int int_of(int64_t value) {
  TORCH_CHECK(value < (int64_t{1} << 31), "comeba: a dimension of ", value, " is too large");
  return static_cast<int>(value);
}

inline void check_launch(const char* error) { TORCH_CHECK(error == nullptr, "comeba: kernel launch failed: ", error); }

// The output as dense rows: itself where it is dense, else a copy to be written back.
inline Tensor dense(const Tensor& output) { return output.is_contiguous() ? output : output.contiguous(); }

inline void check_3d(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.dim() == 3, "comeba: ", name, " must be (batch, seq, width), got ", tensor.sizes());
}

}  // namespace comeba
