"""Tells whether all rows of a model may stay on a device, beside what rendering takes there."""

from __future__ import annotations

from typing import Literal

import torch

from offload.culling.balls import Balls
from offload.culling.boxes import Boxes
from offload.device_memory import begin_stretch, most_bytes, stretch_peak
from offload.pipelines.arena import CAUTION, USABLE
from offload.store.growth import Growth
from offload.store.layout import compact_bytes

AT_START = 0.5  # of the memory, for rows, where nothing is known yet of what rendering takes


def bytes_there(num_gaussians: int, *, sh_degree: int, geometry: Literal["device", "host"]) -> int:
    """Count the bytes that compact rows of so many Gaussians take on a device, with what it culls them by.

    Args:
        num_gaussians: How many.
        sh_degree: Degree of the spherical harmonics.
        geometry: Where it is once rows travel, which says what they are culled by.
    """
    bounds = Boxes.BYTES if geometry == "host" else Balls.BYTES
    return int(num_gaussians * (compact_bytes(sh_degree, tight=True) + bounds))


class DeviceRoom:
    """Measures what is left for rows on a device; none is on the CPU, which has rows in its own memory anyway."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: Where views are rendered.
        """
        self._device = device

    def holds_at_start(self, num_bytes: int) -> bool:
        """Tell whether rows that take so much may be put there before anything has been rendered."""
        return num_bytes <= AT_START * self._most()

    def holds(self, taken: int, growth: Growth, times: float) -> bool:
        """Tell whether rows may come to take more, with all that is beside them.

        While some are added nothing is rendered, and while something is rendered no array stands twice.

        Args:
            taken: Bytes that rows take now.
            growth: That those to come take.
            times: How many times as many rows there will be; rendering may take as much more.
        """
        most = self._most()
        if most == 0:
            return False
        beside = CAUTION * times * (stretch_peak(self._device) - taken)
        now = torch.cuda.memory_allocated(self._device)
        return growth.added + max(now + growth.meanwhile, taken + beside) <= most

    def forget_rows(self) -> None:
        """Measure anew what is taken there, after all rows have been given up."""
        if self._device.type == "cuda":
            begin_stretch(self._device)

    def _most(self) -> float:
        return USABLE * most_bytes(self._device) if self._device.type == "cuda" else 0.0
