"""Gaussians that live on the host, their appearance or all of them, and are updated by the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.finite import gradient_of
from offload.adam.options import AdamOptions
from offload.adam.schedules import schedules_of
from offload.adam.state import State
from offload.culling.cameras import Cameras
from offload.models.offloaded import OffloadedGaussians
from offload.pipelines.groups import RowGroup
from offload.pipelines.streamed import StreamedPipeline, StreamedView
from offload.pipelines.streamed_host import InPlaceView, StreamedHostPipeline
from offload.store.host_store import HostStore
from offload.store.layout import Moments


class StreamedGaussians(OffloadedGaussians):
    """The streamed trainer's Gaussians; stands in for `training.gaussians.DeviceGaussians`.

    A training step is `fetch`, rendering and the backward pass, then `update`; `prefetch` after `fetch` lets the next
    view's rows travel behind the rendering. Densification and evaluation come after `update`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        device: torch.device,
        geometry: Literal["device", "host"] = "device",
        moments: Moments = "float32",
        max_gaussians: int = 0,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`; best in Morton order, in which a
                view's rows come in runs.
            adam: Learning rates, decay rates and epsilon.
            device: Where views are rendered and rows are updated.
            geometry: Where means, scales, quats and opacities are. On the host they go the way of the appearance, and
                device memory depends on the largest views alone (`offload/pipelines/streamed_host.py`).
            moments: The precision in which Adam's moments of the appearance are kept, and travel. Those of geometry
                are always float32, so that the option means the same wherever geometry is.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
        """
        super().__init__(
            parameters,
            adam,
            device=device,
            geometry=geometry,
            max_gaussians=max_gaussians,
            moments=moments,
            pad_to_cache_line=geometry == "host",
        )
        self._view: StreamedView | InPlaceView | None = None
        self._geometry_rows: dict[str, Tensor] = {}
        groups = {}
        for name, store in self._stores.items():
            multipliers, rates = schedules_of(name, store.sh_degree, adam)
            self._deferrals[name] = DeferralTables(multipliers, adam.betas, adam.eps, device)
            groups[name] = RowGroup(store, self._deferrals[name], rates)
        self._pipeline: StreamedPipeline | StreamedHostPipeline
        if geometry == "device":
            self._pipeline = StreamedPipeline(groups, self._cull, device)
        else:
            self._stores["geometry"].on_change = self._host_geometry_changed
            self._pipeline = StreamedHostPipeline(groups, self._cull, device)

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras) -> dict[str, Tensor]:
        """The rows [V] that a view needs, on the device, for `training.gaussians.activate`; leaves or their views."""
        self._view = self._pipeline.fetch(cameras)
        if self._device_geometry is None:
            geometry = self._to_render("geometry", self._view.values["geometry"])
        else:
            gathered = self._device_geometry.gather(self._view.ids)
            geometry = self._geometry_rows = {name: rows.requires_grad_() for name, rows in gathered.items()}
        return {**geometry, **self._to_render("appearance", self._view.values["appearance"])}

    @property
    def ids(self) -> Tensor:
        """Which Gaussians `fetch` gave, [V] int64 on the device."""
        return self._view.ids

    def prefetch(self, cameras: Cameras) -> None:
        """Prepare the view after this one; not where densification will change rows before it."""
        self._pipeline.prefetch(cameras)

    def update(self) -> None:
        """Adam's step on the gradients of the rows that `fetch` gave."""
        self._finite.keep([*self._view.values.values(), *self._geometry_rows.values()])
        self._pipeline.update()
        if self._device_geometry is not None:
            gradients = {name: gradient_of(rows) for name, rows in self._geometry_rows.items()}
            self._device_geometry.step(self.ids, gradients)
            self._pipeline.geometry_has_moved()
            self._geometry_rows = {}
        self.steps_done += 1

    # ------------------------------------------------------------------------------------ reading, at any time

    def offload_milliseconds(self) -> dict[str, float]:
        """How long the worker and waiting for it have taken so far, by name; nothing where there is no worker."""
        return self._pipeline.offload_milliseconds() if isinstance(self._pipeline, StreamedHostPipeline) else {}

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
        self._pipeline.finish()
        ids = self._cull(cameras)
        if self._device_geometry is None:
            geometry = self._to_render("geometry", self._pipeline.read("geometry", ids))
        else:
            geometry = self._device_geometry.gather(ids)
        return {**geometry, **self._to_render("appearance", self._pipeline.read("appearance", ids))}

    # ------------------------------------------------------------------------------------------- to be continued

    def state(self) -> dict[str, Tensor]:
        """As of all offloaded Gaussians, with the next view as far as it has been found ahead."""
        state = super().state()
        if self._pipeline.upcoming_ids is not None:
            state["upcoming/ids"] = self._pipeline.upcoming_ids
        return state

    def copied_before_change(self) -> dict[str, HostStore]:
        """As of all offloaded Gaussians; with the last steps, where those on the host are the newest."""
        copied = super().copied_before_change()
        if self._device_geometry is None:
            copied.update({f"last_step/{name}": store for name, store in self._stores.items()})
        return copied

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here, whichever trainer has left it."""
        super().load_state(state)
        upcoming = state.get("upcoming/ids")
        self._pipeline.load_state(None if upcoming is None else upcoming.to(self.device, copy=True))

    def undo_step(self) -> None:
        """Forget the step that an error has ended.

        Raises:
            RuntimeError: It has been applied in part.
        """
        self._pipeline.undo_step(self.steps_done)
        if any(tables.step != self.steps_done for tables in self._deferrals.values()):
            raise RuntimeError("the step had been applied in part")
        self._geometry_rows = {}

    # --------------------------------------------------------------------------------------------------- inside

    def _hand_over(self, group: str, ids: Tensor | None) -> None:
        self._pipeline.hand_over(group, ids)

    def _last_step(self, group: str) -> Tensor:
        return self._pipeline.last_step(group)
