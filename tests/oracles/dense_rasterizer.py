"""An oracle for the rasterizer: every Gaussian at every pixel in plain torch, differentiated by autograd.

Written from the formulas, with neither tiles nor sorting networks nor a line shared with the code under test.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _rotations(quats: Tensor) -> Tensor:
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    # Rotation of the basis vectors by q v q*, column by column.
    columns = [
        torch.stack([w * w + x * x - y * y - z * z, 2 * (x * y + w * z), 2 * (x * z - w * y)], -1),
        torch.stack([2 * (x * y - w * z), w * w - x * x + y * y - z * z, 2 * (y * z + w * x)], -1),
        torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), w * w - x * x - y * y + z * z], -1),
    ]
    return torch.stack(columns, -1)


def _sh_colors(degree: int, directions: Tensor, coeffs: Tensor) -> Tensor:
    """Real spherical harmonics with the Condon-Shortley phase, degree by degree."""
    x, y, z = torch.nn.functional.normalize(directions, dim=-1).unbind(-1)
    pi = torch.pi
    basis = [torch.full_like(x, (1 / (4 * pi)) ** 0.5)]
    if degree >= 1:
        c = (3 / (4 * pi)) ** 0.5
        basis += [-c * y, c * z, -c * x]
    if degree >= 2:
        c = (15 / (4 * pi)) ** 0.5
        basis += [
            c * x * y,
            -c * y * z,
            (5 / (16 * pi)) ** 0.5 * (2 * z * z - x * x - y * y),
            -c * x * z,
            c / 2 * (x * x - y * y),
        ]
    if degree >= 3:
        c3, c2 = (35 / (32 * pi)) ** 0.5, (105 / (4 * pi)) ** 0.5
        c1, c0 = (21 / (32 * pi)) ** 0.5, (7 / (16 * pi)) ** 0.5
        basis += [
            -c3 * y * (3 * x * x - y * y),
            c2 * x * y * z,
            -c1 * y * (4 * z * z - x * x - y * y),
            c0 * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -c1 * x * (4 * z * z - x * x - y * y),
            c2 / 2 * z * (x * x - y * y),
            -c3 * x * (x * x - 3 * y * y),
        ]
    return torch.einsum("nk,nkc->nc", torch.stack(basis, -1), coeffs[:, : len(basis)])


def dense_rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float = 0.01,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    rasterize_mode: str = "classic",
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """render_colors [C, H, W, D], render_alphas [C, H, W, 1] and the visible ids [V] of each camera."""
    images, alphas, visible = [], [], []
    for camera in range(len(viewmats)):
        background = None if backgrounds is None else backgrounds[camera]
        image, alpha, ids = _render(
            means, quats, scales, opacities, colors, viewmats[camera], Ks[camera], width, height, near_plane,
            eps2d, sh_degree, background, render_mode, rasterize_mode == "antialiased",
        )  # fmt: skip
        images.append(image)
        alphas.append(alpha)
        visible.append(ids)
    return torch.stack(images), torch.stack(alphas), visible


def _render(
    means, quats, scales, opacities, colors, viewmat, K, width, height, near_plane, eps2d, sh_degree, background,
    render_mode, antialiased,
):  # fmt: skip
    W, t = viewmat[:3, :3], viewmat[:3, 3]
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    camera_space = means @ W.T + t
    in_front = torch.nonzero(camera_space[:, 2] >= near_plane).flatten()
    means, quats, scales, opacities, colors, camera_space = (
        v[in_front] for v in (means, quats, scales, opacities, colors, camera_space)
    )
    x, y, z = camera_space.unbind(-1)
    u, v = fx * x / z + cx, fy * y / z + cy

    # Jacobian of the projection at a direction cut 15 % of the image beyond its border.
    slope_x = torch.clamp(x / z, -cx / fx - 0.15 * width / fx, (width - cx) / fx + 0.15 * width / fx)
    slope_y = torch.clamp(y / z, -cy / fy - 0.15 * height / fy, (height - cy) / fy + 0.15 * height / fy)
    zero = torch.zeros_like(z)
    J = torch.stack(
        [torch.stack([fx / z, zero, -fx * slope_x / z], -1), torch.stack([zero, fy / z, -fy * slope_y / z], -1)], -2
    )
    R = _rotations(quats)
    world = R @ torch.diag_embed(scales**2) @ R.mT
    covariance = J @ W @ world @ W.T @ J.mT  # [n, 2, 2]
    blurred = covariance + eps2d * torch.eye(2, dtype=means.dtype)
    if antialiased:
        opacities = opacities * torch.sqrt((torch.det(covariance) / torch.det(blurred)).clamp(min=0))
    conic = torch.inverse(blurred)

    with torch.no_grad():
        extent = torch.sqrt(2 * torch.log(opacities * 255)).clamp(max=3.33)  # NaN below 1/255
        rx, ry = (torch.ceil(extent * torch.sqrt(blurred[:, i, i])) for i in (0, 1))
        seen = (u + rx > 0) & (u - rx < width) & (v + ry > 0) & (v - ry < height) & (opacities >= 1 / 255)
        seen = torch.nonzero(seen & ((rx > 0) | (ry > 0))).flatten()
        order = seen[torch.argsort(z[seen], stable=True)]

    if sh_degree is not None:
        position = torch.linalg.solve(W, -t)
        colors = torch.clamp_min(_sh_colors(sh_degree, means - position, colors) + 0.5, 0)
    if render_mode in ("D", "ED"):
        colors = z[:, None]
    elif render_mode in ("RGB+D", "RGB+ED"):
        colors = torch.cat([colors, z[:, None]], -1)
    if background is not None and render_mode != "RGB":
        background = torch.cat([background[: colors.shape[1] - 1], torch.zeros(1, dtype=means.dtype)])

    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([columns.flatten(), rows.flatten()], -1).to(means.dtype)  # [P, 2]
    delta = pixels - torch.stack([u, v], -1)[order, None]  # [V, P, 2]
    sigma = 0.5 * torch.einsum("vpi,vij,vpj->vp", delta, conic[order], delta)
    alpha = torch.clamp(opacities[order, None] * torch.exp(-sigma), max=0.999)
    alpha = torch.where(alpha >= 1 / 255, alpha, 0)
    # Once the transmittance would fall to 1e-4 nothing more is added: it never rises again.
    open_ = torch.cumprod(1 - alpha, 0) > 1e-4
    alpha = torch.where(open_, alpha, 0)
    after = torch.cumprod(1 - alpha, 0)
    before = torch.cat([torch.ones_like(after[:1]), after[:-1]])
    final = after[-1] if len(after) else torch.ones(len(pixels), dtype=means.dtype)
    image = torch.einsum("vp,vd->pd", alpha * before, colors[order])
    if background is not None:
        image = image + final[:, None] * background
    opacity = 1 - final[:, None]
    if render_mode in ("ED", "RGB+ED"):
        image = torch.cat([image[:, :-1], image[:, -1:] / opacity.clamp(min=1e-10)], -1)
    return image.reshape(height, width, -1), opacity.reshape(height, width, 1), in_front[seen]
