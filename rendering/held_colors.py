"""Colours from harmonics that somebody holds in a form of his own, and decodes some at a time.

Decoded coefficients and their gradient are the largest tensors of a view of many Gaussians, 192 bytes each a Gaussian.
Here neither is ever whole: colours are computed block by block, and block by block once more in the backward pass, for
the gradients of all else. The gradient of the coefficients is basis(direction) x colour gradient, so that the holder
gets the latter, [nnz, 3], and makes of it what a block needs when it is stepped. Each number is the one that whole
tensors give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rendering.projection import Projection


class HeldCoefficients(Protocol):
    """Coefficients of the bands above the first, of N Gaussians."""

    def blocks(self) -> Sequence[slice]:
        """Return the rows that are decoded together, block after block."""

    def coefficients(self, rows: slice) -> Tensor:
        """Decode the coefficients [n, K - 1, 3] of a block."""

    def owe(self, v_colors: Tensor, gradient: Callable[[slice], Tensor]) -> None:
        """Take what the gradient of the coefficients is made of; once in a backward pass.

        Args:
            v_colors: [nnz, 3], the gradient of colours, which may be set to zero until it is used.
            gradient: Makes that of the coefficients [n, K - 1, 3] of a block.
        """


@dataclass(frozen=True)
class Block:
    """Some of the Gaussians, and the pairs of a camera and one of them."""

    rows: slice
    pairs: slice | Tensor  # which of all
    camera_ids: Tensor  # [pairs] int64
    gaussian_ids: Tensor  # [pairs] int64, counted from the first of the rows
    row_offsets: Tensor  # [C + 1] int64 on the host, as `Projection` has them


Colors = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, HeldCoefficients]  # as `rasterize` takes them
Evaluate = Callable[[Tensor, Tensor, Tensor, Tensor, Block], Tensor]


def held_apart(colors: Colors) -> tuple[Tensor | tuple[Tensor, Tensor], HeldCoefficients | None]:
    """Return colours and None; or sh0 [N, 1, 3] and what is held, where some are."""
    if isinstance(colors, tuple):
        first, others = colors
        return ((first, others), None) if isinstance(others, Tensor) else (first, others)
    return colors, None


def held_colors(
    held: HeldCoefficients, evaluate: Evaluate, means: Tensor, sh0: Tensor, cameras: Tensor, projection: Projection
) -> Tensor:
    """Return colours [nnz, 3] of projected Gaussians; differentiable in means, sh0 and cameras, and owed to the holder.

    Args:
        held: Coefficients of N Gaussians.
        evaluate: Gives the colours of a block's pairs, from its means [n, 3], sh0 [n, 1, 3], other coefficients
            [n, K - 1, 3], and the cameras; differentiable in all four.
        means: [N, 3], whose gradient is wanted wherever that of the coefficients is.
        sh0: [N, 1, 3].
        cameras: [C, ...], whatever `evaluate` takes.
        projection: The pairs.
    """
    return _HeldColors.apply(held, evaluate, blocks_of(held, len(cameras), len(means), projection), means, sh0, cameras)


def blocks_of(held: HeldCoefficients, num_cameras: int, num_rows: int, projection: Projection) -> list[Block]:
    """Find the pairs of each block: one run for each camera; waits for a device once."""
    rows, camera_ids, gaussian_ids = held.blocks(), projection.camera_ids, projection.gaussian_ids
    ends = torch.tensor([0, *(each.stop for each in rows)], device=gaussian_ids.device)  # [blocks + 1]
    ends = ends + num_rows * torch.arange(num_cameras, device=ends.device)[:, None]  # [C, blocks + 1]
    ranks = gaussian_ids if num_cameras == 1 else gaussian_ids + num_rows * camera_ids  # ascending
    places = torch.searchsorted(ranks, ends).cpu()
    blocks = []
    for number, each in enumerate(rows):
        firsts, lasts = places[:, number], places[:, number + 1]
        pairs: slice | Tensor
        if num_cameras == 1:
            pairs = slice(int(firsts[0]), int(lasts[0]))
        else:
            runs = [torch.arange(*run, device=ends.device) for run in zip(firsts.tolist(), lasts.tolist(), strict=True)]
            pairs = torch.cat(runs)
        offsets = torch.cat([places.new_zeros(1), (lasts - firsts).cumsum(0)])
        blocks.append(Block(each, pairs, camera_ids[pairs], gaussian_ids[pairs] - each.start, offsets))
    return blocks


class _HeldColors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        held: HeldCoefficients,
        evaluate: Evaluate,
        blocks: list[Block],
        means: Tensor,
        sh0: Tensor,
        cameras: Tensor,
    ) -> Tensor:
        colors = means.new_empty(sum(len(block.gaussian_ids) for block in blocks), 3)
        for block in blocks:
            at = block.rows
            colors[block.pairs] = evaluate(means[at], sh0[at], held.coefficients(at), cameras, block)
        ctx.save_for_backward(means, sh0, cameras, colors)
        ctx.held, ctx.evaluate, ctx.blocks = held, evaluate, blocks  # type: ignore[attr-defined]
        return colors

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, v_colors: Tensor) -> tuple[Tensor | None, ...]:
        held, evaluate, blocks = ctx.held, ctx.evaluate, ctx.blocks  # type: ignore[attr-defined]
        means, sh0, cameras, colors = ctx.saved_tensors  # type: ignore[attr-defined]
        v_colors = torch.where(colors > 0, v_colors, 0)
        gradients = [torch.zeros_like(each) for each in (means, sh0, cameras)]
        with_cameras = ctx.needs_input_grad[5]  # type: ignore[attr-defined]
        for block in blocks:
            at = block.rows
            leaves = [each.detach().requires_grad_() for each in (means[at], sh0[at], cameras)]
            leaves[2].requires_grad_(with_cameras)
            wanted = leaves if with_cameras else leaves[:2]
            with torch.enable_grad():
                part = evaluate(leaves[0], leaves[1], held.coefficients(at), leaves[2], block)
            found = torch.autograd.grad(part, wanted, v_colors[block.pairs])
            gradients[0][at], gradients[1][at] = found[:2]
            if with_cameras:
                gradients[2] += found[2]
        means, sh0, cameras = (each.detach().clone() for each in (means, sh0, cameras))  # which a step may change

        def gradient(rows: slice) -> Tensor:
            (block,) = (each for each in blocks if each.rows == rows)
            coefficients = held.coefficients(rows).requires_grad_()
            with torch.enable_grad():
                part = evaluate(means[rows], sh0[rows], coefficients, cameras, block)
            return torch.autograd.grad(part, coefficients, v_colors[block.pairs])[0]

        held.owe(v_colors, gradient)
        return None, None, None, gradients[0], gradients[1], gradients[2] if with_cameras else None
