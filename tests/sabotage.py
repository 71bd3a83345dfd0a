"""Wrong trainers, to show that a comparison of trainers would notice them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.host import DeferredAdam
from strategies.default import DefaultStrategy


def catch_up_one_step_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows be caught up as if each had last been updated one step later."""
    begin_on_host, begin_on_device = DeferredAdam.begin_step, DeferralTables.begin_step

    def begin_step_on_host(self: DeferredAdam, learning_rates: Sequence[float]) -> None:
        begin_on_host(self, learning_rates)
        self._before[:-1] = self._before[1:].copy()

    def begin_step_on_device(self: DeferralTables, learning_rates: Sequence[float]) -> None:
        begin_on_device(self, learning_rates)
        self.sums = self.sums.roll(-1, dims=1)

    monkeypatch.setattr(DeferredAdam, "begin_step", begin_step_on_host)
    monkeypatch.setattr(DeferralTables, "begin_step", begin_step_on_device)


def no_decay_of_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the moments of a row stay as they were over the steps that it has skipped."""
    grow_on_host, grow_on_device = DeferredAdam._grow, DeferralTables._grow

    def grow_host_tables(self: DeferredAdam, capacity: int) -> None:
        grow_on_host(self, capacity)
        self._rounded_decays[:] = (1, 1, 0)  # b1^k, b2^k and what float32 has left of b2^k

    def grow_device_tables(self: DeferralTables, capacity: int) -> None:
        grow_on_device(self, capacity)
        self.decays = torch.ones_like(self.decays)

    monkeypatch.setattr(DeferredAdam, "_grow", grow_host_tables)
    monkeypatch.setattr(DeferralTables, "_grow", grow_device_tables)


def smaller_gradients_on_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let densification see gradients on the screen that are a twentieth too small."""
    observe = DefaultStrategy.observe

    def observe_less(self: DefaultStrategy, info: Mapping[str, object], ids: Tensor | None = None) -> None:
        before = self.statistics.grad2d.clone()
        observe(self, info, ids)
        self.statistics.grad2d -= 0.05 * (self.statistics.grad2d - before)

    monkeypatch.setattr(DefaultStrategy, "observe", observe_less)
