// Alpha blending of one 16x16 tile, forward and backward (Kerbl et al. 2023, section 6), with gsplat's thresholds.
//
// Both passes go from the nearest Gaussian to the farthest. A pixel's state is its transmittance T, negative once the
// pixel is opaque: then nothing more is added to it, and -T is its final transmittance.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace {

using namespace rendering;

template <class T>
constexpr T kMaxAlpha = T(0.999);
template <class T>
constexpr T kAlphaThreshold = T(1) / T(255);
template <class T>
constexpr T kMinTransmittance = T(1e-4);

// Tiles are tested for being finished once in so many Gaussians.
constexpr int64_t kFinishedCheckInterval = 16;

struct RowRange {
  int begin, end;
};

inline int clamp_to_tile(double pixel) {
  // Compared before the cast: the reach of an enormous Gaussian does not fit an int.
  return pixel > 0 ? (pixel < kTileSize ? static_cast<int>(pixel) : kTileSize) : 0;
}

// Rows (or columns) of a tile whose pixel centres lie within reach of the centre.
template <class T>
inline RowRange reached(T center, T reach, int tile_start) {
  const T first = center - reach - T(0.5) - T(tile_start);
  const T last = center + reach - T(0.5) - T(tile_start);
  return {clamp_to_tile(std::ceil(first)), clamp_to_tile(std::floor(last) + 1)};
}

// The Gaussian's falloff exponent over a run of pixels in one row: -sigma * log2(e) = xx + xy * dy + yy * dy^2, so that
// 2^exponent = e^-sigma. xx and xy hold for every row.
template <class T>
struct Falloff {
  Lanes<T> dx, xx, xy;
  T yy, opacity;

  Falloff(const Splat<T>& s, int first_pixel) : opacity(s.opacity) {
    constexpr T log2e = T(1.4426950408889634);
    dx = s.x - (lane_numbers<T>() + (T(first_pixel) + T(0.5)));
    xx = dx * dx * (T(-0.5) * log2e * s.conic[0]);
    xy = dx * (-log2e * s.conic[1]);
    yy = T(-0.5) * log2e * s.conic[2];
  }

  // Opacity times falloff; zero where gsplat skips the pixel (sigma < 0 or alpha below 1/255).
  Lanes<T> strength(T dy) const {
    const Lanes<T> zero{};
    const Lanes<T> exponent = xx + xy * dy + yy * dy * dy;
    const Lanes<T> value = opacity * exp2_nonpositive(exponent);
    const Lanes<T> kept = exponent <= zero ? value : zero;
    return kept >= broadcast(kAlphaThreshold<T>) ? kept : zero;
  }
};

template <class T>
inline void start_transmittance(const TileFrame& frame, T* transmittance) {
  for (int i = 0; i < kTilePixels; ++i) {
    const bool inside = i / kTileSize < frame.rows && i % kTileSize < frame.columns;
    transmittance[i] = inside ? T(1) : T(-1);
  }
}

template <class T, int Channels>
void blend_forward(const Splat<T>* splats, const int32_t* ids, int64_t count, const TileFrame& frame,
                   const TileForward<T>& out) {
  alignas(64) T transmittance[kTilePixels];
  alignas(64) T color[Channels][kTilePixels] = {};
  start_transmittance(frame, transmittance);

  for (int64_t i = 0; i < count; ++i) {
    if (i % kFinishedCheckInterval == 0 && !any_positive(transmittance, kTilePixels)) break;
    const Splat<T>& s = splats[ids[i]];
    const RowRange rows = reached(s.y, s.reach_y, frame.y0);
    const RowRange columns = reached(s.x, s.reach_x, frame.x0);
    for (int column = 0; column < kTileSize; column += kLanes<T>) {
      if (columns.end <= column || columns.begin >= column + kLanes<T>) continue;
      const Falloff<T> falloff(s, frame.x0 + column);
      for (int row = rows.begin; row < rows.end; ++row) {
        const int pixel = row * kTileSize + column;
        const T dy = s.y - (T(frame.y0 + row) + T(0.5));
        const Lanes<T> alpha = minimum(falloff.strength(dy), broadcast(kMaxAlpha<T>));
        const Lanes<T> before = load<T>(transmittance + pixel);
        const Lanes<T> after = before * (T(1) - alpha);
        const auto open = after > broadcast(kMinTransmittance<T>);
        const Lanes<T> weight = open ? alpha * before : Lanes<T>{};
        for (int k = 0; k < Channels; ++k) {
          store<T>(color[k] + pixel, load<T>(color[k] + pixel) + s.color[k] * weight);
        }
        store<T>(transmittance + pixel, open ? after : minimum(before, -before));
      }
    }
  }

  for (int row = 0; row < frame.rows; ++row) {
    for (int column = 0; column < frame.columns; ++column) {
      const int pixel = row * kTileSize + column;
      const int64_t target = static_cast<int64_t>(frame.y0 + row) * frame.image_width + frame.x0 + column;
      const T remaining = std::abs(transmittance[pixel]);
      out.alphas[target] = T(1) - remaining;
      for (int k = 0; k < Channels; ++k) {
        const T background = out.background ? remaining * out.background[k] : T(0);
        out.colors[target * Channels + k] = color[k][pixel] + background;
      }
    }
  }
}

// With C = sum_i w_i c_i + T_end background and w_i = alpha_i T_i, the gradient v of a pixel gives
//   dL/d alpha_i = T_i (c_i . v) - rest_i / (1 - alpha_i),
//   rest_i = sum_{j > i} w_j (c_j . v) + T_end (background . v - v_alpha),
// and rest needs no pass from behind: it starts as C . v - T_end v_alpha and loses w_i (c_i . v) at each Gaussian.
template <class T, int Channels, bool AbsGrad>
void blend_backward_tile(const Splat<T>* splats, const int32_t* ids, int64_t count, const TileFrame& frame,
                         const TileBackward<T>& io) {
  alignas(64) T transmittance[kTilePixels];
  alignas(64) T rest[kTilePixels] = {};
  alignas(64) T v_color[Channels][kTilePixels] = {};
  start_transmittance(frame, transmittance);
  for (int row = 0; row < frame.rows; ++row) {
    for (int column = 0; column < frame.columns; ++column) {
      const int pixel = row * kTileSize + column;
      const int64_t source = static_cast<int64_t>(frame.y0 + row) * frame.image_width + frame.x0 + column;
      T r = -(T(1) - io.alphas[source]) * io.v_alphas[source];
      for (int k = 0; k < Channels; ++k) {
        v_color[k][pixel] = io.v_colors[source * Channels + k];
        r += io.colors[source * Channels + k] * v_color[k][pixel];
      }
      rest[pixel] = r;
    }
  }

  bool finished = false;
  for (int64_t i = 0; i < count; ++i) {
    T* slot = io.slots + io.slot_ids[i] * kSlotSize;
    for (int k = 0; k < kSlotSize; ++k) slot[k] = T(0);
    if (i % kFinishedCheckInterval == 0) finished = finished || !any_positive(transmittance, kTilePixels);
    if (finished) continue;  // the slots behind are set to zero

    const Splat<T>& s = splats[ids[i]];
    const RowRange rows = reached(s.y, s.reach_y, frame.y0);
    const RowRange columns = reached(s.x, s.reach_x, frame.x0);
    // Sums over pixels of the gradient of sigma, q: times 1, dx, dy, dx^2, dx dy, dy^2.
    T q_0 = 0, q_x = 0, q_y = 0, q_xx = 0, q_xy = 0, q_yy = 0;
    for (int column = 0; column < kTileSize; column += kLanes<T>) {
      if (columns.end <= column || columns.begin >= column + kLanes<T>) continue;
      const Falloff<T> falloff(s, frame.x0 + column);
      Lanes<T> q_sum{}, q_dy{}, q_dy2{}, abs_x{}, abs_y{};
      Lanes<T> color_sum[Channels] = {};
      for (int row = rows.begin; row < rows.end; ++row) {
        const int pixel = row * kTileSize + column;
        const T dy = s.y - (T(frame.y0 + row) + T(0.5));
        const Lanes<T> strength = falloff.strength(dy);
        const Lanes<T> alpha = minimum(strength, broadcast(kMaxAlpha<T>));
        const Lanes<T> before = load<T>(transmittance + pixel);
        const Lanes<T> after = before * (T(1) - alpha);
        const auto open = after > broadcast(kMinTransmittance<T>);
        const Lanes<T> weight = open ? alpha * before : Lanes<T>{};
        store<T>(transmittance + pixel, open ? after : minimum(before, -before));

        Lanes<T> c_v{};  // colour . gradient
        for (int k = 0; k < Channels; ++k) {
          const Lanes<T> v = load<T>(v_color[k] + pixel);
          c_v += s.color[k] * v;
          color_sum[k] += weight * v;
        }
        const Lanes<T> behind = load<T>(rest + pixel) - weight * c_v;
        store<T>(rest + pixel, behind);
        const Lanes<T> v_alpha = before * c_v - behind / (T(1) - alpha);
        // No gradient where alpha was cut at 0.999, as in gsplat.
        const Lanes<T> passing = strength <= broadcast(kMaxAlpha<T>) ? strength : Lanes<T>{};
        const Lanes<T> q = open ? -passing * v_alpha : Lanes<T>{};
        q_sum += q;
        q_dy += q * dy;
        q_dy2 += q * (dy * dy);
        if constexpr (AbsGrad) {
          const Lanes<T> x = q * (s.conic[0] * falloff.dx + s.conic[1] * dy);
          const Lanes<T> y = q * (s.conic[1] * falloff.dx + s.conic[2] * dy);
          abs_x += maximum(x, -x);
          abs_y += maximum(y, -y);
        }
      }
      for (int k = 0; k < Channels; ++k) slot[kSlotColor + k] += sum<T>(color_sum[k]);
      q_0 += sum<T>(q_sum);
      q_x += sum<T>(q_sum * falloff.dx);
      q_y += sum<T>(q_dy);
      q_xx += sum<T>(q_sum * falloff.dx * falloff.dx);
      q_xy += sum<T>(q_dy * falloff.dx);
      q_yy += sum<T>(q_dy2);
      if constexpr (AbsGrad) {
        slot[kSlotAbsMean] += sum<T>(abs_x);
        slot[kSlotAbsMean + 1] += sum<T>(abs_y);
      }
    }
    slot[kSlotOpacity] = -q_0 / s.opacity;
    slot[kSlotConic] = T(0.5) * q_xx;
    slot[kSlotConic + 1] = q_xy;
    slot[kSlotConic + 2] = T(0.5) * q_yy;
    slot[kSlotMean] = s.conic[0] * q_x + s.conic[1] * q_y;
    slot[kSlotMean + 1] = s.conic[1] * q_x + s.conic[2] * q_y;
  }
}

template <class T, int Channels>
void blend_backward(const Splat<T>* splats, const int32_t* ids, int64_t count, const TileFrame& frame,
                    const TileBackward<T>& io, bool absgrad) {
  if (absgrad) {
    blend_backward_tile<T, Channels, true>(splats, ids, count, frame, io);
  } else {
    blend_backward_tile<T, Channels, false>(splats, ids, count, frame, io);
  }
}

}  // namespace
