"""Values in 16 bits and both Adam moments in 8 bits each: how the appearance is kept where a state is compact.

A parameter w is a float16. Its second moment is kept by its root, on a scale of sixteenths of an octave below the
largest root of its block, which is the coefficients of one degree of the spherical harmonics:

    sqrt(v) = S * 2^((k - 255) / 16),  k = 1 ... 255;   k = 0: v = 0

so 8 bits reach 16 octaves down. S is a bfloat16, rounded upwards. Adam divides by sqrt(v), so what is smaller than that
is kept as k = 1, never as zero. The first moment is kept as its ratio to that root, which Adam bounds (Cauchy-Schwarz,
`largest_step`): with r the bound and the sign s,

    m = s * (c / 127)^2 * r * sqrt(v),  c = 0 ... 127

whose error is a few hundredths of a step, however much the gradients of a block differ. Squares are finer near zero,
where most ratios are.

All three are rounded at random, up with the probability that makes them right on average, since a step changes the
second moment by a thousandth and a value by less than its last bit (stochastic rounding, Gupta et al., arXiv
1502.02551). What is random is `bfloat16.random_bits`: a hash of row, column and step.

Both codes of a value lie in one int16, the second moment's in its upper byte; the bit above c is the sign. The columns
after those of values hold the scales S of the blocks. So a row is as many columns of 16 bits of values as of moments.
`codes_triton.py` has the same for CUDA and `csrc/codes.h` for the CPU's threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.store.layout import HALF_MAX

OCTAVE_STEPS = 16  # codes of the root of the second moment in an octave
LARGEST_ROOT, LARGEST_RATIO = 255, 127  # codes
SECOND_HASH = 0x9E3779B1  # 2^32 over the golden ratio: makes other bits of random ones (Knuth, TAOCP 6.4)
# The roots of the codes over their scale, [256].
ROOTS = torch.exp2((torch.arange(256, dtype=torch.float64) - LARGEST_ROOT) / OCTAVE_STEPS).float()
ROOTS[0] = 0.0
# What a code's second moment grows by to the next one, over itself.
STEP_UP = 2 ** (2 / OCTAVE_STEPS) - 1


def degree_of(columns: int) -> int:
    """Return the degree of spherical harmonics of rows with so many columns; 1 where there are none, which are zero."""
    return columns // 16


def num_values(degree: int) -> int:
    """Count the values of a row of the appearance: all coefficients but the constant one, of three colours."""
    return 3 * ((degree + 1) ** 2 - 1)


def blocks_of(degree: int) -> list[slice]:
    """Return the columns of each block."""
    return [slice(num_values(d - 1), num_values(d)) for d in range(1, degree + 1)]


def random_fractions(random: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make numbers below 1 of random bits (int64, 32 of them): for values, first and second moments; float32."""
    other = (random * SECOND_HASH) & 0xFFFFFFFF
    return (random & 0x1FFF).float() / (1 << 13), (other >> 16).float() / (1 << 16), (random >> 16).float() / (1 << 16)


def round_to_half(w: Tensor, fraction: Tensor) -> Tensor:
    """Round values to what a float16 holds, upwards in size if `fraction` [M, columns] is more than what is lacking.

    Values beyond its range become the largest.
    """
    size = w.abs()
    exponent = ((size.view(torch.int32) >> 23) & 0xFF).clamp(min=127 - 14)  # of smaller values all bits are worth that
    spacing = ((exponent - 10) << 23).view(torch.float32)  # of float16
    over_spacing = ((254 - (exponent - 10)) << 23).view(torch.float32)
    # The product is exact, and so is the sum: 11 bits before the point and 13 behind it.
    rounded = torch.floor(size * over_spacing + fraction) * spacing
    return torch.copysign(rounded.clamp(max=HALF_MAX), w)


def encode_moments(m: Tensor, v: Tensor, reach: float, random: Tensor) -> Tensor:
    """Encode both moments.

    Args:
        m, v: float32 [M, columns], finite; columns without values are zero.
        reach: `largest_step` of Adam's betas, the bound of m / sqrt(v).
        random: int64 [M, columns], 32 random bits each.

    Returns:
        int16 [M, columns].

    Raises:
        ValueError: A moment is not finite. Kernels do not look: gradients that are not finite end the step before
            (`offload/adam/finite.py`).
    """
    if not (m.isfinite() & v.isfinite()).all():
        raise ValueError("moments that are not finite have no codes")
    degree = degree_of(m.shape[1])
    _, for_first, for_second = random_fractions(random)
    codes = torch.zeros_like(m, dtype=torch.int32)
    roots = v.sqrt()
    for number, block in enumerate(blocks_of(degree)):
        scale_bits = (roots[:, block].amax(1).view(torch.int32) + 0xFFFF) & -65536  # rounded upwards
        codes[:, num_values(degree) + number] = scale_bits >> 16
        scale = scale_bits.view(torch.float32)[:, None]  # [M, 1]
        second = _encode_roots(roots[:, block], scale, for_second[:, block])
        root = scale * ROOTS.to(m.device)[second]
        codes[:, block] = (second << 8) | _encode_ratios(m[:, block], reach * root, for_first[:, block])
    return codes.to(torch.int16)


def decode_moments(codes: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Decode both moments, float32 [M, columns], from int16 [M, columns]; columns without values are zero."""
    degree = degree_of(codes.shape[1])
    m, v = (torch.zeros(codes.shape, device=codes.device) for _ in range(2))
    words = codes.int() & 0xFFFF
    for number, block in enumerate(blocks_of(degree)):
        scale = (words[:, num_values(degree) + number] << 16).view(torch.float32)[:, None]  # [M, 1]
        root = scale * ROOTS.to(codes.device)[words[:, block] >> 8]
        ratio = (words[:, block] & 0x7F).float() / LARGEST_RATIO
        sign = 1 - ((words[:, block] >> 6) & 2).float()
        m[:, block] = sign * (ratio * ratio) * (reach * root)
        v[:, block] = root * root
    return m, v


def _encode_roots(roots: Tensor, scale: Tensor, fraction: Tensor) -> Tensor:
    """Return k, int32 [M, width], with the second moment right on average."""
    share = torch.where(scale > 0, roots / scale, 0)  # 0 ... 1
    lower = (torch.log2(share) * OCTAVE_STEPS + LARGEST_ROOT).floor().clamp(1, LARGEST_ROOT).int()
    over = share / ROOTS.to(roots.device)[lower]
    goes_up = fraction * STEP_UP < over * over - 1
    return torch.where(share > 0, (lower + goes_up).clamp(max=LARGEST_ROOT), 0)


def _encode_ratios(m: Tensor, largest: Tensor, fraction: Tensor) -> Tensor:
    """Return sign and c, int32 [M, width], with the first moment right on average; zero where `largest` is."""
    share = torch.where(largest > 0, m.abs() / largest, 0).clamp(max=1) * LARGEST_RATIO**2
    lower = share.sqrt().floor()
    goes_up = fraction * (2 * lower + 1) < share - lower * lower
    code = (lower.int() + goes_up).clamp(max=LARGEST_RATIO)
    return code | (torch.signbit(m).int() << 7)
