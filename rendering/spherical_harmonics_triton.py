"""View-dependent colour from spherical harmonics on CUDA, read and differentiated where the coefficients lie.

A program handles ROWS pairs of camera and Gaussian at once, as a tile of ROWS x 64 of which 48 columns are the
coefficients of 16 bands by 3 channels, so that neighbouring threads read and write neighbouring floats.

Memory traffic per pair at degree 3: forward reads 192 bytes of coefficients, backward reads them again and writes as
many; 0.6 KB, or 0.2 ms for 1.4 million pairs at 4 TB/s. The basis is that of gsplat and 3DGS: real spherical
harmonics in Cartesian form (Sloan, Efficient Spherical Harmonic Evaluation, JCGT 2013).

The gradient of the coefficients is the largest tensor of the backward pass, and nothing else there needs it. So it is
made by a node of its own, which comes after those of all that was computed between `Harmonics(...)` and `colors(...)`:
autograd takes the youngest node that is ready. By then most of what they had saved is free. Where only band 0 asks for
a gradient it is made of that alone, and is no larger than colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
CHAINED = 1024  # pairs, by a program that chains them
CONSTANT = 0.28209479177387814  # Y_0
# A colour above the first is zero but for rounding, and is not cut: black points begin there, which would else get no
# gradient. It becomes the second, as what was cut is zero.
CUT_BELOW, LEAST = tl.constexpr(-(2.0**-22)), tl.constexpr(2.0**-100)


class Harmonics:
    """Hold coefficients of spherical harmonics; made before the projection, whose backward pass then comes first."""

    def __init__(self, sh_degree: int, coeffs: Tensor | tuple[Tensor, Tensor]) -> None:
        """
        Args:
            sh_degree: 0 to 3; coefficients of higher bands are not used.
            coeffs: [N, K, 3] with K >= (sh_degree + 1)^2; or band 0 [N, 1, 3] and the others [N, K - 1, 3].
        """
        sh0, shN = coeffs if isinstance(coeffs, tuple) else (coeffs, None)
        self._tensors = sh0.detach().contiguous(), None if shN is None else shN.detach().contiguous()
        self._bands = (sh_degree + 1) ** 2
        self._owed = _Owed()
        self._token = _Coefficients.apply(self._owed, self._bands, sh0, shN)

    def colors(self, means: Tensor, camera_positions: Tensor, camera_ids: Tensor, gaussian_ids: Tensor) -> Tensor:
        """Return colours [nnz, 3] of pairs of camera and Gaussian: 0.5 plus the harmonics, cut at zero as in 3DGS.

        Args:
            means: Gaussian centres [N, 3]. camera_positions: [C, 3].
            camera_ids, gaussian_ids: [nnz] int64.
        """
        views = (camera_positions.contiguous(), camera_ids, gaussian_ids)
        return _Colors.apply(self._token, self._owed, self._bands, means, *self._tensors, *views)


@dataclass
class _Owed:
    """Hold what `_Colors` leaves for `_Coefficients` in the backward pass."""

    v_colors: Tensor | None = None  # [nnz, 3], zero where colours were cut
    views: tuple[Tensor, ...] = ()  # means, camera_positions, camera_ids, gaussian_ids


class _Coefficients(torch.autograd.Function):
    """Gives a token without values, of which `_Colors` asks no gradient but that it has left what this one needs."""

    @staticmethod
    def forward(ctx, owed, bands, sh0, shN):
        ctx.owed, ctx.bands = owed, bands
        ctx.shapes = sh0.shape, None if shN is None else shN.shape
        return sh0.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        owed, (shape0, shapeN) = ctx.owed, ctx.shapes
        v_colors, (means, camera_positions, camera_ids, gaussian_ids) = owed.v_colors, owed.views
        owed.v_colors, owed.views = None, ()
        v_sh0 = means.new_zeros(shape0)
        v_shN = means.new_zeros(shapeN) if shapeN is not None and ctx.needs_input_grad[3] else None
        bands = ctx.bands if shapeN is None or v_shN is not None else 1
        one_camera = len(camera_positions) == 1
        if bands == 1 and one_camera:
            v_sh0[:, 0].index_copy_(0, gaussian_ids, v_colors.mul_(CONSTANT))
        elif len(gaussian_ids) and one_camera:
            _backward_coeffs[_grid(gaussian_ids)](
                means, camera_positions, camera_ids, gaussian_ids, v_colors, *_rows(v_sh0, v_shN),
                len(gaussian_ids), BANDS=bands, ROWS=ROWS,
            )  # fmt: skip
        elif len(gaussian_ids):
            _backward_chained_coeffs[_grid(means)](
                means, camera_positions, camera_ids, *_chains(gaussian_ids, len(means)), v_colors,
                *_rows(v_sh0, v_shN), len(means), BANDS=bands, ROWS=ROWS,
            )  # fmt: skip
        return None, None, v_sh0, v_shN


class _Colors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, owed, bands, means, sh0, shN, camera_positions, camera_ids, gaussian_ids):
        means = means.contiguous()
        colors = means.new_empty(len(gaussian_ids), 3)
        if len(gaussian_ids):
            _forward[_grid(gaussian_ids)](
                means, camera_positions, *_rows(sh0, shN), camera_ids, gaussian_ids, colors,
                len(gaussian_ids), BANDS=bands, ROWS=ROWS,
            )  # fmt: skip
        ctx.save_for_backward(means, camera_positions, sh0, shN, camera_ids, gaussian_ids, colors)
        ctx.owed, ctx.bands = owed, bands
        return colors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, v_colors):
        means, camera_positions, sh0, shN, camera_ids, gaussian_ids, colors = ctx.saved_tensors
        v_colors, v_means = torch.where(colors > 0, v_colors, 0), torch.zeros_like(means)
        v_positions = torch.zeros_like(camera_positions) if ctx.needs_input_grad[6] else None
        if len(gaussian_ids) and ctx.bands > 1:
            one_camera = len(camera_positions) == 1
            # Of several cameras each has its own sum, to which those of the means do not lead.
            by_pair = v_positions is not None and not one_camera
            found = means.new_empty(len(gaussian_ids), 3) if by_pair else v_means
            _backward_means[_grid(gaussian_ids)](
                means, camera_positions, *_rows(sh0, shN), camera_ids, gaussian_ids, v_colors, found,
                len(gaussian_ids), BANDS=ctx.bands, ONE_CAMERA=one_camera or by_pair, BY_PAIR=by_pair, ROWS=ROWS,
            )  # fmt: skip
            if v_positions is not None and by_pair:
                v_means.index_add_(0, gaussian_ids, found)
                v_positions.index_add_(0, camera_ids, found, alpha=-1)
            elif v_positions is not None:
                v_positions -= v_means.sum(dim=0)
        ctx.owed.v_colors, ctx.owed.views = v_colors, (means, camera_positions, camera_ids, gaussian_ids)
        return means.new_empty(0), None, None, v_means, None, None, v_positions, None, None


def _chains(gaussian_ids: Tensor, num_gaussians: int) -> tuple[Tensor, Tensor]:
    """Chain the pairs of each Gaussian, in any order.

    Args:
        gaussian_ids: [nnz], of the pairs.
        num_gaussians: N.

    Returns:
        The first pair of each Gaussian [N] int32, and the one behind each pair [nnz] int32; -1 where there is none.
    """
    first = torch.full((num_gaussians,), -1, dtype=torch.int32, device=gaussian_ids.device)
    following = torch.empty_like(gaussian_ids, dtype=torch.int32)
    _chain[(triton.cdiv(len(gaussian_ids), CHAINED),)](
        gaussian_ids, first, following, len(gaussian_ids), CHAINED=CHAINED
    )
    return first, following


def _grid(rows: Tensor) -> tuple[int]:
    return (triton.cdiv(len(rows), ROWS),)


def _rows(sh0: Tensor, shN: Tensor | None) -> tuple[Tensor, int, Tensor, int]:
    """Find where band 0 and the others lie: a tensor and the floats of one Gaussian in it, twice.

    Both lie in one tensor where shN is None.
    """
    if shN is None:
        rest = sh0.view(-1)[3:] if sh0.shape[1] > 1 else sh0
        return sh0, 3 * sh0.shape[1], rest, 3 * sh0.shape[1]
    return sh0, 3, shN, 3 * shN.shape[1]


@triton.jit
def _pairs(means, camera_positions, camera_ids, gaussian_ids, num_pairs, ROWS: tl.constexpr):
    """Return a program's pairs, all [ROWS, 1].

    They are their numbers and which of them there are, the Gaussians (int64), the unit vectors towards them, and one
    over their distance.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    valid = row < num_pairs
    gaussian = tl.load(gaussian_ids + row, mask=valid, other=0)
    camera = tl.load(camera_ids + row, mask=valid, other=0)
    x, y, z, inverse = _towards(means, gaussian, camera_positions, camera)
    return row, valid, gaussian, x, y, z, inverse


@triton.jit
def _towards(means, gaussian, camera_positions, camera):
    """Return the unit vectors from cameras towards Gaussians, and one over their distance; all [ROWS, 1]."""
    x = tl.load(means + gaussian * 3) - tl.load(camera_positions + camera * 3)
    y = tl.load(means + gaussian * 3 + 1) - tl.load(camera_positions + camera * 3 + 1)
    z = tl.load(means + gaussian * 3 + 2) - tl.load(camera_positions + camera * 3 + 2)
    inverse = 1.0 / tl.sqrt(tl.maximum(x * x + y * y + z * z, 1e-24))
    return x * inverse, y * inverse, z * inverse, inverse


@triton.jit
def _basis(x, y, z, band):
    """Compute Y_band(x, y, z); x, y, z [ROWS, 1], band [1, 64]."""
    xx, yy, zz = x * x, y * y, z * z
    b = tl.where(band == 0, 0.28209479177387814, 0.0 * x)
    b = tl.where(band == 1, -0.4886025119029199 * y, b)
    b = tl.where(band == 2, 0.4886025119029199 * z, b)
    b = tl.where(band == 3, -0.4886025119029199 * x, b)
    b = tl.where(band == 4, 1.0925484305920792 * x * y, b)
    b = tl.where(band == 5, -1.0925484305920792 * y * z, b)
    b = tl.where(band == 6, 0.31539156525252005 * (3.0 * zz - 1.0), b)
    b = tl.where(band == 7, -1.0925484305920792 * x * z, b)
    b = tl.where(band == 8, 0.5462742152960396 * (xx - yy), b)
    b = tl.where(band == 9, -0.5900435899266435 * y * (3.0 * xx - yy), b)
    b = tl.where(band == 10, 2.890611442640554 * x * y * z, b)
    b = tl.where(band == 11, -0.4570457994644658 * y * (5.0 * zz - 1.0), b)
    b = tl.where(band == 12, 0.3731763325901154 * z * (5.0 * zz - 3.0), b)
    b = tl.where(band == 13, -0.4570457994644658 * x * (5.0 * zz - 1.0), b)
    b = tl.where(band == 14, 1.445305721320277 * z * (xx - yy), b)
    return tl.where(band == 15, -0.5900435899266435 * x * (xx - 3.0 * yy), b)


@triton.jit
def _basis_gradient(x, y, z, band):
    """Compute the derivatives of the polynomials of `_basis` by x, y and z."""
    xx, yy, zz = x * x, y * y, z * z
    zero = 0.0 * x * band
    dx = tl.where(band == 3, -0.4886025119029199, zero)
    dy = tl.where(band == 1, -0.4886025119029199, zero)
    dz = tl.where(band == 2, 0.4886025119029199, zero)
    dx = tl.where(band == 4, 1.0925484305920792 * y, dx)
    dy = tl.where(band == 4, 1.0925484305920792 * x, dy)
    dy = tl.where(band == 5, -1.0925484305920792 * z, dy)
    dz = tl.where(band == 5, -1.0925484305920792 * y, dz)
    dz = tl.where(band == 6, 1.8923493915151202 * z, dz)
    dx = tl.where(band == 7, -1.0925484305920792 * z, dx)
    dz = tl.where(band == 7, -1.0925484305920792 * x, dz)
    dx = tl.where(band == 8, 1.0925484305920792 * x, dx)
    dy = tl.where(band == 8, -1.0925484305920792 * y, dy)
    dx = tl.where(band == 9, -3.540261539559861 * x * y, dx)
    dy = tl.where(band == 9, -1.7701307697799304 * (xx - yy), dy)
    dx = tl.where(band == 10, 2.890611442640554 * y * z, dx)
    dy = tl.where(band == 10, 2.890611442640554 * x * z, dy)
    dz = tl.where(band == 10, 2.890611442640554 * x * y, dz)
    dy = tl.where(band == 11, -0.4570457994644658 * (5.0 * zz - 1.0), dy)
    dz = tl.where(band == 11, -4.570457994644658 * y * z, dz)
    dz = tl.where(band == 12, 0.3731763325901154 * (15.0 * zz - 3.0), dz)
    dx = tl.where(band == 13, -0.4570457994644658 * (5.0 * zz - 1.0), dx)
    dz = tl.where(band == 13, -4.570457994644658 * x * z, dz)
    dx = tl.where(band == 14, 2.890611442640554 * x * z, dx)
    dy = tl.where(band == 14, -2.890611442640554 * y * z, dy)
    dz = tl.where(band == 14, 1.445305721320277 * (xx - yy), dz)
    dx = tl.where(band == 15, -1.7701307697799304 * (xx - yy), dx)
    dy = tl.where(band == 15, 3.540261539559861 * x * y, dy)
    return dx, dy, dz


@triton.jit
def _load_coeffs(sh0, stride0, shN, strideN, gaussian, column, used):
    """Load coefficients [ROWS, 64] of Gaussians [ROWS, 1]; column = 3 band + channel."""
    first = tl.load(sh0 + gaussian * stride0 + column, mask=used & (column < 3), other=0.0)
    others = tl.load(shN + gaussian * strideN + column - 3, mask=used & (column >= 3), other=0.0)
    return tl.where(column < 3, first, others)


@triton.jit
def _add(gradient, values, mask, ONE_CAMERA: tl.constexpr):
    """Add to gradients that begin as zeros."""
    if ONE_CAMERA:  # every Gaussian is in one pair at most
        tl.store(gradient, values, mask=mask)
    else:
        tl.atomic_add(gradient, values, mask=mask)


@triton.jit(do_not_specialize=["num_pairs"])  # or each new kind of number would compile it again
def _forward(
    means, camera_positions, sh0, stride0, shN, strideN, camera_ids, gaussian_ids, colors, num_pairs,
    BANDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, valid, gaussian, x, y, z, _ = _pairs(means, camera_positions, camera_ids, gaussian_ids, num_pairs, ROWS)
    column = tl.arange(0, 64)[None, :]
    band, channel = column // 3, column % 3
    coeffs = _load_coeffs(sh0, stride0, shN, strideN, gaussian, column, valid & (band < BANDS))
    terms = _basis(x, y, z, band) * coeffs  # [ROWS, 64]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    for c in tl.static_range(3):
        color = tl.sum(tl.where(channel == c, terms, 0.0), axis=1) + 0.5
        tl.store(colors + row * 3 + c, tl.where(color > CUT_BELOW, tl.maximum(color, LEAST), 0.0), mask=row < num_pairs)


@triton.jit(do_not_specialize=["num_pairs"])
def _backward_coeffs(
    means, camera_positions, camera_ids, gaussian_ids, v_colors, v_sh0, stride0, v_shN, strideN, num_pairs,
    BANDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, valid, gaussian, x, y, z, _ = _pairs(means, camera_positions, camera_ids, gaussian_ids, num_pairs, ROWS)
    column = tl.arange(0, 64)[None, :]
    used = valid & (column // 3 < BANDS)
    v_coeffs = _coeffs_gradient(v_colors, row, x, y, z, column, used)
    _store_coeffs(v_sh0, stride0, v_shN, strideN, gaussian, column, v_coeffs, used)


@triton.jit(do_not_specialize=["num_pairs"])
def _chain(gaussian_ids, first, following, num_pairs, CHAINED: tl.constexpr):
    pair = tl.program_id(0) * CHAINED + tl.arange(0, CHAINED)
    inside = pair < num_pairs
    gaussian = tl.load(gaussian_ids + pair, mask=inside, other=0)
    before = tl.atomic_xchg(first + gaussian, pair, mask=inside, sem="relaxed")
    tl.store(following + pair, before, mask=inside)


@triton.jit(do_not_specialize=["num_gaussians"])
def _backward_chained_coeffs(
    means, camera_positions, camera_ids, first, following, v_colors, v_sh0, stride0, v_shN, strideN, num_gaussians,
    BANDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum over the pairs of each Gaussian, each row being written once: 48 atomic additions a pair take four times as
    long.
    """
    gaussian = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = gaussian < num_gaussians
    column = tl.arange(0, 64)[None, :]
    v_coeffs = tl.zeros([ROWS, 64], v_sh0.dtype.element_ty)
    pair = tl.load(first + gaussian, mask=inside, other=-1)  # [ROWS, 1]
    used = (pair >= 0) & (column // 3 < BANDS)  # others are zero already
    row = tl.where(inside, gaussian, 0)
    while tl.max(pair) >= 0:
        there = pair >= 0
        camera = tl.load(camera_ids + pair, mask=there, other=0)
        x, y, z, _ = _towards(means, row, camera_positions, camera)
        v_coeffs += _coeffs_gradient(v_colors, pair, x, y, z, column, used & there)
        pair = tl.load(following + pair, mask=there, other=-1)
    _store_coeffs(v_sh0, stride0, v_shN, strideN, gaussian, column, v_coeffs, used)


@triton.jit
def _coeffs_gradient(v_colors, pair, x, y, z, column, used):
    """Return the gradient [ROWS, 64] of coefficients by pairs [ROWS, 1]; column = 3 band + channel."""
    return tl.load(v_colors + pair * 3 + column % 3, mask=used, other=0.0) * _basis(x, y, z, column // 3)


@triton.jit
def _store_coeffs(v_sh0, stride0, v_shN, strideN, gaussian, column, v_coeffs, used):
    tl.store(v_sh0 + gaussian * stride0 + column, v_coeffs, mask=used & (column < 3))
    tl.store(v_shN + gaussian * strideN + column - 3, v_coeffs, mask=used & (column >= 3))


@triton.jit(do_not_specialize=["num_pairs"])
def _backward_means(
    means, camera_positions, sh0, stride0, shN, strideN, camera_ids, gaussian_ids, v_colors, v_means, num_pairs,
    BANDS: tl.constexpr, ONE_CAMERA: tl.constexpr, BY_PAIR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, valid, gaussian, x, y, z, inverse = _pairs(means, camera_positions, camera_ids, gaussian_ids, num_pairs, ROWS)
    column = tl.arange(0, 64)[None, :]
    band, channel = column // 3, column % 3
    used = valid & (band < BANDS)
    coeffs = _load_coeffs(sh0, stride0, shN, strideN, gaussian, column, used)
    v_term = tl.load(v_colors + row * 3 + channel, mask=used, other=0.0) * coeffs  # [ROWS, 64]
    dx, dy, dz = _basis_gradient(x, y, z, band)
    v_x = tl.sum(v_term * dx, axis=1)[:, None]
    v_y = tl.sum(v_term * dy, axis=1)[:, None]
    v_z = tl.sum(v_term * dz, axis=1)[:, None]
    # Through d / |d|: what points along d is lost.
    along = v_x * x + v_y * y + v_z * z
    v_x, v_y, v_z = (v_x - along * x) * inverse, (v_y - along * y) * inverse, (v_z - along * z) * inverse
    to = v_means + (row if BY_PAIR else gaussian) * 3
    _add(to, v_x, valid, ONE_CAMERA)
    _add(to + 1, v_y, valid, ONE_CAMERA)
    _add(to + 2, v_z, valid, ONE_CAMERA)
