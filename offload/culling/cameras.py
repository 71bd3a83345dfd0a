"""The cameras that culling looks through, and how far geometry may move before it is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cameras:
    """C pinhole cameras of one picture size, and how the rasterizer draws them."""

    viewmats: Tensor  # [C, 4, 4] float32 on the CPU, world to camera, rigid
    Ks: Tensor  # [C, 3, 3] float32 on the CPU, pixels
    width: int
    height: int
    near_plane: float = 0.01
    far_plane: float = 1e10
    eps2d: float = 0.3  # pixels^2
    antialiased: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.near_plane < self.far_plane:
            raise ValueError(f"near_plane {self.near_plane} and far_plane {self.far_plane} are not 0 < near < far")


@dataclass(frozen=True)
class Margin:
    """How much geometry may move between culling and drawing: the largest change of any one number of a row."""

    means: float = 0.0  # world units
    scales: float = 0.0  # of log scales
    quats: float = 0.0  # of stored quaternions
    opacities: float = 0.0  # of logit opacities
    pixels: float = 0.0  # added to the radii on top
