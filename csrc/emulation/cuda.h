// The part of CUDA C++ that the kernels use, for a host compiler (g++ or clang++ -x c++ -std=c++17 -DCOMEBA_EMULATE):
// the same .cuh and .cu sources compile as plain C++ and really run, see scheduler.h for how and for what is
// checked. Write `__shared__ __align__(16) float x[4]` (not alignas), and dynamic shared memory with
// COMEBA_DYNAMIC_SHARED; everything else is ordinary CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One operating system thread per block: thread-local is block-local.
#define __shared__ static thread_local

// --- Barriers and warp collectives; the caller's file and line go into the message when something is wrong.

#define COMEBA_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(COMEBA_CALLER) { comeba::emulation::barrier({"__syncthreads", file, line}); }
inline int __syncthreads_count(int vote, COMEBA_CALLER) {
  return static_cast<int>(comeba::emulation::barrier({"__syncthreads_count", file, line}, vote != 0));
}
inline int __syncthreads_or(int vote, COMEBA_CALLER) {
  return comeba::emulation::barrier({"__syncthreads_or", file, line}, vote != 0) != 0;
}
inline int __syncthreads_and(int vote, COMEBA_CALLER) {
  return comeba::emulation::barrier({"__syncthreads_and", file, line}, vote == 0) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, COMEBA_CALLER) {
  comeba::emulation::collective(mask, {"__syncwarp", file, line}, nullptr, [](void* const*, unsigned) {});
}

namespace comeba {
namespace COMEBA_HIDDEN emulation {

struct Shuffle {
  std::uint64_t in, out;
  unsigned source;
};

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const Place& place) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a register or two");
  Shuffle mine{0, 0, source};
  std::memcpy(&mine.in, &value, sizeof(T));
  collective(mask, place, &mine, [](void* const* lanes, unsigned all) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((all >> lane & 1u) == 0) continue;
      auto* one = static_cast<Shuffle*>(lanes[lane]);
      if ((all >> one->source & 1u) == 0) fail("a shuffle reads from a lane that takes no part in it");
      one->out = static_cast<Shuffle*>(lanes[one->source])->in;
    }
  });
  std::memcpy(&value, &mine.out, sizeof(T));
  return value;
}

// The lane that a shuffle of `width` reads, as the PTX ISA defines it: its own when the other one is out of the
// segment.
inline unsigned lane() { return fibre->number % 32; }
inline unsigned segment(int width) { return lane() & ~(static_cast<unsigned>(width) - 1); }
inline unsigned inside(unsigned source, int width) {
  return source - segment(width) < unsigned(width) ? source : lane();
}

inline unsigned ballot(unsigned mask, bool vote, const Place& place) {
  struct Vote {
    bool in;
    unsigned out;
  } mine{vote, 0};
  collective(mask, place, &mine, [](void* const* lanes, unsigned all) {
    unsigned votes = 0;
    for (unsigned n = 0; n < 32; ++n) {
      if ((all >> n & 1u) != 0 && static_cast<Vote*>(lanes[n])->in) votes |= 1u << n;
    }
    for (unsigned n = 0; n < 32; ++n) {
      if ((all >> n & 1u) != 0) static_cast<Vote*>(lanes[n])->out = votes;
    }
  });
  return mine.out;
}

}  // namespace COMEBA_HIDDEN emulation
}  // namespace comeba

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, COMEBA_CALLER) {
  namespace e = comeba::emulation;
  const unsigned from = e::segment(width) + (static_cast<unsigned>(source) & (static_cast<unsigned>(width) - 1));
  return e::shuffle(mask, value, from, {"__shfl_sync", file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, COMEBA_CALLER) {
  namespace e = comeba::emulation;  // a lower segment may be read, a higher one not
  const unsigned from = e::lane() ^ static_cast<unsigned>(lanes);
  return e::shuffle(mask, value, from < e::segment(width) + unsigned(width) ? from : e::lane(),
                    {"__shfl_xor_sync", file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, COMEBA_CALLER) {
  namespace e = comeba::emulation;
  return e::shuffle(mask, value, e::inside(e::lane() + delta, width), {"__shfl_down_sync", file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, COMEBA_CALLER) {
  namespace e = comeba::emulation;
  return e::shuffle(mask, value, e::inside(e::lane() - delta, width), {"__shfl_up_sync", file, line});
}
inline unsigned __ballot_sync(unsigned mask, int vote, COMEBA_CALLER) {
  return comeba::emulation::ballot(mask, vote != 0, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int vote, COMEBA_CALLER) {
  return comeba::emulation::ballot(mask, vote != 0, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int vote, COMEBA_CALLER) {
  return comeba::emulation::ballot(mask, vote == 0, {"__all_sync", file, line}) == 0;
}

// --- Memory. Nothing runs at the same time as anything else, so plain loads and stores are atomic.

namespace comeba {
namespace COMEBA_HIDDEN emulation {
template <typename T>
using Same = typename std::common_type<T>::type;  // the value converts to the pointer's type, as with CUDA's overloads
template <typename T, typename F>
T exchange(T* at, F next) {
  const T old = *at;
  *at = next(old);
  return old;
}
}  // namespace COMEBA_HIDDEN emulation
}  // namespace comeba

#define COMEBA_ATOMIC(name, expression)                                               \
  template <typename T>                                                               \
  T name(T* at, comeba::emulation::Same<T> value) {                                   \
    static_assert(std::is_arithmetic<T>::value, "CUDA has this for numbers");         \
    return comeba::emulation::exchange(at, [&](T old) -> T { return (expression); }); \
  }
COMEBA_ATOMIC(atomicAdd, old + value)
COMEBA_ATOMIC(atomicSub, old - value)
COMEBA_ATOMIC(atomicMax, old < value ? value : old)
COMEBA_ATOMIC(atomicMin, value < old ? value : old)
COMEBA_ATOMIC(atomicExch, (static_cast<void>(old), value))
COMEBA_ATOMIC(atomicOr, old | value)
COMEBA_ATOMIC(atomicAnd, old& value)
COMEBA_ATOMIC(atomicXor, old ^ value)
COMEBA_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef COMEBA_ATOMIC
template <typename T>
T atomicCAS(T* at, comeba::emulation::Same<T> expected, comeba::emulation::Same<T> value) {
  return comeba::emulation::exchange(at, [&](T old) { return old == expected ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned, COMEBA_CALLER) { comeba::emulation::spin({"__nanosleep", file, line}); }
[[noreturn]] inline void __trap() { comeba::emulation::fail("__trap()"); }
template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
template <typename T>
T __ldcs(const T* at) {
  return *at;
}
template <typename T>
void __stcg(T* at, comeba::emulation::Same<T> value) {
  *at = value;
}
template <typename T>
void __stcs(T* at, comeba::emulation::Same<T> value) {
  *at = value;
}

// --- Arithmetic

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

// --- The runtime's calls that launchers make

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int byte, std::size_t count, cudaStream_t = nullptr) {
  if (count > 0) std::memset(to, byte, count);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t count, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  if (count > 0) std::memmove(to, from, count);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t count, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, count, kind);
}
template <typename T>
cudaError_t cudaMalloc(T** memory, std::size_t bytes) {
  *memory = static_cast<T*>(std::malloc(bytes));
  if (*memory != nullptr) std::memset(*memory, comeba::emulation::kPoison, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
template <typename K>
cudaError_t cudaFuncSetAttribute(K*, cudaFuncAttribute attribute, int value) {
  const bool possible = attribute != cudaFuncAttributeMaxDynamicSharedMemorySize ||
                        (value >= 0 && std::size_t(value) <= comeba::emulation::max_shared_bytes());
  return possible ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = comeba::emulation::kMultiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(comeba::emulation::max_shared_bytes());
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 << 10;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 1 << 20;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
template <typename K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K*, int threads, std::size_t shared) {
  const bool possible = threads >= 1 && threads <= 1024 && shared <= comeba::emulation::max_shared_bytes();
  *blocks = possible ? static_cast<int>(comeba::emulation::kBlocksPerMultiprocessor) : 0;
  return cudaSuccess;
}
