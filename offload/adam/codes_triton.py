"""`offload/adam/codes.py` for kernels in Triton, which inline it.

A row comes in parts of 16 columns, tiles [ROWS, 16]: three of them, of which rows of fewer columns use the first one or
two. (Triton before 3.3 has no tuples.) Degrees cross the parts in one way, however many there are: the first columns of
part p, so many as `_border` says, are of the degree p + 1, and its others of the next degree, or, in the last part,
behind the values.

What coding costs a GPU are instructions, so here are few: no root or quotient of a value is rounded exactly, integers
become floats and back by their bits, a logarithm is a polynomial, and nothing rare takes a way of its own. A value that
all but equals a code may be taken for one just beyond it; the draw that follows then gives that code nevertheless.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offload.adam import codes
from offload.adam.deferral_triton import quotient
from offload.store.layout import HALF_MAX

PART = 16  # columns of a part

_PART = tl.constexpr(PART)
_HALF_MAX = tl.constexpr(HALF_MAX)
_SMALLEST_NORMAL_HALF = tl.constexpr(2.0**-14)
_OCTAVE_STEPS, _STEP_UP = tl.constexpr(codes.OCTAVE_STEPS), tl.constexpr(codes.STEP_UP)
_LARGEST_ROOT, _LARGEST_RATIO = tl.constexpr(codes.LARGEST_ROOT), tl.constexpr(codes.LARGEST_RATIO)
_SECOND_HASH = tl.constexpr(codes.SECOND_HASH)
_ONE = tl.constexpr(0x3F800000)  # its bits in float32
# An integer of up to 22 bits is shifted where it is the float32 of this more than itself, in whose lowest bits it is; a
# difference makes a float of it. A number that this is added to is rounded to an integer, and shifted.
_SHIFT, _SHIFT_BITS = tl.constexpr(1.5 * 2**23), tl.constexpr(0x4B400000)
# log2(1 + x) = x + x (c0 + c1 x + ... + c4 x^4), 0 <= x <= 1: fitted for the least largest error, 1.6e-5.
_LOG_0, _LOG_1 = tl.constexpr(0.44191704), tl.constexpr(-0.70909646)
_LOG_2, _LOG_3, _LOG_4 = tl.constexpr(0.41560609), tl.constexpr(-0.19357574), tl.constexpr(0.04514906)


@triton.jit
def round_to_half(w, random):
    """Do as `codes.round_to_half`, with the random bits (uint32) themselves."""
    size = tl.abs(w)
    size = tl.where(size > _HALF_MAX, _HALF_MAX, size)  # not `minimum`, which would hide what is not a number
    # Below the normal ones all halves are as far apart as here, and so are float32 from this one to its double.
    offset = tl.where(size < _SMALLEST_NORMAL_HALF, _SMALLEST_NORMAL_HALF, 0.0)
    bits = (size + offset).to(tl.int32, bitcast=True) + (random & 0x1FFF).to(tl.int32, bitcast=True)
    rounded = (bits & -0x2000).to(tl.float32, bitcast=True) - offset
    rounded = tl.where(size == size, rounded, size).to(tl.int32, bitcast=True)
    return (rounded | (w.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def encode_moments(
    m0, m1, m2, v0, v1, v2, random0, random1, random2, reach, COLUMNS: tl.constexpr
):  # fmt: skip
    """Do as `codes.encode_moments`, with moments and random bits (uint32) in parts; return parts of int16."""
    DEGREES: tl.constexpr = COLUMNS // _PART
    VALUES: tl.constexpr = 3 * ((DEGREES + 1) * (DEGREES + 1) - 1)
    lane = tl.arange(0, _PART)[None, :]
    behind = tl.zeros_like(v0).to(tl.int32)  # the codes of the scales, where they are in the last part
    before = tl.zeros_like(v0)  # second moments of the degree that are in the part before
    scale0, scale1, scale2 = 0.0, 0.0, 0.0  # [ROWS], 1 where there are no moments
    for part in tl.static_range(DEGREES):
        v = part_of(v0, v1, v2, part)
        of_degree = lane < _border(part)
        largest = tl.max(tl.maximum(before, tl.where(of_degree, v, 0.0)), axis=1)
        before = tl.where(of_degree, 0.0, v)
        some = largest > 0
        bits = (tl.sqrt_rn(tl.where(some, largest, 1.0)).to(tl.int32, bitcast=True) + 0xFFFF) & -65536  # upwards
        scale0, scale1, scale2 = with_part(scale0, scale1, scale2, bits.to(tl.float32, bitcast=True), part)
        code = tl.where(some, bits >> 16, 0)[:, None]
        behind = tl.where(lane == VALUES + part - (DEGREES - 1) * _PART, code, behind)
    words0, words1, words2 = 0, 0, 0
    for part in tl.static_range(DEGREES):
        m, v, random = part_of(m0, m1, m2, part), part_of(v0, v1, v2, part), part_of(random0, random1, random2, part)
        scale = _of_columns(scale0, scale1, scale2, lane, part, DEGREES)
        second = _encode_roots(quotient(tl.sqrt(v), scale), random)
        root = scale * _relative_root(second)
        other = random * tl.full([1], _SECOND_HASH, tl.uint32)
        second_bits = tl.where(v > 0, second.to(tl.int32, bitcast=True), 0)
        words = (second_bits << 8) + _encode_ratios(m, reach * root, other)
        if part == DEGREES - 1:
            words = tl.where(lane < _border(part), words, behind)
        words0, words1, words2 = with_part(words0, words1, words2, words.to(tl.int16), part)
    return words0, words1, words2


@triton.jit
def load_scales(codes, mask, COLUMNS: tl.constexpr):
    """Load the scale of each degree [ROWS] of rows whose codes begin at `codes` [ROWS]; zero where there is none."""
    DEGREES: tl.constexpr = COLUMNS // _PART
    VALUES: tl.constexpr = 3 * ((DEGREES + 1) * (DEGREES + 1) - 1)
    scale0, scale1, scale2 = 0.0, 0.0, 0.0
    for number in tl.static_range(DEGREES):
        bits = tl.load(codes + (VALUES + number), mask=mask, other=0).to(tl.int32) << 16
        scale0, scale1, scale2 = with_part(scale0, scale1, scale2, bits.to(tl.float32, bitcast=True), number)
    return scale0, scale1, scale2


@triton.jit
def decode_moments(words, scale0, scale1, scale2, reach, part: tl.constexpr, COLUMNS: tl.constexpr):
    """Do as `codes.decode_moments` for one part.

    Args:
        words: int16 [ROWS, 16].
        scale0, scale1, scale2: Of each degree, as `load_scales` gives them.
        reach: As there.
        part: Its number.
    """
    lane = tl.arange(0, _PART)[None, :]
    words = words.to(tl.int32) & 0xFFFF
    scale = _of_columns(scale0, scale1, scale2, lane, part, COLUMNS // _PART)
    if part == COLUMNS // _PART - 1:
        scale = tl.where(lane < _border(part), scale, 0.0)
    root = tl.where(words > 0xFF, scale * _relative_root(_shifted(words >> 8)), 0.0)
    ratio = (_shifted(words & 0x7F) - _SHIFT) / _LARGEST_RATIO
    m = ratio * ratio * (reach * root)
    return tl.where((words & 0x80) != 0, -m, m), root * root


@triton.jit
def part_of(first, second, third, part: tl.constexpr):
    """Return one of three."""
    if part == 0:
        chosen = first
    elif part == 1:
        chosen = second
    else:
        chosen = third
    return chosen


@triton.jit
def with_part(first, second, third, other, part: tl.constexpr):
    """Return three with another in the place of one."""
    if part == 0:
        first = other
    elif part == 1:
        second = other
    else:
        third = other
    return first, second, third


@triton.jit
def _border(part: tl.constexpr):
    """Count the columns of a part that are of the degree `part` + 1."""
    return 3 * ((part + 2) * (part + 2) - 1) - part * _PART


@triton.jit
def _of_columns(factor0, factor1, factor2, lane, part: tl.constexpr, DEGREES: tl.constexpr):
    """Give each column of a part the factor [ROWS] of its degree; those behind the values, that of the last degree."""
    factors = part_of(factor0, factor1, factor2, part)[:, None]
    if part < DEGREES - 1:
        factors = tl.where(lane < _border(part), factors, part_of(factor0, factor1, factor2, part + 1)[:, None])
    return factors


@triton.jit
def _shifted(number):
    """Shift an integer."""
    return (number | _SHIFT_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _upper_half(random):
    """Return the upper 16 random bits over 2^16, times 2^32."""
    return (random & tl.full([1], 0xFFFF0000, tl.uint32)).to(tl.float32)


@triton.jit
def _relative_root(code):
    """Compute the root of a second moment's code, 1 ... 255, shifted, over its scale."""
    return tl.exp2(code * (1.0 / _OCTAVE_STEPS) - (_SHIFT + _LARGEST_ROOT) / _OCTAVE_STEPS)


@triton.jit
def _encode_roots(share, random):
    """Return the code k, 1 ... 255, shifted, of roots over their scale, with the second moment right on average."""
    bits = share.to(tl.int32, bitcast=True)
    x = ((bits & 0x7FFFFF) | _ONE).to(tl.float32, bitcast=True) - 1.0
    bend = ((((x * _LOG_4 + _LOG_3) * x + _LOG_2) * x + _LOG_1) * x + _LOG_0) * x
    # The bits, as a number, follow log2 by straight lines; from these it is bent.
    steps = bits.to(tl.float32) * (_OCTAVE_STEPS / 2.0**23) + (_LARGEST_ROOT - 127 * _OCTAVE_STEPS - 0.5)
    steps = bend * _OCTAVE_STEPS + steps
    # The largest code is found from the one before, from which its share goes up for certain.
    lower = tl.minimum(tl.maximum(steps, 1.0), _LARGEST_ROOT - 1.0) + _SHIFT
    over = quotient(share, _relative_root(lower))
    goes_up = _upper_half(random) * (_STEP_UP / 2.0**32) < over * over - 1
    return tl.where(goes_up, lower + 1.0, lower)


@triton.jit
def _encode_ratios(m, largest, random):
    """Return sign and c, in the lowest 16 bits of a word, with the first moment right on average."""
    share = tl.minimum(quotient(tl.abs(m), largest), 1.0) * (_LARGEST_RATIO * _LARGEST_RATIO)
    lower = (tl.sqrt(share) - 0.5) + _SHIFT
    root = lower - _SHIFT
    goes_up = _upper_half(random) * (root * (2.0 / 2.0**32) + 1.0 / 2.0**32) < share - root * root
    code = lower.to(tl.int32, bitcast=True) + goes_up.to(tl.int32)
    return code | ((m.to(tl.int32, bitcast=True) >> 24) & 0x80)
