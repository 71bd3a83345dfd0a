"""What a training loop asks of a strategy, which decides how many Gaussians there are and where.

A training step with a strategy is

    rows = model.fetch(cameras)
    strays = strategy.strays(step, model, ids, rows)      what `prefetch` must know of rows that `before_update` moves
    ...                                                   rendering; `info` says which rows were drawn
    loss = strategy.regularized(loss, rows, info)
    loss.backward()
    strategy.before_update(step, rows, info, model, ids)  what moves rows at every step
    model.update()
    strategy.after_step(step, info, model, ids)           what adds, removes or relocates rows now and then

A strategy works through the verbs of `offload.models.contract.GaussianModel` alone, so that it runs wherever the
Gaussians lie, and decides by what is the same in all trainers: rows that were drawn, and not those that were fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from offload.models.contract import GaussianModel


class Strategy(Protocol):
    """Decide how many Gaussians there are and where; steps are counted from 0."""

    name: ClassVar[str]  # of its state in checkpoints
    moves_rows: ClassVar[bool]  # whether `before_update` moves any, for which it takes their geometry

    def changes_rows_after(self, step: int) -> bool:
        """Return whether rows may be added, removed or overwritten after this step."""

    def looks_at(self, step: int) -> bool:
        """Return whether it asks what the rendering of this step has drawn."""

    def heading(self, step: int, num_gaussians: int) -> int | None:
        """Return how many Gaussians growth is heading for after this step; None where nothing says."""

    def regularized(self, loss: Tensor, rows: Mapping[str, Tensor], info: Mapping[str, Any]) -> Tensor:
        """Return the loss of a step, or of a tile, with what the strategy adds to it.

        That does not depend on sh0 and shN, whose gradients a model may make of each other (`GaussianModel.fetch`).

        Args:
            loss: Scalar.
            rows: The parameters [V, ...] that were rendered, as `fetch` gave them.
            info: Of `rendering.rasterize`; of a tile, with the rows that no tile of the view before has drawn.
        """

    def strays(self, step: int, model: GaussianModel, ids: Tensor, rows: Mapping[str, Tensor]) -> Tensor | None:
        """Return which rows of the view `before_update` may move too far for culling ahead, for `prefetch`.

        Args:
            step: Number of the step.
            model: The Gaussians.
            ids: Sorted int64 [V] on any device, which Gaussians the rows are.
            rows: Their parameters [V, ...], as `fetch` gave them.

        Returns:
            int64 [F] of the ids, sorted; None: nothing moves.
        """

    def before_update(
        self, step: int, rows: Mapping[str, Tensor], info: Mapping[str, Any], model: GaussianModel, ids: Tensor | None
    ) -> None:
        """Move the rows of the view, after the backward pass and with the update that follows.

        Args:
            step: Number of the step.
            rows: Geometry [V, ...] of the rows that were rendered, with the values that were.
            info: Of `rendering.rasterize`.
            model: The Gaussians.
            ids: [V] which Gaussians the rendered rows are; None: all of them were rendered.
        """

    def after_step(self, step: int, info: Mapping[str, Any], model: GaussianModel, ids: Tensor | None = None) -> bool:
        """Take in one step, after the update, and change rows where it is time.

        Args:
            step: Number of the step just optimized.
            info: Of `rendering.rasterize`, after the backward pass.
            model: The Gaussians.
            ids: [V] which Gaussians the rendered rows are; None: all of them were rendered.

        Returns:
            Whether the rows of the model have changed.

        Raises:
            TrainingStopped: Nothing would be left.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that it goes on from, by name; not copied."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state; an empty one begins anew."""
