// Operators of the hooked linear layer: checks, workspace, launch. Schemas and meaning: comeba_ext/ops/hooked_linear.py.
#include "hooked_linear.h"

#include <ATen/ops/linear.h>

#include "op.h"
#include "tensors.h"

namespace comeba {
namespace {

// Owns what a Decision points to.
struct DecisionTensors {
  Tensor mask, statistics, after, alpha, scale;
  Decision decision{};

  DecisionTensors(const Tensor& like, int64_t batch, int64_t seq, const OptionalTensor& mask_, const OptionalTensor& stats,
                  const Tensor& alpha_, const Tensor& scale_, c10::string_view score, DType type) {
    const bool zscore = score == "zscore";
    TORCH_CHECK(zscore || score == "reference", "comeba: unknown score ", score);
    int_of(batch * seq);
    after = at::empty(zscore ? std::vector<int64_t>{batch, 3} : std::vector<int64_t>{0}, like.options().dtype(at::kFloat));
    for (const Tensor& scalar : {alpha_, scale_}) {
      TORCH_CHECK(scalar.numel() == 1, "comeba: alpha and reference_scale are scalars");
      check_same_device(like, scalar, "alpha or reference_scale");
    }
    alpha = alpha_.to(at::kDouble);
    scale = scale_.to(at::kDouble);
    if (mask_.has_value()) {
      TORCH_CHECK(mask_->dim() == 2 && mask_->size(0) == batch && mask_->size(1) == seq, "comeba: mask must be (", batch, ", ",
                  seq, "), got ", mask_->sizes());
      check_same_device(like, *mask_, "mask");
      mask = mask_->to(at::kBool).contiguous();
      decision.mask = mask.const_data_ptr<bool>();
    }
    if (zscore && stats.has_value()) {
      TORCH_CHECK(stats->dim() == 2 && stats->size(0) == batch && stats->size(1) == 3, "comeba: statistics must be (", batch,
                  ", 3), got ", stats->sizes());
      check_same_device(like, *stats, "statistics");
      statistics = stats->to(at::kFloat).contiguous();
      decision.statistics = statistics.const_data_ptr<float>();
    }
    decision.statistics_after = after.data_ptr<float>();
    decision.alpha = alpha.const_data_ptr<double>();
    decision.reference_scale = scale.const_data_ptr<double>();
    decision.batch = static_cast<int>(batch);
    decision.seq = static_cast<int>(seq);
    decision.zscore = zscore;
    decision.slack = slack_of(type);
  }

  // With no tokens there is nothing to launch, and the statistics stay what they were.
  bool empty() {
    if (decision.batch > 0 && decision.seq > 0) return false;
    if (decision.zscore) {
      if (statistics.defined()) after.copy_(statistics);
      else after.zero_();
    }
    return true;
  }
};

Tensor workspace_of(const Tensor& like, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

// What output += x · deltaᵀ asks of its operands.
void check_edit(const Tensor& output, const Tensor& x, const Tensor& delta) {
  check_3d(x, "x");
  check_3d(output, "output");
  TORCH_CHECK(delta.dim() == 2 && delta.size(1) == x.size(2) && delta.size(0) == output.size(2) &&
                  output.size(0) == x.size(0) && output.size(1) == x.size(1),
              "comeba: output ", output.sizes(), ", x ", x.sizes(), " and delta ", delta.sizes(), " do not fit");
  TORCH_CHECK(x.scalar_type() == delta.scalar_type(), "comeba: x is ", x.scalar_type(), " but delta is ",
              delta.scalar_type());
  for (const Tensor& tensor : {x, delta}) check_same_device(output, tensor, "x or delta");
}

Tensor exact_hook_op(Tensor output, const Tensor& edit, const OptionalTensor& mask, const OptionalTensor& statistics,
                     const Tensor& alpha, const Tensor& scale, c10::string_view score) {
  check_3d(edit, "edit");
  TORCH_CHECK(output.sizes() == edit.sizes(), "comeba: output ", output.sizes(), " and edit ", edit.sizes(), " differ");
  check_same_device(output, edit, "edit");
  const DeviceGuard guard(output);
  const DType type = type_of(edit, "edit"), output_type = type_of(output, "output");
  DecisionTensors d(output, edit.size(0), edit.size(1), mask, statistics, alpha, scale, score, type);
  if (d.empty()) return d.after;
  const Tensor rows = edit.contiguous(), out = dense(output);
  const int d_out = int_of(edit.size(2));
  const Tensor workspace = workspace_of(output, exact_hook_workspace(d.decision.batch * d.decision.seq, d.decision.batch));
  check_launch(exact_hook(output_type, out.data_ptr(), type, rows.const_data_ptr(), d_out, d.decision, workspace.data_ptr(),
                          current_stream(output)));
  if (!out.is_same(output)) output.copy_(out);
  return d.after;
}

Tensor gated_hook_op(Tensor output, const Tensor& x, const Tensor& delta, const Tensor& sketch, const OptionalTensor& mask,
                     const OptionalTensor& statistics, const Tensor& alpha, const Tensor& scale, c10::string_view score) {
  check_edit(output, x, delta);
  TORCH_CHECK(sketch.dim() == 2 && sketch.size(1) == x.size(2), "comeba: sketch must be (m, ", x.size(2), "), got ",
              sketch.sizes());
  TORCH_CHECK(x.scalar_type() == sketch.scalar_type(), "comeba: x is ", x.scalar_type(), " but sketch is ",
              sketch.scalar_type());
  check_same_device(output, sketch, "sketch");
  const DeviceGuard guard(output);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const DType type = type_of(x, "x"), output_type = type_of(output, "output");
  DecisionTensors d(output, x.size(0), x.size(1), mask, statistics, alpha, scale, score, type);
  if (d.empty()) return d.after;
  const Tensor response = at::linear(x, sketch).contiguous(), out = dense(output);
  const int64_t width = loaded_width(x);
  const Tensor rows = rows_of(x, width), matrix = rows_of(delta, width);
  const Tensor workspace = workspace_of(output, gated_hook_workspace(d.decision.batch * d.decision.seq, d.decision.batch));
  check_launch(gated_hook(output_type, out.data_ptr(), type, rows.const_data_ptr(), matrix.const_data_ptr(),
                          response.const_data_ptr(), int_of(width), int_of(delta.size(0)), int_of(sketch.size(0)), d.decision,
                          workspace.data_ptr(), current_stream(output)));
  if (!out.is_same(output)) output.copy_(out);
  return d.after;
}

void add_edits_op(Tensor output, const Tensor& x, const Tensor& delta, const Tensor& scope) {
  check_edit(output, x, delta);
  TORCH_CHECK(scope.dim() == 2 && scope.size(0) == x.size(0) && scope.size(1) == x.size(1), "comeba: scope must be (",
              x.size(0), ", ", x.size(1), "), got ", scope.sizes());
  check_same_device(output, scope, "scope");
  const DeviceGuard guard(output);
  const DType type = type_of(x, "x"), output_type = type_of(output, "output");
  if (output.numel() == 0) return;
  const Tensor which = scope.to(at::kBool).contiguous(), out = dense(output);
  const int64_t width = loaded_width(x);
  const Tensor rows = rows_of(x, width), matrix = rows_of(delta, width);
  const int tokens = int_of(x.size(0) * x.size(1));
  const Tensor workspace = workspace_of(output, add_edits_workspace(tokens));
  check_launch(add_edits(output_type, out.data_ptr(), type, rows.const_data_ptr(), matrix.const_data_ptr(),
                         which.const_data_ptr<bool>(), tokens, int_of(width), int_of(delta.size(0)), workspace.data_ptr(),
                         current_stream(output)));
  if (!out.is_same(output)) output.copy_(out);
}

std::tuple<Tensor, Tensor> decode_hook_op(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& delta, const OptionalTensor& sketch, const OptionalTensor& mask,
                                          const OptionalTensor& statistics, const Tensor& alpha, const Tensor& scale,
                                          c10::string_view score) {
  check_3d(x, "x");
  TORCH_CHECK(weight.dim() == 2 && weight.sizes() == delta.sizes() && weight.size(1) == x.size(2), "comeba: weight ",
              weight.sizes(), ", delta ", delta.sizes(), " and x ", x.sizes(), " do not fit");
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "comeba: bias must be (",
              weight.size(0), ")");
  TORCH_CHECK(!sketch.has_value() || (sketch->dim() == 2 && sketch->size(1) == x.size(2) && sketch->size(0) > 0),
              "comeba: sketch must be (m, ", x.size(2), ")");
  for (const OptionalTensor& tensor : {OptionalTensor(weight), bias, OptionalTensor(delta), sketch}) {
    if (!tensor.has_value()) continue;
    check_same_device(x, *tensor, "weight, bias, delta or sketch");
    TORCH_CHECK(tensor->scalar_type() == x.scalar_type(), "comeba: x is ", x.scalar_type(), " but a matrix is ",
                tensor->scalar_type());
  }
  const DeviceGuard guard(x);
  const DType type = type_of(x, "x");
  const Tensor output = at::empty({x.size(0), x.size(1), weight.size(0)}, x.options());
  DecisionTensors d(x, x.size(0), x.size(1), mask, statistics, alpha, scale, score, type);
  if (d.empty() || output.numel() == 0) return {output, d.after};
  const int64_t width = loaded_width(x);
  const Tensor rows = rows_of(x, width), base = rows_of(weight, width), matrix = rows_of(delta, width);
  const Tensor deciding = sketch.has_value() ? rows_of(*sketch, width) : Tensor();
  const Tensor added = bias.has_value() ? bias->contiguous() : Tensor();
  const int d_out = int_of(weight.size(0)), sketch_rows = sketch.has_value() ? int_of(sketch->size(0)) : 0;
  const int tokens = d.decision.batch * d.decision.seq;
  const Tensor workspace = workspace_of(x, decode_hook_workspace(tokens, d_out, sketch_rows, type));
  check_launch(decode_hook(type, output.data_ptr(), rows.const_data_ptr(), base.const_data_ptr(),
                           added.defined() ? added.const_data_ptr() : nullptr, matrix.const_data_ptr(),
                           deciding.defined() ? deciding.const_data_ptr() : nullptr, int_of(width), d_out, sketch_rows,
                           d.decision, workspace.data_ptr(), current_stream(x)));
  return {output, d.after};
}

}  // namespace

TORCH_LIBRARY_IMPL(comeba, COMEBA_DISPATCH_KEY, m) {
  m.impl("exact_hook_", &exact_hook_op);
  m.impl("gated_hook_", &gated_hook_op);
  m.impl("add_edits_", &add_edits_op);
  m.impl("decode_hook", &decode_hook_op);
}

}  // namespace comeba
