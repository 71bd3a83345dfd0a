"""PlayCanvas's streamed SOG: a folder with lod-meta.json, a tree of places, and for each level of detail chunks of SOG.

The Gaussians are divided by planes into leaves of nearby ones. A leaf has the same place at each level, and a viewer
chooses a level for each. From one level to the next, four neighbours in Morton order become one Gaussian with their
mean, covariance and colour, weighted by what each covers, and with the opacity that covers as much. Only positions are
in memory at once, and of the rest the chunks that are being filled, one a level.

https://developer.playcanvas.com/user-manual/gaussian-splatting/formats/streamed-sog
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from exports.gaussians import Gaussians, Rows
from exports.sog import sog_bytes, sog_files
from offload.store.morton import morton_order
from training.gaussians import PARAMETER_NAMES

INDEX = "lod-meta.json"
LEAF_ROWS = 1 << 15  # Gaussians of a leaf at the finest level, at most; half as many at least
CHUNK_ROWS = 1 << 18  # Gaussians from which on a chunk is written
MERGED = 4  # Gaussians that become one at the next level
COARSEST_ROWS = 200_000  # Gaussians, that any viewer draws at once: levels are added down to about these
MOST_LEVELS = 6
LARGEST_OPACITY = 0.99
DIGITS = 7  # of numbers in the index


def write_streamed(path: Path, gaussians: Gaussians) -> None:
    """Write a streamed SOG, chunk by chunk and its index in the end.

    Args:
        path: Of the index, which must be called lod-meta.json; its folder is made.
        gaussians: What is written.
    """
    path.parent.mkdir()
    _write(path.parent, gaussians)


def streamed_bytes(count: int, sh_degree: int) -> int:
    """Return how large the files can become together: as if nothing could be compressed."""
    chunks = sum(-(-count // MERGED**level) // CHUNK_ROWS + 1 for level in range(_num_levels(count)))
    palettes = chunks * (sog_bytes(CHUNK_ROWS, sh_degree) - sog_bytes(CHUNK_ROWS, 0))
    return round(sog_bytes(count, 0) * MERGED / (MERGED - 1)) + palettes


def _num_levels(count: int) -> int:
    levels = 1
    while levels < MOST_LEVELS and count > COARSEST_ROWS * MERGED ** (levels - 1):
        levels += 1
    return levels


def _write(folder: Path, gaussians: Gaussians) -> None:
    levels = [_Level(folder, level) for level in range(_num_levels(gaussians.count))]
    filenames: list[str] = []

    def leaf(ids: np.ndarray) -> dict[str, Any]:
        rows = gaussians.at(torch.from_numpy(np.sort(ids).astype(np.int64)), PARAMETER_NAMES)
        rows = _at(rows, morton_order(rows["means"]))
        low, high = np.full(3, np.inf), np.full(3, -np.inf)
        lods = {}
        for level in levels:
            if level.number > 0:
                rows = merged(rows)
            extent = _bounds(rows)
            low, high = np.minimum(low, extent[0]), np.maximum(high, extent[1])
            lods[str(level.number)] = level.append(rows, filenames)
        return {"bound": {"min": _short(low), "max": _short(high)}, "lods": lods}

    tree = _tree(gaussians.means().numpy(), np.arange(gaussians.count, dtype=np.uint32), leaf)
    for level in levels:
        level.flush()
    counts = [level.count for level in levels]
    index = {
        "version": 1,
        "count": sum(counts),
        "counts": counts,
        "lodLevels": len(levels),
        "filenames": filenames,
        "tree": tree,
    }
    (folder / INDEX).write_text(json.dumps(index, separators=(",", ":")))


def _tree(means: np.ndarray, ids: np.ndarray, leaf: Callable[[np.ndarray], dict[str, Any]]) -> dict[str, Any]:
    """Divide Gaussians in halves across their longest side, down to leaves.

    Args:
        means: [N, 3] of all.
        ids: [M] uint32, of those in this node.
        leaf: Makes a leaf's node of its ids.
    """
    if len(ids) <= LEAF_ROWS:
        return leaf(ids)
    low, high = np.quantile(
        means[ids[:: max(len(ids) // 1000, 1)]], (0.01, 0.99), axis=0
    )  # a few far away count for nothing
    middle = len(ids) // 2
    ids = ids[np.argpartition(means[ids, np.argmax(high - low)], middle)]
    children = [_tree(means, part, leaf) for part in (ids[:middle], ids[middle:])]
    bounds = [child["bound"] for child in children]
    return {
        "bound": {
            "min": [min(values) for values in zip(*(bound["min"] for bound in bounds), strict=True)],
            "max": [max(values) for values in zip(*(bound["max"] for bound in bounds), strict=True)],
        },
        "children": children,
    }


@dataclass
class _Level:
    """Collects the leaves of one level of detail, and writes them chunk by chunk."""

    folder: Path
    number: int
    count: int = 0
    _chunks: int = 0
    _waiting: list[Rows] = field(default_factory=list)

    def append(self, rows: Rows, filenames: list[str]) -> dict[str, int]:
        """Add a leaf; returns where it lies, and adds the name of a chunk that begins with it."""
        offset = sum(len(part["means"]) for part in self._waiting)
        name = f"{self.number}_{self._chunks}/meta.json"
        if offset == 0:
            filenames.append(name)
        place = {"file": filenames.index(name), "offset": offset, "count": len(rows["means"])}
        self._waiting.append(rows)
        self.count += len(rows["means"])
        if offset + len(rows["means"]) >= CHUNK_ROWS:
            self.flush()
        return place

    def flush(self) -> None:
        """Write what has been collected."""
        if not self._waiting:
            return
        rows = {name: torch.cat([part[name] for part in self._waiting]) for name in PARAMETER_NAMES}
        self._waiting.clear()
        chunk = self.folder / f"{self.number}_{self._chunks}"
        chunk.mkdir()
        for name, content in sog_files(Gaussians.of(rows)):
            (chunk / name).write_bytes(content)
        self._chunks += 1


def merged(rows: Rows) -> Rows:
    """Return one Gaussian for each four that follow one another: with their mean, covariance and mean colour.

    A Gaussian weighs as much as it covers, its opacity times its area seen from all sides. The opacity of the merged
    one is such that it covers as much as they did, but for what would make it more than opaque.
    """
    weights = torch.sigmoid(rows["opacities"].double()) * _area(rows["scales"].double())  # [M]
    weights = weights.clamp(min=1e-30)
    groups = torch.arange(len(weights)) // MERGED
    total = _sums(weights, groups)  # [G]

    def mean(values: Tensor) -> Tensor:
        share = (weights / total[groups]).reshape(-1, *[1] * (values.ndim - 1))
        return _sums(values.double() * share, groups)

    means = mean(rows["means"])  # [G, 3]
    away = rows["means"].double() - means[groups]
    spread = mean(_covariances(rows) + away[:, :, None] * away[:, None, :])  # [G, 3, 3]
    variances, axes = torch.linalg.eigh(spread)
    axes[:, :, 0] *= torch.linalg.det(axes)[:, None]  # a rotation, not a mirror
    scales = 0.5 * variances.clamp(min=1e-20).log()
    x, y, z, w = torch.from_numpy(Rotation.from_matrix(axes.numpy()).as_quat()).unbind(dim=1)
    opacities = (total / _area(scales)).clamp(1e-6, LARGEST_OPACITY)
    return {
        "means": means.float(),
        "scales": scales.float(),
        "quats": torch.stack([w, x, y, z], dim=1).float(),
        "opacities": torch.logit(opacities).float(),
        "sh0": mean(rows["sh0"]).float(),
        "shN": mean(rows["shN"]).float(),
    }


def _sums(values: Tensor, groups: Tensor) -> Tensor:
    """Return the sums [G, ...] of values [M, ...] by group."""
    return values.new_zeros(int(groups[-1]) + 1, *values.shape[1:]).index_add_(0, groups, values)


def _area(scales: Tensor) -> Tensor:
    """Return the mean area of ellipsoids [M] over all directions, but for a factor, from log scales [M, 3]."""
    x, y, z = scales.exp().unbind(dim=1)
    return (x * y + y * z + z * x) / 3


def _covariances(rows: Rows) -> Tensor:
    """Return the covariances [M, 3, 3], float64."""
    half = _rotations(rows) * rows["scales"].double().exp()[:, None, :]
    return half @ half.transpose(1, 2)


def _rotations(rows: Rows) -> Tensor:
    w, x, y, z = rows["quats"].double().unbind(dim=1)
    quats = torch.stack([x, y, z, torch.where(rows["quats"].double().norm(dim=1) > 0, w, 1.0)], dim=1)
    return torch.from_numpy(Rotation.from_quat(quats.numpy()).as_matrix())


def _bounds(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest corner [3] around ellipsoids of one standard deviation."""
    reach = _covariances(rows).diagonal(dim1=1, dim2=2).sqrt()
    means = rows["means"].double()
    return (means - reach).amin(dim=0).numpy(), (means + reach).amax(dim=0).numpy()


def _at(rows: Rows, order: Tensor) -> Rows:
    return {name: value[order] for name, value in rows.items()}


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
