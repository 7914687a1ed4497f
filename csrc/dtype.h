// The number types that kernels store: they compute in float.
#pragma once

namespace comeba {

enum class DType { f32, f16, bf16 };

}  // namespace comeba
