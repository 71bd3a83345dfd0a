"""3DGS as Markov chain Monte Carlo (Kheradmand et al., arXiv 2404.09591), with gsplat's names and defaults.

The number of Gaussians grows by 5 % at each refinement up to `max_gaussians`, and none is removed: those that have
become transparent (dead) are relocated onto others, drawn in proportion to opacity, which become that many Gaussians
at one place and together draw what one has drawn (`shared_opacities_and_shrinking`). Noise moves what is nearly
transparent at every step (`strategies/noise.py`), and regularizers keep opacities and scales low
(`strategies/regularizers.py`).

Decisions are gsplat's. Moments: all rows that are copied, and the rows that were copied, begin without any, as in the
paper's own code. gsplat leaves those of relocated rows, which belong to another place, and, where rows are added, those
of the rows that were copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from configs import DensificationRules
from errors import InputError, TrainingStopped
from offload.errors import sentence_of
from offload.models.contract import GaussianModel
from offload.store.morton import morton_order
from strategies.noise import MOVED_BY, Noise
from strategies.ops import (
    RoomForGrowth,
    drawn_rows,
    generator_at,
    is_worth_sorting,
    sample_by_weight,
    shared_opacities_and_shrinking,
)
from strategies.regularizers import Regularizers

GROWTH = 0.05  # of the number of Gaussians, at each refinement
REGULARIZER = 0.01  # weight of both, where none is given
LARGEST_OPACITY = 1 - torch.finfo(torch.float32).eps


class MCMCStrategy:
    """Relocate, add and move Gaussians as samples of a distribution, up to a bound."""

    name: ClassVar[str] = "mcmc"
    moves_rows: ClassVar[bool] = True

    def __init__(self, rules: DensificationRules, means_lr: np.ndarray, seed: int, margin: float) -> None:
        """
        Args:
            rules: Bound and schedule; Gaussians of at most `prune_opa` are dead.
            means_lr: [steps] float64, the learning rate of means at each step.
            seed: Of what is drawn.
            margin: How far culling ahead lets any coordinate of a mean be moved, in world units.
        """
        self.rules = rules
        self._seed = seed
        self._room = RoomForGrowth("lower --max_gaussians")
        weights = (REGULARIZER if weight is None else weight for weight in (rules.opacity_reg, rules.scale_reg))
        self._regularizers = Regularizers(*weights)
        self._noise = Noise(rules.noise_lr * means_lr, [seed], margin)
        self._moved: Tensor | None = None  # int64 [D] the rows whose noise the present step pays
        self._num_misplaced = 0  # rows at most, since all were last in Morton order

    def changes_rows_after(self, step: int) -> bool:
        """Return whether rows may be added or relocated after this step, counted from 0."""
        rules = self.rules
        return rules.refine_start_iter < step < rules.refine_stop_iter and step % rules.refine_every == 0

    def looks_at(self, step: int) -> bool:
        """Return True: what is drawn gets noise at every step."""
        return True

    def heading(self, step: int, num_gaussians: int) -> int | None:
        """Return the bound, while growth goes on towards it."""
        grows = num_gaussians < self.rules.max_gaussians and self._refines_from(step + 1)
        return self.rules.max_gaussians if grows else None

    def regularized(self, loss: Tensor, rows: Mapping[str, Tensor], info: Mapping[str, Any]) -> Tensor:
        """Return the loss of a step, or of a tile, with the regularizers of the rows that it has drawn."""
        return self._regularizers.added_to(loss, rows, info)

    @torch.no_grad()
    def strays(self, step: int, store: GaussianModel, ids: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return which rows of the view the noise of the step would carry too far for culling ahead to find them."""
        self._noise.begin(step, store.num_gaussians, store.device)
        return self._noise.strays(step, ids, rows)

    @torch.no_grad()
    def before_update(
        self, step: int, rows: Mapping[str, Tensor], info: Mapping[str, Any], store: GaussianModel, ids: Tensor | None
    ) -> None:
        """Add to the means of rows that were drawn the noise that they are owed, with the update that follows."""
        drawn = drawn_rows(info)  # [D]
        self._regularizers.count(len(drawn))
        self._noise.begin(step, store.num_gaussians, store.device)
        self._moved = (drawn if ids is None else ids[drawn]).to(store.device)
        geometry = {name: rows[name][drawn] for name in MOVED_BY}
        store.displace(drawn, self._noise.offsets(step, self._moved, geometry))

    @torch.no_grad()
    def after_step(self, step: int, info: Mapping[str, Any], store: GaussianModel, ids: Tensor | None = None) -> bool:
        """Relocate dead Gaussians and add some, where it is time; return whether rows may have changed.

        Raises:
            TrainingStopped: All Gaussians are dead.
        """
        if self._moved is not None:  # by the update, which might have failed
            self._noise.owe_from(step + 1, self._moved)
            self._moved = None
        if not self.changes_rows_after(step):
            return False
        self._noise.begin(step + 1, store.num_gaussians, store.device)
        generator = generator_at([self._seed], step)
        num_relocated = self._relocate_dead(step, store, generator)
        num_added = self._grow(step, store, generator)
        self._num_misplaced += num_relocated + num_added
        is_last = not self._refines_from(step + 1)
        if is_worth_sorting(self._num_misplaced, store.num_gaussians, is_last=is_last):
            order = morton_order(store.read("means"))
            store.keep(order.to(store.device))
            self._noise.keep(order)
            self._num_misplaced = 0
        return True

    def _refines_from(self, step: int) -> bool:
        """Return whether a refinement follows this step, or comes with it."""
        return any(map(self.changes_rows_after, range(step, self.rules.refine_stop_iter)))

    def _relocate_dead(self, step: int, store: GaussianModel, generator: torch.Generator) -> int:
        """Put dead Gaussians where others are; return how many."""
        opacities = torch.sigmoid(store.read("opacities"))  # [N]
        dead = opacities <= self.rules.prune_opa
        dead_ids = torch.where(dead)[0]
        if len(dead_ids) == len(opacities):
            raise TrainingStopped(
                f"At step {step} all {len(opacities)} Gaussians are transparent, so there is none to relocate others "
                "to: lower --opacity_reg or --prune_opa."
            )
        if len(dead_ids) == 0:
            return 0
        source_ids = sample_by_weight(opacities.masked_fill(dead, 0.0), len(dead_ids), generator)
        sources, values, _ = self._shared(step, store, opacities, source_ids)
        store.overwrite(sources, values)
        store.relocate(source_ids, dead_ids)
        self._noise.owe_from(step + 1, source_ids)
        self._noise.owe_from(step + 1, dead_ids)
        return len(dead_ids)

    def _grow(self, step: int, store: GaussianModel, generator: torch.Generator) -> int:
        """Append Gaussians where others are, up to the bound; return how many."""
        num_before = store.num_gaussians
        num_new = max(min(self.rules.max_gaussians, int((1 + GROWTH) * num_before)) - num_before, 0)
        if num_new == 0 or not self._room.holds(store, num_new):
            return 0
        opacities = torch.sigmoid(store.read("opacities"))  # [N]
        source_ids = sample_by_weight(opacities, num_new, generator)
        sources, values, places = self._shared(step, store, opacities, source_ids)
        try:
            store.append_copies(source_ids)
            new_ids = torch.arange(num_before, num_before + num_new, device=source_ids.device)
            store.overwrite(new_ids, {name: value[places] for name, value in values.items()})
        except (torch.cuda.OutOfMemoryError, InputError) as error:  # on the device, or of pinned memory
            store.truncate(num_before)
            self._room.tell(f"Growing to {num_before + num_new} Gaussians failed ({sentence_of(error)}).")
            return 0
        store.overwrite(sources, values)
        self._noise.owe_from(step + 1, source_ids)
        self._noise.append(step + 1, num_new)
        return num_new

    def _shared(
        self, step: int, store: GaussianModel, opacities: Tensor, source_ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Compute what rows become of which others become copies; their means have the noise that they are owed.

        Args:
            step: From 0.
            store: The Gaussians.
            opacities: [N] in [0, 1].
            source_ids: int64 [M] the row that each copy is made of; rows may repeat.

        Returns:
            The rows [S], each once; their new values by name; and for each copy the place [M] of its row among them.
        """
        sources, places, copies = source_ids.unique(return_inverse=True, return_counts=True)
        geometry = {name: store.read(name)[sources] for name in MOVED_BY}
        means = store.read("means")[sources] + self._noise.offsets(step, sources, geometry)
        shared, shrinking = shared_opacities_and_shrinking(opacities[sources], copies + 1)
        values = {
            "means": means,
            "scales": geometry["scales"] + shrinking.log().float()[:, None],
            "opacities": torch.logit(shared.clamp(self.rules.prune_opa, LARGEST_OPACITY)).float(),
        }
        return sources, values, places

    def state_dict(self) -> dict[str, Tensor]:
        """Return what rows are owed, and what has been counted, by name; not copied."""
        counted = torch.tensor(self._num_misplaced)
        return {**self._noise.state_dict(), **self._regularizers.state_dict(), "num_misplaced": counted}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; an empty one, as of a run with another strategy, owes no noise."""
        self._num_misplaced = int(state.get("num_misplaced", 0))
        self._noise.load_state_dict(state)
        self._regularizers.load_state_dict(state)
