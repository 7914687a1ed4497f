// The operator comeba::cholesky_update_: checks, workspace, launch. Schema and meaning: comeba_ext/ops/cholesky_update.py.
#include "cholesky_update.h"

#include <ATen/ops/zeros.h>

#include "op.h"

namespace comeba {
namespace {

using at::Tensor;

Tensor cholesky_update_op(Tensor factor, const Tensor& k, int64_t sign) {
  TORCH_CHECK(factor.dim() >= 2 && factor.size(-1) == factor.size(-2) && k.dim() == factor.dim() &&
                  k.sizes().slice(0, k.dim() - 1) == factor.sizes().slice(0, k.dim() - 1),
              "comeba: factor ", factor.sizes(), " and k ", k.sizes(), " must be (..., d, d) and (..., d, u)");
  TORCH_CHECK(factor.scalar_type() == at::kFloat || factor.scalar_type() == at::kDouble,
              "comeba: factor must be float32 or float64, got ", factor.scalar_type());
  TORCH_CHECK(k.scalar_type() == factor.scalar_type() && k.device() == factor.device(), "comeba: k is ", k.scalar_type(),
              " on ", k.device(), ", the factor ", factor.scalar_type(), " on ", factor.device());
  TORCH_CHECK(sign == 1 || sign == -1, "comeba: sign must be 1 or -1, got ", sign);
  const Tensor info = at::zeros(factor.sizes().slice(0, factor.dim() - 2), factor.options().dtype(at::kInt));
  const int64_t d = factor.size(-1), u = k.size(-1), batch = info.numel();
  if (d == 0 || u == 0 || batch == 0) return info;
  TORCH_CHECK(d < (1 << 30) && u < (1 << 30) && batch < (1 << 16), "comeba: too large: batch ", batch, ", d ", d, ", u ", u);
  const DeviceGuard guard(factor);
  const Tensor dense = factor.contiguous(), keys = k.contiguous();
  const size_t bytes = cholesky_update_workspace(static_cast<int>(batch), static_cast<int>(d), static_cast<int>(u),
                                                 factor.element_size());
  const Tensor workspace = at::empty({static_cast<int64_t>(bytes)}, factor.options().dtype(at::kByte));
  const char* error = cholesky_update(factor.scalar_type() == at::kDouble, dense.data_ptr(), keys.const_data_ptr(),
                                      static_cast<int>(batch), static_cast<int>(d), static_cast<int>(u),
                                      static_cast<int>(sign), info.data_ptr<int>(), workspace.data_ptr(),
                                      current_stream(factor));
  TORCH_CHECK(error == nullptr, "comeba: kernel launch failed: ", error);
  if (!dense.is_same(factor)) factor.copy_(dense);
  return info;
}

}  // namespace

TORCH_LIBRARY_IMPL(comeba, COMEBA_DISPATCH_KEY, m) { m.impl("cholesky_update_", &cholesky_update_op); }

}  // namespace comeba
