"""`join` of `offload/models/named_rows.py` as a CUDA kernel in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128  # of a program
MOST = 5  # parts


def join(parts: Sequence[Tensor], columns: int) -> Tensor:
    """Lay at most five tensors [V, ...] side by side, and zeros behind them, in rows [V, columns], a power of 2."""
    count = parts[0].shape[0]
    out = torch.empty(count, columns, dtype=parts[0].dtype, device=parts[0].device)
    if count:
        given = [part.contiguous() for part in parts] + [None] * (MOST - len(parts))
        widths = [part.shape[1] for part in parts] + [0] * (MOST - len(parts))
        with torch.cuda.device_of(out):
            _join_kernel[(-(-count // ROWS),)](*given, out, count, *widths, COLUMNS=columns, ROWS=ROWS)
    return out


@triton.jit
def _column_of(part, row, lane, inside, first: tl.constexpr, WIDTH: tl.constexpr, values):
    """Put a part's columns into rows [ROWS, COLUMNS] from column `first` on."""
    here = inside & (lane >= first) & (lane < first + WIDTH)
    return tl.where(here, tl.load(part + row * WIDTH + (lane - first), mask=here, other=0.0), values)


@triton.jit(do_not_specialize=["num_rows"])
def _join_kernel(
    part0, part1, part2, part3, part4,  # [V, W0], ...; None where there are fewer
    out,  # [V, COLUMNS]
    num_rows,  # V
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, COLUMNS)[None, :]
    inside = row < num_rows
    values = tl.zeros([ROWS, COLUMNS], tl.float32)
    values = _column_of(part0, row, lane, inside, 0, W0, values)
    if W1 > 0:
        values = _column_of(part1, row, lane, inside, W0, W1, values)
    if W2 > 0:
        values = _column_of(part2, row, lane, inside, W0 + W1, W2, values)
    if W3 > 0:
        values = _column_of(part3, row, lane, inside, W0 + W1 + W2, W3, values)
    if W4 > 0:
        values = _column_of(part4, row, lane, inside, W0 + W1 + W2 + W3, W4, values)
    tl.store(out + row * COLUMNS + lane, values, mask=inside)
