"""Times of what goes on beside a step's stages: worker, copies and waiting."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from offload.adam.host import DeferredAdam
from offload.pipelines.times import OffloadTimes
from offload.pipelines.transfer import Downloaded, RowTransfer
from tests.test_pipeline import STEPS, make_pipeline, train

WAITING = "wait_for_worker"
OF_WORKER = ("worker_cull", "worker_forward", "worker_commit", "wait_for_gradients")


class StoppedClock:
    """Stands still but in one method, each call of which takes a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.now = 0.0
        self.threads: list[str] = []  # that have called the method
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def slow_down(self, owner: object, method: str) -> None:
        original = getattr(owner, method)

        def slow(*arguments: object, **options: object) -> object:
            result = original(*arguments, **options)
            self.now += 1.0
            self.threads.append(threading.current_thread().name)
            return result

        self._patch.setattr(owner, method, slow)


@pytest.fixture
def clock(monkeypatch) -> StoppedClock:
    return StoppedClock(monkeypatch)


@pytest.mark.parametrize("num_parts", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    ("owner", "method", "name"),
    [
        (DeferredAdam, "forward", "worker_forward"),
        (DeferredAdam, "commit", "worker_commit"),
        (DeferredAdam, "commit_and_forward", "update_shared_rows"),
        (Downloaded, "ready", "wait_for_gradients"),
        (Future, "result", WAITING),
    ],
)
def test_what_is_slow_shows_under_its_name_alone(clock, owner, method, name, num_parts):
    clock.slow_down(owner, method)
    pipeline = make_pipeline(num_parts)
    train(pipeline)
    found = pipeline.counters().milliseconds
    # `train` reads all rows at its end, by a forward of each of the two groups that is no part of a step.
    calls = len(clock.threads) - 2 * (method == "forward")
    assert calls >= STEPS
    assert found.pop(name) == 1000 * calls
    assert 0 <= found.pop(WAITING, 0) <= 1000 * calls  # as far as the main thread came to wait
    others = {other for other in found if name != WAITING or other not in OF_WORKER}  # works while that waits
    assert all(found[other] == 0.0 for other in others)


def test_culling_by_the_worker_shows(clock):
    pipeline = make_pipeline(1)
    clock.slow_down(pipeline, "_find")
    train(pipeline)
    by_worker = sum(thread.startswith("offload") for thread in clock.threads)
    assert 0 < by_worker < len(clock.threads)  # the main thread culls where nothing was prefetched
    assert pipeline.counters().milliseconds["worker_cull"] == 1000 * by_worker


def test_threads_add_up_without_loss():
    times = OffloadTimes()

    def work(_: int) -> None:
        for _ in range(200):
            with times.on_host("work"):
                time.sleep(1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert times.milliseconds()["work"] >= 1000 * 4 * 200 * 1e-5
    assert list(times.milliseconds()) == ["work"]


class StreamEvent:
    """Stands in for a CUDA event: the stream reaches it when `done` says so, 3 ms after the event before."""

    recorded = 0
    done = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        StreamEvent.recorded += 1
        self.number = StreamEvent.recorded

    def query(self) -> bool:
        return self.number <= StreamEvent.done

    def elapsed_time(self, end: StreamEvent) -> float:
        assert end.query()
        return 3.0 * (end.number - self.number)


def test_copies_are_read_when_they_are_done_and_never_pile_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", StreamEvent)
    monkeypatch.setattr(StreamEvent, "recorded", 0)
    monkeypatch.setattr(StreamEvent, "done", 0)
    times = OffloadTimes()
    for copy in range(100):
        StreamEvent.done = 2 * max(copy - 3, 0)  # the stream is 4 copies behind
        with times.on_stream("host_to_device"):
            pass
        assert len(times._copies) <= 4
    assert times.milliseconds() == {"host_to_device": 3.0 * 96}
    StreamEvent.done = StreamEvent.recorded
    assert times.milliseconds() == {"host_to_device": 3.0 * 100}


@pytest.mark.cuda
def test_copies_are_timed_on_their_streams():
    device, times = torch.device("cuda"), OffloadTimes()
    transfer = RowTransfer(48, device, times)
    num_rows = 400_000  # 77 MB: three blocks
    for _ in range(3):
        uploaded = transfer.upload(num_rows, lambda out, begin, end: time.sleep(0.05))
        torch.cuda._sleep(100_000_000)  # device cycles, some 50 ms, which are not part of the download
        transfer.download(uploaded.ready()).ready()
    found = times.milliseconds()
    assert set(found) == {"host_to_device", "device_to_host"}
    assert not times._copies
    # At 2 to 500 GB/s; the waiting before each copy, 50 ms and more, is none of it.
    assert all(3 * 0.15 < total < 3 * 38 for total in found.values())
