"""Forwards the rows of each view to the device and commits their gradients, behind the rendering.

While the device renders view j, a worker thread on the host

1. commits the gradients of view j - 1 (rows that view j needs as well are committed already, see 3), which it begins
   as soon as step j - 1 is over,
2. culls view j + 1 ahead, with a margin for what view j will change, and forwards its rows: rows that are not in
   view j have no gradient at this step, so their next value is a pure catch-up.

When view j has been rendered, its gradients travel to the host, beside what the worker is still doing. When that is
done,

3. rows in both views are updated, committed and forwarded in one pass. Only these wait for each other.

The margin covers the largest step that Adam can take, so the ids found ahead contain all that will be drawn, and
nothing has to be fetched late. Rows that turn out not to be drawn have a zero gradient, which Adam may apply or defer
alike (DESIGN: parameter forwarding and deferred updates of GS-Scale, arXiv 2509.15645).

A view may come in parts, which are rendered one after another. Then the device holds the rows of one part and of the
next: behind part p the worker commits the rows that part p - 1 alone has, adds up the gradients of rows that several
parts have, and uploads part p + 1, with the values from before the step. All that is said above of view j holds for
its last part together with the rows that several parts have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from offload.adam.finite import gradient_of
from offload.adam.host import DeferredAdam
from offload.culling.cameras import Cameras
from offload.pipelines.groups import RowGroup
from offload.pipelines.times import OffloadTimes
from offload.pipelines.transfer import Downloaded, RowTransfer, Uploaded, to_host
from offload.pipelines.worker import WorkAhead
from offload.tiles.boxes import Tile


@dataclass
class Part:
    """Rows of a view that are rendered together."""

    tile: Tile | None = None  # what they draw; None: all pictures of the view
    rows: Tensor | None = None  # [T] int64, ascending: which of the view's rows they are; None: all
    host_rows: Tensor | None = None  # [T] the same on the host


@dataclass
class ViewIds:
    """The rows that a view needs, and the parts it is rendered in."""

    ids: Tensor  # [V] int64, sorted, where geometry is
    host_ids: Tensor  # [V] the same on the host
    parts: list[Part]
    shared: Tensor | None = None  # [S] int64 on the host: rows that several parts have; None: to be counted

    def of_part(self, part: Part) -> tuple[Tensor, Tensor]:
        """The ids [T] of a part, where geometry is and on the host."""
        if part.rows is None:
            return self.ids, self.host_ids
        return self.ids[part.rows], self.host_ids[part.host_rows]


@dataclass
class PartRows:
    """The rows of one part of a view on the device."""

    part: Part
    ids: Tensor  # [T] int64 where geometry is, sorted
    host_ids: Tensor  # [T] the same on the host
    values: dict[str, Tensor]  # group -> [T, columns], leaves; empty once their gradients have been taken in
    gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Ahead:
    """Rows on their way to the device, behind the rendering."""

    uploads: dict[str, Uploaded]  # group -> [T, columns]
    following: _Following | None = None  # None: the next part of the present view


@dataclass
class _Following:
    """The view after the present one, and what its first part shares with the present view; on the host."""

    view: ViewIds
    shared_here: Tensor  # [S] rows of its first part that wait for gradients of the present view
    shared_before: Tensor  # [S] which rows of the present view they are
    only_here: Tensor  # [T - S] the other rows of its first part
    only_here_ids: Tensor  # [T - S] which Gaussians these are
    only_before: Tensor  # [V - S] the other rows of the present view


class _Present:
    """The view that is being rendered part by part; gradients of rows that several parts have add up here."""

    def __init__(self, view: ViewIds, columns: Mapping[str, int]) -> None:
        self.view = view
        self.index = 0  # of the part that is being rendered
        self.slots: Tensor | None = None  # [V] int32: row of `sums`, -1 where one part alone has it; None: one part
        self.sums = {name: torch.zeros(0, count) for name, count in columns.items()}  # [S, columns]
        if len(view.parts) > 1:
            self._share(self._shared_rows() if view.shared is None else view.shared)

    @property
    def part(self) -> Part:
        return self.view.parts[self.index]

    @property
    def is_last(self) -> bool:
        return self.index == len(self.view.parts) - 1

    def replace_part(self, finer: Sequence[Part]) -> None:
        """Render these parts instead of the present one; together they have its rows."""
        self.view.parts[self.index : self.index + 1] = finer
        self._share(self._shared_rows())

    def divide(self, part: Part) -> tuple[Tensor, Tensor]:
        """Positions in a part of the rows that it alone has, and of the others."""
        shared = self.slots[part.host_rows] >= 0  # [T]
        return (~shared).nonzero().squeeze(1), shared.nonzero().squeeze(1)

    def waiting(self) -> Tensor | None:
        """Rows [W] of the view that miss a gradient until its last part has been rendered; None: all."""
        if self.slots is None:
            return None
        waits = self.slots >= 0
        waits[self.view.parts[-1].host_rows] = True
        return waits.nonzero().squeeze(1)

    def _share(self, shared: Tensor) -> None:
        """Give a row of `sums` to each of these rows of the view that has none."""
        if self.slots is None:
            self.slots = torch.full((len(self.view.host_ids),), -1, dtype=torch.int32)
        new = shared[self.slots[shared] < 0]
        for name, sums in self.sums.items():
            first, columns = sums.shape
            self.sums[name] = torch.cat([sums, torch.zeros(len(new), columns)])
        self.slots[new] = torch.arange(first, first + len(new), dtype=torch.int32)

    def _shared_rows(self) -> Tensor:
        """Rows [S] of the view that several of its coming parts have."""
        seen, again = torch.zeros(2, len(self.view.host_ids), dtype=torch.bool)
        for part in self.view.parts[self.index :]:
            again[part.host_rows] |= seen[part.host_rows]
            seen[part.host_rows] = True
        return again.nonzero().squeeze(1)


class ForwardedPipeline:
    """Brings the rows of each view, part by part, to the device and their gradients back; see the head of this file.

    A step is `begin` and, for each part, `fetch`, `prefetch`, rendering and backward pass, and `next_part`; after the
    last part `update` takes the place of `next_part`.

    What the worker does ahead may fail where device memory runs out. That is raised once, by whichever call needs its
    result, and nothing has changed then: the same call can be repeated, and works without what was done ahead.
    """

    def __init__(
        self,
        groups: Mapping[str, RowGroup[DeferredAdam]],
        find: Callable[[Cameras], ViewIds],
        device: torch.device,
        *,
        find_in_worker: bool,
    ) -> None:
        """
        Args:
            groups: What travels.
            find: Gives the ids of what cameras may draw after one more step, and the parts to render it in.
            device: Where views are rendered.
            find_in_worker: Whether `find` reads rows of the groups, which the worker changes.
        """
        self._groups = groups
        self._find = find
        self._device = device
        self._find_in_worker = find_in_worker
        self._times = OffloadTimes()
        self._transfers = {name: RowTransfer(group.adam.columns, device, self._times) for name, group in groups.items()}
        self._present: _Present | None = None
        self._rows: PartRows | None = None
        self._step_begun = False
        self._ahead: WorkAhead[_Ahead] = WorkAhead(self._times)
        self._owed: list[Callable[[], None]] = []  # commits of gradients on their way to the host
        self._applied = False  # whether gradients of the present view may have reached the rows
        self._found: ViewIds | None = None  # of the next view, found before training was interrupted

    @property
    def staging_allocations(self) -> int:
        """How often staging memory has been allocated; constant once the largest view has been seen."""
        return sum(transfer.staging_allocations for transfer in self._transfers.values())

    def offload_milliseconds(self) -> dict[str, float]:
        """Time so far that the worker has culled, forwarded and committed (the main thread where nothing was
        prefetched), the main thread has updated rows that two views share and has waited for the worker, both have
        waited for gradients to arrive, and copies have taken."""
        return self._times.milliseconds()

    @property
    def part(self) -> Part:
        """The part of the present view that is to be rendered."""
        return self._present.part

    @property
    def is_last(self) -> bool:
        """Whether that is the view's last part."""
        return self._present.is_last

    def uploaded_bytes(self) -> int:
        """Device memory of what was prefetched, rows and numbers of rows; waits for it."""
        ahead = self._ahead.result()
        if ahead is None:
            return 0
        tensors = [upload.rows for upload in ahead.uploads.values()]
        if ahead.following is not None:
            view = ahead.following.view
            tensors += [view.ids, *(part.rows for part in view.parts if part.rows is not None)]
        return sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)

    def arrived_bytes(self) -> int | None:
        """The same, without waiting; None while it is on its way."""
        return None if self._ahead.is_under_way else self.uploaded_bytes()

    def begin(self, cameras: Cameras) -> ViewIds:
        """Begin a step on the view of these cameras."""
        ahead = self._ahead.result()
        if ahead is None:
            self.finish()
            view, self._found = self._found or self._find(cameras), None
        else:
            view = ahead.following.view
        self._present = _Present(view, {name: group.adam.columns for name, group in self._groups.items()})
        self._applied = False
        return view

    def fetch(self) -> PartRows:
        """The rows of the present part, with the values they have after the last step."""
        ahead = self._ahead.result()
        ids, host_ids = self._present.view.of_part(self._present.part)
        if ahead is None:
            self._settle()
            uploads = self._upload_unchanged(host_ids)
        else:
            self._ahead.forget()
            uploads = ahead.uploads
        values = {name: upload.ready().requires_grad_() for name, upload in uploads.items()}
        self._rows = PartRows(self._present.part, ids, host_ids, values)
        return self._rows

    def prefetch(self, cameras: Cameras | None) -> None:
        """Let the worker commit what is owed and forward the rows that come next, while this part is rendered.

        Args:
            cameras: Of the next view; None where the rows of the store will change before it.
        """
        present = self._present
        if not present.is_last:
            _, host_ids = present.view.of_part(present.view.parts[present.index + 1])
            self._ahead.begin(self._prepare_part, host_ids)
        elif cameras is not None:
            # The worker gives no work to the device's current stream, where it would wait for the rendering.
            following = None if self._find_in_worker else self._find_following(cameras, present)
            self._ahead.begin(self._prepare, cameras, present, following)

    def abandon_part(self) -> None:
        """Forget the present part's rows and gradients, and what was prefetched; `fetch` brings the rows again."""
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            self._ahead.result()
        self._ahead.forget()
        self._rows = None

    def replace_part(self, finer: Sequence[Part]) -> None:
        """Render these parts instead of the present one, which was abandoned; together they have its rows."""
        self._present.replace_part(finer)

    def next_part(self) -> None:
        """Take in the gradients of the present part and go on to the next one of the view."""
        self._ahead.result()
        self._settle()
        present, host_ids, gradients = self._present, self._rows.host_ids, self._gradients()
        self._begin_step()
        part = present.part
        downloads = {name: self._transfers[name].download(gradient) for name, gradient in gradients.items()}

        def settle() -> None:
            alone, shared = present.divide(part)
            slots = present.slots[part.host_rows[shared]].long()
            self._commit(host_ids[alone], alone, downloads)
            for name, download in downloads.items():
                arrived = self._arrived(download)
                with self._times.on_host("worker_commit"):
                    present.sums[name][slots] += arrived[shared]

        self._applied = True
        self._owed.append(settle)
        self._rows = None
        present.index += 1

    def update(self) -> None:
        """Take in the gradients of the view's last part and end the step; the worker commits them at once."""
        present, gradients = self._present, self._gradients()
        downloads = {name: self._transfers[name].download(gradient) for name, gradient in gradients.items()}
        ahead = self._ahead.result()
        self._settle()
        self._begin_step()
        # All that takes device memory comes before anything is changed, so that it can be done again.
        divided = None if present.slots is None else present.divide(present.part)
        added = None if divided is None else self._shared_gradients(present, divided[1], gradients)
        urgent = None if ahead is None else self._urgent_gradients(ahead, present, gradients)
        self._applied = True
        if added is not None:
            self._add_shared(present, *added)
        if urgent is None:
            remaining = torch.arange(len(present.view.host_ids))
        else:
            self._update_urgent(ahead, present, *urgent)
            remaining = ahead.following.only_before
        if present.slots is None:
            rows = gradient_rows = remaining
        else:
            remains = torch.zeros(len(present.view.host_ids), dtype=torch.bool)  # [V]
            remains[remaining] = True
            alone = divided[0]
            alone = alone[remains[present.part.host_rows[alone]]]
            rows, gradient_rows = present.part.host_rows[alone], alone
            summed = (remains & (present.slots >= 0)).nonzero().squeeze(1)
            sums = {name: Downloaded(rows, None) for name, rows in present.sums.items()}
            self._owed.append(partial(self._commit, present.view.host_ids[summed], present.slots[summed].long(), sums))
        self._owed.append(partial(self._commit, present.view.host_ids[rows], gradient_rows, downloads))
        self._present = self._rows = None
        self._step_begun = False
        self._ahead.begin_before(self._commit_owed)

    def finish(self) -> None:
        """Commit all gradients; afterwards the host holds everything. Values forwarded ahead stay good."""
        self._ahead.result()
        self._settle()

    @property
    def upcoming(self) -> ViewIds | None:
        """The next view, where it has been found ahead; between steps."""
        ahead = self._ahead.result()
        return self._found if ahead is None else ahead.following.view

    def load_state(self, upcoming: ViewIds | None) -> None:
        """Take this for the next view, which was found ahead before training was interrupted.

        Culling anew might find other rows. The picture would be the same, but a row that is committed with a gradient
        of zero rounds differently from one that is deferred.
        """
        self._found = upcoming

    def undo_step(self) -> None:
        """Forget the step that an error has ended; the next one begins with the same view.

        Raises:
            RuntimeError: Gradients have reached some rows already.
        """
        with contextlib.suppress(Exception):
            self._ahead.result()
        if self._present is None:
            return
        if self._applied:
            raise RuntimeError("the step had been applied in part")
        self._settle()
        if self._step_begun:
            for group in self._groups.values():
                group.undo_step(group.adam.step - 1)
        self._found = self._present.view
        self._step_begun = False
        self._ahead.forget()
        self._rows = self._present = None

    def read(self, name: str, host_ids: Tensor) -> Tensor:
        """Copies of the current values of rows [V, columns] on the host; the store is left as it is."""
        self.finish()
        group = self._groups[name]
        out = torch.empty(len(host_ids), group.adam.columns)
        group.adam.forward(group.store.rows, group.store.last_step, host_ids, out)
        return out

    def catch_up(self, name: str, host_ids: Tensor) -> None:
        """Commit the skipped steps of rows of a group, so that its store holds their current values."""
        self.finish()
        group = self._groups[name]
        stale = host_ids[group.store.last_step[host_ids] < group.adam.step]
        with group.store.changing(stale) as rows:
            group.adam.commit(rows, group.store.last_step, stale, None)

    def _find_following(self, cameras: Cameras, present: _Present) -> _Following:
        view, waiting = self._find(cameras), present.waiting()
        ids, host_ids = view.of_part(view.parts[0])
        waiting_ids = present.view.ids if waiting is None else present.view.ids[waiting.to(ids.device)]
        shared_here, shared_before = map(to_host, shared_positions(ids, waiting_ids))
        shared_before = shared_before if waiting is None else waiting[shared_before]
        only_here = _positions_without(shared_here, len(host_ids))
        only_before = _positions_without(shared_before, len(present.view.host_ids))
        return _Following(view, shared_here, shared_before, only_here, host_ids[only_here], only_before)

    def _prepare(self, cameras: Cameras, present: _Present, following: _Following | None) -> _Ahead:
        """Upload what can be known of the next view's first part before the present view's gradients."""
        self._settle()
        self._begin_step()
        if following is None:
            with self._times.on_host("worker_cull"):
                following = self._find_following(cameras, present)
        return _Ahead({name: self._upload_known(name, following) for name in self._groups}, following)

    def _prepare_part(self, host_ids: Tensor) -> _Ahead:
        """Upload the next part of the present view, as it was before the step."""
        self._settle()
        self._begin_step()
        return _Ahead(self._upload_unchanged(host_ids))

    def _upload_known(self, name: str, following: _Following) -> Uploaded:
        group, known, ids = self._groups[name], following.only_here, following.only_here_ids

        def fill(out: Tensor, begin: int, end: int) -> None:
            first, last = torch.searchsorted(known, torch.tensor([begin, end])).tolist()
            with self._times.on_host("worker_forward"):
                out_rows = known[first:last] - begin
                group.adam.forward(group.store.rows, group.store.last_step, ids[first:last], out, out_rows=out_rows)

        return self._transfers[name].upload(len(known) + len(following.shared_here), fill)

    def _upload_unchanged(self, host_ids: Tensor) -> dict[str, Uploaded]:
        """Rows as they were before the step, whether or not it has begun."""
        uploads = {}
        for name, group in self._groups.items():
            forward = group.adam.forward_previous if self._step_begun else group.adam.forward

            def fill(
                out: Tensor, begin: int, end: int, group: RowGroup[DeferredAdam] = group, forward: Callable = forward
            ) -> None:
                with self._times.on_host("worker_forward"):
                    forward(group.store.rows, group.store.last_step, host_ids[begin:end], out)

            uploads[name] = self._transfers[name].upload(len(host_ids), fill)
        return uploads

    def _gradients(self) -> dict[str, Tensor]:
        """Of the present part's rows: group -> [T, columns]. Their values are given up."""
        rows = self._rows
        for name, values in rows.values.items():
            rows.gradients[name] = gradient_of(values)
        rows.values = {}
        return rows.gradients

    def _shared_gradients(
        self, present: _Present, shared: Tensor, gradients: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Downloaded]]:
        """Of the rows of the last part that other parts have too; and in which rows of `sums` they belong."""
        slots = present.slots[present.part.host_rows[shared]].long()
        return slots, self._download_urgently(shared, gradients)

    def _add_shared(self, present: _Present, slots: Tensor, downloads: Mapping[str, Downloaded]) -> None:
        for name, download in downloads.items():
            present.sums[name][slots] += self._arrived(download)

    def _urgent_gradients(
        self, ahead: _Ahead, present: _Present, gradients: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, dict[str, Downloaded]]:
        """Of the rows that both views have: those that the last part alone has. And for each row that both have its
        place in these gradients, with `sums` behind them; None: in their order."""
        rows = ahead.following.shared_before  # of the present view
        if present.slots is None:
            places, part_rows = None, rows
        else:
            slots = present.slots[rows].long()
            alone = slots < 0
            part_rows = torch.searchsorted(present.part.host_rows, rows[alone])
            places = torch.where(alone, alone.cumsum(0) - 1, slots + len(part_rows))
        return places, self._download_urgently(part_rows, gradients)

    def _download_urgently(self, rows: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Downloaded]:
        """Of these rows of the part alone, whose numbers are on the host."""
        rows = rows.to(self._device)
        return {
            name: self._transfers[name].download(gradient[rows], urgent=True) for name, gradient in gradients.items()
        }

    def _update_urgent(
        self, ahead: _Ahead, present: _Present, places: Tensor | None, downloads: Mapping[str, Downloaded]
    ) -> None:
        """Update the rows that both views have, and complete what was forwarded of the next one."""
        host_ids = present.view.host_ids[ahead.following.shared_before]
        for name, group in self._groups.items():
            arrived = self._arrived(downloads[name])
            if present.slots is not None:
                arrived = torch.cat([arrived, present.sums[name]])

            def fill(
                out: Tensor, begin: int, end: int, group: RowGroup[DeferredAdam] = group, arrived: Tensor = arrived
            ) -> None:
                block = group.store.rows, group.store.last_step, host_ids[begin:end]
                with self._times.on_host("update_shared_rows"):
                    if places is None:
                        group.adam.commit_and_forward(*block, arrived[begin:end], out)
                    else:
                        group.adam.commit_and_forward(*block, arrived, out, gradient_rows=places[begin:end])

            with group.store.changing(host_ids):
                self._transfers[name].complete(ahead.uploads[name], ahead.following.shared_here, fill)

    def _begin_step(self) -> None:
        """Begin the step of the present view, if that has not been done."""
        if self._step_begun:
            return
        for group in self._groups.values():
            group.begin_step()
        self._step_begun = True

    def _settle(self) -> None:
        """Have all gradients committed that are owed to the host."""
        self._ahead.finish_before()
        self._commit_owed()

    def _commit_owed(self) -> None:
        owed, self._owed = self._owed, []
        for work in owed:
            work()

    def _commit(self, host_ids: Tensor, gradient_rows: Tensor, gradients: Mapping[str, Downloaded]) -> None:
        for name, group in self._groups.items():
            arrived = self._arrived(gradients[name])
            with group.store.changing(host_ids) as rows, self._times.on_host("worker_commit"):
                group.adam.commit(rows, group.store.last_step, host_ids, arrived, gradient_rows=gradient_rows)

    def _arrived(self, gradients: Downloaded) -> Tensor:
        with self._times.on_host("wait_for_gradients"):
            return gradients.ready()


def _positions_without(positions: Tensor, count: int) -> Tensor:
    """All int64 below `count` that are not among the positions, ascending."""
    others = np.ones(count, dtype=bool)
    others[positions.numpy()] = False
    return torch.from_numpy(np.flatnonzero(others))  # torch's nonzero takes three times as long


def shared_positions(ids: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Where the ids that both hold stand in each.

    Args:
        ids: [V] sorted, unique int64.
        other: [W] the same.

    Returns:
        Two int64 [S], ascending: positions in `ids` and in `other`.
    """
    if len(ids) == 0 or len(other) == 0:
        empty = ids.new_zeros(0)
        return empty, empty
    positions = torch.searchsorted(other, ids).clamp_(max=len(other) - 1)  # [V]
    here = (other[positions] == ids).nonzero().squeeze(1)
    return here, positions[here]
