"""Lets ranks that train together show their model: the first one has the page, and the others draw with it.

Whether anybody looks is agreed on around every step, with what is agreed on there anyway (`training.joint_run`). Only
where somebody does, the ranks stop after the step: the first one calls the others for each picture that is due, and in
the end lets them go on. Each rank reads and projects its own Gaussians; what the camera sees of them goes to the first
rank, which alone blends it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from configs import Config
from distributed.exchange import PAIR_COLUMNS, PairExchange
from distributed.mesh import Ranks
from distributed.together import failing_together
from offload.culling.cameras import Cameras
from offload.models.contract import GaussianModel
from rendering.rasterize import blend_pairs, project_pairs
from training.views import Backdrop, before_backdrop, projected_by

if TYPE_CHECKING:
    from training.run import TrainingRun


@torch.no_grad()
def draw_for_first(
    model: GaussianModel,
    cameras: Cameras,
    cfg: Config,
    ranks: Ranks,
    *,
    backgrounds: Tensor | Backdrop | None = None,
) -> Tensor | None:
    """Return the picture [1, H, W, 3] that a camera sees of the Gaussians of all ranks; None but at the first.

    All ranks call this at once.

    Args:
        model: The Gaussians that this rank holds.
        cameras: One, the same at all ranks.
        cfg: Options.
        ranks: That hold the Gaussians.
        backgrounds: What is behind them, as `training.views.render` takes it.

    Raises:
        torch.OutOfMemoryError: Some rank lacks the memory. Those that raise it stand alike: the ranks can go on.
    """
    with failing_together(ranks, torch.OutOfMemoryError):
        rows = model.read_view(cameras)
        pairs, features = project_pairs(**projected_by(rows, cameras, sh_degree=cfg.sh_degree))
        del rows
    (total,) = ranks.sums([len(features)])
    with failing_together(ranks, torch.OutOfMemoryError):
        _find_room(features, len(features), total if ranks.leads else 0)
    pairs, features = PairExchange(ranks, 1)(pairs, features)  # of the only camera, so the first rank gets all
    if not ranks.leads:
        return None
    colors, alphas, _ = blend_pairs(
        pairs,
        features,
        1,
        cameras.width,
        cameras.height,
        backgrounds=None if callable(backgrounds) else backgrounds,
    )
    return before_backdrop(colors, alphas, backgrounds, cameras, None) if callable(backgrounds) else colors


def _find_room(features: Tensor, num_sent: int, num_received: int) -> None:
    """Take the memory of an exchange and give it back, before others wait for a rank that has too little.

    Args:
        features: [num_sent, D] of the pairs.
        num_sent: How many pairs this rank sends.
        num_received: How many it receives; they lie there twice.
    """
    width = features.shape[1] + PAIR_COLUMNS
    _ = [features.new_empty(count, width) for count in (num_sent, num_received, num_received)]


@dataclass(frozen=True)
class _Call:
    """Hold what the first rank asks of the others: to draw a camera, to wait where there is none, or to go on."""

    cameras: Cameras | None = None
    is_last: bool = False


class FirstRank:
    """Have the others draw with the first rank, which has the page; as a context manager let them go on in the end."""

    def __init__(self, run: TrainingRun, ranks: Ranks) -> None:
        """
        Args:
            run: Whose model is shown.
            ranks: The others wait in `help_first`.
        """
        self._run, self._ranks = run, ranks

    def draw(self, cameras: Cameras) -> Tensor:
        """Return the picture [1, H, W, 3] that one camera sees of the Gaussians of all ranks."""
        self._ranks.broadcast(_Call(cameras))
        picture = self._run.drawing.draw_for_first(cameras)
        assert picture is not None  # this is the first rank
        return picture

    def is_interrupted(self) -> bool:
        """Return whether any rank has been asked to stop; asked while training pauses, it has the others wait on."""
        self._ranks.broadcast(_Call())
        return self._ranks.any(self._run.is_interrupted)

    def __enter__(self) -> FirstRank:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:  # after an error ranks end together
            self._ranks.broadcast(_Call(is_last=True))


class OtherRank:
    """Watch a run at a rank that has no page: draw with the first one where somebody looks."""

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Do what the first rank asks for, until it goes on; nothing where nobody looks."""
        if run.ranks is not None and run.agreed.is_watched:
            help_first(run, run.ranks)


def help_first(run: TrainingRun, ranks: Ranks) -> None:
    """Draw what the first rank asks for, until it lets this one go on."""
    while not (call := ranks.broadcast(_Call())).is_last:
        if call.cameras is None:
            ranks.any(run.is_interrupted)
            continue
        with suppress(torch.OutOfMemoryError):  # which the first one has as well, or has not come to
            run.drawing.draw_for_first(call.cameras)
