"""What strategies are made of: changes of rows, random choices that all trainers make alike, and room for growth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from configs import DensificationRules
from datasets.free_memory import free_bytes, give_up_for
from distributed.mesh import Ranks, local_ranks
from errors import format_bytes
from offload.device_memory import unallocated_bytes
from offload.models.contract import GaussianModel

SORTED_AGAIN = 0.25  # share of rows that may be out of order before all are sorted
MOST_COPIES = 51  # of one Gaussian at one place, in the correction; gsplat's bound


def generator_at(seeds: Sequence[int], step: int) -> torch.Generator:
    """Return the random numbers of a step: on the CPU, so that devices agree, and alike in a resumed run."""
    return torch.Generator().manual_seed(word_at(seeds, step))


def seeds_of(seed: int, ranks: Ranks | None) -> list[int]:
    """Return seeds of what each process draws for its own rows; they have the same numbers at every rank."""
    return [seed] if ranks is None else [seed, ranks.rank]


def word_at(seeds: Sequence[int], step: int) -> int:
    """Return 32 random bits that follow from seeds and a step."""
    return int(np.random.SeedSequence([*seeds, step]).generate_state(1)[0])


def drawn_rows(info: Mapping[str, Any]) -> Tensor:
    """Return which rows a packed rendering has drawn, int64 [D], each once.

    Args:
        info: Of `rendering.rasterize`.
    """
    rows = info["gaussian_ids"]  # [nnz], once for each camera that shows it
    return rows if info["n_cameras"] == 1 else rows.unique()


def grow(
    model: GaussianModel,
    duplicate_ids: Tensor,
    split_ids: Tensor,
    revised_opacity: bool,
    generator: torch.Generator,
) -> None:
    """Append copies of the first rows, and replace each of the second rows by two smaller Gaussians in it.

    Args:
        model: N Gaussians; afterwards N + D + S.
        duplicate_ids: [D] rows to copy.
        split_ids: [S] rows to split: one half takes the row's place, the other is appended.
        revised_opacity: Whether the halves' opacity follows arXiv 2404.06109.
        generator: On the CPU, of the halves' positions.

    Raises:
        OutOfMemoryError, InputError: There is no memory for them; nothing has changed.
    """
    num_before = model.num_gaussians
    new_ids = torch.cat([duplicate_ids, split_ids])
    if not len(new_ids):
        return
    scales, quats = model.read("scales", split_ids), model.read("quats", split_ids)  # [S, 3], [S, 4]
    means = model.read("means", split_ids)  # [S, 3]
    noise = noise_of_halves(means, generator)  # [2, S, 3]
    offsets = torch.einsum("nij,bnj->bni", rotation_matrices(quats), scales.exp() * noise)  # [2, S, 3]
    means = means + offsets  # [2, S, 3]
    values = {"scales": scales - math.log(1.6)}  # the constant of 3DGS (arXiv 2308.04079, 5.2)
    if revised_opacity:
        opacities = torch.sigmoid(model.read("opacities", split_ids))
        values["opacities"] = torch.logit(1 - torch.sqrt(1 - opacities))
    try:
        model.append_copies(new_ids)
        first_new = num_before + len(duplicate_ids)
        appended_ids = torch.arange(first_new, first_new + len(split_ids), device=split_ids.device)
        model.overwrite(appended_ids, {**values, "means": means[1]})
    except Exception:
        model.truncate(num_before)
        raise
    model.overwrite(split_ids, {**values, "means": means[0]})


def noise_of_halves(means: Tensor, generator: torch.Generator) -> Tensor:
    """Draw where the halves of rows with these means [S, 3] lie: [2, S, 3], in units of their axes."""
    return torch.randn(2, len(means), 3, generator=generator).to(means.device)


def rotation_matrices(quats: Tensor) -> Tensor:
    """Return rotations [N, 3, 3] of quaternions [N, 4] (w x y z) of any length."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def sample_by_weight(weights: Tensor, count: int, generator: torch.Generator, ranks: Ranks | None = None) -> Tensor:
    """Draw rows with replacement, each with a probability in proportion to its weight.

    Args:
        weights: [N] of this process's rows, at least 0, and above 0 somewhere, if only at another rank.
        count: M.
        generator: On the CPU; that of all ranks gives the same numbers.
        ranks: From whose rows together M are drawn, each of which its rank gets; all of them call this at once.

    Returns:
        int64 [M] where the weights are; where ranks draw together, those of this one.
    """
    eligible = torch.where(weights > 0)[0]
    ends = weights[eligible].double().cumsum(0)
    places = torch.rand(count, dtype=torch.float64, generator=generator).to(ends.device)
    if ranks is None:
        places = places * ends[-1]
    else:
        totals = ranks.gather(float(ends[-1]) if len(ends) else 0.0)
        before = [sum(totals[:rank]) for rank in range(ranks.size)]  # the same floats everywhere: each is drawn once
        after = [*before[1:], math.inf]
        if not any(totals[ranks.rank + 1 :]):
            after[ranks.rank] = math.inf  # rounding brings nothing to those behind, who have no rows
        places = places * sum(totals)
        places = places[(places >= before[ranks.rank]) & (places < after[ranks.rank])] - before[ranks.rank]
        if len(eligible) == 0:
            return eligible
    return eligible[torch.searchsorted(ends, places, right=True).clamp_(max=len(eligible) - 1)]


def _correction_table() -> Tensor:
    """Return C(n, j) (-1)^(j-1) / sqrt(j), float64 [MOST_COPIES + 1, MOST_COPIES + 1], for n rows and j columns."""
    size = MOST_COPIES + 1
    return torch.tensor(
        [[math.comb(n, j) * (-1) ** (j - 1) / math.sqrt(j) if j else 0.0 for j in range(size)] for n in range(size)],
        dtype=torch.float64,
    )


def shared_opacities_and_shrinking(opacities: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what n Gaussians at one place must be so that together they draw what one has drawn.

    With o the opacity of the one (3DGS-MCMC, arXiv 2404.09591, equation 9):

        o_n = 1 - (1 - o)^(1/n)
        s_n / s = o / sum_{i=1..n} sum_{k=0..i-1} C(i-1, k) (-1)^k o_n^(k+1) / sqrt(k+1)

    The inner sums over i are sums of binomials, C(n, k+1), so that one sum is left, over j = k + 1.

    Args:
        opacities: [M] in (0, 1).
        copies: [M] integers, n; more than `MOST_COPIES` count as that many.

    Returns:
        Opacities [M] and the factors [M] of the standard deviations, both float64.
    """
    copies = copies.clamp(1, MOST_COPIES)
    opacities = opacities.double()
    shared = -torch.expm1(torch.log1p(-opacities) / copies)
    table = _correction_table().to(opacities.device)
    total = torch.zeros_like(shared)
    for j in range(MOST_COPIES, 0, -1):  # Horner's rule, a pass for each j, so that memory stays flat
        total = (total + table[copies, j]) * shared
    return shared, opacities / total


def is_worth_sorting(num_misplaced: int, num_gaussians: int, *, is_last: bool) -> bool:
    """Return whether rows shall be put into Morton order again, in which those of a view come in runs.

    Appended rows are in runs of their own, which are the shorter, the fewer there are. Once they are some tenths
    of all, fetching and committing the rows of a view takes up to a fifth more time (a half more where the order
    is random), and sorting takes as long as some tens of steps. So it is done each time that the rows have grown
    by a share, which adds up to a few times the cost of the last time, and after the last refinement.

    Args:
        num_misplaced: Rows that were appended or relocated since all were sorted, at most.
        num_gaussians: N.
        is_last: Whether no refinement will follow.
    """
    return num_misplaced > (0 if is_last else SORTED_AGAIN * num_gaussians)


class RoomForGrowth:
    """Ask for memory before rows are added, and say once that there is none; ranks that train together ask at once."""

    def __init__(self, remedy: str, ranks: Ranks | None = None) -> None:
        """
        Args:
            remedy: What bounds growth.
            ranks: That train together; None: there is this process only.
        """
        self._remedy = remedy
        self._ranks = ranks
        self._told = False

    def holds(self, model: GaussianModel, num_new: int) -> bool:
        """Return whether so many more Gaussians can be held, by each rank its own; kept pictures make way for them."""
        needed = _growth_bytes(model, num_new).get(torch.device("cpu"), 0)
        if self._ranks is None:
            give_up_for(needed)
        else:
            give_up_for(self._ranks.sums([needed])[0], local_ranks())  # as if all were on this machine
            self._ranks.barrier()  # what one finds free is what is left when all have given up theirs
        return not self.tell_any(lacking_memory(model, num_new, self._remedy))

    def tell_any(self, sentence: str | None) -> bool:
        """Say why rows are not added, where this process or another rank has a sentence; return whether one has."""
        sentences = [sentence] if self._ranks is None else self._ranks.gather(sentence)
        lacks = [each for each in sentences if each is not None]
        if lacks:
            self.tell(lacks[0])
        return bool(lacks)

    def tell(self, sentence: str) -> None:
        """Say, the first time only, why rows are not added."""
        if not self._told:
            tqdm.write(f"Warning: {sentence} Gaussians that do not fit are not added.")
        self._told = True


def defaults_of(rules: DensificationRules, *names: str) -> dict[str, str]:
    """Return the defaults of these options, as they are given, where rules have other values."""
    defaults = DensificationRules()
    return {name: str(getattr(defaults, name)) for name in names if getattr(rules, name) != getattr(defaults, name)}


def lacking_memory(model: GaussianModel, num_new: int, remedy: str) -> str | None:
    """Return why so many more Gaussians cannot be held, with what bounds growth; None if they can."""
    for device, needed in _growth_bytes(model, num_new).items():
        memory = "host memory" if device.type == "cpu" else "GPU memory"
        free = free_bytes() if device.type == "cpu" else unallocated_bytes(device)
        if needed > free:
            return (
                f"Growing from {model.num_gaussians:,} to {model.num_gaussians + num_new:,} Gaussians needs "
                f"{format_bytes(needed)} of {memory} and only {format_bytes(free)} are free: {remedy}."
            )
    return None


def _growth_bytes(model: GaussianModel, num_new: int) -> dict[torch.device, int]:
    return {} if num_new == 0 else model.growth_bytes(num_new)
