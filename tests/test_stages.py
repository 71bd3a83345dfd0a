"""Stage times: what a step spends where, told to several readers."""

import time

import pytest
import torch

from training.stages import StageTimes


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds that time.perf_counter shows, to be advanced."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def step(times: StageTimes, clock: list[float], milliseconds: dict[str, float]) -> None:
    clock[0] += 1.0  # between steps, evaluation for example: belongs to no stage
    times.start()
    for name, duration in milliseconds.items():
        clock[0] += duration / 1000
        times.mark(name)


def test_means_are_over_the_steps_since_each_readers_last_call(clock):
    times = StageTimes(torch.device("cpu"))
    step(times, clock, {"render": 4, "update": 10})
    step(times, clock, {"render": 6, "update": 20})
    assert times.mean_milliseconds("log") == pytest.approx({"render": 5, "update": 15})
    step(times, clock, {"render": 20, "update": 30})
    assert times.mean_milliseconds("log") == pytest.approx({"render": 20, "update": 30})
    assert times.mean_milliseconds("statistics") == pytest.approx({"render": 10, "update": 20})
    assert times.mean_milliseconds("statistics") == {}


def test_stages_come_in_the_order_of_the_step(clock):
    times = StageTimes(torch.device("cpu"))
    step(times, clock, {"fetch": 1, "cull": 1, "render": 1})
    assert list(times.mean_milliseconds()) == ["fetch", "cull", "render"]


@pytest.mark.cuda
def test_stages_on_the_device_follow_its_time_line():
    times = StageTimes(torch.device("cuda"))
    for _ in range(3):
        times.start()
        torch.cuda._sleep(20_000_000)  # device cycles, some milliseconds; returns at once
        times.mark("busy")
        times.mark("idle")
    found = times.mean_milliseconds()
    assert found["busy"] > 1 > 10 * found["idle"]
