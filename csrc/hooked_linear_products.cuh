// Products of few tokens with many weight rows.
//
// A warp multiplies two groups of 8 weight rows with 8·NT tokens on the tensor cores. Lane 4·g + t loads 16 bytes of row g
// of either group and of token g of every tile, at the same k. The instruction's own order of k within a step differs, but
// it is the same for both operands, so the sum is.
#pragma once
#include "hooked_linear.cuh"

namespace comeba {

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

template <typename T, int NT>
__device__ void add_edits(Values output, const T* x, const T* delta, const int* listed, int first, int count, int d_in,
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
    add_to(output, static_cast<size_t>(listed[first + token]) * d_out + row0 + row, edit);
  }
}

// All tokens of the list, in groups of 8·NT.
template <typename T, int NT>
__device__ void add_listed(Values output, const T* x, const T* delta, const int* listed, int count, int d_in, int d_out,
                           float* shared) {
  constexpr int kRows = Shape<NT>::kTiles * 16, kTokens = Shape<NT>::kTokens;
  const int groups = (count + kTokens - 1) / kTokens, row_tiles = (d_out + kRows - 1) / kRows;
  for (int tile = blockIdx.x; tile < groups * row_tiles; tile += gridDim.x)  // neighbours share rows of delta
    add_edits<T, NT>(output, x, delta, listed, tile % groups * kTokens, count, d_in, d_out, tile / groups * kRows, shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, Shape<8>::kResident)
    add_edits_kernel(Values output, const T* x, const T* delta, const int* listed, const unsigned* listed_count, int d_in,
                     int d_out) {
  __shared__ float shared[Shape<8>::kShared];
  const int count = static_cast<int>(*listed_count);
  if (count <= 8) return add_listed<T, 1>(output, x, delta, listed, count, d_in, d_out, shared);
  if (count <= 16) return add_listed<T, 2>(output, x, delta, listed, count, d_in, d_out, shared);
  if (count <= 32) return add_listed<T, 4>(output, x, delta, listed, count, d_in, d_out, shared);
  add_listed<T, 8>(output, x, delta, listed, count, d_in, d_out, shared);
}

}  // namespace comeba
