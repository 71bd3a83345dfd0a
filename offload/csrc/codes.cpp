// Binds the codec of compact rows, offload/adam/codes.py, as the deferred Adam of the CPU has it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "codes_kernels.h"
#include "instruction_set.h"

namespace nb = nanobind;

namespace offload {

IN_EACH_BUILD(void encode_rows(const FloatRows&, const uint32_t* random, float reach, const StoredRows&);
              void decode_rows(const StoredRows&, float reach, const FloatRows&);)

namespace {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = Matrix<float>;
using Words = Matrix<int32_t>;
using Halves = Matrix<int16_t>;

template <class... Arrays>
StoredRows stored_rows(const Halves& halves, const Halves& codes, const Arrays&... others) {
  const auto is_alike = [&](const auto& array) {
    return array.shape(0) == codes.shape(0) && array.shape(1) == codes.shape(1);
  };
  const int64_t columns = codes.shape(1);
  if (!(is_alike(halves) && ... && is_alike(others)) || (columns != 16 && columns != 32 && columns != 48))
    throw std::invalid_argument("arrays must have the same rows, of 16, 32 or 48 columns");
  return {static_cast<int64_t>(codes.shape(0)), columns, reinterpret_cast<uint16_t*>(halves.data()),
          reinterpret_cast<uint16_t*>(codes.data())};
}

void encode(Floats values, Floats first, Floats second, Words random, float reach, Halves halves, Halves codes) {
  const StoredRows stored = stored_rows(halves, codes, values, first, second, random);
  const auto* bits = reinterpret_cast<const uint32_t*>(random.data());
  OF_BEST_BUILD(encode_rows)({values.data(), first.data(), second.data()}, bits, reach, stored);
}

void decode(Halves halves, Halves codes, float reach, Floats values, Floats first, Floats second) {
  const StoredRows stored = stored_rows(halves, codes, values, first, second);
  OF_BEST_BUILD(decode_rows)(stored, reach, {values.data(), first.data(), second.data()});
}

}  // namespace
}  // namespace offload

void bind_codes(nb::module_& module) {
  using nb::literals::operator""_a;
  const nb::call_guard<nb::gil_scoped_release> release;
  module.def("encode_rows", &offload::encode, "values"_a, "first"_a, "second"_a, "random"_a, "reach"_a, "halves"_a,
             "codes"_a, release);
  module.def("decode_rows", &offload::decode, "halves"_a, "codes"_a, "reach"_a, "values"_a, "first"_a, "second"_a,
             release);
}
