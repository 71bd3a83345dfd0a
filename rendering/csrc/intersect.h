// Which Gaussians reach which tiles of one image, nearest first.
#pragma once

#include <cstdint>
#include <vector>

namespace rendering {

// Lists for all tiles, tile after tile, row by row. Besides its Gaussian each intersection has a slot: slots are
// numbered so that those of one Gaussian are consecutive, which lets the backward pass write gradients per tile and
// then sum them per Gaussian in a fixed order, without atomics.
struct TileLists {
  std::vector<int64_t> tile_offsets;    // [n_tiles + 1]
  std::vector<int32_t> gaussian_rows;   // [n_isects]
  std::vector<int64_t> slot_ids;        // [n_isects]
  std::vector<int64_t> first_slot;      // [rows]
  std::vector<int32_t> slot_count;      // [rows]
};

template <class T>
struct ProjectedGaussians {
  int64_t count;
  const T* means2d;      // [count, 2]
  const int32_t* radii;  // [count, 2]
  const T* depths;       // [count]
  const T* conics;       // [count, 3]
  const T* opacities;    // [count]
};

// Half width and height of the box around the ellipse on which alpha falls to 1/255, in pixels.
template <class T>
void reach(const T* conic, T opacity, T* reach_x, T* reach_y);

template <class T>
TileLists intersect(const ProjectedGaussians<T>& gaussians, int width, int height, int threads);

}  // namespace rendering
