"""Colours of a rendering made like those of its photo, so that another exposure does not count as an error.

And neither does what a photo could not hold: where it is clipped, any colour beyond that is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIPPED = 0.5 / 255  # so near to black or white a photo does not tell how dark or bright it was


def color_corrected(rendered: Tensor, photo: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return a rendering whose colours are transformed by the 3x4 matrix that brings them nearest to its photo.

    The matrix is that of least squares over the pixels where no channel of the photo is clipped; over all, where fewer
    than half are left. Metrics (cc_psnr, ...) count all pixels, as gsplat's do: where the photo is clipped, what comes
    out beyond is clamped to what the photo has, and what does not is wrong.

    Args:
        rendered: [1, H, W, 3] in [0, 1].
        photo: [1, H, W, 3] in [0, 1].
        mask: [1, H, W] bool, True where the photo is valid; None: everywhere.

    Returns:
        [1, H, W, 3], clamped to [0, 1].
    """
    # On the host: a GPU's solvers take memory and keep it.
    colors, wanted = rendered.cpu().double().reshape(-1, 3), photo.cpu().double().reshape(-1, 3)
    valid = torch.ones_like(colors[:, 0], dtype=torch.bool) if mask is None else mask.cpu().reshape(-1)
    unclipped = valid & (wanted > CLIPPED).all(dim=1) & (wanted < 1 - CLIPPED).all(dim=1)
    if 2 * unclipped.sum() >= valid.sum():
        valid = unclipped
    inputs = torch.cat([colors, torch.ones_like(colors[:, :1])], dim=1)  # [H W, 4]
    chosen = inputs * valid[:, None]
    # A little towards the identity, for pictures of fewer colours than a matrix has columns.
    ridge = 1e-6 * torch.eye(4, dtype=torch.float64) * valid.sum().clamp(min=1)
    identity = torch.eye(4, 3, dtype=torch.float64)
    matrix = torch.linalg.solve(chosen.T @ inputs + ridge, chosen.T @ wanted + ridge @ identity)  # [4, 3]
    return (inputs @ matrix).clamp(0.0, 1.0).to(rendered).view_as(rendered)


def clipped_as(photo: Tensor, colors: Tensor) -> Tensor:
    """Return colours that are the photo's where that is clipped and they are beyond: darker than black, or too bright.

    No gradient tells them to come back, as a clamp would not; where the photo is not clipped they are errors as ever.

    Args:
        photo: [C, h, w, 3] in [0, 1].
        colors: [C, h, w, 3], rendered.
    """
    is_right = ((photo > 1 - CLIPPED) & (colors > 1)) | ((photo < CLIPPED) & (colors < 0))
    return torch.where(is_right, photo, colors)
