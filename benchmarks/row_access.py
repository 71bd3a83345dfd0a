"""Triton kernels that read or write rows of pinned host memory directly, without a copy to staging."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values


@triton.jit
def _gather(rows, ids, out, num_values, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Gather rows, out[i] = rows[ids[i]]."""
    value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = value < num_values
    source = tl.load(ids + value // COLUMNS, mask=inside) * COLUMNS + value % COLUMNS
    tl.store(out + value, tl.load(rows + source, mask=inside), mask=inside)


@triton.jit
def _scatter(values, ids, rows, num_values, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Scatter rows, rows[ids[i]] = values[i]."""
    value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = value < num_values
    target = tl.load(ids + value // COLUMNS, mask=inside) * COLUMNS + value % COLUMNS
    tl.store(rows + target, tl.load(values + value, mask=inside), mask=inside)


def gather(rows: Tensor, ids: Tensor, out: Tensor) -> None:
    """Read rows.

    Args:
        rows: [N, columns], pinned or on the device.
        ids: [V] int64 on the device.
        out: [V, columns] on the device.
    """
    _launch(_gather, rows, ids, out, out)


def scatter(values: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Write rows: `gather` the other way.

    Args:
        values: [V, columns] on the device.
        ids: [V] int64 on the device, each at most once.
        rows: [N, columns], pinned or on the device.
    """
    _launch(_scatter, values, ids, rows, values)


def _launch(kernel, first: Tensor, ids: Tensor, second: Tensor, on_device: Tensor) -> None:
    with torch.cuda.device_of(on_device):
        grid = (triton.cdiv(on_device.numel(), BLOCK),)
        kernel[grid](first, ids, second, on_device.numel(), COLUMNS=on_device.shape[1], BLOCK=BLOCK)
