"""Starts the processes that train one model together, one a GPU, and ends them together."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch
from torch.distributed import TCPStore

from distributed.mesh import Ranks, RanksParted, arrive
from errors import InputError, TrainingStopped, reason
from training.run import select_device

T = TypeVar("T")
HOST = "127.0.0.1"
LIMIT = 500.0  # seconds; ranks that take longer wait for each other
PARTED_TELLS_AFTER = 5.0  # seconds


class RankFailed(RuntimeError):
    """Say at which rank, and why, processes have not come to the end; none of them is left."""


def in_ranks(size: int, device: str, function: Callable[..., T], *arguments: object) -> list[T]:
    """Call a function in fresh processes that have met, of which each has its part of the cores; return what each did.

    Args:
        size: How many processes; one has met nobody.
        device: "cuda", of which each has its own, or "cpu".
        function: Takes the process's `Ranks`, or None in a single one, and the arguments; of a module.
        arguments: The same for all.

    Raises:
        RankFailed: One of them could not; all have been ended.
    """
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # which chooses a port that is free
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(max(len(os.sched_getaffinity(0)) // size, 1))  # read when torch loads
    ranks: dict[Connection, int] = {}
    processes = []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        work = (rank, size, store.port, device, sender, function, arguments)
        processes.append(context.Process(target=_work, args=work, daemon=True))
        processes[-1].start()
        sender.close()  # so that its end is that of the process
        ranks[receiver] = rank
    try:
        found: dict[int, T] = _results(ranks)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [found[rank] for rank in range(size)]


def _results(ranks: dict[Connection, int]) -> dict[int, T]:
    """Return what all ranks have sent, each by its own connection."""
    found: dict[int, T] = {}
    deadline = time.monotonic() + LIMIT
    while len(found) < len(ranks):
        waiting = [connection for connection, rank in ranks.items() if rank not in found]
        ready = wait(waiting, deadline - time.monotonic())
        if not ready:
            raise RankFailed(f"ended after {LIMIT:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = ranks[connection]
            try:
                problem, result = connection.recv()
            except EOFError:
                problem, result = "killed, most likely out of host memory", None
            if problem:
                raise RankFailed(problem if len(ranks) == 1 else f"rank {rank}: {problem}")
            found[rank] = result
    return found


def _work(
    rank: int,
    size: int,
    port: int,
    device: str,
    results: Connection,
    function: Callable[..., T],
    arguments: tuple[object, ...],
) -> None:
    # As torchrun sets them, with a store that is there.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR=HOST, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    try:
        arrival = arrive(select_device(device))
        ranks: Ranks | None = None if arrival is None else arrival.meet()
        result = function(ranks, *arguments)
        if ranks is not None:
            ranks.barrier()  # others may still be receiving
        results.send(("", result))
    except torch.OutOfMemoryError:
        results.send(("out of device memory", None))
    except (InputError, TrainingStopped) as error:
        results.send((str(error), None))
    except RanksParted as error:
        time.sleep(PARTED_TELLS_AFTER)  # the one that has left says why, and this one is ended
        results.send((f"the ranks have parted ({reason(error)})", None))
    except Exception as error:
        results.send((f"an error has ended it ({reason(error)})", None))
        raise
