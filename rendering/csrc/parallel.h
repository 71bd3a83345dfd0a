// Parallel loops over tasks; what a task computes never depends on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

namespace rendering {

// Calls body(i) for all i in [0, count) on at most `threads` threads, in any order; one of the exceptions that
// bodies throw is thrown again when the others have ended.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  std::exception_ptr error;
  const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
  (void)team;  // unused without OpenMP
#pragma omp parallel for schedule(dynamic) num_threads(team)
  for (int64_t i = 0; i < count; ++i) {
    try {
      body(i);
    } catch (...) {
#pragma omp critical
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// The same over ranges [begin, end) of a fixed size.
template <class Body>
void parallel_ranges(int64_t count, int64_t range, int threads, const Body& body) {
  parallel_for((count + range - 1) / range, threads, [&](int64_t i) {
    const int64_t begin = i * range;
    body(begin, std::min(begin + range, count));
  });
}

}  // namespace rendering
