"""The thread that works behind the rendering."""

from __future__ import annotations

import threading

import pytest
import torch

from offload.pipelines.times import OffloadTimes
from offload.pipelines.worker import WorkAhead


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_thread_has_the_device_of_its_rank(monkeypatch, device, expected):
    chosen: list[tuple[str, str]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda found: chosen.append((str(found), threading.current_thread().name))
    )
    ahead: WorkAhead[int] = WorkAhead(OffloadTimes(), torch.device(device))
    ahead.begin(lambda: 7)
    assert ahead.result() == 7
    assert [name for name, _ in chosen] == expected
    assert all(thread.startswith("offload") for _, thread in chosen)
