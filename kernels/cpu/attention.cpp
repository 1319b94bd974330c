// Causal attention over vLLM's paged K and V: the backward for a window of queries, and the forward
// again where its output was not kept. See paged_attention.py for the formulas and the layout.
//
// Everything that has a side as long as the sequence lies in tiles of kKeys keys, each contiguous:
// whole rows would be kilobytes apart, a page of memory for each step of an inner loop. Right sides
// of products lie in panels (common.h) within their tiles.
//
// Softmax rows exist for one block of queries at a time. Within a block the work is split twice: by
// head and queries (P, dS and dQ), then by KV head and keys (dK and dV). No two threads write to
// the same place, so results do not depend on who runs when.
#include "common.h"

namespace finetuning {
namespace {

// Measured at 512 and 2048 keys, a core with 1 MB of L2 and AVX-512, and one with half of it and AVX2.
constexpr bool kWide = kLanes == 16;
constexpr long kQueries = kWide ? 64 : 48;     // a block of queries
constexpr long kSubQueries = kWide ? 16 : 12;  // of a task of the first split: its rows fit in L2
constexpr long kKeys = kWide ? 64 : 48;        // a tile of keys, and a task of the second split

Scratch scratch;

struct Shape {
  long queries, start, heads, kv_heads, head_size, block_size;
  float scale;
  long keys() const { return start + queries; }
  long tiles() const { return tiles_to(keys()); }
  long group() const { return heads / kv_heads; }
  static long tiles_to(long key) { return (key + kKeys - 1) / kKeys; }
};

// Where element (row, column) of a matrix [rows, columns] lies that is cut into panels.
inline long in_panels(long row, long column, long rows, long columns) {
  const long first = column / kPanel * kPanel;
  const long width = columns - first < kPanel ? columns - first : kPanel;
  return rows * first + row * width + (column - first);
}

// Per KV head and tile, in float32: K^T and V^T [head_size, kKeys], K (or V) plain, [kKeys,
// head_size], all in panels. Keys that fill up the last tile are zero.
template <class T>
void read_cache(const Shape& s, const T* cache, long block_stride, long head_stride,
                const int64_t* blocks, float* key_t, float* value_t, float* plain,
                bool plain_is_key) {
  const long d = s.head_size, tiles = s.tiles();
#pragma omp parallel for collapse(2)
  for (long h = 0; h < s.kv_heads; ++h)
    for (long t = 0; t < tiles; ++t) {
      const long at_tile = (h * tiles + t) * kKeys * d;
      float* kt = key_t + at_tile;
      float* vt = value_t == nullptr ? nullptr : value_t + at_tile;
      float* rows = plain + at_tile;
      const long first = t * kKeys;
      const long end = first + kKeys < s.keys() ? first + kKeys : s.keys();
      long key = first;
      while (key < end) {  // a run of keys within one block of the cache
        const long at = key % s.block_size, to = key - first;
        const long n = s.block_size - at < end - key ? s.block_size - at : end - key;
        const T* block = cache + blocks[key / s.block_size] * block_stride + h * head_stride;
        const T* k = block + at;
        const T* v = block + d * s.block_size + at * d;
        for (long from = 0, size; from < n; from += size) {  // a run within one panel
          const long column = to + from, left = kPanel - column % kPanel;
          size = n - from < left ? n - from : left;
          float* kp = kt + in_panels(0, column, d, kKeys);
          float* vp = vt == nullptr ? nullptr : vt + in_panels(0, column, d, kKeys);
          for (long i = 0; i < d; ++i) {
#pragma omp simd
            for (long j = 0; j < size; ++j) kp[i * kPanel + j] = load(k + i * s.block_size + from + j);
            if (vp != nullptr)
              for (long j = 0; j < size; ++j) vp[i * kPanel + j] = load(v + (from + j) * d + i);
          }
        }
        for (long j = 0; j < n; ++j)
          for (long i = 0; i < d; ++i)
            rows[in_panels(to + j, i, kKeys, d)] =
                plain_is_key ? load(k + i * s.block_size + j) : load(v + j * d + i);
        key += n;
      }
      for (long to = key - first; to < kKeys; ++to)
        for (long i = 0; i < d; ++i) {
          kt[in_panels(i, to, d, kKeys)] = 0;
          if (vt != nullptr) vt[in_panels(i, to, d, kKeys)] = 0;
          rows[in_panels(to, i, kKeys, d)] = 0;
        }
    }
}

template <class T>
void copy_rows(const T* x, long row_stride, long rows, long width, float* out) {
  for (long r = 0; r < rows; ++r)
#pragma omp simd
    for (long i = 0; i < width; ++i) out[r * width + i] = load(x + r * row_stride + i);
}

// How many keys of the tile that begins at key `from` a query at `position` sees.
inline long seen_of_tile(long position, long from) {
  const long seen = position + 1 - from;
  return seen < 0 ? 0 : seen < kKeys ? seen : kKeys;
}

// Columns of tile `t` that the queries before `end` see, in whole panels.
inline long seen_columns(long end, long t) {
  const long columns = round_up(end - t * kKeys, kPanel);
  return columns < kKeys ? columns : kKeys;
}

inline float largest(const float* x, long n, float top) {
#pragma omp simd reduction(max : top)
  for (long i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

template <class T>
void backward(const Shape& s, const T* d_out, const T* query, const T* cache, long block_stride,
              long head_stride, const int64_t* blocks, float* dk, float* dv, long kv_stride,
              float* dq) {
  const long d = s.head_size, tiles = s.tiles(), hd = s.heads * d, group = s.group();
  const long kv_size = s.kv_heads * tiles * kKeys * d;
  float* key_t = scratch.reserve(kv_size * 3 + s.heads * kQueries * d * 2 +
                                 s.heads * kQueries * tiles * kKeys * 2);
  float* value_t = key_t + kv_size;
  float* key = value_t + kv_size;
  // A head's rows are followed by those of the next head that shares its K and V.
  float* q_rows = key + kv_size;
  float* do_rows = q_rows + s.heads * kQueries * d;
  // Of each KV head and tile: [queries of its heads, kKeys].
  float* p_tiles = do_rows + s.heads * kQueries * d;
  float* ds_tiles = p_tiles + s.heads * kQueries * tiles * kKeys;
  read_cache(s, cache, block_stride, head_stride, blocks, key_t, value_t, key, true);

  for (long first = 0; first < s.queries; first += kQueries) {
    const long count = s.queries - first < kQueries ? s.queries - first : kQueries;
    const long used = Shape::tiles_to(s.start + first + count);  // tiles this block can see
    const long subs = (count + kSubQueries - 1) / kSubQueries;
    const long tile_size = group * count * kKeys;
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
      for (long h = 0; h < s.heads; ++h)
        for (long sub = 0; sub < subs; ++sub) {
          const long at = sub * kSubQueries;
          const long n = count - at < kSubQueries ? count - at : kSubQueries;
          const long kv = h / group, row = (h % group) * count + at;
          const long position = s.start + first + at;  // of the first row
          float* q = q_rows + (h * count + at) * d;
          float* g = do_rows + (h * count + at) * d;
          const long kv_at = kv * tiles * kKeys * d;
          float* p = p_tiles + kv * tiles * tile_size + row * kKeys;
          float* ds = ds_tiles + kv * tiles * tile_size + row * kKeys;
          copy_rows(query + (first + at) * hd + h * d, hd, n, d, q);
          copy_rows(d_out + (first + at) * hd + h * d, hd, n, d, g);

          float top[kSubQueries], sum[kSubQueries], delta[kSubQueries];
          for (long r = 0; r < n; ++r) top[r] = -__builtin_inff(), sum[r] = 0, delta[r] = 0;
          const long seen = Shape::tiles_to(position + n);
          for (long t = 0; t < seen; ++t) {
            float* pt = p + t * tile_size;
            const long columns = seen_columns(position + n, t);
            multiply_panels(q, d, 1, key_t + kv_at + t * kKeys * d, pt, kKeys, n, columns, d, false);
            multiply_panels(g, d, 1, value_t + kv_at + t * kKeys * d, ds + t * tile_size, kKeys, n,
                            columns, d, false);
            for (long r = 0; r < n; ++r)
              top[r] = largest(pt + r * kKeys, seen_of_tile(position + r, t * kKeys), top[r]);
          }
          for (long t = 0; t < seen; ++t)
            for (long r = 0; r < n; ++r) {
              float* pr = p + t * tile_size + r * kKeys;
              float* dr = ds + t * tile_size + r * kKeys;
              const long valid = seen_of_tile(position + r, t * kKeys);
              const float most = top[r];
              float total = 0, product = 0;
#pragma omp simd reduction(+ : total, product)
              for (long i = 0; i < valid; ++i) {
                pr[i] = fast_exp(s.scale * (pr[i] - most));
                total += pr[i];
                product += pr[i] * dr[i];
              }
              sum[r] += total;
              delta[r] += product;
              for (long i = valid; i < kKeys; ++i) pr[i] = dr[i] = 0;
            }
          for (long t = 0; t < seen; ++t) {
            for (long r = 0; r < n; ++r) {
              float* pr = p + t * tile_size + r * kKeys;
              float* dr = ds + t * tile_size + r * kKeys;
              const float inverse = 1.0f / sum[r], mean = delta[r] * inverse;
#pragma omp simd
              for (long i = 0; i < kKeys; ++i) {
                pr[i] *= inverse;
                dr[i] = s.scale * pr[i] * (dr[i] - mean);
              }
            }
            multiply_panels(ds + t * tile_size, kKeys, 1, key + kv_at + t * kKeys * d,
                            dq + (first + at) * hd + h * d, hd, n, d, kKeys, t > 0);
          }
          for (long t = seen; t < used; ++t) {
            std::memset(p + t * tile_size, 0, n * kKeys * sizeof(float));
            std::memset(ds + t * tile_size, 0, n * kKeys * sizeof(float));
          }
        }
#pragma omp for collapse(2) schedule(static)
      for (long kv = 0; kv < s.kv_heads; ++kv)
        for (long t = 0; t < used; ++t) {
          const long n = s.keys() - t * kKeys < kKeys ? s.keys() - t * kKeys : kKeys;
          const long rows = group * count, to = kv * kv_stride + t * kKeys * d;
          const long at = (kv * tiles + t) * tile_size;
          multiply(p_tiles + at, 1, kKeys, do_rows + kv * rows * d, d, dv + to, d, n, d, rows,
                   true);
          multiply(ds_tiles + at, 1, kKeys, q_rows + kv * rows * d, d, dk + to, d, n, d, rows,
                   true);
        }
    }
  }
}

template <class T>
void forward(const Shape& s, const T* query, const T* cache, long block_stride, long head_stride,
             const int64_t* blocks, T* out) {
  const long d = s.head_size, tiles = s.tiles(), hd = s.heads * d;
  const long kv_size = s.kv_heads * tiles * kKeys * d;
  const long subs = (s.queries + kSubQueries - 1) / kSubQueries;
  // Scores of as many tasks as run at a time.
  const long at_once = s.heads * (kQueries / kSubQueries), task = kSubQueries * tiles * kKeys;
  float* key_t = scratch.reserve(kv_size * 2 + at_once * (2 * kSubQueries * d + task));
  float* value = key_t + kv_size;
  float* rows = value + kv_size;
  read_cache(s, cache, block_stride, head_stride, blocks, key_t, static_cast<float*>(nullptr),
             value, false);
  for (long first = 0; first < subs; first += kQueries / kSubQueries) {
#pragma omp parallel for collapse(2) schedule(static)
    for (long h = 0; h < s.heads; ++h)
      for (long sub = 0; sub < kQueries / kSubQueries; ++sub) {
        const long at = (first + sub) * kSubQueries;
        if (at >= s.queries) continue;
        const long n = s.queries - at < kSubQueries ? s.queries - at : kSubQueries;
        const long position = s.start + at, kv_at = h / s.group() * tiles * kKeys * d;
        float* q = rows + (h * (kQueries / kSubQueries) + sub) * (2 * kSubQueries * d + task);
        float* o = q + kSubQueries * d;
        float* p = o + kSubQueries * d;
        copy_rows(query + at * hd + h * d, hd, n, d, q);
        float top[kSubQueries], sum[kSubQueries];
        for (long r = 0; r < n; ++r) top[r] = -__builtin_inff(), sum[r] = 0;
        const long seen = Shape::tiles_to(position + n);
        for (long t = 0; t < seen; ++t) {
          float* pt = p + t * kSubQueries * kKeys;
          multiply_panels(q, d, 1, key_t + kv_at + t * kKeys * d, pt, kKeys, n,
                          seen_columns(position + n, t), d, false);
          for (long r = 0; r < n; ++r)
            top[r] = largest(pt + r * kKeys, seen_of_tile(position + r, t * kKeys), top[r]);
        }
        for (long t = 0; t < seen; ++t) {
          float* pt = p + t * kSubQueries * kKeys;
          for (long r = 0; r < n; ++r) {
            float* pr = pt + r * kKeys;
            const long valid = seen_of_tile(position + r, t * kKeys);
            const float most = top[r];
            float total = 0;
#pragma omp simd reduction(+ : total)
            for (long i = 0; i < valid; ++i) {
              pr[i] = fast_exp(s.scale * (pr[i] - most));
              total += pr[i];
            }
            sum[r] += total;
            for (long i = valid; i < kKeys; ++i) pr[i] = 0;
          }
          multiply_panels(pt, kKeys, 1, value + kv_at + t * kKeys * d, o, d, n, d, kKeys, t > 0);
        }
        for (long r = 0; r < n; ++r) {
          const float inverse = 1.0f / sum[r];
#pragma omp simd
          for (long i = 0; i < d; ++i)
            store(out + (at + r) * hd + h * d + i, o[r * d + i] * inverse);
        }
      }
  }
}

}  // namespace
}  // namespace finetuning

using namespace finetuning;

extern "C" {

// Head sizes that are a multiple of this can be handled.
int finetuning_lanes() { return kLanes; }

void finetuning_attention_backward(int dtype, const void* d_out, const void* query,
                                   const void* cache, long block_stride, long head_stride,
                                   const int64_t* blocks, long queries, long start, long heads,
                                   long kv_heads, long head_size, long block_size, float scale,
                                   float* dk, float* dv, long kv_stride, float* dq) {
  const Shape s{queries, start, heads, kv_heads, head_size, block_size, scale};
  if (dtype == kFloat)
    backward(s, (const float*)d_out, (const float*)query, (const float*)cache, block_stride,
             head_stride, blocks, dk, dv, kv_stride, dq);
  else
    backward(s, (const bfloat16*)d_out, (const bfloat16*)query, (const bfloat16*)cache,
             block_stride, head_stride, blocks, dk, dv, kv_stride, dq);
}

void finetuning_attention_forward(int dtype, const void* query, const void* cache,
                                  long block_stride, long head_stride, const int64_t* blocks,
                                  long queries, long start, long heads, long kv_heads,
                                  long head_size, long block_size, float scale, void* out) {
  const Shape s{queries, start, heads, kv_heads, head_size, block_size, scale};
  if (dtype == kFloat)
    forward(s, (const float*)query, (const float*)cache, block_stride, head_stride, blocks,
            (float*)out);
  else
    forward(s, (const bfloat16*)query, (const bfloat16*)cache, block_stride, head_stride, blocks,
            (bfloat16*)out);
}
}
