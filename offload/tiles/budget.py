"""How large the tiles may be that a view is rendered in: a number of rows, or what fits into a memory budget."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from errors import format_bytes
from offload.errors import MemoryParameterError, ParameterError
from offload.store.layout import StateFormat, num_columns, row_bytes
from offload.tiles.boxes import Box, Coverage, Numbers, halved, plan_boxes

HEADROOM = 0.08  # share of a budget that plans leave free, for fragments and for what the model does not know
CALIBRATION_TILES = 12  # tiles that are measured by themselves; afterwards the peaks are only watched
MEMORY_OF_PEAKS = 200  # tiles
PRIOR_WEIGHT = 0.02  # of the constants below against one measured tile

# Bytes of one row in a tile, beside its values, before anything is measured: their gradient and, with all gradients,
# activated scales and opacities (32), positions, conics, colours, depths, radii and ids on the screen (150). The bound
# that `training.memory_estimate` has for a view before it starts is 200.
RENDERING_BYTES = 180
INTERSECTION_BYTES = 24  # keys and values of 12 bytes, sorted out of place
PIXEL_BYTES = 100  # rendering and photos, SSIM's derivatives, gradients, alphas: as `training.memory_estimate` adds up
PAIR_BYTES = 150  # of the above: what a row has on the screen, in one picture
# Of a pair that is sent to another process or comes from one, there and back: more than the 48 + 44 bytes that travel
# (`distributed.exchange`), since columns lie beside the packed rows that are made of them.
EXCHANGED_BYTES = 160
CAMERA_BYTES = 28  # of a row of the view and each further camera: cells that it may draw in, gradients on the screen


@dataclass(frozen=True)
class Load:
    """Say what one process has to hold while it takes part in drawing tiles together."""

    rows: int  # that it brings
    made: int  # pairs of a camera and a row that it projects
    sent: int  # those of them that are in a tile
    drawn: int  # pairs in its own tile, from all processes
    intersections: int  # of these with cells
    pixels: int


class RowLimit:
    """Allows at most a share of all Gaussians in each tile."""

    def __init__(self, threshold: float) -> None:
        """
        Args:
            threshold: The share, above 0 and at most 1.

        Raises:
            ParameterError: It is not.
        """
        if not 0 < threshold <= 1:
            raise ParameterError(f"{{split_threshold}} is {threshold}, but must be above 0 and at most 1.")
        self.threshold = threshold

    def allows(self, num_visible: int, num_pixels: int, num_gaussians: int) -> bool:
        """Tell whether a view may be rendered whole, wherever its rows are."""
        return num_visible <= self.threshold * num_gaussians

    def plan(
        self, coverages: Sequence[Coverage], num_visible: int, num_gaussians: int, *, must_fit: bool = True
    ) -> list[list[Box]]:
        """Return the boxes of each camera's picture: above the limit where no cut helps, whatever `must_fit` says."""
        return self.cut(coverages, num_visible, num_gaussians)

    def cut(
        self, coverages: Sequence[Coverage], num_visible: int, num_gaussians: int, share: float = 1.0
    ) -> list[list[Box]]:
        """Return the same with a share of the limit; `allows_together` asks for no smaller one."""
        return [plan_boxes(coverage, self.cost, share * self.threshold * num_gaussians) for coverage in coverages]

    def allows_together(self, loads: Sequence[Load], num_visible: int) -> bool:
        """Return True: a tile bounds the pairs in it, and of the rows a process brings its own for all tiles."""
        return True

    def cost(self, rows: Numbers, intersections: Numbers, pixels: Numbers) -> Numbers:
        """Return the number of rows."""
        return rows

    def refine(self, coverage: Coverage, box: Box) -> list[Box]:
        """Cut a box that memory has not sufficed for, until each has half of its rows.

        Where no cut makes rows fewer, as of large Gaussians near the camera that draw everywhere, it is cut until each
        takes half as much for pixels and what is sorted of the rows; it stays one where it has the smallest size.
        """
        finer = halved(coverage, self.cost, box)
        return finer if len(finer) > 1 else halved(coverage, _on_the_screen, box)

    def exceeded(self) -> None:
        """Do nothing: what a tile takes of memory does not change how many rows it may have."""


@dataclass(frozen=True)
class RowBytes:
    """Says what rows take of the device, in bytes."""

    values: int  # of a row in a tile, as it travels
    geometry: int  # its geometry and the gradient of that, where geometry is on the device
    view: int  # of a row of the view, whether or not it is in the present tile
    everywhere: int  # of every Gaussian
    exchanged: int = 0  # of a pair that is sent, or drawn, where processes draw together

    @staticmethod
    def of(
        geometry: Literal["device", "host"], sh_degree: int, state: StateFormat = "float32", *, together: int = 0
    ) -> RowBytes:
        """Return what rows of `TiledGaussians` take.

        Args:
            geometry: Where it is.
            sh_degree: Degree of the spherical harmonics.
            state: The form of rows.
            together: Cameras of a view, where several processes draw them; 0: one does.
        """
        appearance, host_geometry = (4 * num_columns(group, sh_degree, state) for group in ("appearance", "geometry"))
        # Ids, those of the next view, positions in it, gradients on the screen.
        view = 32 + CAMERA_BYTES * max(together - 1, 0)
        exchanged = EXCHANGED_BYTES if together else 0
        if geometry == "host":
            return RowBytes(appearance + host_geometry, 0, view, 0, exchanged)
        # Geometry, its moments and densification's statistics of each; summed gradients of those in view. Compact rows
        # have the constant colour too.
        if state == "compact":
            rows = row_bytes("geometry", sh_degree, state=state, tight=True)
            return RowBytes(appearance, 2 * 64, view + 56, rows + 12, exchanged)
        return RowBytes(appearance, 2 * 44, view + 44, 3 * 44 + 12, exchanged)


class MemoryBudget:
    """Allows tiles that fit into so many bytes of device memory, by a model of what rendering them takes.

        peak = fixed + view * V + values * (rows + rows of the next tile)
               + (rendering * rows + intersection * intersections + pixel * pixels)

    `fixed` is measured between steps. The constants of the second line start as the ones above and are fitted, by
    ridge regression towards those, to the peaks of the first tiles; afterwards the largest ratio of a measured peak to
    a predicted one, over the last tiles, is a factor on them. On the CPU nothing is measured.

    Where processes draw together, rows are those that this one brings for all tiles of a round, and pairs on the
    screen, sent and drawn, count as so many rows more (`Load`).
    """

    def __init__(self, budget: int, row_bytes: RowBytes, num_gaussians: int) -> None:
        """
        Args:
            budget: Bytes that there are.
            row_bytes: What rows take.
            num_gaussians: How many training begins with.

        Raises:
            ParameterError: They do not fit, even before any view is rendered.
        """
        everywhere = row_bytes.everywhere * num_gaussians
        if everywhere > (1 - HEADROOM) * budget:
            raise MemoryParameterError(
                f"{{device_memory_budget}} is {format_bytes(budget)}, but the geometry of {num_gaussians:,} Gaussians "
                f"alone takes {mebibytes(everywhere / (1 - HEADROOM))}: give it more than that, or {{geometry}} host."
            )
        self.budget = budget
        self.fixed = everywhere  # bytes
        self._row_bytes = row_bytes
        rendering = row_bytes.values + row_bytes.geometry + RENDERING_BYTES
        self._prior = np.array([rendering, INTERSECTION_BYTES, PIXEL_BYTES], np.float64)
        self._constants = self._prior
        self._samples: list[tuple[np.ndarray, float]] = []
        self._ratios: deque[float] = deque(maxlen=MEMORY_OF_PEAKS)

    @property
    def is_calibrated(self) -> bool:
        return len(self._samples) >= CALIBRATION_TILES

    @property
    def factor(self) -> float:
        """Return by how much rendering has exceeded the model, at most; 1 before anything is known."""
        return max(self._ratios, default=1.0)

    def cost(self, rows: Numbers, intersections: Numbers, pixels: Numbers) -> Numbers:
        """Return the bytes that tiles take while they are rendered, without the rows of the next tile."""
        # Drawn together, a tile's pairs are sent and drawn; of its rows others bring a part, as this one of theirs.
        as_rows = rows * (1 + 2 * self._row_bytes.exchanged / self._prior[0])
        return self._row_bytes.values * rows + self._rendering(as_rows, intersections, pixels)

    def refine(self, coverage: Coverage, box: Box) -> list[Box]:
        """Cut a box that memory has not sufficed for, until each costs half; it stays one at the smallest size."""
        return halved(coverage, self.cost, box)

    def as_rows(self, rows: int, made: int, exchanged: int) -> int:
        """Count rows together with pairs made of them, beyond one each, and pairs sent and drawn, as so many rows."""
        more = PAIR_BYTES * max(made - rows, 0) + self._row_bytes.exchanged * exchanged
        return rows + math.ceil(more / self._prior[0])

    def allows_together(self, loads: Sequence[Load], num_visible: int) -> bool:
        """Tell whether tiles may be drawn with these loads, one after the other; for a view of so many rows here."""
        return self._highest(loads) <= self._room(num_visible)

    def needs_together(self, loads: Sequence[Load], num_visible: int) -> float:
        """Return the smallest budget in bytes that would allow these loads."""
        fixed = self.fixed + self._row_bytes.view * num_visible
        return (fixed + self._highest(loads)) / (1 - HEADROOM)

    def _highest(self, loads: Sequence[Load]) -> float:
        """Return the most bytes that any of the loads takes, with the rows of the next one; as the first's follow."""
        following = [*loads[1:], loads[0]]
        return max(
            self._row_bytes.values * (load.rows + after.rows)
            + self._rendering(
                self.as_rows(load.rows, load.made, load.sent + load.drawn), load.intersections, load.pixels
            )
            for load, after in zip(loads, following, strict=True)
        )

    def _rendering(self, rows: Numbers, intersections: Numbers, pixels: Numbers) -> Numbers:
        x = self._constants[0] * rows + self._constants[1] * intersections + self._constants[2] * pixels
        return self.factor * x

    def allows(self, num_visible: int, num_pixels: int, num_gaussians: int) -> bool:
        """Tell whether a view may be rendered whole, wherever its rows are: with 16 cells met by each."""
        cost = float(self.cost(num_visible, 16 * num_visible, num_pixels))
        return cost + self._row_bytes.values * num_visible <= self._room(num_visible)

    def plan(
        self, coverages: Sequence[Coverage], num_visible: int, num_gaussians: int, *, must_fit: bool = True
    ) -> list[list[Box]]:
        """Return the boxes that each camera's picture is cut into.

        Raises:
            ParameterError: No tiles fit although they must; naming the smallest budget for which there are any.
        """
        limit = self._limit(coverages, num_visible)
        plans = self.cut(coverages, num_visible, num_gaussians)
        dearest = max(
            self._cost_of(coverage, box) for coverage, boxes in zip(coverages, plans, strict=True) for box in boxes
        )
        if must_fit and dearest > limit:
            least = mebibytes(self._smallest(coverages, num_visible))
            raise MemoryParameterError(
                f"{{device_memory_budget}} is too small for a view of {num_visible:,} Gaussians, however it is split: "
                f"give it at least {least}.",
                {"device_memory_budget": least},
            )
        return plans

    def cut(
        self, coverages: Sequence[Coverage], num_visible: int, num_gaussians: int, share: float = 1.0
    ) -> list[list[Box]]:
        """Return the boxes that each camera's picture is cut into by a share of the limit, whether or not they fit."""
        limit = share * self._limit(coverages, num_visible)
        return [plan_boxes(coverage, self.cost, limit) for coverage in coverages]

    def observe(self, rows: int, intersections: int, pixels: int, grown: int, peak: int) -> None:
        """Take in what rendering a tile has taken.

        Args:
            rows, intersections, pixels: Those of the tile; rows as `as_rows` counts them.
            grown: Bytes by which memory grew from before the tile, whose rows were there, to its peak, but for the next
                tile's rows.
            peak: Bytes in use at the peak.
        """
        x = np.array([rows, intersections, pixels], np.float64)
        if self.is_calibrated:
            self._ratios.append(grown / max(float(self._constants @ x), 1.0))
            if peak > self.budget:
                self.exceeded()
            return
        self._samples.append((x, float(max(grown, 1))))
        self._fit()
        if self.is_calibrated:
            self._ratios.extend(y / max(float(self._constants @ x), 1.0) for x, y in self._samples)

    def exceeded(self) -> None:
        """Plan smaller tiles: one has taken more than there is."""
        self._ratios.append(1.15 * self.factor)

    def _fit(self) -> None:
        """Fit the constants by ridge regression in relative terms: each tile counts alike, whatever its size."""
        scale = math.sqrt(PRIOR_WEIGHT)
        A = np.vstack([*(x * self._prior / y for x, y in self._samples), scale * np.eye(3)])
        b = np.concatenate([np.ones(len(self._samples)), np.full(3, scale)])
        self._constants = self._prior * np.linalg.lstsq(A, b, rcond=None)[0].clip(0.1, 10)

    def _room(self, num_visible: int) -> float:
        return self.budget * (1 - HEADROOM) - self.fixed - self._row_bytes.view * num_visible

    def _limit(self, coverages: Sequence[Coverage], num_visible: int) -> float:
        """Return what a tile may cost, so that as many rows as it may have fit beside it for the next tile."""
        return self._room(num_visible) / self._with_next_tile(coverages)

    def _with_next_tile(self, coverages: Sequence[Coverage]) -> float:
        """Return what tiles of a view cost together with the rows of the next one, over what they cost alone."""
        boxes = [(coverage, coverage.everything) for coverage in coverages]
        rows = sum(float(coverage.rows(box)) for coverage, box in boxes)
        return 1 + self._row_bytes.values * rows / sum(self._cost_of(*box) for box in boxes)

    def _cost_of(self, coverage: Coverage, box: Box) -> float:
        return float(self.cost(coverage.rows(box), coverage.intersections(box), coverage.pixels(box)))

    def _smallest(self, coverages: Sequence[Coverage], num_visible: int) -> float:
        """Return the smallest budget in bytes for which there is a plan."""
        finest = max(
            self._cost_of(coverage, box) for coverage in coverages for box in plan_boxes(coverage, self.cost, 0)
        )
        fixed = self.fixed + self._row_bytes.view * num_visible
        return (fixed + finest * self._with_next_tile(coverages)) / (1 - HEADROOM)


def _on_the_screen(rows: Numbers, intersections: Numbers, pixels: Numbers) -> Numbers:
    """Return the bytes that rendering tiles takes, but for what each row takes however large the tile is."""
    return INTERSECTION_BYTES * intersections + PIXEL_BYTES * pixels


def mebibytes(num_bytes: float) -> str:
    return f"{math.ceil(num_bytes / 2**20)} MiB"
