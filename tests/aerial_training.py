"""What each trainer trains, on the aerial scene, and steps with random gradients, which need no rendering."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.aerial_scene import AerialCameras
from configs import Config
from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras
from offload.models.baseline import BaselineGaussians
from offload.models.deferred import DeferredGaussians
from offload.models.device import DeviceGaussians
from offload.models.forwarded import ForwardedGaussians
from offload.models.streamed import StreamedGaussians
from offload.models.tiled import TiledGaussians, TileResult, ViewTile
from offload.tiles.budget import RowLimit
from training import schedules

CONFIG = Config(sh_degree_interval=1)
KINDS = (
    *("gpu_only", "gpu_only, deferred", "baseline", "geometry on device", "geometry on host"),
    *("geometry on device, compact", "streamed", "streamed, bfloat16", "streamed, geometry on host"),
)
Gaussians = (
    DeviceGaussians | DeferredGaussians | BaselineGaussians | ForwardedGaussians | StreamedGaussians | TiledGaussians
)


def gaussians_of(kind: str, parameters: dict[str, Tensor], device: torch.device) -> Gaussians:
    """What a trainer trains; the parameters are given up."""
    adam = AdamOptions(schedules.learning_rates(CONFIG, 3.2), lambda step: 1e-4, (0.9, 0.999))
    bound = {"device": device, "max_gaussians": 2 * len(parameters["means"])}
    if kind == "gpu_only":
        gaussians = DeviceGaussians(parameters, adam, device=device)
    elif kind == "gpu_only, deferred":
        gaussians = DeferredGaussians(parameters, adam, device=device)
    elif kind == "baseline":
        gaussians = BaselineGaussians(parameters, adam, **bound)
    elif kind.startswith("streamed"):
        moments = "bfloat16" if kind.endswith("bfloat16") else "float32"
        place = "host" if kind.endswith("host") else "device"
        gaussians = StreamedGaussians(parameters, adam, geometry=place, moments=moments, **bound)
    elif kind == "split":
        gaussians = TiledGaussians(parameters, adam, limit=RowLimit(0.05), **bound)
    else:
        place, state = "host" if "host" in kind else "device", "compact" if kind.endswith("compact") else "float32"
        gaussians = ForwardedGaussians(parameters, adam, geometry=place, state=state, **bound)
    parameters.clear()
    return gaussians


def views_of(cameras: AerialCameras) -> list[Cameras]:
    """One view of each camera."""
    size = cameras.width, cameras.height
    return [Cameras(cameras.viewmats[i : i + 1], cameras.Ks[i : i + 1], *size) for i in range(len(cameras.Ks))]


def train_on_random_gradients(gaussians: Gaussians, views: list[Cameras], steps: Iterable[int]) -> None:
    """Steps whose gradients their numbers decide; step i is on view i, and the next one is prefetched."""
    for step in steps:
        torch.manual_seed(step)
        if isinstance(gaussians, DeviceGaussians):
            ids = torch.arange(0, gaussians.num_gaussians, 3)
            for parameter in gaussians.fetch(views[0]).values():
                parameter.grad = torch.zeros_like(parameter)
                parameter.grad[ids] = torch.randn_like(parameter[ids])
            gaussians.update(ids)
            continue
        view, upcoming = views[step % len(views)], views[(step + 1) % len(views)]
        if isinstance(gaussians, TiledGaussians):
            gaussians.train_view(view, upcoming, _train_tile)
            gaussians.update()
            continue
        rows = gaussians.fetch(view)
        gaussians.prefetch(upcoming)
        _random_loss(rows).backward()
        gaussians.update()


def rows_of(values: dict[str, Tensor]) -> Callable[[int, int], dict[str, Tensor]]:
    """Gives some rows of tensors as `Model.rows` does."""
    return lambda first, last: {name: value[first:last] for name, value in values.items()}


def _train_tile(tile: ViewTile) -> TileResult:
    loss = _random_loss(tile.rows)
    loss.backward()
    return TileResult(loss.detach(), num_intersections=1, num_pixels=1)


def _random_loss(rows: dict[str, Tensor]) -> Tensor:
    return sum((value * torch.randn_like(value)).sum() for value in rows.values())
