"""The streamed trainer's Gaussians: rows on the host are updated by the device."""

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
from offload.models.offloaded import OffloadedGaussians, Place, geometry_in, groups_beside
from offload.pipelines.contract import Pipeline
from offload.pipelines.packed import PackedPipeline
from offload.pipelines.streamed import StreamedPipeline
from offload.pipelines.streamed_host import StreamedHostPipeline
from offload.store.host_store import HostStore
from offload.store.layout import Moments, StateFormat


class StreamedGaussians(OffloadedGaussians):
    """Gaussians whose rows travel as `streamed.py`, `streamed_host.py` or `packed.py` in `offload/pipelines` says."""

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
                in a compact state.
        """
        on_host = geometry == "host"
        place: GeometryPlace
        if state == "compact":
            pin = device.type == "cuda"
            store = HostStore(parameters, "geometry", state=state, max_gaussians=max_gaussians, pin=pin)
            place = CulledGeometry(store, adam, Boxes(device) if on_host else Balls(device), device=device)
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
        super().__init__(place, groups, pipeline, device)
