// Causal attention over vLLM's paged K and V: the backward for a window of queries, and the forward
// again where its output was not kept. See paged_attention.py for the formulas and the layout.
//
// Softmax rows exist for one block of queries at a time. Within a block the work is split twice: by
// head and queries (P, dS and dQ), then by KV head and keys (dK and dV). No two threads write to
// the same place, so results do not depend on who runs when.
#include "common.h"

namespace finetuning {
namespace {

constexpr long kQueries = 64;     // a block of queries
constexpr long kSubQueries = 32;  // what one task of the first split handles
constexpr long kKeys = 64;        // what one task of the second split handles

Scratch scratch;

struct Shape {
  long queries, start, heads, kv_heads, head_size, block_size;
  float scale;
  long keys() const { return start + queries; }
  // A row more than a multiple of 4 KB apart would share its cache sets with all others.
  long padded() const { return round_up(keys(), kKeys) + kLanes; }
  long group() const { return heads / kv_heads; }
};

// Per KV head, in float32: K^T and V^T [head_size, padded], K (or V) plain [padded, head_size].
template <class T>
void read_cache(const Shape& s, const T* cache, long block_stride, long head_stride,
                const int64_t* blocks, float* key_t, float* value_t, float* plain,
                bool plain_is_key) {
  const long padded = s.padded(), d = s.head_size, tile = kKeys;
  const long tiles = padded / tile;
#pragma omp parallel for collapse(2)
  for (long h = 0; h < s.kv_heads; ++h)
    for (long t = 0; t < tiles; ++t) {
      float* kt = key_t + h * d * padded;
      float* vt = value_t == nullptr ? nullptr : value_t + h * d * padded;
      float* rows = plain + h * padded * d;
      long key = t * tile;
      const long end = key + tile < s.keys() ? key + tile : s.keys();
      while (key < end) {  // a run of keys within one block of the cache
        const long at = key % s.block_size;
        const long n = s.block_size - at < end - key ? s.block_size - at : end - key;
        const T* block = cache + blocks[key / s.block_size] * block_stride + h * head_stride;
        const T* k = block + at;
        const T* v = block + d * s.block_size + at * d;
        for (long i = 0; i < d; ++i) {
#pragma omp simd
          for (long j = 0; j < n; ++j) kt[i * padded + key + j] = load(k + i * s.block_size + j);
        }
        for (long j = 0; j < n; ++j)
          for (long i = 0; i < d; ++i) {
            const float value = load(v + j * d + i);
            if (vt != nullptr) vt[i * padded + key + j] = value;
            rows[(key + j) * d + i] = plain_is_key ? load(k + i * s.block_size + j) : value;
          }
        key += n;
      }
      for (; key < (t + 1) * tile; ++key)
        for (long i = 0; i < d; ++i) {
          kt[i * padded + key] = 0;
          if (vt != nullptr) vt[i * padded + key] = 0;
          rows[key * d + i] = 0;
        }
    }
}

template <class T>
void copy_rows(const T* x, long row_stride, long rows, long width, float* out) {
  for (long r = 0; r < rows; ++r)
#pragma omp simd
    for (long i = 0; i < width; ++i) out[r * width + i] = load(x + r * row_stride + i);
}

// p[0, valid) = softmax(scale * p[0, valid)), zero up to `width`.
void softmax_row(float* p, long valid, long width, float scale) {
  float top = -__builtin_inff();
#pragma omp simd reduction(max : top)
  for (long i = 0; i < valid; ++i) top = p[i] > top ? p[i] : top;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (long i = 0; i < valid; ++i) {
    p[i] = fast_exp(scale * (p[i] - top));
    sum += p[i];
  }
  const float inverse = 1.0f / sum;
#pragma omp simd
  for (long i = 0; i < valid; ++i) p[i] *= inverse;
  for (long i = valid; i < width; ++i) p[i] = 0;
}

template <class T>
void backward(const Shape& s, const T* d_out, const T* query, const T* cache, long block_stride,
              long head_stride, const int64_t* blocks, float* dk, float* dv, long kv_stride,
              float* dq) {
  const long d = s.head_size, padded = s.padded(), hd = s.heads * d;
  float* key_t = scratch.reserve(s.kv_heads * padded * d * 3 + s.heads * kQueries * d * 2 +
                                 s.heads * kQueries * padded * 2);
  float* value_t = key_t + s.kv_heads * padded * d;
  float* key = value_t + s.kv_heads * padded * d;
  float* q_rows = key + s.kv_heads * padded * d;
  float* do_rows = q_rows + s.heads * kQueries * d;
  float* p_rows = do_rows + s.heads * kQueries * d;
  float* ds_rows = p_rows + s.heads * kQueries * padded;
  read_cache(s, cache, block_stride, head_stride, blocks, key_t, value_t, key, true);

  for (long first = 0; first < s.queries; first += kQueries) {
    const long count = s.queries - first < kQueries ? s.queries - first : kQueries;
    const long width = round_up(s.start + first + count, kKeys);  // keys this block can see
    const long subs = (count + kSubQueries - 1) / kSubQueries;
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
      for (long h = 0; h < s.heads; ++h)
        for (long sub = 0; sub < subs; ++sub) {
          const long at = sub * kSubQueries;
          const long n = count - at < kSubQueries ? count - at : kSubQueries;
          const long kv = h / s.group();
          float* q = q_rows + (h * kQueries + at) * d;
          float* g = do_rows + (h * kQueries + at) * d;
          float* p = p_rows + (h * kQueries + at) * padded;
          float* ds = ds_rows + (h * kQueries + at) * padded;
          copy_rows(query + (first + at) * hd + h * d, hd, n, d, q);
          copy_rows(d_out + (first + at) * hd + h * d, hd, n, d, g);
          const long seen = round_up(s.start + first + at + n, kLanes);
          multiply(q, d, 1, key_t + kv * d * padded, padded, p, padded, n, seen, d, false);
          multiply(g, d, 1, value_t + kv * d * padded, padded, ds, padded, n, seen, d, false);
          for (long r = 0; r < n; ++r) {
            const long valid = s.start + first + at + r + 1;
            float* pr = p + r * padded;
            float* dr = ds + r * padded;
            softmax_row(pr, valid, width, s.scale);
            float delta = 0;
#pragma omp simd reduction(+ : delta)
            for (long i = 0; i < valid; ++i) delta += pr[i] * dr[i];
#pragma omp simd
            for (long i = 0; i < valid; ++i) dr[i] = s.scale * pr[i] * (dr[i] - delta);
            for (long i = valid; i < width; ++i) dr[i] = 0;
          }
          multiply(ds, padded, 1, key + kv * padded * d, d, dq + (first + at) * hd + h * d, hd, n,
                   d, seen, false);
        }
#pragma omp for collapse(2) schedule(static)
      for (long kv = 0; kv < s.kv_heads; ++kv)
        for (long tile = 0; tile < width / kKeys; ++tile) {
          const long from = tile * kKeys;
          const long n = s.keys() - from < kKeys ? s.keys() - from : kKeys;
          // Queries before these keys do not see them.
          long skip = from - s.start - first;
          skip = skip < 0 ? 0 : skip;
          if (skip >= count) continue;
          for (long h = kv * s.group(); h < (kv + 1) * s.group(); ++h) {
            const float* p = p_rows + (h * kQueries + skip) * padded + from;
            const float* ds = ds_rows + (h * kQueries + skip) * padded + from;
            const float* q = q_rows + (h * kQueries + skip) * d;
            const float* g = do_rows + (h * kQueries + skip) * d;
            multiply(p, 1, padded, g, d, dv + kv * kv_stride + from * d, d, n, d, count - skip,
                     true);
            multiply(ds, 1, padded, q, d, dk + kv * kv_stride + from * d, d, n, d, count - skip,
                     true);
          }
        }
    }
  }
}

template <class T>
void forward(const Shape& s, const T* query, const T* cache, long block_stride, long head_stride,
             const int64_t* blocks, T* out) {
  const long d = s.head_size, padded = s.padded(), hd = s.heads * d;
  float* key_t = scratch.reserve(s.kv_heads * padded * d * 2 + s.heads * kQueries * d * 2 +
                                 s.heads * kQueries * padded);
  float* value = key_t + s.kv_heads * padded * d;
  float* q_rows = value + s.kv_heads * padded * d;
  float* o_rows = q_rows + s.heads * kQueries * d;
  float* p_rows = o_rows + s.heads * kQueries * d;
  read_cache(s, cache, block_stride, head_stride, blocks, key_t, static_cast<float*>(nullptr),
             value, false);
  const long subs = kQueries / kSubQueries;
  for (long first = 0; first < s.queries; first += kQueries) {
#pragma omp parallel for collapse(2) schedule(static)
    for (long h = 0; h < s.heads; ++h)
      for (long sub = 0; sub < subs; ++sub) {
        const long at = first + sub * kSubQueries;
        if (at >= s.queries) continue;
        const long n = s.queries - at < kSubQueries ? s.queries - at : kSubQueries;
        const long kv = h / s.group(), slot = h * kQueries + sub * kSubQueries;
        float* q = q_rows + slot * d;
        float* o = o_rows + slot * d;
        float* p = p_rows + slot * padded;
        copy_rows(query + at * hd + h * d, hd, n, d, q);
        const long seen = round_up(s.start + at + n, kLanes);
        multiply(q, d, 1, key_t + kv * d * padded, padded, p, padded, n, seen, d, false);
        for (long r = 0; r < n; ++r)
          softmax_row(p + r * padded, s.start + at + r + 1, seen, s.scale);
        multiply(p, padded, 1, value + kv * padded * d, d, o, d, n, d, seen, false);
        for (long r = 0; r < n; ++r)
#pragma omp simd
          for (long i = 0; i < d; ++i) store(out + (at + r) * hd + h * d + i, o[r * d + i]);
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
