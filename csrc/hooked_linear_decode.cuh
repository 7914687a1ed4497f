// Decode: the whole layer for few tokens.
#pragma once
#include "hooked_linear_products.cuh"

namespace comeba {

struct DecodeProgress {
  unsigned* ticket;
  unsigned* counted;       // deciding tiles done
  unsigned* settled;       // 1: nothing in scope, 2: something
  float* partial;          // (deciding tiles, tokens): squares of the response, summed over the tile's rows
  float* norms;            // (tokens)
  unsigned char* scope;    // (tokens)
};

// After a deciding tile: the block that finishes last turns partial sums into norms and norms into scope.
__device__ inline void settle(const Decision& d, const DecodeProgress& p, int tiles) {
  __shared__ unsigned last, any;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tokens = d.batch * d.seq;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = add_release(p.counted, 1u) == static_cast<unsigned>(tiles) - 1;
    any = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  const volatile float* partial = p.partial;
  for (int token = warp; token < tokens; token += kWarps) {
    float squares = 0;
    for (int tile = lane; tile < tiles; tile += 32) squares += partial[tile * tokens + token];
    squares = warp_sum(squares);
    if (lane == 0) p.norms[token] = sqrtf(squares);
  }
  __syncthreads();
  for (int sequence = warp; sequence < d.batch; sequence += kWarps) {
    const Deviation deviation = d.zscore ? deviation_of(p.norms, d, sequence) : Deviation{0, 0};
    for (int i = lane; i < d.seq; i += 32) {
      const int token = sequence * d.seq + i;
      const bool in = in_scope(p.norms[token], deviation, d, token);
      p.scope[token] = in;
      if (in) atomicOr(&any, 1u);
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) store_release(p.settled, any ? 2u : 1u);
}

// Whether anything is in scope, once that is known; the whole block.
__device__ inline bool settled_scope(const DecodeProgress& p) {
  __shared__ unsigned state;
  if (threadIdx.x == 0) {
    unsigned seen;
    while ((seen = load_acquire(p.settled)) == 0) {
    }
    state = seen;
  }
  __syncthreads();
  __threadfence();
  return state == 2;
}

// A deciding tile's share of every token's squared norm: of sum(row, token) over its rows, as rounded to T.
template <typename T, typename Sum>
__device__ void write_squares(float* partial, int tokens, int rows, Sum sum) {
  for (int token = threadIdx.x; token < tokens; token += kThreads) {
    float squares = 0;
    for (int row = 0; row < rows; ++row) {
      const float value = to_float(from_float<T>(sum(row, token)));
      squares += value * value;
    }
    partial[token] = squares;
  }
}

// Decided by the edit itself: tiles pair 8 rows of the base weight with the same 8 rows of delta, and the edits wait in
// the workspace for the decision.
template <typename T, int NT>
__global__ void __launch_bounds__(kThreads, Shape<NT>::kResident) decode_exact_kernel(T* output, const T* x, const T* weight, const T* bias,
                                                                const T* delta, T* edits, int d_in, int d_out, Decision d,
                                                                DecodeProgress p) {
  using S = Shape<NT>;
  __shared__ float shared[S::kShared];
  constexpr int kRows = S::kTiles * 8;
  const int tokens = d.batch * d.seq, tiles = (d_out + kRows - 1) / kRows;
  const int g = threadIdx.x % 32 / 4, own_tile = threadIdx.x / 32 / S::kSlices;
  int own[NT];
  own_tokens<NT>(own, nullptr, 0, tokens);
  for (;;) {
    const int tile = static_cast<int>(draw(p.ticket));
    if (tile >= tiles + tokens) return;
    if (tile >= tiles) {  // a token's swap
      if (!settled_scope(p)) return;
      const int token = tile - tiles;
      const volatile unsigned char* scope = p.scope;
      if (!scope[token]) continue;
      for (int i = threadIdx.x; i < d_out; i += kThreads) {
        const size_t at = static_cast<size_t>(token) * d_out + i;
        output[at] = from_float<T>(to_float(output[at]) + to_float(edits[at]));
      }
      continue;
    }
    const int row0 = tile * kRows;
    const size_t row = static_cast<size_t>(min(row0 + own_tile * 8 + g, d_out - 1)) * d_in;
    product<T, NT>(weight + row, delta + row, x, own, d_in, shared);
    const auto base_of = [&](int r, int token) { return sum_of<NT>(shared, r / 8, r % 8, token); };
    const auto edit_of = [&](int r, int token) { return sum_of<NT>(shared, r / 8, 8 + r % 8, token); };
    for (int e = threadIdx.x; e < kRows * tokens; e += kThreads) {
      const int r = e % kRows, token = e / kRows;
      if (row0 + r >= d_out) continue;
      const size_t at = static_cast<size_t>(token) * d_out + row0 + r;
      output[at] = from_float<T>(base_of(r, token) + (bias != nullptr ? to_float(bias[row0 + r]) : 0.f));
      edits[at] = from_float<T>(edit_of(r, token));
    }
    write_squares<T>(p.partial + tile * tokens, tokens, min(kRows, d_out - row0), edit_of);
    settle(d, p, tiles);
  }
}

// Decided by the sketch: its tiles come first, so that the decision is there when a block has finished its tile of the
// base weight; that block then computes the same rows of delta, if any token is in scope at all.
template <typename T, int NT>
__global__ void __launch_bounds__(kThreads, Shape<NT>::kResident) decode_gated_kernel(T* output, const T* x, const T* weight, const T* bias,
                                                                const T* delta, const T* sketch, int d_in, int d_out,
                                                                int sketch_rows, Decision d, DecodeProgress p) {
  using S = Shape<NT>;
  __shared__ float shared[S::kShared];
  constexpr int kRows = S::kTiles * 16;
  const int tokens = d.batch * d.seq;
  const int deciding = (sketch_rows + kRows - 1) / kRows, tiles = deciding + (d_out + kRows - 1) / kRows;
  const int g = threadIdx.x % 32 / 4, own_tile = threadIdx.x / 32 / S::kSlices;
  int own[NT];
  own_tokens<NT>(own, nullptr, 0, tokens);
  for (;;) {
    const int tile = static_cast<int>(draw(p.ticket));
    if (tile >= tiles) return;
    const bool decides = tile < deciding;
    const T* matrix = decides ? sketch : weight;
    const int row0 = (decides ? tile : tile - deciding) * kRows, last = (decides ? sketch_rows : d_out) - 1;
    const size_t upper = static_cast<size_t>(min(row0 + own_tile * 16 + g, last)) * d_in;
    const size_t lower = static_cast<size_t>(min(row0 + own_tile * 16 + 8 + g, last)) * d_in;
    product<T, NT>(matrix + upper, matrix + lower, x, own, d_in, shared);
    const auto sum = [&](int r, int token) { return sum_of<NT>(shared, r / 16, r % 16, token); };
    if (decides) {
      write_squares<T>(p.partial + tile * tokens, tokens, min(kRows, sketch_rows - row0), sum);
      settle(d, p, deciding);
      continue;
    }
    for (int e = threadIdx.x; e < kRows * tokens; e += kThreads) {
      const int r = e % kRows, token = e / kRows;
      if (row0 + r < d_out)
        output[static_cast<size_t>(token) * d_out + row0 + r] =
            from_float<T>(sum(r, token) + (bias != nullptr ? to_float(bias[row0 + r]) : 0.f));
    }
    if (!settled_scope(p)) continue;
    product<T, NT>(delta + upper, delta + lower, x, own, d_in, shared);
    const volatile unsigned char* scope = p.scope;
    for (int e = threadIdx.x; e < kRows * tokens; e += kThreads) {  // every thread finds what it wrote itself
      const int r = e % kRows, token = e / kRows;
      if (row0 + r >= d_out || !scope[token]) continue;
      T* out = output + static_cast<size_t>(token) * d_out + row0 + r;
      *out = from_float<T>(to_float(*out) + to_float(from_float<T>(sum(r, token))));
    }
  }
}

}  // namespace comeba
