"""The codec of `offload/adam/codes_triton.py` alone, with the arguments of `offload/adam/codes.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.adam import codes_triton

ROWS = 1 << 12  # the interpreter takes as long for a small tile
ROWS_ON_GPU = 32


def encode_moments(m: Tensor, v: Tensor, reach: float, random: Tensor) -> Tensor:
    codes = torch.empty_like(m, dtype=torch.int16)
    _encode_kernel[_grid(m)](m.contiguous(), v.contiguous(), _words(random), codes, reach, len(m), **_tile(m))
    return codes


def decode_moments(codes: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    m, v = (torch.empty_like(codes, dtype=torch.float32) for _ in range(2))
    _decode_kernel[_grid(codes)](codes.contiguous(), m, v, reach, len(codes), **_tile(codes))
    return m, v


def round_to_half(w: Tensor, random: Tensor) -> Tensor:
    rounded = torch.empty_like(w)
    _round_kernel[_grid(w)](w.contiguous(), _words(random), rounded, len(w), **_tile(w))
    return rounded


def _words(random: Tensor) -> Tensor:
    return (random - ((random >> 31) << 32)).int().contiguous()


def _rows(tensor: Tensor) -> int:
    return ROWS_ON_GPU if tensor.is_cuda else ROWS


def _grid(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(len(tensor), _rows(tensor)),)


def _tile(tensor: Tensor) -> dict[str, int]:
    columns = tensor.shape[1]
    return {"COLUMNS": columns, "LANES": triton.next_power_of_2(columns), "ROWS": _rows(tensor)}


@triton.jit
def _places(num_rows, COLUMNS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, LANES)[None, :]
    return row * COLUMNS + lane, (row < num_rows) & (lane < COLUMNS)


@triton.jit
def _encode_kernel(
    m, v, random, codes, reach, num_rows, COLUMNS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr
):
    at, used = _places(num_rows, COLUMNS, LANES, ROWS)
    words = codes_triton.encode_moments(
        tl.load(m + at, mask=used, other=0.0),
        tl.load(v + at, mask=used, other=0.0),
        reach,
        tl.load(random + at, mask=used, other=0).to(tl.uint32, bitcast=True),
        COLUMNS,
        LANES,
    )
    tl.store(codes + at, words, mask=used)


@triton.jit
def _decode_kernel(codes, m, v, reach, num_rows, COLUMNS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    at, used = _places(num_rows, COLUMNS, LANES, ROWS)
    first, second = codes_triton.decode_moments(tl.load(codes + at, mask=used, other=0), reach, COLUMNS, LANES)
    tl.store(m + at, first, mask=used)
    tl.store(v + at, second, mask=used)


@triton.jit
def _round_kernel(w, random, rounded, num_rows, COLUMNS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    at, used = _places(num_rows, COLUMNS, LANES, ROWS)
    bits = tl.load(random + at, mask=used, other=0).to(tl.uint32, bitcast=True)
    tl.store(rounded + at, codes_triton.round_to_half(tl.load(w + at, mask=used, other=0.0), bits), mask=used)
