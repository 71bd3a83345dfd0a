"""How growth is led to a number of Gaussians, and what is said where it has ended below."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

from tqdm import tqdm

from configs import DensificationRules

DOUBLINGS = 40  # lead from one Gaussian to any number
TARGET_TOLERANCE = 0.05  # share of a target that growth may miss


class Target:
    """Say how much each refinement adds so that the last one ends at `target_gaussians`, and remember what lacked."""

    def __init__(
        self, rules: DensificationRules, refinements_from: Callable[[int], Iterator[int]], ends_of_growth: str
    ) -> None:
        """
        Args:
            rules: With the target, 0 where there is none.
            refinements_from: Returns the steps after which there is a refinement, from this step on.
            ends_of_growth: What to raise so that growth goes on.
        """
        self._rules = rules
        self._refinements_from = refinements_from
        self._ends_of_growth = ends_of_growth
        self._led_to: int | None = None  # by doublings alone, from the first refinement of this run on
        self._held_back: set[str] = set()  # by what, at refinements since one that added all it should

    def heading(self, step: int, num_gaussians: int) -> int | None:
        """Return the target, or what can be reached of it; None where there is no target, or growth has ended."""
        if num_gaussians >= self._rules.target_gaussians:
            return None
        left = len(list(islice(self._refinements_from(step + 1), DOUBLINGS)))  # each doubles the number at most
        return min(self._rules.target_gaussians, num_gaussians * 2**left) if left else None

    def plan(self, step: int, num_gaussians: int, num_removed: int, num_shown: int) -> tuple[int, str]:
        """Return how many rows the refinement after a step is to add, and by what it is held back: "" by nothing.

        Args:
            step: From 0.
            num_gaussians: Before the refinement.
            num_removed: Of these, that it will remove.
            num_shown: Of the others, that some view has shown since the refinement before: no others grow.
        """
        growth = planned_growth(self._rules, num_gaussians, num_removed, sum(1 for _ in self._refinements_from(step)))
        if self._led_to is None:
            self._led_to = self.heading(step - 1, num_gaussians) or num_gaussians
        if growth <= num_shown:
            return growth, ""
        return growth, "sight" if num_shown < min(growth, num_gaussians - num_removed) else "doubling"

    def take_in(self, held_back: str) -> None:
        """Take in by what a refinement was held back: sight, doubling or memory; "" where it added all it should."""
        self._held_back = self._held_back | {held_back} if held_back else set()

    def tell(self, num_gaussians: int) -> None:
        """Say, after the last refinement, where growth has ended far below the target."""
        target = self._rules.target_gaussians
        least = (1 - TARGET_TOLERANCE) * target
        if num_gaussians >= least:
            return
        if "memory" in self._held_back:
            cause = "memory for more was lacking; lower --target_gaussians."
        elif "sight" in self._held_back and (self._led_to or 0) >= least:
            cause = (
                "those that no view has shown since the refinement before do not grow; raise --batch_size or "
                f"{self._ends_of_growth}."
            )
        elif self._held_back:
            cause = (
                f"a refinement adds at most as many as there are; raise {self._ends_of_growth} or lower --refine_every."
            )
        else:
            cause = "of those that were added some were removed at once; lower --prune_opa."
        tqdm.write(
            f"Warning: growth ended with {num_gaussians:,} Gaussians, and --target_gaussians is {target:,}: {cause}"
        )


def planned_growth(rules: DensificationRules, num_gaussians: int, num_removed: int, refinements_left: int) -> int:
    """Return how many rows a refinement adds, so that growth ends at `target_gaussians` with the last one.

    Each of the refinements that are left gets the same share of what is missing, and what it removes on top. What one
    of them could not add is spread over those that follow, and so is what was removed otherwise.

    Args:
        rules: With a target.
        num_gaussians: Before the refinement.
        num_removed: Of these, that it will remove.
        refinements_left: This one included.
    """
    missing = rules.target_gaussians - num_gaussians
    return max(num_removed + math.ceil(missing / refinements_left), 0)
