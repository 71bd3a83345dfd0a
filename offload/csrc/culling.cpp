// Packs cameras, and finds what they may draw from geometry rows and the bounds of their blocks. Blocks that no camera
// can see are rejected without a look at their rows; every other row is tested by itself (culling_kernels.cpp).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "culling_kernels.h"
#include "instruction_set.h"

namespace nb = nanobind;

namespace offload {

IN_EACH_BUILD(extern const CullingKernels culling_kernels;)

const CullingKernels& best_culling_kernels() { return OF_BEST_BUILD(culling_kernels); }

namespace {

// Rows of a wider array or of their own; the values of a row lie side by side.
using Geometry = nb::ndarray<const float, nb::shape<-1, kGeometryColumns>, nb::device::cpu>;
using Bounds = nb::ndarray<float, nb::shape<-1, 8>, nb::c_contig, nb::device::cpu>;
using Matrices4 = nb::ndarray<const float, nb::shape<-1, 4, 4>, nb::c_contig, nb::device::cpu>;
using Matrices3 = nb::ndarray<const float, nb::shape<-1, 3, 3>, nb::c_contig, nb::device::cpu>;
using Cameras = nb::ndarray<float, nb::shape<-1, kCameraFloats>, nb::c_contig, nb::device::cpu>;
using ConstCameras = nb::ndarray<const float, nb::shape<-1, kCameraFloats>, nb::c_contig, nb::device::cpu>;
using PackedCamera = nb::ndarray<const float, nb::shape<kCameraFloats>, nb::c_contig, nb::device::cpu>;
using HalfSpaces = nb::ndarray<double, nb::shape<-1, 6, 6>, nb::c_contig, nb::device::cpu>;
using ConstIds = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using Cells = nb::ndarray<int16_t, nb::shape<4, -1>, nb::c_contig, nb::device::cpu>;
using ConstCells = nb::ndarray<const int16_t, nb::shape<4, -1>, nb::c_contig, nb::device::cpu>;
using Boxes = nb::ndarray<const int32_t, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Corners = nb::ndarray<int64_t, nb::shape<4, -1, -1>, nb::c_contig, nb::device::cpu>;

// Floats from one row to the next.
int64_t row_stride(const Geometry& geometry) {
  if (geometry.shape(0) > 0 && geometry.stride(1) != 1) {
    throw nb::value_error("the values of a row of geometry must lie side by side");
  }
  return geometry.stride(0);
}

constexpr int64_t kChunkBlocks = 32;  // blocks that a thread takes at once
constexpr int64_t kChunkTiles = kChunkBlocks * kBlockTiles;

struct BlockBounds {
  float low[3], high[3];  // of the means; NaN where the rows are not finite
  float largest_scale;    // world units
  float unused;
};

constexpr int64_t kPrefetchRows = 16;

BlockBounds bounds_of(const float* rows, int64_t stride, int64_t count) {
  constexpr int kColumns = 8;  // means and log scales, and two that make whole vectors
  float low[kColumns], high[kColumns], finite[kColumns] = {};
  std::copy_n(rows, kColumns, low);
  std::copy_n(rows, kColumns, high);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = rows + stride * i;
    __builtin_prefetch(row + stride * kPrefetchRows);
#pragma omp simd
    for (int c = 0; c < kColumns; ++c) {
      const float value = row[c];
      low[c] = value < low[c] ? value : low[c];
      high[c] = high[c] < value ? value : high[c];
      finite[c] += 0.0f * value;
    }
  }
  BlockBounds bounds{};
  for (int c = 0; c < 3; ++c) {
    bounds.low[c] = low[c] + finite[c] + finite[3 + c];
    bounds.high[c] = high[c];
  }
  bounds.largest_scale = std::exp(std::max(high[3], std::max(high[4], high[5])));
  return bounds;
}

struct Limits {
  float width, height, near_plane, far_plane, eps2d;
  bool antialiased;
};

struct Margin {
  float means, quats, scales, opacities, pixels;
};

Camera pack_camera(const float* viewmat, const float* K, const Limits& limits, const Margin& margin) {
  Camera c{};
  c.largest_translation = 0;
  for (int r = 0; r < 3; ++r) {
    std::copy_n(viewmat + 4 * r, 3, c.rotation + 3 * r);
    c.translation[r] = viewmat[4 * r + 3];
    c.largest_translation = std::max(c.largest_translation, std::fabs(c.translation[r]));
  }
  c.near_plane = limits.near_plane, c.far_plane = limits.far_plane;
  c.eps2d = limits.eps2d, c.antialiased = limits.antialiased;
  c.move = std::sqrt(3.0f) * margin.means;  // three and four components
  c.turn = 2.0f * margin.quats;
  c.growth = std::exp(margin.scales);
  c.logit_gain = margin.opacities;
  c.extra_pixels = margin.pixels;
  // ceil(extent sqrt(sigma^2 + eps2d)) <= extent sigma + extent sqrt(eps2d) + 1
  c.blur_reach = 1.0001f * kOpaqueExtent * std::sqrt(c.eps2d) + 1.01f + c.extra_pixels;
  for (int axis = 0; axis < 2; ++axis) {
    const float focal = K[4 * axis], centre = K[3 * axis + 2], size = axis == 0 ? limits.width : limits.height;
    c.focal[axis] = focal, c.centre[axis] = centre, c.size[axis] = size;
    // gsplat cuts the slope at 15 % of the picture's extent beyond its borders.
    const float beyond = 0.15f * size / focal;
    c.slope_low[axis] = -(centre / focal + beyond);
    c.slope_high[axis] = (size - centre) / focal + beyond;
    const float steepest = std::max(std::fabs(c.slope_low[axis]), std::fabs(c.slope_high[axis]));
    c.reach[axis] = 1.0005f * kOpaqueExtent * c.growth * focal * std::sqrt(1.0f + steepest * steepest);
    c.error_reach[axis] = focal + std::fabs(centre) + size + c.blur_reach;
  }
  return c;
}

void pack_cameras(Matrices4 viewmats, Matrices3 Ks, float width, float height, float near_plane, float far_plane,
                  float eps2d, bool antialiased, float move_means, float move_scales, float move_quats,
                  float move_opacities, float pixels, Cameras cameras) {
  const Limits limits{width, height, near_plane, far_plane, eps2d, antialiased};
  const Margin margin{move_means, move_quats, move_scales, move_opacities, pixels};
  if (viewmats.shape(0) != cameras.shape(0) || Ks.shape(0) != cameras.shape(0)) {
    throw nb::value_error("there must be as many viewmats as Ks and packed cameras");
  }
  for (size_t i = 0; i < cameras.shape(0); ++i) {
    reinterpret_cast<Camera*>(cameras.data())[i] =
        pack_camera(viewmats.data() + 16 * i, Ks.data() + 9 * i, limits, margin);
  }
}

// A half space that everything drawn meets: normal . mean + offset + reach * scale + error_reach * error >= 0, for a
// ball of the largest scale around a mean that is known up to an error. Six numbers, as `half_spaces` writes them.
struct HalfSpace {
  double normal[3];  // in world space
  double offset, reach, error_reach;
};

struct Frustum {
  Camera camera;
  HalfSpace half_spaces[6];
  double error, relative_error;  // of coordinates: world units, and relative to their size
};

// A Gaussian's rectangle reaches a border of the picture where its centre is `blur_reach` pixels and `reach` largest
// scales away from it; times depth that is linear in the centre.
Frustum make_frustum(const Camera& c) {
  const auto half_space = [&](double x, double y, double z, double constant, double reach, double error_reach) {
    HalfSpace h;
    h.offset = constant + x * c.translation[0] + y * c.translation[1] + z * c.translation[2];
    for (int k = 0; k < 3; ++k) h.normal[k] = x * c.rotation[k] + y * c.rotation[3 + k] + z * c.rotation[6 + k];
    h.reach = reach;
    h.error_reach = error_reach;
    return h;
  };
  Frustum f;
  f.camera = c;
  const float fx = c.focal[0], fy = c.focal[1], cx = c.centre[0], cy = c.centre[1];
  const double blur = c.blur_reach;
  f.half_spaces[0] = half_space(fx, 0, cx + blur, 0, c.reach[0], c.error_reach[0]);
  f.half_spaces[1] = half_space(-fx, 0, c.size[0] - cx + blur, 0, c.reach[0], c.error_reach[0]);
  f.half_spaces[2] = half_space(0, fy, cy + blur, 0, c.reach[1], c.error_reach[1]);
  f.half_spaces[3] = half_space(0, -fy, c.size[1] - cy + blur, 0, c.reach[1], c.error_reach[1]);
  f.half_spaces[4] = half_space(0, 0, 1, -c.near_plane, 0, 1);
  f.half_spaces[5] = half_space(0, 0, -1, c.far_plane, 0, 1);
  f.relative_error = 1e-6;
  f.error = c.move + f.relative_error * c.largest_translation;
  return f;
}

void half_spaces(ConstCameras cameras, HalfSpaces out) {
  if (cameras.shape(0) != out.shape(0)) throw nb::value_error("each camera has its half spaces");
  for (size_t i = 0; i < cameras.shape(0); ++i) {
    const Frustum frustum = make_frustum(reinterpret_cast<const Camera*>(cameras.data())[i]);
    std::copy_n(frustum.half_spaces, 6, reinterpret_cast<HalfSpace*>(out.data()) + 6 * i);
  }
}

bool misses(const Frustum& f, const BlockBounds& b) {
  double centre[3], half[3], size = 0;
  for (int k = 0; k < 3; ++k) {
    centre[k] = 0.5 * (static_cast<double>(b.low[k]) + b.high[k]);
    half[k] = 0.5 * (static_cast<double>(b.high[k]) - b.low[k]);
    size += std::fabs(centre[k]) + half[k];
  }
  const double error = f.error + f.relative_error * size;
  for (const HalfSpace& p : f.half_spaces) {
    double value = p.offset + p.reach * b.largest_scale + p.error_reach * error;
    for (int k = 0; k < 3; ++k) value += p.normal[k] * centre[k] + std::fabs(p.normal[k]) * half[k];
    if (value < 0) return true;
  }
  return false;
}

void update_bounds(const float* rows, int64_t stride, int64_t n, int64_t block, BlockBounds* bounds) {
  const int64_t first = block * kBlockRows;
  bounds[block] = bounds_of(rows + stride * first, stride, std::min<int64_t>(kBlockRows, n - first));
}

void compute_bounds(Geometry geometry, Bounds bounds, int threads) {
  const int64_t n = geometry.shape(0), blocks = bounds.shape(0);
  const float* rows = geometry.data();
  const int64_t stride = row_stride(geometry);
  BlockBounds* to = reinterpret_cast<BlockBounds*>(bounds.data());
  (void)threads;  // unused without OpenMP
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) update_bounds(rows, stride, n, block, to);
}

void compute_bounds_of(Geometry geometry, ConstIds ids, Bounds bounds, int threads) {
  const int64_t n = geometry.shape(0), count = ids.shape(0);
  const float* rows = geometry.data();
  const int64_t stride = row_stride(geometry);
  const int64_t* id = ids.data();
  BlockBounds* to = reinterpret_cast<BlockBounds*>(bounds.data());
  (void)threads;
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(dynamic, 4096) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = id[i] / kBlockRows;
    if (i == 0 || id[i - 1] / kBlockRows != block) update_bounds(rows, stride, n, block, to);  // the block's first id
  }
}

// Sets bit i of `bits` where row i may be drawn in any camera, and `chunk_ends` to the number of such rows up to each
// chunk's end. Returns their number.
int64_t mark_visible(Geometry geometry, Bounds bounds, ConstCameras cameras, Ids bits, Ids chunk_ends, int threads) {
  const int64_t n = geometry.shape(0), blocks = bounds.shape(0), chunks = chunk_ends.shape(0);
  std::vector<Frustum> frusta;
  for (size_t c = 0; c < cameras.shape(0); ++c) {
    frusta.push_back(make_frustum(reinterpret_cast<const Camera*>(cameras.data())[c]));
  }
  const float* rows = geometry.data();
  const int64_t stride = row_stride(geometry);
  const BlockBounds* block_bounds = reinterpret_cast<const BlockBounds*>(bounds.data());
  uint64_t* words = reinterpret_cast<uint64_t*>(bits.data());
  int64_t* ends = chunk_ends.data();
  const CullingKernels& kernels = best_culling_kernels();
  (void)threads;
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    int64_t visible = 0;
    for (int64_t block = chunk * kChunkBlocks; block < std::min(blocks, (chunk + 1) * kChunkBlocks); ++block) {
      uint64_t* word = words + block * kBlockTiles;
      std::fill_n(word, kBlockTiles, 0);
      for (const Frustum& frustum : frusta) {
        if (misses(frustum, block_bounds[block])) continue;
        for (int tile = 0; tile < kBlockTiles; ++tile) {
          const int64_t first = block * kBlockRows + tile * kTileRows;
          const int count = static_cast<int>(std::min<int64_t>(kTileRows, n - first));
          if (count > 0) word[tile] |= kernels.visible_rows(frustum.camera, rows + stride * first, stride, count);
        }
      }
      for (int tile = 0; tile < kBlockTiles; ++tile) visible += __builtin_popcountll(word[tile]);
    }
    ends[chunk] = visible;
  }
  for (int64_t chunk = 1; chunk < chunks; ++chunk) ends[chunk] += ends[chunk - 1];
  return chunks ? ends[chunks - 1] : 0;
}

// Writes the row numbers that mark_visible has found, ascending.
void write_marked(Ids bits, Ids chunk_ends, Ids ids, int threads) {
  const int64_t chunks = chunk_ends.shape(0), word_count = bits.shape(0);
  const uint64_t* words = reinterpret_cast<const uint64_t*>(bits.data());
  const int64_t* ends = chunk_ends.data();
  int64_t* out = ids.data();
  (void)threads;
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    int64_t* to = out + (chunk ? ends[chunk - 1] : 0);
    for (int64_t i = chunk * kChunkTiles; i < std::min(word_count, (chunk + 1) * kChunkTiles); ++i) {
      for (uint64_t rest = words[i]; rest; rest &= rest - 1) *to++ = kTileRows * i + __builtin_ctzll(rest);
    }
  }
}

// The cells of a grid over the picture that rows may draw in or near: cells[0] and cells[1] are the first and the end
// along x, cells[2] and cells[3] along y. A row that draws in no cell has its first one behind the last.
// `corners` [4, columns + 1, rows + 1] counts rows by two of these numbers: 0 and 2, 0 and 3, 1 and 2, 1 and 3.
void covered_cells(Geometry geometry, ConstIds ids, PackedCamera packed, float cell_pixels, Cells cells,
                   Corners corners, int threads) {
  const Camera& camera = *reinterpret_cast<const Camera*>(packed.data());
  const float width = camera.size[0], height = camera.size[1];
  const int64_t count = ids.shape(0), ends_x = corners.shape(1), ends_y = corners.shape(2);
  const int64_t plane = ends_x * ends_y;
  const int columns = static_cast<int>(ends_x) - 1, lines = static_cast<int>(ends_y) - 1;
  const int64_t* id = ids.data();
  const float* rows = geometry.data();
  const int64_t stride = row_stride(geometry);
  int16_t* to = cells.data();
  const CullingKernels& kernels = best_culling_kernels();
  // A NaN is in all cells, for the rasterizer to judge.
  const auto first_cell = [&](float low) { return low >= cell_pixels ? static_cast<int>(low / cell_pixels) : 0; };
  const auto end_cell = [&](float high, int end) {
    return high <= end * cell_pixels ? static_cast<int>(std::ceil(high / cell_pixels)) : end;
  };
  (void)threads;
  nb::gil_scoped_release release;
  std::fill_n(corners.data(), 4 * plane, 0);
#pragma omp parallel num_threads(threads)
  {
    std::vector<int64_t> found(4 * plane);
#pragma omp for schedule(dynamic, 64)
    for (int64_t tile = 0; tile < (count + kTileRows - 1) / kTileRows; ++tile) {
      const int64_t first = tile * kTileRows;
      const int size = static_cast<int>(std::min<int64_t>(kTileRows, count - first));
      float gathered[kTileRows * kGeometryColumns], rectangles[kTileRows][4];
      for (int i = 0; i < size; ++i) {
        std::copy_n(rows + stride * id[first + i], kGeometryColumns, gathered + kGeometryColumns * i);
      }
      kernels.picture_rectangles(camera, gathered, size, rectangles);
      for (int i = 0; i < size; ++i) {
        const float *r = rectangles[i], *x = r, *y = r + 2;
        const bool hidden = x[1] <= 0 || x[0] >= width || y[1] <= 0 || y[0] >= height;
        const int x0 = hidden ? columns : first_cell(x[0]), x1 = hidden ? 0 : end_cell(x[1], columns);
        const int y0 = hidden ? lines : first_cell(y[0]), y1 = hidden ? 0 : end_cell(y[1], lines);
        const int values[4] = {x0, x1, y0, y1};
        for (int c = 0; c < 4; ++c) to[c * count + first + i] = static_cast<int16_t>(values[c]);
        if (hidden) continue;
        ++found[x0 * ends_y + y0];
        ++found[plane + x0 * ends_y + y1];
        ++found[2 * plane + x1 * ends_y + y0];
        ++found[3 * plane + x1 * ends_y + y1];
      }
    }
#pragma omp critical
    for (int64_t i = 0; i < 4 * plane; ++i) corners.data()[i] += found[i];
  }
}

constexpr int64_t kChunkRows = 1 << 15;  // rows whose cells stay in the cache while all boxes are compared with them

// Which rows of a chunk of `cells` [4, rows] meet a box; the number of boxes that each meets is added to `met`.
inline void meet(const int16_t* cells, int64_t rows, int64_t first, int64_t count, const int32_t* box, uint8_t* meets,
                 uint8_t* met) {
  const int16_t *x0 = cells + first, *x1 = x0 + rows, *y0 = x1 + rows, *y1 = y0 + rows;
  const int16_t left = box[0], right = box[1], top = box[2], bottom = box[3];
  for (int64_t i = 0; i < count; ++i) {
    meets[i] = (x0[i] < right) & (x1[i] > left) & (y0[i] < bottom) & (y1[i] > top);
    met[i] = std::min(met[i] + meets[i], 2);
  }
}

// How many rows of each chunk meet each box, and, in the last column, how many meet several.
void count_in_boxes(ConstCells cells, Boxes boxes, Counts counts, int threads) {
  const int64_t rows = cells.shape(1), num_boxes = boxes.shape(0), chunks = counts.shape(0);
  (void)threads;
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * kChunkRows, count = std::min(kChunkRows, rows - first);
    std::vector<uint8_t> meets(count), met(count);
    int64_t* to = counts.data() + chunk * (num_boxes + 1);
    for (int64_t b = 0; b < num_boxes; ++b) {
      meet(cells.data(), rows, first, count, boxes.data() + 4 * b, meets.data(), met.data());
      to[b] = std::count(meets.begin(), meets.end(), 1);
    }
    to[num_boxes] = std::count(met.begin(), met.end(), 2);
  }
}

// Writes the rows that `count_in_boxes` has counted, from `offsets` [chunks, boxes + 1] on.
void write_in_boxes(ConstCells cells, Boxes boxes, Counts offsets, Ids out, int threads) {
  const int64_t rows = cells.shape(1), num_boxes = boxes.shape(0), chunks = offsets.shape(0);
  (void)threads;
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * kChunkRows, count = std::min(kChunkRows, rows - first);
    std::vector<uint8_t> meets(count), met(count);
    const auto write = [&](int64_t column, const std::vector<uint8_t>& chosen, uint8_t value) {
      int64_t* to = out.data() + offsets.data()[chunk * (num_boxes + 1) + column];
      for (int64_t i = 0; i < count; ++i) {
        if (chosen[i] == value) *to++ = first + i;
      }
    };
    for (int64_t b = 0; b < num_boxes; ++b) {
      meet(cells.data(), rows, first, count, boxes.data() + 4 * b, meets.data(), met.data());
      write(b, meets, 1);
    }
    write(num_boxes, met, 2);
  }
}

}  // namespace
}  // namespace offload

void bind_culling(nb::module_& module) {
  using namespace nb::literals;
  using namespace offload;
  module.attr("BLOCK_ROWS") = nb::int_(kBlockRows);
  module.attr("BLOCK_WORDS") = nb::int_(kBlockTiles);
  module.attr("CHUNK_BLOCKS") = nb::int_(kChunkBlocks);
  nb::dict fields;
#define FIELD(name) fields[#name] = nb::int_(offsetof(Camera, name) / sizeof(float));
#define FIELDS(name, count) FIELD(name)
  PACKED_CAMERA(FIELD, FIELDS)
#undef FIELD
#undef FIELDS
  module.attr("CAMERA_FIELDS") = fields;  // name: place of the first number
  module.attr("CAMERA_FLOATS") = nb::int_(kCameraFloats);
  module.attr("OPAQUE_EXTENT") = nb::float_(kOpaqueExtent);
  module.attr("POSITION_ERROR") = nb::float_(kPositionError);
  module.attr("COVARIANCE_ERROR") = nb::float_(kCovarianceError);
  module.attr("RELATIVE_ERROR") = nb::float_(kRelativeError);
  module.def("pack_cameras", pack_cameras, "viewmats"_a, "Ks"_a, "width"_a, "height"_a, "near_plane"_a, "far_plane"_a,
             "eps2d"_a, "antialiased"_a, "move_means"_a, "move_scales"_a, "move_quats"_a, "move_opacities"_a,
             "pixels"_a, "cameras"_a.noconvert());
  module.def("half_spaces", half_spaces, "cameras"_a.noconvert(), "out"_a.noconvert());
  module.def("compute_bounds", compute_bounds, "geometry"_a, "bounds"_a.noconvert(), "threads"_a);
  module.def("compute_bounds_of", compute_bounds_of, "geometry"_a, "ids"_a, "bounds"_a.noconvert(), "threads"_a);
  module.def("mark_visible", mark_visible, "geometry"_a.noconvert(), "bounds"_a.noconvert(),
             "cameras"_a.noconvert(), "bits"_a.noconvert(), "chunk_ends"_a.noconvert(), "threads"_a);
  module.def("covered_cells", covered_cells, "geometry"_a.noconvert(), "ids"_a.noconvert(), "camera"_a.noconvert(),
             "cell_pixels"_a, "cells"_a.noconvert(), "corners"_a.noconvert(), "threads"_a);
  module.attr("CHUNK_ROWS") = nb::int_(kChunkRows);
  module.def("count_in_boxes", count_in_boxes, "cells"_a.noconvert(), "boxes"_a, "counts"_a.noconvert(), "threads"_a);
  module.def("write_in_boxes", write_in_boxes, "cells"_a.noconvert(), "boxes"_a, "offsets"_a.noconvert(),
             "out"_a.noconvert(), "threads"_a);
  module.def("write_marked", write_marked, "bits"_a.noconvert(), "chunk_ends"_a.noconvert(), "ids"_a.noconvert(),
             "threads"_a);
}
