// Compares the rows of two views, which are sorted ids.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

namespace {

using ConstIds = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A part of both that no row of another part is in.
struct Piece {
  int64_t begin, end;              // of the ids
  int64_t begin_other, end_other;  // of the others
};

int64_t count_shared(const int64_t* ids, const int64_t* others, const Piece& piece) {
  int64_t shared = 0;
  for (int64_t i = piece.begin, j = piece.begin_other; i < piece.end && j < piece.end_other;) {
    const int64_t id = ids[i], other = others[j];  // no branches, which nobody could foresee
    shared += id == other;
    i += id <= other;
    j += other <= id;
  }
  return shared;
}

// Writes the places of the ids that both hold, in `here` and `there`; and of those that one alone holds: in `only_here`,
// and in `only_there`, each with the ids themselves. Arrays are as long as what they might hold. Returns how many are shared.
int64_t compare_ids(ConstIds ids, ConstIds others, Ids here, Ids there, Ids only_here, Ids only_here_ids,
                    Ids only_there, Ids only_there_ids, int num_threads) {
  const int64_t count = ids.shape(0), num_others = others.shape(0);
  const auto holds = [](const Ids& array, int64_t length) { return static_cast<int64_t>(array.shape(0)) >= length; };
  if (!holds(here, std::min(count, num_others)) || !holds(there, std::min(count, num_others)) ||
      !holds(only_here, count) || !holds(only_here_ids, count) || !holds(only_there, num_others) ||
      !holds(only_there_ids, num_others))
    throw std::invalid_argument("arrays are too short");
  const int64_t *id = ids.data(), *other = others.data();

  const int64_t num_pieces = std::clamp<int64_t>(count / 4096, 1, 4 * std::max(num_threads, 1));
  std::vector<Piece> pieces(num_pieces);
  std::vector<int64_t> shared_before(num_pieces + 1);  // in the pieces before each
  for (int64_t p = 0; p < num_pieces; ++p) {
    const int64_t begin = count * p / num_pieces;
    const int64_t begin_other = p ? std::lower_bound(other, other + num_others, id[begin]) - other : 0;
    pieces[p] = {begin, count, begin_other, num_others};
    if (p) pieces[p - 1].end = begin, pieces[p - 1].end_other = begin_other;
  }
  const nb::gil_scoped_release no_gil;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
  for (int64_t p = 0; p < num_pieces; ++p) shared_before[p + 1] = count_shared(id, other, pieces[p]);
  for (int64_t p = 0; p < num_pieces; ++p) shared_before[p + 1] += shared_before[p];
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
  for (int64_t p = 0; p < num_pieces; ++p) {
    const Piece& piece = pieces[p];
    int64_t i = piece.begin, j = piece.begin_other, shared = shared_before[p];
    const auto take_id = [&] {
      only_here.data()[i - shared] = i;
      only_here_ids.data()[i - shared] = id[i];
      ++i;
    };
    const auto take_other = [&] {
      only_there.data()[j - shared] = j;
      only_there_ids.data()[j - shared] = other[j];
      ++j;
    };
    while (i < piece.end && j < piece.end_other) {
      if (id[i] < other[j]) {
        take_id();
      } else if (other[j] < id[i]) {
        take_other();
      } else {
        here.data()[shared] = i++;
        there.data()[shared++] = j++;
      }
    }
    while (i < piece.end) take_id();
    while (j < piece.end_other) take_other();
  }
  return shared_before[num_pieces];
}

}  // namespace

void bind_ids(nb::module_& module) {
  using nb::literals::operator""_a;
  module.def("compare_ids", &compare_ids, "ids"_a, "others"_a, "here"_a.noconvert(), "there"_a.noconvert(),
             "only_here"_a.noconvert(), "only_here_ids"_a.noconvert(), "only_there"_a.noconvert(),
             "only_there_ids"_a.noconvert(), "num_threads"_a);
}
