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
  for (int i = 0; i < kLength; ++i) skipped[i] = 0.0f;
  for (int64_t j = 0; j < step.schedules; ++j) {
    const float* multipliers = step.multipliers + j * step.columns + column;
#pragma omp simd
    for (int i = 0; i < kLength; ++i) skipped[i] += row.skipped[j] * multipliers[i];
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

// ------------------------------------------------------------------ rows that keep values, and moments as the type says

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

  template <bool kStore>
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
  ALWAYS_INLINE void update(const Row& row) {
    uint16_t *halves = rows_.parameters.row<uint16_t>(row.id), *codes = rows_.moments[0].row<uint16_t>(row.id);
    Decoded& decoded = decoded_[count_];
    decoded.codes = codes;
    float scales[kDegree];
    for (int i = 0; i < kDegree; ++i) scales[i] = float_of(static_cast<uint32_t>(codes[kScales + i]) << 16);
    spread<kDegree>(scales, decoded.scales);
    if (kCatchUp) skipped_sizes<kColumns>(step_, row, 0, skipped_);
    for (int first = 0; first < kColumns; first += kBlock)
      update_block<kCatchUp, kGradient, kStore, kOut>(row, halves, codes, first, decoded);
    if (kStore && ++count_ == kBatch) encode();
  }

  template <bool kStore>
  void finish() {
    if (kStore) encode();
  }

 private:
  static constexpr int kDegree = degree_of(kColumns), kScales = num_values(kDegree);
  static constexpr int kBatch = 8;  // rows that are encoded at once: a single one is a long chain of operations

  struct Decoded {
    alignas(64) float first[kColumns], second[kColumns], scales[kColumns];
    alignas(64) uint32_t random[kColumns];
    uint16_t* codes;
  };

  template <bool kCatchUp, bool kGradient, bool kStore, bool kOut>
  ALWAYS_INLINE void update_block(const Row& row, uint16_t* halves, const uint16_t* codes, int column,
                                  Decoded& decoded) {
    alignas(64) float values[kBlock], mean[kBlock], root[kBlock];
    alignas(64) uint32_t words[kBlock];
    uint16_t rounded[kBlock];
    load_halves(halves + column, values);
    decode_moments(codes + column, decoded.scales + column, step_.reach, mean, root);
    const float* skipped = skipped_ + column;
    const float* __restrict rates = step_.rates + column;
    const float* __restrict gradient = row.gradient + column;
    const float eps = step_.eps;
    const uint32_t counter = static_cast<uint32_t>(row.id * kColumns + column), seed = step_.seed;
#pragma omp simd
    for (int i = 0; i < kBlock; ++i) {
      float value = values[i], first = mean[i], second = root[i] * root[i];
      if (kCatchUp) value -= skipped[i] * (first * reciprocal(root[i] + eps));
      if (kGradient || kStore) {
        update_moments<kGradient>(step_, row, kGradient ? gradient[i] : 0.0f, first, second);
        if (kGradient) value -= rates[i] * (first * reciprocal(root_of(second) + eps));
        const uint32_t random = random_bits(counter + static_cast<uint32_t>(i), seed);
        words[i] = rounded_half(value, random);
        decoded.first[column + i] = first;
        decoded.second[column + i] = second;
        decoded.random[column + i] = random;
      }
      values[i] = value;
    }
    if (kGradient || kStore) {
      uint16_t* destination = kStore ? halves + column : rounded;
      narrow(words, destination);
      if (kOut) load_halves(destination, values);
    }
    if (kOut) write_out<kBlock>(row.out + column, values, row.streaming);
  }

  __attribute__((noinline)) void encode() {
    float largest[kBatch * kDegree], inverse_scales[kBatch * kDegree];
    uint32_t scale_bits[kBatch * kDegree];
    for (int i = 0; i < count_; ++i) {
      for (int degree = 0; degree < kDegree; ++degree)
        largest[i * kDegree + degree] = largest_of_degree<kDegree>(decoded_[i].second, degree + 1);
    }
    for (int i = 0; i < count_ * kDegree; ++i) {
      scale_bits[i] = (bits_of(std::sqrt(largest[i])) + 0xFFFFu) & 0xFFFF0000u;  // rounded upwards
      inverse_scales[i] = scale_bits[i] ? 1.0f / float_of(scale_bits[i]) : 0.0f;
    }
    for (int i = 0; i < count_; ++i) {
      Decoded& decoded = decoded_[i];
      spread<kDegree>(inverse_scales + i * kDegree, decoded.scales);
      for (int first = 0; first < kColumns; first += kBlock)
        encode_moments(decoded.first + first, decoded.second + first, step_.reach, decoded.random + first,
                       decoded.scales + first, decoded.codes + first);
      for (int j = 0; j < kColumns - kScales; ++j)
        decoded.codes[kScales + j] = j < kDegree ? static_cast<uint16_t>(scale_bits[i * kDegree + j] >> 16) : 0;
    }
    count_ = 0;
  }

  const AdamStep step_;
  const AdamRows rows_;
  alignas(64) float skipped_[kColumns];
  Decoded decoded_[kBatch];
  int count_ = 0;
};

// ----------------------------------------------------------------------------------------------------------- visits

// A function of its own, without anything to destroy: compilers make no vectors of what an exception might leave.
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
  visited.template finish<kStore>();
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
