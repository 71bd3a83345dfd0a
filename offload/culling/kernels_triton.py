"""`offload/culling/kernels.py` as CUDA kernels in Triton: one pass over the geometry.

The test of single Gaussians reads 24 bytes of each of N Gaussians and camera, and 60 more where one in its block may
reach the picture: 0.1 ms for 18 million at 4 TB/s. To find the cells that rows may draw in writes 8 bytes of each.
The formulas and what each bound is for stand in `offload/csrc/culling_kernels.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.deferral_triton import caught_up, skipped_sizes
from offload.adam.geometry import COLUMNS, GeometryState
from offload.adam.geometry_triton import OPACITIES, QUATS, SCALES
from offload.backends import native
from offload.culling.cameras import Cameras, Margin, pack
from offload.culling.cells import CoveredCells, grid_of

BLOCK = 256  # rows

# Where a packed camera has its numbers.
ROTATION = tl.constexpr(native.CAMERA_FIELDS["rotation"])
TRANSLATION = tl.constexpr(native.CAMERA_FIELDS["translation"])
LARGEST_TRANSLATION = tl.constexpr(native.CAMERA_FIELDS["largest_translation"])
FOCAL = tl.constexpr(native.CAMERA_FIELDS["focal"])
CENTRE = tl.constexpr(native.CAMERA_FIELDS["centre"])
SIZE = tl.constexpr(native.CAMERA_FIELDS["size"])
SLOPE_LOW = tl.constexpr(native.CAMERA_FIELDS["slope_low"])
SLOPE_HIGH = tl.constexpr(native.CAMERA_FIELDS["slope_high"])
NEAR_PLANE = tl.constexpr(native.CAMERA_FIELDS["near_plane"])
FAR_PLANE = tl.constexpr(native.CAMERA_FIELDS["far_plane"])
REACH = tl.constexpr(native.CAMERA_FIELDS["reach"])
ERROR_REACH = tl.constexpr(native.CAMERA_FIELDS["error_reach"])
BLUR_REACH = tl.constexpr(native.CAMERA_FIELDS["blur_reach"])
EPS2D = tl.constexpr(native.CAMERA_FIELDS["eps2d"])
MOVE = tl.constexpr(native.CAMERA_FIELDS["move"])
TURN = tl.constexpr(native.CAMERA_FIELDS["turn"])
GROWTH = tl.constexpr(native.CAMERA_FIELDS["growth"])
LOGIT_GAIN = tl.constexpr(native.CAMERA_FIELDS["logit_gain"])
EXTRA_PIXELS = tl.constexpr(native.CAMERA_FIELDS["extra_pixels"])

OPAQUE_EXTENT = tl.constexpr(native.OPAQUE_EXTENT)
POSITION_ERROR = tl.constexpr(native.POSITION_ERROR)
COVARIANCE_ERROR = tl.constexpr(native.COVARIANCE_ERROR)
RELATIVE_ERROR = tl.constexpr(native.RELATIVE_ERROR)
LOGIT_THRESHOLD = tl.constexpr(-math.log(254))  # of an opacity of 1/255


def visible_ids(
    state: GeometryState, tables: DeferralTables, cameras: Cameras, margin: Margin, lag_margin: Margin
) -> Tensor:
    """Find the rows that any of the cameras may draw, as `offload.culling.kernels.visible_ids`."""
    means, scales, quats, opacities = (state.parameters[name].contiguous() for name in COLUMNS)
    moments = [array[name] for name in COLUMNS for array in (state.exp_avg, state.exp_avg_sq)]
    drawn = torch.zeros(len(means), dtype=torch.uint8, device=means.device)
    if len(means):
        packed = np.concatenate([pack(cameras, lag_margin), pack(cameras, margin)])
        arguments = as_arguments(packed, means.device)
        num_cameras = len(arguments) // 2
        for lagging, camera in zip(arguments[:num_cameras], arguments[num_cameras:], strict=True):
            _mark_visible[(triton.cdiv(len(means), BLOCK),)](
                means, scales, quats, opacities, *moments, state.last_step, tables.sums, tables.multipliers,
                tables.sums.shape[1], tables.eps, len(means), lagging, camera, drawn, *tables.multipliers.shape,
                ANTIALIASED=cameras.antialiased, BLOCK=BLOCK,
            )  # fmt: skip
    return drawn.nonzero().squeeze(1)


def visible_balls(balls: Tensor, cameras: Cameras, margin: Margin) -> Tensor:
    """Find the rows whose balls any of the cameras may draw, as `offload.culling.kernels.visible_balls`."""
    return _marked_by(_mark_balls, balls, balls.shape[1], cameras, margin)


def visible_rows(rows: Tensor, cameras: Cameras, margin: Margin) -> Tensor:
    """Find the rows whose balls any of the cameras may draw, as `offload.culling.kernels.visible_rows`."""
    return _marked_by(_mark_rows, rows, rows.shape[0], cameras, margin)


def _marked_by(kernel: Any, values: Tensor, num_rows: int, cameras: Cameras, margin: Margin) -> Tensor:
    """Return the ids of what a kernel marks for any of the cameras, among so many rows that these values hold."""
    drawn = torch.empty(num_rows, dtype=torch.uint8, device=values.device)
    if num_rows:
        for index, camera in enumerate(as_arguments(pack(cameras, margin), values.device)):
            kernel[(-(-num_rows // BLOCK),)](
                values, values.stride(0), num_rows, camera, drawn, FIRST=index == 0, BLOCK=BLOCK
            )
    return drawn.nonzero().squeeze(1)


def covered_cells(parameters: Mapping[str, Tensor], cameras: Cameras, margin: Margin, cell: int) -> list[CoveredCells]:
    """Find where rows may draw, for each camera, as `offload.culling.kernels.covered_cells`."""
    means, scales, quats, opacities = (parameters[name].contiguous() for name in COLUMNS)
    num_rows, device = len(means), means.device
    columns, lines = grid_of(cameras, cell)
    found = []
    for camera in as_arguments(pack(cameras, margin), device):
        cells = torch.empty(4, num_rows, dtype=torch.int16, device=device)
        corners = torch.zeros(4, columns + 1, lines + 1, dtype=torch.int32, device=device)
        if num_rows:
            _cover_cells[(triton.cdiv(num_rows, BLOCK),)](
                means, scales, quats, opacities, num_rows, camera, float(cell), columns, lines, cells, corners,
                ANTIALIASED=cameras.antialiased, BLOCK=BLOCK,
            )  # fmt: skip
        found.append(CoveredCells(cells, corners.cpu().numpy().astype(np.int64).reshape(2, 2, columns + 1, lines + 1)))
    return found


def rows_in_boxes(cells: Tensor, boxes: Sequence[tuple[int, int, int, int]]) -> tuple[list[Tensor], Tensor]:
    """Find the rows that may draw in boxes of cells, as `offload.culling.kernels.rows_in_boxes`; waits."""
    first_x, end_x, first_y, end_y = cells
    met = torch.zeros_like(first_x, dtype=torch.uint8)
    chosen = []
    for left, right, top, bottom in boxes:
        meets = (first_x < right) & (end_x > left) & (first_y < bottom) & (end_y > top)
        met += meets
        met.clamp_(max=2)
        chosen.append(meets.nonzero().squeeze(1))
    return chosen, (met > 1).nonzero().squeeze(1)


# A kernel takes a packed camera as one tuple of numbers, which travel with the launch for nothing. Triton 3.2, that of
# torch 2.6, knows no tuples: there the camera is a tensor, sent before the launch, for which nobody waits.
_TAKES_TUPLES = hasattr(tl, "tuple")


def as_arguments(packed: np.ndarray, device: torch.device) -> Sequence[tuple[float, ...] | Tensor]:
    """Make packed cameras [C, native.CAMERA_FLOATS] what kernels take."""
    if _TAKES_TUPLES:
        return list(map(tuple, packed.tolist()))
    cameras = torch.from_numpy(packed)
    return list(cameras.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else cameras)


@triton.jit
def _of_tuple(camera, FIELD: tl.constexpr):
    return camera[FIELD]


@triton.jit
def _of_tensor(camera, FIELD: tl.constexpr):
    return tl.load(camera + FIELD)


number = _of_tuple if _TAKES_TUPLES else _of_tensor  # of a packed camera


@triton.jit
def _load3(tensor, i, mask):
    """Load rows i of a tensor [N, 3]."""
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
def _axis(camera, row: tl.constexpr):
    """Load one of the camera's axes in world coordinates: a row of the rotation."""
    w0 = number(camera, ROTATION + 3 * row)
    w1 = number(camera, ROTATION + 3 * row + 1)
    w2 = number(camera, ROTATION + 3 * row + 2)
    return w0, w1, w2


@triton.jit
def _coordinate(camera, row: tl.constexpr, mx, my, mz):
    """Compute a coordinate of means in camera space."""
    w0, w1, w2 = _axis(camera, row)
    return w0 * mx + w1 * my + w2 * mz + number(camera, TRANSLATION + row)


@triton.jit
def _between_borders(camera, AXIS: tl.constexpr, x, z, largest_scale, error):
    """Tell whether a ball of the largest scale may reach the picture from both of its borders along an axis."""
    ball = number(camera, REACH + AXIS) * largest_scale + number(camera, ERROR_REACH + AXIS) * error
    focal = number(camera, FOCAL + AXIS)
    centre = number(camera, CENTRE + AXIS)
    size = number(camera, SIZE + AXIS)
    blur_reach = number(camera, BLUR_REACH)
    return (focal * x + (centre + blur_reach) * z + ball >= 0) & (
        -focal * x + (size - centre + blur_reach) * z + ball >= 0
    )


@triton.jit
def _reaches(camera, mx, my, mz, log_s0, log_s1, log_s2, valid):
    """Tell which rows may reach the picture by the camera's half spaces, which close to it say more than rectangles.

    Returned with them are their position in camera space and its error, and their scales.
    """
    x = _coordinate(camera, 0, mx, my, mz)
    y = _coordinate(camera, 1, mx, my, mz)
    z = _coordinate(camera, 2, mx, my, mz)
    size = tl.abs(mx) + tl.abs(my) + tl.abs(mz) + number(camera, LARGEST_TRANSLATION)
    error = number(camera, MOVE) + POSITION_ERROR * size
    drawn = valid & (z >= number(camera, NEAR_PLANE) - error) & (z <= number(camera, FAR_PLANE) + error)
    s0, s1, s2 = tl.exp(log_s0), tl.exp(log_s1), tl.exp(log_s2)
    largest_scale = tl.maximum(s0, tl.maximum(s1, s2))
    drawn &= _between_borders(camera, 0, x, z, largest_scale, error)
    drawn &= _between_borders(camera, 1, y, z, largest_scale, error)
    return drawn, x, y, z, error, s0, s1, s2


@triton.jit(do_not_specialize=["stride", "num_rows"])
def _mark_balls(
    balls,  # [5, N]: x, y, z, the largest log scale, the logit opacity
    stride,  # between two of these five
    num_rows,  # N
    camera,
    drawn,  # [N] uint8
    FIRST: tl.constexpr,  # whether no camera has written to it before
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < num_rows
    mx = tl.load(balls + i, mask=valid, other=0.0)
    my = tl.load(balls + stride + i, mask=valid, other=0.0)
    mz = tl.load(balls + 2 * stride + i, mask=valid, other=0.0)
    log_scale = tl.load(balls + 3 * stride + i, mask=valid, other=0.0)
    logit = tl.load(balls + 4 * stride + i, mask=valid, other=0.0)
    reaches, _x, _y, _z, _error, _s0, _s1, _s2 = _reaches(camera, mx, my, mz, log_scale, log_scale, log_scale, valid)
    reaches &= logit >= LOGIT_THRESHOLD - RELATIVE_ERROR - number(camera, LOGIT_GAIN)
    if FIRST:
        tl.store(drawn + i, reaches.to(tl.uint8), mask=valid)
    else:
        tl.store(drawn + i, 1, mask=reaches)


@triton.jit
def _column(values, lane, column: tl.constexpr):
    """Return a column of values [BLOCK, 4]."""
    return tl.sum(tl.where(lane == column, values, 0.0), axis=1)


@triton.jit(do_not_specialize=["num_rows"])
def _mark_rows(
    rows,  # N of geometry: means, log scales, quats, the logit opacity
    PITCH: tl.constexpr,  # between two of them; of an argument that is 28 Triton would not know that 4 divide it
    num_rows,  # N
    camera,
    drawn,  # [N] uint8
    FIRST: tl.constexpr,  # whether no camera has written to it before
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < num_rows
    place, lane = rows + i * PITCH, tl.arange(0, 4)[None, :]
    # 16 bytes at once, which one thread has: no other way gives as few loads and no exchange between threads.
    first = tl.load(place[:, None] + lane, mask=valid[:, None], other=0.0)
    second = tl.load(place[:, None] + (4 + lane), mask=valid[:, None], other=0.0)
    mx, my, mz, s0 = _column(first, lane, 0), _column(first, lane, 1), _column(first, lane, 2), _column(first, lane, 3)
    s1, s2 = _column(second, lane, 0), _column(second, lane, 1)
    reaches, _x, _y, _z, _error, _s0, _s1, _s2 = _reaches(camera, mx, my, mz, s0, s1, s2, valid)
    logit = tl.load(place + 10, mask=reaches, other=0.0)
    reaches &= logit >= LOGIT_THRESHOLD - RELATIVE_ERROR - number(camera, LOGIT_GAIN)
    if FIRST:
        tl.store(drawn + i, reaches.to(tl.uint8), mask=valid)
    else:
        tl.store(drawn + i, 1, mask=reaches)


@triton.jit
def _image_extent(
    camera, AXIS: tl.constexpr, raw_slope, z, relative_move, turn, r00, r01, r02, r10, r11, r12, r20, r21, r22,
    s0, s1, s2,
):  # fmt: skip
    """Compute a row of J W Q S in pixels.

    Returned with it are its length squared, the rounding error of that, and by how much the length may grow when the
    centre moves and the axes turn.
    """
    low = number(camera, SLOPE_LOW + AXIS)
    high = number(camera, SLOPE_HIGH + AXIS)
    w0, w1, w2 = _axis(camera, AXIS)
    v0, v1, v2 = _axis(camera, 2)
    slope = tl.minimum(tl.maximum(raw_slope, low), high)
    slope_change = tl.minimum(relative_move * (1 + tl.abs(raw_slope)), high - low)
    length = tl.sqrt(1 + slope * slope)
    length_change = relative_move * (1 + tl.abs(slope)) + (1 + relative_move) * slope_change
    focal_z = number(camera, FOCAL + AXIS) / z
    j0, j1, j2 = w0 - slope * v0, w1 - slope * v1, w2 - slope * v2
    a0 = focal_z * s0 * (j0 * r00 + j1 * r10 + j2 * r20)
    a1 = focal_z * s1 * (j0 * r01 + j1 * r11 + j2 * r21)
    a2 = focal_z * s2 * (j0 * r02 + j1 * r12 + j2 * r22)
    variance = a0 * a0 + a1 * a1 + a2 * a2
    reach = focal_z * length
    rounding = COVARIANCE_ERROR * reach * reach * (s0 * s0 + s1 * s1 + s2 * s2)
    largest_scale = tl.maximum(s0, tl.maximum(s1, s2))
    change = largest_scale * focal_z * (length_change + (length + length_change) * turn)
    return a0, a1, a2, variance, rounding, change


@triton.jit
def _interval(camera, AXIS: tl.constexpr, slope, variance, rounding, change, extent, relative_move):
    """Compute where the rectangle around the centre begins and ends along one axis, in pixels."""
    focal = number(camera, FOCAL + AXIS)
    centre = number(camera, CENTRE + AXIS)
    size = number(camera, SIZE + AXIS)
    sigma = number(camera, GROWTH) * (tl.sqrt(variance + rounding) + change)
    radius = extent * tl.sqrt(sigma * sigma + number(camera, EPS2D))
    offset = focal * slope
    half = (
        tl.ceil(radius + 1e-4)
        + number(camera, EXTRA_PIXELS)
        + RELATIVE_ERROR * (radius + tl.abs(offset))
        + focal * relative_move * (1 + tl.abs(slope))
        + 1e-6 * (tl.abs(centre) + size)
    )
    return offset + centre - half, offset + centre + half


@triton.jit
def _largest_compensation(camera, x0, x1, x2, xx, rounding_x, change_x, y0, y1, y2, yy, rounding_y, change_y):
    """Bound the factor by which Mip-Splatting lowers opacities, from what `_image_extent` gives along x and y."""
    growth = number(camera, GROWTH)
    eps2d = number(camera, EPS2D)
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
    return tl.sqrt(determinant / tl.maximum(determinant + blur - 2 * rounding, 1e-30))


@triton.jit
def _rectangles(camera, qw, qx, qy, qz, logit, drawn, x, y, z, error, s0, s1, s2, ANTIALIASED: tl.constexpr):
    """Tell which of the rows that `_reaches` has left may be drawn.

    Returned with them are the borders of their rectangles in pixels: left, right, top, bottom.
    """
    # Of the positions within the error only those behind the near plane can be drawn.
    near = number(camera, NEAR_PLANE)
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
    turn = tl.minimum(2 * number(camera, TURN) / tl.maximum(norm, 1e-18), 2.0)

    x0, x1, x2, xx, rounding_x, change_x = _image_extent(
        camera, 0, slope_x, z, relative_move, turn, r00, r01, r02, r10, r11, r12, r20, r21, r22, s0, s1, s2
    )
    y0, y1, y2, yy, rounding_y, change_y = _image_extent(
        camera, 1, slope_y, z, relative_move, turn, r00, r01, r02, r10, r11, r12, r20, r21, r22, s0, s1, s2
    )
    opacity255 = 255 * (1 + RELATIVE_ERROR) / (1 + tl.exp(-(logit + number(camera, LOGIT_GAIN))))
    if ANTIALIASED:
        opacity255 *= _largest_compensation(
            camera, x0, x1, x2, xx, rounding_x, change_x, y0, y1, y2, yy, rounding_y, change_y
        )
    drawn &= opacity255 >= 1
    extent = tl.sqrt(2 * (tl.log(tl.maximum(opacity255, 1.0)) + RELATIVE_ERROR))
    extent = tl.minimum(extent, OPAQUE_EXTENT) * (1 + RELATIVE_ERROR)
    left, right = _interval(camera, 0, slope_x, xx, rounding_x, change_x, extent, relative_move)
    top, bottom = _interval(camera, 1, slope_y, yy, rounding_y, change_y, extent, relative_move)
    width, height = number(camera, SIZE), number(camera, SIZE + 1)
    drawn &= (right > 0) & (left < width) & (bottom > 0) & (top < height)
    return drawn, left, right, top, bottom


@triton.jit
def _current(w, first_moment, second_moment, at, mask, sizes, eps):
    """Compute a column after the skipped steps, of rows whose moments lie there."""
    m = tl.load(first_moment + at, mask=mask, other=0.0)
    v = tl.load(second_moment + at, mask=mask, other=0.0)
    return caught_up(w, m, v, sizes, eps)


@triton.jit(do_not_specialize=["num_gaussians", "capacity"])  # or each new kind of number would compile it again
def _mark_visible(
    means, scales, quats, opacities,  # [N, ...] after each row's last update
    means_m, means_v, scales_m, scales_v, quats_m, quats_v, opacities_m, opacities_v,  # moments, likewise
    last_step,  # [N]
    sums,  # [SCHEDULES, capacity] float64
    multipliers,  # [SCHEDULES, NUM_COLUMNS]
    capacity,
    eps,
    num_gaussians,  # N
    lagging,  # the packed camera, with the margin of rows that lag behind
    camera,  # the same with the margin of current rows
    drawn_flags,  # [N], set to 1 where a row may be drawn
    SCHEDULES: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    ANTIALIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_gaussians
    mx, my, mz = _load3(means, i, inside)
    log_s0, log_s1, log_s2 = _load3(scales, i, inside)
    near_by, _x, _y, _z, _error, _s0, _s1, _s2 = _reaches(lagging, mx, my, mz, log_s0, log_s1, log_s2, inside)
    if tl.max(near_by.to(tl.int32), axis=0) > 0:  # of rows in Morton order most blocks are far away as a whole
        step = tl.load(last_step + i, mask=near_by, other=0)
        sizes = skipped_sizes(sums, multipliers, capacity, step, near_by, SCHEDULES, NUM_COLUMNS)
        mx = _current(mx, means_m, means_v, 3 * i, near_by, sizes, eps)
        my = _current(my, means_m, means_v, 3 * i + 1, near_by, sizes, eps)
        mz = _current(mz, means_m, means_v, 3 * i + 2, near_by, sizes, eps)
        sizes = skipped_sizes(sums, multipliers + SCALES, capacity, step, near_by, SCHEDULES, NUM_COLUMNS)
        log_s0 = _current(log_s0, scales_m, scales_v, 3 * i, near_by, sizes, eps)
        log_s1 = _current(log_s1, scales_m, scales_v, 3 * i + 1, near_by, sizes, eps)
        log_s2 = _current(log_s2, scales_m, scales_v, 3 * i + 2, near_by, sizes, eps)
        sizes = skipped_sizes(sums, multipliers + QUATS, capacity, step, near_by, SCHEDULES, NUM_COLUMNS)
        qw, qx, qy, qz = _load_quats(quats, i, near_by)
        qw = _current(qw, quats_m, quats_v, 4 * i, near_by, sizes, eps)
        qx = _current(qx, quats_m, quats_v, 4 * i + 1, near_by, sizes, eps)
        qy = _current(qy, quats_m, quats_v, 4 * i + 2, near_by, sizes, eps)
        qz = _current(qz, quats_m, quats_v, 4 * i + 3, near_by, sizes, eps)
        sizes = skipped_sizes(sums, multipliers + OPACITIES, capacity, step, near_by, SCHEDULES, NUM_COLUMNS)
        logit = tl.load(opacities + i, mask=near_by, other=0.0)
        logit = _current(logit, opacities_m, opacities_v, i, near_by, sizes, eps)
        near_by, x, y, z, error, s0, s1, s2 = _reaches(camera, mx, my, mz, log_s0, log_s1, log_s2, near_by)
        drawn, _left, _right, _top, _bottom = _rectangles(
            camera, qw, qx, qy, qz, logit, near_by, x, y, z, error, s0, s1, s2, ANTIALIASED
        )
        tl.store(drawn_flags + i, drawn.to(tl.uint8), mask=drawn)


@triton.jit(do_not_specialize=["num_rows", "columns", "lines"])
def _cover_cells(
    means, scales, quats, opacities,  # [V, ...]
    num_rows,  # V
    camera,  # packed
    cell,  # pixels
    columns, lines,  # of the grid
    cells,  # [4, V] int16 of `CoveredCells`, to be written
    corners,  # [4, columns + 1, lines + 1] int32, to be added to
    ANTIALIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_rows
    mx, my, mz = _load3(means, i, inside)
    log_s0, log_s1, log_s2 = _load3(scales, i, inside)
    drawn, x, y, z, error, s0, s1, s2 = _reaches(camera, mx, my, mz, log_s0, log_s1, log_s2, inside)
    qw, qx, qy, qz = _load_quats(quats, i, drawn)
    logit = tl.load(opacities + i, mask=drawn, other=0.0)
    drawn, left, right, top, bottom = _rectangles(
        camera, qw, qx, qy, qz, logit, drawn, x, y, z, error, s0, s1, s2, ANTIALIASED
    )
    # Cut while they are floats, which may be beyond any integer.
    end_x, end_y = columns.to(tl.float32), lines.to(tl.float32)
    x0 = tl.where(drawn, tl.floor(tl.maximum(left / cell, 0.0)), end_x).to(tl.int32)
    x1 = tl.where(drawn, tl.ceil(tl.minimum(right / cell, end_x)), 0.0).to(tl.int32)
    y0 = tl.where(drawn, tl.floor(tl.maximum(top / cell, 0.0)), end_y).to(tl.int32)
    y1 = tl.where(drawn, tl.ceil(tl.minimum(bottom / cell, end_y)), 0.0).to(tl.int32)
    tl.store(cells + i, x0.to(tl.int16), mask=inside)
    tl.store(cells + num_rows + i, x1.to(tl.int16), mask=inside)
    tl.store(cells + 2 * num_rows + i, y0.to(tl.int16), mask=inside)
    tl.store(cells + 3 * num_rows + i, y1.to(tl.int16), mask=inside)
    line_width = lines + 1
    plane = (columns + 1) * line_width
    tl.atomic_add(corners + x0 * line_width + y0, 1, mask=drawn)
    tl.atomic_add(corners + plane + x0 * line_width + y1, 1, mask=drawn)
    tl.atomic_add(corners + 2 * plane + x1 * line_width + y0, 1, mask=drawn)
    tl.atomic_add(corners + 3 * plane + x1 * line_width + y1, 1, mask=drawn)
