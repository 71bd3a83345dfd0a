"""3DGS as Markov chain Monte Carlo (Kheradmand et al., arXiv 2404.09591), with gsplat's names and defaults.

The number of Gaussians grows by 5 % at each refinement up to `max_gaussians`, and none is removed: those that have
become transparent (dead) are relocated onto others, drawn in proportion to opacity, which become that many Gaussians
at one place and together draw what one has drawn (`shared_opacities_and_shrinking`). Noise moves what is nearly
transparent at every step (`strategies/noise.py`), and regularizers keep opacities and scales low
(`strategies/regularizers.py`).

Decisions are gsplat's, and moments too: copies begin without any, and what they are made of keeps its own where rows
are added, but not where dead ones are relocated to it. The paper's own code clears them in both cases, after which
Adam's steps are several times as large for a while, and growth comes by 5 % of all rows each time. One thing differs:
gsplat leaves relocated rows the moments that they had at another place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from configs import DensificationRules
from distributed.levelling import level
from distributed.mesh import Ranks
from errors import InputError, TrainingStopped
from offload.errors import sentence_of
from offload.models.contract import GaussianModel
from offload.store.morton import morton_order
from strategies.noise import MOVED_BY, Noise
from strategies.ops import (
    RoomForGrowth,
    defaults_of,
    drawn_rows,
    generator_at,
    is_worth_sorting,
    sample_by_weight,
    seeds_of,
    shared_opacities_and_shrinking,
)
from strategies.regularizers import Regularizers

GROWTH = 0.05  # of the number of Gaussians, at each refinement
LARGEST_OPACITY = 1 - torch.finfo(torch.float32).eps


class MCMCStrategy:
    """Relocate, add and move Gaussians as samples of a distribution, up to a bound.

    Ranks that train together draw from the distribution of all Gaussians, and grow to the bound together.
    """

    name: ClassVar[str] = "mcmc"
    moves_rows: ClassVar[bool] = True
    rows_of_state: ClassVar[tuple[str, ...]] = ("owed_from",)

    def __init__(
        self,
        rules: DensificationRules,
        means_lr: np.ndarray,
        seed: int,
        margin: float,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            rules: Bound and schedule; Gaussians of at most `prune_opa` are dead.
            means_lr: [steps] float64, the learning rate of means at each step.
            seed: Of what is drawn.
            margin: How far culling ahead lets any coordinate of a mean be moved, in world units.
            ranks: That train together; all of them call `after_step` at once.
        """
        self.rules = rules
        self._seed = seed
        self._ranks = ranks
        self._room = RoomForGrowth("lower --max_gaussians", ranks)
        self._regularizers = Regularizers(*rules.regularizers, ranks)
        self._noise = Noise(rules.noise_lr * means_lr, seeds_of(seed, ranks), margin)
        self._moved: Tensor | None = None  # int64 [D] the rows whose noise the present step pays
        self._num_steps = len(means_lr)
        self._num_misplaced = 0  # rows at most, since all were last in Morton order

    def changes_rows_after(self, step: int) -> bool:
        """Return whether rows may be added or relocated after this step, counted from 0."""
        rules = self.rules
        return rules.refine_start_iter < step < rules.refine_stop_iter and step % rules.refine_every == 0

    def looks_at(self, step: int) -> bool:
        """Return True: what is drawn gets noise at every step."""
        return True

    def heading(self, step: int, num_gaussians: int) -> int | None:
        """Return the bound, or what growth can lead to before it; None where growth has ended."""
        rules = self.rules
        first = (max(step, rules.refine_start_iter) // rules.refine_every + 1) * rules.refine_every
        reached = num_gaussians
        for _ in range(first, min(rules.refine_stop_iter, self._num_steps), rules.refine_every):
            before, reached = reached, self._grown(reached)
            if reached == before:
                break
        return reached if reached > num_gaussians else None

    def regularized(self, loss: Tensor, rows: Mapping[str, Tensor], info: Mapping[str, Any]) -> Tensor:
        """Return the loss of a step, or of a tile, with the regularizers of the rows that it has drawn."""
        return self._regularizers.added_to(loss, rows, info)

    @torch.no_grad()
    def strays(self, step: int, model: GaussianModel, ids: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return which rows of the view the noise of the step would carry too far for culling ahead to find them."""
        self._noise.begin(step, model.num_gaussians, model.device)
        return self._noise.strays(step, ids, rows)

    @torch.no_grad()
    def before_update(
        self, step: int, rows: Mapping[str, Tensor], info: Mapping[str, Any], model: GaussianModel, ids: Tensor | None
    ) -> None:
        """Add to the means of rows that were drawn the noise that they are owed, with the update that follows."""
        drawn = drawn_rows(info)  # [D]
        self._regularizers.count(len(drawn))
        self._noise.begin(step, model.num_gaussians, model.device)
        self._moved = (drawn if ids is None else ids[drawn]).to(model.device)
        geometry = {name: rows[name][drawn] for name in MOVED_BY}
        model.displace(drawn, self._noise.offsets(step, self._moved, geometry))

    @torch.no_grad()
    def after_step(self, step: int, info: Mapping[str, Any], model: GaussianModel, ids: Tensor | None = None) -> bool:
        """Relocate dead Gaussians and add some, where it is time; return whether rows may have changed.

        Raises:
            TrainingStopped: All Gaussians are dead.
        """
        if self._moved is not None:  # by the update, which might have failed
            self._noise.owe_from(step + 1, self._moved)
            self._moved = None
        if not self.changes_rows_after(step):
            return False
        self._noise.begin(step + 1, model.num_gaussians, model.device)
        generator = generator_at([self._seed], step)
        num_relocated = self._relocate_dead(step, model, generator)
        num_added = self._grow(step, model, generator)
        self._num_misplaced += num_relocated + num_added
        is_last = not self._refines_from(step + 1)
        sorts = is_worth_sorting(self._num_misplaced, model.num_gaussians, is_last=is_last)
        if self._ranks is not None:
            sorts |= self._level(model, self._ranks)
        if sorts:
            self._keep(model, morton_order(model.read("means")))
            self._num_misplaced = 0
        return True

    def _refines_from(self, step: int) -> bool:
        """Return whether a refinement follows this step, or comes with it."""
        return any(map(self.changes_rows_after, range(step, self.rules.refine_stop_iter)))

    def _grown(self, num_gaussians: int) -> int:
        """Return how many Gaussians a refinement makes of so many, where there is memory for them."""
        return max(min(self.rules.max_gaussians, int((1 + GROWTH) * num_gaussians)), num_gaussians)

    def _relocate_dead(self, step: int, model: GaussianModel, generator: torch.Generator) -> int:
        """Put dead Gaussians where others are; return how many rows of this process are copies."""
        opacities = torch.sigmoid(model.read("opacities"))  # [N]
        dead = opacities <= self.rules.prune_opa
        dead_ids = torch.where(dead)[0]
        num_dead, num_gaussians = self._sums(len(dead_ids), len(opacities))
        if num_dead == num_gaussians:
            raise TrainingStopped(
                f"At step {step} all {num_gaussians:,} Gaussians are transparent, so there is none to relocate others "
                "to: lower --opacity_reg or --prune_opa.",
                defaults_of(self.rules, "opacity_reg", "prune_opa"),
            )
        if num_dead == 0:
            return 0
        source_ids = sample_by_weight(opacities.masked_fill(dead, 0.0), num_dead, generator, self._ranks)
        return self._copy(step, model, opacities, source_ids, dead_ids)

    def _grow(self, step: int, model: GaussianModel, generator: torch.Generator) -> int:
        """Append Gaussians where others are, up to the bound; return how many rows of this process are copies."""
        (num_before,) = self._sums(model.num_gaussians)
        num_new = self._grown(num_before) - num_before
        if num_new == 0:
            return 0
        opacities = torch.sigmoid(model.read("opacities"))  # [N]
        source_ids = sample_by_weight(opacities, num_new, generator, self._ranks)
        return self._copy(step, model, opacities, source_ids, source_ids[:0], leaves_moments=True)

    def _copy(
        self,
        step: int,
        model: GaussianModel,
        opacities: Tensor,
        source_ids: Tensor,
        dead_ids: Tensor,
        *,
        leaves_moments: bool = False,
    ) -> int:
        """Make copies of rows: in the places of dead ones as far as there are any, and of the others at the end.

        Where ranks train together, copies are made where their rows are. As many dead rows as there are copies are
        overwritten or removed in all, but one rank may have more of the former, and another more of the latter.

        Args:
            step: From 0.
            model: The Gaussians.
            opacities: [N] in [0, 1].
            source_ids: int64 [M] the row that each copy is made of; rows may repeat.
            dead_ids: int64 [D] rows that are none of these.
            leaves_moments: Whether the rows that copies are made of keep their moments; the copies begin without.

        Returns:
            The number of copies, M; 0 where memory for them is lacking, here or at another rank, and nothing is done.
        """
        num_taken = min(len(source_ids), len(dead_ids))
        taken_ids, left_ids = dead_ids[:num_taken], dead_ids[num_taken:]
        sources, values, places = self._shared(step, model, opacities, source_ids)
        appended = {name: value[places[num_taken:]] for name, value in values.items()}
        if not self._append(model, source_ids[num_taken:], appended):
            return 0
        if len(source_ids) > 0:
            model.overwrite(sources, values, leaves_moments=leaves_moments)
            self._noise.owe_from(step + 1, sources)
        if num_taken > 0:
            model.relocate(source_ids[:num_taken], taken_ids)
            self._noise.owe_from(step + 1, taken_ids)
        self._noise.append(step + 1, len(source_ids) - num_taken)
        if len(left_ids) > 0:
            kept = torch.ones(model.num_gaussians, dtype=torch.bool, device=left_ids.device)
            kept[left_ids] = False
            self._keep(model, kept.nonzero().squeeze(1))
        return len(source_ids)

    def _append(self, model: GaussianModel, source_ids: Tensor, values: Mapping[str, Tensor]) -> bool:
        """Append copies of rows [M] with these values [M, ...]; return whether all ranks have memory for theirs."""
        num_before, num_new = model.num_gaussians, len(source_ids)
        if not self._room.holds(model, num_new):
            return False
        failure = None
        try:
            if num_new > 0:
                model.append_copies(source_ids)
                model.overwrite(torch.arange(num_before, num_before + num_new, device=source_ids.device), values)
        except (torch.cuda.OutOfMemoryError, InputError) as error:  # on the device, or of pinned memory
            failure = f"Growing to {num_before + num_new:,} Gaussians failed ({sentence_of(error)})."
        if self._room.tell_any(failure):
            model.truncate(num_before)
            return False
        return True

    def _keep(self, model: GaussianModel, ids: Tensor) -> None:
        """Keep only these rows [M], in this order, and what they are owed."""
        model.keep(ids.to(model.device))
        self._noise.keep(ids)

    def _level(self, model: GaussianModel, ranks: Ranks) -> bool:
        """Move rows, and what they are owed, between ranks where one is too full; return whether any have moved."""
        owed = self._noise.state_dict()
        has_moved = level(model, ranks, owed)
        self._noise.load_state_dict(owed)
        return has_moved

    def _sums(self, *counts: int) -> list[int]:
        """Return the sum of each count over the ranks."""
        return list(counts) if self._ranks is None else self._ranks.sums(counts)

    def _shared(
        self, step: int, model: GaussianModel, opacities: Tensor, source_ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Compute what rows become of which others become copies; their means have the noise that they are owed.

        Args:
            step: From 0.
            model: The Gaussians.
            opacities: [N] in [0, 1].
            source_ids: int64 [M] the row that each copy is made of; rows may repeat.

        Returns:
            The rows [S], each once; their new values by name; and for each copy the place [M] of its row among them.
        """
        sources, places, copies = source_ids.unique(return_inverse=True, return_counts=True)
        geometry = {name: model.read(name, sources) for name in MOVED_BY}
        means = model.read("means", sources) + self._noise.offsets(step, sources, geometry)
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
