// A parallel loop whose body may throw (std::bad_alloc): the first exception is thrown again by the calling thread.
#pragma once

#include <cstdint>
#include <exception>

namespace rendering {

template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  std::exception_ptr error;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (count > 1)
  for (int64_t i = 0; i < count; ++i) {
    try {
      body(i);
    } catch (...) {
#pragma omp critical(rendering_parallel_error)
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// The same over ranges [begin, end) of a fixed size: the split never depends on the number of threads.
template <class Body>
void parallel_ranges(int64_t count, int64_t range, int threads, const Body& body) {
  parallel_for((count + range - 1) / range, threads, [&](int64_t i) {
    const int64_t begin = i * range;
    body(begin, begin + range < count ? begin + range : count);
  });
}

}  // namespace rendering
