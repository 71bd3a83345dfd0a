"""Finds the parts that a view is rendered in, and the rows that each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from offload.culling.cameras import Cameras
from offload.culling.cells import CoveredCells
from offload.pipelines.forwarded import Part, ViewIds
from offload.pipelines.transfer import to_host
from offload.tiles.boxes import Box, Coverage, box_of, plan_boxes
from offload.tiles.budget import MemoryBudget, RowLimit


class PartPlanner:
    """Splits views that exceed a limit into tiles; see `offload/tiles/boxes.py`.

    Plans are made from the present geometry whenever a view is found, in one pass over its rows and only where it may
    exceed the limit; so nothing has to be renewed when densification has changed the scene.
    """

    def __init__(
        self,
        limit: RowLimit | MemoryBudget | None,
        covered_cells: Callable[[Cameras, Tensor], list[CoveredCells]],
    ) -> None:
        """
        Args:
            limit: Of the parts; None: views are never split.
            covered_cells: Gives for each camera the cells that rows [V] may draw in or near.
        """
        self._limit = limit
        self._covered_cells = covered_cells

    def plan(self, cameras: Cameras, ids: Tensor, num_gaussians: int, *, must_fit: bool = True) -> ViewIds:
        """The parts of a view.

        Args:
            cameras: Its cameras.
            ids: [V] int64, the rows that it needs.
            num_gaussians: N.
            must_fit: Whether parts above the limit are refused.

        Raises:
            InputError: No parts keep the limit.
        """
        host_ids, num_pixels = to_host(ids), len(cameras.Ks) * cameras.width * cameras.height
        whole = ViewIds(ids, host_ids, [Part()])
        if self._limit is None or self._limit.allows(len(ids), num_pixels, num_gaussians):
            return whole
        cells, coverages = self._look(cameras, ids)
        plans = self._limit.plan(coverages, len(ids), num_gaussians, must_fit=must_fit)
        if len(plans) == len(plans[0]) == 1:
            return whole
        parts, shared = _parts(plans, coverages, cells)
        return ViewIds(ids, host_ids, parts, shared)

    def refine(self, cameras: Cameras, view: ViewIds, part: Part) -> list[Part]:
        """Parts that have the rows and pixels of one part, each camera's cut until a piece costs half; or one alone,
        where it cannot be cut."""
        limit = self._limit or RowLimit(1.0)
        cells, coverages = self._look(cameras, view.of_part(part)[0])
        plans: list[list[Box]] = []
        for camera, coverage in enumerate(coverages):
            box = coverage.everything if part.tile is None else box_of(part.tile)
            price = limit.cost(coverage.rows(box), coverage.intersections(box), coverage.pixels(box))
            belongs = part.tile is None or part.tile.camera == camera
            plans.append(plan_boxes(coverage, limit.cost, price / 2, box) if belongs else [])
        finer, _ = _parts(plans, coverages, cells)
        if part.rows is None:
            return finer
        return [Part(piece.tile, part.rows[piece.rows], part.host_rows[piece.host_rows]) for piece in finer]

    def _look(self, cameras: Cameras, ids: Tensor) -> tuple[list[CoveredCells], list[Coverage]]:
        cells = self._covered_cells(cameras, ids)
        return cells, [Coverage(covered.corners, cameras.width, cameras.height) for covered in cells]


def _parts(
    plans: Sequence[Sequence[Box]], coverages: Sequence[Coverage], cells: Sequence[CoveredCells]
) -> tuple[list[Part], Tensor | None]:
    """A part for each box of each camera, with the rows that may draw there; and, where there is one camera, the rows
    that several parts have."""
    parts, shared = [], None
    for camera, (boxes, coverage, covered) in enumerate(zip(plans, coverages, cells, strict=True)):
        chosen, shared = covered.rows_in(boxes)
        for box, rows in zip(boxes, chosen, strict=True):
            parts.append(Part(coverage.tile(camera, box), rows, to_host(rows)))
    return parts, to_host(shared) if len(cells) == 1 else None
