// Moves rows of the host store in place, and orders points along a Morton curve.
//
// Rows are moved as 32-bit words, so that float32 and int32 arrays share each function. The Python side has checked
// that ids are in range.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace {

using Rows = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Points = nb::ndarray<const float, nb::shape<-1, 3>, nb::device::cpu>;  // rows of any stride
using Order = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Fixed-size rows: copies and addresses.
struct Table {
  explicit Table(const Rows& rows) : words(rows.data()), columns(rows.shape(1)) {}
  Table(int32_t* memory, int64_t row_words) : words(memory), columns(row_words) {}

  int32_t* row(int64_t i) const { return words + i * columns; }
  size_t row_bytes() const { return columns * sizeof(int32_t); }
  void copy(int32_t* target, const int32_t* source) const { std::memcpy(target, source, row_bytes()); }

  int32_t* words;
  int64_t columns;
};

// Uninitialized scratch memory: its pages are first touched by the threads that use them.
template <class T>
std::unique_ptr<T[]> scratch(int64_t size) {
  return std::unique_ptr<T[]>(new T[std::max<int64_t>(size, 1)]);
}

void prefetch(const void* memory, size_t bytes) {
#if defined(__GNUC__)
  constexpr size_t kCacheLine = 64;
  for (size_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(static_cast<const char*>(memory) + i);
#else
  (void)memory, (void)bytes;
#endif
}

// The system hands out memory page by page at the first write, which is slow from one thread.
void touch_pages(const Bytes& memory, int num_threads) {
  constexpr int64_t kPageBytes = 4096;  // the smallest there is
  volatile uint8_t* bytes = memory.data();
  (void)num_threads;  // unused without OpenMP
  const int64_t size = memory.shape(0);
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t i = 0; i < size; i += kPageBytes) bytes[i] = 0;
}

// rows[first_target + j] = rows[ids[j]]; no id reaches first_target.
void append_rows(const Rows& rows, const Ids& ids, int64_t first_target, int num_threads) {
  const Table table(rows);
  const int64_t count = ids.shape(0);
  (void)num_threads;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t j = 0; j < count; ++j) table.copy(table.row(first_target + j), table.row(ids.data()[j]));
}

// rows[target_ids[j]] = rows[source_ids[j]]; no row is both a source and a target.
void copy_rows(const Rows& rows, const Ids& source_ids, const Ids& target_ids, int num_threads) {
  const Table table(rows);
  const int64_t count = source_ids.shape(0);
  (void)num_threads;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t j = 0; j < count; ++j) table.copy(table.row(target_ids.data()[j]), table.row(source_ids.data()[j]));
}

// rows[j] = rows[ids[j]] for strictly ascending ids, in place: chunk after chunk. A chunk's sources lie at or behind
// its rows, so writing it spoils no source of a later one. A chunk that ends before its first source is moved at
// once, and the more rows are missing, the longer it can be; others pass through a buffer that stays in the cache.
void compact_rows(const Rows& rows, const Ids& ids, int num_threads) {
  constexpr int64_t kBytesPerThread = 1 << 20;
  const Table table(rows);
  const int64_t* sources = ids.data();
  const int64_t count = ids.shape(0), columns = table.columns;
  const int64_t chunk = std::max<int64_t>(1, num_threads * kBytesPerThread / static_cast<int64_t>(table.row_bytes()));
  // As ids ascend, ids[j] == j holds for a first part of them and nowhere behind it.
  int64_t start = 0;
  for (int64_t behind = count; start < behind;) {
    const int64_t middle = start + (behind - start) / 2;
    if (sources[middle] == middle) start = middle + 1;
    else behind = middle;
  }
  const auto memory = scratch<int32_t>(chunk * columns);
  const Table buffer(memory.get(), columns);
#pragma omp parallel num_threads(num_threads)
  for (int64_t first = start, last; first < count; first = last) {
    last = std::min(std::max(first + chunk, sources[first]), count);
    if (sources[first] >= last) {
#pragma omp for schedule(static)
      for (int64_t j = first; j < last; ++j) table.copy(table.row(j), table.row(sources[j]));
    } else {
#pragma omp for schedule(static)
      for (int64_t j = first; j < last; ++j) table.copy(buffer.row(j - first), table.row(sources[j]));
#pragma omp for schedule(static)
      for (int64_t j = first; j < last; ++j) table.copy(table.row(j), buffer.row(j - first));
    }
  }
}

// A permutation to be applied in place to several arrays: rows[i] = old rows[order[i]].
//
// Following a cycle of the permutation moves each row once, but cycles are few and long. So every 32nd row is set
// aside beforehand, which cuts the cycles into many short chains that threads follow independently. Cycles without
// such a row are found once and followed whole; unless the order was made to spoil this, they are short.
class Permutation {

 public:
  Permutation(Ids order, int num_threads) : order_(order), num_threads_(num_threads) {
    const int64_t* sources = order_.data();
    const int64_t n = order_.shape(0);
    const auto seen = scratch<std::atomic<uint8_t>>(n);
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) seen[i].store(0, std::memory_order_relaxed);
    int64_t outside = 0, missing = 0;
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(+ : outside)
    for (int64_t i = 0; i < n; ++i) {
      if (sources[i] < 0 || sources[i] >= n) {
        ++outside;
      } else {
        seen[sources[i]].store(1, std::memory_order_relaxed);
      }
    }
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(+ : missing)
    for (int64_t i = 0; i < n; ++i) missing += !seen[i].exchange(0, std::memory_order_relaxed);
    if (outside || missing) throw std::invalid_argument("the order is not a permutation of all rows");
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 256)
    for (int64_t cut = 0; cut < n; cut += kStride) {
      int64_t i = cut;
      do {
        seen[i].store(1, std::memory_order_relaxed);
        i = sources[i];
      } while (i % kStride != 0);
    }
    for (int64_t start = 0; start < n; ++start) {
      if (seen[start].load(std::memory_order_relaxed) || sources[start] == start) continue;
      uncut_cycles_.push_back(start);
      for (int64_t i = start; !seen[i].exchange(1, std::memory_order_relaxed); i = sources[i]) {
      }
    }
  }

  void apply(const Rows& rows) const {
    const int64_t* sources = order_.data();
    const int64_t n = order_.shape(0);
    if (static_cast<int64_t>(rows.shape(0)) != n) throw std::invalid_argument("the array has another number of rows");
    const Table table(rows);
    const int64_t num_cuts = (n + kStride - 1) / kStride, num_cycles = uncut_cycles_.size();
    const auto memory = scratch<int32_t>(num_cuts * table.columns);
    const Table aside(memory.get(), table.columns);
#pragma omp parallel for num_threads(num_threads_) schedule(static)
    for (int64_t k = 0; k < num_cuts; ++k) table.copy(aside.row(k), table.row(k * kStride));
#pragma omp parallel for num_threads(num_threads_) schedule(dynamic)
    for (int64_t first = 0; first < num_cuts; first += kCutsPerTask) {
      move_chains(table, aside, first, std::min(first + kCutsPerTask, num_cuts));
    }
#pragma omp parallel num_threads(num_threads_)
    {
      const auto first_row = scratch<int32_t>(table.columns);
#pragma omp for schedule(dynamic, 64)
      for (int64_t c = 0; c < num_cycles; ++c) {
        const int64_t start = uncut_cycles_[c];
        table.copy(first_row.get(), table.row(start));
        int64_t target = start;
        for (int64_t source; (source = sources[target]) != start; target = source) {
          table.copy(table.row(target), table.row(source));
        }
        table.copy(table.row(target), first_row.get());
      }
    }
  }

 private:
  static constexpr int64_t kStride = 32;
  static constexpr int64_t kCutsPerTask = 256;

  // Fills the chains that begin at the cuts first ... last - 1. As every move waits for memory somewhere else, a
  // thread follows several chains in turn, and asks ahead for what each will need at its next turn.
  void move_chains(const Table& table, const Table& aside, int64_t first, int64_t last) const {
    struct Chain {
      int64_t target, source;
    };
    constexpr int kChains = 8;
    Chain chains[kChains];
    const int64_t* sources = order_.data();
    for (int active = 0;;) {
      for (; active < kChains && first < last; ++first) chains[active++] = {first * kStride, sources[first * kStride]};
      if (active == 0) return;
      for (int c = 0; c < active;) {
        Chain& chain = chains[c];
        if (chain.source % kStride == 0) {
          table.copy(table.row(chain.target), aside.row(chain.source / kStride));
          chain = chains[--active];
        } else {
          table.copy(table.row(chain.target), table.row(chain.source));
          chain = {chain.source, sources[chain.source]};
          prefetch(table.row(chain.source), table.row_bytes());
          prefetch(sources + chain.source, sizeof(int64_t));
          ++c;
        }
      }
    }
  }

  Ids order_;
  std::vector<int64_t> uncut_cycles_;
  [[maybe_unused]] int num_threads_;  // unused without OpenMP
};

// Bits 0, 3, 6, ... of the result are the lowest 21 bits of x.
uint64_t spread_bits(uint64_t x) {
  x &= 0x1fffff;
  x = (x | x << 32) & 0x001f00000000ffff;
  x = (x | x << 16) & 0x001f0000ff0000ff;
  x = (x | x << 8) & 0x100f00f00f00f00f;
  x = (x | x << 4) & 0x10c30c30c30c30c3;
  x = (x | x << 2) & 0x1249249249249249;
  return x;
}

// A point's cell along one axis; points outside, and what is no number, fall into the outermost cells.
uint64_t cell(float x, double lower, double cells_per_unit) {
  constexpr double kLast = (1 << 21) - 1;
  const double position = (x - lower) * cells_per_unit;
  return position > 0 ? static_cast<uint64_t>(std::min(position, kLast)) : 0;
}

// Stable order of points by 63-bit Morton codes: a radix sort, 11 bits at a time from the lowest. Each thread counts
// and moves a contiguous block, so the order does not depend on the number of threads. Takes 32 bytes per point, the
// result included.
void morton_order(const Points& points, std::array<double, 3> lower, double cells_per_unit, const Order& order,
                  int num_threads) {
  constexpr int kDigitBits = 11, kPasses = 6;
  constexpr int64_t kDigits = 1 << kDigitBits;
  const int64_t n = points.shape(0);
  auto codes = scratch<uint64_t>(n), other_codes = scratch<uint64_t>(n);
  const auto other_memory = scratch<int64_t>(n);
  int64_t *ids = order.data(), *other_ids = other_memory.get();
  uint64_t any = 0, all = ~uint64_t{0};  // which bits are set in any, in all codes
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(| : any) reduction(& : all)
  for (int64_t i = 0; i < n; ++i) {
    const float* point = points.data() + i * points.stride(0);
    uint64_t code = 0;
    for (int axis = 0; axis < 3; ++axis) {
      code |= spread_bits(cell(point[axis * points.stride(1)], lower[axis], cells_per_unit)) << axis;
    }
    codes[i] = code;
    ids[i] = i;
    any |= code;
    all &= code;
  }
  std::vector<int64_t> places(num_threads * kDigits);  // where each thread's next item of each digit goes
  for (int shift = 0; shift < kPasses * kDigitBits; shift += kDigitBits) {
    if (((any & ~all) >> shift) % kDigits == 0) continue;
    std::fill(places.begin(), places.end(), 0);
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
    for (int t = 0; t < num_threads; ++t) {
      int64_t* counts = &places[t * kDigits];
      for (int64_t i = n * t / num_threads; i < n * (t + 1) / num_threads; ++i) ++counts[(codes[i] >> shift) % kDigits];
    }
    int64_t place = 0;
    for (int64_t digit = 0; digit < kDigits; ++digit) {
      for (int t = 0; t < num_threads; ++t) place += std::exchange(places[t * kDigits + digit], place);
    }
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
    for (int t = 0; t < num_threads; ++t) {
      int64_t* next = &places[t * kDigits];
      for (int64_t i = n * t / num_threads; i < n * (t + 1) / num_threads; ++i) {
        const int64_t target = next[(codes[i] >> shift) % kDigits]++;
        other_codes[target] = codes[i];
        other_ids[target] = ids[i];
      }
    }
    std::swap(codes, other_codes);
    std::swap(ids, other_ids);
  }
  if (ids != order.data()) std::copy(ids, ids + n, order.data());
}

}  // namespace

void bind_store(nb::module_& module) {
  using nb::literals::operator""_a;
  const nb::call_guard<nb::gil_scoped_release> release;
  module.def("touch_pages", &touch_pages, "memory"_a, "num_threads"_a, release);
  module.def("append_rows", &append_rows, "rows"_a, "ids"_a, "first_target"_a, "num_threads"_a, release);
  module.def("copy_rows", &copy_rows, "rows"_a, "source_ids"_a, "target_ids"_a, "num_threads"_a, release);
  module.def("compact_rows", &compact_rows, "rows"_a, "ids"_a, "num_threads"_a, release);
  module.def("morton_order", &morton_order, "points"_a, "lower"_a, "cells_per_unit"_a, "order"_a, "num_threads"_a,
             release);
  nb::class_<Permutation>(module, "Permutation")
      .def(nb::init<Ids, int>(), "order"_a, "num_threads"_a, release)
      .def("apply", &Permutation::apply, "rows"_a, release);
}
