"""Notices a run that draws nothing, or nothing better than an empty picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from rendering.losses import count_windows, photometric_sum
from rendering.ssim import WINDOW_SIZE
from training.reporting import is_looked_at
from training.views import own_cameras

if TYPE_CHECKING:
    from training.run import TrainingRun

FIRST_LOOK, LAST_LOOK = 101, 301  # steps: the first tells whether anything is drawn, the last whether it is of use
FEWEST_STEPS = 21  # of a shorter run nothing can be said
RECENT = 10  # losses, of views in their order, of which the mean counts in the end
SAME = 1e-5  # relative: two sums of the same numbers
BARELY_LESS = 0.97  # of an empty picture's loss: a dot in some views makes a little less of it
DARK = 1e-3  # a loss of the empty picture below this leaves nothing to learn
STRIP_ROWS = 512  # of a picture at a time, so that large ones take little memory
OVERLAP = WINDOW_SIZE - 1  # rows of a strip that the next one has too, for windows that begin in it


@torch.no_grad()
def blank_loss(images: Tensor, ssim_lambda: float, backgrounds: Tensor | None, masks: Tensor | None) -> Tensor:
    """Return the photometric loss of pictures that show their background alone.

    Args:
        images: [C, H, W, 3] photos.
        ssim_lambda: Share of the SSIM term, as for `rendering.losses.photometric_loss`.
        backgrounds: [C, 3], or [C, H, W, 3] of each pixel; None is black.
        masks: [C, H, W] bool; None: everything counts.

    Returns:
        Scalar.
    """
    loss = torch.full((), ssim_lambda, device=images.device)
    windows = count_windows(images)
    for top in range(0, images.shape[1], STRIP_ROWS):
        rows = slice(top, top + STRIP_ROWS + OVERLAP)
        target = images[:, rows]
        if backgrounds is None:
            blank = torch.zeros_like(target)
        else:
            blank = backgrounds[:, rows] if backgrounds.ndim == 4 else backgrounds[:, None, None].expand_as(target)
        if masks is not None:
            target, blank = (torch.where(masks[:, rows, :, None], picture, 0.0) for picture in (target, blank))
        difference = (target[:, :STRIP_ROWS] - blank[:, :STRIP_ROWS]).abs().sum()
        loss += (1 - ssim_lambda) * difference / images.numel()
        if target.shape[1] > OVERLAP:  # each window once: by the strip in which its first row lies
            loss -= photometric_sum(blank.contiguous(), target.contiguous(), 0.0, ssim_lambda / windows)
    return loss


class BlankPictures:
    """Warn once, in the first hundreds of steps, of a run whose pictures are no better than empty ones."""

    def __init__(self) -> None:
        self._losses: list[tuple[float, float]] = []  # of the rendering, of an empty picture
        self._is_told = False

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Look at the loss where the bar reads it, too, so that nothing waits for the device once more."""
        is_last = steps_done == run.cfg.max_steps
        if self._is_told or steps_done > LAST_LOOK or run.steps_of_this_run < steps_done or run.view is None:
            return
        if not is_looked_at(steps_done, run.cfg.max_steps):
            return
        behind = run.backgrounds(run.view)
        if callable(behind):
            behind = behind(own_cameras(run.view.cameras, run.ranks), None)
        blank = blank_loss(run.view.images, run.cfg.ssim_lambda, behind, run.view.masks)
        self._losses.append((loss.item(), blank.item()))
        first_look = steps_done == FIRST_LOOK or (is_last and steps_done >= FEWEST_STEPS)
        if first_look and all(abs(drawn - empty) <= SAME * empty for drawn, empty in self._losses):
            self._tell(
                f"nothing has been drawn in {steps_done} steps: the Gaussians lie outside all views, or planes cut "
                "them off. Look whether points and cameras are of one world, and at --near_plane and --far_plane."
            )
        if steps_done == LAST_LOOK or (is_last and steps_done >= FIRST_LOOK):
            drawn, empty = (sum(values) / RECENT for values in zip(*self._losses[-RECENT:], strict=True))
            if drawn >= BARELY_LESS * empty and empty > DARK:
                how = "hardly" if drawn < empty else "not"
                self._tell(
                    f"after {steps_done} steps the loss, {drawn:.4f}, is {how} below that of an empty picture, "
                    f"{empty:.4f}, so nothing is learned. Look at the learning rates and --init_scale, and whether "
                    "points, cameras and pictures belong together."
                )

    def _tell(self, sentence: str) -> None:
        if not self._is_told:
            tqdm.write(f"Warning: {sentence}")
        self._is_told = True
