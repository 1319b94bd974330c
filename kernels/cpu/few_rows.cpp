// Y = X W^T for a few rows: decoding. All of the weight is read for them, so that how fast memory is
// read is all that counts.
//
// The weight is packed as oneDNN packs it: outputs in blocks of 64, of each block the inputs one after
// the other. A block is read at four places at once: the processor fetches ahead of each, and one core
// reads 22 GB/s where it reads 17 from one place. The first row computes with what arrives, the others
// with what is in the cache by then.
#include "common.h"

namespace finetuning {
namespace {

constexpr long kBlock = 64;
constexpr int kStreams = 4;
constexpr long kChunk = 32;
constexpr long kMostRows = 96;
constexpr int kBlockVectors = kBlock / kLanes;
typedef const UnalignedVector* In;

// `count` inputs of each stream, all outputs of the block, one row.
void stream(const float* x, const float* w, long apart, long count, float* sums) {
  Vector sum[kBlockVectors];
  for (int n = 0; n < kBlockVectors; ++n) sum[n] = reinterpret_cast<Vector*>(sums)[n];
  for (long k = 0; k < count; ++k)
    for (int s = 0; s < kStreams; ++s) {
      const float left = x[k + s * apart];
      const In right = reinterpret_cast<In>(w + (k + s * apart) * kBlock);
      for (int n = 0; n < kBlockVectors; ++n) sum[n] += left * right[n];
    }
  for (int n = 0; n < kBlockVectors; ++n) reinterpret_cast<Vector*>(sums)[n] = sum[n];
}

// ROWS rows, NV vectors of outputs at a time, from the cache.
template <int ROWS, int NV>
void add_tile(const float* x, long x_row, const float* w, long count, float* sums) {
  Vector sum[ROWS][NV];
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < NV; ++n) sum[m][n] = reinterpret_cast<Vector*>(sums + m * kBlock)[n];
  for (long k = 0; k < count; ++k) {
    const In right = reinterpret_cast<In>(w + k * kBlock);
    for (int m = 0; m < ROWS; ++m) {
      const float left = x[m * x_row + k];
      for (int n = 0; n < NV; ++n) sum[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < NV; ++n) reinterpret_cast<Vector*>(sums + m * kBlock)[n] = sum[m][n];
}

template <int ROWS, int NV>
void add_rows(const float* x, long x_row, const float* w, long apart, long count, float* sums) {
  for (int s = 0; s < kStreams; ++s)
    for (long n = 0; n < kBlock; n += NV * kLanes)
      add_tile<ROWS, NV>(x + s * apart, x_row, w + s * apart * kBlock + n, count, sums + n);
}

// The largest tiles whose sums stay in registers: six rows of two vectors where there are 16, and of
// four where there are 32; of fewer rows more vectors.
void add_other_rows(const float* x, long x_row, const float* w, long apart, long count, long rows,
                    float* sums) {
  constexpr int few = 4, many = kLanes == 16 ? 4 : 2, single = kLanes == 16 ? 4 : 8;
  while (rows > 0) {
    // Four rows are better as three and one, eight as six and two.
    const long step = rows >= 6 ? 6 : rows == 5 ? 5 : rows >= 3 ? 3 : rows;
    if (step == 6) add_rows<6, many>(x, x_row, w, apart, count, sums);
    if (step == 5) add_rows<5, many>(x, x_row, w, apart, count, sums);
    if (step == 3) add_rows<3, few>(x, x_row, w, apart, count, sums);
    if (step == 2) add_rows<2, few>(x, x_row, w, apart, count, sums);
    if (step == 1) add_rows<1, single>(x, x_row, w, apart, count, sums);
    rows -= step, x += step * x_row, sums += step * kBlock;
  }
}

void multiply_block(const float* x, long x_row, long rows, const float* w, long inner, float* sums) {
  std::memset(sums, 0, rows * kBlock * sizeof(float));
  const long apart = inner / kStreams;
  for (long k = 0; k < apart; k += kChunk) {
    const long count = apart - k < kChunk ? apart - k : kChunk;
    stream(x + k, w + k * kBlock, apart, count, sums);
    add_other_rows(x + x_row + k, x_row, w + k * kBlock, apart, count, rows - 1, sums + kBlock);
  }
  for (long k = apart * kStreams; k < inner; ++k)
    for (long m = 0; m < rows; ++m) add_tile<1, kBlockVectors>(x + m * x_row + k, 0, w + k * kBlock,
                                                               1, sums + m * kBlock);
}

}  // namespace
}  // namespace finetuning

using namespace finetuning;

extern "C" {

// x [rows, inner], y [rows, outer], the packed weight [ceil(outer / 64), inner_padded, 64]; rows at
// most kMostRows.
void finetuning_few_rows(int, const float* x, long x_row, long rows, const float* weight, long inner,
                         long inner_padded, long outer, const float* bias, float* y, long y_row) {
  const long num_blocks = (outer + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static)
  for (long block = 0; block < num_blocks; ++block) {
    alignas(64) float sums[kMostRows * kBlock];
    multiply_block(x, x_row, rows, weight + block * inner_padded * kBlock, inner, sums);
    const long first = block * kBlock, count = outer - first < kBlock ? outer - first : kBlock;
    for (long m = 0; m < rows; ++m)
      for (long n = 0; n < count; ++n)
        y[m * y_row + first + n] = sums[m * kBlock + n] + (bias ? bias[first + n] : 0.0f);
  }
}
}
