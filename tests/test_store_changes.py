"""Whoever writes rows of a host store says so before, to those who copy them, and afterwards, to those who follow."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.aerial_scene import aerial_scene
from offload.store.device_store import DeviceStore
from offload.store.host_store import HostStore
from tests.aerial_training import gaussians_of, train_on_random_gradients, views_of

KINDS = (
    *("geometry on device", "geometry on device, compact", "geometry on host", "split"),
    *("streamed", "streamed, bfloat16", "streamed, geometry on host"),
)


class Watched:
    """A store, and what was said of its rows since they were copied."""

    def __init__(self, store: HostStore) -> None:
        self._store = store
        self._copies = [tensor.clone() for tensor in store.rows.tensors()]
        self._told_before, self._told_after = torch.zeros(2, store.num_gaussians, dtype=torch.bool)
        self._on_change = store.on_change
        store.before_change, store.on_change = self.before_change, self.on_change

    def changed(self) -> Tensor:
        """Which rows are not as they were, [N] bool."""
        pairs = zip(self._store.rows.tensors(), self._copies, strict=True)
        return torch.stack([(tensor != copy).any(dim=1) for tensor, copy in pairs]).any(dim=0)

    def before_change(self, ids: Tensor | None) -> None:
        assert not bool((self.changed() & ~self._told_before).any())
        self._told_before[slice(None) if ids is None else ids] = True

    def on_change(self, ids: Tensor | None) -> None:
        self._told_after[slice(None) if ids is None else ids] = True
        if self._on_change is not None:
            self._on_change(ids)

    def check(self) -> None:
        changed = self.changed()
        assert bool(changed.any())
        assert not bool((changed & ~self._told_before).any())
        assert not bool((changed & ~self._told_after).any())


def train(kind: str) -> None:
    """Train some steps, read, and overwrite rows, and check what was said of them."""
    parameters, cameras = aerial_scene(5_000, seed=0)
    views, gaussians = views_of(cameras), gaussians_of(kind, parameters, torch.device("cpu"))
    watched = [Watched(store) for store in {*gaussians.copied_before_change().values()}]
    train_on_random_gradients(gaussians, views, range(4))
    gaussians.read("means")
    ids = torch.arange(0, 5_000, 7)
    gaussians.overwrite(ids, {"sh0": torch.zeros(len(ids), 1, 3)})
    train_on_random_gradients(gaussians, views, range(4, 6))
    gaussians.state()  # waits until the stores hold everything
    for store in watched:
        store.check()


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_of_a_store_changes_without_a_word_before_and_afterwards(kind):
    train(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_written_without_a_word_are_noticed(monkeypatch, kind):
    monkeypatch.setattr(HostStore, "changing", lambda store, ids: nullcontext(store.rows))
    with pytest.raises(AssertionError):
        train(kind)


class Fleeting:
    """Stands for `before_change` that another thread takes away as soon as it has been looked at."""

    def __get__(self, store: object, kind: type | None = None) -> object:
        looked_at = store.__dict__.setdefault("looked_at", [])
        looked_at.append(True)
        return None if len(looked_at) > 1 else lambda ids: None

    def __set__(self, store: object, value: object) -> None:
        pass


@pytest.mark.parametrize("make", [HostStore, partial(DeviceStore, device=torch.device("cpu"))])
def test_a_checkpoint_may_end_while_rows_change(monkeypatch, make):
    store = make(aerial_scene(10, seed=0)[0], "appearance")
    monkeypatch.setattr(type(store), "before_change", Fleeting(), raising=False)
    store.__dict__.pop("before_change")
    with store.changing(None):
        pass
