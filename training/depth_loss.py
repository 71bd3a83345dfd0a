"""The loss that compares rendered depths with those that are known of photos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offload.tiles.boxes import Tile
from training.views import View


def with_depth_loss(
    loss: Tensor,
    info: Mapping[str, Any],
    view: View,
    weight: float | Tensor,
    tile: Tile | None = None,
    halo: int = 0,
) -> Tensor:
    """Add to a loss the mean difference of inverse depths over the pixels where the photos' are known.

    One over the depth, as gsplat compares, so that what is far weighs little. Pixels that masks hide do not count.

    Args:
        loss: Scalar; of a tile its share.
        info: Of the rendering, with its expected depths.
        view: The photos and, where their depths count, those.
        weight: Of the mean.
        tile: None: all of the view.
        halo: Pixels around the tile that were rendered with it.

    Returns:
        The sum; the loss itself where no depths count.
    """
    if view.inverse_depths is None:
        return loss
    known = known_depths(view)
    share = weight / known.sum().clamp(min=1)
    depths, wanted = info["expected_depths"], view.inverse_depths  # [C, H, W]
    if tile is not None:
        padded = tile.with_halo(halo, view.cameras.width, view.cameras.height)
        left, top = tile.x - padded.x, tile.y - padded.y
        depths = depths[:, top : top + tile.height, left : left + tile.width]
        part = (
            slice(tile.camera, tile.camera + 1),
            slice(tile.y, tile.y + tile.height),
            slice(tile.x, tile.x + tile.width),
        )
        wanted, known = wanted[part], known[part]
    drawn = depths > 0  # where nothing is drawn the depth is 0, and its inverse counts as 0
    inverse = torch.where(drawn, 1.0 / torch.where(drawn, depths, 1.0), 0.0)
    return loss + share * torch.where(known, (inverse - wanted).abs(), 0.0).sum()


def known_depths(view: View) -> Tensor:
    """Return where depths of a view's photos are known and count, bool [C, H, W].

    Raises:
        RuntimeError: Its depths do not count.
    """
    if view.inverse_depths is None:
        raise RuntimeError("the depths of this view are not known")
    known = view.inverse_depths > 0
    return known if view.masks is None else known & view.masks
