"""Makes pictures of the present model, and says what is behind them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from configs import Config
from distributed.mesh import Ranks
from offload.culling.cameras import Cameras
from offload.models.contract import GaussianModel
from training.joint_viewing import draw_for_first
from training.modules import RunModules
from training.views import Backdrop, View, draw_together, own_cameras, own_views, render


class Drawing:
    """Draw what a run has trained so far; training is not disturbed."""

    def __init__(self, cfg: Config, modules: RunModules, device: torch.device, ranks: Ranks | None) -> None:
        """
        Args:
            cfg: Options.
            modules: Of which a sky is behind the Gaussians.
            device: Where views are rendered.
            ranks: That train together; None: this process alone.
        """
        self._cfg, self._modules, self._device, self._ranks = cfg, modules, device, ranks
        self._model: GaussianModel | None = None
        self._draw: Callable[[Cameras, bool], Tensor] | None = None

    def begin(self, model: GaussianModel, draw: Callable[[Cameras, bool], Tensor] | None) -> None:
        """Draw this model from now on.

        Args:
            model: The Gaussians that this process holds.
            draw: As `TrainingRun.steps` takes it.
        """
        self._model, self._draw = model, draw

    def draw(self, cameras: Cameras, *, depth: bool = False) -> Tensor:
        """Return the picture that one camera sees of the model.

        Where ranks train together all of them call it at once, each with the camera that it wants to see.

        Args:
            cameras: One.
            depth: Add a fourth channel, as `training.views.render`.

        Returns:
            [1, H, W, 3 or 4].
        """
        assert self._model is not None  # training has begun
        if self._draw is not None:
            return self._draw(cameras, depth)
        cfg, shown = self._cfg, self.shown_backgrounds(cameras)
        if self._ranks is not None:
            return draw_together(self._model, cameras, cfg, self._ranks, backgrounds=shown, depth=depth)
        rows = self._model.read_view(cameras)
        return render(rows, cameras, cfg, sh_degree=cfg.sh_degree, backgrounds=shown, depth=depth)[0]

    def draw_for_first(self, cameras: Cameras) -> Tensor | None:
        """Return the picture [1, H, W, 3] that the first rank's camera sees of all Gaussians; None at other ranks.

        All ranks call this at once.

        Args:
            cameras: One, the same at all ranks.

        Raises:
            torch.OutOfMemoryError: Some rank lacks the memory, as `training.joint_viewing.draw_for_first` says.
        """
        assert self._model is not None
        assert self._ranks is not None  # one process draws for itself
        if self._draw is not None:  # tile by tile, which all ranks do together: each draws the same picture
            picture = self._draw(cameras, False)
            return picture if self._ranks.leads else None
        shown = self.shown_backgrounds(cameras)
        return draw_for_first(self._model, cameras, self._cfg, self._ranks, backgrounds=shown)

    def backgrounds(self, view: View, step: int) -> Tensor | Backdrop | None:
        """Return what is behind the view of a training step, as `training.views.render` takes it."""
        if self._cfg.background != "random":
            return self.shown_backgrounds(own_cameras(view.cameras, self._ranks))
        # On the CPU, so that devices agree; from the step's number, so that a resumed run draws the same.
        colors = np.random.default_rng([self._cfg.seed, step]).random((len(view.cameras.Ks), 3), np.float32)
        return torch.from_numpy(colors[own_views(len(view.photos), self._ranks)]).to(self._device)

    def shown_backgrounds(self, cameras: Cameras) -> Tensor | Backdrop | None:
        """Return what is behind pictures that are shown or compared with photos; black where training has none."""
        if self._cfg.background == "white":
            return torch.ones(len(cameras.Ks), 3, device=self._device)
        return self._modules.backdrop()
