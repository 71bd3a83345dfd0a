"""A finished model that is looked at: in host memory, of which a view brings what it sees to the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs import Config
from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras
from offload.models.streamed import StreamedGaussians
from offload.store.morton import morton_order
from training.gaussians import PARAMETER_NAMES
from training.modules import sky_of
from training.starting_model import StartingModel
from training.views import Backdrop, posed_cameras, render

# Where a window opens: seen obliquely, 31 degrees from above, heights and what stands behind them are told apart; from
# 2.5 times the median distance of the means to their middle, a lens of common width shows most of them.
SIDEWARDS, UPWARDS = 2.0, 1.2  # parts of the way from the middle to the camera
DISTANCE = 2.5  # medians of the means' distances to their middle
STILL = AdamOptions(dict.fromkeys(PARAMETER_NAMES, 0.0), lambda step: 0.0, (0.9, 0.999))  # nothing is trained


class OpenedModel:
    """Hold N Gaussians in host memory, and draw them.

    Attributes:
        gaussians: The streamed trainer's model of them, with geometry on the host.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        device: torch.device,
        *,
        antialiased: bool = False,
        backgrounds: Tensor | Backdrop | None = None,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`, best in Morton order.
            device: Where views are rendered.
            antialiased: As it was trained.
            backgrounds: What is behind it, of one camera, as `training.views.render` takes it.
        """
        self._backgrounds = backgrounds
        self._degree = round((parameters["shN"].shape[1] + 1) ** 0.5) - 1
        self._cfg = Config(antialiased=antialiased)
        # Of moments, which are never touched, the smaller ones take less where memory is pinned.
        self.gaussians = StreamedGaussians(parameters, STILL, device=device, geometry="host", moments="bfloat16")

    def make_cameras(self, viewmats: Tensor, Ks: Tensor, width: int, height: int) -> Cameras:
        """Return cameras that draw as the model wants; as `training.views.posed_cameras`."""
        return posed_cameras(viewmats, Ks, width, height, self._cfg)

    def draw(self, cameras: Cameras) -> Tensor:
        """Return the picture [1, H, W, 3] that one camera sees."""
        rows = self.gaussians.read_view(cameras)
        return render(rows, cameras, self._cfg, sh_degree=self._degree, backgrounds=self._backgrounds)[0]


def open_model(path: Path, device: torch.device, *, antialiased: bool) -> tuple[OpenedModel, np.ndarray, np.ndarray]:
    """Read a checkpoint or PLY file.

    Args:
        path: Of any program that writes the layout of 3DGS, or a checkpoint.
        device: Where views are rendered.
        antialiased: As it was trained, where the file does not say; a checkpoint does.

    Returns:
        The model; the direction that is up in its world [3]; and a pose [4, 4] from which most of it is seen.

    Raises:
        InputError: The file cannot be read, or holds no Gaussians that can be drawn.
    """
    found = StartingModel.load(path, "The model")
    order = morton_order(found.gaussians["means"])
    parameters = {name: found.gaussians[name][order] for name in PARAMETER_NAMES}
    # Where the file does not say what is up, it most likely has the axes of COLMAP and 3DGS, with y down.
    up = np.array([0.0, 0.0, 1.0]) if found.up == "z" else np.array([0.0, -1.0, 0.0])
    backgrounds: Tensor | Backdrop | None = None
    if found.sky:
        backgrounds = sky_of(found.sky, device)
    elif found.background == "white":
        backgrounds = torch.ones(1, 3, device=device)
    is_antialiased = antialiased or found.antialiased
    model = OpenedModel(parameters, device, antialiased=is_antialiased, backgrounds=backgrounds)
    return model, up, pose_before(parameters["means"].numpy(), up)


def pose_before(means: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return a level pose [4, 4] that looks at the middle of means [N, 3], from above and outside of most of them."""
    sample = means[:: len(means) // 100_000 + 1].astype(np.float64)
    middle = np.median(sample, axis=0)
    radius = float(np.median(np.linalg.norm(sample - middle, axis=1))) or 1.0
    side = np.eye(3)[np.abs(up).argmin()]
    towards = SIDEWARDS * side + UPWARDS * up
    forward = -towards / np.linalg.norm(towards)
    right = np.cross(forward, up) / np.linalg.norm(np.cross(forward, up))
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = middle - DISTANCE * radius * forward
    return pose
