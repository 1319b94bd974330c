// Shared by the CPU kernels: element types, vectors, exp, and a small matrix product.
//
// Plain C++17 with GCC/Clang vector extensions, no headers beyond the standard library: it compiles
// in seconds on any machine with a compiler, for the instruction set of that machine.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace finetuning {

enum DType { kFloat = 0, kBFloat16 = 1 };

struct bfloat16 {
  uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline float load(const bfloat16* p) {
  uint32_t u = uint32_t(p->bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline void store(float* p, float v) { *p = v; }
inline void store(bfloat16* p, float v) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &v, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = uint16_t(v != v ? 0x7fc0u : rounded);
}

// exp to 2 ulp for |x| < 87.3, clamped beyond; NaN and infinity give NaN (Cephes). Free of branches:
// the clamp works on the bits because GCC splits a comparison of floats into paths that divide
// masked lanes, at a tenth of the speed.
inline float fast_exp(float exact) {
  uint32_t bits;
  std::memcpy(&bits, &exact, 4);
  const uint32_t limit = 0x42ae999au;  // 87.3
  uint32_t magnitude = bits & 0x7fffffffu;
  magnitude = magnitude < limit ? magnitude : limit;
  bits = (bits & 0x80000000u) | magnitude;
  float x;
  std::memcpy(&x, &bits, 4);
  float n = __builtin_floorf(x * 1.44269504f + 0.5f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t scale = uint32_t(int32_t(n) + 127) << 23;
  float s;
  std::memcpy(&s, &scale, 4);
  return p * s + (exact - exact);
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline long round_up(long x, long to) { return (x + to - 1) / to * to; }

// Memory that is kept between calls: fresh pages would cost as much as the arithmetic.
struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  float* reserve(size_t floats) {
    if (floats > size) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64)));
      size = data == nullptr ? 0 : floats;
    }
    return data;
  }
};

// A tile of C: MR rows, NR vectors wide, kept in registers over the whole inner dimension.
template <int MR, int NR>
inline void multiply_tile(const float* a, long a_row, long a_inner, const float* b, long b_row,
                          float* c, long c_row, long inner, bool add) {
  Vector sum[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) sum[m][n] = Vector{};
  for (long k = 0; k < inner; ++k) {
    Vector right[NR];
    for (int n = 0; n < NR; ++n)
      right[n] = *reinterpret_cast<const UnalignedVector*>(b + k * b_row + n * kLanes);
    for (int m = 0; m < MR; ++m) {
      const float left = a[m * a_row + k * a_inner];
      for (int n = 0; n < NR; ++n) sum[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) {
      UnalignedVector* out = reinterpret_cast<UnalignedVector*>(c + m * c_row + n * kLanes);
      *out = add ? *out + sum[m][n] : sum[m][n];
    }
}

// The largest tiles whose sums stay in registers, beside what they are made of: there are 32 with
// AVX-512 and 16 without.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;

template <int NR>
inline void multiply_columns(const float* a, long a_row, long a_inner, const float* b, long b_row,
                             float* c, long c_row, long rows, long inner, bool add) {
  long m = 0;
  for (; m + kTileRows <= rows && rows - m != 8; m += kTileRows)  // 8 rows are better as 4 and 4
    multiply_tile<kTileRows, NR>(a + m * a_row, a_row, a_inner, b, b_row, c + m * c_row, c_row,
                                 inner, add);
  for (; m + 4 <= rows; m += 4)
    multiply_tile<4, NR>(a + m * a_row, a_row, a_inner, b, b_row, c + m * c_row, c_row, inner, add);
  for (; m + 2 <= rows; m += 2)
    multiply_tile<2, NR>(a + m * a_row, a_row, a_inner, b, b_row, c + m * c_row, c_row, inner, add);
  for (; m < rows; ++m)
    multiply_tile<1, NR>(a + m * a_row, a_row, a_inner, b, b_row, c + m * c_row, c_row, inner, add);
}

// C (+)= A B with A [rows, inner] (any strides), B [inner, columns] and C [rows, columns] row-major;
// columns is a multiple of kLanes.
inline void multiply(const float* a, long a_row, long a_inner, const float* b, long b_row, float* c,
                     long c_row, long rows, long columns, long inner, bool add) {
  long n = 0;
  for (; n + kTileVectors * kLanes <= columns; n += kTileVectors * kLanes)
    multiply_columns<kTileVectors>(a, a_row, a_inner, b + n, b_row, c + n, c_row, rows, inner, add);
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes)
    multiply_columns<2>(a, a_row, a_inner, b + n, b_row, c + n, c_row, rows, inner, add);
  for (; n < columns; n += kLanes)
    multiply_columns<1>(a, a_row, a_inner, b + n, b_row, c + n, c_row, rows, inner, add);
}

// The columns of a matrix that are multiplied at a time are a panel.
constexpr long kPanel = kTileVectors * kLanes;

// As `multiply`, B in panels: of each its rows one after the other, so that it is read from the
// first byte to the last. Its last one is narrower where `columns` is no multiple of kPanel.
inline void multiply_panels(const float* a, long a_row, long a_inner, const float* b, float* c,
                            long c_row, long rows, long columns, long inner, bool add) {
  long n = 0;
  for (; n + kPanel <= columns; n += kPanel)
    multiply_columns<kTileVectors>(a, a_row, a_inner, b + inner * n, kPanel, c + n, c_row, rows,
                                   inner, add);
  if (n < columns)
    multiply(a, a_row, a_inner, b + inner * n, columns - n, c + n, c_row, rows, columns - n, inner,
             add);
}

}  // namespace finetuning
