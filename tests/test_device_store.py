"""The device's store against a plain model of named tensors, as tests/test_host_store.py for the host's."""

from __future__ import annotations

import pytest
import torch

from offload.store import device_store
from offload.store.device_store import DeviceStore
from offload.store.growth import Growth
from offload.store.layout import GROUP_NAMES, StateFormat, row_bytes
from tests.test_host_store import NAMES, PlainModel, assert_same, named_arrays, random_ids, random_parameters

CPU = torch.device("cpu")


def store_of(model: PlainModel, group: str, sh_degree: int, state: StateFormat = "float32") -> DeviceStore:
    """A store with the values, moments and last steps of a plain model."""
    parameters = random_parameters(len(model.last_step), sh_degree)
    store = DeviceStore({**parameters, **model.arrays[0]}, group, device=CPU, state=state)
    for stored, given in zip(named_arrays(store), model.arrays, strict=True):
        for name in given:
            stored[name].copy_(given[name])
    store.last_step.copy_(model.last_step)
    return store


@pytest.mark.parametrize(("group", "state"), [*((group, "float32") for group in GROUP_NAMES), ("geometry", "compact")])
@pytest.mark.parametrize("sh_degree", [0, 3])
def test_operations_equal_those_on_a_plain_model(group, state, sh_degree):
    torch.manual_seed(0)
    names = NAMES[group]
    if state == "compact":  # whose geometry has the constant colour, and moments in bfloat16
        names = (*names, "sh0")
    model = PlainModel(500, sh_degree, names)
    if state == "compact":
        for moments in model.arrays[1:]:
            moments.update({name: moment.bfloat16() for name, moment in moments.items()})
    store = store_of(model, group, sh_degree, state)
    assert_same(store, model)
    for step in range(10, 14):
        store.step = step
        ids = random_ids(200, store.num_gaussians)
        store.append_copies(ids)
        model.append_copies(ids, step)
        assert_same(store, model)

        ids = torch.randperm(store.num_gaussians)[:50]
        values = {name: value for name, value in random_parameters(50, sh_degree, step).items() if name != "quats"}
        store.overwrite(ids, values)
        model.overwrite(ids, values, step)
        assert_same(store, model)

        sources, targets = torch.randperm(store.num_gaussians)[:80].view(2, 40)
        store.relocate(sources, targets)
        model.overwrite(targets, {name: value[sources] for name, value in model.arrays[0].items()}, step)
        assert_same(store, model)

        for ids in (torch.where(torch.rand(store.num_gaussians) > 0.3)[0], torch.randperm(store.num_gaussians // 2)):
            store.keep(ids)
            model.select(ids)
            assert_same(store, model)

        if group == "geometry":
            store.clamp_opacities(0.3)
            model.arrays[0]["opacities"].clamp_(max=0.3)
            for moments in model.arrays[1:]:
                moments["opacities"].zero_()
            assert_same(store, model)

        num_kept = store.num_gaussians - 7
        store.truncate(num_kept)
        model.select(torch.arange(num_kept))
        assert_same(store, model)


def test_a_growth_that_fails_half_way_can_be_taken_back(monkeypatch):
    torch.manual_seed(0)
    model = PlainModel(100, 3, NAMES["appearance"])
    store = store_of(model, "appearance", 3)
    new_zeros, calls = torch.Tensor.new_zeros, []

    def fail_at_the_second(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        calls.append(shape)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("on purpose")
        return new_zeros(tensor, *shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", fail_at_the_second)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            store.append_copies(torch.arange(10))
    store.truncate(100)
    assert_same(store, model)


def test_whoever_listens_is_told_before_and_after_every_change():
    store = DeviceStore(random_parameters(20), "appearance", device=CPU)
    told: list[tuple[str, object]] = []
    store.before_change = lambda ids: told.append(("before", None if ids is None else ids.tolist()))
    store.on_change = lambda ids: told.append(("after", None if ids is None else ids.tolist()))
    store.overwrite(torch.tensor([1, 2]), {})
    store.relocate(torch.tensor([3]), torch.tensor([4]))
    store.append_copies(torch.tensor([5]))
    store.keep(torch.arange(10))
    store.truncate(9)
    changed = [[1, 2], [4], None, None, None]
    assert told == [(when, ids) for ids in changed for when in ("before", "after")]


def test_bytes_of_a_compact_gaussian():
    """Rows of geometry have no more columns than values: 28 words."""
    for group, words in (("geometry", 28), ("appearance", 48)):
        store = DeviceStore(random_parameters(50), group, device=CPU, state="compact")
        assert store.packed.nbytes == 50 * 4 * words
        assert store.growth(10) == {CPU: Growth(10 * (4 * words + 4), 50 * 4 * words)}
        assert str(4 * words) in device_store.DeviceStore.__doc__


def test_bytes_of_a_gaussian():
    store = DeviceStore(random_parameters(50), "appearance", device=CPU)
    held = sum(tensor.nbytes for tensor in (*store.rows.tensors(), store.last_step))
    assert held == 50 * row_bytes("appearance", 3) == 50 * 580
    assert "576" in device_store.DeviceStore.__doc__
    assert store.growth(10) == {CPU: Growth(10 * 580, 50 * 192)}


@pytest.mark.cuda
@pytest.mark.parametrize("change", ["append_copies", "keep"])
def test_one_array_stands_twice_while_rows_are_added_or_removed(change):
    num_gaussians, device = 1_000_000, torch.device("cuda")
    store = DeviceStore(random_parameters(num_gaussians), "appearance", device=device)
    ids = torch.arange(0, num_gaussians, 20 if change == "append_copies" else 1, device=device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    getattr(store, change)(ids)
    taken = torch.cuda.max_memory_allocated() - before
    expected = store_growth = num_gaussians * 192
    if change == "append_copies":
        expected = store_growth + len(ids) * 580
    assert taken == pytest.approx(expected, rel=0.05)
