// Adam over rows of the host store, deferred or dense. adam_kernels.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace offload {

// One optimizer step t, as the kernels need it. Sums over skipped steps are C of offload/adam/deferral.py.
struct AdamStep {
  int32_t largest_last_step;// the largest last_step a row may have: t - 1 with gradients, t without
  int32_t step;             // t
  int64_t columns;
  int64_t schedules;
  const float* skipped;     // [>= largest_last_step + 1, schedules] C(last_step), up to step largest_last_step
  const float* decays;      // [> t, 3] for k = 0, 1 ...: b1^k, b2^k, and what b2^k lost when rounded to float32
  const float* multipliers; // [schedules, columns]
  const float* rates;       // [columns] lr_t sqrt(1 - b2^t) / (1 - b1^t)
  float gradient_weight;    // 1 - b1
  float square_weight;      // 1 - b2
  float eps;                // eps sqrt(1 - b2^t)
  float reach;              // the bound of m / sqrt(v) by which codes measure m
  uint32_t seed;            // of the random bits of step t
};

// How rows keep their moments: both in float32; as pairs of bfloat16, one word each; or as codes, which have 16, 32 or
// 48 columns, and parameters in float16.
enum class Moments { float32, pairs, codes };

// Rows [N, columns] whose values are contiguous.
struct RowArray {
  char* data;
  int64_t stride;  // bytes from one row to the next

  template <class T>
  T* row(int64_t i) const {
    return reinterpret_cast<T*>(data + i * stride);
  }
};

// What gradients of harmonics are made of, where they are not given: offload/adam/harmonics.py.
struct MadeOf {
  RowArray means;     // float32 [rows, 3]; no data: they are not made
  RowArray constant;  // float32 [rows, 3], the gradients of sh0
  float position[3];  // of the camera
  int harmonics;      // that have a gradient, without the constant one
  bool has_constant;  // the first columns are of the constant one
};
constexpr int kMostMadeColumns = 48;

// The rows to visit; those of `out` and `gradients` are numbered 0, 1, 2 ... unless out_rows or gradient_rows say
// otherwise.
struct AdamRows {
  Moments format;
  RowArray parameters;
  RowArray moments[2];           // first and second; pairs and codes have both in the first of these
  int32_t* last_step;            // [N], or null: every row has been updated at every step before t; float32 only
  const int64_t* ids;            // [V], or null: all rows
  const float* gradients;        // [rows, columns], or null: made, or no gradient at step t
  MadeOf made;                   // in their place
  const int64_t* gradient_rows;  // [V] or null
  float* out;                    // [rows, columns], or null
  const int64_t* out_rows;       // [V] or null
  bool store;                    // write the new state back

  bool has_gradients() const { return gradients || made.means.data; }
};

// Visits rows [begin, end) of the V; returns how many were left alone because of an impossible last_step.
using AdamKernel = int64_t (*)(const AdamStep&, const AdamRows&, int64_t begin, int64_t end);

}  // namespace offload
