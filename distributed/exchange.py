"""The exchange of projected Gaussians: from the ranks that hold them to those that draw the cameras, and back.

Each rank projects its Gaussians into the cameras of all ranks. What a picture needs of such a pair of camera and
Gaussian are twelve numbers, which travel to the rank that draws the camera, and their gradients come home in the
backward pass (Grendel, arXiv 2406.18533). gsplat 1.5.3 does so within its rasterization, but not where pairs are
packed, and without absolute gradients; this stands between its kernels, and between the native ones of the CPU.

A rank's loss is the mean over its own pictures. Gradients that come home are divided by the number of ranks: they are
those of the mean over the pictures of all. Where one of them is not finite, all are NaN at every rank, so that
optimizers skip the step everywhere (`offload.adam.finite`).

In float32 a pair is 48 bytes on the way out and 36 on the way home, 44 with absolute gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from types import ModuleType

import torch
from torch import Tensor

from distributed.mesh import Ranks
from offload.backends import kernels_for
from rendering.projection import Projection

PAIR_COLUMNS = 9  # of a pair that travels, beside its features: means2d 2, conics 3, opacities 1, depths 1, radii 2


@dataclass(frozen=True)
class PairExchange:
    """Exchange the pairs of one rendering, as `rendering.projection.Exchange` says.

    Of W B cameras in all, rank r draws the B from r B on. The pairs of a camera come in the order of their ranks, and
    within one in its own order, so that the picture does not depend on who is quicker.
    """

    ranks: Ranks
    num_cameras: int  # B
    absgrad: bool = False  # whether the backward pass sets `means2d.absgrad` at home, as the rasterizer does

    def __call__(self, projection: Projection, features: Tensor) -> tuple[Projection, Tensor]:
        p = projection
        going, coming = self._counts(p.camera_ids)
        sent, received, per_camera = [*map(sum, going)], [*map(sum, coming)], [*map(sum, zip(*coming, strict=True))]
        order = _by_camera(coming, p.camera_ids.device)
        route = _Route(self.ranks, sent, received, order, self.absgrad)

        means2d, conics, opacities, features, depths, radii = _Exchange.apply(
            route, p.means2d, p.conics, p.opacities, features, p.depths, p.radii
        )
        if self.absgrad and means2d.requires_grad:
            route.home, route.drawn = p.means2d, means2d
        camera_ids = p.camera_ids.new_empty(len(means2d))
        for camera, ids in enumerate(camera_ids.split(per_camera)):
            ids.fill_(camera)
        drawn = Projection(
            camera_ids=camera_ids,
            gaussian_ids=torch.zeros_like(camera_ids),  # their numbers at home mean nothing here
            radii=radii,
            means2d=means2d,
            depths=depths,
            conics=conics,
            opacities=opacities,
            row_offsets=None if camera_ids.is_cuda else torch.tensor([0, *accumulate(per_camera)]),
        )
        return drawn, features

    def _counts(self, camera_ids: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Count the pairs of each camera that go to each rank and come from it, [W][B]; waits for the device, once.

        Args:
            camera_ids: [S] ascending.
        """
        W, B = self.ranks.size, self.num_cameras
        ends = torch.searchsorted(camera_ids, torch.arange(W * B + 1, device=camera_ids.device))  # where each begins
        table = camera_ids.new_empty(2, W * B)
        torch.sub(ends[1:], ends[:-1], out=table[0])
        self.ranks.all_to_all(table[0], [B] * W, [B] * W, result=table[1])
        going, coming = table.view(2, W, B).tolist()
        return going, coming


@dataclass
class _Route:
    """Say which pairs go where; and whose absolute gradients are whose."""

    ranks: Ranks
    sent: Sequence[int]  # W counts of pairs
    received: Sequence[int]  # the same
    order: Tensor | None  # [R] of the received pairs, camera after camera; None: as they come
    absgrad: bool
    home: Tensor | None = None  # means2d as they go
    drawn: Tensor | None = None  # and as they come, of which the rasterizer sets the absolute gradients


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, route, *columns):
        kernels = _kernels(columns[0])
        came = route.ranks.all_to_all(kernels.pack(columns, None), route.sent, route.received)
        drawn = _as_many(came, columns)
        kernels.unpack(came, drawn, route.order)
        ctx.route = route
        ctx.mark_non_differentiable(*drawn[4:])  # of which the order and the tiles follow
        return tuple(drawn)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *v_drawn):
        route, leaving = ctx.route, [*v_drawn[:4]]
        if route.absgrad:
            leaving.append(route.drawn.absgrad)
        kernels, spoiled = _kernels(leaving[0]), torch.zeros((), dtype=torch.uint8, device=leaving[0].device)
        pairs = kernels.pack(leaving, route.order, spoiled)
        spoiled = route.ranks.largest(spoiled)
        came = route.ranks.all_to_all(pairs, route.received, route.sent)
        v_columns = _as_many(came, leaving)
        kernels.unpack(came, v_columns, None, route.ranks.size, spoiled)
        if route.absgrad:
            route.home.absgrad = v_columns.pop()
            route.drawn = None  # which holds this node
        return None, *v_columns, None, None


def _as_many(rows: Tensor, columns: Sequence[Tensor]) -> list[Tensor]:
    """Return columns of these kinds for as many pairs as there are rows, to be written."""
    return [column.new_empty(len(rows), *column.shape[1:]) for column in columns]


def _kernels(tensor: Tensor) -> ModuleType:
    return kernels_for(tensor.device, "distributed.pairs")


def _by_camera(coming: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """Return the order [R] that puts pairs, which come rank by rank, camera after camera; None where they are so.

    Args:
        coming: [W][B] counts of pairs by rank and camera.
        device: Where the pairs are.
    """
    num_ranks, num_cameras = len(coming), len(coming[0])
    if num_cameras == 1:
        return None
    ends = [*accumulate(chain(*coming))]
    ranges = [
        torch.arange(end - count, end, device=device)
        for camera in range(num_cameras)
        for end, count in ((ends[rank * num_cameras + camera], coming[rank][camera]) for rank in range(num_ranks))
    ]
    return torch.cat(ranges)
