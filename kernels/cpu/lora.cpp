// The LoRA products of a merged linear and their backward, float32. The formulas are those of
// lora.py.
//
// The inner or the outer dimension of every product is the rank, so that packing a whole matrix, as
// a general GEMM does, costs as much as the product. Here only blocks are copied, which fit into the
// first cache, and the products of a call share one team of threads. Each element is summed by one
// thread in a fixed order.
#include "common.h"

namespace finetuning {

// A target within the merged linear, as lora.py fills it in.
struct LoraTarget {
  const float* a;   // [r, in_features]
  const float* b;   // [end - start, r], rows b_row apart
  long b_row;
  long start, end;  // its columns in the merged output
  float* grad_a;    // [r, in_features]
  float* grad_b;    // [end - start, r]

  long width() const { return end - start; }
};

namespace {

constexpr long kRows = 64;     // rows of a block
constexpr long kColumns = 64;  // columns of a block
constexpr long kRanks = 64;    // ranks of a block
constexpr int kDotRows = kLanes == 16 ? 6 : 4;
constexpr int kDotColumns = kLanes == 16 ? 4 : 3;
constexpr long kRankStep = 2 * kDotColumns;  // ranks of a task, where tasks are split by them

long least(long a, long b) { return a < b ? a : b; }
long blocks(long n, long size) { return (n + size - 1) / size; }
long padded(long n) { return round_up(n, kLanes); }

// Kept between calls: the products of rank size, and a padded B.
Scratch shrunk, padded_b;

float sum(const Vector& v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <int M, int N>
void dot_tile(const float* x, long x_row, const float* a, long a_row, long inner, float scale,
              float* u, long u_row) {
  Vector total[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) total[m][n] = Vector{};
  long k = 0;
  for (; k + kLanes <= inner; k += kLanes) {
    Vector right[N];
    for (int n = 0; n < N; ++n)
      right[n] = *reinterpret_cast<const UnalignedVector*>(a + n * a_row + k);
    for (int m = 0; m < M; ++m) {
      const Vector left = *reinterpret_cast<const UnalignedVector*>(x + m * x_row + k);
      for (int n = 0; n < N; ++n) total[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float value = sum(total[m][n]);
      for (long i = k; i < inner; ++i) value += x[m * x_row + i] * a[n * a_row + i];
      u[m * u_row + n] = scale * value;
    }
}

template <int N>
void dot_rows(const float* x, long x_row, const float* a, long a_row, long rows, long inner,
              float scale, float* u, long u_row) {
  long m = 0;
  for (; m + kDotRows <= rows; m += kDotRows)
    dot_tile<kDotRows, N>(x + m * x_row, x_row, a, a_row, inner, scale, u + m * u_row, u_row);
  for (; m < rows; ++m)
    dot_tile<1, N>(x + m * x_row, x_row, a, a_row, inner, scale, u + m * u_row, u_row);
}

// U = scale X A^T for a block of rows and some ranks: of a few rows one target would be too little
// work to share. Both are read along their rows. Columns beyond the rank are set to zero.
void shrink(const float* x, long x_row, const float* a, long rows, long in_features, long r,
            long from, long to, float scale, float* u, long u_row) {
  const long last = least(to, r);
  long n = from;
  for (; n + kDotColumns <= last; n += kDotColumns)
    dot_rows<kDotColumns>(x, x_row, a + n * in_features, in_features, rows, in_features, scale,
                          u + n, u_row);
  for (; n < last; ++n)
    dot_rows<1>(x, x_row, a + n * in_features, in_features, rows, in_features, scale, u + n, u_row);
  for (long m = 0; m < rows; ++m)
    for (n = last; n < to; ++n) u[m * u_row + n] = 0;
}

// A copy of a block, its columns padded with zeros.
void copy_block(const float* x, long x_row, long rows, long columns, float* out, long out_row) {
  for (long m = 0; m < rows; ++m) {
#pragma omp simd
    for (long n = 0; n < columns; ++n) out[m * out_row + n] = x[m * x_row + n];
    for (long n = columns; n < padded(columns); ++n) out[m * out_row + n] = 0;
  }
}

// C += A V for a block of C; V's columns are padded, C's need not be.
void add_product(const float* a, long a_row, long a_inner, const float* v, long v_row, float* c,
                 long c_row, long rows, long columns, long inner) {
  if (columns % kLanes == 0) {
    multiply(a, a_row, a_inner, v, v_row, c, c_row, rows, columns, inner, true);
    return;
  }
  float block[kRows * kColumns];
  for (long first = 0; first < rows; first += kRows) {
    const long n = least(kRows, rows - first);
    for (long from = 0; from < columns; from += kColumns) {
      const long width = least(kColumns, columns - from);
      multiply(a + first * a_row, a_row, a_inner, v + from, v_row, block, kColumns, n,
               padded(width), inner, false);
      for (long m = 0; m < n; ++m)
#pragma omp simd
        for (long i = 0; i < width; ++i)
          c[(first + m) * c_row + from + i] += block[m * kColumns + i];
    }
  }
}

// C += A^T V, A [rows, count] and V [rows, columns], a copied block of A at a time.
void add_transposed(const float* a, long a_row, const float* v, long v_row, float* c, long c_row,
                    long rows, long count, long columns) {
  float block[kRows * kColumns];
  for (long first = 0; first < rows; first += kRows) {
    const long n = least(kRows, rows - first);
    copy_block(a + first * a_row, a_row, n, count, block, kColumns);
    add_product(block, 1, kColumns, v + first * v_row, v_row, c, c_row, count, columns, n);
  }
}

// A block of columns of a target.
struct Columns {
  const LoraTarget& target;
  long index;  // of the target
  long first, count;
};

struct Linear {
  const LoraTarget* targets;
  long count, r, in_features;

  // Elements of a row of the products of rank size.
  long shrunk_row() const { return count * padded(r); }
  long column_blocks() const {
    long total = 0;
    for (long i = 0; i < count; ++i) total += blocks(targets[i].width(), kColumns);
    return total;
  }
  Columns columns(long block) const {
    long i = 0;
    for (; block >= blocks(targets[i].width(), kColumns); ++i)
      block -= blocks(targets[i].width(), kColumns);
    const long first = block * kColumns;
    return {targets[i], i, first, least(kColumns, targets[i].width() - first)};
  }
};

void add(const Linear& linear, float scale, float* y, long y_row, const float* x, long x_row,
         long rows) {
  const long r = linear.r, u_row = linear.shrunk_row();
  float* u = shrunk.reserve(rows * u_row);
#pragma omp parallel
  {
#pragma omp for collapse(3) schedule(static)
    for (long block = 0; block < blocks(rows, kRows); ++block)
      for (long i = 0; i < linear.count; ++i)
        for (long rank = 0; rank < padded(r); rank += kRankStep) {
          const long first = block * kRows;
          shrink(x + first * x_row, x_row, linear.targets[i].a, least(kRows, rows - first),
                 linear.in_features, r, rank, least(rank + kRankStep, padded(r)), scale,
                 u + first * u_row + i * padded(r), u_row);
        }
#pragma omp for schedule(static)
    for (long block = 0; block < linear.column_blocks(); ++block) {
      const Columns c = linear.columns(block);
      float b_t[kRanks * kColumns];
      for (long from = 0; from < r; from += kRanks) {
        const long ranks = least(kRanks, r - from);
        const float* b = c.target.b + c.first * c.target.b_row + from;
        for (long j = 0; j < ranks; ++j) {
          for (long n = 0; n < c.count; ++n) b_t[j * kColumns + n] = b[n * c.target.b_row + j];
          for (long n = c.count; n < padded(c.count); ++n) b_t[j * kColumns + n] = 0;
        }
        add_product(u + c.index * padded(r) + from, u_row, 1, b_t, kColumns,
                    y + c.target.start + c.first, y_row, rows, c.count, ranks);
      }
    }
  }
}

// G = scale dY B for a block of rows of a target.
void gradient_of_shrunk(const float* dy, long dy_row, const float* b, long b_row, long rows,
                        long width, long r, float scale, float* g, long g_row) {
  float block[kRows * kColumns];
  for (long first = 0; first < width; first += kColumns) {
    const long columns = least(kColumns, width - first);
    copy_block(dy + first, dy_row, rows, columns, block, kColumns);
    multiply(block, kColumns, 1, b + first * b_row, b_row, g, g_row, rows, padded(r), columns,
             first > 0);
  }
  for (long m = 0; m < rows; ++m)
    for (long n = 0; n < padded(r); ++n) g[m * g_row + n] *= scale;
}

// x and dx may be null.
void backward(const Linear& linear, float scale, const float* dy, long dy_row, const float* x,
              long x_row, float* dx, long dx_row, float* g, bool has_g, long rows) {
  const long r = linear.r, rp = padded(r), g_row = linear.shrunk_row(), in = linear.in_features;
  float* u = x == nullptr ? nullptr : shrunk.reserve(rows * g_row);
  float* b_copy = nullptr;
  if (!has_g && r != rp) {
    long width = 0;
    for (long i = 0; i < linear.count; ++i) width += linear.targets[i].width();
    b_copy = padded_b.reserve(width * rp);
    for (long i = 0, at = 0; i < linear.count; at += linear.targets[i++].width())
      copy_block(linear.targets[i].b, linear.targets[i].b_row, linear.targets[i].width(), r,
                 b_copy + at * rp, rp);
  }
#pragma omp parallel
  {
#pragma omp for collapse(2) schedule(static)
    for (long block = 0; block < blocks(rows, kRows); ++block)
      for (long i = 0; i < linear.count; ++i) {
        const LoraTarget& target = linear.targets[i];
        const long first = block * kRows, n = least(kRows, rows - first);
        const long at = first * g_row + i * rp;
        if (!has_g) {
          const float* b = target.b;
          if (b_copy != nullptr) {
            b = b_copy;
            for (long j = 0; j < i; ++j) b += linear.targets[j].width() * rp;
          }
          gradient_of_shrunk(dy + first * dy_row + target.start, dy_row, b,
                             b_copy == nullptr ? target.b_row : rp, n, target.width(), r, scale,
                             g + at, g_row);
        }
        if (x != nullptr)
          shrink(x + first * x_row, x_row, target.a, n, in, r, 0, rp, scale, u + at, g_row);
      }
    if (x != nullptr) {
#pragma omp for schedule(static) nowait
      for (long block = 0; block < linear.column_blocks(); ++block) {
        const Columns c = linear.columns(block);
        add_transposed(dy + c.target.start + c.first, dy_row, u + c.index * rp, g_row,
                       c.target.grad_b + c.first * r, r, rows, c.count, r);
      }
#pragma omp for collapse(2) schedule(static) nowait
      for (long i = 0; i < linear.count; ++i)
        for (long block = 0; block < blocks(in, kColumns); ++block) {
          const long first = block * kColumns, count = least(kColumns, in - first);
          float copy[kRows * kColumns];
          for (long at = 0; at < rows; at += kRows) {
            const long n = least(kRows, rows - at);
            copy_block(x + at * x_row + first, x_row, n, count, copy, kColumns);
            add_product(g + at * g_row + i * rp, 1, g_row, copy, kColumns,
                        linear.targets[i].grad_a + first, in, r, count, n);
          }
        }
    }
    if (dx != nullptr) {
#pragma omp for collapse(2) schedule(static) nowait
      for (long block = 0; block < blocks(rows, kRows); ++block)
        for (long column = 0; column < blocks(in, kColumns); ++column) {
          const long first = block * kRows, from = column * kColumns;
          const long count = least(kColumns, in - from);
          float copy[kRanks * kColumns];
          for (long i = 0; i < linear.count; ++i)
            for (long rank = 0; rank < r; rank += kRanks) {
              const long ranks = least(kRanks, r - rank);
              copy_block(linear.targets[i].a + rank * in + from, in, ranks, count, copy, kColumns);
              add_product(g + first * g_row + i * rp + rank, g_row, 1, copy, kColumns,
                          dx + first * dx_row + from, dx_row, least(kRows, rows - first), count,
                          ranks);
            }
        }
    }
  }
}

}  // namespace
}  // namespace finetuning

using namespace finetuning;

extern "C" {

void finetuning_lora_add(int, float* y, long y_row, const float* x, long x_row, long rows,
                         long in_features, const void* targets, long num_targets, long r,
                         float scale) {
  add({(const LoraTarget*)targets, num_targets, r, in_features}, scale, y, y_row, x, x_row, rows);
}

void finetuning_lora_backward(int, const float* dy, long dy_row, const float* x, long x_row,
                              float* dx, long dx_row, float* g, int has_g, long rows,
                              long in_features, const void* targets, long num_targets, long r,
                              float scale) {
  backward({(const LoraTarget*)targets, num_targets, r, in_features}, scale, dy, dy_row, x, x_row,
           dx, dx_row, g, has_g != 0, rows);
}
}
