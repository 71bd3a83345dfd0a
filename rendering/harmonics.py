"""The real spherical harmonics of 3DGS, one by one, for what is not rendered by kernels.

The basis is that of gsplat and 3DGS, in Cartesian form (Sloan, Efficient Spherical Harmonic Evaluation, JCGT 2013).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def real_harmonics(directions: Tensor) -> Iterator[Tensor]:
    """Yield the 16 harmonics of unit vectors [..., 3], each [...], in 3DGS's order and signs; band b begins at b^2."""
    x, y, z = directions.unbind(dim=-1)
    yield torch.full_like(x, 0.28209479177387814)
    yield -0.4886025119029199 * y
    yield 0.4886025119029199 * z
    yield -0.4886025119029199 * x
    yield 1.0925484305920792 * x * y
    yield -1.0925484305920792 * y * z
    yield 0.31539156525252005 * (3.0 * z * z - 1.0)
    yield -1.0925484305920792 * x * z
    yield 0.5462742152960396 * (x * x - y * y)
    yield -0.5900435899266435 * y * (3.0 * x * x - y * y)
    yield 2.890611442640554 * x * y * z
    yield -0.4570457994644658 * y * (5.0 * z * z - 1.0)
    yield 0.3731763325901154 * z * (5.0 * z * z - 3.0)
    yield -0.4570457994644658 * x * (5.0 * z * z - 1.0)
    yield 1.445305721320277 * z * (x * x - y * y)
    yield -0.5900435899266435 * x * (x * x - 3.0 * y * y)
