// The edits of what a text names: a block a token. Almost every block finds that no name ends in its token, and is done.
#pragma once
#include "device.cuh"
#include "subject_hook.h"

namespace comeba {

constexpr int kSubjectThreads = 128;
constexpr int kSubjectWarps = kSubjectThreads / 32;

// Numbers of the sorted `values` that are less than `value`, or with `or_equal` at most as large.
__device__ inline int place_of(const int64_t* values, int count, int64_t value, bool or_equal) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (values[middle] < value || (or_equal && values[middle] == value)) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The shard of the longest name that ends here, -1: none does. One whole warp; a lane a length.
__device__ inline int64_t named_shard(const Subjects& s, const int64_t* hashes) {
  const int lane = threadIdx.x % 32;
  int64_t shard = -1;
  if (lane < s.longest && s.names_count > 0) {
    const int place = place_of(s.names, s.names_count, hashes[lane], false);
    if (place < s.names_count && s.names[place] == hashes[lane]) shard = s.of_name[place];
  }
  const unsigned found = __ballot_sync(0xffffffffu, shard >= 0);
  if (found == 0) return -1;
  const int longest = 31 - __clz(found);
  const int low = __shfl_sync(0xffffffffu, static_cast<int>(shard), longest);
  return low;
}

// The best pair of a token and a key so far; of equal ones the first.
struct Best {
  float rank;
  int place;  // among the ends
};

__device__ __forceinline__ bool better(const Best& one, const Best& other) {
  return one.rank > other.rank || (one.rank == other.rank && one.place < other.place);
}

// A named subject's score that is in scope comes before all others: cosines differ by less.
constexpr float kNamedFirst = 4.f;

template <typename T>
__global__ void __launch_bounds__(kSubjectThreads)
    subject_hook_kernel(Values output, const T* x, SubjectScope scope, Subjects s, Factors factors, int d_in, int d_out) {
  COMEBA_DYNAMIC_SHARED(float, unit);  // (rows), then (factors.width) what each factor gives
  __shared__ float scratch[32];
  __shared__ Best bests[kSubjectWarps];
  __shared__ int range[3];
  const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t* hashes = scope.hashes + static_cast<size_t>(token) * s.longest;
  if (warp == 0) {
    const bool real = scope.mask == nullptr || scope.mask[token];
    const int bound = real && lane < 2 ? place_of(s.ends, s.ends_count, hashes[0], lane == 1) : 0;
    if (lane < 2) range[lane] = bound;
    __syncwarp();
    const int64_t named = range[0] < range[1] ? named_shard(s, hashes) : -1;
    if (lane == 0) range[2] = static_cast<int>(named);
  }
  __syncthreads();
  const int low = range[0], high = range[1], named = range[2];
  if (low >= high) return;

  // The direction of the token's input: its two parts are normalised apart, and rounded as the anchors are.
  const T* projected = static_cast<const T*>(scope.projected) + static_cast<size_t>(token) * scope.rows;
  for (int part = 0; part < 2; ++part) {
    const int begin = part == 0 ? 0 : scope.coarse, end = part == 0 ? scope.coarse : scope.rows;
    float squares = 0;
    for (int i = begin + threadIdx.x; i < end; i += kSubjectThreads) squares += to_float(projected[i]) * to_float(projected[i]);
    const float norm = sqrtf(block_sum(squares, scratch));
    const float factor = sqrtf(static_cast<float>(end - begin) / static_cast<float>(scope.rows)) / fmaxf(norm, 1e-12f);
    for (int i = begin + threadIdx.x; i < end; i += kSubjectThreads) unit[i] = to_float(from_float<T>(to_float(projected[i]) * factor));
  }
  __syncthreads();

  // A warp takes every fourth subject that ends here, key by key.
  const double exact = *scope.alpha, sign = (exact > 0) - (exact < 0);
  const float alpha = static_cast<float>(exact), limit = static_cast<float>(exact * (1.0 - scope.slack * sign));
  const float coarse_share = static_cast<float>(scope.rows) / static_cast<float>(scope.coarse);
  Best best{-kNamedFirst, s.ends_count};
  for (int place = low + warp; place < high; place += kSubjectWarps) {
    const int shard = static_cast<int>(s.of_end[place]);
    const int64_t begin = s.first[shard], end = begin + s.count[shard];
    for (int64_t key = begin; key < end; ++key) {
      const T* anchor = static_cast<const T*>(scope.anchors) + key * scope.rows;
      const bool own = shard == named;
      const float asked = fmaxf((own ? s.named_thresholds : s.thresholds)[key] - alpha, 0.f);
      float cosine = 0;
      for (int i = lane; i < scope.coarse; i += 32) cosine += unit[i] * to_float(anchor[i]);
      if (!own && !(warp_sum(cosine) * coarse_share + scope.above - asked >= limit)) continue;
      for (int i = scope.coarse + lane; i < scope.rows; i += 32) cosine += unit[i] * to_float(anchor[i]);
      const float score = warp_sum(cosine) - asked;
      const float rank = own && score >= limit ? score + kNamedFirst : score;
      if (better({rank, place}, best)) best = {rank, place};
    }
  }
  if (lane == 0) bests[warp] = best;
  __syncthreads();
  for (int other = 0; other < kSubjectWarps; ++other)
    if (better(bests[other], best)) best = bests[other];
  const float score = best.rank > kNamedFirst / 2 ? best.rank - kNamedFirst : fmaxf(best.rank, 0.f);
  if (best.place == s.ends_count || !(score >= limit)) return;

  const int64_t* rows = factors.rows + s.of_end[best.place] * factors.width;
  float* share = unit + scope.rows;
  for (int j = 0; j < factors.width; ++j) {
    if (rows[j] < 0) continue;
    const T* right = static_cast<const T*>(factors.right) + rows[j] * d_in;
    const T* own = x + static_cast<size_t>(token) * d_in;
    float sum = 0;
    for (int i = threadIdx.x; i < d_in; i += kSubjectThreads) sum += to_float(right[i]) * to_float(own[i]);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) share[j] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < d_out; i += kSubjectThreads) {
    float edit = 0;
    for (int j = 0; j < factors.width; ++j)
      if (rows[j] >= 0) edit += to_float((static_cast<const T*>(factors.left) + rows[j] * d_out)[i]) * share[j];
    add_to(output, static_cast<size_t>(token) * d_out + i, to_float(from_float<T>(edit)));
  }
}

}  // namespace comeba
