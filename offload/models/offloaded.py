"""Gaussians of which appearance, or all, is in host memory: where they are, and what works on all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.finite import FiniteGradients
from offload.adam.options import AdamOptions
from offload.adam.state import State, load_deferred
from offload.culling.cameras import Cameras, Margin
from offload.culling.margins import largest_correction, largest_drift, largest_step, margin_of
from offload.culling.native import BlockBounds, visible_ids
from offload.models.geometry_device import DeviceGeometry
from offload.store.host_store import HostStore, total_growth
from offload.store.layout import Moments


class OffloadedGaussians:
    """What the Gaussians of the optimized and of the streamed trainer share: reading, densification, state.

    A subclass moves rows of `_stores` to the device and back. It sets `_deferrals`, which say how far rows of each
    group lag behind, and `_pipeline`, whose `finish` waits until the stores hold all that has been updated and whose
    `read` gives copies of current rows; and it has the methods that raise NotImplementedError here.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        device: torch.device,
        geometry: Literal["device", "host"],
        max_gaussians: int,
        moments: Moments = "float32",
        pad_to_cache_line: bool = False,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`.
            adam: Learning rates, decay rates and epsilon.
            device: Where views are rendered.
            geometry: Where means, scales, quats and opacities are.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
            moments: The precision in which Adam's moments of the appearance are kept.
            pad_to_cache_line: As for `HostStore`.
        """
        self.steps_done = 0
        self._adam = adam
        self._rendering_device = device
        self._finite = FiniteGradients(device)
        self._device_geometry: DeviceGeometry | None = None
        self._bounds: BlockBounds | None = None  # of geometry on the host; None until they are next needed
        self._stores: dict[str, HostStore] = {}  # one for each group, with last steps of its own
        self._deferrals: dict[str, DeferralTables] = {}
        if geometry == "device":
            self._device_geometry = DeviceGeometry(parameters, adam, device=device)
            self._deferrals["geometry"] = self._device_geometry.tables
        for name in ("appearance",) if geometry == "device" else ("geometry", "appearance"):
            self._stores[name] = HostStore(
                parameters,
                name,
                moments=moments if name == "appearance" else "float32",
                max_gaussians=max_gaussians,
                pin=device.type == "cuda",
                pad_to_cache_line=pad_to_cache_line,
            )

    # ------------------------------------------------------------------------------------ reading, at any time

    @property
    def num_gaussians(self) -> int:
        return self._stores["appearance"].num_gaussians

    @property
    def device(self) -> torch.device:
        """Where geometry is."""
        return torch.device("cpu") if self._device_geometry is None else self._rendering_device

    @property
    def staging_allocations(self) -> int:
        """How often space for the rows of a view has been allocated so far."""
        return self._pipeline.staging_allocations

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Copies of the current values of these rows of the six parameter tensors."""
        values = {}
        if self._device_geometry is not None:
            values = self._device_geometry.gather(torch.arange(first, last, device=self.device))
        for name in self._stores:
            values.update(self._named(name, self._pipeline.read(name, torch.arange(first, last))))
        return values

    # ------------------------------------------------------------------------------------------- to be continued

    def state(self) -> dict[str, Tensor]:
        """Everything that training goes on from, as `offload.adam.state` describes it: views of the stores."""
        self._pipeline.finish()
        state = {"step_count": torch.tensor(self.steps_done)}
        for place in self._places():
            state.update(place.arrays_by_name())
        for name, deferral in self._deferrals.items():
            in_store = name in self._stores
            state[f"last_step/{name}"] = self._last_step(name) if in_store else self._device_geometry.last_step
            state.update({f"deferral/{name}/{key}": table for key, table in deferral.tables().items()})
        return state

    def copied_before_change(self) -> dict[str, HostStore]:
        """Which tensors of `state` change only after their store has been told; all others may change at any time."""
        return {key: store for store in self._stores.values() for key in store.arrays_by_name()}

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here, whichever trainer has left it."""
        self.steps_done = int(state["step_count"])
        for name, store in self._stores.items():
            with store.changing(None):
                load_deferred(store, name, self._deferrals[name], state)
            store.step = self.steps_done
        if self._device_geometry is not None:
            load_deferred(self._device_geometry, "geometry", self._deferrals["geometry"], state)
        self._bounds = None

    def skipped_steps(self) -> tuple[int, int]:
        """How many steps had a gradient that was not finite, and how many of those were the last in a row."""
        return self._finite.skipped_steps()

    # ---------------------------------------------- what densification asks (training.densification.GaussianStore)

    def read(self, name: str) -> Tensor:
        """The current values of one geometry parameter; not copied."""
        if self._device_geometry is not None:
            return self._device_geometry.settle(None)[name]
        self._hand_over("geometry", None)
        return self._stores["geometry"].read(name)

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M], without moments."""
        self._hand_over_all(ids)
        for place in self._places():
            place.append_copies(ids)
        self._bounds = None

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where some places have them only, since appending has failed."""
        for place in self._places():
            place.truncate(num_gaussians)
        self._bounds = None

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor]) -> None:
        """Give these rows [M] new values; all moments of the rows become zero."""
        self._hand_over_all(ids)
        for place in self._places():
            place.overwrite(ids, values)
        self._bounds = None

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        self._hand_over_all(ids[:0])
        for place in self._places():
            place.keep(ids)
        self._bounds = None

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""
        if self._device_geometry is not None:
            self._device_geometry.settle(None)
            self._device_geometry.clamp_opacities(max_logit)
        else:
            self._hand_over("geometry", None)
            self._stores["geometry"].clamp_opacities(max_logit)

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Memory in bytes, of host and device, that appending this many Gaussians takes at its peak."""
        return total_growth(self._places(), num_new)

    # ------------------------------------------------------------------------------------------ of the subclasses

    def _hand_over(self, group: str, ids: Tensor | None) -> None:
        """Let a store be read and changed, until the next view is fetched.

        Args:
            group: Whose store.
            ids: int64 [M] anywhere, sorted: the rows of which it is to hold the current values; None: all rows.
        """
        raise NotImplementedError

    def _last_step(self, group: str) -> Tensor:
        """Step of the last update of each row of a store, [N] int32."""
        return self._stores[group].last_step

    # --------------------------------------------------------------------------------------------------- inside

    def _hand_over_all(self, ids: Tensor) -> None:
        ids = ids.unique()
        for group in self._stores:
            self._hand_over(group, ids)
        if self._device_geometry is not None:
            self._device_geometry.settle(ids)

    def _places(self) -> list[DeviceGeometry | HostStore]:
        device = [] if self._device_geometry is None else [self._device_geometry]
        return [*device, *self._stores.values()]

    def _host_geometry(self) -> Tensor:
        """Rows [N, 12] as culling on the host takes them."""
        store = self._stores["geometry"]
        return store.rows.parameters[:, : store.layout.num_columns]

    def _host_geometry_changed(self, host_ids: Tensor | None) -> None:
        """Follow a change of rows (sorted; None: all) of the store."""
        if host_ids is None:
            self._bounds = None
        elif self._bounds is not None:
            self._bounds.update(self._host_geometry(), host_ids)

    def _margin(self, lagging: bool) -> Margin:
        """How far geometry may be from what culling reads when the step after the present one renders it.

        Args:
            lagging: Whether rows lack the steps that they have skipped.
        """
        change = largest_step(self._adam.betas) + (largest_drift(self._adam.betas) if lagging else 0.0)
        return margin_of(change * largest_correction(self._adam.betas, self.steps_done + 1), self._adam.learning_rates)

    def _cull(self, cameras: Cameras) -> Tensor:
        """Sorted ids [V], where geometry is, of what cameras may draw after one more step."""
        if self._device_geometry is not None:
            return self._device_geometry.visible_ids(cameras, self._margin(lagging=False), self._margin(lagging=True))
        if self._bounds is None:  # once after a refinement, whose operations are several
            self._bounds = BlockBounds(self._host_geometry())
        return visible_ids(self._host_geometry(), self._bounds, cameras, self._margin(lagging=True))

    def _to_render(self, group: str, rows: Tensor) -> dict[str, Tensor]:
        return self._stores[group].layout.to_render(rows)

    def _named(self, group: str, rows: Tensor) -> dict[str, Tensor]:
        return self._stores[group].layout.named(rows)
