// What the kernels of the hooked linear layer share: tickets, and the decision. The kernels: hooked_linear_scope.cuh,
// hooked_linear_products.cuh, hooked_linear_decode.cuh.
//
// Scheduling. A decision needs every norm of a sequence (z-score) or every row of a token (norm), which different blocks
// compute. Blocks draw tickets, in order: first those that produce, then those that wait for what was produced. Whoever
// holds a waiting ticket knows that every producing ticket was drawn by a block that is running already, so waiting never
// deadlocks, whatever number of blocks fits on the device, and one plain launch does it all.
#pragma once
#include "device.cuh"
#include "hooked_linear.h"

namespace comeba {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kDecodeTokens = 64;

// The block's next ticket; everything that its threads did for the last one is done.
__device__ inline unsigned draw(unsigned* ticket) {
  __shared__ unsigned drawn;
  __syncthreads();
  if (threadIdx.x == 0) drawn = atomicAdd(ticket, 1u);
  __syncthreads();
  return drawn;
}

// -- decision ---------------------------------------------------------------------------------------------------------

struct Deviation {
  float mean;
  float std;  // 0 where none is defined
};

__device__ __forceinline__ bool is_real(const Decision& d, int token) { return d.mask == nullptr || d.mask[token]; }

// Mean and standard deviation of a sequence's norms, its earlier tokens included (ops/hooked_linear.py, zscore); one
// whole warp. Norms are read past the L1 cache: other blocks wrote them.
__device__ inline Deviation deviation_of(const float* norms, const Decision& d, int sequence) {
  const int lane = threadIdx.x % 32, first = sequence * d.seq;
  const volatile float* fresh = norms;
  float count = 0, sum = 0, squares = 0;
  for (int i = first + lane; i < first + d.seq; i += 32)
    if (is_real(d, i)) count += 1, sum += fresh[i];
  count = warp_sum(count);
  float mean = warp_sum(sum) / fmaxf(count, 1.f);
  for (int i = first + lane; i < first + d.seq; i += 32)
    if (is_real(d, i)) squares += (fresh[i] - mean) * (fresh[i] - mean);
  squares = warp_sum(squares);
  if (d.statistics != nullptr) {  // merge two samples (Chan, Golub, LeVeque 1979, equation 2.1)
    const float* old = d.statistics + 3 * sequence;
    const float total = old[0] + count, shift = mean - old[1];
    squares = old[2] + squares + shift * shift * old[0] * count / fmaxf(total, 1.f);
    mean = old[1] + shift * count / fmaxf(total, 1.f);
    count = total;
  }
  if (lane == 0) {
    float* after = d.statistics_after + 3 * sequence;
    after[0] = count, after[1] = mean, after[2] = squares;
  }
  const float std = sqrtf(squares / fmaxf(count - 1.f, 1.f));
  const bool defined = count > 1.f && std > 8 * 1.1920929e-7f * mean;  // less is the rounding of equal norms
  return {mean, defined ? std : 0.f};
}

__device__ inline bool in_scope(float norm, Deviation deviation, const Decision& d, int token) {
  float score;
  if (d.zscore) {
    score = deviation.std > 0 ? (norm - deviation.mean) / deviation.std : 0.f;
  } else {
    const float scale = static_cast<float>(*d.reference_scale);
    score = scale > 0 ? norm * norm / scale : 0.f;
  }
  const double alpha = *d.alpha, sign = (alpha > 0) - (alpha < 0);
  return is_real(d, token) && score >= static_cast<float>(alpha * (1.0 - d.slack * sign));
}

}  // namespace comeba
