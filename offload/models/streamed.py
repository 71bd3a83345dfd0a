"""The streamed trainer's Gaussians: rows on the host are updated by the device; or all are there, while they fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.options import AdamOptions
from offload.culling.balls import Balls
from offload.culling.boxes import Boxes
from offload.models.contract import GeometryPlace
from offload.models.deferred import compact_parts
from offload.models.device_room import DeviceRoom, bytes_there
from offload.models.geometry_culled import CulledGeometry
from offload.models.offloaded import OffloadedGaussians, Parts, Place, geometry_in, groups_beside
from offload.pipelines.contract import Pipeline
from offload.pipelines.packed import PackedPipeline
from offload.pipelines.streamed import StreamedPipeline
from offload.pipelines.streamed_host import StreamedHostPipeline
from offload.store.growth import total_growth
from offload.store.host_store import PEAK, HostStore
from offload.store.layout import GROUP_NAMES, Moments, StateFormat, compact_bytes, group_shapes


class StreamedGaussians(OffloadedGaussians):
    """Gaussians whose rows travel as `streamed.py`, `streamed_host.py` or `packed.py` in `offload/pipelines` says.

    Where all of them may be resident no row travels while the device has room for all: they lie as those of
    `offload/models/deferred.py` do. Growth that finds no room there takes all to host memory, for good.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        device: torch.device,
        geometry: Place = "device",
        moments: Moments = "float32",
        state: StateFormat = "float32",
        max_gaussians: int = 0,
        resident_share: float = 0.0,
        tell: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`; best in Morton order, in which a
                view's rows come in runs.
            adam: Learning rates, decay rates and epsilon.
            device: Where views are rendered and rows are updated.
            geometry: Where means, scales, quats and opacities are. On the host they go the way of the appearance, and
                device memory depends on the largest views alone. In a compact state they do so in either place, and
                on the device is what culling needs: a ball around each Gaussian, or a box around each 64 of them.
            moments: The precision in which Adam's moments of the appearance are kept, and travel. Those of geometry
                are always float32, so that the option means the same wherever geometry is.
            state: The form of rows; a compact one has its own form of moments.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
            resident_share: The share of all Gaussians whose rows stay on the device (`offload/pipelines/residents.py`),
                in a compact state; 1: none travels, and none is on the host, while there is room for all.
            tell: Is given a sentence when all have been taken to the host.
        """
        self._tell = tell
        self._room = DeviceRoom(device)
        self._on_host = partial(
            _parts_on_host,
            adam=adam,
            device=device,
            geometry=geometry,
            moments=moments,
            state=state,
            max_gaussians=max_gaussians,
            resident_share=resident_share,
        )
        self._sh_degree = math.isqrt(parameters["shN"].shape[1] + 1) - 1
        self._bytes_there = partial(bytes_there, sh_degree=self._sh_degree, geometry=geometry)
        wanted = self._bytes_there(len(parameters["means"]))
        self._all_stay = state == "compact" and resident_share == 1 and self._room.holds_at_start(wanted)
        if self._all_stay:
            parts = compact_parts(parameters, adam, _bounds(geometry, device), device)
        else:
            parts = self._on_host(parameters)
        super().__init__(*parts, device)

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M], without moments."""
        self._make_room(len(ids))
        super().append_copies(ids)

    def append_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows [M] that `moving_rows` has returned after as many steps."""
        self._make_room(len(next(iter(rows.values()))))
        super().append_rows(rows)

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Count the bytes of host and device memory that appending this many Gaussians takes at its peak.

        Where they leave no room for all on the device, that is what all take on the host.
        """
        if self._has_room(num_new):
            return super().growth_bytes(num_new)
        return {torch.device("cpu"): int(PEAK * (self.num_gaussians + num_new) * compact_bytes(self._sh_degree))}

    def _has_room(self, num_new: int) -> bool:
        """Tell whether so many more Gaussians may be where all are now."""
        if not self._all_stay:
            return True
        count = self.num_gaussians
        (growth,) = total_growth(self._places(), num_new).values()
        return self._room.holds(self._bytes_there(count), growth, 1 + num_new / max(count, 1))

    def _make_room(self, num_new: int) -> None:
        """Take all rows to the host, where the device has no room for so many more."""
        if self._has_room(num_new):
            return
        self._move_to_host()
        self._room.forget_rows()  # or what travels would be given the memory that rendering and all rows have left
        self._tell(
            f"After {self.steps_done:,} steps {self.num_gaussians:,} Gaussians have been moved to host memory: the GPU "
            "has no room for all that growth adds."
        )

    def _move_to_host(self) -> None:
        """Hold all rows on the host; where that fails they are where they were."""
        state, before = self.state(), (self._geometry, self._groups, self._pipeline)
        for store in self.copied_before_change().values():
            with store.changing(None):  # so that whoever copies them in the background holds them no longer
                pass
        blank = {
            name: torch.zeros(()).expand(self.num_gaussians, *shape)
            for group in GROUP_NAMES
            for name, shape in group_shapes(group, self._sh_degree).items()
        }
        self._use(*self._on_host(blank))
        try:
            self.load_state(state)
        except BaseException:
            self._use(*before)
            raise
        self._all_stay = False


def _bounds(geometry: Place, device: torch.device) -> Balls | Boxes:
    """Return what a device culls compact rows by."""
    return Boxes(device) if geometry == "host" else Balls(device)


def _parts_on_host(
    parameters: Mapping[str, Tensor],
    adam: AdamOptions,
    *,
    device: torch.device,
    geometry: Place,
    moments: Moments,
    state: StateFormat,
    max_gaussians: int,
    resident_share: float,
) -> Parts:
    """Put rows that travel on the host; the arguments are those of `StreamedGaussians`."""
    on_host = geometry == "host"
    place: GeometryPlace
    if state == "compact":
        pin = device.type == "cuda"
        store = HostStore(parameters, "geometry", state=state, max_gaussians=max_gaussians, pin=pin)
        place = CulledGeometry(store, adam, _bounds(geometry, device), device=device)
    else:
        place = geometry_in(
            geometry, parameters, adam, device=device, max_gaussians=max_gaussians, pad_to_cache_line=on_host
        )
    groups = groups_beside(
        place,
        parameters,
        adam,
        lambda multipliers: DeferralTables(multipliers, adam.betas, adam.eps, device),
        device=device,
        max_gaussians=max_gaussians,
        moments=moments,
        state=state,
    )
    pipeline: Pipeline
    if isinstance(place, CulledGeometry):
        pipeline = PackedPipeline(groups, place.visible_ids, place.whole, device, resident_share)
    elif on_host:
        pipeline = StreamedHostPipeline(groups, place.visible_ids, device)
    else:
        pipeline = StreamedPipeline(groups, place.visible_ids, device)
    return place, groups, pipeline
