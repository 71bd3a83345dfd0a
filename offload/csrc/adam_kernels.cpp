// The inner loops of Adam. Plain C++ in blocks of fixed length, which the compiler turns into vector instructions of
// the set that this build is for (KERNEL_ISA).
#include "adam_kernels.h"

#include <cmath>
#include <utility>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "bfloat16.h"
#include "codes.h"
#include "quick_math.h"

namespace offload {
namespace KERNEL_ISA {

// Rows to look ahead: enough to hide the latency of main memory; 8 to 64 were equally fast.
constexpr int64_t kPrefetchRows = 16;
constexpr int64_t kCacheLine = 64;  // bytes

// Into the second-level cache (locality 2), which can wait for more lines at a time than the first: random rows take a
// fifth less time than with prefetching into the first.
inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kCacheLine) __builtin_prefetch(static_cast<const char*>(row) + b, 0, 2);
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
struct Row {
  int64_t id;
  const float* skipped;   // [schedules]
  const float* decays;    // [3]
  const float* gradient;  // [columns]
  float* out;             // [columns]
  bool streaming;         // `out` is aligned to 16 bytes
};

// skipped[i] = C of column `column + i`
template <int kLength>
inline void skipped_sizes(const AdamStep& step, const Row& row, int64_t column, float* skipped) {
  const float* multipliers = step.multipliers + column;
  const float first = row.skipped[0];
#pragma omp simd
  for (int i = 0; i < kLength; ++i) skipped[i] = first * multipliers[i];
  for (int64_t j = 1; j < step.schedules; ++j) {
    const float* others = multipliers + j * step.columns;
    const float other = row.skipped[j];
#pragma omp simd
    for (int i = 0; i < kLength; ++i) skipped[i] += other * others[i];
  }
}

// Brings the moments of a value to step t, with its gradient where it has one.
template <bool kGradient>
inline void update_moments(const AdamStep& step, const Row& row, float gradient, float& mean, float& square) {
  const float decay = row.decays[0], square_decay = row.decays[1], square_decay_rest = row.decays[2];
  if (kGradient) {
    mean = decay * mean + step.gradient_weight * gradient;
    square = square_decay * square + (square_decay_rest * square + step.square_weight * (gradient * gradient));
  } else {
    mean *= decay;
    square = square_decay * square + square_decay_rest * square;
  }
}

// --------------------------------------------------------------- rows of float32, with moments in float32 or in pairs

struct Float32Moments {
  static constexpr bool exact = true;  // storing a row that does not lag changes nothing
  float *first, *second;

  Float32Moments(const AdamStep&, const AdamRows& rows, int64_t id)
      : first(rows.moments[0].row<float>(id)), second(rows.moments[1].row<float>(id)) {}
  static void prefetch(const AdamRows& rows, int64_t id, int64_t columns) {
    prefetch_row(rows.moments[0].row<float>(id), columns * 4);
    prefetch_row(rows.moments[1].row<float>(id), columns * 4);
  }
  void load(int64_t i, float& mean, float& square) const { mean = first[i], square = second[i]; }
  void store(int64_t i, float mean, float square) const { first[i] = mean, second[i] = square; }
};

struct PairMoments {
  static constexpr bool exact = false;
  uint32_t* pairs;
  uint32_t counter, seed;

  PairMoments(const AdamStep& step, const AdamRows& rows, int64_t id)
      : pairs(rows.moments[0].row<uint32_t>(id)), counter(static_cast<uint32_t>(id * step.columns)), seed(step.seed) {}
  static void prefetch(const AdamRows& rows, int64_t id, int64_t columns) {
    prefetch_row(rows.moments[0].row<uint32_t>(id), columns * 4);
  }
  void load(int64_t i, float& mean, float& square) const {
    mean = first_of_pair(pairs[i]), square = second_of_pair(pairs[i]);
  }
  void store(int64_t i, float mean, float square) const {
    pairs[i] = pair_of(mean, square, random_bits(counter + static_cast<uint32_t>(i), seed));
  }
};

template <class Kept>
class Float32Rows {
 public:
  static constexpr bool exact = Kept::exact;

  Float32Rows(const AdamStep& step, const AdamRows& rows) : step_(step), rows_(rows) {}

  static void prefetch(const AdamRows& rows, int64_t id, int64_t columns) {
    prefetch_row(rows.parameters.row<float>(id), columns * 4);
    Kept::prefetch(rows, id, columns);
  }

  template <bool kCatchUp, bool kGradient, bool kStore, bool kOut>
  void update(const Row& row) const {
    float* w = rows_.parameters.row<float>(row.id);
    const Kept moments(step_, rows_, row.id);
    int64_t column = 0;
    for (; column + 16 <= step_.columns; column += 16)
      update_columns<16, kCatchUp, kGradient, kStore, kOut>(step_, row, column, w, moments);
    for (; column + 4 <= step_.columns; column += 4)
      update_columns<4, kCatchUp, kGradient, kStore, kOut>(step_, row, column, w, moments);
    for (; column < step_.columns; ++column)
      update_columns<1, kCatchUp, kGradient, kStore, kOut>(step_, row, column, w, moments);
  }

  template <bool kCatchUp, bool kGradient, bool kStore, bool kOut>
  void finish() const {}

 private:
  // `kLength` columns from `column` on.
  template <int kLength, bool kCatchUp, bool kGradient, bool kStore, bool kOut>
  static void update_columns(const AdamStep& step, const Row& row, int64_t column, float* __restrict w,
                             const Kept moments) {
    alignas(64) float values[kLength];
    float skipped[kLength];
    if (kCatchUp) skipped_sizes<kLength>(step, row, column, skipped);
    const float* __restrict rates = step.rates + column;
    const float* __restrict gradient = row.gradient;
    const float eps = step.eps;
#pragma omp simd
    for (int i = 0; i < kLength; ++i) {
      float value = w[column + i], mean, square;
      moments.load(column + i, mean, square);
      // eps also keeps a parameter that never had a gradient (0 / 0) where it is.
      if (kCatchUp) value -= skipped[i] * (mean / (std::sqrt(square) + eps));
      if (kGradient || kStore)
        update_moments<kGradient>(step, row, kGradient ? gradient[column + i] : 0.0f, mean, square);
      if (kGradient) value -= rates[i] * (mean / (std::sqrt(square) + eps));
      if (kStore) {
        w[column + i] = value;
        moments.store(column + i, mean, square);
      }
      if (kOut) values[i] = value;
    }
    if (kOut) write_out<kLength>(row.out + column, values, row.streaming);
  }

  const AdamStep& step_;
  const AdamRows& rows_;
};

// ------------------------------------------------------------------------------------------------- rows of codes

// Works on batches of rows.
template <int kColumns>
class CodedRows {
 public:
  static constexpr bool exact = false;

  CodedRows(const AdamStep& step, const AdamRows& rows) : step_(step), rows_(rows) {}

  static void prefetch(const AdamRows& rows, int64_t id, int64_t columns) {
    prefetch_row(rows.parameters.row<uint16_t>(id), columns * 2);
    prefetch_row(rows.moments[0].row<uint16_t>(id), columns * 2);
  }

  template <bool kCatchUp, bool kGradient, bool kStore, bool kOut>
  void update(const Row& row) {
    batch_[count_] = row;
    halves_[count_] = rows_.parameters.row<uint16_t>(row.id);
    codes_[count_] = rows_.moments[0].row<uint16_t>(row.id);
    if (++count_ == kBatch) finish<kCatchUp, kGradient, kStore, kOut>();
  }

  template <bool kCatchUp, bool kGradient, bool kStore, bool kOut>
  void finish() {
    static_assert(kCatchUp, "rows of codes are never updated densely");
    for (int i = 0; i < count_; ++i) load(i);
    for (int i = 0; i < count_; ++i) catch_up(i);
    if (kGradient || kStore) {
      for (int i = 0; i < count_; ++i) update_moments_of<kGradient>(i);
      if (kGradient) {
        for (int i = 0; i < count_; ++i) find_divisors(i);
        for (int i = 0; i < count_; ++i) apply_gradient(i);
      }
      for (int i = 0; i < count_; ++i) round<kStore, kOut>(i);
    }
    if (kOut)
      for (int i = 0; i < count_; ++i) write_out<kColumns>(batch_[i].out, values_[i], batch_[i].streaming);
    if (kStore) moments_.encode(count_, step_.reach, codes_);
    count_ = 0;
  }

 private:
  void load(int row) {
    for (int i = 0; i < kColumns; i += kBlock) load_halves(halves_[row] + i, values_[row] + i);
    decode_moments<kColumns>(codes_[row], step_.reach, moments_.first[row], roots_[row]);
    skipped_sizes<kColumns>(step_, batch_[row], 0, skipped_[row]);
  }

  void catch_up(int row) {
    float* value = values_[row];
    const float *first = moments_.first[row], *root = roots_[row], *skipped = skipped_[row];
    const float eps = step_.eps;
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) value[i] -= skipped[i] * (first[i] * reciprocal(root[i] + eps));
  }

  template <bool kGradient>
  void update_moments_of(int row) {
    float *first = moments_.first[row], *second = moments_.second[row];
    uint32_t* random = moments_.random[row];
    const float* root = roots_[row];
    const AdamStep step = step_;  // copies, which nothing that is written may change
    const Row of_row = batch_[row];
    const uint32_t counter = static_cast<uint32_t>(of_row.id * kColumns);
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) {
      second[i] = root[i] * root[i];
      update_moments<kGradient>(step, of_row, kGradient ? of_row.gradient[i] : 0.0f, first[i], second[i]);
      random[i] = random_bits(counter + static_cast<uint32_t>(i), step.seed);
    }
  }

  void find_divisors(int row) {
    float* root = roots_[row];
    const float* second = moments_.second[row];
    const float eps = step_.eps;
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) root[i] = root_of(second[i]) + eps;
  }

  void apply_gradient(int row) {
    float* value = values_[row];
    const float *first = moments_.first[row], *divisor = roots_[row], *rates = step_.rates;
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) value[i] -= rates[i] * (first[i] * reciprocal(divisor[i]));
  }

  template <bool kStore, bool kOut>
  void round(int row) {
    alignas(64) uint32_t words[kColumns];
    uint16_t rounded[kColumns];
    const float* value = values_[row];
    const uint32_t* random = moments_.random[row];
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) words[i] = rounded_half(value[i], random[i]);
    uint16_t* halves = kStore ? halves_[row] : rounded;
    for (int i = 0; i < kColumns; i += kBlock) {
      narrow(words + i, halves + i);
      if (kOut) load_halves(halves + i, values_[row] + i);
    }
  }

  const AdamStep& step_;
  const AdamRows& rows_;
  int count_ = 0;
  Row batch_[kBatch];
  uint16_t *halves_[kBatch], *codes_[kBatch];
  Batch<float, kColumns> values_, roots_, skipped_;
  CodedMoments<kColumns> moments_;
};

// ----------------------------------------------------------------------------------------------------------- visits

// Apart from FlushDenormals, which an exception would destroy: compilers make no vectors of what might throw one.
template <class Rows, bool kCatchUp, bool kGradient, bool kStore, bool kOut>
__attribute__((noinline)) int64_t visit_rows(const AdamStep& step, const AdamRows& rows, int64_t begin,
                                             int64_t end) noexcept {
  const int64_t columns = step.columns;
  const bool streaming = kOut && columns % 4 == 0 && reinterpret_cast<uintptr_t>(rows.out) % 16 == 0;
  Rows visited(step, rows);
  int64_t refused = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (rows.ids && i + kPrefetchRows < end) {
      const int64_t ahead = rows.ids[i + kPrefetchRows];
      Rows::prefetch(rows, ahead, columns);
      if (kCatchUp) __builtin_prefetch(rows.last_step + ahead, 0, 2);
      if (kGradient && rows.gradient_rows)
        prefetch_row(rows.gradients + rows.gradient_rows[i + kPrefetchRows] * columns, columns * 4);
    }
    const int64_t id = rows.ids ? rows.ids[i] : i;
    const int32_t last = kCatchUp ? rows.last_step[id] : step.largest_last_step;
    if (last < 0 || last > step.largest_last_step) {
      ++refused;
      continue;
    }
    if (kStore && !kGradient && !Rows::exact && last == step.step) continue;  // nothing is rounded twice
    const Row row{id,
                  kCatchUp ? step.skipped + last * step.schedules : nullptr,
                  step.decays + 3 * (step.step - last),
                  kGradient ? rows.gradients + (rows.gradient_rows ? rows.gradient_rows[i] : i) * columns : nullptr,
                  kOut ? rows.out + (rows.out_rows ? rows.out_rows[i] : i) * columns : nullptr,
                  streaming};
    visited.template update<kCatchUp, kGradient, kStore, kOut>(row);
    if (kCatchUp && kStore) rows.last_step[id] = step.step;
  }
  visited.template finish<kCatchUp, kGradient, kStore, kOut>();
  if (streaming) finish_streaming();
  return refused;
}

template <class Rows, bool kCatchUp, bool kGradient, bool kStore, bool kOut>
int64_t update_rows(const AdamStep& step, const AdamRows& rows, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  return visit_rows<Rows, kCatchUp, kGradient, kStore, kOut>(step, rows, begin, end);
}

template <class Rows>
AdamKernel deferred_kernel_for(const AdamRows& rows) {
  if (!rows.store)
    return rows.gradients ? update_rows<Rows, true, true, false, true> : update_rows<Rows, true, false, false, true>;
  if (!rows.gradients) return update_rows<Rows, true, false, true, false>;
  return rows.out ? update_rows<Rows, true, true, true, true> : update_rows<Rows, true, true, true, false>;
}

AdamKernel kernel_for(const AdamRows& rows, int64_t columns) {
  if (!rows.last_step) return update_rows<Float32Rows<Float32Moments>, false, true, true, false>;  // dense
  if (rows.format == Moments::float32) return deferred_kernel_for<Float32Rows<Float32Moments>>(rows);
  if (rows.format == Moments::pairs) return deferred_kernel_for<Float32Rows<PairMoments>>(rows);
  if (columns == 16) return deferred_kernel_for<CodedRows<16>>(rows);
  if (columns == 32) return deferred_kernel_for<CodedRows<32>>(rows);
  return deferred_kernel_for<CodedRows<48>>(rows);
}

}  // namespace KERNEL_ISA
}  // namespace offload
