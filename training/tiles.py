"""Rendering a view tile by tile: pictures, loss and gradients on the screen are those of the whole view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from configs import Config
from offload.culling.cameras import Cameras
from offload.models.tiled import ViewTile
from offload.tiles.boxes import HALO, Tile
from rendering.losses import count_windows, photometric_loss, photometric_sum
from rendering.region import Region
from strategies.noise import MOVED_BY
from training.views import Backdrop, View, render


def halo_of(cfg: Config) -> int:
    """Return how many pixels around a tile must be rendered with it.

    SSIM looks 5 pixels around itself. Where a strategy adds up absolute values of pixels' gradients, each of these
    must be complete in one tile, and so must all windows that reach it, and what they see.
    """
    return 2 * HALO if cfg.absgrad else HALO


def render_part(
    part: ViewTile,
    cameras: Cameras,
    cfg: Config,
    *,
    sh_degree: int,
    backgrounds: Tensor | Backdrop | None = None,
    halo: int = 0,
    depth: bool = False,
) -> tuple[Tensor, dict]:
    """Render the pixels of a part.

    Args:
        part: Rows, and the tile that they draw.
        cameras: Of the view.
        cfg: Options.
        sh_degree: Degree of the spherical harmonics to use.
        backgrounds: [C, 3] colours behind the scene, or what makes those of each pixel; None is black.
        halo: Pixels around the tile to render with it.
        depth: As in `training.views.render`.

    Returns:
        Colours [C, H, W, 3], or [1, h, w, 3] of a tile with its halo, and `rasterize`'s info with cameras of the view.
    """
    region = None
    if part.tile is not None:
        one = slice(part.tile.camera, part.tile.camera + 1)
        region = Region(*part.tile.with_halo(halo, cameras.width, cameras.height)[1:])
        cameras = replace(cameras, viewmats=cameras.viewmats[one], Ks=cameras.Ks[one])
        backgrounds = backgrounds[one] if isinstance(backgrounds, Tensor) else backgrounds
    colors, info = render(
        part.rows, cameras, cfg, sh_degree=sh_degree, backgrounds=backgrounds, region=region, depth=depth
    )
    if part.tile is not None:  # of the view, whose cameras these are
        info["camera_ids"] = info["camera_ids"] + part.tile.camera
    return colors, info


@torch.no_grad()
def render_in_parts(
    parts: Iterable[ViewTile],
    cameras: Cameras,
    cfg: Config,
    *,
    backgrounds: Tensor | Backdrop | None = None,
    depth: bool = False,
) -> Tensor:
    """Return the pictures [C, H, W, 3] that cameras see, put together from those of the parts of their view.

    Args:
        parts: Of the view.
        cameras: C of them.
        cfg: Options.
        backgrounds: As `render_part` takes them.
        depth: Add a fourth channel, as `training.views.render`.
    """
    pictures = torch.empty(0)
    for part in parts:
        colors, _ = render_part(part, cameras, cfg, sh_degree=cfg.sh_degree, backgrounds=backgrounds, depth=depth)
        if part.tile is None:
            return colors
        if len(pictures) == 0:
            pictures = colors.new_empty(len(cameras.Ks), cameras.height, cameras.width, colors.shape[-1])
        _pixels(pictures, part.tile).copy_(colors)
    return pictures


def part_loss(rendered: Tensor, view: View, tile: Tile | None, *, ssim_lambda: float, halo: int = HALO) -> Tensor:
    """Return a tile's share of `photometric_loss` of the view; all shares add up to it, and so do their gradients.

    Args:
        rendered: Of `render_part` with this halo.
        view: The photos.
        tile: None: all of the view.
        ssim_lambda: Weight of 1 - SSIM; L1 has the rest.
        halo: 5, as SSIM needs; or 10, and then the gradient of each pixel of the tile is complete, and that of the
            halo is zero.

    Returns:
        Scalar.
    """
    if tile is None:
        return photometric_loss(rendered, view.photos, ssim_lambda=ssim_lambda, masks=view.masks)
    padded = tile.with_halo(halo, view.cameras.width, view.cameras.height)
    target = view.part(*_place(padded))
    inner = tile._replace(camera=0, x=tile.x - padded.x, y=tile.y - padded.y)  # the tile in what was rendered
    if halo > HALO:
        rendered.register_hook(lambda gradient: _only(gradient, inner))
    if view.masks is not None:
        masks = _pixels(view.masks, padded)
        rendered = torch.where(masks[..., None], rendered, 0.0)
        target = torch.where(masks[..., None], target, 0.0)
    # With so large a halo, SSIM has a value for each window whose centre lies in the tile, and for no other.
    ssim_weight = -ssim_lambda / count_windows(view.photos)
    ssim = photometric_sum(rendered, target, 0.0, ssim_weight)
    if halo > HALO:  # the gradient is right, but windows around the tile must not count
        seen = inner.with_halo(HALO, padded.width, padded.height)
        counted = photometric_sum(_pixels(rendered.detach(), seen), _pixels(target, seen), 0.0, ssim_weight)
        ssim = ssim - (ssim.detach() - counted)
    l1_weight = (1 - ssim_lambda) / view.photos.numel()
    l1 = l1_weight * (_pixels(rendered, inner) - _pixels(target, inner)).abs().sum()
    share = 3 * tile.width * tile.height / view.photos.numel()
    return ssim_lambda * share + l1 + ssim


def _pixels(pictures: Tensor, tile: Tile) -> Tensor:
    """Return the pixels [1, h, w, ...] of a tile in pictures [C, H, W, ...]; a view."""
    return pictures[_place(tile)]


def _place(tile: Tile) -> tuple[slice, slice, slice]:
    """Return which camera's pictures a tile is of, and its rows and columns there."""
    rows, columns = slice(tile.y, tile.y + tile.height), slice(tile.x, tile.x + tile.width)
    return slice(tile.camera, tile.camera + 1), rows, columns


def _only(gradient: Tensor, tile: Tile) -> Tensor:
    kept = torch.zeros_like(gradient)
    _pixels(kept, tile).copy_(_pixels(gradient, tile))
    return kept


@dataclass
class _Sums:
    """Hold what the parts of a view have added up to."""

    gradients: Tensor  # [C V, 2] of means2d
    absolute: Tensor | None  # [C V, 2] of absolute ones
    radii: Tensor  # [C V] pixels, 0 where a Gaussian is not seen


class ScreenGradients:
    """Gather what a strategy asks of a rendering of a view, from renderings of its parts.

    A Gaussian that several tiles of a picture see has its gradients added up before their norm is taken.
    """

    def __init__(self, cameras: Cameras, *, needed: bool = True, with_rows: bool = False) -> None:
        """
        Args:
            cameras: Of the view that is rendered.
            needed: Whether the strategy will look; else nothing is kept.
            with_rows: Whether it will also ask for the geometry of what was drawn.
        """
        self._cameras = cameras
        self._needed = needed
        self._rows: dict[str, Tensor] | None = {} if needed and with_rows else None  # [V, ...], right where drawn
        self._whole: Mapping[str, Any] | None = None  # info of the one part that is all of the view
        self._sums: _Sums | None = None  # of the others

    @torch.no_grad()
    def add(self, part: ViewTile, num_visible: int, info: Mapping[str, Any]) -> None:
        """Take in a part after its backward pass.

        Args:
            part: What was rendered.
            num_visible: V, rows of the view.
            info: Of its rendering; `means2d` has its gradient.
        """
        if not self._needed:
            return
        if not part.tiles:
            self._whole = info
            if self._rows is not None:
                self._rows = {name: part.rows[name].detach() for name in MOVED_BY}
            return
        means2d, absolute = info["means2d"], getattr(info["means2d"], "absgrad", None)
        rows = info["gaussian_ids"] if part.positions is None else part.positions[info["gaussian_ids"]]
        radii = info["radii"].amax(dim=-1)
        if self._sums is None:
            gradients = means2d.new_zeros(len(self._cameras.Ks) * num_visible, 2)
            of_absolute = None if absolute is None else torch.zeros_like(gradients)
            self._sums = _Sums(gradients, of_absolute, radii.new_zeros(len(gradients)))
        if self._rows is not None:
            for name in MOVED_BY:
                drawn = part.rows[name].detach()[info["gaussian_ids"]]
                every = self._rows.setdefault(name, drawn.new_zeros(num_visible, *drawn.shape[1:]))
                every.index_copy_(0, rows, drawn)
        pairs = info["camera_ids"] * num_visible + rows
        self._sums.radii.index_copy_(0, pairs, radii)
        self._sums.gradients.index_add_(0, pairs, means2d.grad)
        if self._sums.absolute is not None and absolute is not None:
            self._sums.absolute.index_add_(0, pairs, absolute)

    def newly_drawn(self, part: ViewTile, info: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return which rows of a part are drawn, as `info` says it, without those that a part before has drawn.

        Args:
            part: What is rendered.
            info: Of its rendering.
        """
        if self._sums is None or not part.tiles:
            return info
        drawn = info["gaussian_ids"]
        rows = drawn if part.positions is None else part.positions[drawn]
        radii = self._sums.radii.view(len(self._cameras.Ks), -1)
        return {"gaussian_ids": drawn[radii[:, rows].amax(0) == 0], "n_cameras": len(part.tiles)}

    def rows(self) -> dict[str, Tensor]:
        """Return the geometry [V, ...] of the view's rows, where they were drawn, with the values that were."""
        return self._rows or {}

    def info(self) -> dict[str, Any]:
        """Return what one rendering of the view would have told a strategy."""
        if not self._needed:
            return {}
        if self._whole is not None:
            return dict(self._whole)
        sums = self._sums
        if sums is None:
            raise RuntimeError("no part of the view has been rendered")
        pairs = sums.radii.nonzero().squeeze(1)
        return {
            "means2d": SimpleNamespace(
                grad=sums.gradients[pairs], absgrad=None if sums.absolute is None else sums.absolute[pairs]
            ),
            "gaussian_ids": pairs % (len(sums.radii) // len(self._cameras.Ks)),
            "radii": sums.radii[pairs][:, None],
            "width": self._cameras.width,
            "height": self._cameras.height,
            "n_cameras": len(self._cameras.Ks),
        }
