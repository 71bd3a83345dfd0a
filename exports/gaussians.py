"""The Gaussians of an export: chosen, moved, with harmonics of one degree, and read from disk block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from errors import InputError, counted
from exports.crop import Region
from exports.source import Source
from exports.world import Placement
from offload.store.morton import morton_order
from training.gaussians import PARAMETER_NAMES
from training.similarity import moved, with_degree

BLOCK_ROWS = 1 << 16  # read and written at a time; 15 MB
GEOMETRY = ("means", "scales", "quats", "opacities")

Rows = dict[str, Tensor]  # M rows of some of the six stored parameters


@dataclass(frozen=True)
class Gaussians:
    """Hold N Gaussians as a file is to hold them; `at` reads some rows, or rows by their numbers."""

    count: int
    sh_degree: int
    antialiased: bool
    at: Callable[[slice | Tensor, Sequence[str]], Rows]

    def blocks(self, names: Sequence[str] = PARAMETER_NAMES, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Rows]]:
        """Give all rows, block by block, with the number of each block's first row."""
        for first in range(0, self.count, size):
            yield first, self.at(slice(first, min(first + size, self.count)), names)

    def in_order(self, order: Tensor) -> Gaussians:
        """Return those with these numbers [M] int64, in this order."""
        return Gaussians(len(order), self.sh_degree, self.antialiased, lambda rows, names: self.at(order[rows], names))

    def in_morton_order(self) -> Gaussians:
        """Return them so that neighbours in space are neighbours in the file, which compresses better."""
        return self.in_order(morton_order(self.means()))

    def means(self) -> Tensor:
        """Return all positions [N, 3]."""
        means = torch.empty(self.count, 3)
        for first, rows in self.blocks(["means"]):
            means[first : first + len(rows["means"])] = rows["means"]
        return means

    @classmethod
    def of(cls, rows: Rows, antialiased: bool = False) -> Gaussians:
        """Return Gaussians that lie in memory."""
        degree = round((rows["shN"].shape[1] + 1) ** 0.5) - 1
        return cls(len(rows["means"]), degree, antialiased, lambda at, names: {name: rows[name][at] for name in names})


def importance(rows: Rows) -> Tensor:
    """Return opacity times the area of the largest cross section [M]: about what a Gaussian adds to pictures."""
    largest = rows["scales"].topk(2, dim=1).values.sum(dim=1)
    return torch.sigmoid(rows["opacities"]) * torch.exp(largest)


def choose(
    source: Source,
    place: Placement,
    *,
    region: Region | None,
    most: int,
    sh_degree: int,
    say: Callable[[str], None],
) -> Gaussians:
    """Return the Gaussians of a file that are exported, as they are in the end.

    Args:
        source: The file.
        place: Where they go.
        region: Those in it stay; None for all.
        most: How many may stay, the most important ones; 0 for all.
        sh_degree: Of the harmonics that stay; at most the file's.
        say: Is told of Gaussians that are left out.

    Raises:
        InputError: None would stay.
    """
    keep = torch.ones(source.num_gaussians, dtype=torch.bool)
    weights = torch.empty(source.num_gaussians if most else 0)
    broken = outside = 0
    for first in range(0, source.num_gaussians, BLOCK_ROWS):
        rows = slice(first, min(first + BLOCK_ROWS, source.num_gaussians))
        block = {name: source.parameter(name, rows) for name in GEOMETRY}
        finite = torch.stack([value.reshape(len(value), -1).isfinite().all(1) for value in block.values()]).all(0)
        inside = finite
        if region is not None:
            means = block["means"].double().numpy() @ place.crop_world[:3, :3].T + place.crop_world[:3, 3]
            inside = finite & torch.from_numpy(region.contains(means))
        broken += int((~finite).sum())
        outside += int((finite & ~inside).sum())
        keep[rows] = inside
        if most:
            weights[rows] = torch.where(inside, importance(block), -1.0)
    if broken:
        say(f"{counted(broken, 'Gaussian')} with values that are not finite are left out.")
    left = int(keep.sum())
    if left == 0:
        if outside:
            raise InputError(
                f"--crop leaves none of the {source.num_gaussians:,} Gaussians of {source.path}: they lie "
                f"{_extent(source, place)}; choose a region among them, in the coordinates of --world."
            )
        raise InputError(f"{source.path} holds no Gaussians with finite values: choose another file.")
    if outside:
        say(f"{left:,} of {source.num_gaussians:,} Gaussians lie in the region of --crop.")
    if 0 < most < left:
        say(f"The {most:,} of them with the largest product of opacity and area stay (--max_gaussians).")
        keep = torch.zeros_like(keep)
        keep[weights.topk(most).indices] = True
    ids = None if bool(keep.all()) else keep.nonzero().squeeze(1)
    del keep, weights
    moves = not np.array_equal(place.move, np.eye(4))

    def at(rows: slice | Tensor, names: Sequence[str]) -> Rows:
        wanted = rows if ids is None else ids[rows]
        read = {name: source.parameter(name, wanted).float() for name in names}
        if "shN" in read:  # harmonics that are not finite would spoil what a format makes of all of them
            read["shN"] = with_degree(read["shN"], sh_degree).nan_to_num(0.0, 0.0, 0.0)
        if "sh0" in read:
            read["sh0"] = read["sh0"].nan_to_num(0.0, 0.0, 0.0)
        return moved(read, place.move) if moves else read

    count = source.num_gaussians if ids is None else len(ids)
    return Gaussians(count, sh_degree, source.antialiased, at)


def _extent(source: Source, place: Placement) -> str:
    """Return as words where most Gaussians of a file lie, in the coordinates of --crop."""
    step = max(source.num_gaussians // 10_000, 1)
    means = source.parameter("means", torch.arange(0, source.num_gaussians, step)).double().numpy()
    means = means[np.isfinite(means).all(axis=1)] @ place.crop_world[:3, :3].T + place.crop_world[:3, 3]
    low, high = np.quantile(means, 0.01, axis=0), np.quantile(means, 0.99, axis=0)
    return "from " + " ".join(f"{x:.9g}" for x in low) + " to " + " ".join(f"{x:.9g}" for x in high)
