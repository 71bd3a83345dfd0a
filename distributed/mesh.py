"""The ranks that train one model together, one process a GPU: how they meet, talk and part.

What torch.distributed is asked for, it is asked for here. Its rules:

- A collective is called by all ranks, in one order: by the main thread or, in the backward pass, by the thread of
  autograd, for which the main thread waits. A thread beside these talks on a line of its own (`aside`).
- Whoever decides something for itself asks the others first (`any`, `gather`), and only then turns off the way.
- Small objects go through gloo, from host memory, also where tensors go through NCCL: they wait for no kernel.
- Tensors lie on the device of the rank, and go through NCCL or, on the CPU and in tests that have one GPU, gloo.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from distributed.board import Board
from errors import InputError, reason
from offload.errors import ParameterError

T = TypeVar("T")
TELLS_WITHIN = 10.0  # seconds, of processes that have been started together
REACHES_WITHIN = 30.0  # seconds, torchrun's store, which was there before this process; torch tries twice


class RanksParted(RuntimeError):
    """Say that a collective has failed, since another rank has ended or cannot be reached."""


class Terminated(Exception):
    """Say that SIGTERM has come, which torchrun sends where another rank has ended, or where it has got it itself.

    Whoever takes errors of torch for those of the others, which are of RuntimeError, does not take this one.
    """


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:  # for what is received: this rank's own, and the others hear of it
        raise
    except RuntimeError as error:  # of whatever kind torch's back ends have
        raise RanksParted(str(error)) from error


@dataclass(frozen=True)
class Ranks:
    """Hold which of the W ranks this process is, and speak with the others.

    Attributes:
        rank: From 0; rank 0 speaks to people and writes what there is one of.
        size: W, at least 2.
        device: Where this rank renders, and its tensors lie that are sent.
        proportions: W numbers, in which the ranks are to hold the Gaussians.
        board: For what is said out of turn.
    """

    rank: int
    size: int
    device: torch.device
    proportions: tuple[int, ...]
    board: Board = field(repr=False)
    # Groups by gloo, one for each thread that talks, for small objects; tensors have the default group. Whoever leaves
    # forgets them, for all that share this list, so that their connections close and nobody waits for an answer.
    _lines: list[dist.ProcessGroup] = field(repr=False)
    _line: int = 0  # which of them is for this

    @property
    def shares(self) -> list[float]:
        """Return which part of all Gaussians each rank is to hold; they add up to 1."""
        return [proportion / sum(self.proportions) for proportion in self.proportions]

    @property
    def leads(self) -> bool:
        """Return whether this is the rank that speaks."""
        return self.rank == 0

    @property
    def _control(self) -> dist.ProcessGroup:
        if not self._lines:
            raise RanksParted("this rank has left the others")
        return self._lines[self._line]

    # ------------------------------------------------------------------------------------------------- small objects

    @_talking()
    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order, at every rank; small ones that can be pickled."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    @_talking()
    def broadcast(self, value: T) -> T:
        """Return rank 0's value at every rank; a small one that can be pickled."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set at some rank."""
        return self.any_of([flag])[0]

    @_talking()
    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each of some flags, as many everywhere, whether it is set at some rank."""
        # Asked at every step while the device may be idle: all tell all at once. A reduction goes around twice.
        own = torch.tensor([flags] * self.size, dtype=torch.uint8)  # [W, F]
        of_all = torch.empty_like(own)
        dist.all_to_all_single(of_all, own, group=self._control)
        return of_all.bool().any(dim=0).tolist()

    @_talking()
    def sums(self, counts: Sequence[int]) -> list[int]:
        """Return for each of some counts, as many everywhere, the sum over the ranks."""
        total = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(total, group=self._control)
        return total.tolist()

    @_talking()
    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks of a tensor on the host, which stays as it is; of one shape everywhere."""
        total = values.clone()
        dist.all_reduce(total, group=self._control)
        return total

    @_talking()
    def aside(self) -> Ranks:
        """Return the same ranks with another line for small objects, for one more thread; all call this at once."""
        self._lines.append(dist.new_group(backend="gloo"))
        return replace(self, _line=len(self._lines) - 1)

    @_talking()
    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier(group=self._control)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Let the first rank of each machine do something before the others, which then find it done."""
        is_first = is_first_of_machine()
        if not is_first:
            self.barrier()
        try:
            yield
        finally:
            if is_first:
                self.barrier()

    # ------------------------------------------------------------------------------------------------------- tensors

    @_talking()
    def all_to_all(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int], result: Tensor | None = None
    ) -> Tensor:
        """Send each rank its part of some rows.

        Args:
            rows: [S, D] on this rank's device: the rows for rank 0, then those for rank 1, and so on.
            sent: W counts of rows, S in sum.
            received: W counts of the rows that each rank sends here, R in sum.
            result: [R, D] to write them to, of a rank that has asked for this memory before others wait for it.

        Returns:
            [R, D]: the rows from rank 0, then those from rank 1, and so on.
        """
        if result is None:
            result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent))
        return result

    @_talking()
    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the ranks of a tensor on this rank's device, which stays as it is."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    @_talking()
    def largest(self, value: Tensor) -> Tensor:
        """Return the largest of each value over the ranks; as `mean`."""
        found = value.detach().clone()
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found

    # ------------------------------------------------------------------------------------------------------- the end

    def leave(self) -> None:
        """Part from the others; whatever is under way between them is given up."""
        self._lines.clear()
        leave()


def leave() -> None:
    """Part from the other ranks, where this process has met any and has not left them."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_first_of_machine() -> bool:
    """Return whether this is the first process on its machine that torchrun has started, or was started without it."""
    return os.environ.get("LOCAL_RANK", "") in ("", "0")


def is_one_of_several() -> bool:
    """Return whether the environment says that several processes train together; `arrive` checks what it says."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


def let_first_tell() -> None:
    """Wait, in a process that is not the first of its machine, while that one tells of an error that all have alike.

    If one left before, torchrun would end the first, too, which may have begun later; as soon as the first has told
    and left, torchrun ends those that wait.
    """
    if not is_first_of_machine():
        hear_sigterm()
        time.sleep(TELLS_WITHIN)


def refuse_several(what: str) -> None:
    """Refuse to do as one of several processes what is for one; the first of a machine tells.

    Args:
        what: The program and what it does, with which the sentence begins.

    Raises:
        InputError: The environment says that there are several.
    """
    if is_one_of_several():
        let_first_tell()
        size = os.environ["WORLD_SIZE"]
        raise InputError(f"{what} as one process: start it without torchrun, which sets WORLD_SIZE={size}.")


def hear_sigterm() -> None:
    """Let SIGTERM, which torchrun sends where another rank has ended, do what it does; `startup` has put it off."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def local_ranks() -> int:
    """Count the processes on this machine that torchrun has started; 1 without it."""
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, default: int, least: int = 1) -> int:
    """Read a number from the environment; an empty one is the default.

    Raises:
        InputError: It is none, or below the least that it can be.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise InputError(
            f"The environment has {name}={text}, which is no number that torchrun sets: start with torchrun, or unset "
            "WORLD_SIZE and its like to train with one process."
        )
    return int(text)


@dataclass(frozen=True)
class Arrival:
    """Hold that this process has come to where all ranks meet: it can tell and read notices, and `meet` the others.

    Attributes:
        rank: As `Ranks` has it, like the others.
    """

    rank: int
    size: int
    device: torch.device
    proportions: tuple[int, ...]
    board: Board = field(repr=False)
    _backend: Literal["nccl", "gloo"] = field(repr=False)
    _store: dist.Store = field(repr=False)

    @_talking()
    def meet(self) -> Ranks:
        """Meet the others, when they have arrived."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            self._backend,
            device_id=self.device if self._backend == "nccl" else None,
            store=self._store,
            rank=self.rank,
            world_size=self.size,
        )
        lines = [dist.new_group(backend="gloo")]
        return Ranks(self.rank, self.size, self.device, self.proportions, self.board, lines)


def arrive(device: torch.device, proportions: Sequence[int] = ()) -> Arrival | None:
    """Come to where the processes meet that torchrun has started; None where there are none, and nothing is done.

    Args:
        device: Kind of device to render on; of several GPUs a rank takes that of its LOCAL_RANK.
        proportions: In which the ranks are to hold the Gaussians, a number for each; empty: equally.

    Raises:
        InputError: There are more processes on this machine than GPUs, torchrun has not started them or cannot be
            reached, there are not as many as proportions, or what the environment says of them is no number.
    """
    size = _number("WORLD_SIZE", 1)
    if proportions and len(proportions) != size:
        raise ParameterError(
            f"{{shares}} has {len(proportions)} numbers, but WORLD_SIZE, the number of processes that torchrun has "
            f"started, is {size}: give one for each, or none to deal the Gaussians equally."
        )
    if size == 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"The environment has WORLD_SIZE={size} but no {missing[0]}: start with torchrun, or unset WORLD_SIZE to "
            "train with one process."
        )
    rank, local_rank = _number("RANK", 0, least=0), _number("LOCAL_RANK", 0, least=0)
    if rank >= size:
        raise InputError(f"The environment has RANK={rank}, which is not below WORLD_SIZE={size}: start with torchrun.")
    for name in ("MASTER_PORT", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):  # read by others
        _number(name, 1)
    if device.type == "cuda":
        num_devices = torch.cuda.device_count()
        if local_rank >= num_devices:
            raise InputError(
                f"torchrun has started at least {local_rank + 1} processes on this machine, which has {num_devices} "
                f"GPUs that can be seen: use --nproc_per_node {num_devices}."
            )
        return arrive_by(torch.device("cuda", local_rank), "nccl", proportions)
    return arrive_by(device, "gloo", proportions)


def arrive_by(device: torch.device, backend: Literal["nccl", "gloo"], proportions: Sequence[int] = ()) -> Arrival:
    """Come to where the processes meet whose number and addresses stand in the environment.

    Args:
        device: Where this rank renders. NCCL wants another GPU for each rank of a machine; gloo, which carries tensors
            of a GPU through pinned host memory, does not, so that one GPU can stand for several.
        backend: Of torch.distributed, for tensors.
        proportions: As for `arrive`.

    Raises:
        InputError: The store cannot be reached by which they meet.
    """
    # No signal is heard meanwhile. Where torchrun keeps no store, rank 0 does, which may have to import for minutes.
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    timeout = timedelta(seconds=REACHES_WITHIN) if is_kept else default_pg_timeout
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        board = Board()
    except RuntimeError as error:
        let_first_tell()
        keeper = "torchrun" if is_kept else "the process of rank 0"
        raise InputError(
            f"{keeper} cannot be reached at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({reason(error)}): if it has ended, start all again, and otherwise let all machines reach that port."
        ) from error
    store.set_timeout(default_pg_timeout)  # for what ranks wait for when they have met
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # ranks before a restart have left things in the store
    store = dist.PrefixStore(f"attempt {attempt}", store)
    return Arrival(rank, size, device, tuple(proportions) or (1,) * size, board, backend, store)
