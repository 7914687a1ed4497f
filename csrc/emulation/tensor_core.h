// Tensor-core instructions of device.cuh on the host, on the register fragments that the PTX ISA lays out.
#pragma once

#include "cuda.h"

namespace comeba {
namespace COMEBA_HIDDEN emulation {

struct MatrixMultiply {
  float* c;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

inline float element(std::uint32_t packed, unsigned half_word, __half) {
  return __half2float({static_cast<std::uint16_t>(packed >> (16 * half_word))});
}
inline float element(std::uint32_t packed, unsigned half_word, __nv_bfloat16) {
  return __bfloat162float({static_cast<std::uint16_t>(packed >> (16 * half_word))});
}

// D = A·B + C once all fragments are gathered into 16×depth, depth×8 and 16×8. Products of the inputs are exact in
// double; the hardware's sum is a little coarser and in no documented order.
template <unsigned depth>
void multiply(void* const* lanes, const float (&a)[16][depth], const float (&b)[depth][8]) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    auto* one = static_cast<MatrixMultiply*>(lanes[lane]);
    for (unsigned n = 0; n < 4; ++n) {
      const unsigned row = lane / 4 + 8 * (n / 2), column = lane % 4 * 2 + n % 2;
      double sum = one->c[n];
      for (unsigned k = 0; k < depth; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      one->c[n] = static_cast<float>(sum);
    }
  }
}

template <typename T>
void complete_16x8x16(void* const* lanes, unsigned) {
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto* one = static_cast<MatrixMultiply*>(lanes[lane]);
    const unsigned group = lane / 4, pair = lane % 4 * 2;
    for (unsigned n = 0; n < 8; ++n)
      a[group + 8 * (n / 2 % 2)][pair + n % 2 + 8 * (n / 4)] = element(one->a[n / 2], n % 2, T{});
    for (unsigned n = 0; n < 4; ++n) b[pair + n % 2 + 8 * (n / 2)][group] = element(one->b[n / 2], n % 2, T{});
  }
  multiply<16>(lanes, a, b);
}

inline void complete_16x8x8_tf32(void* const* lanes, unsigned) {
  float a[16][8], b[8][8];
  const auto seen = [](std::uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); };
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto* one = static_cast<MatrixMultiply*>(lanes[lane]);
    for (unsigned n = 0; n < 4; ++n) a[lane / 4 + 8 * (n % 2)][lane % 4 + 4 * (n / 2)] = seen(one->a[n]);
    for (unsigned n = 0; n < 2; ++n) b[lane % 4 + 4 * n][lane / 4] = seen(one->b[n]);
  }
  multiply<8>(lanes, a, b);
}

struct MatrixLoad {
  const void* row;
  std::uint32_t* to;
};

template <bool transposed>
void complete_load_matrix(void* const* lanes, unsigned) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      std::uint16_t two[2];
      for (unsigned n = 0; n < 2; ++n) {
        const unsigned row = transposed ? lane % 4 * 2 + n : lane / 4,
                       column = transposed ? lane / 4 : lane % 4 * 2 + n;
        const auto* from = static_cast<const std::uint16_t*>(static_cast<MatrixLoad*>(lanes[matrix * 8 + row])->row);
        two[n] = from[column];
      }
      static_cast<MatrixLoad*>(lanes[lane])->to[matrix] = two[0] | static_cast<std::uint32_t>(two[1]) << 16;
    }
  }
}

inline void check_aligned(const void* address, const Place& place) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0)
    fail(text(place) + ": address is not a multiple of 16 bytes");
}

}  // namespace COMEBA_HIDDEN emulation

template <typename T>
void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], T, COMEBA_CALLER) {
  emulation::MatrixMultiply mine{c, a, b};
  emulation::collective(0xffffffffu, {"mma_16x8x16", file, line}, &mine, &emulation::complete_16x8x16<T>);
}

inline void mma_16x8x8_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], COMEBA_CALLER) {
  emulation::MatrixMultiply mine{c, a, b};
  emulation::collective(0xffffffffu, {"mma_16x8x8_tf32", file, line}, &mine, &emulation::complete_16x8x8_tf32);
}

inline std::uint32_t to_tf32(float value) {
  const std::uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline void load_matrix_x4(std::uint32_t (&r)[4], const void* row, COMEBA_CALLER) {
  emulation::check_aligned(row, {"load_matrix_x4", file, line});
  emulation::MatrixLoad mine{row, r};
  emulation::collective(0xffffffffu, {"load_matrix_x4", file, line}, &mine, &emulation::complete_load_matrix<false>);
}
inline void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row, COMEBA_CALLER) {
  emulation::check_aligned(row, {"load_matrix_x4_transposed", file, line});
  emulation::MatrixLoad mine{row, r};
  emulation::collective(0xffffffffu, {"load_matrix_x4_transposed", file, line}, &mine,
                        &emulation::complete_load_matrix<true>);
}

// The destination holds NaN until the group is waited for, so that a missing wait shows.
inline void copy_async_16(void* shared, const void* global, bool valid = true, COMEBA_CALLER) {
  emulation::check_aligned(shared, {"copy_async_16", file, line});
  if (valid) emulation::check_aligned(global, {"copy_async_16", file, line});
  std::memset(shared, emulation::kPoison, 16);
  emulation::fibre->copies.back().push_back({shared, global, valid});
}
inline void copy_async_commit() { emulation::fibre->copies.emplace_back(); }
template <int pending>
void copy_async_wait() {
  auto& groups = emulation::fibre->copies;  // the last one is open and not waited for
  while (groups.size() > pending + 1u) {
    for (const auto& copy : groups.front()) {
      copy.valid ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace comeba
