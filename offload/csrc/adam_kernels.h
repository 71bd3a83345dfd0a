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
};

// The rows to visit; those of `out` and `gradients` are numbered 0, 1, 2 ... unless out_rows or gradient_rows say
// otherwise.
struct AdamRows {
  float *parameters, *exp_avg, *exp_avg_sq;  // [N, columns]
  int32_t* last_step;                        // [N], or null: every row has been updated at every step before t
  const int64_t* ids;                        // [V], or null: all rows
  const float* gradients;                    // [rows, columns], or null: no gradient at step t
  const int64_t* gradient_rows;              // [V] or null
  float* out;                                // [rows, columns], or null
  const int64_t* out_rows;                   // [V] or null
  bool store;                                // write the new state back
};

// Visits rows [begin, end) of the V; returns how many were left alone because of an impossible last_step.
using AdamKernel = int64_t (*)(const AdamStep&, const AdamRows&, int64_t begin, int64_t end);

}  // namespace offload
