// What culling.cpp and the builds of culling_kernels.cpp share.
#pragma once

#include <cstdint>

namespace offload {

// A row of the geometry region: log scales and logit opacities, as stored.
constexpr int kMeans = 0, kScales = 3, kQuats = 6, kOpacities = 10, kGeometryColumns = 12;

constexpr int kTileRows = 64;    // rows that are tested together; their results are the bits of one word
constexpr int kBlockRows = 256;  // consecutive rows that share bounds
constexpr int kBlockTiles = kBlockRows / kTileRows;

constexpr float kOpaqueExtent = 3.33f;  // standard deviations at which opacity 1 has fallen to 1/255

// What the float operations of the rasterizer and of culling may be off.
constexpr float kPositionError = 5e-7f;    // of camera-space coordinates, relative to the summands
constexpr float kCovarianceError = 1e-6f;  // of image covariances, relative to the largest they could be
constexpr float kRelativeError = 1e-5f;    // of everything else

// A camera together with how far the geometry may have moved since it was stored, packed: these floats, one after
// another. This list is the only one: C++ reads them as the struct Camera, and Python knows their places by these
// names (native.CAMERA_FIELDS), for torch and for Triton's kernels.
#define PACKED_CAMERA(number, numbers)                                                                              \
  numbers(rotation, 9)          /* world to camera, row by row */                                                   \
  numbers(translation, 3)       /* world to camera */                                                               \
  number(largest_translation)   /* the largest absolute value of these */                                           \
  numbers(focal, 2)             /* pixels, along x and along y, like all pairs */                                   \
  numbers(centre, 2)            /* pixels */                                                                        \
  numbers(size, 2)              /* pixels */                                                                        \
  numbers(slope_low, 2)         /* x/z and y/z at which the Jacobian of the projection is cut */                    \
  numbers(slope_high, 2)        /* the same */                                                                      \
  number(near_plane)            /* world units */                                                                   \
  number(far_plane)             /* world units */                                                                   \
  numbers(reach, 2)             /* image-plane units per world unit of the largest scale, times depth */            \
  numbers(error_reach, 2)       /* the same per world unit of the centre's error */                                 \
  number(blur_reach)            /* pixels that eps2d, rounding up and the margin add to every radius at most */     \
  number(eps2d)                 /* pixels^2 */                                                                      \
  number(move)                  /* world units, length */                                                           \
  number(turn)                  /* length of the change of a stored quaternion */                                   \
  number(growth)                /* factor on scales */                                                              \
  number(logit_gain)            /* added to logit opacities */                                                      \
  number(extra_pixels)          /* added to radii */                                                                \
  number(antialiased)           /* 1 or 0 */                                                                        \
  numbers(unused, 3)            /* so that every camera begins at a multiple of 16 bytes */

struct Camera {
#define MEMBER(name) float name;
#define MEMBERS(name, count) float name[count];
  PACKED_CAMERA(MEMBER, MEMBERS)
#undef MEMBER
#undef MEMBERS
};

constexpr int kCameraFloats = sizeof(Camera) / sizeof(float);
static_assert(sizeof(Camera) % 16 == 0);

struct CullingKernels {
  // Bit i of the result: row i of `rows` [count <= 64, 12], which lie `stride` floats apart, may be drawn.
  uint64_t (*visible_rows)(const Camera& camera, const float* rows, int64_t stride, int count);
  // Where each row may be drawn: low and high x, low and high y in pixels; high x is -infinity where it is not drawn.
  void (*picture_rectangles)(const Camera& camera, const float* rows, int count, float (*rectangles)[4]);
};

const CullingKernels& culling_kernels();

}  // namespace offload
