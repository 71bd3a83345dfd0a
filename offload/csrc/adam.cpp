// Binds the Adam kernels: checks rows, chooses the build that this processor can run, shares the rows among threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "adam_kernels.h"
#include "instruction_set.h"

namespace nb = nanobind;

namespace offload {

IN_EACH_BUILD(AdamKernel kernel_for(const AdamRows&, int64_t columns);)

namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// Rows of any type that may stand apart from one another.
using Rows = nb::ndarray<nb::ndim<2>, nb::device::cpu>;

template <class Array>
auto data_or_null(const std::optional<Array>& array) {
  return array ? array->data() : nullptr;
}

// Rows that a thread takes at a time: many, since prefetching begins anew with each piece, yet several pieces for
// each thread, since some threads are slower than others.
int64_t rows_per_piece(int64_t count, int64_t threads) {
  return std::clamp<int64_t>(count / (8 * std::max<int64_t>(threads, 1)), 64, 4096);
}

// Calls body(begin, end) on pieces of [0, count) and returns the sum of what it returns.
template <class Body>
int64_t sum_over_pieces(int64_t count, int64_t threads, const Body& body) {
  const int64_t rows = rows_per_piece(count, threads);
  const int64_t pieces = (count + rows - 1) / rows;
  const int team = static_cast<int>(std::max<int64_t>(1, std::min(threads, pieces)));
  (void)team;  // unused without OpenMP
  int64_t sum = 0;
#pragma omp parallel for schedule(dynamic) num_threads(team) reduction(+ : sum)
  for (int64_t piece = 0; piece < pieces; ++piece)
    sum += body(piece * rows, std::min((piece + 1) * rows, count));
  return sum;
}

int64_t count_outside(const int64_t* numbers, int64_t rows, int64_t begin, int64_t end) {
  int64_t wrong = 0;
  for (int64_t i = begin; i < end; ++i) wrong += numbers[i] < 0 || numbers[i] >= rows;
  return wrong;
}

// Rows are written by several threads: each must be there, and only once.
int64_t count_misplaced(const int64_t* ids, int64_t rows, int64_t begin, int64_t end) {
  int64_t wrong = count_outside(ids, rows, begin, end);
  for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i) wrong += ids[i] <= ids[i - 1];
  return wrong;
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

bool has_type(const Rows& rows, nb::dlpack::dtype_code code, int bits) {
  return rows.dtype().code == static_cast<uint8_t>(code) && rows.dtype().bits == bits && rows.dtype().lanes == 1;
}

Moments format_of(const Rows& parameters, const std::vector<Rows>& moments) {
  using Code = nb::dlpack::dtype_code;
  require(!moments.empty() && moments.size() <= 2, "rows have one or two arrays of moments");
  const int64_t columns = parameters.shape(1);
  const bool float32 = has_type(parameters, Code::Float, 32);
  if (moments.size() == 2) {
    require(float32 && has_type(moments[0], Code::Float, 32) && has_type(moments[1], Code::Float, 32),
            "two arrays of moments are float32, as are their parameters");
    return Moments::float32;
  }
  if (float32 && has_type(moments[0], Code::Int, 32)) return Moments::pairs;
  require(has_type(parameters, Code::Float, 16) && has_type(moments[0], Code::Int, 16) &&
              (columns == 16 || columns == 32 || columns == 48),
          "one array of moments is int32 beside float32, or int16 beside float16 in 16, 32 or 48 columns");
  return Moments::codes;
}

bool values_lie_together(const Rows& rows) {
  const int64_t columns = rows.shape(1);
  return (rows.shape(0) < 2 || rows.stride(0) >= columns) && (columns < 2 || rows.stride(1) == 1);
}

RowArray row_array(const Rows& rows) {
  return {static_cast<char*>(rows.data()), static_cast<int64_t>(rows.stride(0)) * rows.dtype().bits / 8};
}

void adam_rows(Rows parameters, std::vector<Rows> moments, std::optional<Vector<int32_t>> last_step,
               std::optional<Vector<const int64_t>> ids, std::optional<Matrix<const float>> gradients,
               std::optional<Vector<const int64_t>> gradient_rows, std::optional<Rows> means,
               std::optional<Rows> constant, const std::vector<float>& position, int harmonics, bool has_constant,
               std::optional<Matrix<float>> out, std::optional<Vector<const int64_t>> out_rows, bool store, int32_t step, Matrix<const float> skipped,
               Matrix<const float> decays, Matrix<const float> multipliers, Vector<const float> rates,
               float gradient_weight, float square_weight, float eps, float reach, uint32_t seed, int64_t threads) {
  const int64_t total = parameters.shape(0), columns = parameters.shape(1);
  const int64_t count = ids ? ids->shape(0) : total;
  const auto has_columns = [&](const auto& array) { return static_cast<int64_t>(array.shape(1)) == columns; };
  const auto has_length = [](const auto& array, int64_t length) {
    return static_cast<int64_t>(array.shape(0)) == length;
  };

  // The Python side says which argument is wrong; these only keep every access inside its array.
  const Moments format = format_of(parameters, moments);
  const auto is_rows = [&](const Rows& rows) {
    return has_length(rows, total) && has_columns(rows) && values_lie_together(rows);
  };
  const bool makes = means && constant, has_gradients = gradients || makes;
  const auto is_made_of = [&](const Rows& rows) {
    return has_type(rows, nb::dlpack::dtype_code::Float, 32) && rows.shape(1) == 3 && values_lie_together(rows) &&
           has_length(rows, static_cast<int64_t>(means->shape(0)));
  };
  require(!makes || (is_made_of(*means) && is_made_of(*constant) && position.size() == 3 && !gradients && last_step &&
                     columns <= kMostMadeColumns && harmonics >= 0 && harmonics < kMostMadeColumns / 3 &&
                     3 * (harmonics + has_constant) <= columns),
          "what gradients are made of does not fit together");
  require(is_rows(parameters) && is_rows(moments.front()) && is_rows(moments.back()) && has_columns(multipliers) &&
              has_length(rates, columns) && (last_step || format == Moments::float32) && (!last_step || has_length(*last_step, total)) && (!gradients || has_columns(*gradients)) &&
              (!out || has_columns(*out)) && (!gradient_rows || has_length(*gradient_rows, count)) &&
              (!out_rows || has_length(*out_rows, count)) && skipped.shape(1) == multipliers.shape(0) && multipliers.shape(0) > 0 &&
              decays.shape(1) == 3 && step >= 0 && static_cast<int64_t>(skipped.shape(0)) > step &&
              static_cast<int64_t>(decays.shape(0)) > step,
          "arrays do not fit together");

  const AdamStep adam_step{has_gradients ? step - 1 : step,
                           step,
                           columns,
                           static_cast<int64_t>(multipliers.shape(0)),
                           skipped.data(),
                           decays.data(),
                           multipliers.data(),
                           rates.data(),
                           gradient_weight,
                           square_weight,
                           eps,
                           reach,
                           seed};
  MadeOf made = {};
  if (makes)
    made = {row_array(*means), row_array(*constant), {position[0], position[1], position[2]}, harmonics, has_constant};
  const AdamRows rows{format,
                      row_array(parameters),
                      {row_array(moments.front()), row_array(moments.back())},
                      data_or_null(last_step),
                      data_or_null(ids),
                      data_or_null(gradients),
                      made,
                      data_or_null(gradient_rows),
                      data_or_null(out),
                      data_or_null(out_rows),
                      store};
  const int64_t gradient_count = gradients ? gradients->shape(0) : makes ? means->shape(0) : 0;
  const int64_t out_count = out ? out->shape(0) : 0;

  int64_t refused = 0;
  {
    const nb::gil_scoped_release no_gil;
    require(!has_gradients || rows.gradient_rows || gradient_count == count, "every row needs a row of gradients");
    require(!out || rows.out_rows || out_count == count, "every row needs a row of out");
    // All three at once: threads that wait for one another cost more than to read the numbers.
    const auto wrong_ids = [&](int64_t begin, int64_t end) {
      return rows.ids ? count_misplaced(rows.ids, total, begin, end) : 0;
    };
    const auto wrong_gradients = [&](int64_t begin, int64_t end) {
      return has_gradients && rows.gradient_rows ? count_outside(rows.gradient_rows, gradient_count, begin, end) : 0;
    };
    const auto wrong_outs = [&](int64_t begin, int64_t end) {
      return out && rows.out_rows ? count_outside(rows.out_rows, out_count, begin, end) : 0;
    };
    const int64_t wrong = sum_over_pieces(count, threads, [&](int64_t begin, int64_t end) {
      return wrong_ids(begin, end) + wrong_gradients(begin, end) + wrong_outs(begin, end);
    });
    require(wrong == 0 || wrong_ids(0, count) == 0, "ids must increase and be rows of the parameters");
    require(wrong == 0 || wrong_gradients(0, count) == 0, "every row needs a row of gradients");
    require(wrong == 0, "every row needs a row of out");
    const AdamKernel kernel = OF_BEST_BUILD(kernel_for)(rows, columns);
    refused = sum_over_pieces(count, threads, [&](int64_t begin, int64_t end) {
      return kernel(adam_step, rows, begin, end);
    });
  }
  require(refused == 0, "last_step of some rows is negative or not before this step; they were left alone");
}

}  // namespace
}  // namespace offload

void bind_adam(nb::module_& module) {
  module.def("adam_rows", &offload::adam_rows, nb::arg("parameters"), nb::arg("moments"), nb::arg("last_step").none(), nb::arg("ids").none(), nb::arg("gradients").none(),
             nb::arg("gradient_rows").none(), nb::arg("means").none(), nb::arg("constant").none(), nb::arg("position"),
             nb::arg("harmonics"), nb::arg("has_constant"), nb::arg("out").none(), nb::arg("out_rows").none(),
             nb::arg("store"), nb::arg("step"), nb::arg("skipped"), nb::arg("decays"), nb::arg("multipliers"), nb::arg("rates"),
             nb::arg("gradient_weight"), nb::arg("square_weight"), nb::arg("eps"), nb::arg("reach"),
             nb::arg("seed"), nb::arg("threads"));
}
