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
    return {"COLUMNS": tensor.shape[1], "ROWS": _rows(tensor)}


@triton.jit
def _places(num_rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Return where the first parts of a program's rows are, and which rows there are."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    return row * COLUMNS + tl.arange(0, 16)[None, :], row < num_rows


@triton.jit
def _encode_kernel(m, v, random, codes, reach, num_rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    at, used = _places(num_rows, COLUMNS, ROWS)
    m0, m1, m2 = _load_parts(m + at, used, COLUMNS)
    v0, v1, v2 = _load_parts(v + at, used, COLUMNS)
    random0, random1, random2 = _load_parts(random.to(tl.pointer_type(tl.uint32)) + at, used, COLUMNS)
    words0, words1, words2 = codes_triton.encode_moments(
        m0, m1, m2, v0, v1, v2, random0, random1, random2, reach, COLUMNS
    )  # fmt: skip
    for part in tl.static_range(COLUMNS // 16):
        tl.store(codes + at + part * 16, codes_triton.part_of(words0, words1, words2, part), mask=used)


@triton.jit
def _load_parts(rows, mask, COLUMNS: tl.constexpr):
    part0 = tl.load(rows, mask=mask, other=0)
    part1, part2 = part0, part0
    if COLUMNS > 16:
        part1 = tl.load(rows + 16, mask=mask, other=0)
    if COLUMNS > 32:
        part2 = tl.load(rows + 32, mask=mask, other=0)
    return part0, part1, part2


@triton.jit
def _decode_kernel(codes, m, v, reach, num_rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    at, used = _places(num_rows, COLUMNS, ROWS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale0, scale1, scale2 = codes_triton.load_scales(codes + row * COLUMNS, row < num_rows, COLUMNS)
    for part in tl.static_range(COLUMNS // 16):
        words = tl.load(codes + at + part * 16, mask=used, other=0)
        first, second = codes_triton.decode_moments(words, scale0, scale1, scale2, reach, part, COLUMNS)
        tl.store(m + at + part * 16, first, mask=used)
        tl.store(v + at + part * 16, second, mask=used)


@triton.jit
def _round_kernel(w, random, rounded, num_rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    at, used = _places(num_rows, COLUMNS, ROWS)
    for part in tl.static_range(COLUMNS // 16):
        bits = tl.load(random + at + part * 16, mask=used, other=0).to(tl.uint32, bitcast=True)
        values = tl.load(w + at + part * 16, mask=used, other=0.0)
        tl.store(rounded + at + part * 16, codes_triton.round_to_half(values, bits), mask=used)
