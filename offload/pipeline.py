"""Forwards the rows of each view to the device and commits their gradients, behind the rendering.

While the device renders view j, a worker thread on the host

1. commits the gradients of view j - 1 (rows that view j needs as well are committed already, see 3),
2. culls view j + 1 ahead, with a margin for what view j will change, and forwards its rows: rows that are not in
   view j have no gradient at this step, so their next value is a pure catch-up.

When view j has been rendered,

3. rows in both views are updated, committed and forwarded in one pass. Only these wait for each other.

The margin covers the largest step that Adam can take, so the ids found ahead contain all that will be drawn, and
nothing has to be fetched late. Rows that turn out not to be drawn have a zero gradient, which Adam may apply or defer
alike (DESIGN: parameter forwarding and deferred updates of GS-Scale, arXiv 2509.15645).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.adam import DeferredAdam
from offload.culling import Cameras
from offload.store import HostStore
from offload.transfer import Downloaded, RowTransfer, Uploaded


def largest_step(betas: tuple[float, float]) -> float:
    """Largest change of a parameter by one Adam step, in units of the learning rate.

    By Cauchy-Schwarz on the sums of gradients in both moments:
    |m| / sqrt(v) <= (1 - b1) / sqrt(1 - b2) / sqrt(1 - b1^2 / b2).
    """
    b1, b2 = betas
    return (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2))


def largest_drift(betas: tuple[float, float]) -> float:
    """Largest change of a parameter by all steps without gradient that follow one, in units of the learning rate."""
    b1, b2 = betas
    ratio = b1 / math.sqrt(b2)
    return largest_step(betas) * ratio / (1 - ratio)


@dataclass
class RowGroup:
    """A store of rows that travel together, and their optimizer."""

    store: HostStore  # holds this group only, so that each group has its own stamps
    name: str  # of the group in the store
    adam: DeferredAdam
    learning_rates: Callable[[int], Sequence[float]]  # of each schedule, at a step from 1
    committed: Callable[[Tensor], None] = lambda host_ids: None  # told of rows that have changed

    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Parameters and moments [N, columns] and stamps [N], as the optimizer takes them."""
        group = self.store.groups[self.name]
        return group.parameters.tensor, group.exp_avg.tensor, group.exp_avg_sq.tensor, self.store.last_step


@dataclass
class ViewRows:
    """The rows of one view on the device."""

    ids: Tensor  # [V] int64 on the device, sorted
    host_ids: Tensor  # [V] the same on the host
    values: dict[str, Tensor]  # group -> [V, columns], leaves that receive gradients


@dataclass
class _Ids:
    """What the next view needs, and how much of that the present view has as well."""

    ids: Tensor  # [V] where they were found
    host_ids: Tensor  # [V]
    shared_here: Tensor  # [S] positions of the rows in both views, in the next view; on the host
    shared_before: Tensor  # [S] and in the present view; on the host


@dataclass
class _Upcoming:
    """The rows of the next view, but for those that the present view will change."""

    ids: _Ids
    uploads: dict[str, Uploaded]


@dataclass
class _Pending:
    """Gradients of a view that have not been committed."""

    host_ids: Tensor  # [P]
    gradient_rows: Tensor  # [P] positions in the downloads
    gradients: dict[str, Downloaded]


class RowPipeline:
    """Brings each view's rows to the device and their gradients back; see the head of this file."""

    def __init__(
        self,
        groups: Mapping[str, RowGroup],
        cull: Callable[[Cameras], Tensor],
        device: torch.device,
        *,
        cull_in_worker: bool,
    ) -> None:
        """
        Args:
            groups: What travels.
            cull: Gives the sorted ids [V], where geometry is, of what cameras may draw after one more step.
            device: Where views are rendered.
            cull_in_worker: Whether culling reads rows of the groups, which the worker changes.
        """
        self._groups = groups
        self._cull = cull
        self._device = device
        self._cull_in_worker = cull_in_worker
        self._transfers = {name: RowTransfer(group.adam.columns, device) for name, group in groups.items()}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._rows: ViewRows | None = None
        self._upcoming: Future[_Upcoming] | None = None
        self._pending: _Pending | None = None

    @property
    def staging_allocations(self) -> int:
        """How often staging memory has been allocated; constant once the largest view has been seen."""
        return sum(transfer.staging_allocations for transfer in self._transfers.values())

    def fetch(self, cameras: Cameras) -> ViewRows:
        """The rows of a view, with the values they have after the last step."""
        upcoming = self._prepared()
        if upcoming is None:
            self.finish()
            ids = self._cull(cameras)
            host_ids = ids.cpu()
            uploads = {name: self._upload_current(name, host_ids) for name in self._groups}
        else:
            self._upcoming = None
            ids, host_ids, uploads = upcoming.ids.ids, upcoming.ids.host_ids, upcoming.uploads
        values = {name: upload.ready().requires_grad_() for name, upload in uploads.items()}
        self._rows = ViewRows(ids.to(self._device), host_ids, values)
        return self._rows

    def prefetch(self, cameras: Cameras) -> None:
        """Let the worker commit what is pending and forward the next view's rows, while this view is rendered.

        Not to be called where the rows of the store will change before the next view.
        """
        # The worker gives no work to the device's current stream, where it would wait for the rendering.
        ids = None if self._cull_in_worker else self._find_ids(cameras, self._rows.ids)
        self._upcoming = self._worker.submit(self._prepare, cameras, self._rows.host_ids, ids)

    def update(self) -> None:
        """Take in the gradients of the view that `fetch` gave; they are committed in the background."""
        rows = self._rows
        gradients = {
            name: torch.zeros_like(values) if values.grad is None else values.grad
            for name, values in rows.values.items()
        }
        upcoming = self._prepared()
        if upcoming is None:
            self.finish()
            self._begin_step()
            gradient_rows = torch.arange(len(rows.host_ids))
        else:
            self._update_shared(upcoming, gradients)
            gradient_rows = _positions_without(upcoming.ids.shared_before, len(rows.host_ids))
        self._pending = _Pending(
            host_ids=rows.host_ids[gradient_rows],
            gradient_rows=gradient_rows,
            gradients={name: self._transfers[name].download(gradient) for name, gradient in gradients.items()},
        )
        self._rows = None

    def finish(self) -> None:
        """Commit all gradients; afterwards the host holds everything. Values forwarded ahead stay good."""
        self._prepared()
        self._commit_pending()

    def read(self, name: str, host_ids: Tensor | None) -> Tensor:
        """Copies of the current values of rows [V, columns] (None: all) on the host; the store is left as it is."""
        self.finish()
        group = self._groups[name]
        num_rows = group.store.num_gaussians if host_ids is None else len(host_ids)
        out = torch.empty(num_rows, group.adam.columns)
        group.adam.forward(*group.state(), host_ids, out)
        return out

    def catch_up(self, host_ids: Tensor) -> None:
        """Commit the skipped steps of rows, so that the store itself holds their current values."""
        self.finish()
        for group in self._groups.values():
            stale = host_ids[group.store.last_step[host_ids] < group.adam.step_count]
            group.adam.commit(*group.state(), stale, None)
            group.committed(stale)

    def _find_ids(self, cameras: Cameras, present_ids: Tensor) -> _Ids:
        ids = self._cull(cameras)
        shared_here, shared_before = shared_positions(ids, present_ids)
        return _Ids(ids, ids.cpu(), shared_here.cpu(), shared_before.cpu())

    def _prepare(self, cameras: Cameras, present_ids: Tensor, ids: _Ids | None) -> _Upcoming:
        self._commit_pending()
        self._begin_step()
        ids = ids or self._find_ids(cameras, present_ids)
        return _Upcoming(ids, {name: self._upload_ahead(name, ids) for name in self._groups})

    def _upload_ahead(self, name: str, ids: _Ids) -> Uploaded:
        group = self._groups[name]
        alone = _positions_without(ids.shared_here, len(ids.host_ids))

        def fill(out: Tensor, begin: int, end: int) -> None:
            first, last = torch.searchsorted(alone, torch.tensor([begin, end])).tolist()
            positions = alone[first:last]
            group.adam.forward(*group.state(), ids.host_ids[positions], out, out_rows=positions - begin)

        return self._transfers[name].upload(len(ids.host_ids), fill)

    def _upload_current(self, name: str, host_ids: Tensor) -> Uploaded:
        group = self._groups[name]
        return self._transfers[name].upload(
            len(host_ids), lambda out, begin, end: group.adam.forward(*group.state(), host_ids[begin:end], out)
        )

    def _update_shared(self, upcoming: _Upcoming, gradients: Mapping[str, Tensor]) -> None:
        ids = upcoming.ids
        if len(ids.shared_here) == 0:
            return
        host_ids = ids.host_ids[ids.shared_here]
        shared_here, shared_before = ids.shared_here.to(self._device), ids.shared_before.to(self._device)
        for name, group in self._groups.items():
            transfer = self._transfers[name]
            shared = transfer.download(gradients[name][shared_before]).ready()

            def fill(out: Tensor, begin: int, end: int, group: RowGroup = group, shared: Tensor = shared) -> None:
                group.adam.commit_and_forward(*group.state(), host_ids[begin:end], shared[begin:end], out)

            forwarded = transfer.upload(len(host_ids), fill).ready()
            upcoming.uploads[name].ready().index_copy_(0, shared_here, forwarded)
            group.committed(host_ids)

    def _prepared(self) -> _Upcoming | None:
        """What the worker has prepared, once it has; raises its error once, and then the rows can be read and saved."""
        if self._upcoming is None:
            return None
        try:
            return self._upcoming.result()
        except BaseException:
            self._upcoming = None
            raise

    def _begin_step(self) -> None:
        for group in self._groups.values():
            group.adam.begin_step(group.learning_rates(group.adam.step_count + 1))
            group.store.step = group.adam.step_count

    def _commit_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        for name, group in self._groups.items():
            group.adam.commit(
                *group.state(),
                pending.host_ids,
                pending.gradients[name].ready(),
                gradient_rows=pending.gradient_rows,
            )
            group.committed(pending.host_ids)


def _positions_without(positions: Tensor, count: int) -> Tensor:
    """All int64 below `count` that are not among the positions, ascending."""
    others = torch.ones(count, dtype=torch.bool)
    others[positions] = False
    return others.nonzero().squeeze(1)


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
