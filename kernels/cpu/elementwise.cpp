// RMSNorm, SwiGLU and rotary embedding: one pass over memory each. The formulas are those of
// rms_norm.py, swiglu.py and rotary.py.
#include "common.h"

namespace finetuning {
namespace {

// Rows below this run on the calling thread: waking the others costs more.
constexpr long kParallelElements = 16384;

template <class T>
float inverse_rms(const T* x, long width, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (long i = 0; i < width; ++i) {
    const float v = load(x + i);
    sum += v * v;
  }
  return 1.0f / __builtin_sqrtf(sum / float(width) + eps);
}

template <class T>
void rms_norm(const T* x, const T* weight, long rows, long width, float eps, T* y) {
#pragma omp parallel for if (rows * width > kParallelElements)
  for (long row = 0; row < rows; ++row) {
    const T* in = x + row * width;
    T* out = y + row * width;
    const float rstd = inverse_rms(in, width, eps);
#pragma omp simd
    for (long i = 0; i < width; ++i) store(out + i, load(in + i) * rstd * load(weight + i));
  }
}

// residual += x, x = its norm.
template <class T>
void add_rms_norm(T* x, T* residual, const T* weight, long rows, long width, float eps) {
#pragma omp parallel for if (rows * width > kParallelElements)
  for (long row = 0; row < rows; ++row) {
    T* in = x + row * width;
    T* sums = residual + row * width;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < width; ++i) {
      const float v = load(sums + i) + load(in + i);
      store(sums + i, v);
      squares += v * v;
    }
    const float rstd = 1.0f / __builtin_sqrtf(squares / float(width) + eps);
#pragma omp simd
    for (long i = 0; i < width; ++i) store(in + i, load(sums + i) * rstd * load(weight + i));
  }
}

template <class T>
void rms_norm_backward(const T* dy, const T* x, const T* weight, const float* residual, long rows,
                       long width, float eps, float* dx) {
#pragma omp parallel for if (rows * width > kParallelElements)
  for (long row = 0; row < rows; ++row) {
    const T* g = dy + row * width;
    const T* in = x + row * width;
    float* out = dx + row * width;
    const float rstd = inverse_rms(in, width, eps);
    float projection = 0;
#pragma omp simd reduction(+ : projection)
    for (long i = 0; i < width; ++i)
      projection += load(g + i) * load(weight + i) * load(in + i);
    projection *= rstd * rstd / float(width);
    if (residual != nullptr) {
      const float* add = residual + row * width;
#pragma omp simd
      for (long i = 0; i < width; ++i)
        out[i] = add[i] + rstd * (load(g + i) * load(weight + i) - projection * load(in + i));
    } else {
#pragma omp simd
      for (long i = 0; i < width; ++i)
        out[i] = rstd * (load(g + i) * load(weight + i) - projection * load(in + i));
    }
  }
}

template <class T>
void swiglu(const T* gate_up, long rows, long width, T* y) {
#pragma omp parallel for if (rows * width > kParallelElements)
  for (long row = 0; row < rows; ++row) {
    const T* gate = gate_up + row * 2 * width;
    const T* up = gate + width;
    T* out = y + row * width;
#pragma omp simd
    for (long i = 0; i < width; ++i) {
      const float g = load(gate + i);
      store(out + i, g / (1.0f + fast_exp(-g)) * load(up + i));
    }
  }
}

template <class T>
void swiglu_backward(const T* dy, const T* gate_up, long rows, long width, T* d_gate_up,
                     T* product) {
#pragma omp parallel for if (rows * width > kParallelElements)
  for (long row = 0; row < rows; ++row) {
    const T* gate = gate_up + row * 2 * width;
    const T* up = gate + width;
    const T* d = dy + row * width;
    T* d_gate = d_gate_up + row * 2 * width;
    T* d_up = d_gate + width;
    T* out = product + row * width;
#pragma omp simd
    for (long i = 0; i < width; ++i) {
      const float g = load(gate + i), u = load(up + i), dv = load(d + i);
      const float sigmoid = 1.0f / (1.0f + fast_exp(-g));
      const float silu = g * sigmoid;
      store(out + i, silu * u);
      store(d_up + i, dv * silu);
      store(d_gate + i, dv * u * (sigmoid + silu * (1.0f - sigmoid)));
    }
  }
}

template <class In, class Out>
void rotary(const In* x, long x_row, long x_head, const float* cos_sin, float sign, long rows,
            long heads, long head_size, long half, bool neox, Out* y, long y_row, long y_head) {
#pragma omp parallel for if (rows * heads * head_size > kParallelElements)
  for (long row = 0; row < rows; ++row) {
    const float* cos = cos_sin + row * 2 * half;
    const float* sin = cos + half;
    for (long head = 0; head < heads; ++head) {
      const In* in = x + row * x_row + head * x_head;
      Out* out = y + row * y_row + head * y_head;
      if (neox) {
#pragma omp simd
        for (long i = 0; i < half; ++i) {
          const float a = load(in + i), b = load(in + half + i), s = sign * sin[i];
          store(out + i, a * cos[i] - b * s);
          store(out + half + i, b * cos[i] + a * s);
        }
      } else {
        for (long i = 0; i < half; ++i) {
          const float a = load(in + 2 * i), b = load(in + 2 * i + 1), s = sign * sin[i];
          store(out + 2 * i, a * cos[i] - b * s);
          store(out + 2 * i + 1, b * cos[i] + a * s);
        }
      }
      for (long i = 2 * half; i < head_size; ++i) store(out + i, load(in + i));
    }
  }
}

template <class In>
void rotary_to(int out_type, const In* x, long x_row, long x_head, const float* cos_sin, float sign,
               long rows, long heads, long head_size, long half, bool neox, void* y, long y_row,
               long y_head) {
  if (out_type == kFloat)
    rotary(x, x_row, x_head, cos_sin, sign, rows, heads, head_size, half, neox,
           static_cast<float*>(y), y_row, y_head);
  else
    rotary(x, x_row, x_head, cos_sin, sign, rows, heads, head_size, half, neox,
           static_cast<bfloat16*>(y), y_row, y_head);
}

// Softmax and its gradient with respect to the logits, in place; the loss of each row.
template <class T>
void cross_entropy(T* logits, const int64_t* targets, long rows, long width, float logit_scale,
                   float gradient_scale, double* losses, int64_t* correct) {
#pragma omp parallel for
  for (long row = 0; row < rows; ++row) {
    T* z = logits + row * width;
    float top = -__builtin_inff();
#pragma omp simd reduction(max : top)
    for (long i = 0; i < width; ++i) {
      const float v = load(z + i) * logit_scale;
      top = v > top ? v : top;
    }
    const float target = load(z + targets[row]) * logit_scale;
    double total = 0;
    for (long first = 0; first < width; first += 4096) {
      const long last = first + 4096 < width ? first + 4096 : width;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (long i = first; i < last; ++i) sum += fast_exp(load(z + i) * logit_scale - top);
      total += sum;
    }
    const double log_norm = double(top) + __builtin_log(total);
    losses[row] = log_norm - double(target);
    correct[row] = target >= top;
    if (gradient_scale == 0.0f) continue;
    const float shift = float(log_norm), factor = gradient_scale * logit_scale;
#pragma omp simd
    for (long i = 0; i < width; ++i)
      store(z + i, fast_exp(load(z + i) * logit_scale - shift) * factor);
    store(z + targets[row],
          (fast_exp(target - shift) - 1.0f) * factor);
  }
}

// Rows into pages: row i of the pack lies in page i / per_page of it, at i % per_page.
void keep_rows(const float* x, long x_row, const float* addend, long addend_row, long rows,
               long width, float* pool, long page_size, const int64_t* pages, long base,
               long per_page, long start) {
#pragma omp parallel for if (rows * width > kParallelElements)
  for (long row = 0; row < rows; ++row) {
    const float* in = x + row * x_row;
    const long at = start + row;
    float* out = pool + pages[at / per_page] * page_size + base + at % per_page * width;
    if (addend == nullptr) {
      std::memcpy(out, in, width * sizeof(float));
      continue;
    }
    const float* more = addend + row * addend_row;
#pragma omp simd
    for (long i = 0; i < width; ++i) out[i] = in[i] + more[i];
  }
}

}  // namespace
}  // namespace finetuning

using namespace finetuning;

#define TYPED(call) \
  if (dtype == kFloat) {                   \
    typedef float T;                       \
    call;                                  \
  } else {                                 \
    typedef bfloat16 T;                    \
    call;                                  \
  }

extern "C" {

void finetuning_rms_norm(int dtype, const void* x, const void* weight, long rows, long width,
                         float eps, void* y) {
  TYPED(rms_norm((const T*)x, (const T*)weight, rows, width, eps, (T*)y))
}

void finetuning_add_rms_norm(int dtype, void* x, void* residual, const void* weight, long rows,
                             long width, float eps) {
  TYPED(add_rms_norm((T*)x, (T*)residual, (const T*)weight, rows, width, eps))
}

void finetuning_rms_norm_backward(int dtype, const void* dy, const void* x, const void* weight,
                                  const float* residual, long rows, long width, float eps,
                                  float* dx) {
  TYPED(rms_norm_backward((const T*)dy, (const T*)x, (const T*)weight, residual, rows, width, eps,
                          dx))
}

void finetuning_swiglu(int dtype, const void* gate_up, long rows, long width, void* y) {
  TYPED(swiglu((const T*)gate_up, rows, width, (T*)y))
}

void finetuning_swiglu_backward(int dtype, const void* dy, const void* gate_up, long rows,
                                long width, void* d_gate_up, void* product) {
  TYPED(swiglu_backward((const T*)dy, (const T*)gate_up, rows, width, (T*)d_gate_up, (T*)product))
}

void finetuning_rotary(int dtype, int out_type, const void* x, long x_row, long x_head,
                       const float* cos_sin, float sign, long rows, long heads, long head_size,
                       long half, int neox, void* y, long y_row, long y_head) {
  TYPED(rotary_to(out_type, (const T*)x, x_row, x_head, cos_sin, sign, rows, heads, head_size, half,
                  neox != 0, y, y_row, y_head))
}

void finetuning_cross_entropy(int dtype, void* logits, const int64_t* targets, long rows,
                              long width, float logit_scale, float gradient_scale,
                              double* losses, int64_t* correct) {
  TYPED(cross_entropy((T*)logits, targets, rows, width, logit_scale, gradient_scale, losses,
                      correct))
}

void finetuning_keep_rows(int, const float* x, long x_row, const float* addend, long addend_row,
                          long rows, long width, float* pool, long page_size,
                          const int64_t* pages, long base, long per_page, long start) {
  keep_rows(x, x_row, addend, addend_row, rows, width, pool, page_size, pages, base, per_page,
            start);
}
}
