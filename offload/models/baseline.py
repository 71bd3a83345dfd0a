"""The baseline's Gaussians: everything on the host, nothing optimized (the naive offloading of GS-Scale)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offload.adam.finite import FiniteGradients
from offload.adam.host import DeferredAdam
from offload.adam.options import AdamOptions
from offload.adam.schedules import schedules_of
from offload.adam.state import State, copy_current
from offload.culling.cameras import Cameras
from offload.culling.native import BlockBounds, visible_ids
from offload.pipelines.times import OffloadTimes
from offload.pipelines.transfer import RowTransfer
from offload.store.host_store import HostStore
from offload.store.memory import HostArray


class BaselineGaussians(HostStore):
    """All Gaussians in one host store; a step visits every one of them twice: culling and dense Adam.

    A training step is `fetch`, rendering and the backward pass, then `update`, one after the other.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        device: torch.device,
        max_gaussians: int = 0,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`.
            adam: Learning rates, decay rates and epsilon.
            device: Where views are rendered.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
        """
        pin = device.type == "cuda"
        super().__init__(parameters, max_gaussians=max_gaussians, pin=pin)
        self.steps_done = 0
        self._rendering_device = device
        self._times = OffloadTimes()
        self._adams, self._rates, self._transfers, self._gradients = {}, {}, {}, {}
        for name, group in self.groups.items():
            multipliers, self._rates[name] = schedules_of(name, self.sh_degree, adam)
            columns = multipliers.shape[1]
            self._adams[name] = DeferredAdam(multipliers, adam.betas, adam.eps)
            self._transfers[name] = RowTransfer(columns, device, self._times)
            # Gradients of all rows, zero but between the backward pass and Adam.
            self._gradients[name] = HostArray(columns, max_rows=group.parameters.max_rows)
        self._ids = torch.zeros(0, dtype=torch.int64)  # [V] of the present view
        self._rows: dict[str, Tensor] = {}
        self._finite = FiniteGradients(device)

    def fetch(self, cameras: Cameras) -> dict[str, Tensor]:
        """The rows [V] that a view needs, on the device, for `training.gaussians.activate`; views of leaves."""
        self._ids = self._cull(cameras)
        self._rows = {name: rows.requires_grad_() for name, rows in self._upload(self._ids).items()}
        return self._to_render(self._rows)

    def read_view(self, cameras: Cameras) -> dict[str, Tensor]:
        """Copies of the rows [V] that a view needs, as from `fetch`."""
        return self._to_render(self._upload(self._cull(cameras)))

    @property
    def ids(self) -> Tensor:
        """Which Gaussians `fetch` gave, [V] int64 on the host."""
        return self._ids

    @property
    def staging_allocations(self) -> int:
        """How often staging memory has been allocated so far."""
        return sum(transfer.staging_allocations for transfer in self._transfers.values())

    def offload_milliseconds(self) -> dict[str, float]:
        """How long copies between host and device have taken so far, by direction."""
        return self._times.milliseconds()

    def update(self) -> None:
        """Dense Adam over all rows, with the gradients of those that `fetch` gave."""
        self._finite.keep(self._rows.values())
        for name, group in self.groups.items():
            rows = self._rows[name]
            self._gradients[name].resize(self.num_gaussians)
            gradients = self._gradients[name].tensor  # [N, columns]
            if rows.grad is not None:
                gradients.index_copy_(0, self._ids, self._transfers[name].download(rows.grad).ready())
            adam = self._adams[name]
            adam.begin_step(self._rates[name](adam.step_count + 1))
            moments = (group.exp_avg, group.exp_avg_sq)
            adam.dense(group.parameters.tensor, *moments, gradients)
            gradients.index_fill_(0, self._ids, 0.0)
        self.steps_done += 1
        self.step = self.steps_done

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Views of these rows of the six parameter tensors."""
        return {name: stored[first:last] for name, stored in self.snapshot().items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that training goes on from, as `offload.adam.state` describes it: views of the store."""
        return {"step_count": torch.tensor(self.steps_done), **self.arrays_by_name()}

    def guarded(self) -> dict[str, HostStore]:
        """No tensors of `state`: every step changes all rows."""
        return {}

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here, whichever trainer has left it."""
        copy_current(self.arrays_by_name(), state)
        for adam in self._adams.values():
            adam.continue_from({"step_count": state["step_count"]})
        self.steps_done = self.step = int(state["step_count"])

    def skipped_steps(self) -> tuple[int, int]:
        """How many steps had a gradient that was not finite, and how many of those were the last in a row."""
        return self._finite.skipped_steps()

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Memory in bytes that appending this many Gaussians takes at its peak."""
        gradients = sum(4 * len(group.parameters.tensor[0]) for group in self.groups.values())
        return {self.device: super().growth_bytes(num_new)[self.device] + num_new * gradients}

    def undo_step(self) -> None:
        """Forget the step that an error has ended.

        Raises:
            RuntimeError: It has been applied in part.
        """
        if any(adam.step_count != self.steps_done for adam in self._adams.values()):
            raise RuntimeError("the step had been applied in part")
        self._rows = {}

    def _cull(self, cameras: Cameras) -> Tensor:
        geometry = self.groups["geometry"].parameters.tensor
        return visible_ids(geometry, BlockBounds(geometry), cameras)  # all rows have moved, so the bounds are new

    def _upload(self, ids: Tensor) -> dict[str, Tensor]:
        rows = {}
        for name, group in self.groups.items():
            parameters = group.parameters.tensor

            def fill(out: Tensor, begin: int, end: int, parameters: Tensor = parameters) -> None:
                torch.index_select(parameters, 0, ids[begin:end], out=out)

            rows[name] = self._transfers[name].upload(len(ids), fill).ready()
        return rows

    def _to_render(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for name, group in self.groups.items() for key, value in group.to_render(rows[name]).items()}
