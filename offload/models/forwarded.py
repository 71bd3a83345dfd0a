"""The optimized trainer's Gaussians: rows on the host are updated by the CPU and forwarded to the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offload.adam.host import DeferredAdam
from offload.adam.options import AdamOptions
from offload.models.offloaded import OffloadedGaussians, Place, geometry_in, groups_beside
from offload.pipelines.forwarded import ForwardedPipeline
from offload.store.layout import StateFormat


class ForwardedGaussians(OffloadedGaussians):
    """Gaussians whose rows travel as `offload/pipelines/forwarded.py` says."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        device: torch.device,
        geometry: Place = "device",
        state: StateFormat = "float32",
        max_gaussians: int = 0,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`; best in Morton order, in which a
                view's rows come in runs.
            adam: Learning rates, decay rates and epsilon.
            device: Where views are rendered.
            geometry: Where means, scales, quats and opacities are.
            state: The form of rows.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
        """
        place = geometry_in(geometry, parameters, adam, device=device, max_gaussians=max_gaussians, state=state)
        groups = groups_beside(
            place,
            parameters,
            adam,
            lambda multipliers: DeferredAdam(multipliers, adam.betas, adam.eps),
            device=device,
            max_gaussians=max_gaussians,
            state=state,
        )
        # Where the device is the CPU, its native kernels decode rows as fast as they are read.
        device_reads = state == "compact" and device.type == "cuda"
        pipeline = ForwardedPipeline(groups, place.visible_ids, device, device_reads=device_reads)
        super().__init__(place, groups, pipeline, device)
