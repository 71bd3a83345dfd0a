"""A synthetic aerial scene of any size: blocks of a town seen from above, where one view sees about 8 % of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.culling.cameras import Cameras
from offload.culling.native import BlockBounds, visible_ids
from offload.store.morton import morton_order

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
REPEATED_ROWS = 2**20


@dataclass
class AerialCameras:
    viewmats: Tensor  # [64, 4, 4] world to camera
    Ks: Tensor  # [64, 3, 3] pixels
    width: int
    height: int
    near_plane: float = NEAR_PLANE


def aerial_scene(
    num_gaussians: int,
    seed: int,
    *,
    focal: float | Sequence[float] = FOCAL,
    picture_scale: float = 1.0,
    rows: Tensor | None = None,
) -> tuple[dict[str, Tensor], AerialCameras]:
    """Make Gaussians in Morton order and cameras above them.

    Needs hardly more memory than the result, 236 bytes per Gaussian; and where some rows alone are wanted, 44 bytes of
    each of N before.

    Args:
        num_gaussians: N.
        seed: Everything random is drawn from it.
        focal: Focal length in pixels, of all cameras or of each; the longer, the smaller the part of the scene that
            a view sees.
        picture_scale: Factor on the pictures' sides and on the focal length.
        rows: [M] int64, which of the Gaussians are wanted; None: all.

    Returns:
        means [N, 3], scales [N, 3] (log), quats [N, 4], opacities [N] (logit), sh0 [N, 1, 3] and shN [N, 15, 3], all
        float32 on the CPU; and the cameras.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = aerial_geometry(num_gaussians, generator)
    if rows is not None:
        parameters = {name: value[rows] for name, value in parameters.items()}
    parameters["sh0"] = repeated_normal((num_gaussians, 1, 3), 0.5, generator, rows)
    parameters["shN"] = repeated_normal((num_gaussians, 15, 3), 0.05, generator, rows)
    return parameters, aerial_cameras(seed, focal=focal, picture_scale=picture_scale)


def repeated_normal(
    shape: tuple[int, ...], deviation: float, generator: torch.Generator, rows: Tensor | None = None
) -> Tensor:
    """Draw normal random numbers that repeat after `REPEATED_ROWS` rows: 40 million of them take long.

    Args:
        shape: Of all numbers.
        deviation: Their standard deviation.
        generator: They are drawn from it.
        rows: [M] int64, which rows are wanted; None: all.
    """
    if rows is not None:
        first = torch.empty(min(shape[0], REPEATED_ROWS), *shape[1:]).normal_(0, deviation, generator=generator)
        return first[rows % REPEATED_ROWS]
    values = torch.empty(shape)
    first = values[:REPEATED_ROWS].normal_(0, deviation, generator=generator)
    for begin in range(REPEATED_ROWS, len(values), REPEATED_ROWS):
        part = values[begin : begin + REPEATED_ROWS]
        part.copy_(first[: len(part)])
    return values


def aerial_geometry(num_gaussians: int, generator: torch.Generator, *, ground: float = GROUND) -> dict[str, Tensor]:
    """Make the means, scales, quats and opacities of `aerial_scene`, from a generator with its seed.

    Args:
        num_gaussians: N.
        generator: Everything random is drawn from it.
        ground: World units, both sides of what is built over; its middle is the origin.
    """
    cells = round(ground / BLOCK)
    heights = torch.rand(cells, cells, generator=generator) * MAX_HEIGHT
    means = torch.rand(num_gaussians, 3, generator=generator)
    cell = (means[:, :2] * cells).long().clamp(max=cells - 1)
    means[:, 2] = heights[cell[:, 0], cell[:, 1]] / ground
    del cell
    # All else is drawn at random, so sorting the means sorts the scene.
    means = means[morton_order(means)]
    means[:, :2] -= 0.5
    means *= ground
    quats = torch.empty(num_gaussians, 4).normal_(0, 0.3, generator=generator)
    quats[:, 0] += 1.0
    return {
        "means": means,
        "scales": torch.full((num_gaussians, 3), math.log(ground / math.sqrt(max(num_gaussians, 1)))),
        "quats": quats,
        "opacities": torch.empty(num_gaussians).normal_(0, 1, generator=generator),
    }


def aerial_cameras(
    seed: int,
    *,
    focal: float | Sequence[float] = FOCAL,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    picture_scale: float = 1.0,
) -> AerialCameras:
    """Place cameras at one height that look down, each with its heading and tilt.

    Args:
        seed: Everything random is drawn from it.
        focal: Focal length in pixels, of all cameras or of each.
        size: Width and height of the pictures in pixels.
        picture_scale: Factor on the pictures' sides and on the focal lengths.
    """
    generator = torch.Generator().manual_seed(seed + 1)
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
    width, height = scaled(size, picture_scale)
    Ks = torch.tensor([[0.0, 0, width / 2], [0, 0, height / 2], [0, 0, 1]]).repeat(NUM_CAMERAS, 1, 1)
    Ks[:, 0, 0] = Ks[:, 1, 1] = torch.as_tensor(focal) * picture_scale
    return AerialCameras(viewmats, Ks, width, height)


def scaled(size: tuple[int, int], picture_scale: float) -> tuple[int, int]:
    """Return the width and height in pixels of pictures whose sides are scaled."""
    width, height = size
    return round(width * picture_scale), round(height * picture_scale)


def geometry_rows(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return geometry [N, 12] as the host store keeps it."""
    rows = torch.zeros(len(parameters["means"]), 12)
    rows[:, 0:3] = parameters["means"]
    rows[:, 3:6] = parameters["scales"]
    rows[:, 6:10] = parameters["quats"]
    rows[:, 10] = parameters["opacities"]
    return rows


def one_by_one(cameras: AerialCameras) -> list[Cameras]:
    """Return each camera alone, as culling takes it."""
    return [
        Cameras(viewmat[None], K[None], cameras.width, cameras.height, near_plane=cameras.near_plane)
        for viewmat, K in zip(cameras.viewmats, cameras.Ks, strict=True)
    ]


class VisibleCounts:
    """Count the Gaussians of `aerial_scene` that its views see."""

    def __init__(self, num_gaussians: int, seed: int) -> None:
        self.seed = seed
        self._geometry = geometry_rows(aerial_geometry(num_gaussians, torch.Generator().manual_seed(seed)))
        self._bounds = BlockBounds(self._geometry)

    def mean(self, focal: float) -> float:
        """Return the mean over all cameras."""
        cameras = one_by_one(aerial_cameras(self.seed, focal=focal))
        return sum(len(visible_ids(self._geometry, self._bounds, camera)) for camera in cameras) / len(cameras)

    def focal_for(self, visible: float) -> float:
        """Find the focal length in pixels at which views see this many Gaussians in the mean, within 1 %."""
        focal = FOCAL
        for _ in range(30):
            found = self.mean(focal)
            if abs(found / visible - 1) < 0.01:
                break
            focal *= math.sqrt(max(found, 1) / visible)  # the ground that a view sees shrinks with the square
        return focal


def mean_visible(num_gaussians: int, focal: float, seed: int = 0) -> float:
    """Count the Gaussians that a view sees in the mean."""
    return VisibleCounts(num_gaussians, seed).mean(focal)


def focals_for(num_gaussians: int, visible: Sequence[float], seed: int = 0) -> list[tuple[float, float]]:
    """Find the focal length in pixels for each wanted mean number of visible Gaussians, and the number then."""
    counts = VisibleCounts(num_gaussians, seed)
    focals = [counts.focal_for(wanted) for wanted in visible]
    return [(focal, counts.mean(focal)) for focal in focals]
