"""`offload/adam/codes.py` for kernels in Triton, which inline it.

They see whole rows, [ROWS, LANES], since a block's scale is the largest of its roots. LANES is a power of two, of which
a row uses the first COLUMNS; in the others moments are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offload.adam import codes
from offload.store.layout import HALF_MAX

_HALF_MAX = tl.constexpr(HALF_MAX)
_OCTAVE_STEPS, _STEP_UP = tl.constexpr(codes.OCTAVE_STEPS), tl.constexpr(codes.STEP_UP)
_LARGEST_ROOT, _LARGEST_RATIO = tl.constexpr(codes.LARGEST_ROOT), tl.constexpr(codes.LARGEST_RATIO)
_SMALLEST_SHARE = tl.constexpr(2.0 ** -(codes.LARGEST_ROOT // codes.OCTAVE_STEPS + 2))  # below that of the first code
_SECOND_HASH = tl.constexpr(codes.SECOND_HASH)


@triton.jit
def round_to_half(w, random):
    """Do as `codes.round_to_half`, with the random bits (uint32) themselves."""
    size = tl.abs(w)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 127 - 14)
    spacing = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
    over_spacing = ((254 - (exponent - 10)) << 23).to(tl.float32, bitcast=True)
    fraction = (random & 0x1FFF).to(tl.float32) * (1.0 / (1 << 13))
    rounded = tl.floor(size * over_spacing + fraction) * spacing
    rounded = tl.where(rounded > _HALF_MAX, _HALF_MAX, rounded)  # not `minimum`, which would hide what is not a number
    return tl.where(w.to(tl.int32, bitcast=True) < 0, -rounded, rounded)


@triton.jit
def encode_moments(m, v, reach, random, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Do as `codes.encode_moments`, with moments [ROWS, LANES] and random bits in uint32."""
    DEGREE: tl.constexpr = COLUMNS // 16
    VALUES: tl.constexpr = 3 * ((DEGREE + 1) * (DEGREE + 1) - 1)
    lane = tl.arange(0, LANES)[None, :]
    roots = tl.sqrt_rn(v)
    scale = tl.zeros_like(v)
    scale_codes = tl.zeros_like(v).to(tl.int32)
    for number in tl.static_range(DEGREE):
        block = _in_block(lane, number)
        largest = tl.max(tl.where(block, roots, 0.0), axis=1)  # [ROWS]
        bits = (largest.to(tl.int32, bitcast=True) + 0xFFFF) & -65536  # rounded upwards
        scale = tl.where(block, bits.to(tl.float32, bitcast=True)[:, None], scale)
        scale_codes = tl.where(lane == VALUES + number, (bits >> 16)[:, None], scale_codes)
    second = _encode_roots(roots, scale, (random >> 16).to(tl.float32) * (1.0 / (1 << 16)))
    root = scale * _relative_root(second)
    other = (random * tl.full([1], _SECOND_HASH, tl.uint32)) >> 16
    first = _encode_ratios(m, reach * root, other.to(tl.float32) * (1.0 / (1 << 16)))
    return tl.where(lane < VALUES, (second << 8) | first, scale_codes).to(tl.int16)


@triton.jit
def decode_moments(words, reach, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Do as `codes.decode_moments`, with codes int16 [ROWS, LANES]."""
    DEGREE: tl.constexpr = COLUMNS // 16
    VALUES: tl.constexpr = 3 * ((DEGREE + 1) * (DEGREE + 1) - 1)
    lane = tl.arange(0, LANES)[None, :]
    words = words.to(tl.int32) & 0xFFFF
    scale = tl.zeros_like(words).to(tl.float32)
    for number in tl.static_range(DEGREE):
        # The largest of one and zeros [ROWS]: the interpreter of Triton 3.2 makes 64 bits of a sum.
        bits = tl.max(tl.where(lane == VALUES + number, words, 0), axis=1) << 16
        scale = tl.where(_in_block(lane, number), bits.to(tl.float32, bitcast=True)[:, None], scale)
    root = scale * _relative_root(words >> 8)
    ratio = (words & 0x7F).to(tl.float32) / _LARGEST_RATIO
    m = ratio * ratio * (reach * root)
    return tl.where((words & 0x80) != 0, -m, m), root * root


@triton.jit
def _in_block(lane, number: tl.constexpr):
    """Tell which columns are those of the degree `number` + 1."""
    first: tl.constexpr = 3 * ((number + 1) * (number + 1) - 1)
    last: tl.constexpr = 3 * ((number + 2) * (number + 2) - 1)
    return (lane >= first) & (lane < last)


@triton.jit
def _relative_root(code):
    """Compute the root of a second moment's code over its scale."""
    root = tl.exp2((code - _LARGEST_ROOT).to(tl.float32) * (1.0 / _OCTAVE_STEPS))
    return tl.where(code > 0, root, 0.0)


@triton.jit
def _encode_roots(roots, scale, fraction):
    """Return k, with the second moment right on average."""
    share = tl.div_rn(roots, tl.where(scale > 0, scale, 1.0))  # 0 ... 1
    octaves = tl.log2(tl.maximum(share, _SMALLEST_SHARE))
    lower = tl.maximum(tl.floor(octaves * _OCTAVE_STEPS + _LARGEST_ROOT).to(tl.int32), 1)
    lower = tl.minimum(lower, _LARGEST_ROOT)
    over = tl.div_rn(share, _relative_root(lower))
    goes_up = fraction * _STEP_UP < over * over - 1
    return tl.where(share > 0, tl.minimum(lower + goes_up.to(tl.int32), _LARGEST_ROOT), 0)


@triton.jit
def _encode_ratios(m, largest, fraction):
    """Return sign and c, with the first moment right on average; c is zero where `largest` is."""
    share = tl.where(largest > 0, tl.div_rn(tl.abs(m), tl.where(largest > 0, largest, 1.0)), 0.0)
    share = tl.minimum(share, 1.0) * (_LARGEST_RATIO * _LARGEST_RATIO)
    lower = tl.floor(tl.sqrt_rn(share))
    goes_up = fraction * (2 * lower + 1) < share - lower * lower
    code = tl.minimum(lower.to(tl.int32) + goes_up.to(tl.int32), _LARGEST_RATIO)
    return code | tl.where(m.to(tl.int32, bitcast=True) < 0, 0x80, 0)
