// What every kernel includes: CUDA, or its emulation on the host, and the few device functions that both must agree on.
//   nvcc                      the real thing
//   -DCOMEBA_EMULATE          emulation/cuda.h: the kernels run on the CPU, thread by thread
//   any other host compiler   only the types and the runtime's calls, for the files that talk to torch
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "dtype.h"

#if defined(COMEBA_EMULATE)
#include "emulation/cuda.h"
#include "emulation/tensor_core.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#if defined(COMEBA_EMULATE) || defined(__CUDACC__)

// T* name = this block's dynamic shared memory, aligned to 128 bytes.
#if defined(COMEBA_EMULATE)
#define COMEBA_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(comeba::emulation::block->shared)
#else
#define COMEBA_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char comeba_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(comeba_dynamic_shared)
#endif

namespace comeba {

// Launches kernel(args...) with `shared` bytes of dynamic shared memory. An empty grid is no launch and no error.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
                   Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared > (48u << 10)) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return cudaGetLastError(), error;  // else whoever asks next is told of it
  }
#if defined(COMEBA_EMULATE)
  static_cast<void>(stream);
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    return cudaErrorInvalidConfiguration;
  }
  emulation::run([&] { kernel(static_cast<Parameters>(arguments)...); }, reinterpret_cast<void*>(kernel), grid, block,
                 shared);
  return cudaSuccess;
#else
  // clang-format off
  kernel<<<grid, block, shared, stream>>>(static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  // clang-format on
  return cudaGetLastError();
#endif
}

// What to tell the caller of a launcher.
inline const char* reason(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// --- Numbers: kernels compute in float whatever is stored.

// body(T()) for the type that is stored.
template <typename F>
const char* with_type(DType type, F&& body) {
  switch (type) {
    case DType::f16: return body(__half());
    case DType::bf16: return body(__nv_bfloat16());
    default: return body(float());
  }
}

__host__ __device__ __forceinline__ float to_float(float value) { return value; }
__host__ __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__host__ __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest, ties to even.
template <typename T>
__host__ __device__ __forceinline__ T from_float(float value);
template <>
__host__ __device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__host__ __device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__host__ __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
constexpr DType kTypeOf = std::is_same_v<T, float> ? DType::f32 : std::is_same_v<T, __half> ? DType::f16 : DType::bf16;

// Numbers of a type that is known only when a kernel runs: outputs are written through it, as kernels for every pair of types
// of output and edit would be three times as many.
struct Values {
  void* data;
  DType type;
};

// values[at] += edit, as if the edit had been stored in that type first.
__device__ __forceinline__ void add_to(const Values& values, size_t at, float edit) {
  const auto add = [edit](auto* value) {
    using T = std::remove_reference_t<decltype(*value)>;
    *value = from_float<T>(to_float(*value) + to_float(from_float<T>(edit)));
  };
  switch (values.type) {
    case DType::f16: return add(static_cast<__half*>(values.data) + at);
    case DType::bf16: return add(static_cast<__nv_bfloat16*>(values.data) + at);
    default: return add(static_cast<float*>(values.data) + at);
  }
}

// --- Sums; every lane or thread gets the result, in the same order of additions for all of them.

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// Sum over a one-dimensional block of whole warps. `scratch`: 32 values of shared memory, free again on return.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x) / 32 ? scratch[lane] : T(0);
  value = warp_sum(value);
  __syncthreads();
  return value;
}

// --- Memory shared between blocks. A block may wait for another one only while both are resident.

// For loops that wait: while (load_acquire(flag) != ready) {}
#if defined(COMEBA_EMULATE)
inline unsigned load_acquire(const unsigned* at, COMEBA_CALLER) {
  emulation::spin({"load_acquire", file, line});
  return *at;
}
inline void store_release(unsigned* at, unsigned value) { *at = value; }
#else
__device__ __forceinline__ unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(unsigned* at, unsigned value) {
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
#endif

// Publishes what this thread wrote before, then counts; returns the count before.
__device__ __forceinline__ unsigned add_release(unsigned* at, unsigned value) {
  __threadfence();
  return atomicAdd(at, value);
}

// For the block that finishes last: what the others wrote before their add is visible after ours.
__device__ __forceinline__ unsigned add_acquire_release(unsigned* at, unsigned value) {
  __threadfence();
  const unsigned before = atomicAdd(at, value);
  __threadfence();
  return before;
}

#if !defined(COMEBA_EMULATE)

// --- Tensor cores and their loads. Fragments are laid out as the PTX ISA describes for each instruction.

// c += a · b on a 16×8 tile, depth 16, float accumulation: mma.m16n8k16. The last argument only names the type.
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                            __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                            __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same at depth 8 on tf32 inputs, of which the hardware sees the top 19 bits.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to tf32, ties away from zero.
__device__ __forceinline__ std::uint32_t to_tf32(float value) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// ldmatrix.x4: lane i gives the address of row i%8 (8 values of 2 bytes) of the 8×8 matrix i/8 in shared memory.
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// cp.async of 16 aligned bytes to shared memory; zeros instead when not valid. Visible to this thread after its group
// is waited for, to others after a barrier besides.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>  // until at most so many of the latest groups are under way
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#endif

}  // namespace comeba

#endif
