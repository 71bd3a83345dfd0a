"""Groups of processes that train together, for tests: started once, for several cases."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from distributed.mesh import Ranks, arrive_by
from tests.spared_work import leave_charts_undrawn, read_sources_once
from tests.waiting import HANGS_AFTER

Case = Callable[[Ranks], Any]  # what it returns can be pickled


class StayingRanks(Ranks):
    """Ranks that go on to the next run: they have met already."""

    def meet(self) -> Ranks:
        return self

    def leave(self) -> None:
        pass


def run_in_group(size: int, cases: Mapping[str, Case], folder: Path, device: str = "cpu") -> dict[str, list[Any]]:
    """What each case returns at each rank.

    The cases are functions of a module; a process that fails ends the group, with its traceback. All ranks have one
    device, and gloo; of "cuda" each has a GPU of its own, and NCCL.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # which chooses a port that is free
    # A process that has no threads, and is forked for each rank; CUDA wants processes that are started anew.
    context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    context.set_forkserver_preload(["training.run", "torchmetrics.image"])  # so that they are imported once
    processes = [
        context.Process(target=_work, args=(rank, size, store.port, cases, folder, device), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS_AFTER)
    errors = [file.read_text() for file in sorted(folder.glob("error_*"))]
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size, "\n".join([str(codes), *errors])
    found = [pickle.loads((folder / f"results_{rank}").read_bytes()) for rank in range(size)]
    return {name: [results[name] for results in found] for name in cases}


def _work(rank: int, size: int, port: int, cases: Mapping[str, Case], folder: Path, device: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    torch.set_num_threads(1)
    spared = pytest.MonkeyPatch()
    leave_charts_undrawn(spared)
    read_sources_once(spared)
    try:
        place = torch.device("cuda", rank) if device == "cuda" else torch.device(device)
        ranks = arrive_by(place, "nccl" if device == "cuda" else "gloo").meet()
        results = {name: case(ranks) for name, case in cases.items()}
        ranks.barrier()
        ranks.leave()
        (folder / f"results_{rank}").write_bytes(pickle.dumps(results))
    except BaseException:
        (folder / f"error_{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
