"""Dense Adam on CUDA for tensors of which few rows have a gradient, in one pass over memory.

Reads and writes a parameter and two moments, 24 bytes per value: 1.2 ms for the 11 values of 18 million Gaussians at
4 TB/s. torch's Adam would need gradients of all rows, 4 bytes more per value to keep and 8 to clear and read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def adam_step(
    parameter: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ids: Tensor,
    gradients: Tensor,
    has_gradient: Tensor,
    *,
    betas: tuple[float, float],
    step_size: float,
    root_correction: float,
    eps: float,
) -> None:
    """One step of Adam in place.

    Args:
        parameter, exp_avg, exp_avg_sq: [N, ...] float32, contiguous.
        ids: [V] int64 rows that have a gradient, each once. gradients: [V, ...] of them.
        has_gradient: [N] uint8, 1 for these rows and 0 for the others.
        betas: Decay rates of the moments.
        step_size: Learning rate over 1 - b1^t. root_correction: sqrt(1 - b2^t).
        eps: Added to the square root of the corrected second moment.
    """
    if len(parameter) == 0:
        return
    width = parameter[0].numel()
    state = (parameter, exp_avg, exp_avg_sq)
    constants = (*betas, 1 - betas[0], 1 - betas[1], step_size, 1 / root_correction, eps)
    if len(ids):
        _rows_with_gradient[(triton.cdiv(gradients.numel(), BLOCK),)](
            *state, ids, gradients.contiguous(), gradients.numel(), *constants, WIDTH=width, BLOCK=BLOCK
        )
    _rows_without[(triton.cdiv(parameter.numel(), BLOCK),)](
        *state, has_gradient, parameter.numel(), *constants, WIDTH=width, BLOCK=BLOCK
    )


@triton.jit
def _update(w, m, v, step_size, inverse_root_correction, eps):
    return w - step_size * m / (tl.sqrt(v) * inverse_root_correction + eps)


@triton.jit(do_not_specialize=["num_values"])  # or each new kind of number would compile it again
def _rows_with_gradient(
    parameter, exp_avg, exp_avg_sq, ids, gradients, num_values,
    b1, b2, one_minus_b1, one_minus_b2, step_size, inverse_root_correction, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < num_values
    at = tl.load(ids + i // WIDTH, mask=valid, other=0) * WIDTH + i % WIDTH
    g = tl.load(gradients + i, mask=valid, other=0.0)
    m = b1 * tl.load(exp_avg + at, mask=valid, other=0.0) + one_minus_b1 * g
    v = b2 * tl.load(exp_avg_sq + at, mask=valid, other=0.0) + one_minus_b2 * g * g
    w = tl.load(parameter + at, mask=valid, other=0.0)
    tl.store(exp_avg + at, m, mask=valid)
    tl.store(exp_avg_sq + at, v, mask=valid)
    tl.store(parameter + at, _update(w, m, v, step_size, inverse_root_correction, eps), mask=valid)


@triton.jit(do_not_specialize=["num_values"])  # or each new kind of number would compile it again
def _rows_without(
    parameter, exp_avg, exp_avg_sq, has_gradient, num_values,
    b1, b2, one_minus_b1, one_minus_b2, step_size, inverse_root_correction, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    deferred = (i < num_values) & (tl.load(has_gradient + i // WIDTH, mask=i < num_values, other=1) == 0)
    m = b1 * tl.load(exp_avg + i, mask=deferred, other=0.0)
    v = b2 * tl.load(exp_avg_sq + i, mask=deferred, other=0.0)
    w = tl.load(parameter + i, mask=deferred, other=0.0)
    tl.store(exp_avg + i, m, mask=deferred)
    tl.store(exp_avg_sq + i, v, mask=deferred)
    tl.store(parameter + i, _update(w, m, v, step_size, inverse_root_correction, eps), mask=deferred)
