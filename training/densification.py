"""When and which Gaussians are duplicated, split and removed, as gsplat's DefaultStrategy decides it.

Written once for all trainers: selection looks at statistics and geometry alone, and the changes are asked of
whatever store holds the Gaussians. One deliberate difference: gsplat 1.5.3 never resets opacities, since its
condition `step % reset_every == 0 & step > 0` is always false; here they are reset as its documentation says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from configs import DensificationRules
from errors import InputError, TrainingStopped
from offload.models.contract import GaussianModel
from offload.store.morton import morton_order
from training.ending import sentence_of
from training.memory import available_bytes, format_bytes

SORTED_AGAIN = 0.25  # share of rows that may be appended before all are sorted


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


class Densification:
    """Gather statistics at every step and refines a store of Gaussians when the rules say so."""

    def __init__(self, rules: DensificationRules, scene_scale: float, seed: int) -> None:
        """
        Args:
            rules: Thresholds and schedule.
            scene_scale: Extent of the cameras in world units.
            seed: Of the positions of split Gaussians.
        """
        self.rules = rules
        self.scene_scale = scene_scale
        self.statistics: Statistics | None = None
        self._seed = seed
        self._told_of_memory = False
        self._num_appended = 0  # rows at most, since all were last in Morton order

    def changes_rows_after(self, step: int) -> bool:
        """Return whether rows may be added, removed or overwritten after this step, counted from 0."""
        return self.refines_at(step) or self.resets_at(step)

    def after_step(self, step: int, info: Mapping[str, Any], store: GaussianModel, ids: Tensor | None = None) -> bool:
        """Take in one step's gradients and, where it is time, refine and reset.

        Args:
            step: Number of the step just optimized, from 0.
            info: Of `rendering.rasterize`, after the backward pass.
            store: The Gaussians.
            ids: [V] which Gaussians the rendered rows are; None: all of them were rendered.

        Returns:
            Whether the rows of the store have changed.

        Raises:
            TrainingStopped: Nothing would be left.
        """
        rules = self.rules
        if step >= rules.refine_stop_iter:
            self.statistics = None
            return False
        if self.statistics is None:
            self.statistics = Statistics.zeros(store.num_gaussians, store.device)
        self.statistics.move_to(store.device)
        self.observe(info, ids)
        refines = self.refines_at(step)
        if refines:
            self.refine(step, store)
        if self.resets_at(step):
            store.clamp_opacities(math.log(2 * rules.prune_opa / (1 - 2 * rules.prune_opa)))
        return refines

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has been gathered since the last refinement, by name; not copied."""
        gathered = {} if self.statistics is None else dict(vars(self.statistics))
        return {**gathered, "num_appended": torch.tensor(self._num_appended)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; `after_step` puts the statistics where geometry is."""
        gathered = {name: value.clone() for name, value in state.items() if name != "num_appended"}
        self._num_appended = int(state.get("num_appended", 0))
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
    def refine(self, step: int, store: GaussianModel) -> None:
        """Duplicate, split and remove by the statistics so far, then start them anew."""
        statistics, rules = self._gathered(), self.rules
        self.statistics = None  # whatever happens below, they will not fit the rows
        average_grad = statistics.grad2d / statistics.count.clamp_min(1)  # [N]
        largest_scale = store.read("scales").amax(dim=-1).exp()  # [N]
        duplicate, split = select_growth(rules, step, average_grad, largest_scale, statistics.radii, self.scene_scale)
        duplicate_ids, split_ids = torch.where(duplicate)[0], torch.where(split)[0]
        num_new = len(duplicate_ids) + len(split_ids)
        lack = lacking_memory(store, num_new)
        if lack is not None:
            self._tell_of_memory(lack)
            duplicate_ids, split_ids = duplicate_ids[:0], split_ids[:0]
        # On the CPU, so that devices agree; from the step's number, so that a resumed run draws the same.
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self._seed, step]).generate_state(1)[0]))
        try:
            grow(store, duplicate_ids, split_ids, rules.revised_opacity, generator)
        except (torch.cuda.OutOfMemoryError, InputError) as error:  # on the device, or of pinned memory
            self._tell_of_memory(f"Growing to {store.num_gaussians + num_new} Gaussians failed ({sentence_of(error)}).")
            duplicate_ids, split_ids = duplicate_ids[:0], split_ids[:0]

        # Duplicates and second halves were appended in this order, as large on screen as their origin.
        radii = torch.cat([statistics.radii, statistics.radii[duplicate_ids], statistics.radii[split_ids]])
        largest_scale = store.read("scales").amax(dim=-1).exp()
        remove = select_removal(rules, step, store.read("opacities"), largest_scale, radii, self.scene_scale)
        kept_ids = torch.where(~remove)[0]
        if len(kept_ids) == 0:
            raise TrainingStopped(
                f"The refinement at step {step} would remove all {store.num_gaussians} Gaussians: "
                "lower --prune_opa or raise --prune_scale3d."
            )
        self._num_appended += len(duplicate_ids) + len(split_ids)
        sorts = self._is_worth_sorting(step, len(kept_ids))
        if sorts:
            kept_ids = kept_ids[morton_order(store.read("means")[kept_ids]).to(kept_ids.device)]
            self._num_appended = 0
        if sorts or len(kept_ids) < len(remove):
            store.keep(kept_ids)
        self.statistics = Statistics.zeros(store.num_gaussians, store.device)

    def _gathered(self) -> Statistics:
        if self.statistics is None:
            raise RuntimeError("no statistics are gathered at this step")
        return self.statistics

    def _tell_of_memory(self, sentence: str) -> None:
        """Say once that the next refinements will find no more memory."""
        if not self._told_of_memory:
            tqdm.write(f"Warning: {sentence} Gaussians that do not fit are not added.")
        self._told_of_memory = True

    def _is_worth_sorting(self, step: int, num_gaussians: int) -> bool:
        """Return whether rows shall be put into Morton order again, in which those of a view come in runs.

        Appended rows are in runs of their own, which are the shorter, the fewer there are. Once they are some tenths
        of all, fetching and committing the rows of a view takes up to a fifth more time (a half more where the order
        is random), and sorting takes as long as some tens of steps. So it is done each time that the rows have grown
        by a share, which adds up to a few times the cost of the last time, and after the last refinement.
        """
        is_last = not any(map(self.refines_at, range(step + 1, self.rules.refine_stop_iter)))
        return self._num_appended > (0 if is_last else SORTED_AGAIN * num_gaussians)


def select_growth(
    rules: DensificationRules,
    step: int,
    average_grad: Tensor,
    largest_scale: Tensor,
    radii: Tensor,
    scene_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return which Gaussians to duplicate and which to split.

    Args:
        rules: Thresholds.
        step: From 0.
        average_grad: [N] mean norm of the screen-space gradient.
        largest_scale: [N] largest standard deviation in world units.
        radii: [N] largest radius on screen as a share of the picture.
        scene_scale: In world units.

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
        room = max(rules.max_gaussians - len(average_grad), 0)
        order = torch.argsort(average_grad, descending=True, stable=True)  # [N]
        new_rows = duplicate.long() + split.long()  # [N]
        allowed = torch.empty_like(duplicate)
        allowed[order] = torch.cumsum(new_rows[order], dim=0) <= room
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


def grow(
    store: GaussianModel,
    duplicate_ids: Tensor,
    split_ids: Tensor,
    revised_opacity: bool,
    generator: torch.Generator,
) -> None:
    """Append copies of the first rows, and replace each of the second rows by two smaller Gaussians in it.

    Args:
        store: N Gaussians; afterwards N + D + S.
        duplicate_ids: [D] rows to copy.
        split_ids: [S] rows to split: one half takes the row's place, the other is appended.
        revised_opacity: Whether the halves' opacity follows arXiv 2404.06109.
        generator: On the CPU, of the halves' positions.

    Raises:
        OutOfMemoryError, InputError: There is no memory for them; nothing has changed.
    """
    num_before = store.num_gaussians
    new_ids = torch.cat([duplicate_ids, split_ids])
    if not len(new_ids):
        return
    scales, quats = store.read("scales")[split_ids], store.read("quats")[split_ids]  # [S, 3], [S, 4]
    noise = torch.randn(2, len(split_ids), 3, generator=generator).to(scales.device)
    offsets = torch.einsum("nij,bnj->bni", rotation_matrices(quats), scales.exp() * noise)  # [2, S, 3]
    means = store.read("means")[split_ids] + offsets  # [2, S, 3]
    values = {"scales": scales - math.log(1.6)}  # the constant of 3DGS (arXiv 2308.04079, 5.2)
    if revised_opacity:
        opacities = torch.sigmoid(store.read("opacities")[split_ids])
        values["opacities"] = torch.logit(1 - torch.sqrt(1 - opacities))
    try:
        store.append_copies(new_ids)
        first_new = num_before + len(duplicate_ids)
        appended_ids = torch.arange(first_new, first_new + len(split_ids), device=split_ids.device)
        store.overwrite(appended_ids, {**values, "means": means[1]})
    except Exception:
        store.truncate(num_before)
        raise
    store.overwrite(split_ids, {**values, "means": means[0]})


def rotation_matrices(quats: Tensor) -> Tensor:
    """Return rotations [N, 3, 3] of quaternions [N, 4] (w x y z) of any length."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def lacking_memory(store: GaussianModel, num_new: int) -> str | None:
    """Return why so many more Gaussians cannot be held, with what bounds growth; None if they can."""
    if num_new == 0:
        return None
    for device, needed in store.growth_bytes(num_new).items():
        free = available_bytes(device)
        if needed > free:
            memory = "host memory" if device.type == "cpu" else "GPU memory"
            return (
                f"Growing from {store.num_gaussians} to {store.num_gaussians + num_new} Gaussians needs "
                f"{format_bytes(needed)} of {memory} and only {format_bytes(free)} are free: set --max_gaussians or "
                "raise --grow_grad2d."
            )
    return None
