// Kernels of the hooked linear layer: norm, decision and swap in one pass over the edit, and products of few tokens with
// many weight rows.
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

// -- norm, decision and action, a warp a token ------------------------------------------------------------------------

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
template <typename Out, typename Edit>
struct AddEdit {
  Out* output;
  const Edit* edit;
  int d_out;
  __device__ void operator()(int token) const {
    Out* out = output + static_cast<size_t>(token) * d_out;
    const Edit* add = edit + static_cast<size_t>(token) * d_out;
    if constexpr (sizeof(Out) == sizeof(Edit)) {
      const uintptr_t places = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(add);
      if (d_out % kWide == 0 && places % 16 == 0) return wide(out, add);
    }
    for (int i = threadIdx.x % 32; i < d_out; i += 32) out[i] = sum(out[i], add[i]);
  }

 private:
  static constexpr int kWide = 16 / sizeof(Out), kAhead = 4;  // a warp has only its own loads to hide their latency behind

  __device__ void wide(Out* out, const Edit* add) const {
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
        Out* values = reinterpret_cast<Out*>(&base[n]);
        const Edit* edits = reinterpret_cast<const Edit*>(&more[n]);
#pragma unroll
        for (int j = 0; j < kWide; ++j) values[j] = sum(values[j], edits[j]);
        *reinterpret_cast<uint4*>(out + i) = base[n];
      }
    }
  }
  static __device__ __forceinline__ Out sum(Out value, Edit edit) {
    return from_float<Out>(to_float(value) + to_float(from_float<Out>(to_float(edit))));
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

// -- products of few tokens with many rows ----------------------------------------------------------------------------
// A warp multiplies two groups of 8 weight rows with 8·NT tokens on the tensor cores. Lane 4·g + t loads 16 bytes of row g
// of either group and of token g of every tile, at the same k. The instruction's own order of k within a step differs, but
// it is the same for both operands, so the sum is.

template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& upper, const uint4& lower, const uint4& x) {
  const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y}, second[4] = {upper.z, lower.z, upper.w, lower.w};
  const uint32_t x_first[2] = {x.x, x.y}, x_second[2] = {x.z, x.w};
  mma_16x8x16(c, first, x_first, T());
  mma_16x8x16(c, second, x_second, T());
}

// float32 as the sum of two tf32: the products big·big + big·small + small·big keep about 21 bits.
__device__ __forceinline__ void split_tf32(uint32_t bits, uint32_t& big, uint32_t& small) {
  const float value = __uint_as_float(bits);
  big = to_tf32(value);
  small = to_tf32(value - __uint_as_float(big));
}

template <>
__device__ __forceinline__ void multiply<float>(float (&c)[4], const uint4& upper, const uint4& lower, const uint4& x) {
  const uint32_t a[2][4] = {{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}};
  const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t big_a[4], small_a[4], big_b[2], small_b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(a[step][i], big_a[i], small_a[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) split_tf32(b[step][i], big_b[i], small_b[i]);
    mma_16x8x8_tf32(c, small_a, big_b);
    mma_16x8x8_tf32(c, big_a, small_b);
    mma_16x8x8_tf32(c, big_a, big_b);
  }
}

template <typename T>
__device__ __forceinline__ uint4 load_chunk(const T* row, int k, int d_in) {
  return k < d_in ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
}

// How a block's warps share 16-row tiles: with few tokens all split one tile's k, with many the tiles of several share
// what they read of x.
template <int NT>
struct Shape {
  static constexpr int kTiles = NT >= 8 ? 2 : 1;             // 16-row tiles a block
  static constexpr int kSlices = kWarps / kTiles;            // warps along k
  static constexpr int kUnroll = NT >= 4 ? 2 : 4;            // chunks in flight
  static constexpr int kResident = NT >= 2 ? 2 : 3;          // blocks a multiprocessor, which bounds the registers
  static constexpr int kShared = kWarps * NT * 4 * 32;       // floats
  static constexpr int kTokens = 8 * NT;
};

// Sums of products of this block's tiles, left in shared memory for sum_of(). Row pointers are this lane's: rows g of the
// upper and the lower group; rows and tokens that do not exist may point at any that do, their sums are not read.
template <typename T, int NT>
__device__ void product(const T* upper, const T* lower, const T* x, const int (&tokens)[NT], int d_in, float* shared) {
  using S = Shape<NT>;
  constexpr int kBlock = 4 * kChunk<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = warp % S::kSlices;
  float c[NT][4] = {};
  for (int k0 = slice * S::kUnroll * kBlock; k0 < d_in; k0 += S::kSlices * S::kUnroll * kBlock) {
    uint4 up[S::kUnroll], low[S::kUnroll];
#pragma unroll
    for (int u = 0; u < S::kUnroll; ++u) {
      const int k = k0 + u * kBlock + lane % 4 * kChunk<T>;
      up[u] = load_chunk(upper, k, d_in);
      low[u] = load_chunk(lower, k, d_in);
    }
#pragma unroll
    for (int u = 0; u < S::kUnroll; ++u) {
      const int k = k0 + u * kBlock + lane % 4 * kChunk<T>;
#pragma unroll
      for (int n = 0; n < NT; ++n) multiply<T>(c[n], up[u], low[u], load_chunk(x + static_cast<size_t>(tokens[n]) * d_in, k, d_in));
    }
  }
  __syncthreads();  // the previous sums have been read
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) shared[((warp * NT + n) * 4 + i) * 32 + lane] = c[n][i];
  __syncthreads();
}

// Sum of row `row` (0-7 upper, 8-15 lower) of tile `tile` with token `token`.
template <int NT>
__device__ float sum_of(const float* shared, int tile, int row, int token) {
  using S = Shape<NT>;
  const int lane = row % 8 * 4 + token % 8 / 2, i = row / 8 * 2 + token % 2;
  float sum = 0;
  for (int slice = 0; slice < S::kSlices; ++slice)
    sum += shared[(((tile * S::kSlices + slice) * NT + token / 8) * 4 + i) * 32 + lane];
  return sum;
}

// The tokens whose rows of x this lane loads.
template <int NT>
__device__ void own_tokens(int (&own)[NT], const int* listed, int first, int count) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int token = min(first + n * 8 + g, count - 1);
    own[n] = listed != nullptr ? listed[token] : token;
  }
}

// -- products of the tokens on a list only ----------------------------------------------------------------------------

// A scope decided elsewhere as a list.
__global__ void __launch_bounds__(kThreads) list_kernel(const bool* scope, int tokens, int* listed, unsigned* count) {
  for (int token = blockIdx.x * kThreads + threadIdx.x; token < tokens; token += gridDim.x * kThreads)
    if (scope[token]) listed[atomicAdd(count, 1u)] = token;
}

template <typename Out, typename T, int NT>
__device__ void add_edits(Out* output, const T* x, const T* delta, const int* listed, int first, int count, int d_in,
                          int d_out, int row0, float* shared) {
  using S = Shape<NT>;
  const int g = threadIdx.x % 32 / 4, tile = threadIdx.x / 32 / S::kSlices;
  int own[NT];
  own_tokens<NT>(own, listed, first, count);
  const int upper = min(row0 + tile * 16 + g, d_out - 1), lower = min(row0 + tile * 16 + 8 + g, d_out - 1);
  product<T, NT>(delta + static_cast<size_t>(upper) * d_in, delta + static_cast<size_t>(lower) * d_in, x, own, d_in, shared);
  for (int e = threadIdx.x; e < S::kTiles * 16 * S::kTokens; e += kThreads) {
    const int row = e % (S::kTiles * 16), token = e / (S::kTiles * 16);
    if (row0 + row >= d_out || first + token >= count) continue;
    const float edit = to_float(from_float<T>(sum_of<NT>(shared, row / 16, row % 16, token)));
    Out* out = output + static_cast<size_t>(listed[first + token]) * d_out + row0 + row;
    *out = from_float<Out>(to_float(*out) + to_float(from_float<Out>(edit)));
  }
}

// All tokens of the list, in groups of 8·NT.
template <typename Out, typename T, int NT>
__device__ void add_listed(Out* output, const T* x, const T* delta, const int* listed, int count, int d_in, int d_out,
                           float* shared) {
  constexpr int kRows = Shape<NT>::kTiles * 16, kTokens = Shape<NT>::kTokens;
  const int groups = (count + kTokens - 1) / kTokens, row_tiles = (d_out + kRows - 1) / kRows;
  for (int tile = blockIdx.x; tile < groups * row_tiles; tile += gridDim.x)  // neighbours share rows of delta
    add_edits<Out, T, NT>(output, x, delta, listed, tile % groups * kTokens, count, d_in, d_out, tile / groups * kRows, shared);
}

template <typename Out, typename T>
__global__ void __launch_bounds__(kThreads, Shape<8>::kResident) add_edits_kernel(Out* output, const T* x, const T* delta, const int* listed,
                                                             const unsigned* listed_count, int d_in, int d_out) {
  __shared__ float shared[Shape<8>::kShared];
  const int count = static_cast<int>(*listed_count);
  if (count <= 8) return add_listed<Out, T, 1>(output, x, delta, listed, count, d_in, d_out, shared);
  if (count <= 16) return add_listed<Out, T, 2>(output, x, delta, listed, count, d_in, d_out, shared);
  if (count <= 32) return add_listed<Out, T, 4>(output, x, delta, listed, count, d_in, d_out, shared);
  add_listed<Out, T, 8>(output, x, delta, listed, count, d_in, d_out, shared);
}

// -- decode: the whole layer for few tokens ---------------------------------------------------------------------------

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
