"""Forwards the rows of views tile by tile, where a view is rendered in several tiles.

The device holds the rows of one tile and of the next. Behind tile p the worker commits the rows that tile p - 1 alone
has, adds up the gradients of rows that several tiles have, and uploads tile p + 1, with the values from before the
step. All that `offload/pipelines/forwarded.py` says of a view holds for its last tile together with the rows that
several tiles have; and a view in one tile takes the way of that file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from offload.adam.harmonics import HarmonicsGradient
from offload.adam.host import DeferredAdam
from offload.culling.cameras import Cameras
from offload.culling.visible import VisibleRows, to_host
from offload.pipelines.contract import fetched
from offload.pipelines.forwarded import Ahead, ForwardedPipeline, ForwardedRows, Upcoming, shared_positions
from offload.pipelines.groups import RowGroup
from offload.pipelines.transfer import Downloaded
from offload.tiles.boxes import Tile
from offload.tiles.planner import TiledRows, TileRows


class _Progress:
    """Hold how far a view has been rendered tile by tile; gradients of rows that several tiles have add up here."""

    def __init__(self, view: TiledRows, columns: Mapping[str, int]) -> None:
        self.view = view
        self.index = 0  # of the tile that is being rendered
        self.slots = torch.zeros(0, dtype=torch.int32)  # [V] row of `sums`; -1: one tile has it; [0] of a whole view
        self.sums = {name: torch.zeros(0, count) for name, count in columns.items()}  # [S, columns]
        if len(view.tiles) > 1:
            self._share(self._shared_rows() if view.shared is None else view.shared)

    @property
    def tile(self) -> TileRows:
        return self.view.tiles[self.index]

    @property
    def is_last(self) -> bool:
        return self.index == len(self.view.tiles) - 1

    @property
    def is_whole(self) -> bool:
        """Tell whether all rows are rendered together."""
        return self.tile.rows is None

    def replace_tile(self, finer: Sequence[TileRows]) -> None:
        """Render these tiles instead of the present one; together they have its rows."""
        self.view.tiles[self.index : self.index + 1] = finer
        self._share(self._shared_rows())

    def divide(self, tile: TileRows) -> tuple[Tensor, Tensor]:
        """Return positions in a tile of the rows that it alone has, and of the others."""
        shared = self.slots[tile.numbers()] >= 0  # [T]
        return (~shared).nonzero().squeeze(1), shared.nonzero().squeeze(1)

    def waiting(self) -> Tensor:
        """Return the rows [W] of the view that miss a gradient until its last tile has been rendered."""
        waits = self.slots >= 0
        waits[self.view.tiles[-1].numbers()] = True
        return waits.nonzero().squeeze(1)

    def _share(self, shared: Tensor) -> None:
        """Give a row of `sums` to each of these rows of the view that has none."""
        if len(self.slots) == 0:
            self.slots = torch.full((len(self.view.host_ids),), -1, dtype=torch.int32)
        new = shared[self.slots[shared] < 0]
        first = 0
        for name, sums in self.sums.items():
            first, columns = sums.shape
            self.sums[name] = torch.cat([sums, torch.zeros(len(new), columns)])
        self.slots[new] = torch.arange(first, first + len(new), dtype=torch.int32)

    def _shared_rows(self) -> Tensor:
        """Return the rows [S] of the view that several of its coming tiles have."""
        seen, again = torch.zeros(2, len(self.view.host_ids), dtype=torch.bool)
        for tile in self.view.tiles[self.index :]:
            again[tile.numbers()] |= seen[tile.numbers()]
            seen[tile.numbers()] = True
        return again.nonzero().squeeze(1)


class TiledPipeline(ForwardedPipeline):
    """Brings the rows of each view, tile by tile, to the device and their gradients back; see the head of this file.

    A step is `begin` and, for each tile, `fetch_tile`, `prefetch`, rendering and backward pass, and `next_tile`; after
    the last tile `update` takes the place of `next_tile`.
    """

    def __init__(
        self,
        groups: Mapping[str, RowGroup[DeferredAdam]],
        find: Callable[[Cameras], TiledRows],
        device: torch.device,
    ) -> None:
        """
        Args:
            groups: What travels.
            find: Gives the rows that cameras may draw after one more step, and the tiles to render them in.
            device: Where views are rendered.
        """
        super().__init__(groups, lambda cameras: find(cameras).ids, device)
        self._plan = find
        self._progress: _Progress | None = None

    # ------------------------------------------------------------------------------------ a training step in tiles

    def begin(self, cameras: Cameras) -> TiledRows:
        """Begin a step on the view of these cameras.

        Raises:
            ParameterError: No tiles of it keep the limit. The step before is complete.
        """
        view = cast(TiledRows, self._begin(cameras))  # from `_find`
        if view.refusal is not None:
            self._present = None
            self._ahead.forget()
            raise view.refusal
        self._progress = _Progress(view, {name: group.adam.columns for name, group in self._groups.items()})
        return view

    @property
    def tile(self) -> TileRows:
        """Return the tile of the present view that is to be rendered."""
        return fetched(self._progress).tile

    @property
    def is_last(self) -> bool:
        """Tell whether that is the view's last tile."""
        return fetched(self._progress).is_last

    def fetch_tile(self) -> ForwardedRows:
        """Return the rows of the present tile, with the values they have after the last step."""
        progress = fetched(self._progress)
        rows = progress.view.of_tile(progress.tile)
        return self._bring(rows.ids, rows.host_ids)

    def prefetch(self, cameras: Cameras | None) -> None:
        """Let the worker commit what is owed and forward the rows that come next, while this tile is rendered.

        Args:
            cameras: Of the next view, for which the last tile of the present one makes way; None where the rows of the
                store will change before it.
        """
        progress = fetched(self._progress)
        if not progress.is_last:
            rows = progress.view.of_tile(progress.view.tiles[progress.index + 1])
            self._ahead.begin(self._prepare_tile, rows.host_ids)
        elif cameras is not None:
            super().prefetch(cameras)

    def abandon_tile(self) -> None:
        """Forget the present tile's rows and gradients, and what was prefetched; `fetch_tile` brings the rows again."""
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            self._ahead.result()
        self._ahead.forget()
        self._rows = None

    def replace_tile(self, finer: Sequence[TileRows]) -> None:
        """Render these tiles instead of the present one, which was abandoned; together they have its rows."""
        fetched(self._progress).replace_tile(finer)

    def next_tile(self) -> None:
        """Take in the gradients of the present tile and go on to the next one of the view."""
        self._ahead.result()
        self._commit_all_owed()
        progress, host_ids, gradients = fetched(self._progress), fetched(self._rows).host_ids, self._take_gradients()
        self._begin_step()
        tile = progress.tile
        downloads = {name: self._transfers[name].download(gradient) for name, gradient in gradients.items()}

        def commit_tile() -> None:
            alone, shared = progress.divide(tile)
            slots = progress.slots[tile.numbers()[shared]].long()
            self._commit(host_ids[alone], alone, downloads)
            for name, download in downloads.items():
                arrived = self._arrived(download)
                with self._times.on_host("worker_commit"):
                    progress.sums[name][slots] += arrived[shared]

        self._applied = True
        self._owed.append(commit_tile)
        self._rows = None
        progress.index += 1

    def update(self, made: HarmonicsGradient | None = None) -> None:
        """Take in the gradients of the view's last tile and end the step; the worker commits them at once.

        Args:
            made: As for `ForwardedPipeline.update`, where the view has one tile.
        """
        progress = fetched(self._progress)
        if progress.is_whole:
            super().update(made)
            return
        present, gradients, downloads, ahead = self._gradients_and_ahead()
        # What takes most device memory comes before anything is changed, so that it can be done again.
        alone, shared = progress.divide(progress.tile)
        summed = self._download_urgently(shared, gradients)
        upcoming = None if ahead is None else ahead.upcoming
        gradient_rows, urgent = self._urgent_gradients(upcoming, progress, gradients)
        self._applied = self._is_ending = True
        displaced_ids = self._displace(present)
        slots = progress.slots[progress.tile.numbers()[shared]].long()
        for name, download in summed.items():
            progress.sums[name][slots] += self._arrived(download)
        remains = torch.ones(len(present.host_ids), dtype=torch.bool)  # [V]
        if ahead is not None and upcoming is not None:
            self._update_shared(
                ahead,
                upcoming,
                lambda name: torch.cat([self._arrived(urgent[name]), progress.sums[name]]),
                gradient_rows,
            )
            self._forward_again(ahead, upcoming, displaced_ids)
            remains[upcoming.shared_before] = False
        sums = {name: Downloaded(rows, None) for name, rows in progress.sums.items()}
        several = (remains & (progress.slots >= 0)).nonzero().squeeze(1)
        self._owed.append(partial(self._commit, present.host_ids[several], progress.slots[several].long(), sums))
        alone = alone[remains[progress.tile.numbers()[alone]]]
        self._owed.append(partial(self._commit, present.host_ids[progress.tile.numbers()[alone]], alone, downloads))
        self._end_step()

    # ---------------------------------------------------------------------------------------------- device memory

    def uploaded_bytes(self) -> int:
        """Count the device memory of what was prefetched, rows and numbers of rows; waits for it.

        Where that has run out of memory nothing is there, and who needs the rows brings them.
        """
        try:
            ahead = self._ahead.result()
        except torch.cuda.OutOfMemoryError:
            ahead = None
        if ahead is None:
            return 0
        tensors = [upload.rows for upload in ahead.uploads.values()]
        if ahead.upcoming is not None:
            view = cast(TiledRows, ahead.upcoming.rows)
            tensors += [view.ids, *(tile.rows for tile in view.tiles if tile.rows is not None)]
        return sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)

    def arrived_bytes(self) -> int | None:
        """Count the same without waiting; None while it is on its way."""
        return None if self._ahead.is_under_way else self.uploaded_bytes()

    # ----------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """Return what is known of the next view and its tiles, as `offload.adam.state` names it; between steps.

        upcoming/ids      [V]      int64, its rows
        upcoming/tiles    [T, 5]   int64, the tiles; only where it is not whole
        upcoming/together [P]      int64, how many of these are drawn together, where that is not one each
        upcoming/rows     [R]      int64, which of the view's rows are for what is drawn together, one after the other
        upcoming/counts   [P]      int64, how many those are
        """
        state, view = super().state(), cast("TiledRows | None", self.upcoming)
        parts = [] if view is None else [part for part in view.tiles if part.tiles]
        if parts:
            together = [len(part.tiles) for part in parts]
            state["upcoming/tiles"] = torch.tensor([tuple(tile) for part in parts for tile in part.tiles])
            state["upcoming/rows"] = torch.cat([part.numbers() for part in parts])
            state["upcoming/counts"] = torch.tensor([len(part.numbers()) for part in parts])
            if together != [1] * len(parts):
                state["upcoming/together"] = torch.tensor(together)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the next view and its tiles from a state, or none, where it has none."""
        super().load_state(state)
        if self._found is None:
            return
        tiles = [TileRows()]
        if "upcoming/tiles" in state:
            rows = state["upcoming/rows"].clone().split(state["upcoming/counts"].tolist())
            places = iter(Tile(*tile) for tile in state["upcoming/tiles"].tolist())
            together = state.get("upcoming/together", torch.ones(len(rows), dtype=torch.int64)).tolist()
            tiles = [
                TileRows(tuple(islice(places, count)), self._where_geometry_is(host_rows), host_rows)
                for count, host_rows in zip(together, rows, strict=True)
            ]
        self._found = TiledRows(self._found.ids, self._found.host_ids, tiles)

    # --------------------------------------------------------------------------------------------------- inside

    def _begin_whole(self, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """Begin a step on a view in one tile; return its ids [V], where geometry is and on the host.

        Raises:
            RuntimeError: It has several tiles.
        """
        view = self.begin(cameras)
        if len(view.tiles) > 1:
            raise RuntimeError("A view in several tiles is fetched tile by tile.")
        rows = view.of_tile(view.tiles[0])
        return rows.ids, rows.host_ids

    def _find(self, cameras: Cameras) -> TiledRows:
        return self._plan(cameras)

    def _finding(self, cameras: Cameras, present: VisibleRows) -> Callable[[], Upcoming]:
        find = cache(partial(self._find_upcoming, cameras, present))
        if not self._culls_in_worker:
            find()
        return find

    def _find_upcoming(self, cameras: Cameras, present: VisibleRows) -> Upcoming:
        progress = fetched(self._progress)
        # Where bringing its rows fails for lack of memory, it is not looked for again: other processes would not.
        self._found = view = self._find(cameras)
        first = view.of_tile(view.tiles[0])
        if progress.is_whole:
            return Upcoming.between(view, first.host_ids, present.host_ids)
        waiting = progress.waiting()
        here, among = map(to_host, shared_positions(first.ids, present.ids[waiting.to(first.ids.device)]))
        return Upcoming.of(view, first.host_ids, (here, waiting[among]), present.host_ids)

    def _forward_again(self, ahead: Ahead, upcoming: Upcoming, moved_ids: Tensor) -> None:
        """Forward rows anew that have moved since the worker did: an earlier tile alone had them.

        Args:
            ahead: What was forwarded.
            upcoming: The next view, which has some of these rows.
            moved_ids: int64 [D] on the host, sorted, rows whose means have moved.
        """
        only_here, only_here_ids = upcoming.only_here, upcoming.only_here_ids
        assert only_here is not None  # the host has compared
        assert only_here_ids is not None
        here, _ = shared_positions(only_here_ids, moved_ids)
        if len(here) == 0:
            return
        group, ids = self._groups["geometry"], only_here_ids[here]

        def fill(out: Tensor, begin: int, end: int) -> None:
            group.adam.forward(group.store.rows, group.store.last_step, ids[begin:end], out)

        self._transfers["geometry"].complete(ahead.uploads["geometry"], only_here[here], fill)

    def _prepare_tile(self, host_ids: Tensor) -> Ahead:
        """Upload the next tile of the present view, as it was before the step."""
        self._commit_all_owed()
        self._begin_step()
        return Ahead(self._upload_unchanged(host_ids), None)

    def _urgent_gradients(
        self, upcoming: Upcoming | None, progress: _Progress, gradients: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Downloaded]]:
        """Send the gradients that the next view waits for and that the last tile alone has.

        Returns:
            For each row that both views have its place in these gradients with `sums` behind them; and the gradients.
        """
        if upcoming is None:
            return torch.zeros(0, dtype=torch.int64), {}
        rows = upcoming.shared_before  # of the present view
        slots = progress.slots[rows].long()
        alone = slots < 0
        tile_rows = torch.searchsorted(progress.tile.numbers(), rows[alone])
        places = torch.where(alone, alone.cumsum(0) - 1, slots + len(tile_rows))
        return places, self._download_urgently(tile_rows, gradients)
