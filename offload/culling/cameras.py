"""The cameras that culling looks through, how far geometry may move before it is drawn, and both packed for kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from offload.backends import native


@dataclass(frozen=True, eq=False)  # compared by identity: a view that has been prefetched is known by its cameras
class Cameras:
    """Hold C pinhole cameras of one picture size, and how the rasterizer draws what they see."""

    viewmats: Tensor  # [C, 4, 4] float32 on the CPU, world to camera, rigid
    Ks: Tensor  # [C, 3, 3] float32 on the CPU, pixels
    width: int  # pixels
    height: int  # pixels
    near_plane: float = 0.01  # world units
    far_plane: float = 1e10  # world units
    eps2d: float = 0.3  # pixels^2, added to image covariances
    antialiased: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.near_plane < self.far_plane:
            raise ValueError(f"near_plane {self.near_plane} and far_plane {self.far_plane} are not 0 < near < far")


@dataclass(frozen=True)
class Margin:
    """Say how far geometry may move between culling and drawing, by the largest change of any one number of a row."""

    means: float = 0.0  # world units
    scales: float = 0.0  # of log scales
    quats: float = 0.0  # of stored quaternions
    opacities: float = 0.0  # of logit opacities
    pixels: float = 0.0  # added to the radii on top
    # The bias correction of skipped steps: a factor on how far boxes know means to drift by them, beside `means`
    # (`offload/culling/boxes.py`); 0 where `means` allows for it.
    drift_correction: float = 0.0


def pack(cameras: Cameras, margin: Margin) -> np.ndarray:
    """Pack cameras, and how far geometry may move before they draw it, for kernels.

    It takes microseconds. `offload/csrc/culling_kernels.h` says what the numbers are.

    Args:
        cameras: C of them.
        margin: How much rows may still move.

    Returns:
        [C, native.CAMERA_FLOATS] float32; `native.CAMERA_FIELDS` names the first column of each field.
    """
    packed = np.empty((len(cameras.viewmats), native.CAMERA_FLOATS), np.float32)
    native.pack_cameras(
        cameras.viewmats.contiguous().numpy(), cameras.Ks.contiguous().numpy(), cameras.width, cameras.height,
        cameras.near_plane, cameras.far_plane, cameras.eps2d, cameras.antialiased, margin.means, margin.scales,
        margin.quats, margin.opacities, margin.pixels, packed,
    )  # fmt: skip
    return packed
