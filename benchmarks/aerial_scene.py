"""A synthetic aerial scene of any size: blocks of a town seen from above, where one view sees about 8 % of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.morton import morton_order

GROUND = 10.0  # world units, both sides
BLOCK = 0.25  # width of the blocks, whose heights vary up to MAX_HEIGHT
MAX_HEIGHT = 0.5
NUM_CAMERAS = 64
CAMERA_HEIGHT = 2.83
CAMERA_RANGE = 3.2  # cameras stand within plus and minus this
MAX_TILT = 0.4  # radians from straight down
FOCAL = 1000.0  # pixels
WIDTH, HEIGHT = 1152, 864  # pixels
NEAR_PLANE = 0.01


@dataclass
class AerialCameras:
    viewmats: Tensor  # [64, 4, 4] world to camera
    Ks: Tensor  # [64, 3, 3] pixels
    width: int = WIDTH
    height: int = HEIGHT
    near_plane: float = NEAR_PLANE


def aerial_scene(num_gaussians: int, seed: int) -> tuple[dict[str, Tensor], AerialCameras]:
    """Gaussians in Morton order and cameras above them.

    Needs hardly more memory than the result, 236 bytes per Gaussian.

    Returns:
        means [N, 3], scales [N, 3] (log), quats [N, 4], opacities [N] (logit), sh0 [N, 1, 3] and shN [N, 15, 3], all
        float32 on the CPU; and the cameras.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = aerial_geometry(num_gaussians, generator)
    parameters["sh0"] = torch.empty(num_gaussians, 1, 3).normal_(0, 0.5, generator=generator)
    parameters["shN"] = torch.empty(num_gaussians, 15, 3).normal_(0, 0.05, generator=generator)
    return parameters, aerial_cameras(generator)


def aerial_geometry(num_gaussians: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The means, scales, quats and opacities of `aerial_scene`."""
    cells = round(GROUND / BLOCK)
    heights = torch.rand(cells, cells, generator=generator) * MAX_HEIGHT
    means = torch.rand(num_gaussians, 3, generator=generator)
    cell = (means[:, :2] * cells).long().clamp(max=cells - 1)
    means[:, 2] = heights[cell[:, 0], cell[:, 1]] / GROUND
    del cell
    # All else is drawn at random, so sorting the means sorts the scene.
    means = means[morton_order(means)]
    means[:, :2] -= 0.5
    means *= GROUND
    quats = torch.empty(num_gaussians, 4).normal_(0, 0.3, generator=generator)
    quats[:, 0] += 1.0
    return {
        "means": means,
        "scales": torch.full((num_gaussians, 3), math.log(GROUND / math.sqrt(max(num_gaussians, 1)))),
        "quats": quats,
        "opacities": torch.empty(num_gaussians).normal_(0, 1, generator=generator),
    }


def aerial_cameras(generator: torch.Generator) -> AerialCameras:
    """Cameras at one height that look down, each with its heading and tilt."""
    viewmats = torch.eye(4).repeat(NUM_CAMERAS, 1, 1)
    for viewmat in viewmats:
        u, v, turn, lean = torch.rand(4, generator=generator).tolist()
        position = torch.tensor([(2 * u - 1) * CAMERA_RANGE, (2 * v - 1) * CAMERA_RANGE, CAMERA_HEIGHT])
        heading, tilt = 2 * math.pi * turn, MAX_TILT * lean
        right = torch.tensor([math.cos(heading), math.sin(heading), 0.0])
        ahead = torch.tensor([-math.sin(heading), math.cos(heading), 0.0])
        forward = math.sin(tilt) * ahead - math.cos(tilt) * torch.tensor([0.0, 0.0, 1.0])
        viewmat[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
        viewmat[:3, 3] = -viewmat[:3, :3] @ position
    K = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    return AerialCameras(viewmats, K.repeat(NUM_CAMERAS, 1, 1))
