// The inner loops of Adam. Rows of float32 are plain C++ in blocks of fixed length, which the compiler turns into
// vector instructions of the set that this build is for (KERNEL_ISA); those of codes are vectors (lanes.h).
#include "adam_kernels.h"

#include <cmath>
#include <utility>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "bfloat16.h"
#include "codes.h"
#include "float32.h"
#include "made_gradients.h"

namespace offload {
namespace KERNEL_ISA {

// Rows to look ahead: enough to hide the latency of main memory; 8 to 64 were equally fast. A batch of rows of codes
// asks for those of the next one.
constexpr int64_t kPrefetchRows = kBatch;
constexpr int64_t kCacheLine = 64;  // bytes

// Into the second-level cache (locality 2), which can wait for more lines at a time than the first: random rows take a
// fifth less time than with prefetching into the first.
inline __attribute__((always_inline)) void prefetch_row(const void* row, int64_t bytes) {
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

  void prefetch(int64_t id, const float* gradient) const {
    prefetch_row(rows_.parameters.row<float>(id), step_.columns * 4);
    Kept::prefetch(rows_, id, step_.columns);
    if (gradient) prefetch_row(gradient, step_.columns * 4);
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

  CodedRows(const AdamStep& step, const AdamRows& rows)
      : step_(step), rows_(rows), unit_(unit_of(step.reach)), gradient_weight_(step.gradient_weight / unit_) {
    for (int i = 0; i < kColumns; ++i) rates_[i] = step.rates[i] * unit_;
    for (int i = 0; i < kColumns; ++i) numbers_[i] = static_cast<uint32_t>(i);
  }

  // Notes a row of the next batch, whose lines are asked for one after another while this one is worked on.
  void prefetch(int64_t id, const float* gradient) {
    ahead_[count_] = {rows_.parameters.row<uint16_t>(id), rows_.moments[0].row<uint16_t>(id), gradient};
  }

  template <bool kCatchUp, bool kGradient, bool kStore, bool kOut>
  void update(const Row& row) {
    static_assert(kCatchUp, "rows of codes are never updated densely");
    Row& copy = batch_[count_];  // part by part: a copy of all of it would wait for the stores of its parts
    copy.id = row.id, copy.skipped = row.skipped, copy.decays = row.decays;
    copy.gradient = row.gradient, copy.out = row.out, copy.streaming = row.streaming;
    codes_[count_] = rows_.moments[0].row<uint16_t>(row.id);
    halves_[count_] = rows_.parameters.row<uint16_t>(row.id);
    if (++count_ == kBatch) finish<kCatchUp, kGradient, kStore, kOut>();
  }

  template <bool kCatchUp, bool kGradient, bool kStore, bool kOut>
  __attribute__((noinline)) void finish() {
    const int count = count_;
    if (count == 0) return;
    const AdamStep step = step_;  // copies, which nothing that is written may change
    for (int i = 0; i < count; ++i) {
      prefetch_row(ahead_[i].halves, kColumns * 2);
      prefetch_row(ahead_[i].codes, kColumns * 2);
      load_row<kGradient, kStore>(step, i);
    }
    if (kGradient || kStore)
      for (int i = 0; i < count; ++i) {
        if (kGradient && ahead_[i].gradient) prefetch_row(ahead_[i].gradient, kColumns * 4);
        step_row<kGradient, kStore, kOut>(step, i);
      }
    if (kOut)
      for (int i = 0; i < count; ++i) write_out<kColumns>(batch_[i].out, values_[i], batch_[i].streaming);
    if (kStore) moments_.encode(count, codes_);
    count_ = 0;
  }

 private:
  // Decodes a row, catches it up and brings its moments to step t.
  template <bool kGradient, bool kStore>
  void load_row(const AdamStep& step, int number) {
    const Row row = batch_[number];
    const uint16_t *codes = codes_[number], *halves = halves_[number];
    float *values = values_[number], *first = moments_.first[number], *roots = moments_.roots[number];
    const Factors scales = load_scales<kColumns>(codes);
    const float unit = unit_, skipped = row.skipped[0] * unit, gradient_weight = gradient_weight_;
    const float decay = row.decays[0], square_decay = row.decays[1], square_decay_rest = row.decays[2];
    for (int column = 0; column < kColumns; column += kWidth) {
      const Decoded moments = decode<kColumns>(codes, scales, column);
      Floats sizes = skipped * load(step.multipliers + column);
      for (int64_t j = 1; j < step.schedules; ++j)
        sizes += row.skipped[j] * unit * load(step.multipliers + j * kColumns + column);
      store<float>(values + column, load_halves(halves + column) - sizes * moments.first / (moments.root + step.eps));
      if (kGradient || kStore) {
        Floats m = decay * moments.first, square = moments.root * moments.root;
        if (kGradient) {
          const Floats gradient = load(row.gradient + column);
          m += gradient_weight * gradient;
          square = square_decay * square + (square_decay_rest * square + step.square_weight * (gradient * gradient));
        } else {
          square = square_decay * square + square_decay_rest * square;
        }
        store(first + column, m);
        store(roots + column, square_root<float>(square));
      }
    }
  }

  // Takes the step, and rounds.
  template <bool kGradient, bool kStore, bool kOut>
  void step_row(const AdamStep& step, int number) {
    alignas(64) uint16_t rounded[kColumns];
    uint16_t* halves = kStore ? halves_[number] : rounded;
    float* values = values_[number];
    const float *first = moments_.first[number], *roots = moments_.roots[number];
    const Words counters = Words{} + static_cast<uint32_t>(batch_[number].id * kColumns);
    for (int column = 0; column < kColumns; column += kWidth) {
      Floats value = load(values + column);
      if (kGradient) value -= load(rates_ + column) * load(first + column) / (load(roots + column) + step.eps);
      const Words random = mixed((counters + load_words(numbers_ + column)) ^ step.seed);  // as random_bits
      store_words(moments_.random[number] + column, random);
      store_rounded(value, random, halves + column);
      if (kOut) store(values + column, load_halves(halves + column));
    }
  }

  const AdamStep& step_;
  const AdamRows& rows_;
  const float unit_, gradient_weight_;  // of first moments, and in it
  int count_ = 0;
  Row batch_[kBatch];
  struct Ahead {
    const uint16_t *halves, *codes;
    const float* gradient;  // or null
  };
  Ahead ahead_[kBatch] = {};
  uint16_t *halves_[kBatch], *codes_[kBatch];
  alignas(64) float rates_[kColumns];        // times the unit
  alignas(64) uint32_t numbers_[kColumns];  // 0, 1, 2 ...
  Batch<float, kColumns> values_;
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
  MadeGradients made(rows.made);
  const bool makes = kCatchUp && kGradient && !rows.gradients;  // dense steps are given theirs
  int64_t refused = 0;
  for (int64_t i = begin; i < end; ++i) {
    const float* gradient = nullptr;
    if (makes) {
      const int in_batch = static_cast<int>((i - begin) % kBatch);
      if (in_batch == 0) {
        // Rows that were refused have left others waiting, whose gradients are not to be written over.
        visited.template finish<kCatchUp, kGradient, kStore, kOut>();
        made.read(rows.gradient_rows, i, static_cast<int>(std::min<int64_t>(kBatch, end - i)));
      }
      if (rows.gradient_rows && i + 2 * kBatch < end) made.prefetch(rows.gradient_rows[i + 2 * kBatch]);
      gradient = made.make(in_batch);
    } else if (kGradient) {
      gradient = rows.gradients + (rows.gradient_rows ? rows.gradient_rows[i] : i) * columns;
    }
    if (rows.ids && i + kPrefetchRows < end) {
      const int64_t ahead = rows.ids[i + kPrefetchRows];
      if (kCatchUp) __builtin_prefetch(rows.last_step + ahead, 0, 2);
      const bool scattered = kGradient && rows.gradients && rows.gradient_rows;
      visited.prefetch(ahead, scattered ? rows.gradients + rows.gradient_rows[i + kPrefetchRows] * columns : nullptr);
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
                  gradient,
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
    return rows.has_gradients() ? update_rows<Rows, true, true, false, true>
                                : update_rows<Rows, true, false, false, true>;
  if (!rows.has_gradients()) return update_rows<Rows, true, false, true, false>;
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
