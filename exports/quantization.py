"""How formats store numbers in few bits: ranges, rotations by their three smallest components, and codebooks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ENTRIES = 256  # of a codebook, so that a code is one byte
BINS, WIDE_BINS = 1 << 14, 1 << 9  # of histograms: the one that a codebook is fitted to, and one for its beginning
SWEEPS = 30  # of Lloyd's algorithm over the histogram
COARSE_SAMPLE, COARSE_SWEEPS, FINE_SWEEPS = 1 << 16, 8, 4  # of Lloyd's algorithm over harmonics
ASSIGNED_ROWS = 1 << 14  # compared with all centres at a time


def rounded(values: Tensor, most: int) -> Tensor:
    """Return values as whole numbers from 0 to `most`, int64."""
    return (values + 0.5).floor().clamp(0, most).long()


def smallest_three(quats: Tensor) -> tuple[Tensor, Tensor]:
    """Split unit quaternions so that three components tell the fourth.

    Args:
        quats: [M, 4] of any length, in the order of components that a format has.

    Returns:
        Which component is the largest [M], and the others in their order [M, 3], within +- sqrt(1/2), of the one of q
        and -q whose largest component is positive.
    """
    quats = quats.double()
    length = quats.norm(dim=1, keepdim=True)
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    quats = torch.where(length > 0, quats / length.clamp(min=1e-30), identity)
    largest = quats.abs().argmax(dim=1)
    quats = torch.where(quats.gather(1, largest[:, None]) < 0, -quats, quats)
    others = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])[largest]  # [M, 3]
    return largest, quats.gather(1, others)


@dataclass(frozen=True)
class Codebook:
    """Hold 256 numbers, ascending, of which each value is replaced by the nearest."""

    entries: np.ndarray  # [256] float64

    @classmethod
    def fitted(cls, values: np.ndarray) -> Codebook:
        """Return the numbers of least squared error to a sample, by Lloyd's algorithm (1982) over its histogram."""
        low, high = float(values.min()), float(values.max())
        if low == high:
            return cls(np.full(ENTRIES, low))
        weights, edges = np.histogram(values, bins=BINS, range=(low, high))
        middles = 0.5 * (edges[1:] + edges[:-1])
        # Entries are best as dense as the cube root of the values' density (Bennett 1948), here as wide bins show it.
        density = np.repeat(weights.reshape(WIDE_BINS, -1).sum(axis=1), BINS // WIDE_BINS)
        share = np.cumsum(np.cbrt(density))
        entries = np.interp((np.arange(ENTRIES) + 0.5) / ENTRIES * share[-1], share, middles)
        for _ in range(SWEEPS):
            codes = np.searchsorted(0.5 * (entries[1:] + entries[:-1]), middles)
            total = np.bincount(codes, weights, ENTRIES)
            mean = np.bincount(codes, weights * middles, ENTRIES) / np.maximum(total, 1)
            entries = np.sort(np.where(total > 0, mean, entries))
        return cls(entries)

    def codes(self, values: np.ndarray) -> np.ndarray:
        """Return of each value the number of the nearest entry, uint8."""
        return np.searchsorted(0.5 * (self.entries[1:] + self.entries[:-1]), values).astype(np.uint8)


class Palette:
    """Holds vectors of which each row is replaced by one that is near, found in two stages.

    Rows are divided among coarse centres, and those of each among fine ones of its own. A row is compared with the
    coarse centres and then with the fine ones of the nearest: with 512 vectors, where there are 65,536.
    """

    def __init__(self, rows: Tensor, size: int) -> None:
        """
        Args:
            rows: [M, D] float32 sample, to which the vectors are fitted by Lloyd's algorithm.
            size: How many vectors there are; at most M.
        """
        sample = rows[:: max(len(rows) // COARSE_SAMPLE, 1)]
        centres = _lloyd(sample, min(max(round(size**0.5), 1), len(sample)), COARSE_SWEEPS)
        coarse = _nearest(rows, centres)
        members = torch.bincount(coarse, minlength=len(centres))
        self._coarse, members = centres[members > 0], members[members > 0]
        # Fine centres in proportion to members, one each at least, `size` in all.
        least = 1 if size < len(rows) else 0
        shares = members.double() / len(rows) * (size - least * len(members))
        counts = shares.floor().long() + least
        counts[(shares - shares.floor()).argsort(descending=True)[: size - int(counts.sum())]] += 1
        parts = coarse.argsort(stable=True).split(members.tolist())
        fine = [
            _lloyd(rows[part], min(count, len(part)), FINE_SWEEPS)
            for part, count in zip(parts, counts.tolist(), strict=True)
        ]
        self._starts = torch.tensor([0, *(len(part) for part in fine)]).cumsum(0)  # [coarse + 1]
        self.vectors = torch.cat(fine)  # [at most size, D]

    def codes(self, rows: Tensor) -> Tensor:
        """Return of each row [M, D] the number of a near vector, int64 [M]."""
        coarse = _nearest(rows, self._coarse)
        codes = torch.empty(len(rows), dtype=torch.int64)
        order = coarse.argsort(stable=True)
        for index, part in enumerate(order.split(torch.bincount(coarse, minlength=len(self._coarse)).tolist())):
            if len(part):
                first, last = self._starts[index : index + 2].tolist()
                codes[part] = first + _nearest(rows[part], self.vectors[first:last])
        return codes


def _lloyd(rows: Tensor, count: int, sweeps: int) -> Tensor:
    """Return centres [count, D] of rows [M, D]; begins with rows spread over their order."""
    centres = rows[torch.linspace(0, len(rows) - 1, count).round().long()].clone()
    for _ in range(sweeps if count < len(rows) else 0):
        codes = _nearest(rows, centres)
        members = torch.bincount(codes, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, codes, rows)
        centres = torch.where(members[:, None] > 0, sums / members.clamp(min=1)[:, None], centres)
    return centres


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """Return the number of the nearest centre of each row, int64 [M]."""
    lengths = centres.square().sum(dim=1)
    nearest = np.empty(len(rows), np.int64)
    for first in range(0, len(rows), ASSIGNED_ROWS):
        part = slice(first, first + ASSIGNED_ROWS)
        distances = torch.addmm(lengths, rows[part], centres.T, alpha=-2)  # [M, centres], but for the rows' own lengths
        nearest[part] = distances.numpy().argmin(axis=1)  # several times as fast as torch's
    return torch.from_numpy(nearest)
