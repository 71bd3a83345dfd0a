#include "intersect.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "parallel.h"

namespace rendering {

namespace {

// Slack on sigma, for rounding: an intersection too many costs time, one too few changes the image.
constexpr double kSigmaSlack = 0.01;

// The ellipse on which alpha = 1/255, relative to its centre: xx x^2 + 2 xy x y + yy y^2 = level.
struct Ellipse {
  double xx, xy, yy, level;
  double reach_x = std::numeric_limits<double>::infinity(), reach_y = reach_x;
  bool exact;  // false where rounding has made the conic useless: then the ellipse counts as the whole plane

  template <class T>
  Ellipse(const T* conic, T opacity) : xx(conic[0]), xy(conic[1]), yy(conic[2]) {
    level = 2 * (std::log(255 * static_cast<double>(opacity)) + kSigmaSlack);
    const double determinant = xx * yy - xy * xy;
    exact = level > 0 && determinant > 1e-9 * xx * yy;
    if (exact) {
      reach_x = std::sqrt(level * yy / determinant);
      reach_y = std::sqrt(level * xx / determinant);
    }
  }

  // Range of x inside the ellipse where y is in [low, high]; false if there is none.
  bool span(double low, double high, double* left, double* right) const {
    low = std::max(low, -reach_y);
    high = std::min(high, reach_y);
    if (!(low <= high)) return false;
    *left = -reach_x;
    *right = reach_x;
    if (!exact) return true;
    // The ellipse is widest at y = widest on the right and -widest on the left, and narrows above and below.
    const double widest = -xy / yy * reach_x;
    const auto half_chord = [&](double y) {
      return std::sqrt(std::max(0.0, xy * xy * y * y - xx * (yy * y * y - level))) / xx;
    };
    if (widest < low || widest > high) {
      const double y = widest < low ? low : high;
      *right = -xy / xx * y + half_chord(y);
    }
    if (-widest < low || -widest > high) {
      const double y = -widest < low ? low : high;
      *left = -xy / xx * y - half_chord(y);
    }
    return true;
  }
};

int clamp_index(double value, int count) {
  return value > 0 ? (value < count ? static_cast<int>(value) : count) : 0;
}

// Rows by increasing depth; equal depths keep their order. Depths behind the near plane 0 sort by their bits, as in
// gsplat. Doubles sort by their float value.
template <class T>
std::vector<int32_t> sort_by_depth(const ProjectedGaussians<T>& g) {
  struct Entry {
    uint32_t key;
    int32_t row;
  };
  std::vector<Entry> entries(g.count), sorted(g.count);
  for (int64_t i = 0; i < g.count; ++i) {
    const float depth = static_cast<float>(g.depths[i]);
    std::memcpy(&entries[i].key, &depth, sizeof depth);
    entries[i].row = static_cast<int32_t>(i);
  }
  constexpr int bits = 11, buckets = 1 << bits;
  for (int shift = 0; shift < 32; shift += bits) {
    int64_t starts[buckets + 1] = {};
    for (const Entry& e : entries) ++starts[((e.key >> shift) & (buckets - 1)) + 1];
    for (int b = 0; b < buckets; ++b) starts[b + 1] += starts[b];
    for (const Entry& e : entries) sorted[starts[(e.key >> shift) & (buckets - 1)]++] = e;
    entries.swap(sorted);
  }
  std::vector<int32_t> order(g.count);
  for (int64_t i = 0; i < g.count; ++i) order[i] = entries[i].row;
  return order;
}

struct Intersection {
  int32_t tile, row;
};

// Calls emit(tile) for each tile inside gsplat's rectangle of radii that the ellipse reaches.
template <class T, class Emit>
void visit_tiles(const ProjectedGaussians<T>& g, int64_t row, int tiles_x, int tiles_y, Emit emit) {
  const double x = g.means2d[2 * row], y = g.means2d[2 * row + 1];
  const Ellipse ellipse(g.conics + 3 * row, g.opacities[row]);
  const double radius_x = std::min<double>(g.radii[2 * row], ellipse.reach_x);
  const double radius_y = std::min<double>(g.radii[2 * row + 1], ellipse.reach_y);
  const int first_y = clamp_index(std::floor((y - radius_y) / kTileSize), tiles_y);
  const int last_y = clamp_index(std::ceil((y + radius_y) / kTileSize), tiles_y);
  for (int ty = first_y; ty < last_y; ++ty) {
    double left, right;
    const double top = ty * kTileSize - y;
    // Pixel centres lie at least half a pixel inside the tile's border.
    if (!ellipse.span(top + 0.5, top + kTileSize - 0.5, &left, &right)) continue;
    const int first_x = clamp_index(std::floor((x + std::max(left, -radius_x) + 0.5) / kTileSize), tiles_x);
    const int last_x = clamp_index(std::ceil((x + std::min(right, radius_x) - 0.5) / kTileSize), tiles_x);
    for (int tx = first_x; tx < last_x; ++tx) emit(ty * tiles_x + tx);
  }
}

}  // namespace

template <class T>
void reach(const T* conic, T opacity, T* reach_x, T* reach_y) {
  const Ellipse ellipse(conic, opacity);
  *reach_x = static_cast<T>(ellipse.reach_x);
  *reach_y = static_cast<T>(ellipse.reach_y);
}

template <class T>
TileLists intersect(const ProjectedGaussians<T>& g, int width, int height, int threads) {
  const int tiles_x = (width + kTileSize - 1) / kTileSize, tiles_y = (height + kTileSize - 1) / kTileSize;
  const int64_t n_tiles = static_cast<int64_t>(tiles_x) * tiles_y;
  const std::vector<int32_t> order = sort_by_depth(g);
  TileLists lists;
  lists.first_slot.resize(g.count);
  lists.slot_count.resize(g.count);

  // Each part takes a run of the depth order, so the parts' lists joined are the whole list: how many parts there are
  // changes nothing. starts[part][tile] first counts, then tells where the part's next entry of that tile goes.
  const int parts = std::max(1, threads);
  std::vector<std::vector<Intersection>> emitted(parts);
  std::vector<std::vector<int64_t>> starts(parts, std::vector<int64_t>(n_tiles, 0));
  parallel_for(parts, threads, [&](int64_t part) {
    const int64_t end = g.count * (part + 1) / parts;
    for (int64_t i = g.count * part / parts; i < end; ++i) {
      const int32_t row = order[i];
      const size_t before = emitted[part].size();
      visit_tiles(g, row, tiles_x, tiles_y, [&](int tile) {
        emitted[part].push_back({tile, row});
        ++starts[part][tile];
      });
      lists.first_slot[row] = static_cast<int64_t>(before);  // the part's first slot is added below
      lists.slot_count[row] = static_cast<int32_t>(emitted[part].size() - before);
    }
  });

  lists.tile_offsets.resize(n_tiles + 1);
  int64_t total = 0;
  for (int64_t tile = 0; tile < n_tiles; ++tile) {
    lists.tile_offsets[tile] = total;
    for (int part = 0; part < parts; ++part) {
      const int64_t count = starts[part][tile];
      starts[part][tile] = total;
      total += count;
    }
  }
  lists.tile_offsets[n_tiles] = total;
  std::vector<int64_t> part_slot(parts, 0);
  for (int part = 1; part < parts; ++part) {
    part_slot[part] = part_slot[part - 1] + static_cast<int64_t>(emitted[part - 1].size());
  }
  lists.gaussian_rows.resize(total);
  lists.slot_ids.resize(total);
  parallel_for(parts, threads, [&](int64_t part) {
    const int64_t end = g.count * (part + 1) / parts;
    for (int64_t i = g.count * part / parts; i < end; ++i) lists.first_slot[order[i]] += part_slot[part];
    int64_t slot = part_slot[part];
    for (const Intersection& e : emitted[part]) {
      const int64_t target = starts[part][e.tile]++;
      lists.gaussian_rows[target] = e.row;
      lists.slot_ids[target] = slot++;
    }
  });
  return lists;
}

template void reach(const float*, float, float*, float*);
template void reach(const double*, double, double*, double*);
template TileLists intersect(const ProjectedGaussians<float>&, int, int, int);
template TileLists intersect(const ProjectedGaussians<double>&, int, int, int);

}  // namespace rendering
