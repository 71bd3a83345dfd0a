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
        FIRST: Of columns of the appearance; a multiple of 16.
        HARMONICS: How many, without the constant one, have a gradient.
    """
    lane = tl.arange(0, 16)[None, :]
    third = (lane * 43) >> 7  # lane // 3
    place = lane - 3 * third
    # 16 columns have at most six harmonics, of which the first one has begun before; their colours take turns.
    if FIRST % 3 == 0:
        number, color = third, tl.where(place == 0, red, tl.where(place == 1, green, blue))
    elif FIRST % 3 == 1:
        number, color = ((lane + 1) * 43) >> 7, tl.where(place == 0, green, tl.where(place == 1, blue, red))
    else:
        number, color = ((lane + 2) * 43) >> 7, tl.where(place == 0, blue, tl.where(place == 1, red, green))
    is_odd = (number & 1) != 0
    pair0 = tl.where(is_odd, _harmonic(x, y, z, FIRST // 3 + 1, HARMONICS), _harmonic(x, y, z, FIRST // 3, HARMONICS))
    pair1 = tl.where(
        is_odd, _harmonic(x, y, z, FIRST // 3 + 3, HARMONICS), _harmonic(x, y, z, FIRST // 3 + 2, HARMONICS)
    )
    pair2 = tl.where(
        is_odd, _harmonic(x, y, z, FIRST // 3 + 5, HARMONICS), _harmonic(x, y, z, FIRST // 3 + 4, HARMONICS)
    )
    return tl.where(number >= 4, pair2, tl.where(number >= 2, pair1, pair0)) * color


@triton.jit
def _harmonic(x, y, z, NUMBER: tl.constexpr, HARMONICS: tl.constexpr):
    """Compute a column of `harmonics.relative_harmonics` from directions; zero where it has no gradient."""
    if NUMBER >= HARMONICS:
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
