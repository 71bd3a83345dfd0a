"""A batch of posed pictures on the training device, and the rendering that is compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs import Config
from datasets.loader import Batch
from offload.culling.cameras import Cameras
from rendering.rasterize import rasterize
from rendering.region import Region


@dataclass(frozen=True)
class View:
    """C pictures of one size and their cameras, on the training device."""

    images: Tensor  # [C, H, W, 3] float32 in [0, 1]
    masks: Tensor | None  # [C, H, W] bool, True where the picture is valid; None: everywhere
    viewmats: Tensor  # [C, 4, 4] world to camera
    Ks: Tensor  # [C, 3, 3] in pixels
    host_viewmats: Tensor  # [C, 4, 4] and
    host_Ks: Tensor  # [C, 3, 3], the same on the host
    width: int
    height: int

    @staticmethod
    def from_batch(batch: Batch, device: torch.device) -> View:
        """Send a loaded batch to the device; pictures travel as uint8."""
        images = batch.images.to(device, non_blocking=True)
        masks = None if batch.masks is None else batch.masks.to(device, non_blocking=True)
        viewmats = torch.linalg.inv(batch.camtoworlds.double()).float()
        return View.of(images.float().div_(255.0), viewmats, batch.Ks, masks)

    @staticmethod
    def of(images: Tensor, viewmats: Tensor, Ks: Tensor, masks: Tensor | None = None) -> View:
        """Pictures, and masks, that are on the device already, with their cameras, which are on the host."""
        return View(
            images=images,
            masks=masks,
            viewmats=viewmats.to(images.device, non_blocking=True),
            Ks=Ks.to(images.device, non_blocking=True),
            host_viewmats=viewmats,
            host_Ks=Ks,
            width=images.shape[2],
            height=images.shape[1],
        )

    def of_cameras(self, cameras: slice) -> View:
        """Some of the pictures and their cameras."""
        return replace(
            self,
            images=self.images[cameras],
            masks=None if self.masks is None else self.masks[cameras],
            viewmats=self.viewmats[cameras],
            Ks=self.Ks[cameras],
            host_viewmats=self.host_viewmats[cameras],
            host_Ks=self.host_Ks[cameras],
        )


def cameras_of(view: View, cfg: Config) -> Cameras:
    """The cameras of a view as culling takes them."""
    return Cameras(
        viewmats=view.host_viewmats,
        Ks=view.host_Ks,
        width=view.width,
        height=view.height,
        near_plane=cfg.near_plane,
        far_plane=cfg.far_plane,
        antialiased=cfg.antialiased,
    )


def render_view(
    activated: Mapping[str, Tensor],
    view: View,
    cfg: Config,
    *,
    sh_degree: int,
    backgrounds: Tensor | None = None,
    region: Region | None = None,
) -> tuple[Tensor, Tensor, dict]:
    """Rasterize Gaussians as the options say.

    Args:
        activated: Arguments of `rendering.rasterize.rasterize`, as made by `training.gaussians.activate`.
        view: The cameras.
        cfg: Options.
        sh_degree: Degree of the spherical harmonics to use.
        backgrounds: [C, 3] colours behind the scene; None is black.
        region: Render these pixels only; None: all.

    Returns:
        Colours [C, H, W, 3], alphas [C, H, W, 1], of the region's size, and `rasterize`'s info.
    """
    return rasterize(
        **activated,
        viewmats=view.viewmats,
        Ks=view.Ks,
        width=view.width,
        height=view.height,
        region=region,
        sh_degree=sh_degree,
        near_plane=cfg.near_plane,
        far_plane=cfg.far_plane,
        rasterize_mode="antialiased" if cfg.antialiased else "classic",
        absgrad=cfg.absgrad,
        backgrounds=backgrounds,
    )
