"""Image quality on held-out views."""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distributed.mesh import Ranks
from distributed.together import failing_together
from offload.culling.cameras import Cameras
from training.color_correction import color_corrected
from training.pose_alignment import best_aligned
from training.views import View


def load_lpips(net: Literal["alex", "vgg"], device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the LPIPS metric, or None, with one warning, where its weights cannot be obtained.

    Args:
        net: "alex", or "vgg" with the input range of the 3DGS evaluation.
        device: Where it will run.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity  # here, since it takes a second

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds; a machine without network must not wait for ever
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, about the way torchmetrics asks for weights
            metric = LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=net == "alex")
        return metric.to(device).requires_grad_(False)
    except (ModuleNotFoundError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        print(f"Warning: LPIPS will be reported as missing, since its network cannot be loaded: {reason}")
        return None
    finally:
        socket.setdefaulttimeout(timeout)


@torch.no_grad()
def evaluate(
    views: Iterable[tuple[str | None, View]],
    draw: Callable[[Cameras], Tensor],
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    save_picture: Callable[[int, np.ndarray], None],
    device: torch.device,
    *,
    color_correct: bool = False,
    draw_with_depth: Callable[[Cameras], Tensor] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, object]:
    """Render views one by one and compare them with their photos.

    Args:
        views: Name and view, with one camera each; no name where it is drawn for other ranks' sake alone.
        draw: Makes the picture [1, H, W, 3] of one camera.
        lpips: Metric on [1, 3, H, W] pictures, or None.
        save_picture: Takes an index and [H, 2 W, 3] uint8, photo and rendering side by side.
        device: Where rendering runs.
        color_correct: Report the same of renderings whose colours are made like the photos' as well.
        draw_with_depth: As `draw`, with depths [1, H, W, 4]; where it is given, the same of the pose nearby that fits
            the photo best is reported as well.
        ranks: Each of which has its own views, `distributed.together.taken_in_turn`; None: this process has all.

    Returns:
        Means of psnr (dB), ssim, lpips (None where missing) and seconds_per_image, and `images` with the values of
        each, of all ranks; cc_psnr, cc_ssim and cc_lpips with corrected colours, and aligned_psnr, aligned_ssim and
        aligned_lpips from aligned poses, with corrected colours too where both are wanted. Pixels outside a view's
        mask count for nothing in PSNR, nor do windows around them in SSIM; for LPIPS, and for windows that reach them,
        they are black in both pictures. Views that are hidden entirely are left out.
    """
    images: dict[int, dict[str, Any]] = {}  # by the number of the view
    written: list[Future[None]] = []
    first, step = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    with ThreadPoolExecutor(max_workers=4) as writers:
        for index, (name, view) in zip(count(first, step), tqdm(views, desc="evaluate", unit="view", leave=False)):
            synchronize(device)
            begin = time.perf_counter()
            rendered = draw(view.cameras)  # also of what does not count: other ranks draw with this one
            synchronize(device)
            seconds = time.perf_counter() - begin
            if draw_with_depth is not None:
                aligned = best_aligned(view, draw_with_depth, color_correct=color_correct)
            if name is None or (view.masks is not None and not view.masks.any()):
                continue

            rendered = rendered.clamp(0.0, 1.0)
            found = _metrics(rendered, view, lpips)
            if color_correct:
                corrected = color_corrected(rendered, view.images, view.masks)
                found |= {f"cc_{key}": value for key, value in _metrics(corrected, view, lpips).items()}
            if draw_with_depth is not None:
                found |= {f"aligned_{key}": value for key, value in _metrics(aligned, view, lpips).items()}
            canvas = (torch.cat(_masked(view, view.images, rendered), dim=2)[0] * 255.0).round().byte().cpu().numpy()
            written.append(writers.submit(save_picture, index, canvas))
            images[index] = {"name": name, **found, "seconds": seconds}

    with failing_together(ranks):
        for picture in written:
            picture.result()  # raises what writing raised
    if ranks is not None:
        images = {index: image for of_rank in ranks.gather(images) for index, image in of_rank.items()}

    def mean(key: str) -> float:
        return float(np.mean([images[index][key] for index in sorted(images)]))

    means: dict[str, object] = {}
    kinds = ("", *(("cc_",) if color_correct else ()), *(("aligned_",) if draw_with_depth is not None else ()))
    for kind in kinds:
        means |= {f"{kind}psnr": mean(f"{kind}psnr"), f"{kind}ssim": mean(f"{kind}ssim")}
        means[f"{kind}lpips"] = None if lpips is None else mean(f"{kind}lpips")
    return {**means, "seconds_per_image": mean("seconds"), "images": [images[index] for index in sorted(images)]}


def _metrics(rendered: Tensor, view: View, lpips: Callable[[Tensor, Tensor], Tensor] | None) -> dict[str, float | None]:
    """Compare a rendering [1, H, W, 3] with its photo: psnr, ssim and lpips, as `evaluate` says."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    seen = ... if view.masks is None else view.masks
    psnr = peak_signal_noise_ratio(rendered[seen], view.images[seen], data_range=1.0)
    pictures = (picture.permute(0, 3, 1, 2) for picture in _masked(view, rendered, view.images))  # [1, 3, H, W]
    rendered, photo = pictures
    ssim, ssim_map = cast(
        tuple[Tensor, Tensor],
        structural_similarity_index_measure(rendered, photo, data_range=1.0, return_full_image=True),
    )
    if view.masks is not None:
        ssim = ssim_map.permute(0, 2, 3, 1)[view.masks].mean()  # from [1, 3, H, W]
    return {
        "psnr": psnr.item(),
        "ssim": ssim.item(),
        "lpips": None if lpips is None else lpips(rendered, photo).item(),
    }


def _masked(view: View, *pictures: Tensor) -> list[Tensor]:
    """Return pictures [1, H, W, 3] that are black where the view's photo is hidden."""
    if view.masks is None:
        return list(pictures)
    return [picture * view.masks[..., None] for picture in pictures]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
