"""Rendering a view of several ranks tile by tile: the pairs of all ranks' Gaussians are exchanged once, and then cut.

The rank that draws a picture receives all its pairs of camera and Gaussian (`distributed/exchange.py`). It blends them
tile after tile, those that may draw in a tile or in its halo. Gradients of the pairs, and of the cameras where a sky is
behind, add up over the tiles and go home once. So tiles bound what blending and the loss take of the device: pixels,
and intersections of Gaussians with blocks of pixels. They do not bound rows and pairs, which are those of the whole
view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import Config
from distributed.exchange import PairExchange
from distributed.mesh import Ranks
from offload.culling.cameras import Cameras
from offload.culling.cells import grid_of
from offload.tiles.boxes import CELL, Coverage, Tile, box_of
from offload.tiles.budget import RowLimit
from rendering.projection import Projection
from rendering.rasterize import blend_pairs, pair_info, project_pairs
from rendering.region import Region
from training.views import Backdrop, before_backdrop, own_cameras, projected_by


class JointView:
    """Hold the pairs of the pictures that this rank draws, and render them tile by tile; all ranks make one at once.

    A tile is `render`, the backward pass of its share of the loss, and `gather`. After the last one `propagate` takes
    the gradients home, at all ranks at once, however many tiles each had.

    Attributes:
        info: What `rendering.rasterize` says of the Gaussians held here, in the cameras of all ranks.
    """

    def __init__(
        self, rows: Mapping[str, Tensor], cameras: Cameras, cfg: Config, *, sh_degree: int, halo: int, ranks: Ranks
    ) -> None:
        """
        Args:
            rows: The parameters of this rank's Gaussians, as `training.gaussians.activate` takes them.
            cameras: W B of them, of which each rank draws B; their poses may want a gradient.
            cfg: Options.
            sh_degree: Degree of the spherical harmonics to use.
            halo: Pixels around a tile to render with it.
            ranks: W of them.
        """
        own = own_cameras(cameras, ranks)  # B
        self._poses = own.viewmats  # [B, 4, 4]
        # Each tile's backward pass ends here, since it frees what is behind.
        self._cameras = replace(own, viewmats=own.viewmats.detach().requires_grad_(own.viewmats.requires_grad))
        self._cfg, self._halo = cfg, halo
        self._render_mode = "RGB+ED" if cfg.depth_loss else "RGB"
        projection, features = project_pairs(
            **projected_by(rows, cameras, sh_degree=sh_degree), render_mode=self._render_mode
        )
        projection.means2d.retain_grad()
        self.info: dict[str, Any] = pair_info(projection, cameras.width, cameras.height, len(cameras.Ks))
        self._pairs, self._features = PairExchange(ranks, len(self._cameras.Ks), cfg.absgrad)(projection, features)
        self._cells = _covered_cells(self._pairs, self._cameras, halo)
        self._sums = [torch.zeros_like(values) for values in self._values()]
        self._absolute = torch.zeros_like(self._pairs.means2d)  # [P, 2] gradients, where the strategy wants those
        self._part: tuple[Tensor, list[Tensor], Tensor] | None = None  # of the present tile

    def tiles(self, limit: RowLimit, num_gaussians: int) -> list[Tile]:
        """Return the tiles that this rank's pictures are cut into, whose cameras count from its own first one.

        Args:
            limit: How many pairs a tile may have.
            num_gaussians: Of all ranks.
        """
        cameras = self._cameras
        corners = [
            _corners(self._cells[:, self._of(camera)], *grid_of(cameras, CELL)) for camera in range(len(cameras.Ks))
        ]
        coverages = [Coverage(of_camera, cameras.width, cameras.height) for of_camera in corners]
        plans = limit.plan(coverages, len(self._features), num_gaussians)
        return [
            coverage.tile(camera, box)
            for camera, (coverage, boxes) in enumerate(zip(coverages, plans, strict=True))
            for box in boxes
        ]

    def render(self, tile: Tile, backgrounds: Tensor | Backdrop | None) -> tuple[Tensor, dict[str, Any]]:
        """Render a tile with its halo.

        Args:
            tile: One of `tiles`.
            backgrounds: Of this rank's pictures, as `training.views.render` takes them.

        Returns:
            Colours [1, h, w, 3], and an info with n_intersections and, where depths count, expected_depths [1, h, w].
        """
        region = Region(*tile.with_halo(self._halo, self._cameras.width, self._cameras.height)[1:])
        one = slice(tile.camera, tile.camera + 1)
        ids = self._pairs_in(tile)
        leaves = [values.detach()[ids].requires_grad_() for values in self._values()]
        means2d, conics, opacities, features = leaves
        part = Projection(
            camera_ids=(zeros := torch.zeros_like(ids)),
            gaussian_ids=zeros,  # their numbers at home mean nothing here
            radii=self._pairs.radii[ids],
            means2d=region.relative(means2d),
            depths=self._pairs.depths[ids],
            conics=conics,
            opacities=opacities,
            row_offsets=torch.tensor([0, len(ids)]),
        )
        self._part = ids, leaves, part.means2d
        colors, alphas, num_intersections = blend_pairs(
            part,
            features,
            1,
            region.width,
            region.height,
            backgrounds=backgrounds[one] if isinstance(backgrounds, Tensor) else None,
            render_mode=self._render_mode,
            absgrad=self._cfg.absgrad,
        )
        if callable(backgrounds):
            camera = replace(self._cameras, viewmats=self._cameras.viewmats[one], Ks=self._cameras.Ks[one])
            colors = before_backdrop(colors, alphas, backgrounds, camera, region)
        info: dict[str, Any] = {"n_intersections": num_intersections}
        if self._cfg.depth_loss:
            info["expected_depths"], colors = colors[..., 3], colors[..., :3]
        return colors, info

    def gather(self) -> None:
        """Take in the gradients of the tile whose backward pass is complete."""
        if self._part is None:
            raise RuntimeError("no tile has been rendered")
        ids, leaves, drawn_at = self._part
        for total, leaf in zip(self._sums, leaves, strict=True):
            if leaf.grad is not None:
                total.index_add_(0, ids, leaf.grad)
        if self._cfg.absgrad:
            self._absolute.index_add_(0, ids, drawn_at.absgrad)  # type: ignore[attr-defined]  # set by the rasterizer
        self._part = None

    def propagate(self, loss: Tensor) -> None:
        """Take the gradients of all tiles home, at all ranks at once.

        Args:
            loss: Scalar, whose own gradient, of what does not come from pictures, is propagated too.
        """
        if self._cfg.absgrad:
            self._pairs.means2d.absgrad = self._absolute  # type: ignore[attr-defined]  # as the rasterizer would
        ends, gradients = [*self._values()], [*self._sums]
        if loss.requires_grad:
            ends.append(loss)
            gradients.append(torch.ones_like(loss))
        if self._cameras.viewmats.grad is not None:
            ends.append(self._poses)
            gradients.append(self._cameras.viewmats.grad)
        torch.autograd.backward(ends, gradients)

    def _values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what pairs have gradients of: [P, 2], [P, 3], [P] and [P, D]."""
        return self._pairs.means2d, self._pairs.conics, self._pairs.opacities, self._features

    def _of(self, camera: int) -> slice:
        """Return which pairs are of a camera."""
        assert self._pairs.row_offsets is not None  # the exchange gives them
        return slice(*self._pairs.row_offsets[camera : camera + 2].tolist())

    def _pairs_in(self, tile: Tile) -> Tensor:
        """Return the pairs [T] that may draw in a tile or in its halo."""
        of_camera, box = self._of(tile.camera), box_of(tile)
        left, right, top, bottom = self._cells[:, of_camera]
        meets = (left < box.right) & (right > box.left) & (top < box.bottom) & (bottom > box.top)
        return meets.nonzero().squeeze(1) + of_camera.start


def _covered_cells(pairs: Projection, cameras: Cameras, halo: int) -> Tensor:
    """Return in which cells pairs may draw, or so many pixels beside: as `CoveredCells.cells`, int64 [4, P]."""
    columns, rows = grid_of(cameras, CELL)
    most = pairs.means2d.new_tensor([columns, rows])
    reach = pairs.radii + halo
    first = ((pairs.means2d.detach() - reach) / CELL).floor().clamp(min=0).minimum(most)
    end = (((pairs.means2d.detach() + reach) / CELL).floor() + 1).clamp(min=0).minimum(most)
    return torch.stack([first, end], dim=2).flatten(1).T.long()


def _corners(cells: Tensor, columns: int, rows: int) -> np.ndarray:
    """Count pairs by their first and end cells: as `CoveredCells.corners`, of cells [4, P]."""
    shape = columns + 1, rows + 1
    counts = [
        torch.bincount(x * shape[1] + y, minlength=shape[0] * shape[1]).view(shape)
        for x in cells[:2]
        for y in cells[2:]
    ]
    return torch.stack(counts).view(2, 2, *shape).cpu().numpy()
