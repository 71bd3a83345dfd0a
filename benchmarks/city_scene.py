"""A synthetic city of hundreds of millions of Gaussians, of which a view sees as small a part as is wanted.

The ground of `aerial_scene` in 16x16 tiles that are alike, so that neither making the city nor counting what a view
sees takes more than a tile's memory, beside 20 bytes a Gaussian: the store that it is put into can have nearly all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from benchmarks.aerial_scene import (
    FOCAL,
    GROUND,
    AerialCameras,
    aerial_cameras,
    aerial_geometry,
    geometry_rows,
    one_by_one,
)
from offload.culling.cameras import Cameras
from offload.culling.native import BlockBounds, visible_ids
from offload.store.morton import morton_order

SIDE = 16  # tiles; a power of 2, so that Morton order goes through tile after tile
TILE = GROUND / SIDE  # world units; above the height of all houses, for the same reason
SIZE = (1920, 1080)  # pixels
SEEN = 0.16  # about this share of the Gaussians is seen with FOCAL
CLOSE = 0.01  # relative error of the share that a view sees
MOST_TURNS = 30  # of looking for focal lengths
LONGEST_ROW = 45  # values, of shN


class City:
    """N Gaussians over the ground of `aerial_scene`, as dense as there, in Morton order."""

    def __init__(self, num_gaussians: int, seed: int) -> None:
        """
        Args:
            num_gaussians: N.
            seed: Everything random is drawn from it.
        """
        self.num_gaussians = num_gaussians
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        places = (torch.cartesian_prod(*[torch.arange(SIDE)] * 2) + 0.5) * TILE - GROUND / 2  # [tiles, 2]
        places = torch.nn.functional.pad(places, (0, 1))
        self._places = places[morton_order(places)]  # [tiles, 3], where the middle of each is
        self._tile = aerial_geometry(-(-num_gaussians // len(places)), generator, ground=TILE)
        self._culled: tuple[Tensor, BlockBounds] | None = None  # the tile
        reach, opacity = torch.tensor(math.log(TILE / 2)), torch.tensor(9.0)
        # All tiles, each as one Gaussian that reaches well beyond it.
        self._tiles_culled = _culled(
            {"means": self._places, "scales": reach, "quats": torch.eye(4)[0], "opacities": opacity}
        )

    def parameters(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Return what training starts with, as `aerial_scene` does, in 20 bytes a Gaussian.

        Only means and opacities are whole. All scales are alike. Other values are windows on long sequences of random
        numbers: those of each Gaussian begin one number after those of the Gaussian before it.

        Args:
            rows: [M] int64, ascending, which of the Gaussians are wanted; None: all. The windows are then on the
                numbers of these.
        """
        n = self.num_gaussians if rows is None else len(rows)
        means = torch.empty(n, 3)
        numbers = torch.zeros(n + LONGEST_ROW)
        end = 0
        for tile, place in self._tiles():
            of_tile: slice | Tensor = slice(tile.stop - tile.start)
            begin, end = end, tile.stop
            if rows is not None:
                end = int(torch.searchsorted(rows, tile.stop))
                of_tile = rows[begin:end] - tile.start
            torch.add(self._tile["means"][of_tile], place, out=means[begin:end])
            numbers[begin:end] = self._tile["opacities"][of_tile]  # deviate by 1 from 0
        return {
            "means": means,
            "scales": self._tile["scales"][:1].expand(n, 3),
            "quats": windows(numbers, n, (4,)),
            "opacities": numbers[:n],
            "sh0": windows(numbers, n, (1, 3)),
            "shN": windows(0.05 * numbers, n, (15, 3)),
        }

    def cameras(self, focal: float | Sequence[float], picture_scale: float = 1.0) -> AerialCameras:
        """Place the cameras of `aerial_scene` with one focal length, or one each, in pixels of unscaled pictures."""
        return aerial_cameras(self._seed, focal=focal, size=SIZE, picture_scale=picture_scale)

    def shares(self, cameras: AerialCameras) -> np.ndarray:
        """Count the share of the Gaussians that each camera sees, [C]."""
        return np.array([self._share(camera) for camera in one_by_one(cameras)])

    def focals_for(self, shares: np.ndarray) -> tuple[float, ...]:
        """Find the focal length in pixels with which each camera sees its share of the Gaussians, within 1 %."""
        focals = FOCAL * np.sqrt(SEEN / shares)  # the ground that a view sees shrinks with the square
        away = np.ones(len(shares), bool)
        for _ in range(MOST_TURNS):
            cameras = one_by_one(self.cameras(focals.tolist()))
            found = np.array([self._share(cameras[index]) for index in np.flatnonzero(away)])
            focals[away] *= np.sqrt(np.maximum(found, 1 / self.num_gaussians) / shares[away])
            away[away] = np.abs(found / shares[away] - 1) > CLOSE
            if not away.any():
                break
        return tuple(focals.tolist())

    def _share(self, camera: Cameras) -> float:
        """Count the share of the Gaussians that a camera sees: instead of the tile the camera is moved."""
        if self._culled is None:
            self._culled = _culled(self._tile)
        seen, tiles = 0, list(self._tiles())
        for tile in visible_ids(*self._tiles_culled, camera).tolist():
            rows, place = tiles[tile]
            viewmats = camera.viewmats.clone()
            viewmats[:, :3, 3] += viewmats[:, :3, :3] @ place
            moved = Cameras(viewmats, camera.Ks, camera.width, camera.height, near_plane=camera.near_plane)
            seen += int((visible_ids(*self._culled, moved) < rows.stop - rows.start).sum())
        return seen / self.num_gaussians

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each tile's rows, which are the first of `_tile`, and where its middle is, [3]."""
        ends = [self.num_gaussians * tile // len(self._places) for tile in range(len(self._places) + 1)]
        for (first, last), place in zip(pairwise(ends), self._places, strict=True):
            yield slice(first, last), place


def _culled(geometry: Mapping[str, Tensor]) -> tuple[Tensor, BlockBounds]:
    """Return rows of geometry as culling takes them, and their bounds."""
    rows = geometry_rows(geometry)
    return rows, BlockBounds(rows)


def windows(numbers: Tensor, num_rows: int, shape: tuple[int, ...]) -> Tensor:
    """Return a view [num_rows, *shape] of numbers [>= num_rows + values of a row - 1], each row one number later."""
    row = numbers[: torch.Size(shape).numel()].view(shape)
    return numbers.as_strided((num_rows, *shape), (1, *row.stride()))


def shares_around(mean: float, smallest: float, largest: float, count: int) -> np.ndarray:
    """Return shares from the smallest to the largest whose mean is as wanted: few views see much.

    Args:
        mean: Of them all; below the middle of the next two.
        smallest: The first.
        largest: The last.
        count: How many.
    """
    ranks = np.linspace(0, 1, count)
    low, high = 1.0, 100.0  # powers of the rank: the higher, the lower is the mean
    for _ in range(60):
        power = (low + high) / 2
        shares = smallest + (largest - smallest) * ranks**power
        low, high = (power, high) if shares.mean() > mean else (low, power)
    return shares
