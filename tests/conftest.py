import os

# Two processes of tests on two cores would wait for one another's threads. What several threads must not change is
# tested with as many as each test says, and by tests/test_other_machines.py with five.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# isort: split

import startup  # noqa: F401, before torch is imported

# isort: split

import gc
import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.spared_work import leave_charts_undrawn, read_sources_once

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton loads: its kernels then run on the CPU

gc.disable()  # until all tests are collected, of which nothing is to be freed

# What a program started in the background, or by nohup, ignores, its children would ignore too: tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def city_block(tmp_path_factory) -> Path:
    """A small city block for all tests that only read it: 16 views of 64x48 pixels, 600 points."""
    from datasets.synthetic import write_city_block  # here and below: the process that deals tests out needs no more

    data_dir = tmp_path_factory.mktemp("data") / "city_block"
    write_city_block(data_dir, num_views=16, width=64, height=48, num_points=600)
    return data_dir


@pytest.fixture
def anisotropic_gaussians(monkeypatch) -> None:
    """Let training begin with Gaussians whose axes differ, from which two runs can be compared."""
    from tests.training_scripts import anisotropic_start

    monkeypatch.setattr("training.beginning.initial_gaussians", anisotropic_start)


@pytest.fixture(scope="session", autouse=True)
def sources_are_read_once() -> Iterator[None]:
    """Let tyro, which finds help texts in the source of classes, look for each class once and not at every command."""
    with pytest.MonkeyPatch.context() as patch:
        read_sources_once(patch)
        yield


@pytest.fixture(scope="module", autouse=True)
def charts_stay_undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the charts of a run's page empty, which cost more than a small run, but in modules about them."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("charts"):
            leave_charts_undrawn(patch)
        yield


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite, but where it shares a GPU; none for the tests that were named."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return 2 if is_whole and not torch.cuda.is_available() else 0


def pytest_collection_finish() -> None:
    """Let Python's collections visit what tests make, and not all modules and tests, a million objects, each time."""
    gc.enable()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
