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

// A camera together with how far the geometry may have moved since it was stored.
struct View {
  float rotation[9], translation[3];  // world to camera
  float fx, fy, cx, cy;               // pixels
  float width, height;                // pixels
  float near_plane, far_plane;
  float slope_low[2], slope_high[2];  // x/z and y/z at which the Jacobian of the projection is cut
  float reach[2];                     // image-plane units per world unit of the largest scale, times depth
  float blur_reach;                   // pixels that eps2d, rounding up and the margin add to every radius at most
  float error_reach[2];               // the same per world unit of the centre's error
  float eps2d;                        // pixels^2
  float move;                         // world units, length
  float turn;                         // length of the change of a stored quaternion
  float growth;                       // factor on scales
  float logit_gain;                   // added to logit opacities
  float extra_pixels;                 // added to radii
  bool antialiased;
};

struct CullingKernels {
  // Bit i of the result: row i of `rows` [count <= 64, 12], which lie `stride` floats apart, may be drawn.
  uint64_t (*visible_rows)(const View& view, const float* rows, int64_t stride, int count);
  // Where each row may be drawn: low and high x, low and high y in pixels; high x is -infinity where it is not drawn.
  void (*picture_rectangles)(const View& view, const float* rows, int count, float (*rectangles)[4]);
};

const CullingKernels& culling_kernels();

}  // namespace offload
