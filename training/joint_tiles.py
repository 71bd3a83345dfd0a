"""Rendering of what ranks draw together: all pictures of a step or, where these see too much, a tile of each rank.

Each rank projects those of its Gaussians that any of the tiles needs. A pair of a camera and a Gaussian that may draw
in the tile of that camera, or in its halo, goes to the rank that draws it (`distributed/exchange.py`); others stay. A
rank that draws no tile in a round takes part with its Gaussians. So a round takes of a device what
`offload/tiles/rounds.py` says.

Where memory is lacking at one rank, none goes on: what they do alone is divided from what they do together, and before
that each takes the memory once that it is about to need.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from configs import Config
from distributed.exchange import PairExchange
from distributed.mesh import Ranks
from offload.culling.cameras import Cameras
from offload.models.tiled import ViewTile
from offload.tiles.boxes import Tile
from offload.tiles.budget import EXCHANGED_BYTES
from offload.tiles.rounds import lacking_together
from rendering.projection import Projection
from rendering.rasterize import blend_pairs, pair_info, project_pairs
from rendering.region import Region
from training.views import Backdrop, before_backdrop, own_cameras, projected_by


class JointPart:
    """Hold the pairs of the pictures, or of the tile, that this rank draws of a part of a view; all make one at once.

    A part is `render`, the backward pass of this rank's share of the loss, and `propagate`, where all take the
    gradients home at once.

    Attributes:
        tile: What this rank draws, whose camera counts from its own first one; None: all its pictures, or nothing.
        draws: Whether it draws anything.
        info: What `rendering.rasterize` says of the Gaussians held here, in the cameras of all ranks.
        num_made: How many pairs of a camera and a Gaussian have been projected here.
        num_sent: How many of these are in what is drawn, here or by other ranks.
        num_drawn: How many pairs are in what this rank draws.
    """

    def __init__(
        self,
        part: ViewTile,
        cameras: Cameras,
        cfg: Config,
        *,
        sh_degree: int,
        halo: int,
        ranks: Ranks,
        depth: bool = False,
    ) -> None:
        """
        Args:
            part: Rows held here, and what all ranks draw of the view.
            cameras: W B of them, of which each rank draws B; their poses may want a gradient.
            cfg: Options.
            sh_degree: Degree of the spherical harmonics to use.
            halo: Pixels around a tile to render with it.
            ranks: W of them.
            depth: As in `training.views.render`.
        """
        own = own_cameras(cameras, ranks)  # B
        self._poses = own.viewmats  # [B, 4, 4]
        # Each part's backward pass ends here, before gradients go home.
        self._cameras = replace(own, viewmats=own.viewmats.detach().requires_grad_(own.viewmats.requires_grad))
        self._cfg, self._halo, self._ranks, num_own = cfg, halo, ranks, len(own.Ks)
        self._render_mode = "RGB+ED" if depth or (cfg.depth_loss and torch.is_grad_enabled()) else "RGB"
        self._shows_depth = depth
        first = ranks.rank * num_own
        mine = [
            tile._replace(camera=tile.camera - first) for tile in part.tiles if tile.camera // num_own == ranks.rank
        ]
        self.tile = mine[0] if mine else None
        self.draws = not part.tiles or bool(mine)
        with lacking_together(ranks):
            projection, features = self._project(part, cameras, sh_degree)
            self._take_once(len(features) + (len(features) if part.load is None else part.load.drawn))
        if projection.means2d.requires_grad:
            projection.means2d.retain_grad()
        self.info: dict[str, Any] = pair_info(projection, cameras.width, cameras.height, len(cameras.Ks))
        self._num_cameras = 1 if part.tiles else num_own
        if part.tiles:  # one of a rank
            projection = replace(projection, camera_ids=projection.camera_ids // num_own)
        self._pairs, self._features = PairExchange(ranks, self._num_cameras, cfg.absgrad)(projection, features)
        self.num_sent, self.num_drawn = len(features), len(self._features)
        # What is rendered begins here, so that its backward pass is this rank's own.
        self._leaves = [values.detach().requires_grad_(torch.is_grad_enabled()) for values in self._values()]

    def render(self, backgrounds: Tensor | Backdrop | None) -> tuple[Tensor, dict[str, Any]]:
        """Render the pictures of this rank, or its tile with the halo.

        Args:
            backgrounds: Of this rank's pictures, as `training.views.render` takes them.

        Returns:
            Colours [B, H, W, 3 or 4], or [1, h, w, 3 or 4]; and an info with n_intersections and, where depths count,
            expected_depths [B, H, W] or [1, h, w].
        """
        region, cameras = Region(0, 0, self._cameras.width, self._cameras.height), self._cameras
        if self.tile is not None:
            region = _padded(self.tile, self._halo, cameras)
            one = slice(self.tile.camera, self.tile.camera + 1)
            cameras = replace(cameras, viewmats=cameras.viewmats[one], Ks=cameras.Ks[one])
            backgrounds = backgrounds[one] if isinstance(backgrounds, Tensor) else backgrounds
        means2d, conics, opacities, features = self._leaves
        colors, alphas, num_intersections = blend_pairs(
            replace(self._pairs, means2d=means2d, conics=conics, opacities=opacities),
            features,
            self._num_cameras,
            region.width,
            region.height,
            backgrounds=backgrounds if isinstance(backgrounds, Tensor) else None,
            render_mode=self._render_mode,
            absgrad=self._cfg.absgrad,
        )
        if callable(backgrounds):
            colors = before_backdrop(colors, alphas, backgrounds, cameras, None if self.tile is None else region)
        info: dict[str, Any] = {"n_intersections": num_intersections}
        if self._render_mode == "RGB+ED" and not self._shows_depth:
            info["expected_depths"], colors = colors[..., 3], colors[..., :3]
        return colors, info

    def take_for_return(self) -> None:
        """Take the memory once that gradients need on their way home."""
        self._take_once(self.num_sent + self.num_drawn)

    def propagate(self, loss: Tensor) -> None:
        """Take the gradients home, at all ranks at once.

        Args:
            loss: Scalar, whose own gradient, of what does not come from pictures, is propagated too.
        """
        ends = [*self._values()]
        gradients = [torch.zeros_like(v) if x.grad is None else x.grad for v, x in zip(ends, self._leaves, strict=True)]
        if self._cfg.absgrad:
            absolute = getattr(self._leaves[0], "absgrad", None)  # as the rasterizer sets it
            absolute = torch.zeros_like(ends[0]) if absolute is None else absolute
            self._pairs.means2d.absgrad = absolute  # type: ignore[attr-defined]
        if loss.requires_grad:
            ends.append(loss)
            gradients.append(torch.ones_like(loss))
        if self._cameras.viewmats.grad is not None:
            ends.append(self._poses)
            gradients.append(self._cameras.viewmats.grad)
        torch.autograd.backward(ends, gradients)

    # --------------------------------------------------------------------------------------------------- inside

    def _project(self, part: ViewTile, cameras: Cameras, sh_degree: int) -> tuple[Projection, Tensor]:
        """Return the pairs of rows held here in the cameras of all ranks, those alone that may draw in a tile."""
        tiles, numbers = part.tiles, [tile.camera for tile in part.tiles]
        if tiles:
            cameras = replace(cameras, viewmats=cameras.viewmats[numbers], Ks=cameras.Ks[numbers])
        projection, features = project_pairs(
            **projected_by(part.rows, cameras, sh_degree=sh_degree), render_mode=self._render_mode
        )
        self.num_made = len(features)
        if not tiles:
            return projection, features
        device = features.device
        regions = torch.tensor([_padded(tile, self._halo, cameras) for tile in tiles], device=device)  # [T, 4]
        p, of_pair = projection, regions[projection.camera_ids]
        corner, size = of_pair[:, :2], of_pair[:, 2:]
        relative = p.means2d.detach() - corner
        kept = ((relative + p.radii > 0) & (relative - p.radii < size)).all(dim=1).nonzero().squeeze(1)
        in_tiles = Projection(
            camera_ids=torch.tensor(numbers, device=device)[p.camera_ids[kept]],
            gaussian_ids=p.gaussian_ids[kept],
            radii=p.radii[kept],
            means2d=p.means2d[kept] - corner[kept],
            depths=p.depths[kept],
            conics=p.conics[kept],
            opacities=p.opacities[kept],
        )
        return in_tiles, features[kept]

    def _take_once(self, num_pairs: int) -> None:
        """Take the memory that so many pairs need on their way, so that torch has it while ranks wait for others.

        Raises:
            OutOfMemoryError: It is not there.
        """
        if self._ranks.device.type == "cuda":
            torch.empty(num_pairs * EXCHANGED_BYTES, dtype=torch.uint8, device=self._ranks.device)

    def _values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what pairs have gradients of: [P, 2], [P, 3], [P] and [P, D]."""
        return self._pairs.means2d, self._pairs.conics, self._pairs.opacities, self._features


@torch.no_grad()
def draw_rounds(
    parts: Iterable[ViewTile],
    cameras: Cameras,
    cfg: Config,
    ranks: Ranks,
    *,
    backgrounds: Tensor | Backdrop | None = None,
    depth: bool = False,
) -> Tensor:
    """Return the pictures [B, H, W, 3 or 4] that this rank's cameras see, put together from those of its tiles.

    Args:
        parts: Of the view, at every rank as many.
        cameras: W B of them.
        cfg: Options.
        ranks: W of them, which all call this at once.
        backgrounds: Of this rank's pictures, as `training.views.render` takes them.
        depth: Add a fourth channel, as there.
    """
    own = own_cameras(cameras, ranks)
    pictures = torch.empty(len(own.Ks), own.height, own.width, 4 if depth else 3, device=ranks.device)
    for part in parts:
        joint = JointPart(part, cameras, cfg, sh_degree=cfg.sh_degree, halo=0, ranks=ranks, depth=depth)
        with lacking_together(ranks):
            colors = joint.render(backgrounds)[0] if joint.draws else pictures
        if not part.tiles:
            return colors
        if joint.tile is not None:
            camera, left, top, width, height = joint.tile
            pictures[camera, top : top + height, left : left + width] = colors[0]
    return pictures


def _padded(tile: Tile, halo: int, cameras: Cameras) -> Region:
    return Region(*tile.with_halo(halo, cameras.width, cameras.height)[1:])
