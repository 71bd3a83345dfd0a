// Python bindings: NumPy arrays in, NumPy arrays out, every function for float32 and for float64. The GIL is released
// while they work. The Python wrappers have checked that shapes agree.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "instruction_set.h"
#include "intersect.h"
#include "kernels.h"
#include "parallel.h"

namespace nb = nanobind;

namespace {

using namespace rendering;

template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <class T>
using Array = nb::ndarray<nb::numpy, T>;

constexpr int64_t kGaussiansPerTask = 4096;
constexpr int64_t kRowsPerTask = 1024;

// Memory that becomes a NumPy array without a copy.
template <class T>
struct Buffer {
  explicit Buffer(int64_t size) : data(new T[std::max<int64_t>(size, 1)]) {}
  std::unique_ptr<T[]> data;

  Array<T> release(std::initializer_list<size_t> shape) {
    T* memory = data.release();
    nb::capsule owner(memory, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return Array<T>(memory, shape, owner);
  }
};

template <class T>
std::vector<Camera<T>> read_cameras(const In<T>& viewmats, const In<T>& Ks, int width, int height) {
  std::vector<Camera<T>> cameras(viewmats.shape(0));
  for (size_t i = 0; i < cameras.size(); ++i) {
    const T *m = viewmats.data() + 16 * i, *K = Ks.data() + 9 * i;
    Camera<T>& c = cameras[i];
    for (int r = 0; r < 3; ++r) {
      for (int k = 0; k < 3; ++k) c.rotation[3 * r + k] = m[4 * r + k];
      c.translation[r] = m[4 * r + 3];
    }
    c.fx = K[0], c.fy = K[4], c.cx = K[2], c.cy = K[5];
    c.width = static_cast<T>(width), c.height = static_cast<T>(height);
  }
  return cameras;
}

template <class T>
auto project(In<T> means, In<T> quats, In<T> scales, In<T> opacities, In<T> viewmats, In<T> Ks, int width, int height,
             T near_plane, T far_plane, T radius_clip, T eps2d, bool antialiased, int threads) {
  const int64_t n = means.shape(0);
  const std::vector<Camera<T>> cameras = read_cameras(viewmats, Ks, width, height);
  const int64_t blocks = (n + kGaussiansPerTask - 1) / kGaussiansPerTask;
  std::vector<std::vector<ProjectedRow<T>>> visible(cameras.size() * blocks);
  std::vector<int64_t> starts(visible.size() + 1, 0);
  Buffer<int64_t> row_offsets(cameras.size() + 1);
  std::optional<Buffer<int64_t>> camera_ids, gaussian_ids;
  std::optional<Buffer<int32_t>> radii;
  std::optional<Buffer<T>> means2d, depths, conics, row_opacities, compensations;
  int64_t nnz = 0;
  {
    nb::gil_scoped_release release;
    const GaussianGeometry<T> geometry{means.data(), quats.data(), scales.data(), opacities.data()};
    const ProjectionSettings<T> settings{near_plane, far_plane, radius_clip, eps2d, antialiased};
    parallel_for(visible.size(), threads, [&](int64_t task) {
      const int64_t begin = task % blocks * kGaussiansPerTask, end = std::min(begin + kGaussiansPerTask, n);
      std::vector<ProjectedRow<T>>& rows = visible[task];
      rows.resize(end - begin);
      rows.resize(best_kernels<T>().project_forward(geometry, cameras[task / blocks], settings, begin, end,
                                                    rows.data()));
    });
    for (size_t task = 0; task < visible.size(); ++task) {
      starts[task + 1] = starts[task] + static_cast<int64_t>(visible[task].size());
    }
    nnz = starts.back();
    for (size_t c = 0; c <= cameras.size(); ++c) row_offsets.data[c] = starts[c * blocks];
    camera_ids.emplace(nnz), gaussian_ids.emplace(nnz), radii.emplace(2 * nnz), means2d.emplace(2 * nnz);
    depths.emplace(nnz), conics.emplace(3 * nnz), row_opacities.emplace(nnz), compensations.emplace(nnz);
    parallel_for(visible.size(), threads, [&](int64_t task) {
      int64_t to = starts[task];
      for (const ProjectedRow<T>& row : visible[task]) {
        camera_ids->data[to] = task / blocks;
        gaussian_ids->data[to] = row.gaussian_id;
        std::copy_n(row.radii, 2, &radii->data[2 * to]);
        std::copy_n(row.mean2d, 2, &means2d->data[2 * to]);
        std::copy_n(row.conic, 3, &conics->data[3 * to]);
        depths->data[to] = row.depth;
        row_opacities->data[to] = row.opacity;
        compensations->data[to] = row.compensation;
        ++to;
      }
    });
  }
  const size_t rows = nnz;
  return std::make_tuple(row_offsets.release({cameras.size() + 1}), camera_ids->release({rows}),
                         gaussian_ids->release({rows}), radii->release({rows, 2}), means2d->release({rows, 2}),
                         depths->release({rows}), conics->release({rows, 3}), row_opacities->release({rows}),
                         compensations->release({rows}));
}

// What tasks add up for one camera, each to its own part, so that the sum does not depend on the number of threads.
template <class T, int Size>
class SumOfTasks {
 public:
  explicit SumOfTasks(int64_t rows) : parts_((rows + kRowsPerTask - 1) / kRowsPerTask * Size, T(0)) {}

  // The part of the task that begins with this row.
  T* part(int64_t begin) { return parts_.data() + begin / kRowsPerTask * Size; }

  std::array<T, Size> sum() const {
    std::array<T, Size> total{};
    for (size_t i = 0; i < parts_.size(); ++i) total[i % Size] += parts_[i];
    return total;
  }

 private:
  std::vector<T> parts_;
};

template <class T>
void project_backward(In<T> means, In<T> quats, In<T> scales, In<T> opacities, In<T> viewmats, In<T> Ks, int width,
                      int height, T eps2d, In<int64_t> row_offsets, In<int64_t> gaussian_ids, In<T> conics,
                      std::optional<In<T>> compensations, In<T> v_means2d, In<T> v_depths, In<T> v_conics,
                      In<T> v_row_opacities, Out<T> v_means, Out<T> v_quats, Out<T> v_scales, Out<T> v_opacities,
                      std::optional<Out<T>> v_viewmats, int threads) {
  const std::vector<Camera<T>> cameras = read_cameras(viewmats, Ks, width, height);
  const GaussianGeometry<T> geometry{means.data(), quats.data(), scales.data(), opacities.data()};
  const ProjectionGradients<T> gradients{v_means2d.data(), v_depths.data(), v_conics.data(), v_row_opacities.data(),
                                         v_means.data(),   v_quats.data(),  v_scales.data(), v_opacities.data()};
  nb::gil_scoped_release release;
  // Cameras one after another: a Gaussian has at most one row in each, so no two threads add to the same place.
  for (size_t c = 0; c < cameras.size(); ++c) {
    const int64_t first = row_offsets.data()[c], rows = row_offsets.data()[c + 1] - first;
    SumOfTasks<T, kPoseSize> poses(v_viewmats ? rows : 0);
    parallel_ranges(rows, kRowsPerTask, threads, [&](int64_t begin, int64_t end) {
      best_kernels<T>().project_backward(geometry, cameras[c], eps2d, gaussian_ids.data(), conics.data(),
                                         compensations ? compensations->data() : nullptr, gradients, first + begin,
                                         first + end, v_viewmats ? poses.part(begin) : nullptr);
    });
    if (!v_viewmats) continue;
    const std::array<T, kPoseSize> v_pose = poses.sum();
    T* v_viewmat = v_viewmats->data() + 16 * c;  // whose last row is constant
    for (int r = 0; r < 3; ++r) {
      std::copy_n(&v_pose[3 * r], 3, v_viewmat + 4 * r);
      v_viewmat[4 * r + 3] = v_pose[9 + r];
    }
  }
}

template <class T>
void spherical_harmonics(int degree, In<T> means, In<T> camera_positions, In<T> coeffs, In<int64_t> row_offsets,
                         In<int64_t> gaussian_ids, Out<T> colors, Out<bool> clamped, int threads) {
  const int n_bases = static_cast<int>(coeffs.shape(1));
  nb::gil_scoped_release release;
  for (size_t c = 0; c < camera_positions.shape(0); ++c) {
    const int64_t first = row_offsets.data()[c], rows = row_offsets.data()[c + 1] - first;
    parallel_ranges(rows, kRowsPerTask, threads, [&](int64_t begin, int64_t end) {
      best_kernels<T>().sh_forward(degree, n_bases, means.data(), camera_positions.data() + 3 * c, coeffs.data(),
                                   gaussian_ids.data(), first + begin, first + end, colors.data(), clamped.data());
    });
  }
}

template <class T>
void spherical_harmonics_backward(int degree, In<T> means, In<T> camera_positions, In<T> coeffs,
                                  In<int64_t> row_offsets, In<int64_t> gaussian_ids, In<bool> clamped,
                                  In<T> v_colors, Out<T> v_means, Out<T> v_coeffs,
                                  std::optional<Out<T>> v_camera_positions, int threads) {
  const int n_bases = static_cast<int>(coeffs.shape(1));
  nb::gil_scoped_release release;
  for (size_t c = 0; c < camera_positions.shape(0); ++c) {  // in turn, as in project_backward
    const int64_t first = row_offsets.data()[c], rows = row_offsets.data()[c + 1] - first;
    SumOfTasks<T, 3> positions(v_camera_positions ? rows : 0);
    parallel_ranges(rows, kRowsPerTask, threads, [&](int64_t begin, int64_t end) {
      best_kernels<T>().sh_backward(degree, n_bases, means.data(), camera_positions.data() + 3 * c, coeffs.data(),
                                    gaussian_ids.data(), first + begin, first + end, clamped.data(), v_colors.data(),
                                    v_means.data(), v_coeffs.data(),
                                    v_camera_positions ? positions.part(begin) : nullptr);
    });
    if (v_camera_positions) std::copy_n(positions.sum().data(), 3, v_camera_positions->data() + 3 * c);
  }
}

// The tile lists of a batch of images; rows count from each image's first.
struct Intersections {
  int width, height;
  std::vector<int64_t> row_offsets;  // [images + 1]
  std::vector<TileLists> images;

  int64_t count() const {
    int64_t total = 0;
    for (const TileLists& lists : images) total += lists.gaussian_rows.size();
    return total;
  }
};

template <class T>
Intersections intersect_tiles(In<int64_t> row_offsets, In<T> means2d, In<int32_t> radii, In<T> depths, In<T> conics,
                              In<T> opacities, int width, int height, int threads) {
  nb::gil_scoped_release release;
  Intersections result{width, height, {row_offsets.data(), row_offsets.data() + row_offsets.shape(0)}, {}};
  for (size_t i = 0; i + 1 < row_offsets.shape(0); ++i) {
    const int64_t first = result.row_offsets[i];
    result.images.push_back(intersect<T>({result.row_offsets[i + 1] - first, means2d.data() + 2 * first,
                                          radii.data() + 2 * first, depths.data() + first, conics.data() + 3 * first,
                                          opacities.data() + first},
                                         width, height, threads));
  }
  return result;
}

template <class T>
std::vector<Splat<T>> gather_splats(const In<T>& means2d, const In<T>& conics, const In<T>& colors,
                                    const In<T>& opacities, int threads) {
  const int64_t channels = colors.shape(1);
  std::vector<Splat<T>> splats(means2d.shape(0));
  parallel_ranges(splats.size(), kRowsPerTask, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Splat<T>& s = splats[i];
      s.x = means2d.data()[2 * i];
      s.y = means2d.data()[2 * i + 1];
      std::copy_n(conics.data() + 3 * i, 3, s.conic);
      s.opacity = opacities.data()[i];
      reach(s.conic, s.opacity, &s.reach_x, &s.reach_y);
      std::copy_n(colors.data() + channels * i, channels, s.color);
    }
  });
  return splats;
}

// Calls body(image, tile's index, its frame) for every tile of every image.
template <class Body>
void for_each_tile(const Intersections& intersections, int threads, const Body& body) {
  const int width = intersections.width, height = intersections.height;
  const int tiles_x = (width + kTileSize - 1) / kTileSize, tiles_y = (height + kTileSize - 1) / kTileSize;
  const int64_t n_tiles = static_cast<int64_t>(tiles_x) * tiles_y;
  parallel_for(n_tiles * intersections.images.size(), threads, [&](int64_t task) {
    const int64_t tile = task % n_tiles;
    const int x0 = static_cast<int>(tile % tiles_x) * kTileSize, y0 = static_cast<int>(tile / tiles_x) * kTileSize;
    body(task / n_tiles, tile,
         TileFrame{x0, y0, std::min(kTileSize, width - x0), std::min(kTileSize, height - y0), width});
  });
}

template <class T>
void blend(const Intersections& intersections, In<T> means2d, In<T> conics, In<T> colors, In<T> opacities,
           std::optional<In<T>> backgrounds, Out<T> render_colors, Out<T> render_alphas, int threads) {
  nb::gil_scoped_release release;
  const int64_t channels = colors.shape(1);
  const int64_t pixels = static_cast<int64_t>(intersections.width) * intersections.height;
  const std::vector<Splat<T>> splats = gather_splats(means2d, conics, colors, opacities, threads);
  const auto kernel = best_kernels<T>().blend_forward[channels - 1];
  for_each_tile(intersections, threads, [&](int64_t image, int64_t tile, const TileFrame& frame) {
    const TileLists& lists = intersections.images[image];
    const int64_t begin = lists.tile_offsets[tile], count = lists.tile_offsets[tile + 1] - begin;
    kernel(splats.data() + intersections.row_offsets[image], lists.gaussian_rows.data() + begin, count, frame,
           {backgrounds ? backgrounds->data() + image * channels : nullptr,
            render_colors.data() + image * pixels * channels, render_alphas.data() + image * pixels});
  });
}

template <class T>
void blend_backward(const Intersections& intersections, In<T> means2d, In<T> conics, In<T> colors, In<T> opacities,
                    In<T> render_colors, In<T> render_alphas, In<T> v_render_colors, In<T> v_render_alphas,
                    Out<T> v_means2d, Out<T> v_conics, Out<T> v_colors, Out<T> v_opacities,
                    std::optional<Out<T>> v_means2d_abs, int threads) {
  nb::gil_scoped_release release;
  const int64_t channels = colors.shape(1);
  const int64_t pixels = static_cast<int64_t>(intersections.width) * intersections.height;
  const std::vector<Splat<T>> splats = gather_splats(means2d, conics, colors, opacities, threads);
  const auto kernel = best_kernels<T>().blend_backward[channels - 1];
  std::vector<int64_t> slot_offsets;  // of each image
  int64_t n_slots = 0;
  for (const TileLists& lists : intersections.images) {
    slot_offsets.push_back(n_slots);
    n_slots += lists.tile_offsets.back();
  }
  // Not initialized: every intersection's slot is written by its tile.
  const std::unique_ptr<T[]> slots(new T[n_slots * kSlotSize]);
  for_each_tile(intersections, threads, [&](int64_t image, int64_t tile, const TileFrame& frame) {
    const TileLists& lists = intersections.images[image];
    const int64_t begin = lists.tile_offsets[tile], count = lists.tile_offsets[tile + 1] - begin;
    kernel(splats.data() + intersections.row_offsets[image], lists.gaussian_rows.data() + begin, count, frame,
           {render_colors.data() + image * pixels * channels, render_alphas.data() + image * pixels,
            v_render_colors.data() + image * pixels * channels, v_render_alphas.data() + image * pixels,
            lists.slot_ids.data() + begin, slots.get() + slot_offsets[image] * kSlotSize},
           v_means2d_abs.has_value());
  });
  for (size_t image = 0; image < intersections.images.size(); ++image) {
    const TileLists& lists = intersections.images[image];
    const int64_t first_row = intersections.row_offsets[image];
    parallel_ranges(lists.first_slot.size(), kRowsPerTask, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* slot = slots.get() + (slot_offsets[image] + lists.first_slot[i]) * kSlotSize;
        T sum[kSlotSize] = {};
        for (int32_t tile = 0; tile < lists.slot_count[i]; ++tile, slot += kSlotSize) {
          for (int k = 0; k < kSlotSize; ++k) sum[k] += slot[k];
        }
        const int64_t row = first_row + i;
        std::copy_n(sum + kSlotColor, channels, v_colors.data() + row * channels);
        v_opacities.data()[row] = sum[kSlotOpacity];
        std::copy_n(sum + kSlotConic, 3, v_conics.data() + 3 * row);
        std::copy_n(sum + kSlotMean, 2, v_means2d.data() + 2 * row);
        if (v_means2d_abs) std::copy_n(sum + kSlotAbsMean, 2, v_means2d_abs->data() + 2 * row);
      }
    });
  }
}

template <class T>
void bind(nb::module_& m) {
  m.def("project", &project<T>);
  m.def("project_backward", &project_backward<T>);
  m.def("spherical_harmonics", &spherical_harmonics<T>);
  m.def("spherical_harmonics_backward", &spherical_harmonics_backward<T>);
  m.def("intersect_tiles", &intersect_tiles<T>);
  m.def("blend", &blend<T>);
  m.def("blend_backward", &blend_backward<T>);
}

}  // namespace

NB_MODULE(rendering, m) {
  nb::set_leak_warnings(false);  // a script may end while it still holds an image's graph
  m.doc() = "CPU rasterizer: projection, spherical harmonics, tile intersection and blending.";
  m.attr("INSTRUCTION_SET") = best_instruction_set_name();
  m.attr("SOURCE_HASH") = SOURCE_HASH;
  m.attr("MAX_CHANNELS") = kMaxChannels;
  m.attr("MAX_SH_DEGREE") = 3;
  m.attr("TILE_SIZE") = kTileSize;
  nb::class_<Intersections>(m, "Intersections").def_prop_ro("count", &Intersections::count);
  bind<float>(m);
  bind<double>(m);
}
