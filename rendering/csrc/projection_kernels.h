// EWA projection of 3D Gaussians to the image plane and its gradient (Zwicker et al. 2001; Kerbl et al. 2023), with
// gsplat's culling rule and conventions. The mathematics runs on several Gaussians at once, one per lane.
//
// With world covariance (Q S)(Q S)^T, Q the rotation of the quaternion, the image covariance is P P^T for the 2x3
// matrix P = J W Q S, where W is the camera's rotation and J the Jacobian of the perspective projection.
#pragma once

#include <limits>

#include "kernels.h"
#include "lanes.h"

namespace {

using namespace rendering;

constexpr double kOpaqueExtent = 3.33;  // standard deviations at which opacity 1 has fallen to 1/255
constexpr double kMaxRadius = 2147483520.0;  // largest float that fits an int32

template <class T>
struct Projector {
  using V = Lanes<T>;

  V mean[3];               // centre
  V camera[3];             // centre in camera space
  V quat[4], inverse_norm;  // unit quaternion; inverse_norm 0 for a quaternion of length zero
  V scale[3];
  V rotation[3][3];        // Q
  V axes[3][3];            // W Q S
  V slope_x, slope_y;      // x/z and y/z, kept near the image
  V inside_x, inside_y;    // 1 where the slope was not cut
  V inverse_z;
  V j00, j11, j02, j12;    // J
  V p[2][3];               // P
  V mean2d[2], cov[3];     // covariance xx, xy, yy

  template <class Row>
  Projector(const GaussianGeometry<T>& g, const Camera<T>& view, int lanes, Row row) {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const int64_t i = row(lane < lanes ? lane : 0);  // idle lanes repeat the first one's work
      for (int k = 0; k < 3; ++k) mean[k][lane] = g.means[3 * i + k];
      for (int k = 0; k < 4; ++k) quat[k][lane] = g.quats[4 * i + k];
      for (int k = 0; k < 3; ++k) scale[k][lane] = g.scales[3 * i + k];
    }
    const T* W = view.rotation;
    for (int r = 0; r < 3; ++r) {
      camera[r] = W[3 * r] * mean[0] + W[3 * r + 1] * mean[1] + W[3 * r + 2] * mean[2] + view.translation[r];
    }
    rotate();
    for (int r = 0; r < 3; ++r) {
      for (int c = 0; c < 3; ++c) {
        axes[r][c] = (W[3 * r] * rotation[0][c] + W[3 * r + 1] * rotation[1][c] + W[3 * r + 2] * rotation[2][c]) *
                     scale[c];
      }
    }
    perspective(view);
    for (int c = 0; c < 3; ++c) {
      p[0][c] = j00 * axes[0][c] + j02 * axes[2][c];
      p[1][c] = j11 * axes[1][c] + j12 * axes[2][c];
    }
    cov[0] = p[0][0] * p[0][0] + p[0][1] * p[0][1] + p[0][2] * p[0][2];
    cov[1] = p[0][0] * p[1][0] + p[0][1] * p[1][1] + p[0][2] * p[1][2];
    cov[2] = p[1][0] * p[1][0] + p[1][1] * p[1][1] + p[1][2] * p[1][2];
  }

  void rotate() {
    const V one = broadcast(T(1)), zero{};
    const V norm2 = quat[0] * quat[0] + quat[1] * quat[1] + quat[2] * quat[2] + quat[3] * quat[3];
    // A quaternion of length zero has no direction: it counts as the identity and gets no gradient.
    const auto nonzero = norm2 >= broadcast(std::numeric_limits<T>::min());
    const V inverse = one / square_root<T>(nonzero ? norm2 : one);
    quat[0] = nonzero ? quat[0] * inverse : one;
    for (int k = 1; k < 4; ++k) quat[k] = nonzero ? quat[k] * inverse : zero;
    inverse_norm = nonzero ? inverse : zero;
    const V &w = quat[0], &x = quat[1], &y = quat[2], &z = quat[3];
    rotation[0][0] = T(1) - T(2) * (y * y + z * z);
    rotation[0][1] = T(2) * (x * y - w * z);
    rotation[0][2] = T(2) * (x * z + w * y);
    rotation[1][0] = T(2) * (x * y + w * z);
    rotation[1][1] = T(1) - T(2) * (x * x + z * z);
    rotation[1][2] = T(2) * (y * z - w * x);
    rotation[2][0] = T(2) * (x * z - w * y);
    rotation[2][1] = T(2) * (y * z + w * x);
    rotation[2][2] = T(1) - T(2) * (x * x + y * y);
  }

  void perspective(const Camera<T>& view) {
    const V one = broadcast(T(1)), zero{};
    inverse_z = one / camera[2];
    const V raw_x = camera[0] * inverse_z, raw_y = camera[1] * inverse_z;
    // Outside the image J is that of a point at most 15 % of the image's extent beyond its border: the linearization
    // is worthless far from the axis.
    const T margin_x = T(0.3) * (T(0.5) * view.width / view.fx);
    const T margin_y = T(0.3) * (T(0.5) * view.height / view.fy);
    const V low_x = broadcast(-(view.cx / view.fx + margin_x));
    const V high_x = broadcast((view.width - view.cx) / view.fx + margin_x);
    const V low_y = broadcast(-(view.cy / view.fy + margin_y));
    const V high_y = broadcast((view.height - view.cy) / view.fy + margin_y);
    slope_x = minimum(high_x, maximum(raw_x, low_x));
    slope_y = minimum(high_y, maximum(raw_y, low_y));
    inside_x = ((raw_x >= low_x) & (raw_x <= high_x)) ? one : zero;
    inside_y = ((raw_y >= low_y) & (raw_y <= high_y)) ? one : zero;
    j00 = view.fx * inverse_z;
    j11 = view.fy * inverse_z;
    j02 = -j00 * slope_x;
    j12 = -j11 * slope_y;
    mean2d[0] = j00 * camera[0] + view.cx;
    mean2d[1] = j11 * camera[1] + view.cy;
  }
};

// gsplat's tests of one projected Gaussian whose blurred covariance is xx, yy; fills in the radii. Written so that a
// NaN or an infinity anywhere fails.
template <class T>
bool reaches_image(const Camera<T>& view, const ProjectionSettings<T>& settings, T xx, T yy, ProjectedRow<T>& row) {
  constexpr T threshold = T(1) / T(255);
  if (!(row.opacity >= threshold)) return false;
  const T extent = std::fmin(T(kOpaqueExtent), std::sqrt(T(2) * std::log(row.opacity / threshold)));
  const T radius_x = std::ceil(extent * std::sqrt(xx)), radius_y = std::ceil(extent * std::sqrt(yy));
  if (!(radius_x > settings.radius_clip || radius_y > settings.radius_clip)) return false;
  const bool meets_image = row.mean2d[0] + radius_x > T(0) && row.mean2d[0] - radius_x < view.width &&
                           row.mean2d[1] + radius_y > T(0) && row.mean2d[1] - radius_y < view.height;
  if (!meets_image) return false;
  row.radii[0] = static_cast<int32_t>(std::fmin(radius_x, T(kMaxRadius)));
  row.radii[1] = static_cast<int32_t>(std::fmin(radius_y, T(kMaxRadius)));
  return true;
}

template <class T>
int64_t project_forward(const GaussianGeometry<T>& g, const Camera<T>& view, const ProjectionSettings<T>& settings,
                        int64_t begin, int64_t end, ProjectedRow<T>* rows) {
  using V = Lanes<T>;
  int64_t count = 0;
  for (int64_t first = begin; first < end; first += kLanes<T>) {
    const int lanes = static_cast<int>(end - first < kLanes<T> ? end - first : kLanes<T>);
    const Projector<T> projected(g, view, lanes, [first](int lane) { return first + lane; });
    const V xx = projected.cov[0] + settings.eps2d, xy = projected.cov[1], yy = projected.cov[2] + settings.eps2d;
    const V sharp_determinant = projected.cov[0] * projected.cov[2] - xy * xy;
    const V determinant = xx * yy - xy * xy;
    const V inverse = T(1) / determinant;
    const V ratio = maximum(sharp_determinant * inverse, V{});
    const V compensation = settings.antialiased ? square_root<T>(ratio) : broadcast(T(1));
    const V depth = projected.camera[2];
    const auto candidates = (depth >= broadcast(settings.near_plane)) & (depth <= broadcast(settings.far_plane)) &
                            (determinant > V{}) & (determinant <= broadcast(std::numeric_limits<T>::max()));
    const V conic_xx = yy * inverse, conic_xy = -xy * inverse, conic_yy = xx * inverse;
    for (int lane = 0; lane < lanes; ++lane) {
      if (!candidates[lane]) continue;
      ProjectedRow<T> row;
      row.gaussian_id = first + lane;
      row.mean2d[0] = projected.mean2d[0][lane];
      row.mean2d[1] = projected.mean2d[1][lane];
      row.depth = depth[lane];
      row.conic[0] = conic_xx[lane];
      row.conic[1] = conic_xy[lane];
      row.conic[2] = conic_yy[lane];
      row.compensation = compensation[lane];
      row.opacity = g.opacities[first + lane] * row.compensation;
      if (reaches_image(view, settings, xx[lane], yy[lane], row)) rows[count++] = row;
    }
  }
  return count;
}

// A template of its own with the pose's gradient: without it the compiler makes the arithmetic that there was before.
template <class T, bool OfPose>
void project_backward_of(const GaussianGeometry<T>& g, const Camera<T>& view, T eps2d, const int64_t* gaussian_ids,
                         const T* conics, const T* compensations, const ProjectionGradients<T>& grads, int64_t begin,
                         int64_t end, T* v_pose) {
  using V = Lanes<T>;
  const T* W = view.rotation;
  for (int64_t first = begin; first < end; first += kLanes<T>) {
    const int lanes = static_cast<int>(end - first < kLanes<T> ? end - first : kLanes<T>);
    const Projector<T> f(g, view, lanes, [=](int lane) { return gaussian_ids[first + lane]; });
    V conic[3], v_conic[3], v_mean2d[2], v_depth, opacity, v_opacity, compensation = broadcast(T(1));
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const int64_t r = first + (lane < lanes ? lane : 0);
      for (int k = 0; k < 3; ++k) conic[k][lane] = conics[3 * r + k];
      for (int k = 0; k < 3; ++k) v_conic[k][lane] = grads.v_conics[3 * r + k];
      for (int k = 0; k < 2; ++k) v_mean2d[k][lane] = grads.v_means2d[2 * r + k];
      v_depth[lane] = grads.v_depths[r];
      opacity[lane] = g.opacities[gaussian_ids[r]];
      v_opacity[lane] = grads.v_row_opacities[r];
      if (compensations) compensation[lane] = compensations[r];
    }

    // conic = cov^-1: dL/dcov = -conic G conic, where G is symmetric with half of v_conic[1] off the diagonal.
    const V g_xy = T(0.5) * v_conic[1];
    const V left_00 = conic[0] * v_conic[0] + conic[1] * g_xy, left_01 = conic[0] * g_xy + conic[1] * v_conic[2];
    const V left_10 = conic[1] * v_conic[0] + conic[2] * g_xy, left_11 = conic[1] * g_xy + conic[2] * v_conic[2];
    V v_xx = -(left_00 * conic[0] + left_01 * conic[1]);
    V v_xy = -(left_00 * conic[1] + left_01 * conic[2]);
    V v_yy = -(left_10 * conic[1] + left_11 * conic[2]);
    if (compensations) {
      // compensation^2 = det(cov) / det(cov + eps2d I); 1e-6 is gsplat's guard against division by zero.
      const V v_ratio = v_opacity * opacity * T(0.5) / (compensation + T(1e-6));
      const V rest = T(1) - compensation * compensation;
      const V blur = eps2d * (conic[0] * conic[2] - conic[1] * conic[1]);
      v_xx += v_ratio * (rest * conic[0] - blur);
      v_xy += v_ratio * rest * conic[1];
      v_yy += v_ratio * (rest * conic[2] - blur);
    }

    // cov = P P^T, P = J A with A = W Q S.
    V v_axes[3][3];
    V v_j00{}, v_j11{}, v_j02{}, v_j12{};
    for (int c = 0; c < 3; ++c) {
      const V v_p0 = T(2) * (v_xx * f.p[0][c] + v_xy * f.p[1][c]);
      const V v_p1 = T(2) * (v_xy * f.p[0][c] + v_yy * f.p[1][c]);
      v_axes[0][c] = f.j00 * v_p0;
      v_axes[1][c] = f.j11 * v_p1;
      v_axes[2][c] = f.j02 * v_p0 + f.j12 * v_p1;
      v_j00 += v_p0 * f.axes[0][c];
      v_j02 += v_p0 * f.axes[2][c];
      v_j11 += v_p1 * f.axes[1][c];
      v_j12 += v_p1 * f.axes[2][c];
    }

    // mean2d = f x/z + c; j00 = fx/z; j02 = -fx x/z^2, or -fx limit/z where the slope was cut. Same for y.
    const V iz = f.inverse_z;
    V v_camera[3];
    v_camera[0] = f.j00 * (v_mean2d[0] - f.inside_x * v_j02 * iz);
    v_camera[1] = f.j11 * (v_mean2d[1] - f.inside_y * v_j12 * iz);
    v_camera[2] = v_depth - iz * (f.j00 * (f.camera[0] * v_mean2d[0] + v_j00) +
                                  f.j11 * (f.camera[1] * v_mean2d[1] + v_j11) +
                                  (T(1) + f.inside_x) * f.j02 * v_j02 + (T(1) + f.inside_y) * f.j12 * v_j12);

    v_opacity *= compensation;
    V v_mean[3], v_scale[3], v_rotation[3][3];
    for (int r = 0; r < 3; ++r) {
      v_mean[r] = W[r] * v_camera[0] + W[3 + r] * v_camera[1] + W[6 + r] * v_camera[2];
    }
    for (int c = 0; c < 3; ++c) {
      v_scale[c] = V{};
      for (int r = 0; r < 3; ++r) {
        const V v = W[r] * v_axes[0][c] + W[3 + r] * v_axes[1][c] + W[6 + r] * v_axes[2][c];
        v_scale[c] += f.rotation[r][c] * v;
        v_rotation[r][c] = v * f.scale[c];
      }
    }

    if constexpr (OfPose) {
      // The camera's rotation W and translation t are in camera = W mean + t and A = W (Q S).
      for (int r = 0; r < 3; ++r) {
        for (int c = 0; c < 3; ++c) {
          V v = v_camera[r] * f.mean[c];
          for (int k = 0; k < 3; ++k) v += v_axes[r][k] * f.rotation[c][k] * f.scale[k];
          for (int lane = 0; lane < lanes; ++lane) v_pose[3 * r + c] += v[lane];
        }
        for (int lane = 0; lane < lanes; ++lane) v_pose[9 + r] += v_camera[r][lane];
      }
    }

    const V &w = f.quat[0], &x = f.quat[1], &y = f.quat[2], &z = f.quat[3];
    const V(&R)[3][3] = v_rotation;
    V v_unit[4], v_quat[4];
    v_unit[0] = T(2) * (x * (R[2][1] - R[1][2]) + y * (R[0][2] - R[2][0]) + z * (R[1][0] - R[0][1]));
    v_unit[1] = T(2) * (w * (R[2][1] - R[1][2]) + y * (R[0][1] + R[1][0]) + z * (R[0][2] + R[2][0]) -
                        T(2) * x * (R[1][1] + R[2][2]));
    v_unit[2] = T(2) * (w * (R[0][2] - R[2][0]) + x * (R[0][1] + R[1][0]) + z * (R[1][2] + R[2][1]) -
                        T(2) * y * (R[0][0] + R[2][2]));
    v_unit[3] = T(2) * (w * (R[1][0] - R[0][1]) + x * (R[0][2] + R[2][0]) + y * (R[1][2] + R[2][1]) -
                        T(2) * z * (R[0][0] + R[1][1]));
    const V along = w * v_unit[0] + x * v_unit[1] + y * v_unit[2] + z * v_unit[3];
    for (int k = 0; k < 4; ++k) v_quat[k] = (v_unit[k] - along * f.quat[k]) * f.inverse_norm;

    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t i = gaussian_ids[first + lane];
      for (int k = 0; k < 3; ++k) grads.v_means[3 * i + k] += v_mean[k][lane];
      for (int k = 0; k < 4; ++k) grads.v_quats[4 * i + k] += v_quat[k][lane];
      for (int k = 0; k < 3; ++k) grads.v_scales[3 * i + k] += v_scale[k][lane];
      grads.v_opacities[i] += v_opacity[lane];
    }
  }
}

template <class T>
void project_backward(const GaussianGeometry<T>& g, const Camera<T>& view, T eps2d, const int64_t* gaussian_ids,
                      const T* conics, const T* compensations, const ProjectionGradients<T>& grads, int64_t begin,
                      int64_t end, T* v_pose) {
  const auto backward = v_pose ? project_backward_of<T, true> : project_backward_of<T, false>;
  backward(g, view, eps2d, gaussian_ids, conics, compensations, grads, begin, end, v_pose);
}

}  // namespace
