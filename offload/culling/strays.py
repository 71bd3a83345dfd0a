"""Rows that may lie anywhere when the next view is drawn: displaced farther than culling's margin allows for.

Culling finds the next view's rows while the present one is rendered. Its margin bounds the steps of Adam, and
displacements up to `AdamOptions.displacement`. A wider one would bring rows in vain that do not move at all, so the few
rows that may move farther, strays, are named by whoever will displace them, and belong to the next view wherever they
lie. So all that is drawn is found, however strong a displacement is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.culling.cells import CoveredCells


class Strays:
    """Hold which rows culling finds for every camera, from before the step that may displace them until it is done."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None  # [F] int64 on the host, sorted; streams of a device do not wait for each other

    def expect(self, ids: Tensor | None) -> None:
        """Find these rows, sorted int64 [F] on any device, for every camera from now on; None: none any more."""
        self._ids = None if ids is None or len(ids) == 0 else ids.cpu()

    def beside(self, ids: Tensor) -> Tensor:
        """Return sorted ids [V] of what cameras may draw together with the strays, each once and sorted."""
        if self._ids is None:
            return ids
        strays = self._ids.to(ids.device)
        places = torch.searchsorted(ids, strays)  # [F] before which of the rows they come
        missing = torch.ones_like(strays, dtype=torch.bool)
        inside = places < len(ids)
        missing[inside] = ids[places[inside]] != strays[inside]
        strays, places = strays[missing], places[missing]
        places += torch.arange(len(places), device=places.device)
        joined = ids.new_empty(len(ids) + len(strays))
        others = torch.ones_like(joined, dtype=torch.bool)
        others[places] = False
        joined[places] = strays
        return joined.masked_scatter_(others, ids)

    def everywhere(self, covered: Sequence[CoveredCells], ids: Tensor) -> list[CoveredCells]:
        """Return in which cells rows may draw, where strays may do so in all of them.

        Args:
            covered: For each camera, the cells of rows [V], where they lie now.
            ids: Sorted int64 [V] on any device, the rows.
        """
        if self._ids is None:
            return list(covered)
        rows = torch.isin(ids, self._ids.to(ids.device)).nonzero().squeeze(1)
        return [_with_whole_rows(each, rows.to(each.cells.device)) for each in covered]


def _with_whole_rows(covered: CoveredCells, rows: Tensor) -> CoveredCells:
    """Let rows [F] cover the whole grid."""
    cells, corners = covered.cells.clone(), covered.corners.copy()
    ends = [end - 1 for end in corners.shape[2:]]  # columns and rows of the grid
    x, y = cells[:, rows].cpu().long().numpy().reshape(2, 2, len(rows))
    drawn = (x[0] < x[1]) & (y[0] < y[1])
    for i in range(2):  # the first and the end along x
        for j in range(2):  # and along y
            for column, line in zip(x[i, drawn], y[j, drawn], strict=True):
                corners[i, j, column, line] -= 1
            corners[i, j, i * ends[0], j * ends[1]] += len(rows)
    whole = cells.new_tensor([0, ends[0], 0, ends[1]])
    cells[:, rows] = whole[:, None].expand(4, len(rows))
    return CoveredCells(cells, corners)
