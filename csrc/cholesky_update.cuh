// Kernels of the blocked Cholesky update. A panel of 64 columns is eliminated against at most 32 keys in two launches: one
// block finds the transformation T with [L11 X1] T = [L11' 0] and notices pivots that are not positive; then all row
// tiles below become [L21 X2] T. A member that failed is skipped from there on, and its factor, which nothing writes
// before the end, stays as it was.
#pragma once
#include "device.cuh"

namespace comeba {

constexpr int kPanel = 64;
constexpr int kKeys = 32;
constexpr int kTransformThreads = 160;  // at most kPanel + (kPanel + kKeys) rows
constexpr int kTileRows = 64;
constexpr int kColumns = 8;  // outputs of a thread at a time
constexpr int kThreads = 256;

// Odd, so that neighbouring rows begin in different banks.
__host__ __device__ constexpr int odd(int width) { return width | 1; }

constexpr size_t transform_shared(int width, int u, size_t item) {
  return (static_cast<size_t>(2 * width + u) * odd(width + u) + width) * item;
}
constexpr size_t apply_shared(int n, size_t item) { return static_cast<size_t>(kTileRows * odd(n) + n * n) * item; }

// x (batch, d, u) = columns first … first + u of k (batch, d, all); a block a row.
template <typename T>
__global__ void take_keys_kernel(T* x, const T* k, int all, int first, int u) {
  const size_t row = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  for (int c = threadIdx.x; c < u; c += blockDim.x) x[row * u + c] = k[row * all + first + c];
}

// T = H_1 … H_width, each H_j the reflection (hyperbolic for sign −1) that maps column j and the keys so that row j of the
// keys becomes 0: with l, x the row's entries and r = √(l² ± x·x), a row (a, b) becomes a' = (l·a ± x·b) / r and
// b' = b − x·(a + a') / (l + r). No cancellation: l and r are positive. It is applied to [L11 X1], and to the identity
// below it, a row a thread.
template <typename T>
__global__ void __launch_bounds__(kTransformThreads)
transform_kernel(const T* source, T* target, const T* x, T* transform, int* info, int d, int u, int start, int width,
                 T sign) {
  COMEBA_DYNAMIC_SHARED(T, rows);
  const int n = width + u, stride = odd(n), member = blockIdx.x;
  if (info[member] != 0) return;
  T* const pivots = rows + (width + n) * stride;
  const size_t offset = static_cast<size_t>(member) * d * d;
  for (int i = threadIdx.x; i < (width + n) * n; i += blockDim.x) {
    const int row = i / n, column = i % n;
    T value;
    if (row >= width) value = row - width == column ? T(1) : T(0);
    else if (column >= width) value = x[(static_cast<size_t>(member) * d + start + row) * u + column - width];
    else value = column <= row ? source[offset + static_cast<size_t>(start + row) * d + start + column] : T(0);
    rows[row * stride + column] = value;
  }
  for (int j = 0; j < width; ++j) {
    __syncthreads();
    const T* const pivot = rows + j * stride;
    const T* const keys = pivot + width;
    const T l = pivot[j];
    T squares = 0;
    for (int c = 0; c < u; ++c) squares += keys[c] * keys[c];
    const T r = sqrt(l * l + sign * squares);
    if (!(l > T(0) && r > T(0) && r - r == T(0))) {  // not positive, NaN, infinite
      if (threadIdx.x == 0) info[member] = start + j + 1;
      return;
    }
    const T scale = T(1) / r, divisor = T(1) / (l + r);
    if (threadIdx.x == 0) pivots[j] = r;
    for (int row = j + 1 + threadIdx.x; row < width + n; row += blockDim.x) {
      if (row - width > j && row - width < width) continue;  // still a row of the identity
      T* const a = rows + row * stride + j;
      T* const b = rows + row * stride + width;
      T product = 0;
      for (int c = 0; c < u; ++c) product += keys[c] * b[c];
      const T after = (l * *a + sign * product) * scale, step = (*a + after) * divisor;
      *a = after;
      for (int c = 0; c < u; ++c) b[c] -= keys[c] * step;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
    const int row = i / width, column = i % width;
    if (column > row) continue;
    target[offset + static_cast<size_t>(start + row) * d + start + column] =
        column == row ? pivots[row] : rows[row * stride + column];
  }
  T* const out = transform + static_cast<size_t>(member) * (kPanel + kKeys) * (kPanel + kKeys);
  for (int i = threadIdx.x; i < n * n; i += blockDim.x) out[i] = rows[(width + i / n) * stride + i % n];
}

// [L21' X2'] = [L21 X2] T for a tile of rows below the panel; in place where source is target.
template <typename T>
__global__ void __launch_bounds__(kThreads)
apply_kernel(const T* source, T* target, T* x, const T* transform, const int* info, int d, int u, int start, int width) {
  COMEBA_DYNAMIC_SHARED(T, tile);
  const int n = width + u, stride = odd(n), member = blockIdx.y;
  if (info[member] != 0) return;
  const int first = start + width + blockIdx.x * kTileRows, count = min(kTileRows, d - first);
  T* const matrix = tile + kTileRows * stride;
  const T* const from = transform + static_cast<size_t>(member) * (kPanel + kKeys) * (kPanel + kKeys);
  const size_t row_of_x = static_cast<size_t>(member) * d + first;
  const size_t corner = row_of_x * d + start;
  for (int i = threadIdx.x; i < n * n; i += blockDim.x) matrix[i] = from[i];
  for (int i = threadIdx.x; i < count * n; i += blockDim.x) {
    const int row = i / n, column = i % n;
    tile[row * stride + column] = column < width ? source[corner + static_cast<size_t>(row) * d + column]
                                                 : x[(row_of_x + row) * u + column - width];
  }
  __syncthreads();
  const int row = threadIdx.x % kTileRows;
  if (row >= count) return;
  for (int column = threadIdx.x / kTileRows * kColumns; column < n; column += kThreads / kTileRows * kColumns) {
    const int columns = min(kColumns, n - column);
    T sums[kColumns] = {};
    for (int i = 0; i < n; ++i) {
      const T value = tile[row * stride + i];
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (c < columns) sums[c] += value * matrix[i * n + column + c];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (c >= columns) break;
      if (column + c < width) target[corner + static_cast<size_t>(row) * d + column + c] = sums[c];
      else x[(row_of_x + row) * u + column + c - width] = sums[c];
    }
  }
}

// factor ← target up to the diagonal, for members without a failure; a block a row.
template <typename T>
__global__ void commit_kernel(T* factor, const T* target, const int* info, int d) {
  if (info[blockIdx.y] != 0) return;
  const size_t begin = (static_cast<size_t>(blockIdx.y) * d + blockIdx.x) * d;
  for (unsigned c = threadIdx.x; c <= blockIdx.x; c += blockDim.x) factor[begin + c] = target[begin + c];
}

}  // namespace comeba
