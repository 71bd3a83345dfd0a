"""A held-out photo against the model from where it fits best, so that a pose a little off does not count as an error.

What is off by half a pixel loses several dB of a sharp picture, and the pose of a photo that was not trained on is
known no better. As usual where poses are trained (BARF, arXiv 2104.06405), the camera is moved until the picture fits:
by direct image alignment (DVO, Kerl et al. 2013) with the depths that are drawn, a few Gauss-Newton steps of which each
needs one picture and no gradient of the renderer, so that every trainer can draw it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from modules.motions import corrections
from offload.culling.cameras import Cameras
from training.color_correction import color_corrected
from training.views import View

ROUNDS = 4  # from two pixels off, which take three
STRIP = 2**17  # pixels that are looked at together
DAMPING = 1e-3  # of the diagonal: a turn and a shift of the camera can look alike
SMALL = 0.02  # differences of colours below this count by their squares, larger ones less and less


def best_aligned(view: View, draw: Callable[[Cameras], Tensor], *, color_correct: bool = False) -> Tensor:
    """Return the picture [1, H, W, 3] of the pose near a view's that comes nearest to its photo.

    Args:
        view: One photo, with the pose to begin at.
        draw: Makes the picture [1, H, W, 4] of a camera, with depths. It is called ROUNDS + 1 times whatever is drawn,
            since ranks draw together.
        color_correct: Compare pictures whose colours are made like the photo's.
    """
    camtoworld, nowhere = torch.linalg.inv(view.cameras.viewmats.double()), torch.zeros(1, dtype=torch.float64)
    photo = view.images
    best, least = photo, torch.inf
    for turn in range(ROUNDS + 1):
        drawn = draw(replace(view.cameras, viewmats=torch.linalg.inv(camtoworld).float()))
        colors, depths = drawn[..., :3].clamp(0.0, 1.0), drawn[..., 3]
        if color_correct:
            colors = color_corrected(colors, photo, view.masks)
        error = _seen(view, (colors - photo).square()).mean().item()
        if turn == 0 or error < least:
            best, least = colors, error
        if turn < ROUNDS:
            motion = fitting_motion(colors[0], depths[0], view)
            camtoworld = camtoworld @ corrections(motion[None], nowhere)
    return best


def fitting_motion(colors: Tensor, depths: Tensor, view: View) -> Tensor:
    """Return by which turn and shift of its camera a picture comes nearest to its photo, as far as slopes tell.

    By a turn w and a shift t of the camera, in its axes, a point at x = X / Z, y = Y / Z and depth Z moves by

        (w_x x y - w_y (1 + x^2) + w_z y - (t_x - x t_z) / Z,   w_x (1 + y^2) - w_y x y - w_z x - (t_y - y t_z) / Z)

    times the focal lengths, in pixels. Slopes are the mean of the picture's and the photo's (Benhimane and Malis 2004).

    Args:
        colors: [H, W, 3] drawn.
        depths: [H, W] along the viewing direction, in world units; 0: nothing is there, which does not shift.
        view: With the photo.

    Returns:
        float64 [6] on the host: the turn in radians, and the shift in world units; zeros where nothing tells.
    """
    photo, K = view.images[0], view.cameras.Ks[0].double()
    height, width, _ = photo.shape
    left, right = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    rows, columns = torch.arange(height, device=colors.device), torch.arange(width, device=colors.device)
    (fx, fy), (cx, cy) = K.diagonal()[:2].tolist(), K[:2, 2].tolist()
    slope_y, slope_x = torch.gradient((colors + photo) / 2, dim=(0, 1))  # [H, W, 3] a pixel
    for strip in rows.split(max(STRIP // width, 1)):
        x, y = ((columns + 0.5 - cx) / fx)[None, :, None], ((strip + 0.5 - cy) / fy)[:, None, None]
        inverse = torch.where(depths[strip] > 0, 1 / depths[strip], 0.0)[..., None]  # [h, w, 1]
        x, y = x.expand_as(inverse), y.expand_as(inverse)
        nothing = torch.zeros_like(x)
        moved_x = torch.cat([x * y, -(1 + x * x), y, -inverse, nothing, x * inverse], dim=-1)  # [h, w, 6]
        moved_y = torch.cat([1 + y * y, -x * y, -x, nothing, -inverse, y * inverse], dim=-1)
        changes = (
            fx * slope_x[strip][..., None] * moved_x[:, :, None] + fy * slope_y[strip][..., None] * moved_y[:, :, None]
        )
        missing = photo[strip] - colors[strip]  # [h, w, 3]
        weights = 1 / missing.abs().clamp(min=SMALL)
        if view.masks is not None:
            weights = weights * view.masks[0, strip, :, None]
        changes, missing = changes.flatten(0, 2).double(), missing.flatten().double()
        weighted = weights.flatten().double()[:, None] * changes  # [3 h w, 6]
        left += (weighted.T @ changes).cpu()
        right -= (weighted.T @ missing).cpu()
    left += torch.diag(DAMPING * left.diagonal() + torch.finfo(torch.float32).tiny)
    if not left.isfinite().all():
        return torch.zeros(6, dtype=torch.float64)
    return torch.linalg.solve(left, right)  # on the host: a GPU's solvers take memory and keep it


def _seen(view: View, picture: Tensor) -> Tensor:
    """Return the values of a picture [1, H, W, 3] where the photo is not hidden."""
    return picture if view.masks is None else picture[view.masks]
