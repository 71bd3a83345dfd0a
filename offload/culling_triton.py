"""The test of single Gaussians of `offload/culling.py` as CUDA kernels in Triton: one pass over the geometry.

Reads 24 bytes of each of N Gaussians and camera, and 20 more where one in its block may reach the picture: 0.1 ms for
18 million at 4 TB/s. To find the cells that rows may draw in writes 8 bytes of each. The formulas and what each bound
is for stand in `culling._View`, whose constants the kernels take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.culling import COVARIANCE_ERROR, OPAQUE_EXTENT, POSITION_ERROR, RELATIVE

BLOCK = 256


def visible_ids(means: Tensor, scales: Tensor, quats: Tensor, opacities: Tensor, views: Sequence) -> Tensor:
    """Sorted int64 [V] of the rows that may be drawn in any of the views; waits for the device.

    Args:
        means: [N, 3]. scales: log scales [N, 3]. quats: [N, 4]. opacities: logit opacities [N]. All float32.
        views: Of `culling._View`.
    """
    drawn = torch.zeros(len(means), dtype=torch.uint8, device=means.device)
    means, scales, quats, opacities = (t.contiguous() for t in (means, scales, quats, opacities))
    if len(means):
        for view in views:
            numbers, constants = _of_view(view)
            grid = (triton.cdiv(len(means), BLOCK),)
            _mark_visible[grid](means, scales, quats, opacities, drawn, len(means), *numbers, **constants, BLOCK=BLOCK)
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
def _reaches(
    means, scales, i, valid,
    w00, w01, w02, w10, w11, w12, w20, w21, w22, t0, t1, t2, largest_t,
    focal_x, focal_y, centre_x, centre_y, width, height, near, far,
    reach_x, reach_y, error_reach_x, error_reach_y, blur_reach, move, POSITION_ERROR: tl.constexpr,
):  # fmt: skip
    """Which rows i may reach the picture by `_View.half_spaces`, which close to the camera say more than rectangles;
    their position in camera space and its error, and their scales."""
    mx = tl.load(means + 3 * i, mask=valid, other=0.0)
    my = tl.load(means + 3 * i + 1, mask=valid, other=0.0)
    mz = tl.load(means + 3 * i + 2, mask=valid, other=0.0)
    x = w00 * mx + w01 * my + w02 * mz + t0
    y = w10 * mx + w11 * my + w12 * mz + t1
    z = w20 * mx + w21 * my + w22 * mz + t2
    error = move + POSITION_ERROR * (tl.abs(mx) + tl.abs(my) + tl.abs(mz) + largest_t)
    drawn = valid & (z >= near - error) & (z <= far + error)
    s0 = tl.exp(tl.load(scales + 3 * i, mask=drawn, other=0.0))
    s1 = tl.exp(tl.load(scales + 3 * i + 1, mask=drawn, other=0.0))
    s2 = tl.exp(tl.load(scales + 3 * i + 2, mask=drawn, other=0.0))
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
    quats, opacities, i, drawn, x, y, z, error, s0, s1, s2,
    w00, w01, w02, w10, w11, w12, w20, w21, w22,
    focal_x, focal_y, centre_x, centre_y, width, height, low_x, high_x, low_y, high_y, near,
    turn_margin, growth, margin_opacities, margin_pixels, eps2d,
    COVARIANCE_ERROR: tl.constexpr, RELATIVE: tl.constexpr, OPAQUE_EXTENT: tl.constexpr, ANTIALIASED: tl.constexpr,
):  # fmt: skip
    """Which of the rows i that `_reaches` has left may be drawn, and the borders of their rectangles in pixels: left,
    right, top, bottom."""
    largest_scale = tl.maximum(s0, tl.maximum(s1, s2))
    # Of the positions within the error only those behind the near plane can be drawn.
    z = tl.maximum(z, near)
    relative_move = error / tl.maximum(z - error, near)
    slope_x, slope_y = x / z, y / z

    qw = tl.load(quats + 4 * i, mask=drawn, other=1.0)
    qx = tl.load(quats + 4 * i + 1, mask=drawn, other=0.0)
    qy = tl.load(quats + 4 * i + 2, mask=drawn, other=0.0)
    qz = tl.load(quats + 4 * i + 3, mask=drawn, other=0.0)
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

    logit = tl.load(opacities + i, mask=drawn, other=0.0)
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


@triton.jit(do_not_specialize=["num_gaussians"])  # or each new kind of number would compile it again
def _mark_visible(
    means, scales, quats, opacities, drawn_flags, num_gaussians,
    w00, w01, w02, w10, w11, w12, w20, w21, w22, t0, t1, t2, largest_t,
    focal_x, focal_y, centre_x, centre_y, width, height, low_x, high_x, low_y, high_y, near, far,
    reach_x, reach_y, error_reach_x, error_reach_y, blur_reach,
    move, turn_margin, growth, margin_opacities, margin_pixels, eps2d,
    POSITION_ERROR: tl.constexpr, COVARIANCE_ERROR: tl.constexpr, RELATIVE: tl.constexpr,
    OPAQUE_EXTENT: tl.constexpr, ANTIALIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    near_by, x, y, z, error, s0, s1, s2 = _reaches(
        means, scales, i, i < num_gaussians,
        w00, w01, w02, w10, w11, w12, w20, w21, w22, t0, t1, t2, largest_t,
        focal_x, focal_y, centre_x, centre_y, width, height, near, far,
        reach_x, reach_y, error_reach_x, error_reach_y, blur_reach, move, POSITION_ERROR,
    )  # fmt: skip
    if tl.max(near_by.to(tl.int32), axis=0) > 0:  # of rows in Morton order most blocks are far away as a whole
        drawn, _left, _right, _top, _bottom = _rectangles(
            quats, opacities, i, near_by, x, y, z, error, s0, s1, s2,
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
    drawn, x, y, z, error, s0, s1, s2 = _reaches(
        means, scales, i, valid,
        w00, w01, w02, w10, w11, w12, w20, w21, w22, t0, t1, t2, largest_t,
        focal_x, focal_y, centre_x, centre_y, width, height, near, far,
        reach_x, reach_y, error_reach_x, error_reach_y, blur_reach, move, POSITION_ERROR,
    )  # fmt: skip
    drawn, left, right, top, bottom = _rectangles(
        quats, opacities, i, drawn, x, y, z, error, s0, s1, s2,
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
