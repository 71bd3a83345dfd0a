"""The streamed trainer's Gaussians: rows on the host are updated by the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.options import AdamOptions
from offload.models.offloaded import OffloadedGaussians, Place, geometry_in, groups_beside
from offload.pipelines.contract import Pipeline
from offload.pipelines.streamed import StreamedPipeline
from offload.pipelines.streamed_host import StreamedHostPipeline
from offload.store.layout import Moments, StateFormat


class StreamedGaussians(OffloadedGaussians):
    """Gaussians whose rows travel as `offload/pipelines/streamed.py` says, or `streamed_host.py` beside it."""

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
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`; best in Morton order, in which a
                view's rows come in runs.
            adam: Learning rates, decay rates and epsilon.
            device: Where views are rendered and rows are updated.
            geometry: Where means, scales, quats and opacities are. On the host they go the way of the appearance, and
                device memory depends on the largest views alone. In a compact state they do so in either place, and
                on the device is a copy of what culling needs.
            moments: The precision in which Adam's moments of the appearance are kept, and travel. Those of geometry
                are always float32, so that the option means the same wherever geometry is.
            state: The form of rows; a compact one has its own form of moments.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
        """
        on_host = geometry == "host"
        place = geometry_in(
            geometry,
            parameters,
            adam,
            device=device,
            max_gaussians=max_gaussians,
            state=state,
            pad_to_cache_line=on_host,
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
        if on_host:
            pipeline = StreamedHostPipeline(groups, place.visible_ids, device)
        else:
            pipeline = StreamedPipeline(groups, place.visible_ids, device)
        super().__init__(place, groups, pipeline, device)
