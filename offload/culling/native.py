"""Visible ids of cameras, from geometry alone: natively on the CPU, with torch operations on a device.

Both answer for gsplat's projection (1.5.3): a Gaussian is drawn where its depth lies between the planes, its opacity
(times the compensation of Mip-Splatting when antialiased) is at least 1/255, and a rectangle around its centre meets
the picture, of radii ceil(extent * sqrt(cov + eps2d)) with extent = min(3.33, sqrt(2 ln(255 opacity))). None that is
drawn is ever left out: every bound allows for float rounding, in the rasterizer and here, and for the margin. What is
returned in excess is a matter of that rounding, far below one percent without a margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.backends import native, num_threads
from offload.culling.cameras import Cameras, Margin

OPAQUE_EXTENT = 3.33  # standard deviations at which opacity 1 has fallen to 1/255
_LOGIT_THRESHOLD = -math.log(254)  # logit of 1/255
# What the rasterizer's and our float operations may be off, as in csrc/culling_kernels.cpp.
POSITION_ERROR = 5e-7  # of camera-space coordinates, relative to the summands
COVARIANCE_ERROR = 1e-6  # of image covariances, relative to the largest they could be
RELATIVE = 1e-5  # of everything else

# Rows whose temporaries live together on the device, about 24 bytes per row of the first test and 250 of the whole.
_REACH_CHUNK = 2**22
_WHOLE_CHUNK = 2**20
_CELLS_CHUNK = 2**19  # about 400 bytes per row


class BlockBounds:
    """Bounds of blocks of consecutive geometry rows, which let most of a large scene be culled without reading it.

    In Morton order a block is small. Holds 32 bytes per block of 256 rows, and the space that `visible_ids` works in.
    """

    def __init__(self, geometry: Tensor) -> None:
        """Args: geometry: [N, 12] float32 on the CPU, or these columns of wider rows: means, log scales, quats, logit
        opacities, unused."""
        self.rebuild(geometry)

    def rebuild(self, geometry: Tensor) -> None:
        """Bounds of all blocks, for any number of rows: after densification, or when all rows have moved."""
        blocks = -(-len(geometry) // native.BLOCK_ROWS)
        self.rows = len(geometry)
        self.bounds = torch.empty(blocks, 8)  # low 3, high 3 of the means; largest scale; unused
        self.bits = torch.empty(blocks * native.BLOCK_WORDS, dtype=torch.int64)  # one per row
        self.chunk_ends = torch.empty(-(-blocks // native.CHUNK_BLOCKS), dtype=torch.int64)
        native.compute_bounds(_rows(geometry), self.bounds.numpy(), num_threads())

    def update(self, geometry: Tensor, ids: Tensor) -> None:
        """Bounds of the blocks of the rows `ids` (sorted int64 [V]), which have moved."""
        self._check(geometry)
        if len(ids) and not 0 <= ids[0] <= ids[-1] < self.rows:
            raise ValueError(f"ids reach from {ids[0]} to {ids[-1]}, but there are {self.rows} rows")
        native.compute_bounds_of(_rows(geometry), ids.numpy(), self.bounds.numpy(), num_threads())

    def _check(self, geometry: Tensor) -> None:
        if len(geometry) != self.rows:
            raise ValueError(f"{len(geometry)} rows of geometry, but bounds of {self.rows}; rebuild them")


def _rows(geometry: Tensor):
    return geometry.detach().numpy()


def visible_ids(
    geometry: Tensor, bounds: BlockBounds, cameras: Cameras, margin: Margin | None = None, out: Tensor | None = None
) -> Tensor:
    """The rows that any of the cameras may draw, on the CPU, in parallel.

    Args:
        geometry: [N, 12] float32 on the CPU, or these columns of wider rows: means 3, log scales 3, quats 4, logit
            opacities 1, unused 1.
        bounds: of the same rows.
        cameras: the pictures to be drawn.
        margin: how much the rows may still move.
        out: int64 [M] to write the ids to, M large enough; without it memory is allocated.

    Returns:
        Sorted int64 [V]; the first V of `out`, where given.

    Raises:
        ValueError: bounds of another number of rows, or `out` too small.
    """
    bounds._check(geometry)
    margin = margin or Margin()
    threads = num_threads()
    work = (bounds.bits.numpy(), bounds.chunk_ends.numpy())
    count = native.mark_visible(
        _rows(geometry), bounds.bounds.numpy(), cameras.viewmats.contiguous().numpy(), cameras.Ks.contiguous().numpy(),
        cameras.width, cameras.height, cameras.near_plane, cameras.far_plane, cameras.eps2d, cameras.antialiased,
        margin.means, margin.quats, margin.scales, margin.opacities, margin.pixels, *work, threads,
    )  # fmt: skip
    if out is None:
        out = torch.empty(count, dtype=torch.int64)
    elif len(out) < count:
        raise ValueError(f"{count} Gaussians are visible, but `out` holds {len(out)}")
    ids = out[:count]
    native.write_marked(*work, ids.numpy(), threads)
    return ids


@torch.no_grad()
def visible_ids_on_device(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    opacities: Tensor,
    cameras: Cameras,
    margin: Margin | None = None,
) -> Tensor:
    """The rows that any of the cameras may draw: on CUDA by a kernel, with torch operations elsewhere.

    The device is synchronized, to learn how many rows are left.

    Args:
        means: [N, 3]. scales: log scales [N, 3]. quats: [N, 4]. opacities: logit opacities [N].
        cameras: the pictures to be drawn (on the CPU).
        margin: how much the rows may still move.

    Returns:
        Sorted int64 [V] on the device of the tensors.
    """
    views = views_of(cameras, margin)
    if means.is_cuda:
        from offload.culling import kernels_triton as culling_triton  # Triton comes with CUDA builds of torch only

        return culling_triton.visible_ids(means, scales, quats, opacities, views)
    ids = reachable_ids(means, scales, opacities, views)  # few are left for the whole test
    drawn = torch.zeros(len(ids), dtype=torch.bool, device=means.device)
    for part in _chunks(len(ids), _WHOLE_CHUNK):
        rows = ids[part]
        gathered = (means[rows], scales[rows], quats[rows], opacities[rows])
        for view in views:
            drawn[part] |= view.may_be_drawn(*gathered)
    return ids[drawn]


@torch.no_grad()
def reachable_ids(means: Tensor, scales: Tensor, opacities: Tensor, views: Sequence[_View]) -> Tensor:
    """Sorted int64 [M] of the rows that a cheap test with torch operations does not exclude from all of `views_of`."""
    near = torch.zeros(len(means), dtype=torch.bool, device=means.device)
    for part in _chunks(len(means), _REACH_CHUNK):
        for view in views:
            near[part] |= view.may_reach(means[part], scales[part], opacities[part])
    return near.nonzero().squeeze(1)


@dataclass(frozen=True)
class CoveredCells:
    """In which square cells of a grid over one picture each row may draw.

    A row that draws in none ends in each direction before it begins. Cells are counted from the picture's corner.
    """

    cells: Tensor  # [4, V] int16: the first and the end along x, the first and the end along y
    corners: np.ndarray  # [2, 2, columns + 1, rows + 1] int64: rows that draw, by (first, end) along x and y

    def rows_in(self, boxes: Sequence[tuple[int, int, int, int]]) -> tuple[list[Tensor], Tensor]:
        """Which rows may draw in boxes of cells.

        Args:
            boxes: left, right, top and bottom of each, in cells; right and bottom not included.

        Returns:
            For each box int64 [T], ascending; and int64 [S], the rows that may draw in several of them.
        """
        if self.cells.is_cuda:
            return self._rows_in_on_device(boxes)
        num_rows = self.cells.shape[1]
        edges = np.array(boxes, np.int32).reshape(-1, 4)
        counts = np.zeros((-(-num_rows // native.CHUNK_ROWS), len(boxes) + 1), np.int64)  # [chunks, boxes + 1]
        native.count_in_boxes(self.cells.numpy(), edges, counts, num_threads())
        ends = counts.T.cumsum().reshape(counts.T.shape)  # box after box, chunk after chunk
        rows = torch.empty(counts.sum(), dtype=torch.int64)
        offsets = np.ascontiguousarray((ends - counts.T).T)
        native.write_in_boxes(self.cells.numpy(), edges, offsets, rows.numpy(), num_threads())
        *chosen, shared = rows.split(counts.sum(0).tolist())
        return chosen, shared

    def _rows_in_on_device(self, boxes: Sequence[tuple[int, int, int, int]]) -> tuple[list[Tensor], Tensor]:
        first_x, end_x, first_y, end_y = self.cells
        met = torch.zeros_like(first_x, dtype=torch.uint8)
        chosen = []
        for left, right, top, bottom in boxes:
            meets = (first_x < right) & (end_x > left) & (first_y < bottom) & (end_y > top)
            met += meets
            met.clamp_(max=2)
            chosen.append(meets.nonzero().squeeze(1))
        return chosen, (met > 1).nonzero().squeeze(1)


def covered_cells(geometry: Tensor, ids: Tensor, cameras: Cameras, margin: Margin, cell: int) -> list[CoveredCells]:
    """Where rows may draw, for each camera, on the CPU, in parallel.

    Args:
        geometry: [N, 12] as for `visible_ids`.
        ids: sorted int64 [V], the rows to look at.
        cameras: the pictures.
        margin: how much the rows may still move; its pixels reach beyond the rows on every side.
        cell: width and height of a cell in pixels.
    """
    if len(ids) and not 0 <= ids[0] <= ids[-1] < len(geometry):
        raise ValueError(f"ids reach from {ids[0]} to {ids[-1]}, but there are {len(geometry)} rows")
    found = []
    for viewmat, K in zip(cameras.viewmats.split(1), cameras.Ks.split(1), strict=True):
        cells = torch.empty(4, len(ids), dtype=torch.int16)
        corners = np.empty((4, *(end + 1 for end in _grid(cameras, cell))), np.int64)
        native.covered_cells(
            _rows(geometry), ids.numpy(), viewmat.contiguous().numpy(), K.contiguous().numpy(), cameras.width,
            cameras.height, cameras.near_plane, cameras.far_plane, cameras.eps2d, cameras.antialiased, margin.means,
            margin.quats, margin.scales, margin.opacities, margin.pixels, cell, cells.numpy(), corners, num_threads(),
        )  # fmt: skip
        found.append(CoveredCells(cells, corners.reshape(2, 2, *corners.shape[1:])))
    return found


@torch.no_grad()
def covered_cells_on_device(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    opacities: Tensor,
    ids: Tensor,
    cameras: Cameras,
    margin: Margin,
    cell: int,
) -> list[CoveredCells]:
    """`covered_cells` with torch operations where the tensors are, as for `visible_ids_on_device`."""
    ends = _grid(cameras, cell)
    found = []
    for view in views_of(cameras, margin):
        cells = torch.empty(4, len(ids), dtype=torch.int16, device=ids.device)
        corners = torch.zeros(4, ends[0] + 1, ends[1] + 1, dtype=torch.int32, device=ids.device)
        if ids.is_cuda:
            from offload.culling.kernels_triton import cover_cells  # Triton comes with CUDA builds of torch only

            cover_cells(means, scales, quats, opacities, ids, view, cell, cells, corners)
        else:
            _cover_cells(means, scales, quats, opacities, ids, view, cell, cells, corners)
        found.append(CoveredCells(cells, corners.cpu().numpy().astype(np.int64).reshape(2, 2, *corners.shape[1:])))
    return found


def _cover_cells(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    opacities: Tensor,
    ids: Tensor,
    view: _View,
    cell: int,
    cells: Tensor,
    corners: Tensor,
) -> None:
    """`culling_triton.cover_cells` with torch operations."""
    ends = (corners.shape[1] - 1, corners.shape[2] - 1)
    for part in _chunks(len(ids), _CELLS_CHUNK):
        rows = ids[part]
        drawn, intervals = view.rectangles(means[rows], scales[rows], quats[rows], opacities[rows])
        for (low, high), size in zip(intervals, view.size, strict=True):
            drawn &= (high > 0) & (low < size)
        borders = []
        for (low, high), end in zip(intervals, ends, strict=True):
            first_cell = (low / cell).floor().clamp(0, end).long()
            end_cell = (high / cell).ceil().clamp(0, end).long()
            borders.append((torch.where(drawn, first_cell, end), torch.where(drawn, end_cell, 0)))
        x, y = borders
        cells[:, part] = torch.stack([*x, *y]).short()
        for corner, (column, row) in zip(corners, ((column, row) for column in x for row in y), strict=True):
            where = (column * corners.shape[2] + row)[drawn]
            corner += torch.bincount(where, minlength=corner.numel()).view_as(corner)


def _grid(cameras: Cameras, cell: int) -> tuple[int, int]:
    """Columns and rows of cells that cover a picture."""
    return -(-cameras.width // cell), -(-cameras.height // cell)


def views_of(cameras: Cameras, margin: Margin | None) -> list[_View]:
    """What the tests of single Gaussians take of each camera."""
    matrices = zip(cameras.viewmats.tolist(), cameras.Ks.tolist(), strict=True)
    return [_View(viewmat, K, cameras, margin or Margin()) for viewmat, K in matrices]


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, rows, size)]


class _View:
    """A camera and a margin; the tests of csrc/culling_kernels.cpp in torch. n rows at a time."""

    def __init__(self, viewmat: list[list[float]], K: list[list[float]], cameras: Cameras, margin: Margin) -> None:
        self.rotation = [row[:3] for row in viewmat[:3]]
        self.translation = [row[3] for row in viewmat[:3]]
        self.focal = (K[0][0], K[1][1])
        self.centre = (K[0][2], K[1][2])
        self.size = (cameras.width, cameras.height)
        self.cameras = cameras
        self.margin = margin
        self.move = math.sqrt(3) * margin.means
        self.turn = 2 * margin.quats
        self.growth = math.exp(margin.scales)
        # ceil(extent sqrt(sigma^2 + eps2d)) <= extent sigma + extent sqrt(eps2d) + 1
        self.blur_reach = 1.0001 * OPAQUE_EXTENT * math.sqrt(cameras.eps2d) + 1.01 + margin.pixels
        # gsplat cuts the slopes x/z and y/z at 15 % of the picture's extent beyond its borders.
        self.slopes = [
            (-(c / f + 0.15 * size / f), (size - c) / f + 0.15 * size / f)
            for f, c, size in zip(self.focal, self.centre, self.size, strict=True)
        ]
        self.planes = self.half_spaces()

    def camera_position(self, means: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, y, z in camera space and their error, [n] each. Not a matrix product: that may run in TF32."""
        mx, my, mz = means.unbind(1)
        x, y, z = (
            row[0] * mx + row[1] * my + row[2] * mz + t for row, t in zip(self.rotation, self.translation, strict=True)
        )
        sizes = mx.abs() + my.abs() + mz.abs() + max(map(abs, self.translation))
        return x, y, z, self.move + POSITION_ERROR * sizes

    def may_reach(self, means: Tensor, log_scales: Tensor, logits: Tensor) -> Tensor:
        """Whether a ball of the largest scale may meet the picture [n]. In few passes over memory: all N rows are
        tested so."""
        mx, my, mz = (column.contiguous() for column in means.unbind(1))
        scale = log_scales.amax(1).exp()
        error = self.move + 2 * POSITION_ERROR * (
            3 * means.abs().amax() + max(map(abs, self.translation))
        )  # no dimension
        misses = logits < _LOGIT_THRESHOLD - RELATIVE - self.margin.opacities
        for (nx, ny, nz), offset, reach, error_reach in self.planes:
            value = mx * nx
            value.add_(my, alpha=ny).add_(mz, alpha=nz).add_(scale, alpha=reach)
            misses |= value < -offset - error_reach * error
        return ~misses

    def half_spaces(self) -> list[tuple[list[float], float, float, float]]:
        """What meets the picture lies in these: normal . mean + offset + reach * scale + error_reach * error >= 0.

        A Gaussian's rectangle reaches the border where the centre is `blur_reach` pixels and `reach` largest scales
        away; times depth that is linear in the centre.
        """
        planes = []
        for axis in range(2):
            f, c, size = self.focal[axis], self.centre[axis], self.size[axis]
            steepest = max(map(abs, self.slopes[axis]))
            reach = 1.0005 * OPAQUE_EXTENT * self.growth * f * math.sqrt(1 + steepest**2)
            error_reach = f + abs(c) + size + self.blur_reach
            for sign, inside in ((1, c), (-1, size - c)):
                normal = [0.0, 0.0, inside + self.blur_reach]
                normal[axis] = sign * f
                planes.append((normal, 0.0, reach, error_reach))
        planes.append(([0.0, 0.0, 1.0], -self.cameras.near_plane, 0.0, 1.0))
        planes.append(([0.0, 0.0, -1.0], self.cameras.far_plane, 0.0, 1.0))
        return [
            (
                [sum(n * row[k] for n, row in zip(normal, self.rotation, strict=True)) for k in range(3)],
                constant + sum(n * t for n, t in zip(normal, self.translation, strict=True)),
                reach,
                error_reach,
            )
            for normal, constant, reach, error_reach in planes
        ]

    def may_be_drawn(self, means: Tensor, log_scales: Tensor, quats: Tensor, logits: Tensor) -> Tensor:
        """The whole test [n]."""
        drawn, intervals = self.rectangles(means, log_scales, quats, logits)
        for (low, high), size in zip(intervals, self.size, strict=True):
            drawn &= (high > 0) & (low < size)
        return drawn

    def rectangles(
        self, means: Tensor, log_scales: Tensor, quats: Tensor, logits: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Which rows may be drawn at all [n]; and where, in or beside the picture: low and high x [n], low and high y
        [n], in pixels."""
        x, y, z, error = self.camera_position(means)
        drawn = (z >= self.cameras.near_plane - error) & (z <= self.cameras.far_plane + error)
        # Of the positions within the error only those behind the near plane can be drawn.
        z = z.clamp(min=self.cameras.near_plane)
        relative_move = error / (z - error).clamp(min=self.cameras.near_plane)
        slopes = (x / z, y / z)
        norm = quats.norm(dim=1)
        rotation = _rotation(quats, norm)
        turn = (2 * self.turn / norm.clamp(min=1e-18)).clamp(max=2)
        scales = log_scales.exp()
        extents = [self.image_extent(axis, slopes[axis], z, relative_move, rotation, scales, turn) for axis in range(2)]
        opacity255 = 255 * (1 + RELATIVE) * torch.sigmoid(logits + self.margin.opacities)
        if self.cameras.antialiased:
            opacity255 = opacity255 * self.largest_compensation(*extents)
        drawn &= opacity255 >= 1
        extent = (2 * (opacity255.clamp(min=1).log() + RELATIVE)).sqrt().clamp(max=OPAQUE_EXTENT) * (1 + RELATIVE)
        intervals = []
        for axis in range(2):
            f, c, size, slope = self.focal[axis], self.centre[axis], self.size[axis], slopes[axis]
            _, variance, rounding, change = extents[axis]
            sigma = self.growth * ((variance + rounding).sqrt() + change)
            radius = extent * (sigma.square() + self.cameras.eps2d).sqrt()
            offset = f * slope
            half = (
                (radius + 1e-4).ceil()
                + self.margin.pixels
                + RELATIVE * (radius + offset.abs())
                + f * relative_move * (1 + slope.abs())
                + 1e-6 * (abs(c) + size)
            )
            intervals.append((offset + c - half, offset + c + half))
        return drawn, intervals

    def image_extent(
        self, axis: int, raw_slope: Tensor, z: Tensor, relative_move: Tensor, rotation: list[list[Tensor]],
        scales: Tensor, turn: Tensor,
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
        """A row of J W Q S in pixels, its length squared, the rounding error of that, and by how much the length may
        grow when the centre moves and the axes turn."""
        low, high = self.slopes[axis]
        slope = raw_slope.clamp(low, high)
        slope_change = (relative_move * (1 + raw_slope.abs())).clamp(max=high - low)
        length = (1 + slope.square()).sqrt()
        length_change = relative_move * (1 + slope.abs()) + (1 + relative_move) * slope_change
        W, focal = self.rotation, self.focal[axis] / z
        jw = [W[axis][k] - slope * W[2][k] for k in range(3)]
        row = [
            focal * scales[:, k] * (jw[0] * rotation[0][k] + jw[1] * rotation[1][k] + jw[2] * rotation[2][k])
            for k in range(3)
        ]
        variance = row[0].square() + row[1].square() + row[2].square()
        rounding = COVARIANCE_ERROR * (focal * length).square() * scales.square().sum(1)
        change = scales.amax(1) * focal * (length_change + (length + length_change) * turn)
        return row, variance, rounding, change

    def largest_compensation(self, x: tuple, y: tuple) -> Tensor:
        """Bound of sqrt(det(cov) / det(cov + eps2d I)): with the determinant d of cov that is
        d / (d + eps2d trace + eps2d^2), which grows with d and shrinks with the trace."""
        (row_x, xx, rounding_x, change_x), (row_y, yy, rounding_y, change_y) = x, y
        eps2d = self.cameras.eps2d
        length_x, length_y = xx.sqrt(), yy.sqrt()
        xy = row_x[0] * row_y[0] + row_x[1] * row_y[1] + row_x[2] * row_y[2]
        area = (xx * yy - xy.square()).clamp(min=0).sqrt()
        area = area + change_x * length_y + change_y * length_x + change_x * change_y
        low_x = (length_x - change_x).clamp(min=0) / self.growth
        low_y = (length_y - change_y).clamp(min=0) / self.growth
        rounding = 2 * (rounding_x * yy + rounding_y * xx) + rounding_x * rounding_y + 1e-6 * xx * yy
        determinant = (self.growth**2 * area).square() + rounding
        blur = eps2d * (low_x.square() + low_y.square()) + eps2d**2
        return (determinant / (determinant + blur - 2 * rounding).clamp(min=1e-30)).sqrt()


def _rotation(quats: Tensor, norm: Tensor) -> list[list[Tensor]]:
    """Rotation matrices, entry by entry [n]; a quaternion of length zero counts as the identity."""
    nonzero = norm >= 1e-19
    inverse = torch.where(nonzero, 1 / norm, 0)
    w = torch.where(nonzero, quats[:, 0] * inverse, 1)
    x, y, z = (quats[:, k] * inverse for k in (1, 2, 3))
    return [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
