"""What the options train beside the Gaussians, and where it enters a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from configs import Config
from distributed.mesh import Ranks
from errors import InputError, format_bytes
from modules.contract import TrainedModule, Training
from modules.exposure import AffineExposure, BilateralGrid, Exposure, Place
from modules.sky import Sky
from offload.culling.cameras import Cameras
from offload.tiles.boxes import Tile
from rendering.region import Region
from training import schedules
from training.checkpoints import Checkpoint
from training.views import Backdrop, View, own_views

EXPOSURES: dict[str, type[AffineExposure] | type[BilateralGrid]] = {
    "affine": AffineExposure,
    "bilateral_grid": BilateralGrid,
}


class RunModules:
    """Hold the modules of a run; of a run without any, every method does nothing and costs nothing.

    Attributes:
        parts: The modules by the names that their state has in checkpoints.
    """

    def __init__(
        self,
        cfg: Config,
        photos: Sequence[str],
        train_ids: np.ndarray,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            cfg: Says which there are.
            photos: Names of all photos.
            train_ids: Numbers, int64, of those that are trained on.
            device: Where pictures are rendered.
            ranks: That train together, each with the same modules; None: there is this process only.
        """
        views_per_step = cfg.batch_size * (1 if ranks is None else ranks.size)
        training = Training(lambda step: schedules.decay(cfg, step), schedules.adam_betas(views_per_step), device)
        self._ranks = ranks
        self._background = cfg.background
        self.parts: dict[str, TrainedModule] = {}
        self._sky: Sky | None = None
        self._exposure: Exposure | None = None
        if cfg.background == "sky":
            self._sky = self.parts["sky"] = Sky(training)
        if cfg.exposure != "none" and not cfg.ckpt:  # an evaluation shows no training photos
            names = [photos[index] for index in train_ids]
            self._exposure = self.parts[cfg.exposure] = EXPOSURES[cfg.exposure](names, training)
            self._rows = torch.full((len(photos),), -1)  # of photos in it
            self._rows[torch.from_numpy(train_ids)] = torch.arange(len(names))
            taken = format_bytes(self.nbytes)
            print(f"--exposure {cfg.exposure}: {len(names)} training photos have their own, which takes {taken}.")

    @property
    def nbytes(self) -> int:
        """Return the bytes that the modules take of the device."""
        return sum(value.nbytes for module in self.parts.values() for value in module.buffers())

    def load_evaluated(self, checkpoint: Checkpoint) -> None:
        """Take what pictures show beside the Gaussians from the checkpoint that is evaluated.

        Raises:
            InputError: It was trained before another background.
        """
        has_sky = "sky/rows" in checkpoint.state
        if has_sky != (self._sky is not None):
            raise InputError(
                "The checkpoint of --ckpt holds a sky that its pictures need: give --background sky."
                if has_sky
                else "The checkpoint of --ckpt holds no sky: give the --background that it was trained with."
            )
        before = checkpoint.options.get("background", self._background)
        if {before, self._background} not in ({self._background}, {"black", "random"}):
            print(f"Warning: the checkpoint was trained with --background {before}, not {self._background}.")
        if self._sky is not None:
            _load(self._sky, state_of(checkpoint, "sky"))

    def begin_at(self, steps_done: int) -> None:
        """Let modules of which a checkpoint held no state begin anew after so many steps."""
        for name, module in self.parts.items():
            if module.steps_done != steps_done:
                module.begin_at(steps_done)
                print(f"The checkpoint holds nothing of {name}: it is trained from step {steps_done} on.")

    def begin_step(self, view: View) -> None:
        """Fetch what a view needs."""
        if self._sky is not None:
            self._sky.fetch(self._sky.row)
        if self._exposure is not None:
            assert view.image_ids is not None  # training views are photos of the scene
            self._exposure.fetch(self._rows[view.image_ids], own_views(len(view.images), self._ranks))

    def backdrop(self) -> Backdrop | None:
        """Return the sky, of which a step finds the gradient; None where there is none."""
        if self._sky is None:
            return None
        rows = self._sky.leaf() if self._sky.is_fetched else self._sky.values(self._sky.row)
        return partial(_sky_behind, self._sky, rows[0])

    def exposed(self, colors: Tensor, view: View, tile: Tile | None = None, halo: int = 0) -> Tensor:
        """Return rendered colours as the photos of a training view show them.

        Args:
            colors: [C, H, W, 3]; or [1, h, w, 3] of a tile with its halo.
            view: The photos.
            tile: None: all of the view.
            halo: Pixels around the tile.
        """
        if self._exposure is None:
            return colors
        rows, width, height = self._exposure.leaf(), view.cameras.width, view.cameras.height
        place = Place(0, 0, width, height)
        if tile is not None:
            rows = rows[tile.camera : tile.camera + 1]
            padded = tile.with_halo(halo, width, height)
            place = Place(padded.x, padded.y, width, height)
        return self._exposure(colors, rows, place)

    def gather(self) -> None:
        """Take in the gradients of a part of the view whose backward pass is complete."""
        for module in self.parts.values():
            module.gather()

    def update(self) -> None:
        """Apply one step of Adam to what the view needed; ranks call this at once, and all apply the same."""
        self.gather()
        if self._ranks is not None and self.parts:
            self._average_gradients(self._ranks)
        for module in self.parts.values():
            module.update()

    def _average_gradients(self, ranks: Ranks) -> None:
        """Give all ranks the mean of their gradients: the loss of a step is the mean of theirs."""
        gradients = [module.gradient for module in self.parts.values()]
        means = ranks.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def complete_step(self, steps_done: int) -> None:
        """Apply the step of a view after an error, where the Gaussians have taken theirs, so that both are saved alike.

        Args:
            steps_done: By the Gaussians.

        Raises:
            RuntimeError: Other ranks have gradients that belong to it, and are asked no more.
        """
        for module in self.parts.values():
            if module.is_fetched and module.steps_done < steps_done:
                if self._ranks is not None:
                    raise RuntimeError("the step had been applied in part")
                module.update()


def state_of(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """Return the tensors that a part has in a checkpoint, by its own names."""
    prefix = f"{part}/"
    return {key.removeprefix(prefix): value for key, value in checkpoint.state.items() if key.startswith(prefix)}


def sky_of(state: Mapping[str, Tensor], device: torch.device) -> Backdrop:
    """Return a sky that is trained no more.

    Args:
        state: Of the sky, in a checkpoint.
        device: Where pictures are rendered.

    Raises:
        InputError: It cannot be used.
    """
    sky = Sky(Training(lambda step: 0.0, (0.9, 0.999), device))
    _load(sky, state)
    return partial(_sky_behind, sky, sky.values(sky.row)[0])


def _load(sky: Sky, state: Mapping[str, Tensor]) -> None:
    try:
        sky.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError("The sky in the checkpoint cannot be used: choose another checkpoint.") from error


def _sky_behind(sky: Sky, coefficients: Tensor, cameras: Cameras, region: Region | None) -> Tensor:
    viewmats, Ks = (t.to(coefficients.device, non_blocking=True) for t in (cameras.viewmats, cameras.Ks))
    return sky(coefficients, viewmats, Ks, *(region or Region(0, 0, cameras.width, cameras.height)))
