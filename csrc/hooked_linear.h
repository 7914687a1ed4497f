// Launchers of the hooked linear layer, on raw device pointers. The operators' meaning is defined by
// comeba_ext/ops/hooked_linear.py; every launcher returns nullptr, or the reason why nothing was launched.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace comeba {

// What turns norms into scope. All pointers are device pointers; those of optional tensors may be null.
struct Decision {
  const bool* mask;               // (batch, seq), true at real tokens
  const float* statistics;        // (batch, 3): count, mean, squared deviations of the earlier tokens
  float* statistics_after;        // (batch, 3); written for the z-score, untouched otherwise
  const double* alpha;            // scalar
  const double* reference_scale;  // scalar
  int batch;
  int seq;
  bool zscore;  // else the reference score
  float slack;  // share of alpha within which a score counts as reaching it
};

// Bytes of workspace that each launcher wants; it need not be initialised.
size_t exact_hook_workspace(int tokens, int batch);
size_t gated_hook_workspace(int tokens, int batch);
size_t add_edits_workspace(int tokens);
size_t decode_hook_workspace(int tokens, int d_out, int sketch_rows, DType type);

// output (tokens, d_out) += edit (tokens, d_out) for the tokens in scope.
const char* exact_hook(DType output_type, void* output, DType edit_type, const void* edit, int d_out, Decision decision,
                       void* workspace, void* stream);

// output (tokens, d_out) += x (tokens, d_in) · deltaᵀ for the tokens that response (tokens, m) = x · sketchᵀ puts in scope.
const char* gated_hook(DType output_type, void* output, DType type, const void* x, const void* delta, const void* response,
                       int d_in, int d_out, int sketch_rows, Decision decision, void* workspace, void* stream);

// The same for the tokens of scope (tokens).
const char* add_edits(DType output_type, void* output, DType type, const void* x, const void* delta, const bool* scope,
                      int tokens, int d_in, int d_out, void* workspace, void* stream);

// output (tokens, d_out) = x · weightᵀ + bias, + x · deltaᵀ in scope; at most 64 tokens. sketch may be null.
const char* decode_hook(DType type, void* output, const void* x, const void* weight, const void* bias, const void* delta,
                        const void* sketch, int d_in, int d_out, int sketch_rows, Decision decision, void* workspace,
                        void* stream);

}  // namespace comeba
