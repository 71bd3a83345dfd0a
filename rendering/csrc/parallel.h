// Parallel loops on a pool of threads that sleep when idle.
//
// Not OpenMP: its threads spin at the end of each loop, and its caller waits for all of them. Where other processes
// share the cores (data loading, PyTorch's own OpenMP threads) that made a rendering five times slower.
#pragma once

#include <cstdint>
#include <functional>

namespace rendering {

// Calls body(i) for all i in [0, count) on at most `threads` threads, in any order; the first exception that a body
// throws is thrown again by the calling thread. The caller works too and waits only for threads that joined in, so
// that a call always finishes, in a forked child without the pool's threads as well.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body);

// The same over ranges [begin, end) of a fixed size: the split never depends on the number of threads.
template <class Body>
void parallel_ranges(int64_t count, int64_t range, int threads, const Body& body) {
  parallel_for((count + range - 1) / range, threads, [&](int64_t i) {
    const int64_t begin = i * range;
    body(begin, begin + range < count ? begin + range : count);
  });
}

}  // namespace rendering
