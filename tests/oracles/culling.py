"""The test of single Gaussians for culling in plain torch: the formulas of offload/csrc/culling_kernels.cpp again."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from offload.culling.cameras import Cameras, Margin
from offload.culling.cells import CoveredCells, grid_of

OPAQUE_EXTENT = 3.33  # standard deviations at which opacity 1 has fallen to 1/255
LOGIT_THRESHOLD = -math.log(254)  # logit of 1/255
# What the rasterizer's and our float operations may be off.
POSITION_ERROR = 5e-7  # of camera-space coordinates, relative to the summands
COVARIANCE_ERROR = 1e-6  # of image covariances, relative to the largest they could be
RELATIVE = 1e-5  # of everything else
CHUNK = 2**19  # rows whose temporaries live together, about 400 bytes each


@torch.no_grad()
def visible_ids(
    means: Tensor, scales: Tensor, quats: Tensor, opacities: Tensor, cameras: Cameras, margin: Margin | None = None
) -> Tensor:
    """Find the rows that any of the cameras may draw: few pass a cheap test, and these are tested whole.

    Args:
        means: [N, 3].
        scales: Log scales [N, 3].
        quats: [N, 4].
        opacities: Logit opacities [N].
        cameras: The pictures to be drawn.
        margin: How much the rows may still move.

    Returns:
        Sorted int64 [V], where the tensors are.
    """
    drawn = torch.zeros(len(means), dtype=torch.bool, device=means.device)
    for view in views_of(cameras, margin) if len(means) else ():
        near = view.may_reach(means, scales, opacities).nonzero().squeeze(1)
        for rows in near.split(CHUNK):
            drawn[rows] |= view.may_be_drawn(means[rows], scales[rows], quats[rows], opacities[rows])
    return drawn.nonzero().squeeze(1)


@torch.no_grad()
def visible_ids_by_the_whole_test(
    means: Tensor, scales: Tensor, quats: Tensor, opacities: Tensor, cameras: Cameras
) -> Tensor:
    """Find the same without the cheap test."""
    drawn = torch.zeros(len(means), dtype=torch.bool, device=means.device)
    for view in views_of(cameras, None):
        for first in range(0, len(means), CHUNK):
            part = slice(first, first + CHUNK)
            drawn[part] |= view.may_be_drawn(means[part], scales[part], quats[part], opacities[part])
    return drawn.nonzero().squeeze(1)


@torch.no_grad()
def covered_cells(
    means: Tensor, scales: Tensor, quats: Tensor, opacities: Tensor, cameras: Cameras, margin: Margin, cell: int
) -> list[CoveredCells]:
    """Find in which cells of each camera's picture rows may draw, as `offload.culling.kernels.covered_cells`."""
    ends = grid_of(cameras, cell)
    found = []
    for view in views_of(cameras, margin):
        drawn, intervals = view.rectangles(means, scales, quats, opacities)
        for (low, high), size in zip(intervals, view.size, strict=True):
            drawn &= (high > 0) & (low < size)
        borders = []
        for (low, high), end in zip(intervals, ends, strict=True):
            first_cell = (low / cell).floor().clamp(0, end).long()
            end_cell = (high / cell).ceil().clamp(0, end).long()
            borders.append((torch.where(drawn, first_cell, end), torch.where(drawn, end_cell, 0)))
        x, y = borders
        corners = np.zeros((2, 2, ends[0] + 1, ends[1] + 1), np.int64)
        for i, column in enumerate(x):
            for j, line in enumerate(y):
                where = (column * (ends[1] + 1) + line)[drawn]
                corners[i, j] = where.bincount(minlength=corners[i, j].size).view(corners[i, j].shape).cpu().numpy()
        found.append(CoveredCells(torch.stack([*x, *y]).short(), corners))
    return found


def rows_in_boxes(cells: Tensor, boxes: list[tuple[int, int, int, int]]) -> tuple[list[Tensor], Tensor]:
    """Find the rows that may draw in each box, and those that may in several; as `CoveredCells.rows_in`."""
    first_x, end_x, first_y, end_y = cells
    meets = [
        (first_x < right) & (end_x > left) & (first_y < bottom) & (end_y > top) for left, right, top, bottom in boxes
    ]
    shared = torch.stack(meets).sum(0) > 1
    return [rows.nonzero().squeeze(1) for rows in meets], shared.nonzero().squeeze(1)


def views_of(cameras: Cameras, margin: Margin | None) -> list[View]:
    """Return each camera with the margin, ready to test Gaussians."""
    matrices = zip(cameras.viewmats.tolist(), cameras.Ks.tolist(), strict=True)
    return [View(viewmat, K, cameras, margin or Margin()) for viewmat, K in matrices]


class View:
    """Test n rows at a time against one camera, with a margin."""

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
        """Return x, y, z in camera space and their error, [n] each. Not a matrix product: that may run in TF32."""
        mx, my, mz = means.unbind(1)
        x, y, z = (
            row[0] * mx + row[1] * my + row[2] * mz + t for row, t in zip(self.rotation, self.translation, strict=True)
        )
        sizes = mx.abs() + my.abs() + mz.abs() + max(map(abs, self.translation))
        return x, y, z, self.move + POSITION_ERROR * sizes

    def may_reach(self, means: Tensor, log_scales: Tensor, logits: Tensor) -> Tensor:
        """Say whether a ball of the largest scale may meet the picture [n]."""
        mx, my, mz = (column.contiguous() for column in means.unbind(1))
        scale = log_scales.amax(1).exp()
        error = self.move + 2 * POSITION_ERROR * (
            3 * means.abs().amax() + max(map(abs, self.translation))
        )  # no dimension
        misses = logits < LOGIT_THRESHOLD - RELATIVE - self.margin.opacities
        for (nx, ny, nz), offset, reach, error_reach in self.planes:
            value = mx * nx
            value.add_(my, alpha=ny).add_(mz, alpha=nz).add_(scale, alpha=reach)
            misses |= value < -offset - error_reach * error
        return ~misses

    def half_spaces(self) -> list[tuple[list[float], float, float, float]]:
        """Return the half spaces in which all lies that meets the picture, as (normal, offset, reach, error_reach):
        normal . mean + offset + reach * scale + error_reach * error >= 0.

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
        """Say which rows may be drawn, by the whole test [n]."""
        drawn, intervals = self.rectangles(means, log_scales, quats, logits)
        for (low, high), size in zip(intervals, self.size, strict=True):
            drawn &= (high > 0) & (low < size)
        return drawn

    def rectangles(
        self, means: Tensor, log_scales: Tensor, quats: Tensor, logits: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Say which rows may be drawn at all [n]; and where, in or beside the picture: low and high x [n], low and
        high y [n], in pixels."""
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
        """Return a row of J W Q S in pixels, its length squared, the rounding error of that, and by how much the
        length may grow when the centre moves and the axes turn."""
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
        """Bound sqrt(det(cov) / det(cov + eps2d I)): with the determinant d of cov that is
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
    """Return rotation matrices, entry by entry [n]; a quaternion of length zero counts as the identity."""
    nonzero = norm >= 1e-19
    inverse = torch.where(nonzero, 1 / norm, 0)
    w = torch.where(nonzero, quats[:, 0] * inverse, 1)
    x, y, z = (quats[:, k] * inverse for k in (1, 2, 3))
    return [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
