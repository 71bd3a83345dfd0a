"""The photos and cameras of a step, and the rendering that is compared with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from configs import Config
from datasets.loader import Batch
from distributed.exchange import PairExchange
from distributed.mesh import Ranks
from offload.culling.cameras import Cameras
from offload.models.contract import GaussianModel
from rendering.losses import as_colors
from rendering.rasterize import rasterize
from rendering.region import Region
from training.gaussians import activate


class Backdrop(Protocol):
    """Stand for what is behind the Gaussians where that is more than one colour for each camera."""

    def __call__(self, cameras: Cameras, region: Region | None) -> Tensor:
        """Return the colours [C, h, w, 3] behind the pixels of a region; None: of the whole pictures [C, H, W, 3]."""


@dataclass(frozen=True)
class View:
    """Hold C photos of one size on the training device, and the cameras of the step on the host.

    The cameras are those that took the photos; where ranks train together, those that took the photos of all ranks, in
    their order.
    """

    photos: Tensor  # [C, H, W, 3] uint8; or float32 in [0, 1]
    cameras: Cameras  # C or W C, of which culling and the rasterizer take all they know
    masks: Tensor | None = None  # [C, H, W] bool, True where the picture is valid; None: everywhere
    image_ids: Tensor | None = None  # int64 on the host, of each camera its image of the scene; None: of no scene
    inverse_depths: Tensor | None = None  # [C, H, W] float32, one over the depth, 0: unknown; None: depths do not count

    @staticmethod
    def from_batch(batch: Batch, cfg: Config, device: torch.device) -> View:
        """Send a loaded batch to the device; pictures stay uint8 there."""
        photos = batch.images.to(device, non_blocking=True)
        masks = None if batch.masks is None else batch.masks.to(device, non_blocking=True)
        height, width = photos.shape[1:3]
        viewmats = torch.linalg.inv(batch.camtoworlds.double()).float()
        cameras = posed_cameras(viewmats, batch.Ks, width, height, cfg)
        inverse = batch.inverse_depths
        inverse = None if inverse is None else inverse.to(device, non_blocking=True)
        return View(photos, cameras, masks, batch.image_ids, inverse)

    @property
    def images(self) -> Tensor:
        """Return the photos, [C, H, W, 3] float32 in [0, 1]: of uint8 made anew each time, so that two views' photos
        wait for their losses in a quarter of the memory."""
        return self.part(slice(None), slice(None), slice(None))

    def part(self, cameras: slice, rows: slice, columns: slice) -> Tensor:
        """Return some pixels of the photos of some cameras, float32 in [0, 1]."""
        return as_colors(self.photos[cameras, rows, columns])


def posed_cameras(viewmats: Tensor, Ks: Tensor, width: int, height: int, cfg: Config) -> Cameras:
    """Return cameras that draw as the options say.

    Args:
        viewmats: [C, 4, 4] float32 on the host, world to camera.
        Ks: [C, 3, 3] float32 on the host, in pixels.
        width: Of the pictures, in pixels.
        height: The same.
        cfg: Gives the planes, and whether small Gaussians are compensated.
    """
    return Cameras(
        viewmats=viewmats,
        Ks=Ks,
        width=width,
        height=height,
        near_plane=cfg.near_plane,
        far_plane=cfg.far_plane,
        antialiased=cfg.antialiased,
    )


def render(
    rows: Mapping[str, Tensor],
    cameras: Cameras,
    cfg: Config,
    *,
    sh_degree: int,
    backgrounds: Tensor | Backdrop | None = None,
    region: Region | None = None,
    depth: bool = False,
    ranks: Ranks | None = None,
) -> tuple[Tensor, dict]:
    """Draw Gaussians as cameras see them; no photo is needed.

    Args:
        rows: The Gaussians' parameters, as `training.gaussians.activate` takes them.
        cameras: C of them; where ranks train together W C, of which each rank draws C.
        cfg: Says whether the strategy wants absolute gradients, and whether depths count.
        sh_degree: Degree of the spherical harmonics to use.
        backgrounds: [C, 3] colours behind the scene, or what makes those of each pixel; None is black.
        region: Render these pixels only; None: all.
        depth: Add a fourth channel: the mean distance along the viewing direction of what is seen, in world units; 0
            where nothing is.
        ranks: Each gives its own Gaussians, all of them call this together; None: there is this process only.

    Returns:
        Colours [C, H, W, 3 or 4], of the region's size, and `rendering.rasterize`'s info; where gradients are wanted,
        `info["means2d"]` keeps its own, on the screen, for the strategy. Where depths count in training,
        `info["expected_depths"]` [C, H, W] are those of the pixels, 0 where nothing is drawn.
    """
    exchange = None if ranks is None else PairExchange(ranks, len(cameras.Ks) // ranks.size, cfg.absgrad)
    depths_count = cfg.depth_loss and torch.is_grad_enabled()  # which training alone looks at
    colors, alphas, info = rasterize(
        **projected_by(rows, cameras, sh_degree=sh_degree),
        region=region,
        absgrad=cfg.absgrad,
        render_mode="RGB+ED" if depth or depths_count else "RGB",
        backgrounds=None if callable(backgrounds) else backgrounds,
        exchange=exchange,
    )
    if callable(backgrounds):
        colors = before_backdrop(colors, alphas, backgrounds, own_cameras(cameras, ranks), region)
    if depths_count:
        info["expected_depths"] = colors[..., 3]
        colors = colors if depth else colors[..., :3]
    if info["means2d"].requires_grad:
        info["means2d"].retain_grad()
    return colors, info


def own_views(num_own: int, ranks: Ranks | None) -> slice:
    """Return which of a step's views are this process's, which has so many: all, or as many as each other rank."""
    first = 0 if ranks is None else ranks.rank * num_own
    return slice(first, first + num_own)


def own_cameras(cameras: Cameras, ranks: Ranks | None) -> Cameras:
    """Return those of a step's cameras whose pictures this process draws."""
    if ranks is None:
        return cameras
    own = own_views(len(cameras.Ks) // ranks.size, ranks)
    return replace(cameras, viewmats=cameras.viewmats[own], Ks=cameras.Ks[own])


def projected_by(rows: Mapping[str, Tensor], cameras: Cameras, *, sh_degree: int) -> dict[str, Any]:
    """Return what `rendering.rasterize` asks of Gaussians and cameras, by its names; as `render` takes them."""
    return dict(
        **activate(rows),
        viewmats=cameras.viewmats,
        Ks=cameras.Ks,
        width=cameras.width,
        height=cameras.height,
        sh_degree=sh_degree,
        near_plane=cameras.near_plane,
        far_plane=cameras.far_plane,
        eps2d=cameras.eps2d,
        rasterize_mode="antialiased" if cameras.antialiased else "classic",
    )


def before_backdrop(
    colors: Tensor, alphas: Tensor, backdrop: Backdrop, cameras: Cameras, region: Region | None
) -> Tensor:
    """Return colours [C, h, w, 3 or 4] with a backdrop behind what alphas [C, h, w, 1] leave free."""
    behind = (1.0 - alphas) * backdrop(cameras, region)
    return torch.cat([colors[..., :3] + behind, colors[..., 3:]], dim=-1)


@torch.no_grad()
def draw_together(
    model: GaussianModel,
    cameras: Cameras,
    cfg: Config,
    ranks: Ranks,
    *,
    backgrounds: Tensor | Backdrop | None = None,
    depth: bool = False,
) -> Tensor:
    """Return the pictures [C, H, W, 3 or 4] that a rank's cameras see of the Gaussians of all ranks.

    All of them call this at once. Backgrounds and depth are those of `render`, for the rank's own cameras.
    """

    def draw(together: Cameras) -> Tensor:
        rows, degree = model.read_view(together), cfg.sh_degree
        return render(rows, together, cfg, sh_degree=degree, backgrounds=backgrounds, depth=depth, ranks=ranks)[0]

    return drawn_together(cameras, ranks, draw)


def drawn_together(cameras: Cameras, ranks: Ranks, draw: Callable[[Cameras], Tensor]) -> Tensor:
    """Return the pictures [C, H, W, ...] that a rank's cameras see, where all ranks draw at once.

    Args:
        cameras: C of them, at each rank; those of one rank have one size, and others another.
        ranks: W of them.
        draw: Returns this rank's pictures of W C cameras of one size; called by all ranks at once.
    """
    everyone = ranks.gather(cameras)
    if len({(each.width, each.height) for each in everyone}) == 1:
        batches = [everyone]
    else:  # a rendering has pictures of one size: all ranks draw those of each
        batches = [[each] * ranks.size for each in everyone]
    pictures = []
    for batch in batches:
        viewmats, Ks = (torch.cat([getattr(each, name) for each in batch]) for name in ("viewmats", "Ks"))
        pictures.append(draw(replace(batch[0], viewmats=viewmats, Ks=Ks)))
    return pictures[0] if len(batches) == 1 else pictures[ranks.rank]
