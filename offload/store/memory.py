"""Rows in host memory that grow and shrink in place, pinned where CUDA is used."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys

import numpy as np
import torch

from offload.backends import native, num_threads
from offload.errors import MemoryParameterError

PART_BYTES = 256 << 20  # at most this much is registered at once
HUGE_PAGE_BYTES = 2 << 20
PAGE_BYTES = 64 << 10  # a multiple of every system's page
SPARE = 64  # growth takes 1/64 more than it needs, so that many small ones make few parts


class HostArray:
    """Rows [rows, columns] at an address that never changes.

    Address space is reserved for `max_rows`; memory is taken as rows are added and given back as they are removed.
    `pin=True` registers the memory with CUDA, part by part; without CUDA it does nothing. Rows never straddle the
    border of two parts. Kernels read and write across it; an asynchronous copy must not cross it, which CUDA refuses,
    and there is none: what is copied goes through staging buffers.

    Views of `tensor` keep the memory mapped, and stay valid when the array grows. When it shrinks below their length
    the rows beyond its end read as zeros, and must not be written.
    """

    def __init__(self, columns: int, *, max_rows: int, dtype: torch.dtype = torch.float32, pin: bool = False) -> None:
        """
        Args:
            columns: Values in a row.
            max_rows: Rows that the array may grow to.
            dtype: Of the values.
            pin: Whether the memory is pinned where there is a GPU.

        Raises:
            MemoryParameterError: There is no address space for so many rows.
        """
        self.max_rows = max_rows
        self.rows = 0
        self._row_bytes = columns * dtype.itemsize
        self._granule = math.lcm(self._row_bytes, PAGE_BYTES)
        self._part_ends: list[int] = []  # bytes from the start; memory before the last one is in use
        num_bytes = -(-max_rows * self._row_bytes // self._granule) * self._granule
        try:
            self._mapping = _Mapping.anonymous(num_bytes + HUGE_PAGE_BYTES)
        except OSError as error:
            raise MemoryParameterError(
                f"This system does not let the process reserve {num_bytes} bytes of address space for {max_rows:,} "
                "Gaussians: set {max_gaussians} lower."
            ) from error
        self._mapping.pinned = pin and torch.cuda.is_available()
        everything = np.frombuffer(self._mapping, np.uint8)
        self._offset = -everything.ctypes.data % HUGE_PAGE_BYTES
        self._bytes = everything[self._offset : self._offset + num_bytes]
        self._all_rows = torch.from_numpy(self._bytes[: max_rows * self._row_bytes]).view(dtype).view(max_rows, columns)
        self.tensor = self._all_rows[:0]  # [rows, columns], a view of the memory

    def resize(self, rows: int) -> None:
        """Add rows of zeros at the end, or remove rows from there.

        Removing pinned rows waits for nothing: no copy of them may be under way.

        Raises:
            MemoryParameterError: More rows than `max_rows`, or memory that CUDA does not pin.
        """
        if rows > self.max_rows:
            raise MemoryParameterError(
                f"{rows:,} Gaussians do not fit into the host store, which has address space for {self.max_rows:,}: "
                "raise {max_gaussians}."
            )
        used, needed = self.rows * self._row_bytes, rows * self._row_bytes
        if needed > self._taken:
            spare = needed // SPARE if self.rows else 0
            self._take(self._round_up(needed + spare))
        elif needed < used:
            # Less is what a refinement removes of what it has added: registering the rest anew would take longer.
            if self._taken - needed > 3 * max(needed // SPARE, self._granule):
                self._give_back(self._round_up(needed))
            self._all_rows[rows : min(self.rows, self._taken // self._row_bytes)].zero_()
        self.rows, self.tensor = rows, self._all_rows[:rows]

    @property
    def _taken(self) -> int:
        """Count the bytes of memory in use."""
        return self._part_ends[-1] if self._part_ends else 0

    def _round_up(self, num_bytes: int) -> int:
        return min(-(-num_bytes // self._granule) * self._granule, len(self._bytes))

    def _take(self, end: int) -> None:
        native.touch_pages(self._bytes[self._taken : end], num_threads())
        part = PART_BYTES // self._granule * self._granule or self._granule
        while self._taken < end:
            start, part_end = self._taken, min(self._taken + part, end)
            self._mapping.register(self._bytes[start:part_end])
            self._part_ends.append(part_end)

    def _give_back(self, end: int) -> None:
        taken = self._taken
        while self._taken > end:
            part_end = self._part_ends.pop()
            self._mapping.unregister(self._bytes[self._taken : part_end])
        if self._taken < end:
            self._mapping.register(self._bytes[self._taken : end])
            self._part_ends.append(end)
        self._mapping.discard(self._offset + end, taken - end)


class _Mapping(mmap.mmap):
    """Anonymous memory of zeros. The last view of it to go unregisters and unmaps it."""

    pinned = False
    _registered: frozenset[int] = frozenset()  # addresses

    @classmethod
    def anonymous(cls, num_bytes: int) -> _Mapping:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            mapping = cls(-1, num_bytes)
        else:
            # Python names MAP_NORESERVE from 3.13 on; other systems than Linux reserve nothing anyway.
            no_reserve = 0x4000 if sys.platform == "linux" else 0
            mapping = cls(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                mapping.madvise(mmap.MADV_HUGEPAGE)
        return mapping

    def register(self, memory: np.ndarray) -> None:
        if not self.pinned:
            return
        address = memory.ctypes.data
        status = torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0)
        if int(status) != 0:
            raise MemoryParameterError(
                f"CUDA cannot pin {memory.nbytes} more bytes of host memory (error {int(status)}): "
                "set {max_gaussians} lower or free host memory."
            )
        self._registered |= {address}

    def unregister(self, memory: np.ndarray) -> None:
        address = memory.ctypes.data
        if address in self._registered:
            self._registered -= {address}
            torch.cuda.cudart().cudaHostUnregister(address)

    def discard(self, start: int, num_bytes: int) -> None:
        """Give whole pages back to the system; they read as zeros from now on."""
        if sys.platform == "linux":
            self.madvise(mmap.MADV_DONTNEED, start, num_bytes)
        else:  # where there is no such promise, the memory stays
            np.frombuffer(self, np.uint8, num_bytes, start).fill(0)

    def __del__(self) -> None:
        if self._registered and not sys.is_finalizing():
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # kernels that nobody has waited for may be using it
            for address in self._registered:
                torch.cuda.cudart().cudaHostUnregister(address)
