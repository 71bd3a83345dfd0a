"""What rows that are added take of each device's memory: what stays, and what is taken meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Growth:
    """Hold the bytes of one memory that rows to be added take."""

    added: int  # by the rows themselves
    meanwhile: int = 0  # more, until they are there: an array that stands twice, or is re-ordered

    @property
    def peak(self) -> int:
        """Return how much is taken at most."""
        return self.added + self.meanwhile


class GrowingPlace(Protocol):
    """Holds parameters of Gaussians."""

    def growth(self, num_new: int) -> dict[torch.device, Growth]:
        """Count the bytes of each device's memory that appending so many rows takes."""


def total_growth(places: Iterable[GrowingPlace], num_new: int) -> dict[torch.device, Growth]:
    """Count the bytes of each device's memory that appending so many rows to all places takes, one after the other."""
    total: dict[torch.device, Growth] = {}
    for place in places:
        for device, growth in place.growth(num_new).items():
            before = total.get(device, Growth(0))
            total[device] = Growth(before.added + growth.added, max(before.meanwhile, growth.meanwhile))
    return total


def peaks(growth: dict[torch.device, Growth]) -> dict[torch.device, int]:
    """Return how many bytes of each device's memory are taken at most."""
    return {device: of_device.peak for device, of_device in growth.items()}
