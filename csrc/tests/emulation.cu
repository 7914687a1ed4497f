// Kernels that exercise device.cuh one feature at a time, behind a C interface for
// python_tests/test_emulated_kernels.py.
#include "../device.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

__global__ void shuffle_kernel(const float* in, float* out) {  // one warp: 5 results a lane
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(0xffffffffu, in[lane], 7);
  out[32 + lane] = __shfl_xor_sync(0xffffffffu, in[lane], 5);
  out[64 + lane] = __shfl_down_sync(0xffffffffu, in[lane], 3, 16);
  out[96 + lane] = __shfl_up_sync(0xffffffffu, in[lane], 2);
  // Two halves of the warp meet among themselves.
  const double value = in[lane];
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  out[128 + lane] = static_cast<float>(__shfl_xor_sync(mask, value, lane < 16 ? 1 : 8));
}

__global__ void vote_kernel(const float* in, unsigned* out) {
  const int lane = threadIdx.x;
  out[lane] = __ballot_sync(0xffffffffu, in[lane] > 0.0f);
  out[32 + lane] = __any_sync(0xffffffffu, in[lane] > 1e30f);
}

// Row sums of a (rows, columns) matrix through static and dynamic shared memory; a block per row.
template <typename T>
__global__ void __launch_bounds__(128) row_sum_kernel(const T* __restrict__ in, float* __restrict__ out, int columns) {
  COMEBA_DYNAMIC_SHARED(float, copy);
  __shared__ __align__(16) float scratch[32];
  const T* row = in + static_cast<std::size_t>(blockIdx.x) * columns;
  for (int n = threadIdx.x; n < columns; n += blockDim.x) copy[n] = comeba::to_float(row[n]);
  __syncthreads();
  float sum = 0.0f;
  for (int n = threadIdx.x; n < columns; n += blockDim.x) sum += copy[columns - 1 - n];  // what another thread wrote
  sum = comeba::block_sum(sum, scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void uninitialised_kernel(float* out) {
  COMEBA_DYNAMIC_SHARED(float, dynamic);
  __shared__ float fixed[32];
  out[blockIdx.x * 64 + threadIdx.x] = fixed[threadIdx.x];
  out[blockIdx.x * 64 + 32 + threadIdx.x] = dynamic[threadIdx.x];
  fixed[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;
}

__global__ void count_kernel(const int* in, int size, int* counts, float* sum, unsigned* largest) {
  const int n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (n < size) {
    atomicAdd(&counts[in[n]], 1);
    atomicAdd(sum, static_cast<float>(in[n]));
    atomicMax(largest, static_cast<unsigned>(in[n]));
  }
}

// Every block waits until all have arrived: needs them resident at once, shared memory of each kept apart.
__global__ void grid_barrier_kernel(unsigned* arrived, float* out) {
  __shared__ float mine;
  if (threadIdx.x == 0) {
    mine = static_cast<float>(blockIdx.x);
    comeba::add_release(arrived, 1);
    while (comeba::load_acquire(arrived) < gridDim.x) {
    }
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = mine;
}

template <typename T>
__global__ void mma_kernel(const T* a, const T* b, float* c) {  // a 16×16 by rows, b 16×8 by columns, c 16×8 by rows
  __shared__ __align__(16) T tile[16 * 16];
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
  comeba::copy_async_16(&tile[lane * 8], &a[lane * 8]);
  comeba::copy_async_commit();
  comeba::copy_async_wait<0>();
  __syncwarp();
  std::uint32_t fragment_a[4], fragment_b[2];
  comeba::load_matrix_x4(fragment_a, &tile[(lane % 16) * 16 + lane / 16 * 8]);
  for (int n = 0; n < 2; ++n) fragment_b[n] = *reinterpret_cast<const std::uint32_t*>(&b[group * 16 + pair + 8 * n]);
  float sum[4];
  for (int n = 0; n < 4; ++n) sum[n] = c[(group + n / 2 * 8) * 8 + pair + n % 2];
  comeba::mma_16x8x16(sum, fragment_a, fragment_b, T{});
  for (int n = 0; n < 4; ++n) c[(group + n / 2 * 8) * 8 + pair + n % 2] = sum[n];
}

__global__ void mma_tf32_kernel(const float* a, const float* b, float* c) {  // a 16×8 by rows, b 8×8 by columns
  const int lane = threadIdx.x, group = lane / 4, in_group = lane % 4;
  std::uint32_t fragment_a[4], fragment_b[2];
  for (int n = 0; n < 4; ++n) fragment_a[n] = comeba::to_tf32(a[(group + n % 2 * 8) * 8 + in_group + n / 2 * 4]);
  for (int n = 0; n < 2; ++n) fragment_b[n] = comeba::to_tf32(b[group * 8 + in_group + 4 * n]);
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  comeba::mma_16x8x8_tf32(sum, fragment_a, fragment_b);
  for (int n = 0; n < 4; ++n) c[(group + n / 2 * 8) * 8 + in_group * 2 + n % 2] = sum[n];
}

__global__ void transpose_kernel(const __half* in, std::uint32_t* out) {  // four 8×8 matrices
  __shared__ __align__(16) __half tile[4 * 64];
  for (int n = threadIdx.x; n < 4 * 64; n += 32) tile[n] = in[n];
  __syncwarp();
  std::uint32_t fragment[4];
  comeba::load_matrix_x4_transposed(fragment, &tile[threadIdx.x * 8]);
  for (int n = 0; n < 4; ++n) out[n * 32 + threadIdx.x] = fragment[n];
}

template <typename T>
__global__ void convert_kernel(const float* in, T* out, float* back, int size) {
  const int n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (n >= size) return;
  out[n] = comeba::from_float<T>(in[n]);
  back[n] = comeba::to_float(out[n]);
}

// What must not happen.
__global__ void missed_barrier_kernel(int threads_that_leave) {
  if (static_cast<int>(threadIdx.x) < threads_that_leave) return;
  __syncthreads();
}
__global__ void missed_shuffle_kernel(float* out) {
  if (threadIdx.x != 3) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, out[threadIdx.x], 1);
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void endless_spin_kernel(unsigned* flag) {
  while (comeba::load_acquire(flag) == 0) {
  }
}
__global__ void shared_overrun_kernel() {
  COMEBA_DYNAMIC_SHARED(float, values);
  values[threadIdx.x + 1] = 0.0f;
}

}  // namespace

EXPORT int shuffles(const float* in, float* out) { return comeba::launch(shuffle_kernel, 1, 32, 0, nullptr, in, out); }
EXPORT int votes(const float* in, unsigned* out) { return comeba::launch(vote_kernel, 1, 32, 0, nullptr, in, out); }
EXPORT int row_sums(const void* in, float* out, int rows, int columns, int type) {
  const std::size_t shared = columns * sizeof(float);
  if (type == 0)
    return comeba::launch(row_sum_kernel<float>, rows, 128, shared, nullptr, static_cast<const float*>(in), out,
                          columns);
  if (type == 1)
    return comeba::launch(row_sum_kernel<__half>, rows, 128, shared, nullptr, static_cast<const __half*>(in), out,
                          columns);
  return comeba::launch(row_sum_kernel<__nv_bfloat16>, rows, 128, shared, nullptr,
                        static_cast<const __nv_bfloat16*>(in), out, columns);
}
EXPORT int uninitialised(float* out, int blocks) {
  return comeba::launch(uninitialised_kernel, blocks, 32, 128, nullptr, out);
}
EXPORT int counts(const int* in, int size, int* out, float* sum, unsigned* largest) {
  return comeba::launch(count_kernel, (size + 63) / 64, 64, 0, nullptr, in, size, out, sum, largest);
}
EXPORT int grid_barrier(unsigned* arrived, float* out, int blocks) {
  return comeba::launch(grid_barrier_kernel, blocks, 64, 0, nullptr, arrived, out);
}
EXPORT int resident_blocks() {
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, grid_barrier_kernel, 64, 0);
  return multiprocessors * blocks;
}
EXPORT int mma(const void* a, const void* b, float* c, int bfloat16) {
  if (bfloat16 != 0) {
    using T = __nv_bfloat16;
    return comeba::launch(mma_kernel<T>, 1, 32, 0, nullptr, static_cast<const T*>(a), static_cast<const T*>(b), c);
  }
  return comeba::launch(mma_kernel<__half>, 1, 32, 0, nullptr, static_cast<const __half*>(a),
                        static_cast<const __half*>(b), c);
}
EXPORT int mma_tf32(const float* a, const float* b, float* c) {
  return comeba::launch(mma_tf32_kernel, 1, 32, 0, nullptr, a, b, c);
}
EXPORT int transpose(const void* in, std::uint32_t* out) {
  return comeba::launch(transpose_kernel, 1, 32, 0, nullptr, static_cast<const __half*>(in), out);
}
EXPORT int convert(const float* in, void* out, float* back, int size, int bfloat16) {
  const unsigned blocks = (size + 127) / 128;
  if (bfloat16 != 0) {
    return comeba::launch(convert_kernel<__nv_bfloat16>, blocks, 128, 0, nullptr, in, static_cast<__nv_bfloat16*>(out),
                          back, size);
  }
  return comeba::launch(convert_kernel<__half>, blocks, 128, 0, nullptr, in, static_cast<__half*>(out), back, size);
}
EXPORT int missed_barrier(int threads) { return comeba::launch(missed_barrier_kernel, 1, 64, 0, nullptr, threads); }
EXPORT int missed_shuffle(float* out) { return comeba::launch(missed_shuffle_kernel, 1, 32, 0, nullptr, out); }
EXPORT int two_barriers() { return comeba::launch(two_barriers_kernel, 1, 64, 0, nullptr); }
EXPORT int endless_spin(unsigned* flag) { return comeba::launch(endless_spin_kernel, 1, 1, 0, nullptr, flag); }
EXPORT int shared_overrun() { return comeba::launch(shared_overrun_kernel, 1, 32, 128, nullptr); }
