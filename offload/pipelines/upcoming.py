"""The next view, found ahead, as part of the state that training goes on from.

upcoming/ids      [V]      int64, its rows
upcoming/tiles    [P, 5]   int64, the tile of each of its parts; only where it is rendered in parts
upcoming/rows     [R]      int64, which of the view's rows each part has, one part after the other
upcoming/counts   [P]      int64, how many those are
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.adam.state import State
from offload.pipelines.forwarded import Part, ViewIds
from offload.tiles.boxes import Tile


def upcoming_state(view: ViewIds | None) -> dict[str, Tensor]:
    """A view by name; nothing where there is none."""
    if view is None:
        return {}
    state = {"upcoming/ids": view.host_ids}
    if all(part.tile is not None for part in view.parts):
        state["upcoming/tiles"] = torch.tensor([tuple(part.tile) for part in view.parts])
        state["upcoming/rows"] = torch.cat([part.host_rows for part in view.parts])
        state["upcoming/counts"] = torch.tensor([len(part.host_rows) for part in view.parts])
    return state


def upcoming_view(state: State, device: torch.device) -> ViewIds | None:
    """The view of a state, for the device where geometry is; None where there is none."""
    if "upcoming/ids" not in state:
        return None
    host_ids = state["upcoming/ids"].clone()
    parts = [Part()]
    if "upcoming/tiles" in state:
        rows = state["upcoming/rows"].clone().split(state["upcoming/counts"].tolist())
        tiles = (Tile(*tile) for tile in state["upcoming/tiles"].tolist())
        parts = [Part(tile, part.to(device), part) for tile, part in zip(tiles, rows, strict=True)]
    return ViewIds(host_ids.to(device), host_ids, parts)
