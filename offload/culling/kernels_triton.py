"""The test of single Gaussians of `offload/culling/native.py` as CUDA kernels in Triton: one pass over the geometry.

Reads 24 bytes of each of N Gaussians and camera, and 20 more where one in its block may reach the picture: 0.1 ms for
18 million at 4 TB/s. To find the cells that rows may draw in writes 8 bytes of each. The formulas and what each bound
is for stand in `culling._View`, whose constants the kernels take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.adam.deferral import CatchUpTables
from offload.adam.deferral_triton import caught_up, skipped_sizes
from offload.culling.cameras import Margin
from offload.culling.native import COVARIANCE_ERROR, OPAQUE_EXTENT, POSITION_ERROR, RELATIVE
from offload.store.host_store import group_columns

BLOCK = 256
SCALES, QUATS, OPACITIES = (
    tl.constexpr(group_columns("geometry", sh_degree=0)[name].start) for name in ("scales", "quats", "opacities")
)  # first columns of these parameters in an optimizer's tables


@dataclass(frozen=True)
class Lag:
    """What brings rows that lag behind to the present step."""

    moments: Sequence[Tensor]  # both of the means, of the scales, of the quats and of the opacities
    last_step: Tensor  # [N] int32, step of each row's last update
    tables: CatchUpTables  # of the skipped steps
    margin: Margin  # how much rows may move after their last update


def visible_ids(
    means: Tensor, scales: Tensor, quats: Tensor, opacities: Tensor, views: Sequence, lag: Lag | None = None
) -> Tensor:
    """Sorted int64 [V] of the rows that may be drawn in any of the views; waits for the device.

    Args:
        means: [N, 3]. scales: log scales [N, 3]. quats: [N, 4]. opacities: logit opacities [N]. All float32.
        views: Of `culling.views_of`, with the margin that current rows need.
        lag: Of rows that lag behind; None: they are current.
    """
    drawn = torch.zeros(len(means), dtype=torch.uint8, device=means.device)
    means, scales, quats, opacities = (t.contiguous() for t in (means, scales, quats, opacities))
    if len(means):
        for view in views:
            numbers, constants = _of_view(view)
            _mark_visible[(triton.cdiv(len(means), BLOCK),)](
                means, scales, quats, opacities, drawn, len(means), *_of_lag(lag, view), *numbers, **constants,
                BLOCK=BLOCK,
            )  # fmt: skip
    return drawn.nonzero().squeeze(1)


def cover_cells(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    opacities: Tensor,
    ids: Tensor,
    view,
    cell: int,
    cells: Tensor,
    corners: Tensor,
) -> None:
    """Find the cells that rows may draw in.

    Args:
        means, scales, quats, opacities: As for `visible_ids`. view: A `culling._View`.
        ids: [V] int64, the rows to look at.
        cell: Width and height of a cell in pixels.
        cells: [4, V] int16, to be written: of `culling.CoveredCells`.
        corners: [4, columns + 1, rows + 1] int32, to be added to: the same.
    """
    if len(ids) == 0:
        return
    means, scales, quats, opacities = (t.contiguous() for t in (means, scales, quats, opacities))
    numbers, constants = _of_view(view)
    ends = (float(corners.shape[1] - 1), float(corners.shape[2] - 1))
    _cover_cells[(triton.cdiv(len(ids), BLOCK),)](
        means, scales, quats, opacities, ids, cells, corners, len(ids), corners.shape[2], corners[0].numel(),
        float(cell), *ends, *numbers, **constants, BLOCK=BLOCK,
    )  # fmt: skip


def _of_lag(lag: Lag | None, view) -> list[object]:
    """What `_mark_visible` takes of it: first how far rows reach that lag behind, in the view's half spaces."""
    (*_, reach_x, _), _, (*_, reach_y, _), *_ = view.planes
    if lag is None:
        return [view.move, reach_x, reach_y, *[None] * 11, 0, 0.0, 0, 0]
    growth = math.exp(lag.margin.scales) / view.growth
    tables = lag.tables
    return [
        math.sqrt(3) * lag.margin.means, growth * reach_x, growth * reach_y, *lag.moments, lag.last_step,
        tables.sums, tables.multipliers, tables.sums.shape[1], tables.eps, *tables.multipliers.shape,
    ]  # fmt: skip


def _of_view(view) -> tuple[list[float], dict[str, object]]:
    """What the kernels take of a `culling._View`, in their order."""
    margin, cameras = view.margin, view.cameras
    (*_, reach_x, error_reach_x), _, (*_, reach_y, error_reach_y), *_ = view.planes
    numbers = [
        *view.rotation[0], *view.rotation[1], *view.rotation[2], *view.translation, max(map(abs, view.translation)),
        *view.focal, *view.centre, *view.size, *view.slopes[0], *view.slopes[1], cameras.near_plane, cameras.far_plane,
        reach_x, reach_y, error_reach_x, error_reach_y, view.blur_reach,
        view.move, view.turn, view.growth, margin.opacities, margin.pixels, cameras.eps2d,
    ]  # fmt: skip
    constants = {
        "POSITION_ERROR": POSITION_ERROR,
        "COVARIANCE_ERROR": COVARIANCE_ERROR,
        "RELATIVE": RELATIVE,
        "OPAQUE_EXTENT": OPAQUE_EXTENT,
        "ANTIALIASED": cameras.antialiased,
    }
    return numbers, constants


@triton.jit
def _image_extent(
    raw_slope, low, high, focal, w0, w1, w2, v0, v1, v2, z, relative_move, turn, largest_scale,
    r00, r01, r02, r10, r11, r12, r20, r21, r22, s0, s1, s2, COVARIANCE_ERROR: tl.constexpr,
):  # fmt: skip
    """`_View.image_extent`; w is the camera's axis in world coordinates, v its viewing direction."""
    slope = tl.minimum(tl.maximum(raw_slope, low), high)
    slope_change = tl.minimum(relative_move * (1 + tl.abs(raw_slope)), high - low)
    length = tl.sqrt(1 + slope * slope)
    length_change = relative_move * (1 + tl.abs(slope)) + (1 + relative_move) * slope_change
    focal_z = focal / z
    j0, j1, j2 = w0 - slope * v0, w1 - slope * v1, w2 - slope * v2
    a0 = focal_z * s0 * (j0 * r00 + j1 * r10 + j2 * r20)
    a1 = focal_z * s1 * (j0 * r01 + j1 * r11 + j2 * r21)
    a2 = focal_z * s2 * (j0 * r02 + j1 * r12 + j2 * r22)
    variance = a0 * a0 + a1 * a1 + a2 * a2
    reach = focal_z * length
    rounding = COVARIANCE_ERROR * reach * reach * (s0 * s0 + s1 * s1 + s2 * s2)
    change = largest_scale * focal_z * (length_change + (length + length_change) * turn)
    return a0, a1, a2, variance, rounding, change


@triton.jit
def _interval(
    slope, focal, centre, size, variance, rounding, change, extent, growth, relative_move, margin_pixels, eps2d,
    RELATIVE: tl.constexpr,
):  # fmt: skip
    """Where the rectangle around the centre begins and ends along one axis, in pixels."""
    sigma = growth * (tl.sqrt(variance + rounding) + change)
    radius = extent * tl.sqrt(sigma * sigma + eps2d)
    offset = focal * slope
    half = (
        tl.ceil(radius + 1e-4)
        + margin_pixels
        + RELATIVE * (radius + tl.abs(offset))
        + focal * relative_move * (1 + tl.abs(slope))
        + 1e-6 * (tl.abs(centre) + size)
    )
    return offset + centre - half, offset + centre + half


@triton.jit
def _load3(tensor, i, mask):
    """Rows i of a tensor [N, 3]."""
    return (
        tl.load(tensor + 3 * i, mask=mask, other=0.0),
        tl.load(tensor + 3 * i + 1, mask=mask, other=0.0),
        tl.load(tensor + 3 * i + 2, mask=mask, other=0.0),
    )


@triton.jit
def _load_quats(quats, i, mask):
    return (
        tl.load(quats + 4 * i, mask=mask, other=1.0),
        tl.load(quats + 4 * i + 1, mask=mask, other=0.0),
        tl.load(quats + 4 * i + 2, mask=mask, other=0.0),
        tl.load(quats + 4 * i + 3, mask=mask, other=0.0),
    )


@triton.jit
def _reaches(
    mx, my, mz, log_s0, log_s1, log_s2, valid,
    w00, w01, w02, w10, w11, w12, w20, w21, w22, t0, t1, t2, largest_t,
    focal_x, focal_y, centre_x, centre_y, width, height, near, far,
    reach_x, reach_y, error_reach_x, error_reach_y, blur_reach, move, POSITION_ERROR: tl.constexpr,
):  # fmt: skip
    """Which rows may reach the picture by `_View.half_spaces`, which close to the camera say more than rectangles;
    their position in camera space and its error, and their scales."""
    x = w00 * mx + w01 * my + w02 * mz + t0
    y = w10 * mx + w11 * my + w12 * mz + t1
    z = w20 * mx + w21 * my + w22 * mz + t2
    error = move + POSITION_ERROR * (tl.abs(mx) + tl.abs(my) + tl.abs(mz) + largest_t)
    drawn = valid & (z >= near - error) & (z <= far + error)
    s0, s1, s2 = tl.exp(log_s0), tl.exp(log_s1), tl.exp(log_s2)
    largest_scale = tl.maximum(s0, tl.maximum(s1, s2))
    ball_x = reach_x * largest_scale + error_reach_x * error
    ball_y = reach_y * largest_scale + error_reach_y * error
    drawn &= (focal_x * x + (centre_x + blur_reach) * z + ball_x >= 0) & (
        -focal_x * x + (width - centre_x + blur_reach) * z + ball_x >= 0
    )
    drawn &= (focal_y * y + (centre_y + blur_reach) * z + ball_y >= 0) & (
        -focal_y * y + (height - centre_y + blur_reach) * z + ball_y >= 0
    )
    return drawn, x, y, z, error, s0, s1, s2


@triton.jit
def _rectangles(
    qw, qx, qy, qz, logit, drawn, x, y, z, error, s0, s1, s2,
    w00, w01, w02, w10, w11, w12, w20, w21, w22,
    focal_x, focal_y, centre_x, centre_y, width, height, low_x, high_x, low_y, high_y, near,
    turn_margin, growth, margin_opacities, margin_pixels, eps2d,
    COVARIANCE_ERROR: tl.constexpr, RELATIVE: tl.constexpr, OPAQUE_EXTENT: tl.constexpr, ANTIALIASED: tl.constexpr,
):  # fmt: skip
    """Which of the rows that `_reaches` has left may be drawn, and the borders of their rectangles in pixels: left,
    right, top, bottom."""
    largest_scale = tl.maximum(s0, tl.maximum(s1, s2))
    # Of the positions within the error only those behind the near plane can be drawn.
    z = tl.maximum(z, near)
    relative_move = error / tl.maximum(z - error, near)
    slope_x, slope_y = x / z, y / z

    # Scaled before squaring, so that no quaternion is too short for float32; one of length zero is the identity.
    largest = tl.maximum(tl.maximum(tl.abs(qw), tl.abs(qx)), tl.maximum(tl.abs(qy), tl.abs(qz)))
    scale = tl.where(largest > 0, largest, 1.0)
    qw, qx, qy, qz = qw / scale, qx / scale, qy / scale, qz / scale
    unit_norm = tl.sqrt(qw * qw + qx * qx + qy * qy + qz * qz)
    norm = unit_norm * largest
    nonzero = norm >= 1e-19
    inverse = tl.where(nonzero, 1 / tl.maximum(unit_norm, 0.5), 0.0)
    qw = tl.where(nonzero, qw * inverse, 1.0)
    qx, qy, qz = qx * inverse, qy * inverse, qz * inverse
    r00, r01, r02 = 1 - 2 * (qy * qy + qz * qz), 2 * (qx * qy - qw * qz), 2 * (qx * qz + qw * qy)
    r10, r11, r12 = 2 * (qx * qy + qw * qz), 1 - 2 * (qx * qx + qz * qz), 2 * (qy * qz - qw * qx)
    r20, r21, r22 = 2 * (qx * qz - qw * qy), 2 * (qy * qz + qw * qx), 1 - 2 * (qx * qx + qy * qy)
    turn = tl.minimum(2 * turn_margin / tl.maximum(norm, 1e-18), 2.0)

    x0, x1, x2, xx, rounding_x, change_x = _image_extent(
        slope_x, low_x, high_x, focal_x, w00, w01, w02, w20, w21, w22, z, relative_move, turn, largest_scale,
        r00, r01, r02, r10, r11, r12, r20, r21, r22, s0, s1, s2, COVARIANCE_ERROR,
    )  # fmt: skip
    y0, y1, y2, yy, rounding_y, change_y = _image_extent(
        slope_y, low_y, high_y, focal_y, w10, w11, w12, w20, w21, w22, z, relative_move, turn, largest_scale,
        r00, r01, r02, r10, r11, r12, r20, r21, r22, s0, s1, s2, COVARIANCE_ERROR,
    )  # fmt: skip

    opacity255 = 255 * (1 + RELATIVE) / (1 + tl.exp(-(logit + margin_opacities)))
    if ANTIALIASED:  # `_View.largest_compensation`
        length_x, length_y = tl.sqrt(xx), tl.sqrt(yy)
        xy = x0 * y0 + x1 * y1 + x2 * y2
        area = tl.sqrt(tl.maximum(xx * yy - xy * xy, 0.0))
        area += change_x * length_y + change_y * length_x + change_x * change_y
        lowest_x = tl.maximum(length_x - change_x, 0.0) / growth
        lowest_y = tl.maximum(length_y - change_y, 0.0) / growth
        rounding = 2 * (rounding_x * yy + rounding_y * xx) + rounding_x * rounding_y + 1e-6 * xx * yy
        root = growth * growth * area
        determinant = root * root + rounding
        blur = eps2d * (lowest_x * lowest_x + lowest_y * lowest_y) + eps2d * eps2d
        opacity255 *= tl.sqrt(determinant / tl.maximum(determinant + blur - 2 * rounding, 1e-30))
    drawn &= opacity255 >= 1
    extent = tl.sqrt(2 * (tl.log(tl.maximum(opacity255, 1.0)) + RELATIVE))
    extent = tl.minimum(extent, OPAQUE_EXTENT) * (1 + RELATIVE)
    left, right = _interval(
        slope_x, focal_x, centre_x, width, xx, rounding_x, change_x, extent, growth, relative_move, margin_pixels,
        eps2d, RELATIVE,
    )  # fmt: skip
    top, bottom = _interval(
        slope_y, focal_y, centre_y, height, yy, rounding_y, change_y, extent, growth, relative_move, margin_pixels,
        eps2d, RELATIVE,
    )  # fmt: skip
    drawn &= (right > 0) & (left < width) & (bottom > 0) & (top < height)
    return drawn, left, right, top, bottom


@triton.jit
def _current(w, first_moment, second_moment, at, mask, sizes, eps):
    """A column after the skipped steps, of rows whose moments lie there."""
    m = tl.load(first_moment + at, mask=mask, other=0.0)
    v = tl.load(second_moment + at, mask=mask, other=0.0)
    return caught_up(w, m, v, sizes, eps)


@triton.jit(do_not_specialize=["num_gaussians", "capacity"])  # or each new kind of number would compile it again
def _mark_visible(
    means, scales, quats, opacities, drawn_flags, num_gaussians,
    lag_move, lag_reach_x, lag_reach_y,
    means_m, means_v, scales_m, scales_v, quats_m, quats_v, opacities_m, opacities_v, stamps,  # None: rows are current
    sums, multipliers, capacity, eps, SCHEDULES: tl.constexpr, NUM_COLUMNS: tl.constexpr,
    w00, w01, w02, w10, w11, w12, w20, w21, w22, t0, t1, t2, largest_t,
    focal_x, focal_y, centre_x, centre_y, width, height, low_x, high_x, low_y, high_y, near, far,
    reach_x, reach_y, error_reach_x, error_reach_y, blur_reach,
    move, turn_margin, growth, margin_opacities, margin_pixels, eps2d,
    POSITION_ERROR: tl.constexpr, COVARIANCE_ERROR: tl.constexpr, RELATIVE: tl.constexpr,
    OPAQUE_EXTENT: tl.constexpr, ANTIALIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_gaussians
    mx, my, mz = _load3(means, i, inside)
    log_s0, log_s1, log_s2 = _load3(scales, i, inside)
    near_by, x, y, z, error, s0, s1, s2 = _reaches(
        mx, my, mz, log_s0, log_s1, log_s2, inside,
        w00, w01, w02, w10, w11, w12, w20, w21, w22, t0, t1, t2, largest_t,
        focal_x, focal_y, centre_x, centre_y, width, height, near, far,
        lag_reach_x, lag_reach_y, error_reach_x, error_reach_y, blur_reach, lag_move, POSITION_ERROR,
    )  # fmt: skip
    if tl.max(near_by.to(tl.int32), axis=0) > 0:  # of rows in Morton order most blocks are far away as a whole
        qw, qx, qy, qz = _load_quats(quats, i, near_by)
        logit = tl.load(opacities + i, mask=near_by, other=0.0)
        if stamps is not None:
            stamp = tl.load(stamps + i, mask=near_by, other=0)
            sizes = skipped_sizes(sums, multipliers, capacity, stamp, near_by, SCHEDULES, NUM_COLUMNS)
            mx = _current(mx, means_m, means_v, 3 * i, near_by, sizes, eps)
            my = _current(my, means_m, means_v, 3 * i + 1, near_by, sizes, eps)
            mz = _current(mz, means_m, means_v, 3 * i + 2, near_by, sizes, eps)
            sizes = skipped_sizes(sums, multipliers + SCALES, capacity, stamp, near_by, SCHEDULES, NUM_COLUMNS)
            log_s0 = _current(log_s0, scales_m, scales_v, 3 * i, near_by, sizes, eps)
            log_s1 = _current(log_s1, scales_m, scales_v, 3 * i + 1, near_by, sizes, eps)
            log_s2 = _current(log_s2, scales_m, scales_v, 3 * i + 2, near_by, sizes, eps)
            sizes = skipped_sizes(sums, multipliers + QUATS, capacity, stamp, near_by, SCHEDULES, NUM_COLUMNS)
            qw = _current(qw, quats_m, quats_v, 4 * i, near_by, sizes, eps)
            qx = _current(qx, quats_m, quats_v, 4 * i + 1, near_by, sizes, eps)
            qy = _current(qy, quats_m, quats_v, 4 * i + 2, near_by, sizes, eps)
            qz = _current(qz, quats_m, quats_v, 4 * i + 3, near_by, sizes, eps)
            sizes = skipped_sizes(sums, multipliers + OPACITIES, capacity, stamp, near_by, SCHEDULES, NUM_COLUMNS)
            logit = _current(logit, opacities_m, opacities_v, i, near_by, sizes, eps)
            near_by, x, y, z, error, s0, s1, s2 = _reaches(
                mx, my, mz, log_s0, log_s1, log_s2, near_by,
                w00, w01, w02, w10, w11, w12, w20, w21, w22, t0, t1, t2, largest_t,
                focal_x, focal_y, centre_x, centre_y, width, height, near, far,
                reach_x, reach_y, error_reach_x, error_reach_y, blur_reach, move, POSITION_ERROR,
            )  # fmt: skip
        drawn, _left, _right, _top, _bottom = _rectangles(
            qw, qx, qy, qz, logit, near_by, x, y, z, error, s0, s1, s2,
            w00, w01, w02, w10, w11, w12, w20, w21, w22,
            focal_x, focal_y, centre_x, centre_y, width, height, low_x, high_x, low_y, high_y, near,
            turn_margin, growth, margin_opacities, margin_pixels, eps2d,
            COVARIANCE_ERROR, RELATIVE, OPAQUE_EXTENT, ANTIALIASED,
        )  # fmt: skip
        tl.store(drawn_flags + i, drawn.to(tl.uint8), mask=drawn)


@triton.jit(do_not_specialize=["num_rows", "rows", "plane"])
def _cover_cells(
    means, scales, quats, opacities, ids, cells, corners, num_rows, rows, plane, cell, columns, lines,
    w00, w01, w02, w10, w11, w12, w20, w21, w22, t0, t1, t2, largest_t,
    focal_x, focal_y, centre_x, centre_y, width, height, low_x, high_x, low_y, high_y, near, far,
    reach_x, reach_y, error_reach_x, error_reach_y, blur_reach,
    move, turn_margin, growth, margin_opacities, margin_pixels, eps2d,
    POSITION_ERROR: tl.constexpr, COVARIANCE_ERROR: tl.constexpr, RELATIVE: tl.constexpr,
    OPAQUE_EXTENT: tl.constexpr, ANTIALIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`cells` [4, num_rows] and `corners` [4, columns + 1, lines + 1] of `culling.CoveredCells`; a plane of the latter
    has so many numbers, a row of it `rows`."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = j < num_rows
    i = tl.load(ids + j, mask=valid, other=0)
    mx, my, mz = _load3(means, i, valid)
    log_s0, log_s1, log_s2 = _load3(scales, i, valid)
    drawn, x, y, z, error, s0, s1, s2 = _reaches(
        mx, my, mz, log_s0, log_s1, log_s2, valid,
        w00, w01, w02, w10, w11, w12, w20, w21, w22, t0, t1, t2, largest_t,
        focal_x, focal_y, centre_x, centre_y, width, height, near, far,
        reach_x, reach_y, error_reach_x, error_reach_y, blur_reach, move, POSITION_ERROR,
    )  # fmt: skip
    qw, qx, qy, qz = _load_quats(quats, i, drawn)
    logit = tl.load(opacities + i, mask=drawn, other=0.0)
    drawn, left, right, top, bottom = _rectangles(
        qw, qx, qy, qz, logit, drawn, x, y, z, error, s0, s1, s2,
        w00, w01, w02, w10, w11, w12, w20, w21, w22,
        focal_x, focal_y, centre_x, centre_y, width, height, low_x, high_x, low_y, high_y, near,
        turn_margin, growth, margin_opacities, margin_pixels, eps2d,
        COVARIANCE_ERROR, RELATIVE, OPAQUE_EXTENT, ANTIALIASED,
    )  # fmt: skip
    # Cut while they are floats, which may be beyond any integer.
    x0 = tl.where(drawn, tl.floor(tl.maximum(left / cell, 0.0)), columns).to(tl.int32)
    x1 = tl.where(drawn, tl.ceil(tl.minimum(right / cell, columns)), 0.0).to(tl.int32)
    y0 = tl.where(drawn, tl.floor(tl.maximum(top / cell, 0.0)), lines).to(tl.int32)
    y1 = tl.where(drawn, tl.ceil(tl.minimum(bottom / cell, lines)), 0.0).to(tl.int32)
    tl.store(cells + j, x0.to(tl.int16), mask=valid)
    tl.store(cells + num_rows + j, x1.to(tl.int16), mask=valid)
    tl.store(cells + 2 * num_rows + j, y0.to(tl.int16), mask=valid)
    tl.store(cells + 3 * num_rows + j, y1.to(tl.int16), mask=valid)
    tl.atomic_add(corners + x0 * rows + y0, 1, mask=drawn)
    tl.atomic_add(corners + plane + x0 * rows + y1, 1, mask=drawn)
    tl.atomic_add(corners + 2 * plane + x1 * rows + y0, 1, mask=drawn)
    tl.atomic_add(corners + 3 * plane + x1 * rows + y1, 1, mask=drawn)
