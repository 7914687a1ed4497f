// Launcher of the edits of what a text names, on raw device pointers; meaning: comeba_ext/ops/subject_hook.py.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace comeba {

// What is known of the edited subjects and of their keys. All pointers are device pointers.
struct Subjects {
  const int64_t* names;     // (names_count), sorted hashes
  const int64_t* of_name;   // their shards
  const int64_t* ends;      // (ends_count), sorted hashes of last tokens
  const int64_t* of_end;    // their shards
  const int64_t* first;     // (shards): where a shard's anchors begin
  const int64_t* count;     // (shards): how many there are
  const float* thresholds;  // (keys)
  const float* named_thresholds;
  int names_count;
  int ends_count;
  int longest;  // hashes a token has
};

// What is added in scope: Σ_j left[r_j] (right[r_j] · x) over the rows r of a token's shard.
struct Factors {
  const int64_t* rows;  // (shards, width), negative where there is none
  const void* left;     // (any, d_out)
  const void* right;    // (any, d_in)
  int width;
};

struct SubjectScope {
  const int64_t* hashes;  // (tokens, longest)
  const void* projected;  // (tokens, rows), x under the projection
  const void* anchors;    // (keys, rows)
  const bool* mask;       // (tokens), may be null
  const double* alpha;    // scalar
  float slack;            // share of alpha within which a score counts as reaching it
  int rows;
  int coarse;   // of the rows, those that are normalised apart, and that a first look is at
  float above;  // how far above the coarse cosine one may lie
};

// output (tokens, d_out) += the edits of the tokens in scope; returns nullptr, or why nothing was launched.
const char* subject_hook(DType output_type, void* output, DType type, const void* x, SubjectScope scope, Subjects subjects,
                         Factors factors, int tokens, int d_in, int d_out, void* stream);

}  // namespace comeba
