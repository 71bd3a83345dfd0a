"""Gaussians under a similarity, and their spherical harmonics: turned with them, and of another degree."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from rendering.harmonics import real_harmonics

_DIRECTIONS = 64  # of which the turned harmonics are fitted; a band has 7 at most


def moved(gaussians: dict[str, Tensor], transform: np.ndarray) -> dict[str, Tensor]:
    """Return Gaussians under a similarity [4, 4]: positions, sizes, rotations, and the harmonics turned with them.

    Args:
        gaussians: Some of the six stored parameters, N rows each.
        transform: The similarity.

    Returns:
        The same parameters.
    """
    scale = float(np.cbrt(np.linalg.det(transform[:3, :3])))
    turn = transform[:3, :3] / scale
    result = dict(gaussians)
    if "means" in gaussians:
        means = gaussians["means"].double().numpy() @ transform[:3, :3].T + transform[:3, 3]
        result["means"] = torch.from_numpy(means).float()
    if "scales" in gaussians:
        result["scales"] = gaussians["scales"] + float(np.log(scale))
    if "quats" in gaussians:  # [N, 4] w x y z
        x, y, z, w = Rotation.from_matrix(turn).as_quat()
        product = torch.tensor([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]], dtype=torch.float64)
        result["quats"] = (gaussians["quats"].double() @ product.T).float()
    if "shN" in gaussians:
        result["shN"] = _turned(gaussians["shN"], turn)
    return result


def _turned(shN: Tensor, turn: np.ndarray) -> Tensor:
    """Return harmonics [N, K - 1, 3] under a rotation [3, 3]."""
    result = shN.clone()
    degree = round((shN.shape[1] + 1) ** 0.5) - 1
    directions = np.random.default_rng(0).normal(size=(_DIRECTIONS, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # What was seen in direction d is now seen in turn @ d; each band of harmonics is turned into itself.
    before, after = _harmonics(directions, degree), _harmonics(directions @ turn.T, degree)
    for band in range(1, degree + 1):
        rows = slice(band**2 - 1, (band + 1) ** 2 - 1)  # of shN
        columns = slice(band**2, (band + 1) ** 2)
        matrix = torch.from_numpy(np.linalg.lstsq(after[:, columns], before[:, columns], rcond=None)[0])
        result[:, rows] = torch.einsum("ij,njc->nic", matrix.to(shN.dtype), shN[:, rows])
    return result


def _harmonics(directions: np.ndarray, degree: int) -> np.ndarray:
    """Return the real spherical harmonics [M, (degree + 1)^2] of unit directions [M, 3]."""
    return torch.stack(list(islice(real_harmonics(torch.from_numpy(directions)), (degree + 1) ** 2)), dim=1).numpy()


def with_degree(shN: Tensor, degree: int) -> Tensor:
    """Return coefficients [N, (degree + 1)^2 - 1, 3]: cut, or filled with zeros."""
    if shN.shape[1] + 1 == (degree + 1) ** 2:
        return shN
    result = torch.zeros(len(shN), (degree + 1) ** 2 - 1, 3)
    common = min(shN.shape[1], result.shape[1])
    result[:, :common] = shN[:, :common]
    return result
