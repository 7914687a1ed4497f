// Norm, decision and action in one pass over the edit, a warp a token.
#pragma once
#include "hooked_linear.cuh"

namespace comeba {

template <typename T>
__device__ float row_norm(const T* row, int width) {
  constexpr int kChunk = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  float squares = 0;
  if (width % kChunk == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
    for (int i = lane * kChunk; i < width; i += 32 * kChunk) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(row + i);
      const T* values = reinterpret_cast<const T*>(&chunk);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) squares += to_float(values[j]) * to_float(values[j]);
    }
  } else {
    for (int i = lane; i < width; i += 32) squares += to_float(row[i]) * to_float(row[i]);
  }
  return sqrtf(warp_sum(squares));
}

// What happens to a token in scope: its edit is added to the base output ...
template <typename T>
struct AddEdit {
  Values output;
  const T* edit;
  int d_out;
  __device__ void operator()(int token) const {
    const size_t first = static_cast<size_t>(token) * d_out;
    const T* add = edit + first;
    if (output.type == kTypeOf<T>) {
      T* out = static_cast<T*>(output.data) + first;
      const uintptr_t places = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(add);
      if (d_out % kWide == 0 && places % 16 == 0) return wide(out, add);
    }
    for (int i = threadIdx.x % 32; i < d_out; i += 32) add_to(output, first + i, to_float(add[i]));
  }

 private:
  static constexpr int kWide = 16 / sizeof(T), kAhead = 4;  // a warp has only its own loads to hide their latency behind

  __device__ void wide(T* out, const T* add) const {
    for (int first = threadIdx.x % 32 * kWide; first < d_out; first += 32 * kWide * kAhead) {
      uint4 base[kAhead], more[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        const int i = min(first + n * 32 * kWide, d_out - kWide);
        base[n] = *reinterpret_cast<const uint4*>(out + i);
        more[n] = *reinterpret_cast<const uint4*>(add + i);
      }
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        const int i = first + n * 32 * kWide;
        if (i >= d_out) break;
        T* values = reinterpret_cast<T*>(&base[n]);
        const T* edits = reinterpret_cast<const T*>(&more[n]);
#pragma unroll
        for (int j = 0; j < kWide; ++j) values[j] = from_float<T>(to_float(values[j]) + to_float(edits[j]));
        *reinterpret_cast<uint4*>(out + i) = base[n];
      }
    }
  }
};

// ... or it is put on the list of those whose edit is still to be computed.
struct Collect {
  int* tokens;
  unsigned* count;
  __device__ void operator()(int token) const {
    if (threadIdx.x % 32 == 0) tokens[atomicAdd(count, 1u)] = token;
  }
};

struct ScopeProgress {
  unsigned* ticket;
  unsigned* counted;      // (batch): norms written
  unsigned* settled;      // (batch): 1 once deviations are there
  float* norms;           // (tokens)
  Deviation* deviations;  // (batch)
};

// response (tokens, width) decides, action does. Every response is read once.
template <typename T, typename Action>
__global__ void __launch_bounds__(kThreads) scope_kernel(const T* response, int width, Decision d, ScopeProgress p,
                                                         Action action) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tokens = d.batch * d.seq;
  const unsigned tiles = (tokens + kWarps - 1) / kWarps;
  const bool waits = d.zscore && d.seq > 1;  // a sequence of one token needs no other block
  for (;;) {
    const unsigned tile = draw(p.ticket);
    if (tile >= (waits ? 2 * tiles : tiles)) return;
    const int token = static_cast<int>(tile % tiles) * kWarps + warp;
    if (token >= tokens) continue;
    const int sequence = token / d.seq;
    if (tile < tiles) {
      const float norm = row_norm(response + static_cast<size_t>(token) * width, width);
      if (!waits) {
        if (lane == 0) p.norms[token] = norm;
        __syncwarp();
        const Deviation deviation = d.zscore ? deviation_of(p.norms, d, sequence) : Deviation{0, 0};
        if (in_scope(norm, deviation, d, token)) action(token);
        continue;
      }
      unsigned before = 0;
      if (lane == 0) {
        p.norms[token] = norm;
        before = add_release(p.counted + sequence, 1u);
      }
      before = __shfl_sync(0xffffffffu, before, 0);
      if (before == static_cast<unsigned>(d.seq) - 1) {  // the last norm of its sequence
        __threadfence();
        const Deviation deviation = deviation_of(p.norms, d, sequence);
        if (lane == 0) {
          p.deviations[sequence] = deviation;
          store_release(p.settled + sequence, 1u);
        }
      }
    } else {
      if (lane == 0)
        while (load_acquire(p.settled + sequence) == 0) {
        }
      __syncwarp();
      __threadfence();
      const volatile Deviation* fresh = p.deviations + sequence;
      const volatile float* norms = p.norms;
      if (in_scope(norms[token], Deviation{fresh->mean, fresh->std}, d, token)) action(token);
    }
  }
}

}  // namespace comeba
