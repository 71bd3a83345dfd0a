"""The Gaussians of GPU-only training: parameters and Adam moments of all of them on one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from offload.models.named_rows import NamedRows

SH_C0 = 0.28209479177387814  # Y_0^0, the constant spherical harmonic


# Every tensor has N rows, in the parameterization that 3DGS stores: log scales, logit opacities,
# quaternions (w x y z) of any length. sh0 and shN are [N, 1, 3] and [N, K - 1, 3].
PARAMETER_NAMES = ("means", "scales", "quats", "opacities", "sh0", "shN")


def initial_gaussians(
    points: np.ndarray,
    points_rgb: np.ndarray,
    *,
    sh_degree: int,
    init_opacity: float,
    init_scale: float,
    seed: int,
) -> dict[str, Tensor]:
    """Return one Gaussian per point, as 3DGS starts: isotropic, as large as the point's neighbourhood.

    Args:
        points: [N, 3] positions in world units.
        points_rgb: [N, 3] uint8 colours.
        sh_degree: Highest degree of the spherical harmonics that will be trained.
        init_opacity: Opacity of every Gaussian, in (0, 1).
        init_scale: Factor on the scales.
        seed: Of the random rotations.

    Returns:
        The six parameter tensors on the CPU, float32, N rows each.
    """
    num_points = len(points)
    generator = torch.Generator().manual_seed(seed)
    distances = neighbour_distances(points)  # [N]
    sh0 = (torch.from_numpy(points_rgb).float() / 255.0 - 0.5) / SH_C0  # [N, 3]
    return {
        "means": torch.from_numpy(points).float().clone(),  # [N, 3]
        "scales": torch.log(torch.from_numpy(distances) * init_scale)[:, None].repeat(1, 3),  # [N, 3]
        "quats": torch.rand(num_points, 4, generator=generator),  # [N, 4]
        "opacities": torch.logit(torch.full((num_points,), init_opacity)),  # [N]
        "sh0": sh0[:, None, :].contiguous(),  # [N, 1, 3]
        "shN": torch.zeros(num_points, (sh_degree + 1) ** 2 - 1, 3),  # [N, K - 1, 3]
    }


def neighbour_distances(points: np.ndarray) -> np.ndarray:
    """Return the root mean squared distance to the 3 nearest other points, as 3DGS sizes its first Gaussians.

    Args:
        points: [N, 3] positions in world units.

    Returns:
        [N] float32 distances, never below 1e-4 of the median one, so that repeated points have a size.
    """
    num_neighbours = min(3, len(points) - 1)
    if num_neighbours == 0:
        return np.ones(len(points), np.float32)
    # The nearest point found is the point itself (or its double, at the same distance 0).
    distances, _ = cKDTree(points).query(points, k=num_neighbours + 1, workers=-1)  # [N, 4]
    rms = np.sqrt(np.mean(distances[:, 1:] ** 2, axis=1))  # [N]
    typical = np.median(rms)
    return np.maximum(rms, 1e-4 * typical if typical > 0 else 1.0).astype(np.float32)


def activate(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `rendering.rasterize`'s arguments from stored parameters; differentiable.

    Args:
        parameters: The six tensors of `initial_gaussians`, N rows each; or `colors` [N, K, 3] in place of sh0 and shN,
            where they lie side by side. `NamedRows` may have activated them already.

    Returns:
        means [N, 3], quats [N, 4], scales [N, 3], opacities [N] and colors (SH coefficients): one tensor or, since a
        copy of them would be the largest tensor of a view, the two.
    """
    colors = parameters["colors"] if "colors" in parameters else (parameters["sh0"], parameters["shN"])
    arguments = {"means": parameters["means"], "quats": parameters["quats"], "colors": colors}
    if isinstance(parameters, NamedRows) and parameters.activated:
        return {**arguments, **parameters.activated}
    scales, opacities = torch.exp(parameters["scales"]), torch.sigmoid(parameters["opacities"])
    return {**arguments, "scales": scales, "opacities": opacities}
