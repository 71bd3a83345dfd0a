"""Writes checkpoints while training goes on: rows are copied before they change, and a file appears when it is whole.

Its format stands at the head of `training/checkpoints.py`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.adam.state import ARRAYS, PACKED_GEOMETRY, format_of
from offload.store.contract import RowStore
from offload.store.layout import GROUP_NAMES, TIGHT_WORDS
from training.checkpoints import (
    ALIGNMENT,
    DTYPES,
    FORMAT_VERSION,
    MAGIC,
    PROLOGUE,
    PROLOGUE_BYTES,
    THREADS,
    Checkpoint,
)
from training.files import open_new
from training.gaussians import PARAMETER_NAMES

MEMORY_SHARE = 40  # blocks under way take at most this part of what is written
SMALLEST_BLOCK, LARGEST_BLOCK = 64 << 10, 8 << 20  # bytes
GUARDED_ROWS = 2048  # copied at once at most, where one of them is to change; rows of a view come in runs


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the file appears under its name only when it is complete and on disk.

    Raises:
        OSError: The file cannot be written; a file that was there before is as it was.
    """
    PartialCheckpoint(path, checkpoint).publish()


class PartialCheckpoint:
    """Write a file that receives a checkpoint but does not bear its name yet, since it is not complete and on disk."""

    def __init__(
        self, path: Path, checkpoint: Checkpoint, copied_before_change: Mapping[str, RowStore] | None = None
    ) -> None:
        """Begin the file beside the final one.

        Tensors that are copied before they change are so later, by `publish`, and each block of their rows at the
        latest before it changes. All others may change as soon as this returns.

        Args:
            path: Of the final file.
            checkpoint: What it will hold.
            copied_before_change: Names of tensors of the state that change only after these stores have called
                `before_change`.

        Raises:
            OSError: The file cannot be written; none is left.
        """
        self.path = path
        self.identity: dict[str, int] = {}  # of the published file: its size and the checksum of its header
        self._partial = path.with_name(path.name + ".partial")
        self._file = open_new(self._partial)
        self._copier = _Copier(self._file)
        self._guards: list[_Guard] = []
        try:
            self._header = self._begin(checkpoint, copied_before_change or {})
        except BaseException:
            self.discard()
            raise

    @property
    def longest_wait(self) -> float:
        """Return the seconds that a change of rows has waited at most until they were copied."""
        return max((guard.longest_wait for guard in self._guards), default=0.0)

    def copy_all(self) -> None:
        """Copy what has not been copied, as fast as it can be; errors are left to `publish`."""
        for guard in self._guards:
            guard.before_change(None)

    def publish(self) -> None:
        """Complete the file, wait until it is on disk, then give it its name, in place of a file that had it.

        Raises:
            OSError: The disk does not take it; a file that had the name is as it was.
        """
        try:
            for guard in self._guards:
                guard.copy_rest()
            self._release()
            self.identity = _seal(self._file, self._header)
            os.fsync(self._file)
            os.replace(self._partial, self.path)
        except BaseException:
            self.discard()
            raise
        os.close(self._file)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the file."""
        self._release()
        os.close(self._file)
        self._partial.unlink(missing_ok=True)

    def _begin(self, checkpoint: Checkpoint, copied_before_change: Mapping[str, RowStore]) -> dict[str, Any]:
        """Give all tensors their places, copy those that no store tells of; returns the header, without checksums."""
        state = {name: torch.atleast_1d(tensor.detach()) for name, tensor in checkpoint.state.items()}
        _check_rows(state)
        total = sum(tensor.nbytes for tensor in state.values())
        free = os.fstatvfs(self._file)
        if total > free.f_bavail * free.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        largest_row = max(tensor.nbytes // max(len(tensor), 1) for tensor in state.values())
        block_bytes = min(max(total // MEMORY_SHARE // THREADS, SMALLEST_BLOCK), LARGEST_BLOCK)
        block_bytes = max(block_bytes, largest_row)  # such as a photo's bilateral grid
        self._copier.start(block_bytes)
        entries, copies, end = {}, [], PROLOGUE_BYTES
        of_stores: dict[RowStore, list[tuple[Tensor, int]]] = {}
        for name, tensor in state.items():
            place = -(-end // ALIGNMENT) * ALIGNMENT
            end = place + tensor.nbytes
            row_bytes = tensor.nbytes // max(len(tensor), 1)
            block_rows = max(block_bytes // max(row_bytes, 1), 1)
            entries[name] = {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(checkpoint.state[name].shape),
                "place": place,
                "block_rows": block_rows,
            }
            if name in copied_before_change:
                of_stores.setdefault(copied_before_change[name], []).append((tensor, place))
                continue
            for first in range(0, len(tensor), block_rows):
                copies.append(self._copier.submit([(tensor[first : first + block_rows], place + first * row_bytes)]))
        for copy in copies:
            copy.result()
        for store, tensors in of_stores.items():
            self._guards.append(_Guard(store, tensors, self._copier, block_bytes))
        return _header_of(checkpoint, entries)

    def _release(self) -> None:
        """Let rows change without being copied, and wait for copies that are under way."""
        for guard in self._guards:
            guard.end()
        self._copier.close()


def write_joining_file(path: Path, whole: Checkpoint, parts: Sequence[Mapping[str, object]]) -> None:
    """Write the file that makes a checkpoint of parts on disk; it appears under its name when it is on disk itself.

    Args:
        path: Of the file, beside the parts.
        whole: What it says beside the tensors, which the parts have.
        parts: Of each the name of its file, and its size and the checksum of its header (`PartialCheckpoint.identity`).

    Raises:
        OSError: The file cannot be written; a file that was there before is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    file = open_new(partial)
    try:
        _seal(file, {**_header_of(whole, {}), "parts": list(parts)})
        os.fsync(file)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)
    _sync_folder(path.parent)


def _header_of(checkpoint: Checkpoint, tensors: Mapping[str, Any]) -> dict[str, Any]:
    header = {
        "steps": checkpoint.steps,
        "sequence": checkpoint.sequence,
        "periodic": checkpoint.periodic,
        "transform": np.asarray(checkpoint.transform, np.float64).tolist(),
        "options": dict(checkpoint.options),
        "photos": {name: list(position) for name, position in checkpoint.photos.items()},
        "tensors": tensors,
    }
    if checkpoint.also_trained_on:
        header["also_trained_on"] = list(checkpoint.also_trained_on)
    return header if checkpoint.part is None else {**header, "part": asdict(checkpoint.part)}


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Copier:
    """Copy rows into a file, by several threads."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint")
        self._buffers: SimpleQueue[Tensor] = SimpleQueue()  # one for each thread: nothing is allocated block by block

    def start(self, block_bytes: int) -> None:
        """Take the memory for blocks of this size."""
        for _ in range(THREADS):
            self._buffers.put(torch.empty(block_bytes, dtype=torch.uint8))

    def submit(self, blocks: list[tuple[Tensor, int]]) -> Future[None]:
        """Copy rows to their places in the file."""
        return self._threads.submit(self._copy, blocks)

    def close(self) -> None:
        """Wait for all that was submitted."""
        self._threads.shutdown(wait=True)

    def _copy(self, blocks: list[tuple[Tensor, int]]) -> None:
        buffer = self._buffers.get()
        try:
            for rows, place in blocks:
                content = buffer[: rows.nbytes]
                copy = content.view(rows.dtype).view(rows.shape)
                # numpy copies on this thread alone, where torch would start more.
                np.copyto(_as_numpy(copy), _as_numpy(rows)) if rows.device.type == "cpu" else copy.copy_(rows)
                _write_all(self._file, content.numpy().data, place)
        finally:
            self._buffers.put(buffer)


class _Guard:
    """Have the rows of a store copied block by block: one after the other, but those that are to change first.

    While this guards a store, a row changes only after its block has been copied. So the file receives all rows as they
    were in the beginning, whatever happens to them meanwhile.
    """

    def __init__(self, store: RowStore, tensors: list[tuple[Tensor, int]], copier: _Copier, block_bytes: int) -> None:
        """
        Args:
            store: From now on it tells which rows will change.
            tensors: Of the store, N rows each, and their places in the file.
            copier: Copies blocks of at most `block_bytes`.
        """
        self.longest_wait = 0.0  # seconds
        self._store: RowStore | None = store
        self._tensors = tensors
        self._copier = copier
        largest_row = max(1, *(tensor.nbytes // max(len(tensor), 1) for tensor, _ in tensors))  # 1: there are none
        self._block_rows = max(min(GUARDED_ROWS, block_bytes // largest_row), 1)
        num_blocks = -(-len(tensors[0][0]) // self._block_rows)
        self._copies: list[Future[None] | None] = [None] * num_blocks
        self._lock = Lock()  # of the copies
        store.before_change = self.before_change

    def before_change(self, ids: Tensor | None) -> None:
        """Return when these rows (int64 [M]; None: all), or what else there is in their blocks, have been copied."""
        begin = time.perf_counter()
        blocks: Iterable[int] = range(len(self._copies))
        if ids is not None:
            blocks = torch.bincount(ids // self._block_rows).nonzero().squeeze(1).tolist()
        wait(self._submit(blocks))  # an error has been, or will be, raised by `copy_rest`
        if ids is None:
            self._let_go()  # nothing is left to be copied: a store on a device wants the memory of its rows back
        self.longest_wait = max(self.longest_wait, time.perf_counter() - begin)

    def copy_rest(self) -> None:
        """Copy block after block; only one of them is ever ahead of one that is to change.

        Raises:
            OSError: The file does not take it.
        """
        for block in range(len(self._copies)):
            for copy in self._submit([block]):
                copy.result()

    def end(self) -> None:
        """Let rows change without being copied."""
        with self._lock:
            self._copies = []
        self._let_go()

    def _let_go(self) -> None:
        """Hold neither rows nor their store, which may be given up for another one before the next checkpoint."""
        with self._lock:
            store, self._store, self._tensors = self._store, None, []
        if store is not None:
            store.before_change = None

    def _submit(self, blocks: Iterable[int]) -> list[Future[None]]:
        """Return the copies of these blocks, begun now if they have not been."""
        with self._lock:
            blocks = [block for block in blocks if block < len(self._copies)]  # rows that were added since have none
            return [self._begin_copy(block) for block in blocks]

    def _begin_copy(self, block: int) -> Future[None]:
        copy = self._copies[block]
        if copy is None:
            copy = self._copies[block] = self._copier.submit(self._rows_of(block))
        return copy

    def _rows_of(self, block: int) -> list[tuple[Tensor, int]]:
        """Return the rows of a block, of each tensor, and their places in the file."""
        first = block * self._block_rows
        rows = slice(first, first + self._block_rows)
        return [(tensor[rows], place + first * (tensor.nbytes // len(tensor))) for tensor, place in self._tensors]


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """Return a view, with integers for bfloat16, which numpy does not know."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _seal(file: int, header: dict[str, Any]) -> dict[str, int]:
    """Add the checksums of what has been copied, the header and what stands before it; return the file's identity."""
    end = PROLOGUE_BYTES
    for entry in header["tensors"].values():
        row_bytes = DTYPES[entry["dtype"]].itemsize * math.prod(entry["shape"][1:])
        num_bytes = row_bytes * (entry["shape"][0] if entry["shape"] else 1)
        end, step = entry["place"] + num_bytes, entry["block_rows"] * row_bytes
        places = range(entry["place"], end, max(step, 1))
        entry["crc32"] = [zlib.crc32(os.pread(file, min(step, end - place), place)) for place in places]
    content = json.dumps(header).encode()
    _write_all(file, content, end)
    prologue = PROLOGUE.pack(MAGIC, _version_of(header), end, len(content), zlib.crc32(content))
    _write_all(file, prologue + struct.pack("<I", zlib.crc32(prologue)), 0)
    return {"bytes": end + len(content), "crc32": zlib.crc32(content)}


def _version_of(header: Mapping[str, Any]) -> int:
    """Return the first version of this format that has such files."""
    tensors = header["tensors"]
    if format_of(tensors) == "compact" and tensors[PACKED_GEOMETRY]["shape"][1] == TIGHT_WORDS:
        return FORMAT_VERSION
    if {"part", "parts"} & header.keys():
        return 4
    return 3 if format_of(tensors) == "compact" else 2


def _check_rows(state: Mapping[str, Tensor]) -> None:
    """Refuse to write Gaussians of which a failed change has reached some tensors only."""
    arrays = [f"{array}/{name}" for array in ARRAYS for name in PARAMETER_NAMES]
    arrays += [f"packed/{group}" for group in GROUP_NAMES]
    if len({len(state[array]) for array in arrays if array in state}) > 1:
        raise RuntimeError("the Gaussians' tensors have different numbers of rows")


def _write_all(file: int, content: bytes | memoryview, place: int) -> None:
    written = 0
    while written < len(content):
        written += os.pwrite(file, content[written:], place + written)
