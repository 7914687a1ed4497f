// The operator of the edits of what a text names: checks, the projection, launch. Schema: comeba_ext/ops/subject_hook.py.
#include "subject_hook.h"

#include <ATen/ops/linear.h>

#include "op.h"
#include "tensors.h"

namespace comeba {
namespace {

// As in ops/nearest_hook.py.
constexpr int kCoarse = 96;
constexpr float kAbove = 0.17f;

void subject_hook_op(Tensor output, const Tensor& x, const Tensor& hashes, const Tensor& projection, const Tensor& anchors,
                     const Tensor& thresholds, const Tensor& named_thresholds, const OptionalTensor& mask,
                     const Tensor& alpha, const Tensor& names, const Tensor& of_name, const Tensor& ends,
                     const Tensor& of_end, const Tensor& first, const Tensor& count, int64_t /*shared*/, int64_t /*width*/,
                     const Tensor& rows, const Tensor& left, const Tensor& right) {
  check_3d(x, "x");
  check_3d(output, "output");
  const int64_t d_in = x.size(2), d_out = output.size(2), directions = projection.size(0);
  TORCH_CHECK(output.size(0) == x.size(0) && output.size(1) == x.size(1) && hashes.dim() == 3 &&
                  hashes.size(0) == x.size(0) && hashes.size(1) == x.size(1) && hashes.size(2) <= 32,
              "comeba: output ", output.sizes(), ", x ", x.sizes(), " and hashes ", hashes.sizes(), " do not fit");
  TORCH_CHECK(projection.dim() == 2 && projection.size(1) == d_in && anchors.dim() == 2 && anchors.size(1) == directions &&
                  thresholds.sizes() == at::IntArrayRef({anchors.size(0)}) && thresholds.sizes() == named_thresholds.sizes(),
              "comeba: projection ", projection.sizes(), ", anchors ", anchors.sizes(), " and thresholds ",
              thresholds.sizes(), " do not fit");
  TORCH_CHECK(rows.dim() == 2 && left.dim() == 2 && left.size(1) == d_out && right.dim() == 2 && right.size(1) == d_in,
              "comeba: factors ", left.sizes(), " and ", right.sizes(), " do not fit");
  for (const Tensor& tensor : {projection, anchors, left, right})
    TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "comeba: x is ", x.scalar_type(), " but a matrix is ",
                tensor.scalar_type());
  for (const Tensor& tensor : {hashes, names, of_name, ends, of_end, first, count, rows})
    TORCH_CHECK(tensor.scalar_type() == at::kLong, "comeba: hashes and shards are int64, got ", tensor.scalar_type());
  TORCH_CHECK(names.sizes() == of_name.sizes() && ends.sizes() == of_end.sizes() && first.sizes() == count.sizes() &&
                  rows.size(0) >= first.size(0),
              "comeba: names, ends and shards do not fit");
  TORCH_CHECK(alpha.numel() == 1, "comeba: alpha is a scalar");
  for (const Tensor& tensor : {output, hashes, projection, anchors, thresholds, named_thresholds, alpha, names, of_name, ends,
                               of_end, first, count, rows, left, right})
    check_same_device(x, tensor, "an operand");
  const DeviceGuard guard(output);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const DType type = type_of(x, "x"), output_type = type_of(output, "output");
  const int tokens = int_of(x.size(0) * x.size(1));
  if (output.numel() == 0 || ends.numel() == 0 || first.numel() == 0 || directions == 0) return;

  const Tensor own = x.contiguous(), out = dense(output), text = hashes.contiguous();
  const Tensor projected = at::linear(own, projection).contiguous(), keys = anchors.contiguous();
  const Tensor far = thresholds.to(at::kFloat).contiguous(), near = named_thresholds.to(at::kFloat).contiguous();
  const Tensor exact = alpha.to(at::kDouble), table = rows.contiguous(), l = left.contiguous(), r = right.contiguous();
  Tensor real;
  if (mask.has_value()) {
    TORCH_CHECK(mask->numel() == tokens, "comeba: mask must have ", tokens, " entries, got ", mask->sizes());
    check_same_device(x, *mask, "mask");
    real = mask->to(at::kBool).contiguous();
  }
  const Tensor tables[] = {names.contiguous(), of_name.contiguous(), ends.contiguous(),
                           of_end.contiguous(), first.contiguous(),  count.contiguous()};
  const auto pointer = [&](int n) { return tables[n].const_data_ptr<int64_t>(); };
  const Subjects subjects{pointer(0),
                          pointer(1),
                          pointer(2),
                          pointer(3),
                          pointer(4),
                          pointer(5),
                          far.const_data_ptr<float>(),
                          near.const_data_ptr<float>(),
                          int_of(names.numel()),
                          int_of(ends.numel()),
                          int_of(hashes.size(2))};
  const SubjectScope scope{text.const_data_ptr<int64_t>(),
                           projected.const_data_ptr(),
                           keys.const_data_ptr(),
                           real.defined() ? real.const_data_ptr<bool>() : nullptr,
                           exact.const_data_ptr<double>(),
                           slack_of(type),
                           int_of(directions),
                           int_of(kCoarse < directions && directions < d_in ? kCoarse : directions),
                           kAbove};
  const Factors factors{table.const_data_ptr<int64_t>(), l.const_data_ptr(), r.const_data_ptr(), int_of(rows.size(1))};
  check_launch(subject_hook(output_type, out.data_ptr(), type, own.const_data_ptr(), scope, subjects, factors, tokens,
                            int_of(d_in), int_of(d_out), current_stream(output)));
  if (!out.is_same(output)) output.copy_(out);
}

}  // namespace

TORCH_LIBRARY_IMPL(comeba, COMEBA_DISPATCH_KEY, m) { m.impl("subject_hook_", &subject_hook_op); }

}  // namespace comeba
