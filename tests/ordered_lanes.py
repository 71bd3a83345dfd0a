"""Lanes that refuse work which does not wait for what it reads or overwrites.

Everything is done at once, on the CPU, in the order in which it is given. Beside that it is noted, of each byte, which
lane has read and written it last and when; and of each lane what it has waited for, directly or through others (vector
clocks: Fidge 1988, Mattern 1989). Work that touches a byte without having waited for who wrote it, or that overwrites
one without having waited for who read it, could be done in another order on a device: it raises `Race`, in every run,
however unlikely that order is. So does memory that is freed while a lane may still use it, which has not said so
(`uses`).
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from offload.adam import rows as row_kernels
from offload.adam.deferral import DeferralTables
from offload.adam.harmonics import HarmonicsGradient
from offload.store.layout import PackedRows, ResidentRows, RowState

ops = torch.ops.aten
MADE_EMPTY = {ops.empty, ops.empty_strided, ops.empty_like, ops.new_empty, ops.new_empty_strided}
WAITS_FOR_A_NUMBER = {ops.nonzero, ops._local_scalar_dense, ops.equal}  # the host does, on the current lane
MOST_ACTORS = 8
CELL = 4  # bytes that are noted together
Rows = Tensor | None  # int64, of a tensor's first dimension; None: all


class Race(AssertionError):
    """Work could be done in another order than it was given."""


class Actor:
    """A lane, or a thread of the host: `seen` is how far it knows of each actor, `[itself]` how much it has done."""

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name
        self.seen = np.zeros(MOST_ACTORS, np.int64)

    def learn(self, seen: np.ndarray) -> None:
        np.maximum(self.seen, seen, out=self.seen)


class Memory:
    """Who has touched each cell of a tensor's storage."""

    def __init__(self, num_bytes: int, maker: Actor | None) -> None:
        cells = -(-num_bytes // CELL)
        self.writer, self.written = np.zeros((2, cells), np.int32)  # the actor that wrote it last, and when it did
        self.read = np.zeros((MOST_ACTORS, cells), np.int32)  # when each actor read it last
        self.maker = maker  # whose order of work its memory is taken and given back in
        self.used = np.zeros(MOST_ACTORS, np.int64)  # when each actor did last
        self.told = np.zeros(MOST_ACTORS, bool)  # which lanes have said so: they are waited for when it is freed


class OrderedLane:
    """In place of `offload.pipelines.lanes.Lane`."""

    def __init__(self, lanes: OrderedLanes, name: str) -> None:
        self.lanes, self.actor = lanes, lanes.new_actor(name)

    def __enter__(self) -> OrderedLane:
        self.lanes.stack.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.lanes.stack.pop()

    def wait(self, *events: np.ndarray | None) -> None:
        for index, event in enumerate(events):
            if event is not None and not self.lanes.leaves_out("wait", index):
                self.actor.learn(event)

    def record(self) -> np.ndarray:
        self.actor.learn(self.lanes.host.seen)
        return self.actor.seen.copy()

    def finish(self) -> None:
        if not self.lanes.leaves_out("finish", 0):
            self.lanes.host.learn(self.actor.seen)

    def uses(self, *tensors: Tensor) -> None:
        for index, tensor in enumerate(tensors):
            memory = self.lanes.memory_of(tensor)
            if memory is not None and not self.lanes.leaves_out("uses", index):
                memory.told[self.actor.number] = True


class OrderedLanes(TorchDispatchMode):
    """Keeps to the order all that is done within; `new` and `current` are those of `Lane`."""

    def __init__(self, left_out: tuple[str, int, int] | None = None) -> None:
        """
        Args:
            left_out: The wait, finish or use that is not done: which of these, the line, and which of its arguments.
        """
        super().__init__()
        self.left_out = left_out
        self.places: set[tuple[str, int, int]] = set()  # where such are done
        self.num_actors = 0
        self.host = self.new_actor("the host")
        self.stack = [OrderedLane(self, "rendering")]
        self.num_lanes = 0
        self.on_host: set[int] = set()  # addresses of storages in host memory
        self.refused: list[str] = []
        self._memories: dict[int, Memory] = {}
        self._ends: dict[int, weakref.ref] = {}

    def new_actor(self, name: str) -> Actor:
        self.num_actors += 1
        return Actor(self.num_actors - 1, name)

    def new(self, device: torch.device) -> OrderedLane:
        self.num_lanes += 1
        return OrderedLane(self, f"lane {self.num_lanes}")

    def current(self, device: torch.device) -> OrderedLane:
        return self.stack[-1]

    def leaves_out(self, kind: str, index: int) -> bool:
        place = kind, sys._getframe(2).f_lineno, index
        self.places.add(place)
        return place == self.left_out

    @contextmanager
    def thread(self, host: Actor) -> Iterator[None]:
        """Do something on another thread of the host."""
        before, self.host = self.host, host
        stack, self.stack = self.stack, self.stack[:1]
        try:
            yield
        finally:
            self.host, self.stack = before, stack

    def memory_of(self, tensor: Tensor, maker: Actor | None = None) -> Memory | None:
        if tensor.nbytes == 0:
            return None
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._memories:
            self._memories[address] = Memory(storage.nbytes(), maker)
            self._ends[address] = weakref.ref(storage, lambda _: self._ended(address))
        return self._memories[address]

    def _ended(self, address: int) -> None:
        memory = self._memories.pop(address)
        del self._ends[address]
        maker = memory.maker
        if maker is None:
            return
        unknown = memory.used > np.maximum(maker.seen, self.host.seen)
        if (unknown & ~memory.told)[np.arange(MOST_ACTORS) != maker.number].any():
            self.refused.append(f"memory made by {maker.name} is freed while another lane may use it")

    def touch(self, tensor: Tensor, by: Actor, *, writes: bool, rows: Rows = None) -> None:
        """Note that rows of a tensor are read or written."""
        memory = self.memory_of(tensor)
        if memory is None or (rows is not None and len(rows) == 0):
            return
        cells, seen = _Cells(tensor, rows), by.seen
        if (cells.of(memory.written) > seen[cells.of(memory.writer)]).any():
            raise Race(
                f"{by.name} does not wait for who wrote what it {'over' * writes}{'writes' if writes else 'reads'}"
            )
        if writes:
            if any((cells.of(read) > time).any() for read, time in zip(memory.read, seen, strict=True) if read.any()):
                raise Race(f"{by.name} does not wait for who reads what it overwrites")
            cells.set(memory.writer, by.number)
            cells.set(memory.written, seen[by.number])
        else:
            cells.set(memory.read[by.number], seen[by.number])
        memory.used[by.number] = seen[by.number]

    def begin(self, *tensors: Tensor) -> Actor:
        """Return who does the next work, on these tensors: the current lane, or the host."""
        if any(t.nbytes and t.untyped_storage().data_ptr() in self.on_host for t in tensors):
            by = self.host
        else:
            by = self.stack[-1].actor
            by.learn(self.host.seen)
        by.seen[by.number] += 1
        if self.refused:
            raise Race(self.refused[0])
        return by

    def __torch_dispatch__(self, function: Callable, types: object, arguments: tuple = (), named: dict | None = None):
        named = named or {}
        schema, packet = function._schema, function.overloadpacket
        aliased = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        if aliased:  # a view
            return function(*arguments, **named)
        given = [leaf for leaf in tree_leaves((arguments, named)) if torch.is_tensor(leaf)]
        by = self.begin(*given)
        values = dict(zip((argument.name for argument in schema.arguments), arguments, strict=False)) | named
        for argument in schema.arguments:
            tensors = [leaf for leaf in tree_leaves(values.get(argument.name)) if torch.is_tensor(leaf)]
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors:
                self.touch(tensor, by, writes=writes, rows=_rows_of(packet, argument.name, values))
        result = function(*arguments, **named)
        known = {leaf.untyped_storage().data_ptr() for leaf in given if leaf.nbytes}
        for made in tree_leaves(result):
            if torch.is_tensor(made) and made.nbytes and made.untyped_storage().data_ptr() not in known:
                self.memory_of(made, None if by is self.host else by)
                if packet not in MADE_EMPTY:
                    self.touch(made, by, writes=True)
        if packet in WAITS_FOR_A_NUMBER:
            self.host.learn(by.seen)
        return result


class _Cells:
    """The cells of some rows of a tensor in its storage."""

    def __init__(self, tensor: Tensor, rows: Rows) -> None:
        size, shape, strides = tensor.element_size(), tensor.shape, tensor.stride()
        self._rows = slice(None) if rows is None or size < CELL else rows.numpy()
        self._begin = tensor.storage_offset() * size // CELL
        if size < CELL:  # whole stretches of them
            if shape and strides[-1] != 1:
                raise NotImplementedError(f"strides {strides} of {tensor.dtype}")
            width = shape[-1] if shape else 1
            self._shape = (*shape[:-1], -(-width * size // CELL))
            self._strides = (*(stride * size // CELL for stride in strides[:-1]), 1)
        else:
            self._shape = (*shape, size // CELL)
            self._strides = (*(stride * size // CELL for stride in strides), 1)

    def of(self, stored: np.ndarray) -> np.ndarray:
        return self._view(stored)[self._rows]

    def set(self, stored: np.ndarray, value: int) -> None:
        self._view(stored)[self._rows] = value

    def _view(self, stored: np.ndarray) -> np.ndarray:
        strides = tuple(stride * stored.itemsize for stride in self._strides)
        return np.lib.stride_tricks.as_strided(stored[self._begin :], self._shape, strides)


def _rows_of(packet: object, name: str, values: dict) -> Rows:
    """Return which rows of its argument an operation touches, where it is not all of them."""
    if name != "self":
        return None
    if packet in (ops.index_copy_, ops.index_fill_, ops.index_select) and values["dim"] == 0:
        return values["index"]
    if packet in (ops.index, ops.index_put_) and len(values["indices"]) == 1 and values["indices"][0] is not None:
        indices = values["indices"][0]
        return indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
    return None  # `masked_fill_` too: on a GPU it writes again what it has read of the others


def _unnoted(function: Callable[..., None]) -> Callable[..., None]:
    """Do without noting what torch does within."""

    @functools.wraps(function)
    def done(*arguments: object) -> None:
        with _disable_current_modes():
            function(*arguments)

    return done


class OrderedKernels:
    """The kernels that packed rows need, done as they are given."""

    def __init__(self, lanes: OrderedLanes) -> None:
        self.lanes = lanes

    def _do(self, name: str, arguments: Sequence[object], reads: list, writes: list) -> None:
        lanes = self.lanes
        tables = [x for x in arguments if isinstance(x, DeferralTables)]
        reads = [(tensor, rows) for tensor, rows in reads if tensor is not None]
        reads += [(tensor, None) for table in tables for tensor in (table.sums, table.decays, table.multipliers)]
        by = lanes.begin()
        for tensor, rows in reads:
            lanes.touch(tensor, by, writes=False, rows=rows)
        for tensor, rows in writes:
            lanes.touch(tensor, by, writes=True, rows=rows)
        getattr(row_kernels, name)(*arguments)

    @_unnoted
    def fetch_dated_rows(self, source, places, last_step, wanted, out, tables) -> None:
        reads = [*_all(source, places), (places, None), (last_step, None), (wanted, None)]
        self._do("fetch_dated_rows", (source, places, last_step, wanted, out, tables), reads, _all(out, None))

    @_unnoted
    def fetch_rows(self, source, places, ids, last_step, wanted, out, tables) -> None:
        reads = [*_all(source, places), (places, None), (ids, None), (last_step, ids), (wanted, None)]
        self._do("fetch_rows", (source, places, ids, last_step, wanted, out, tables), reads, _all(out, None))

    @_unnoted
    def step_view_rows(self, values, ids, last_step, gradients, rows, tables) -> None:
        reads, written = _of_step(values, gradients, tables)
        reads += [(ids, None), (last_step, None)]
        writes = [*written, *_all(rows, None), (last_step, None)]
        self._do("step_view_rows", (values, ids, last_step, gradients, rows, tables), reads, writes)

    @_unnoted
    def read_packed_rows(
        self,
        host: Sequence[PackedRows],
        ids: Tensor,
        wanted: Rows,
        view: Sequence[PackedRows],
        residents: ResidentRows | None = None,
    ):
        chosen = torch.arange(len(ids)) if wanted is None else _chosen(wanted)
        on_host, near, places = _among(residents, ids, chosen)
        reads = [(ids, None), (wanted, None), *places, *((tensor, ids[on_host]) for pair in host for tensor in pair)]
        writes = [(tensor, chosen) for pair in view for tensor in pair]
        if residents is not None:
            reads += [(tensor, near) for pair in residents.rows for tensor in pair]
            writes.append((residents.moved[:1], None))
        self._do("read_packed_rows", (host, ids, wanted, view, residents), reads, writes)

    @_unnoted
    def write_packed_rows(
        self,
        view: Sequence[PackedRows],
        ids: Tensor,
        wanted: Rows,
        host: Sequence[PackedRows],
        residents: ResidentRows | None = None,
    ):
        chosen = torch.arange(len(ids)) if wanted is None else _chosen(wanted)
        on_host, near, places = _among(residents, ids, chosen)
        reads = [(ids, None), (wanted, None), *places, *((tensor, chosen) for pair in view for tensor in pair)]
        writes = [(tensor, ids[on_host]) for pair in host for tensor in pair]
        if residents is not None:
            writes += [(tensor, near) for pair in residents.rows for tensor in pair]
            writes.append((residents.moved[1:], None))
        self._do("write_packed_rows", (view, ids, wanted, host, residents), reads, writes)


def _of_step(
    values: Tensor | None, gradients: Tensor | HarmonicsGradient | None, tables: DeferralTables
) -> tuple[list[tuple[Tensor | None, Rows]], list[tuple[Tensor, Rows]]]:
    """Return what a step reads beside rows, and what it writes."""
    made = (gradients.means, gradients.constant) if isinstance(gradients, HarmonicsGradient) else (gradients,)
    before, written = (tables.skipped(previous=True).sums, []) if values is None else (None, [(values, None)])
    return [(tensor, None) for tensor in (*made, before)], written


def _among(residents: ResidentRows | None, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, list]:
    """Return which of the chosen rows the host has, where the others are among residents, and what says so."""
    if residents is None:
        return chosen, chosen[:0], []
    places = residents.places[ids[chosen]].long()
    return chosen[places < 0], places[places >= 0], [(residents.places, ids[chosen])]


def _all(rows: RowState, places: Rows) -> list[tuple[Tensor, Rows]]:
    return [(tensor, places) for tensor in rows.tensors()]


def _chosen(wanted: Tensor) -> Tensor:
    return wanted.nonzero().squeeze(1)
