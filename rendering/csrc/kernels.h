// The inner loops of the CPU rasterizer, as tables of functions. kernels.cpp is compiled once per instruction set
// and best_kernels() picks the table that this machine can run.
#pragma once

#include <cstdint>

namespace rendering {

constexpr int kTileSize = 16;                          // pixels, width and height, as in gsplat
constexpr int kTilePixels = kTileSize * kTileSize;
constexpr int kMaxChannels = 4;                        // colour channels blended in one pass
constexpr int kSlotSize = kMaxChannels + 8;            // see Slot below
constexpr int kMaxShBases = 16;                        // spherical harmonics up to degree 3

// A pinhole camera: world-to-camera rotation (row-major) and translation, intrinsics and image size in pixels.
template <class T>
struct Camera {
  T rotation[9], translation[3];
  T fx, fy, cx, cy;
  T width, height;
};

template <class T>
struct ProjectionSettings {
  T near_plane, far_plane, radius_clip, eps2d;
  bool antialiased;
};

template <class T>
struct GaussianGeometry {
  const T* means;      // [N, 3]
  const T* quats;      // [N, 4] w x y z, of any length
  const T* scales;     // [N, 3]
  const T* opacities;  // [N]
};

// What the camera sees of one Gaussian.
template <class T>
struct ProjectedRow {
  int64_t gaussian_id;
  int32_t radii[2];  // pixels
  T mean2d[2], depth, conic[3];
  T opacity, compensation;  // opacity includes the compensation, which is 1 unless antialiased
};

// Gradients that arrive at projected rows, and the dense gradients they are added to.
template <class T>
struct ProjectionGradients {
  const T *v_means2d, *v_depths, *v_conics, *v_row_opacities;  // [nnz, 2] [nnz] [nnz, 3] [nnz]
  T *v_means, *v_quats, *v_scales, *v_opacities;               // [N, 3] [N, 4] [N, 3] [N]
};

constexpr int kPoseSize = 12;  // a camera's rotation, row-major, and its translation

// One Gaussian as the blending loop reads it: one or two cache lines.
template <class T>
struct Splat {
  T x, y;              // centre, pixels
  T conic[3];
  T opacity;
  T reach_x, reach_y;  // pixels from the centre beyond which alpha is below 1/255
  T color[kMaxChannels];
};

// A Gaussian's gradient from one tile: colour [0, 4), opacity 4, conic [5, 8), mean [8, 10), |mean| [10, 12).
enum Slot { kSlotColor = 0, kSlotOpacity = kMaxChannels, kSlotConic, kSlotMean = kSlotConic + 3, kSlotAbsMean = kSlotMean + 2 };

// The pixels of one tile inside an image. Pointers are to the image's first pixel.
struct TileFrame {
  int x0, y0;          // first pixel
  int columns, rows;   // pixels inside the image, at most kTileSize
  int image_width;
};

template <class T>
struct TileForward {
  const T* background;  // [channels] or null
  T* colors;            // [H, W, channels]
  T* alphas;            // [H, W]
};

template <class T>
struct TileBackward {
  const T *colors, *alphas;      // what the forward pass wrote
  const T *v_colors, *v_alphas;  // their gradients
  const int64_t* slot_ids;       // for each Gaussian of the tile, where its gradient goes
  T* slots;                      // [n_isects, kSlotSize]
};

template <class T>
struct Kernels {
  // Appends the visible ones of Gaussians [begin, end) to rows; returns how many.
  int64_t (*project_forward)(const GaussianGeometry<T>&, const Camera<T>&, const ProjectionSettings<T>&,
                             int64_t begin, int64_t end, ProjectedRow<T>* rows);
  // Rows [begin, end) must name distinct Gaussians. Compensations are null unless antialiased. The gradient of the
  // camera's pose is added to v_pose [kPoseSize], or v_pose is null.
  void (*project_backward)(const GaussianGeometry<T>&, const Camera<T>&, T eps2d, const int64_t* gaussian_ids,
                           const T* conics, const T* compensations, const ProjectionGradients<T>&, int64_t begin,
                           int64_t end, T* v_pose);
  // Colours are 0.5 above the harmonics and cut at zero; clamped [nnz, 3] tells where they were cut by more than rounding.
  void (*sh_forward)(int degree, int n_bases, const T* means, const T* camera_position, const T* coeffs,
                     const int64_t* gaussian_ids, int64_t begin, int64_t end, T* colors, bool* clamped);
  // The gradient of the camera's position is added to v_camera_position [3], or that is null.
  void (*sh_backward)(int degree, int n_bases, const T* means, const T* camera_position, const T* coeffs,
                      const int64_t* gaussian_ids, int64_t begin, int64_t end, const bool* clamped, const T* v_colors,
                      T* v_means, T* v_coeffs, T* v_camera_position);
  // By number of channels - 1. Gaussians come nearest first.
  void (*blend_forward[kMaxChannels])(const Splat<T>*, const int32_t* ids, int64_t count, const TileFrame&,
                                      const TileForward<T>&);
  void (*blend_backward[kMaxChannels])(const Splat<T>*, const int32_t* ids, int64_t count, const TileFrame&,
                                       const TileBackward<T>&, bool absgrad);
};

template <class T>
const Kernels<T>& best_kernels();

}  // namespace rendering
