"""Gaussians whose appearance, parameters and moments alike, lives on the host and is updated by the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offload.catch_up import CatchUpTables
from offload.culling import Cameras
from offload.device_geometry import DeviceGeometry
from offload.finite import FiniteGradients
from offload.margins import largest_step, margin_of
from offload.schedules import schedules_of
from offload.state import State, copy_current, load_deferred
from offload.store import HostStore, Moments, total_growth
from offload.streamed_pipeline import StreamedGroup, StreamedPipeline, StreamedView


class StreamedGaussians:
    """The streamed trainer's Gaussians; stands in for `training.gaussians.DeviceGaussians`.

    A training step is `fetch`, rendering and the backward pass, then `update`; `prefetch` after `fetch` lets the next
    view's rows travel behind the rendering. Densification and evaluation come after `update`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        learning_rates: Mapping[str, float],
        means_lr: Callable[[int], float],
        *,
        betas: tuple[float, float],
        eps: float,
        device: torch.device,
        moments: Moments = "float32",
        max_gaussians: int = 0,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`; best in Morton order, in which a
                view's rows come in runs.
            learning_rates: Of each of them at step 0; that of the means never grows.
            means_lr: The means' learning rate at a step from 0.
            betas: Adam's decay rates.
            eps: Adam's epsilon.
            device: Where views are rendered and rows are updated.
            moments: The precision in which Adam's moments of the appearance are kept, and travel.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
        """
        self.steps_done = 0
        self._learning_rates = dict(learning_rates)
        self._means_lr = means_lr
        self._rendering_device = device
        self._view: StreamedView | None = None
        self._geometry_rows: dict[str, Tensor] = {}
        self._finite = FiniteGradients(device)
        self._geometry = DeviceGeometry(parameters, betas=betas, eps=eps, device=device)
        self._margin = margin_of(largest_step(betas), learning_rates)
        pin = device.type == "cuda"
        self._store = HostStore(
            parameters, groups=("appearance",), moments=moments, max_gaussians=max_gaussians, pin=pin
        )
        multipliers, rates = schedules_of(self._appearance, learning_rates, means_lr)
        self._tables = CatchUpTables(multipliers, betas, eps, device)
        groups = {"appearance": StreamedGroup(self._store, "appearance", self._tables, rates)}
        self._pipeline = StreamedPipeline(groups, self._cull, device)

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras) -> dict[str, Tensor]:
        """The rows [V] that a view needs, on the device, for `training.gaussians.activate`; leaves or their views."""
        self._view = self._pipeline.fetch(cameras)
        self._geometry_rows = {
            name: rows.requires_grad_() for name, rows in self._geometry.gather(self._view.ids).items()
        }
        return {**self._geometry_rows, **self._appearance.to_render(self._view.values["appearance"])}

    @property
    def ids(self) -> Tensor:
        """Which Gaussians `fetch` gave, [V] int64 on the device."""
        return self._view.ids

    def prefetch(self, cameras: Cameras) -> None:
        """Prepare the view after this one; not where densification will change rows before it."""
        self._pipeline.prefetch(cameras)

    def update(self, step: int) -> None:
        """Adam's step on the gradients of the rows that `fetch` gave.

        Args:
            step: From 0.
        """
        leaves = [*self._view.values.values(), *self._geometry_rows.values()]
        self._finite.keep([leaf.grad for leaf in leaves if leaf.grad is not None])
        self._pipeline.update()
        gradients = {
            name: torch.zeros_like(rows) if rows.grad is None else rows.grad
            for name, rows in self._geometry_rows.items()
        }
        self._geometry.step(self.ids, gradients, {**self._learning_rates, "means": self._means_lr(step)})
        self._pipeline.geometry_has_moved()
        self._geometry_rows = {}
        self.steps_done += 1

    # ------------------------------------------------------------------------------------ reading, at any time

    @property
    def num_gaussians(self) -> int:
        return self._store.num_gaussians

    @property
    def device(self) -> torch.device:
        """Where geometry is."""
        return self._rendering_device

    @property
    def staging_allocations(self) -> int:
        """How often space for a view has been allocated so far."""
        return self._pipeline.staging_allocations

    @property
    def link_bytes(self) -> int:
        """Bytes of rows that have travelled between host and device so far, both ways."""
        return self._pipeline.link_bytes

    @property
    def traffic(self) -> dict[str, int]:
        """Rows that views have fetched, retained and written so far, and the bytes over the link."""
        return {**self._pipeline.rows_moved, "link_bytes": self._pipeline.link_bytes}

    def read_view(self, cameras: Cameras) -> dict[str, Tensor]:
        """Copies of the rows [V] that a view needs, as from `fetch`; training is not disturbed."""
        ids = self._cull(cameras)
        rows = self._pipeline.read("appearance", ids)
        return {**self._geometry.gather(ids), **self._appearance.to_render(rows)}

    def snapshot(self) -> dict[str, Tensor]:
        """The current values of the six parameter tensors; a copy of what is on the host."""
        return {**self._geometry.parameters, **self._appearance.named(self._pipeline.read_all("appearance"))}

    # ------------------------------------------------------------------------------------------- to be continued

    def state(self) -> dict[str, Tensor]:
        """Everything that training goes on from, as `offload.state` describes it: views of the store.

        With the next view, as far as it has been found ahead.
        """
        self._pipeline.finish()
        state = {
            "step_count": torch.tensor(self.steps_done),
            **self._geometry.arrays_by_name(),
            **self._store.arrays_by_name(),
            "last_step/appearance": self._pipeline.stamps("appearance"),
        }
        state.update({f"deferral/appearance/{key}": table for key, table in self._tables.tables().items()})
        if self._pipeline.upcoming_ids is not None:
            state["upcoming/ids"] = self._pipeline.upcoming_ids
        return state

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here, whichever trainer has left it."""
        self.steps_done = self._geometry.step_count = int(state["step_count"])
        copy_current(self._geometry.arrays_by_name(), state)
        load_deferred(self._store, "appearance", self._tables, state)
        upcoming = state.get("upcoming/ids")
        self._pipeline.continue_with(None if upcoming is None else upcoming.to(self._rendering_device, copy=True))

    def skipped_steps(self) -> tuple[int, int]:
        """How many steps had a gradient that was not finite, and how many of those were the last in a row."""
        return self._finite.skipped_steps()

    def undo_step(self) -> None:
        """Forget the step that an error has ended.

        Raises:
            RuntimeError: It has been applied in part.
        """
        self._pipeline.undo_step(self.steps_done)
        if self._tables.step != self.steps_done:
            raise RuntimeError("the step had been applied in part")
        self._geometry_rows = {}

    # ---------------------------------------------- what densification asks (training.densification.GaussianStore)

    def read(self, name: str) -> Tensor:
        """The current values of one geometry parameter; not copied."""
        return self._geometry.parameters[name]

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M], without moments."""
        self._pipeline.hand_over(ids.unique())
        self._geometry.append_copies(ids)
        self._store.append_copies(ids)

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where some places have them only, since appending has failed."""
        self._geometry.truncate(num_gaussians)
        self._store.truncate(num_gaussians)

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor]) -> None:
        """Give these rows [M] new values; all moments of the rows become zero."""
        self._pipeline.hand_over(ids)
        self._geometry.overwrite(ids, values)
        self._store.overwrite(ids, values)

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        self._pipeline.hand_over(ids[:0])
        self._geometry.keep(ids)
        self._store.keep(ids)

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""
        self._geometry.clamp_opacities(max_logit)

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Memory in bytes, of host and device, that appending this many Gaussians takes at its peak."""
        return total_growth([self._geometry, self._store], num_new)

    # --------------------------------------------------------------------------------------------------- inside

    @property
    def _appearance(self):
        return self._store.groups["appearance"]

    def _cull(self, cameras: Cameras) -> Tensor:
        return self._geometry.visible_ids(cameras, self._margin)
