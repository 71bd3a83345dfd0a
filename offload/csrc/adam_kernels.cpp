// The inner loops of Adam. Plain C++ in blocks of fixed length, which the compiler turns into vector instructions of
// the set that this build is for (KERNEL_ISA).
#include "adam_kernels.h"

#include <cmath>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace offload {
namespace KERNEL_ISA {

// Rows to look ahead: enough to hide the latency of main memory; 8 to 64 were equally fast.
constexpr int64_t kPrefetchRows = 16;
constexpr int64_t kCacheLine = 64;  // bytes

// Moments that fade out become denormal numbers, on which x86 is some hundred times slower; as zeros they do.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

// Into the second-level cache (locality 2), which can wait for more lines at a time than the first: random rows take a
// fifth less time than with prefetching into the first.
inline void prefetch_row(const float* row, int64_t columns) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < columns * 4; b += kCacheLine) __builtin_prefetch(bytes + b, 0, 2);
}

// Past the caches where possible: `out` is read later, by another device or after much else, and a cached write would
// first read the old lines.
template <int kLength>
inline void write_out(float* out, const float* values, bool streaming) {
#if defined(__SSE__)
  if (streaming && kLength % 4 == 0) {
    for (int i = 0; i < kLength; i += 4) _mm_stream_ps(out + i, _mm_load_ps(values + i));
    return;
  }
#endif
  (void)streaming;
  for (int i = 0; i < kLength; ++i) out[i] = values[i];
}

inline void finish_streaming() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// What all columns of one row share.
struct RowState {
  const float* skipped;  // [schedules]
  const float* decays;   // [3]
};

// `kLength` columns from `column` on, of one row.
template <int kLength, bool kCatchUp, bool kGradient, bool kStore, bool kOut>
inline void update_columns(const AdamStep& step, const RowState& row, int64_t column, float* __restrict w,
                           float* __restrict m, float* __restrict v, const float* __restrict gradient,
                           float* __restrict out, bool streaming) {
  alignas(64) float values[kLength];
  float skipped[kLength] = {};
  if (kCatchUp) {
    for (int64_t j = 0; j < step.schedules; ++j) {
      const float* multipliers = step.multipliers + j * step.columns + column;
#pragma omp simd
      for (int i = 0; i < kLength; ++i) skipped[i] += row.skipped[j] * multipliers[i];
    }
  }
  const float* __restrict rates = step.rates + column;
  const float eps = step.eps, gradient_weight = step.gradient_weight, square_weight = step.square_weight;
  const float decay = row.decays[0], square_decay = row.decays[1], square_decay_rest = row.decays[2];
#pragma omp simd
  for (int i = 0; i < kLength; ++i) {
    float value = w[column + i], mean = m[column + i], square = v[column + i];
    // eps also keeps a parameter that never had a gradient (0 / 0) where it is.
    if (kCatchUp) value -= skipped[i] * (mean / (std::sqrt(square) + eps));
    if (kGradient) {
      const float g = gradient[column + i];
      mean = decay * mean + gradient_weight * g;
      square = square_decay * square + (square_decay_rest * square + square_weight * (g * g));
      value -= rates[i] * (mean / (std::sqrt(square) + eps));
    } else if (kStore) {
      mean *= decay;
      square = square_decay * square + square_decay_rest * square;
    }
    if (kStore) {
      w[column + i] = value;
      m[column + i] = mean;
      v[column + i] = square;
    }
    if (kOut) values[i] = value;
  }
  if (kOut) write_out<kLength>(out + column, values, streaming);
}

template <bool kCatchUp, bool kGradient, bool kStore, bool kOut>
int64_t update_rows(const AdamStep& step, const AdamRows& rows, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t columns = step.columns;
  const bool streaming = kOut && columns % 4 == 0 && reinterpret_cast<uintptr_t>(rows.out) % 16 == 0;
  int64_t refused = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (rows.ids && i + kPrefetchRows < end) {
      const int64_t ahead = rows.ids[i + kPrefetchRows];
      prefetch_row(rows.parameters + ahead * columns, columns);
      prefetch_row(rows.exp_avg + ahead * columns, columns);
      prefetch_row(rows.exp_avg_sq + ahead * columns, columns);
      if (kCatchUp) __builtin_prefetch(rows.last_step + ahead, 0, 2);
      if (kGradient && rows.gradient_rows)
        prefetch_row(rows.gradients + rows.gradient_rows[i + kPrefetchRows] * columns, columns);
    }
    const int64_t id = rows.ids ? rows.ids[i] : i;
    const int32_t last = kCatchUp ? rows.last_step[id] : step.largest_last_step;
    if (last < 0 || last > step.largest_last_step) {
      ++refused;
      continue;
    }
    const RowState row{kCatchUp ? step.skipped + last * step.schedules : nullptr,
                       step.decays + 3 * (step.step - last)};
    float* w = rows.parameters + id * columns;
    float* m = rows.exp_avg + id * columns;
    float* v = rows.exp_avg_sq + id * columns;
    const float* gradient =
        kGradient ? rows.gradients + (rows.gradient_rows ? rows.gradient_rows[i] : i) * columns : nullptr;
    float* out = kOut ? rows.out + (rows.out_rows ? rows.out_rows[i] : i) * columns : nullptr;
    int64_t column = 0;
    for (; column + 16 <= columns; column += 16)
      update_columns<16, kCatchUp, kGradient, kStore, kOut>(step, row, column, w, m, v, gradient, out, streaming);
    for (; column + 4 <= columns; column += 4)
      update_columns<4, kCatchUp, kGradient, kStore, kOut>(step, row, column, w, m, v, gradient, out, streaming);
    for (; column < columns; ++column)
      update_columns<1, kCatchUp, kGradient, kStore, kOut>(step, row, column, w, m, v, gradient, out, streaming);
    if (kCatchUp && kStore) rows.last_step[id] = step.step;
  }
  if (streaming) finish_streaming();
  return refused;
}

AdamKernel kernel_for(const AdamRows& rows) {
  if (!rows.last_step) return update_rows<false, true, true, false>;  // dense
  if (!rows.store) return rows.gradients ? update_rows<true, true, false, true> : update_rows<true, false, false, true>;
  if (!rows.gradients) return update_rows<true, false, true, false>;
  return rows.out ? update_rows<true, true, true, true> : update_rows<true, true, true, false>;
}

}  // namespace KERNEL_ISA
}  // namespace offload
