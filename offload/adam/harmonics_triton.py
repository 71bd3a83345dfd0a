"""`HarmonicsGradient` of `offload/adam/harmonics.py` for kernels in Triton, which inline it.

A kernel makes it in parts of 16 columns, as it works on them. A column is one colour of one harmonic, and is chosen by
few instructions, since these are what coding costs a GPU.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from offload.adam.harmonics import SHORTEST_SQUARED, HarmonicsGradient

_SHORTEST_SQUARED = tl.constexpr(SHORTEST_SQUARED)
NOTHING = None, 0, None, 0, 0.0, 0.0, 0.0  # in the place of `arguments_of`


def arguments_of(made: HarmonicsGradient) -> tuple[Any, ...]:
    """Return what `seen` takes of it; the values of a row lie side by side."""
    means, constant = made.means, made.constant
    return means, means.stride(0), constant, constant.stride(0), *made.position


@triton.jit
def seen(means, means_stride, constant, constant_stride, at_x, at_y, at_z, row, inside):
    """Return of rows [ROWS] the directions in which a camera has seen them, and the gradients of sh0: six [ROWS, 1].

    Args:
        means, means_stride, constant, constant_stride, at_x, at_y, at_z: As `arguments_of` gives them.
        row, inside: [ROWS], which rows, and which of them there are.
    """
    of_mean, of_constant = means + row.to(tl.int64) * means_stride, constant + row.to(tl.int64) * constant_stride
    x = tl.load(of_mean, mask=inside, other=0.0) - at_x
    y = tl.load(of_mean + 1, mask=inside, other=0.0) - at_y
    z = tl.load(of_mean + 2, mask=inside, other=0.0) - at_z
    inverse = 1.0 / tl.sqrt(tl.maximum(x * x + y * y + z * z, _SHORTEST_SQUARED))
    red = tl.load(of_constant, mask=inside, other=0.0)
    green = tl.load(of_constant + 1, mask=inside, other=0.0)
    blue = tl.load(of_constant + 2, mask=inside, other=0.0)
    # What is not drawn has no gradient, wherever it lies: its direction may be none.
    drawn = (red != 0.0) | (green != 0.0) | (blue != 0.0)
    x, y, z = tl.where(drawn, x * inverse, 0.0), tl.where(drawn, y * inverse, 0.0), tl.where(drawn, z * inverse, 0.0)
    return x[:, None], y[:, None], z[:, None], red[:, None], green[:, None], blue[:, None]


@triton.jit
def made_gradient(x, y, z, red, green, blue, FIRST: tl.constexpr, HARMONICS: tl.constexpr):
    """Return the columns FIRST ... FIRST + 15 of the gradient, [ROWS, 16].

    Args:
        x, y, z, red, green, blue: As `seen` gives them.
        FIRST: Of columns of harmonics without the constant one, which is before them: from -3 on.
        HARMONICS: How many, without the constant one, have a gradient.
    """
    lane = tl.arange(0, 16)[None, :]
    place = lane - 3 * _third(lane)
    if FIRST % 3 == 0:
        color = tl.where(place == 0, red, tl.where(place == 1, green, blue))
    elif FIRST % 3 == 1:
        color = tl.where(place == 0, green, tl.where(place == 1, blue, red))
    else:
        color = tl.where(place == 0, blue, tl.where(place == 1, red, green))
    return harmonics_part(x, y, z, FIRST, HARMONICS) * color


@triton.jit
def harmonics_part(x, y, z, FIRST: tl.constexpr, HARMONICS: tl.constexpr):
    """Return for the columns FIRST ... FIRST + 15 the harmonics over the constant one, [ROWS, 16].

    Args:
        x, y, z: Of unit vectors, [ROWS, 1].
        FIRST: Of columns of harmonics, three each, without the constant one, which is before them: from -3 on.
        HARMONICS: How many, without the constant one, are not zero.
    """
    FIRST_HARMONIC: tl.constexpr = FIRST // 3
    return _of_columns(
        _harmonic(x, y, z, FIRST_HARMONIC, HARMONICS),
        _harmonic(x, y, z, FIRST_HARMONIC + 1, HARMONICS),
        _harmonic(x, y, z, FIRST_HARMONIC + 2, HARMONICS),
        _harmonic(x, y, z, FIRST_HARMONIC + 3, HARMONICS),
        _harmonic(x, y, z, FIRST_HARMONIC + 4, HARMONICS),
        _harmonic(x, y, z, FIRST_HARMONIC + 5, HARMONICS),
        FIRST,
    )


@triton.jit
def slopes_part(x, y, z, FIRST: tl.constexpr, HARMONICS: tl.constexpr, AXIS: tl.constexpr):
    """Return the derivatives by x, y or z of what `harmonics_part` gives, as polynomials; AXIS is 0, 1 or 2."""
    FIRST_HARMONIC: tl.constexpr = FIRST // 3
    return _of_columns(
        _slope(x, y, z, FIRST_HARMONIC, HARMONICS, AXIS),
        _slope(x, y, z, FIRST_HARMONIC + 1, HARMONICS, AXIS),
        _slope(x, y, z, FIRST_HARMONIC + 2, HARMONICS, AXIS),
        _slope(x, y, z, FIRST_HARMONIC + 3, HARMONICS, AXIS),
        _slope(x, y, z, FIRST_HARMONIC + 4, HARMONICS, AXIS),
        _slope(x, y, z, FIRST_HARMONIC + 5, HARMONICS, AXIS),
        FIRST,
    )


@triton.jit
def _third(lane):
    """Divide numbers below 64 by three."""
    return (lane * 43) >> 7


@triton.jit
def _of_columns(number0, number1, number2, number3, number4, number5, FIRST: tl.constexpr):
    """Give each of 16 columns what its harmonic has, [ROWS, 1]: they have at most six, the first of which has begun."""
    lane = tl.arange(0, 16)[None, :]
    number = _third(lane + FIRST % 3)
    is_odd = (number & 1) != 0
    pair0 = tl.where(is_odd, number1, number0)
    pair1 = tl.where(is_odd, number3, number2)
    pair2 = tl.where(is_odd, number5, number4)
    return tl.where(number >= 4, pair2, tl.where(number >= 2, pair1, pair0))


@triton.jit
def _harmonic(x, y, z, NUMBER: tl.constexpr, HARMONICS: tl.constexpr):
    """Compute a column of `harmonics.relative_harmonics` from directions; zero where it has no gradient."""
    if NUMBER < 0:
        value = tl.zeros_like(x) + 1.0
    elif NUMBER >= HARMONICS:
        value = 0.0 * x
    elif NUMBER == 0:
        value = -1.7320508075688772 * y
    elif NUMBER == 1:
        value = 1.7320508075688772 * z
    elif NUMBER == 2:
        value = -1.7320508075688772 * x
    elif NUMBER == 3:
        value = 3.872983346207417 * x * y
    elif NUMBER == 4:
        value = -3.872983346207417 * y * z
    elif NUMBER == 5:
        value = 1.118033988749895 * (3.0 * z * z - 1.0)
    elif NUMBER == 6:
        value = -3.872983346207417 * x * z
    elif NUMBER == 7:
        value = 1.9364916731037085 * (x * x - y * y)
    elif NUMBER == 8:
        value = -2.091650066335189 * y * (3.0 * x * x - y * y)
    elif NUMBER == 9:
        value = 10.246950765959598 * x * y * z
    elif NUMBER == 10:
        value = -1.6201851746019651 * y * (5.0 * z * z - 1.0)
    elif NUMBER == 11:
        value = 1.3228756555322954 * z * (5.0 * z * z - 3.0)
    elif NUMBER == 12:
        value = -1.6201851746019651 * x * (5.0 * z * z - 1.0)
    elif NUMBER == 13:
        value = 5.123475382979799 * z * (x * x - y * y)
    else:
        value = -2.091650066335189 * x * (x * x - 3.0 * y * y)
    return value


@triton.jit
def _slope(x, y, z, NUMBER: tl.constexpr, HARMONICS: tl.constexpr, AXIS: tl.constexpr):
    """Compute the derivative of `_harmonic` by x, y or z."""
    value = 0.0 * x
    if NUMBER < HARMONICS:
        if AXIS == 0:
            value = _slope_x(x, y, z, NUMBER)
        elif AXIS == 1:
            value = _slope_y(x, y, z, NUMBER)
        else:
            value = _slope_z(x, y, z, NUMBER)
    return value


@triton.jit
def _slope_x(x, y, z, NUMBER: tl.constexpr):
    value = 0.0 * x
    if NUMBER == 2:
        value = value - 1.7320508075688772
    elif NUMBER == 3:
        value = 3.872983346207417 * y
    elif NUMBER == 6:
        value = -3.872983346207417 * z
    elif NUMBER == 7:
        value = 3.872983346207417 * x
    elif NUMBER == 8:
        value = -12.549900398011133 * x * y
    elif NUMBER == 9:
        value = 10.246950765959598 * y * z
    elif NUMBER == 12:
        value = -1.6201851746019651 * (5.0 * z * z - 1.0)
    elif NUMBER == 13:
        value = 10.246950765959598 * x * z
    elif NUMBER == 14:
        value = -6.274950199005566 * (x * x - y * y)
    return value


@triton.jit
def _slope_y(x, y, z, NUMBER: tl.constexpr):
    value = 0.0 * x
    if NUMBER == 0:
        value = value - 1.7320508075688772
    elif NUMBER == 3:
        value = 3.872983346207417 * x
    elif NUMBER == 4:
        value = -3.872983346207417 * z
    elif NUMBER == 7:
        value = -3.872983346207417 * y
    elif NUMBER == 8:
        value = -6.274950199005566 * (x * x - y * y)
    elif NUMBER == 9:
        value = 10.246950765959598 * x * z
    elif NUMBER == 10:
        value = -1.6201851746019651 * (5.0 * z * z - 1.0)
    elif NUMBER == 13:
        value = -10.246950765959598 * y * z
    elif NUMBER == 14:
        value = 12.549900398011133 * x * y
    return value


@triton.jit
def _slope_z(x, y, z, NUMBER: tl.constexpr):
    value = 0.0 * x
    if NUMBER == 1:
        value = value + 1.7320508075688772
    elif NUMBER == 4:
        value = -3.872983346207417 * y
    elif NUMBER == 5:
        value = 6.708203932499369 * z
    elif NUMBER == 6:
        value = -3.872983346207417 * x
    elif NUMBER == 9:
        value = 10.246950765959598 * x * y
    elif NUMBER == 10:
        value = -16.20185174601965 * y * z
    elif NUMBER == 11:
        value = 1.3228756555322954 * (15.0 * z * z - 3.0)
    elif NUMBER == 12:
        value = -16.20185174601965 * x * z
    elif NUMBER == 13:
        value = 5.123475382979799 * (x * x - y * y)
    return value
