// The test of single Gaussians, compiled once per instruction set (KERNEL_ISA), on several Gaussians at once, one per
// lane.
//
// A Gaussian is drawn where gsplat's projection keeps it: depth between the planes, opacity (with the compensation of
// Mip-Splatting when antialiased) at least 1/255, and a rectangle around its centre that meets the picture, of radii
// ceil(extent sigma). extent = min(3.33, sqrt(2 ln(255 opacity))) (Radl et al. 2024, StopThePop, B.2) and sigma^2 is
// the diagonal of the image covariance J W Q S (J W Q S)^T + eps2d (Zwicker et al. 2001). For what may be drawn,
// every quantity is replaced by its bound over all geometry within the margins and over float rounding. Tests reject,
// never accept, so that a NaN is kept for the rasterizer to judge.
#include "culling_kernels.h"

#include <cmath>
#include <cstring>

#include "lanes.h"

namespace offload {
namespace KERNEL_ISA {
namespace {

constexpr float kLogitThreshold = -5.5373343f - kRelativeError;  // logit of 1/255

using Floats = Lanes<float>;
using Ints = LaneTypes<float>::Ints;  // comparisons give -1 where true, 0 where false
constexpr int kWidth = kLanes<float>;

inline Floats magnitude(Floats a) { return maximum(a, -a); }
inline Floats clamp(Floats v, float low, float high) { return minimum(maximum(v, broadcast(low)), broadcast(high)); }
inline Floats at_least(Floats v, float low) { return maximum(v, broadcast(low)); }
inline Floats root(Floats v) { return square_root<float>(v); }

// e^x, relative error 1e-6, for x cut to -87 .. 88.
inline Floats exponential(Floats x_in) {
  const Floats x = clamp(x_in, -87.0f, 88.0f);
  const Ints exponent = __builtin_convertvector(x * 1.442695041f + 127.5f, Ints);  // biased: truncation rounds
  const Floats whole = __builtin_convertvector(exponent - 127, Floats);
  const Floats f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  Floats p = broadcast(1.0f / 720);                                      // Taylor series on -0.35 .. 0.35
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return p * (Floats)(exponent << 23);
}

// ln x of positive normal numbers, absolute error 1e-6.
inline Floats logarithm(Floats x) {
  constexpr int32_t kRootHalf = 0x3f3504f3;  // the bits of sqrt(1/2): mantissas are taken from there to sqrt(2)
  const Ints bits = (Ints)x - kRootHalf;
  const Floats m = (Floats)((bits & 0x7fffff) + kRootHalf);
  const Floats s = (m - 1.0f) / (m + 1.0f), s2 = s * s;  // ln m = 2 artanh s, |s| <= 0.172
  Floats p = broadcast(2.0f / 7);
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  p = p * s2 + 2.0f;
  return p * s + __builtin_convertvector(bits >> 23, Floats) * 0.693147181f;
}

inline bool any(Ints condition) {
  int32_t found = 0;
  for (int i = 0; i < kWidth; ++i) found |= condition[i];
  return found;
}

// Neighbouring columns of consecutive rows, one row per lane; `from` points at the first row's first of them.
template <int columns>
inline void load_rows(const float* from, int64_t stride, int count, Floats (&to)[columns]) {
  float transposed[columns][kWidth];
  for (int lane = 0; lane < kWidth; ++lane) {
    const float* row = from + stride * (lane < count ? lane : 0);  // idle lanes repeat the first row
    for (int c = 0; c < columns; ++c) transposed[c][lane] = row[c];
  }
  std::memcpy(to, transposed, sizeof transposed);
}

struct Position {
  Floats x, y, z;  // camera space
  Floats error;    // how far from there it may be
};

inline Position camera_position(const Camera& camera, const Floats (&mean)[3]) {
  const float *W = camera.rotation, *t = camera.translation;
  const Floats sum = magnitude(mean[0]) + magnitude(mean[1]) + magnitude(mean[2]) + camera.largest_translation;
  Floats p[3];
  for (int r = 0; r < 3; ++r) p[r] = W[3 * r] * mean[0] + W[3 * r + 1] * mean[1] + W[3 * r + 2] * mean[2] + t[r];
  return {p[0], p[1], p[2], camera.move + kPositionError * sum};
}

// What can be said without the rotation: a ball of the largest scale that misses the picture is hidden, and a centre
// inside the picture is drawn, unless the compensation makes it too faint.
struct Decision {
  Ints hidden, drawn;
};

inline Decision decide(const Camera& camera, const Floats (&mean)[3], const Floats (&log_scales)[3], Floats logit) {
  const Position p = camera_position(camera, mean);
  const Floats scale = exponential(maximum(log_scales[0], maximum(log_scales[1], log_scales[2])));
  const Floats z = at_least(p.z, camera.near_plane);
  const Floats x = camera.focal[0] * p.x, y = camera.focal[1] * p.y;
  // Pixels times depth from the four borders of the picture, positive inside.
  const Floats left = x + camera.centre[0] * z, right = (camera.size[0] - camera.centre[0]) * z - x;
  const Floats top = y + camera.centre[1] * z, bottom = (camera.size[1] - camera.centre[1]) * z - y;
  const Floats reach_x = camera.reach[0] * scale + camera.blur_reach * z + camera.error_reach[0] * p.error;
  const Floats reach_y = camera.reach[1] * scale + camera.blur_reach * z + camera.error_reach[1] * p.error;
  const Ints hidden = (p.z < camera.near_plane - p.error) | (p.z > camera.far_plane + p.error) |
                      (logit < broadcast(kLogitThreshold - camera.logit_gain)) | (left + reach_x <= 0.0f) |
                      (right + reach_x <= 0.0f) | (top + reach_y <= 0.0f) | (bottom + reach_y <= 0.0f);
  const Ints inside = (left > 0.0f) & (right > 0.0f) & (top > 0.0f) & (bottom > 0.0f);
  return {hidden, camera.antialiased ? Ints{} : inside & ~hidden};
}

// One row of the projection's Jacobian in units of f/z, (1, -slope): its length, and how much it may change.
struct JacobianRow {
  Floats slope, length, change;
};

inline JacobianRow jacobian_row(const Camera& camera, int axis, Floats raw_slope, Floats relative_move) {
  const float low = camera.slope_low[axis], high = camera.slope_high[axis];
  const Floats slope = clamp(raw_slope, low, high);
  const Floats slope_change = minimum(relative_move * (1.0f + magnitude(raw_slope)), broadcast(high - low));
  return {slope, root(1.0f + slope * slope),
          relative_move * (1.0f + magnitude(slope)) + (1.0f + relative_move) * slope_change};
}

// A row of J W Q S in pixels, and what follows from it.
struct Extent {
  Floats row[3];
  Floats variance;  // its length squared
  Floats error;     // of the variance, by rounding
  Floats change;    // how much the length may grow when the centre moves and the axes turn
};

inline Extent image_extent(const Camera& camera, int axis, const JacobianRow& j, Floats inverse_z,
                           const Floats (&Q)[3][3], const Floats (&scales)[3], Floats turn) {
  const float* W = camera.rotation;
  const Floats focal = camera.focal[axis] * inverse_z;
  Extent e;
  Floats jw[3], norm2 = {};
  for (int k = 0; k < 3; ++k) jw[k] = W[3 * axis + k] - j.slope * W[6 + k];
  e.variance = Floats{};
  for (int k = 0; k < 3; ++k) {
    e.row[k] = focal * scales[k] * (jw[0] * Q[0][k] + jw[1] * Q[1][k] + jw[2] * Q[2][k]);
    e.variance += e.row[k] * e.row[k];
    norm2 += scales[k] * scales[k];
  }
  const Floats largest_scale = maximum(scales[0], maximum(scales[1], scales[2]));
  e.error = kCovarianceError * focal * focal * j.length * j.length * norm2;
  e.change = largest_scale * focal * (j.change + (j.length + j.change) * turn);
  return e;
}

// The largest compensation sqrt(det(cov) / det(cov + eps2d I)): with the determinant d of cov it is
// d / (d + eps2d trace + eps2d^2), which grows with d and shrinks with the trace.
inline Floats largest_compensation(const Camera& camera, const Extent& x, const Extent& y) {
  const Floats length_x = root(x.variance), length_y = root(y.variance);
  const Floats xy = x.row[0] * y.row[0] + x.row[1] * y.row[1] + x.row[2] * y.row[2];
  const Floats area = root(at_least(x.variance * y.variance - xy * xy, 0.0f)) + x.change * length_y +
                      y.change * length_x + x.change * y.change;
  const Floats grown = camera.growth * camera.growth * area;
  const Floats low_x = at_least(length_x - x.change, 0.0f) / camera.growth;
  const Floats low_y = at_least(length_y - y.change, 0.0f) / camera.growth;
  const Floats error = 2.0f * (x.error * y.variance + y.error * x.variance) + x.error * y.error +
                       1e-6f * x.variance * y.variance;
  const Floats determinant = grown * grown + error;
  const Floats blur = camera.eps2d * (low_x * low_x + low_y * low_y) + camera.eps2d * camera.eps2d;
  return root(determinant / at_least(determinant + blur - 2.0f * error, 1e-30f));
}

// Where the rectangle of an axis lies in the picture, in pixels.
struct Interval {
  Floats low, high;
};

inline Interval interval(const Camera& camera, int axis, Floats slope, const Extent& e, Floats extent,
                         Floats relative_move) {
  const float focal = camera.focal[axis], centre = camera.centre[axis], size = camera.size[axis];
  const Floats sigma = camera.growth * (root(e.variance + e.error) + e.change);
  const Floats radius = extent * root(sigma * sigma + camera.eps2d);
  // ceil(r) as floor(r) + 1, which vectorizes everywhere.
  const Ints floor = __builtin_convertvector(minimum(radius + 1e-4f, broadcast(1e9f)), Ints);
  const Floats offset = focal * slope;
  const Floats half = __builtin_convertvector(floor + 1, Floats) + camera.extra_pixels +
                      kRelativeError * (radius + magnitude(offset)) +
                      focal * relative_move * (1.0f + magnitude(slope)) + 1e-6f * (std::fabs(centre) + size);
  return {offset + centre - half, offset + centre + half};
}

struct Rectangle {
  Interval x, y;
  Ints hidden;  // drawn nowhere
};

inline Rectangle rectangle(const Camera& camera, const Floats (&mean)[3], const Floats (&log_scales)[3],
                           const Floats (&quat)[4], Floats logit) {
  const Position p = camera_position(camera, mean);
  // Of the positions within the error only those behind the near plane can be drawn.
  const Floats z = at_least(p.z, camera.near_plane), nearest = at_least(z - p.error, camera.near_plane);
  const Floats inverse_z = 1.0f / z, relative_move = p.error / nearest;
  const Floats slope_x = p.x * inverse_z, slope_y = p.y * inverse_z;

  const Floats norm2 = quat[0] * quat[0] + quat[1] * quat[1] + quat[2] * quat[2] + quat[3] * quat[3];
  const Ints nonzero = norm2 >= 1.17549435e-38f;  // a quaternion of length zero counts as the identity
  const Floats inverse_norm = nonzero ? 1.0f / root(norm2) : broadcast(0.0f);
  const Floats w = nonzero ? quat[0] * inverse_norm : broadcast(1.0f);
  const Floats i = quat[1] * inverse_norm, j = quat[2] * inverse_norm, k = quat[3] * inverse_norm;
  const Floats Q[3][3] = {{1.0f - 2.0f * (j * j + k * k), 2.0f * (i * j - w * k), 2.0f * (i * k + w * j)},
                          {2.0f * (i * j + w * k), 1.0f - 2.0f * (i * i + k * k), 2.0f * (j * k - w * i)},
                          {2.0f * (i * k - w * j), 2.0f * (j * k + w * i), 1.0f - 2.0f * (i * i + j * j)}};
  // Rotations whose unit quaternions differ by an angle phi differ by 2 sin phi.
  const Floats turn = minimum(2.0f * camera.turn / at_least(root(norm2), 1e-18f), broadcast(2.0f));
  const Floats scales[3] = {exponential(log_scales[0]), exponential(log_scales[1]), exponential(log_scales[2])};

  const JacobianRow jx = jacobian_row(camera, 0, slope_x, relative_move);
  const JacobianRow jy = jacobian_row(camera, 1, slope_y, relative_move);
  const Extent ex = image_extent(camera, 0, jx, inverse_z, Q, scales, turn);
  const Extent ey = image_extent(camera, 1, jy, inverse_z, Q, scales, turn);

  Floats opacity255 = 255.0f * (1.0f + kRelativeError) / (1.0f + exponential(-logit - camera.logit_gain));
  if (camera.antialiased) opacity255 *= largest_compensation(camera, ex, ey);
  const Floats extent2 = 2.0f * (logarithm(clamp(opacity255, 1.0f, 1e6f)) + kRelativeError);
  const Floats extent = minimum(root(extent2), broadcast(kOpaqueExtent)) * (1.0f + kRelativeError);
  return {interval(camera, 0, slope_x, ex, extent, relative_move),
          interval(camera, 1, slope_y, ey, extent, relative_move), opacity255 < 1.0f};
}

// The whole test.
inline Ints may_be_drawn(const Camera& camera, const Floats (&mean)[3], const Floats (&log_scales)[3],
                         const Floats (&quat)[4], Floats logit) {
  const Rectangle r = rectangle(camera, mean, log_scales, quat, logit);
  return ~(r.hidden | (r.x.high <= 0.0f) | (r.x.low >= camera.size[0]) | (r.y.high <= 0.0f) |
           (r.y.low >= camera.size[1]));
}

uint64_t visible_rows(const Camera& camera, const float* rows, int64_t stride, int count) {
  uint64_t bits = 0;
  for (int first = 0; first < count; first += kWidth) {
    const float* from = rows + stride * first;
    Floats mean[3], log_scales[3], logit[1];
    load_rows(from + kMeans, stride, count - first, mean);
    load_rows(from + kScales, stride, count - first, log_scales);
    load_rows(from + kOpacities, stride, count - first, logit);
    const Decision decision = decide(camera, mean, log_scales, logit[0]);
    Ints drawn = decision.drawn;
    if (any(~(decision.hidden | decision.drawn))) {
      Floats quat[4];
      load_rows(from + kQuats, stride, count - first, quat);
      drawn |= ~decision.hidden & may_be_drawn(camera, mean, log_scales, quat, logit[0]);
    }
    for (int lane = 0; lane < kWidth && first + lane < count; ++lane) {
      bits |= static_cast<uint64_t>(drawn[lane] & 1) << (first + lane);
    }
  }
  return bits;
}

void picture_rectangles(const Camera& camera, const float* rows, int count, float (*rectangles)[4]) {
  for (int first = 0; first < count; first += kWidth) {
    const float* from = rows + kGeometryColumns * first;
    Floats mean[3], log_scales[3], quat[4], logit[1];
    load_rows(from + kMeans, kGeometryColumns, count - first, mean);
    load_rows(from + kScales, kGeometryColumns, count - first, log_scales);
    load_rows(from + kQuats, kGeometryColumns, count - first, quat);
    load_rows(from + kOpacities, kGeometryColumns, count - first, logit);
    const Rectangle r = rectangle(camera, mean, log_scales, quat, logit[0]);
    const Ints hidden = r.hidden | decide(camera, mean, log_scales, logit[0]).hidden;
    for (int lane = 0; lane < kWidth && first + lane < count; ++lane) {
      float* to = rectangles[first + lane];
      to[0] = r.x.low[lane], to[1] = r.x.high[lane], to[2] = r.y.low[lane], to[3] = r.y.high[lane];
      if (hidden[lane]) to[1] = -INFINITY;
    }
  }
}

}  // namespace

extern const CullingKernels culling_kernels;
const CullingKernels culling_kernels{visible_rows, picture_rectangles};

}  // namespace KERNEL_ISA
}  // namespace offload
