"""The Gaussians of GPU-only training that defers Adam: all of them on one device, and no gradients but a view's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.options import AdamOptions
from offload.culling.balls import Balls
from offload.culling.boxes import Boxes
from offload.models.contract import GeometryPlace
from offload.models.geometry_culled import CulledGeometry
from offload.models.geometry_device import DeviceGeometry
from offload.models.offloaded import OffloadedGaussians, Parts, row_groups
from offload.pipelines.groups import RowGroup
from offload.pipelines.resident import ResidentPipeline
from offload.store.contract import RowStore
from offload.store.device_store import DeviceStore
from offload.store.layout import StateFormat


class DeferredGaussians(OffloadedGaussians):
    """Gaussians on the device, of which each step reads and writes the rows in view alone.

    Bytes of device memory per Gaussian at SH degree 3: 136 of geometry and 580 of appearance; in a compact state 136,
    with what culling reads, and 196.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        device: torch.device,
        state: StateFormat = "float32",
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`.
            adam: Learning rates, decay rates and epsilon.
            device: Where everything lives.
            state: The form of rows.
        """
        if state == "compact":
            parts = compact_parts(parameters, adam, Balls(device), device)
        else:
            parts = _float32_parts(parameters, adam, device)
        super().__init__(*parts, device)

    def update(self, drawn: Tensor | None = None) -> None:
        """Take Adam's step on the gradients of the rows that `fetch` gave.

        Args:
            drawn: As for `DeviceGaussians`, in whose place this stands. Here it makes no difference: nearly all rows
                that culling finds are drawn.
        """
        super().update()


def compact_parts(
    parameters: Mapping[str, Tensor], adam: AdamOptions, bounds: Balls | Boxes, device: torch.device
) -> Parts:
    """Put compact rows on a device, which culls them by these bounds."""
    geometry, appearance = (
        DeviceStore(parameters, group, state="compact", device=device) for group in ("geometry", "appearance")
    )
    place = CulledGeometry(geometry, adam, bounds, device=device)
    groups = _groups(place, appearance, adam, device)
    return place, groups, ResidentPipeline(groups, place.visible_ids, device, place.whole)


def _float32_parts(parameters: Mapping[str, Tensor], adam: AdamOptions, device: torch.device) -> Parts:
    place = DeviceGeometry(parameters, adam, device=device)
    groups = _groups(place, DeviceStore(parameters, "appearance", device=device), adam, device)
    return place, groups, ResidentPipeline(groups, place.visible_ids, device)


def _groups(
    place: GeometryPlace, appearance: RowStore, adam: AdamOptions, device: torch.device
) -> dict[str, RowGroup[DeferralTables]]:
    return row_groups(place, appearance, adam, lambda columns: DeferralTables(columns, adam.betas, adam.eps, device))
