"""When and which Gaussians are duplicated, split and removed, as gsplat's DefaultStrategy decides it.

Written once for all trainers: selection looks at statistics and geometry alone, and the changes are asked of
the model, wherever its Gaussians lie. One deliberate difference: gsplat 1.5.3 never resets opacities, since its
condition `step % reset_every == 0 & step > 0` is always false; here they are reset as its documentation says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from configs import DensificationRules
from distributed.levelling import level
from distributed.mesh import Ranks
from distributed.selection import largest_within
from errors import InputError, TrainingStopped
from offload.errors import sentence_of
from offload.models.contract import GaussianModel
from offload.store.morton import morton_order
from strategies.ops import RoomForGrowth, defaults_of, drawn_rows, generator_at, grow, is_worth_sorting, seeds_of
from strategies.regularizers import Regularizers
from strategies.target import Target


@dataclass
class Statistics:
    """Hold what the views since the last refinement have shown of each Gaussian; [N] float32 each."""

    grad2d: Tensor  # sum over views of the norm of the gradient of means2d, in normalized screen units
    count: Tensor  # number of views that showed it
    radii: Tensor  # largest radius on screen, as a share of the longer side of the picture

    @staticmethod
    def zeros(num_gaussians: int, device: torch.device) -> Statistics:
        return Statistics(*(torch.zeros(num_gaussians, device=device) for _ in range(3)))

    def move_to(self, device: torch.device) -> None:
        """Put all three on a device; nothing happens where they are there."""
        self.grad2d, self.count, self.radii = (x.to(device) for x in (self.grad2d, self.count, self.radii))


class DefaultStrategy:
    """Gather statistics at every step and refine a model when the rules say so.

    Where ranks train together each refines its own Gaussians. All follow the same rules, of which those that look at
    the whole model hold for the Gaussians of all ranks.
    """

    name: ClassVar[str] = "densification"  # as checkpoints have called it from the beginning
    moves_rows: ClassVar[bool] = False
    rows_of_state: ClassVar[tuple[str, ...]] = ("grad2d", "count", "radii")

    def __init__(
        self,
        rules: DensificationRules,
        scene_scale: float,
        seed: int,
        ranks: Ranks | None = None,
        ends_of_growth: str = "--refine_stop_iter",
    ) -> None:
        """
        Args:
            rules: Thresholds and schedule.
            scene_scale: Extent of the cameras in world units.
            seed: Of the positions of split Gaussians.
            ranks: That train together; all of them refine at once.
            ends_of_growth: What to raise so that growth goes on.
        """
        self.rules = rules
        self.scene_scale = scene_scale
        self.statistics: Statistics | None = None
        self._seeds = seeds_of(seed, ranks)
        self._ranks = ranks
        has_target = rules.target_gaussians > 0
        remedy = "lower --target_gaussians" if has_target else "set --max_gaussians or raise --grow_grad2d"
        self._room = RoomForGrowth(remedy, ranks)
        self._regularizers = Regularizers(*rules.regularizers, ranks)
        self._num_appended = 0  # rows at most, since all were last in Morton order
        self._target = Target(rules, self._refinements_from, ends_of_growth)

    def changes_rows_after(self, step: int) -> bool:
        """Return whether rows may be added, removed or overwritten after this step, counted from 0."""
        return self.refines_at(step) or self.resets_at(step)

    def looks_at(self, step: int) -> bool:
        """Return whether it asks what the rendering of this step has drawn."""
        return step < self.rules.refine_stop_iter or self._regularizers.is_on

    def heading(self, step: int, num_gaussians: int) -> int | None:
        """Return the target, or what can be reached of it; None where there is no target, or growth has ended."""
        return self._target.heading(step, num_gaussians)

    def regularized(self, loss: Tensor, rows: Mapping[str, Tensor], info: Mapping[str, Any]) -> Tensor:
        """Return the loss of a step, or of a tile, with the regularizers of the rows that it has drawn."""
        return self._regularizers.added_to(loss, rows, info)

    def strays(self, step: int, model: GaussianModel, ids: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Return None: nothing moves but by Adam."""

    def before_update(
        self, step: int, rows: Mapping[str, Tensor], info: Mapping[str, Any], model: GaussianModel, ids: Tensor | None
    ) -> None:
        """Count the rows that were drawn, where a regularizer asks for them; nothing moves."""
        if self._regularizers.is_on:
            self._regularizers.count(len(drawn_rows(info)))

    def after_step(self, step: int, info: Mapping[str, Any], model: GaussianModel, ids: Tensor | None = None) -> bool:
        """Take in one step's gradients and, where it is time, refine and reset.

        Args:
            step: Number of the step just optimized, from 0.
            info: Of `rendering.rasterize`, after the backward pass.
            model: The Gaussians.
            ids: [V] which Gaussians the rendered rows are; None: all of them were rendered.

        Returns:
            Whether the rows of the model have changed.

        Raises:
            TrainingStopped: Nothing would be left.
        """
        rules = self.rules
        if step >= rules.refine_stop_iter:
            self.statistics = None
            return False
        if self.statistics is None:
            self.statistics = Statistics.zeros(model.num_gaussians, model.device)
        self.statistics.move_to(model.device)
        self.observe(info, ids)
        refines = self.refines_at(step)
        if refines:
            self.refine(step, model)
        if self.resets_at(step):
            model.clamp_opacities(math.log(2 * rules.prune_opa / (1 - 2 * rules.prune_opa)))
        return refines

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has been gathered since the last refinement, by name; not copied."""
        gathered = {} if self.statistics is None else dict(vars(self.statistics))
        counted = self._regularizers.state_dict()
        return {**gathered, **counted, "num_appended": torch.tensor(self._num_appended)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; `after_step` puts the statistics where geometry is."""
        gathered = {item.name: state[item.name].clone() for item in fields(Statistics) if item.name in state}
        self._num_appended = int(state.get("num_appended", 0))
        self._regularizers.load_state_dict(state)
        if gathered:
            self.statistics = Statistics(**gathered)

    def refines_at(self, step: int) -> bool:
        """Return whether rows may be added and removed after this step, counted from 0."""
        rules = self.rules
        return (
            rules.refine_start_iter < step < rules.refine_stop_iter
            and step % rules.refine_every == 0
            and step % rules.reset_every >= rules.pause_refine_after_reset
        )

    def resets_at(self, step: int) -> bool:
        """Return whether opacities are reset after this step, counted from 0."""
        return 0 < step < self.rules.refine_stop_iter and step % self.rules.reset_every == 0

    def _refinements_from(self, step: int) -> Iterator[int]:
        """Return the steps after which there is a refinement, from this step on."""
        return filter(self.refines_at, range(step, self.rules.refine_stop_iter))

    @torch.no_grad()
    def observe(self, info: Mapping[str, Any], ids: Tensor | None = None) -> None:
        """Add the gradients of one packed rendering to the statistics.

        Args:
            info: Of `rendering.rasterize`, after the backward pass.
            ids: [V] which Gaussians the rendered rows are; None: all of them were rendered.
        """
        statistics, means2d = self._gathered(), info["means2d"]  # [nnz, 2]
        device = statistics.grad2d.device  # the host's where geometry is there
        rows = info["gaussian_ids"]  # [nnz]
        ids = rows.to(device) if ids is None else ids[rows.to(ids.device)].to(device)  # [nnz]
        if len(ids) == 0:
            return
        gradients = means2d.absgrad if self.rules.absgrad else means2d.grad  # [V, 2] per pixel
        half_width, half_height = 0.5 * info["width"], 0.5 * info["height"]  # to [-1, 1] screen units
        norms = torch.hypot(gradients[:, 0] * half_width, gradients[:, 1] * half_height)  # [V]
        norms = norms.mul_(info["n_cameras"]).to(device)  # undoes the mean over the batch in the loss
        norms.nan_to_num_(nan=0.0, posinf=0.0)  # of a step that is skipped
        statistics.grad2d.index_add_(0, ids, norms)
        statistics.count.index_add_(0, ids, torch.ones_like(norms))
        if self.rules.refine_scale2d_stop_iter > 0:
            share = info["radii"].to(device).amax(dim=-1) / max(info["width"], info["height"])  # [V]
            statistics.radii.scatter_reduce_(0, ids, share, "amax")

    @torch.no_grad()
    def refine(self, step: int, model: GaussianModel) -> None:
        """Duplicate, split and remove by the statistics so far, then start them anew."""
        statistics, rules = self._gathered(), self.rules
        self.statistics = None  # whatever happens below, they will not fit the rows
        average_grad = statistics.grad2d / statistics.count.clamp_min(1)  # [N]
        largest_scale = model.read("scales").amax(dim=-1).exp()  # [N]
        held_back = ""
        if rules.target_gaussians > 0:
            remove = select_removal(
                rules, step, model.read("opacities"), largest_scale, statistics.radii, self.scene_scale
            )
            average_grad = average_grad.masked_fill(remove, 0.0)
            shown = average_grad > 0
            counts = self._sums(len(remove), int(remove.sum()), int(shown.sum()))
            growth, held_back = self._target.plan(step, *counts)
            # Whatever the threshold of gradients says: rows that no view has shown never grow, and of the others those
            # of the largest gradients do.
            rules = replace(rules, grow_grad2d=0.0, max_gaussians=counts[0] + growth)
        duplicate, split = select_growth(
            rules, step, average_grad, largest_scale, statistics.radii, self.scene_scale, self._ranks
        )
        duplicate_ids, split_ids, has_memory = self._grow(step, model, torch.where(duplicate)[0], torch.where(split)[0])
        self._target.take_in(held_back if has_memory else "memory")

        # Duplicates and second halves were appended in this order, as large on screen as their origin.
        radii = torch.cat([statistics.radii, statistics.radii[duplicate_ids], statistics.radii[split_ids]])
        largest_scale = model.read("scales").amax(dim=-1).exp()
        remove = select_removal(rules, step, model.read("opacities"), largest_scale, radii, self.scene_scale)
        kept_ids = torch.where(~remove)[0]
        num_kept, num_gaussians = self._sums(len(kept_ids), model.num_gaussians)
        if num_kept == 0:
            raise TrainingStopped(
                f"The refinement at step {step} would remove all {num_gaussians:,} Gaussians: "
                "lower --prune_opa or raise --prune_scale3d.",
                defaults_of(rules, "prune_opa", "prune_scale3d"),
            )
        self._num_appended += len(duplicate_ids) + len(split_ids)
        is_last = next(self._refinements_from(step + 1), None) is None
        sorts = is_worth_sorting(self._num_appended, len(kept_ids), is_last=is_last)
        if self._ranks is not None:
            model.keep(kept_ids)
            sorts |= level(model, self._ranks)
            remove = kept_ids = torch.arange(model.num_gaussians, device=kept_ids.device)
        if sorts:
            kept_ids = kept_ids[morton_order(model.read("means", kept_ids)).to(kept_ids.device)]
            self._num_appended = 0
        if sorts or len(kept_ids) < len(remove):
            model.keep(kept_ids)
        self.statistics = Statistics.zeros(model.num_gaussians, model.device)
        if is_last and rules.target_gaussians > 0:
            self._target.tell(*self._sums(model.num_gaussians))

    def _grow(
        self, step: int, model: GaussianModel, duplicate_ids: Tensor, split_ids: Tensor
    ) -> tuple[Tensor, Tensor, bool]:
        """Duplicate and split rows where there is memory for it.

        Returns:
            The rows that were duplicated, those that were split, and whether all ranks had memory for theirs.
        """
        none, num_new = duplicate_ids[:0], len(duplicate_ids) + len(split_ids)
        if not self._room.holds(model, num_new):
            return none, none, False
        failure = None
        try:
            grow(model, duplicate_ids, split_ids, self.rules.revised_opacity, generator_at(self._seeds, step))
        except (torch.cuda.OutOfMemoryError, InputError) as error:  # on the device, or of pinned memory
            failure = f"Growing to {model.num_gaussians + num_new:,} Gaussians failed ({sentence_of(error)})."
            duplicate_ids = split_ids = none
        return duplicate_ids, split_ids, not self._room.tell_any(failure)

    def _gathered(self) -> Statistics:
        if self.statistics is None:
            raise RuntimeError("no statistics are gathered at this step")
        return self.statistics

    def _sums(self, *counts: int) -> list[int]:
        """Return the sum of each count over the ranks."""
        return list(counts) if self._ranks is None else self._ranks.sums(counts)


def select_growth(
    rules: DensificationRules,
    step: int,
    average_grad: Tensor,
    largest_scale: Tensor,
    radii: Tensor,
    scene_scale: float,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """Return which Gaussians to duplicate and which to split.

    Args:
        rules: Thresholds.
        step: From 0.
        average_grad: [N] mean norm of the screen-space gradient.
        largest_scale: [N] largest standard deviation in world units.
        radii: [N] largest radius on screen as a share of the picture.
        scene_scale: In world units.
        ranks: Those whose Gaussians `max_gaussians` bounds together; all of them call this at once.

    Returns:
        Two masks [N]; together they grow at most to `max_gaussians`, largest gradients first.
    """
    wants_growth = average_grad > rules.grow_grad2d
    small = largest_scale <= rules.grow_scale3d * scene_scale
    duplicate = wants_growth & small
    split = wants_growth & ~small
    if step < rules.refine_scale2d_stop_iter:
        split |= radii > rules.grow_scale2d  # as in gsplat, such a row may be duplicated as well
    if rules.max_gaussians > 0:
        num_gaussians = len(average_grad) if ranks is None else sum(ranks.gather(len(average_grad)))
        room = max(rules.max_gaussians - num_gaussians, 0)
        allowed = largest_within(average_grad, duplicate.long() + split.long(), room, ranks)
        duplicate &= allowed
        split &= allowed
    return duplicate, split


def select_removal(
    rules: DensificationRules,
    step: int,
    opacities: Tensor,
    largest_scale: Tensor,
    radii: Tensor,
    scene_scale: float,
) -> Tensor:
    """Return which Gaussians to remove: transparent ones and, after the first opacity reset, huge ones.

    Args:
        rules: Thresholds.
        step: From 0.
        opacities: [N] logits.
        largest_scale: [N] largest standard deviation in world units.
        radii: [N] largest radius on screen as a share of the picture.
        scene_scale: In world units.

    Returns:
        Mask [N].
    """
    remove = torch.sigmoid(opacities) < rules.prune_opa
    if step > rules.reset_every:
        remove |= largest_scale > rules.prune_scale3d * scene_scale
        if step < rules.refine_scale2d_stop_iter:
            remove |= radii > rules.prune_scale2d
    return remove
