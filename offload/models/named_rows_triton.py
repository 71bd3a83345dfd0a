"""What `offload/models/named_rows.py` computes, as CUDA kernels in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.store.layout import RowLayout

ROWS = 128  # of a program
MOST = 5  # parts
_LAYOUT = RowLayout.of("geometry", 0, "compact")
_COLUMNS = tl.constexpr(_LAYOUT.num_columns)
_MEANS = tl.constexpr(_LAYOUT.columns["means"].start)  # the first column of each, as those below
_SCALES = tl.constexpr(_LAYOUT.columns["scales"].start)
_QUATS = tl.constexpr(_LAYOUT.columns["quats"].start)
_OPACITIES = tl.constexpr(_LAYOUT.columns["opacities"].start)
_SH0 = tl.constexpr(_LAYOUT.columns["sh0"].start)
_LOG2_E = tl.constexpr(1.4426950216293335)  # in float32
_LOG2_E_REST = tl.constexpr(1.9259629911266175e-8)  # of it


def activated(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do as `offload.models.named_rows.activated`, for float32."""
    count = rows.shape[0]
    shapes = ((3,), (4,), (1, 3), (3,), ())
    means, quats, sh0, scales, opacities = (rows.new_empty(count, *shape) for shape in shapes)
    if count:
        with torch.cuda.device_of(rows):
            _activate_kernel[(-(-count // ROWS),)](
                rows.contiguous(), means, quats, sh0, scales, opacities, count, ROWS=ROWS
            )
    return means, quats, sh0, scales, opacities


def joined(gradients: Sequence[Tensor | None], scales: Tensor, opacities: Tensor) -> Tensor:
    """Do as `offload.models.named_rows.joined`, for float32."""
    count = scales.shape[0]
    out = scales.new_empty(count, _LAYOUT.num_columns)
    if count:
        given = [None if gradient is None else gradient.contiguous() for gradient in gradients]
        with torch.cuda.device_of(out):
            _joined_kernel[(-(-count // ROWS),)](*given, scales, opacities, out, count, ROWS=ROWS)
    return out


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


@triton.jit
def _exp(x):
    """Compute the exponential as C libraries do, to the last bits: `tl.exp` is off by more, the larger |x|."""
    x = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))  # beyond, it is 0 or infinite all the same
    whole = tl.floor(x * _LOG2_E + 0.5)
    rest = tl.fma(x, _LOG2_E_REST, tl.fma(x, _LOG2_E, -whole))  # in -1/2..1/2
    return tl.exp2(rest) * 2.0 * tl.exp2(whole - 1.0)


@triton.jit
def _store_column(part, values, row, lane, inside, first: tl.constexpr, WIDTH: tl.constexpr):
    """Store a part's columns of rows [ROWS, COLUMNS], which begin at `first`."""
    tl.store(part + row * WIDTH + (lane - first), values, mask=inside & (lane >= first) & (lane < first + WIDTH))


@triton.jit(do_not_specialize=["num_rows"])
def _activate_kernel(
    rows,  # [V, COLUMNS]
    means, quats, sh0, scales, opacities,  # [V, 3], [V, 4], [V, 3], [V, 3], [V]
    num_rows,  # V
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, _COLUMNS)[None, :]
    inside = row < num_rows
    values = tl.load(rows + row * _COLUMNS + lane, mask=inside, other=0.0)
    _store_column(means, values, row, lane, inside, _MEANS, 3)
    _store_column(quats, values, row, lane, inside, _QUATS, 4)
    _store_column(sh0, values, row, lane, inside, _SH0, 3)
    # One exponential for both; in columns of neither it is not looked at.
    exponential = _exp(tl.where(lane == _OPACITIES, -values, values))
    _store_column(scales, exponential, row, lane, inside, _SCALES, 3)
    _store_column(opacities, tl.div_rn(1.0, exponential + 1.0), row, lane, inside, _OPACITIES, 1)


@triton.jit(do_not_specialize=["num_rows"])
def _joined_kernel(
    v_means, v_logs, v_quats, v_logits, v_sh0,  # [V, 3], [V, 3], [V, 4], [V], [V, 3], or None
    v_scales, v_opacities,  # [V, 3], [V], or None
    scales, opacities,  # [V, 3], [V]
    out,  # [V, COLUMNS]
    num_rows,  # V
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, _COLUMNS)[None, :]
    inside = row < num_rows
    values = tl.zeros([ROWS, _COLUMNS], tl.float32)
    if v_means is not None:
        values = _column_of(v_means, row, lane, inside, _MEANS, 3, values)
    if v_logs is not None:
        values = _column_of(v_logs, row, lane, inside, _SCALES, 3, values)
    if v_quats is not None:
        values = _column_of(v_quats, row, lane, inside, _QUATS, 4, values)
    if v_logits is not None:
        values = _column_of(v_logits, row, lane, inside, _OPACITIES, 1, values)
    if v_sh0 is not None:
        values = _column_of(v_sh0, row, lane, inside, _SH0, 3, values)
    none = tl.zeros([ROWS, _COLUMNS], tl.float32)
    if v_scales is not None:
        slopes = _column_of(scales, row, lane, inside, _SCALES, 3, none)
        values += _column_of(v_scales, row, lane, inside, _SCALES, 3, none) * slopes
    if v_opacities is not None:
        activated = _column_of(opacities, row, lane, inside, _OPACITIES, 1, none)
        values += _column_of(v_opacities, row, lane, inside, _OPACITIES, 1, none) * (1.0 - activated) * activated
    tl.store(out + row * _COLUMNS + lane, values, mask=inside)
