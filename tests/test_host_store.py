"""The host store against a plain model of named tensors, and against the GPU-only trainer's Gaussians."""

import ctypes
import gc
import math
import os
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from configs import DensificationRules
from errors import InputError
from offload.adam.options import AdamOptions
from offload.backends import native
from offload.models.baseline import BaselineGaussians
from offload.models.device import DeviceGaussians
from offload.store import memory as host_memory
from offload.store.host_store import HostStore
from offload.store.layout import GROUP_NAMES, row_bytes
from offload.store.memory import HostArray
from offload.store.morton import morton_order
from strategies.default import DefaultStrategy, Statistics
from strategies.ops import grow
from tests.training_scripts import slow_but

NAMES = {
    "geometry": ("means", "scales", "quats", "opacities"),
    "appearance": ("sh0", "shN"),
}


def random_parameters(num_gaussians: int, sh_degree: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(num_gaussians, *shape, generator=generator)

    return {
        "means": normal(3),
        "scales": normal(3) - 4,
        "quats": normal(4),
        "opacities": normal(),
        "sh0": normal(1, 3),
        "shN": normal((sh_degree + 1) ** 2 - 1, 3),
    }


class PlainModel:
    """What the store should hold, by name, each change written down with fancy indexing."""

    def __init__(self, num_gaussians: int, sh_degree: int, names: tuple[str, ...]) -> None:
        values, exp_avg, exp_avg_sq = (random_parameters(num_gaussians, sh_degree, seed) for seed in (1, 2, 3))
        self.arrays = [{name: array[name] for name in names} for array in (values, exp_avg, exp_avg_sq)]
        self.last_step = torch.randint(0, 50, (num_gaussians,), dtype=torch.int32)

    def select(self, ids: Tensor) -> None:
        self.arrays = [{name: array[name][ids] for name in array} for array in self.arrays]
        self.last_step = self.last_step[ids]

    def append_copies(self, ids: Tensor, step: int) -> None:
        num_before = len(self.last_step)
        self.select(torch.cat([torch.arange(num_before), ids]))
        self.forget(torch.arange(num_before, num_before + len(ids)), step)

    def overwrite(self, ids: Tensor, values: dict[str, Tensor], step: int) -> None:
        for name, value in values.items():
            if name in self.arrays[0]:
                self.arrays[0][name][ids] = value
        self.forget(ids, step)

    def forget(self, ids: Tensor, step: int) -> None:
        for moments in self.arrays[1:]:
            for moment in moments.values():
                moment[ids] = 0
        self.last_step[ids] = step


def named_arrays(store: HostStore) -> list[dict[str, Tensor]]:
    """Parameters and both moments by name."""
    rows = store.rows
    return [store.layout.named(array) for array in (rows.parameters, rows.exp_avg, rows.exp_avg_sq)]


def store_of(model: PlainModel, group: str, sh_degree: int, **options) -> HostStore:
    parameters = random_parameters(len(model.last_step), sh_degree)
    store = HostStore({**parameters, **model.arrays[0]}, group, **options)
    for stored, given in zip(named_arrays(store), model.arrays, strict=True):
        for name in given:
            stored[name].copy_(given[name])
    store.last_step.copy_(model.last_step)
    return store


def assert_same(store: HostStore, model: PlainModel) -> None:
    assert store.num_gaussians == len(model.last_step)
    for stored, expected in zip(named_arrays(store), model.arrays, strict=True):
        assert stored.keys() == expected.keys()
        for name, value in expected.items():
            assert stored[name].shape == value.shape
            assert torch.equal(stored[name], value), name
    assert torch.equal(store.last_step, model.last_step)
    used = max(columns.stop for columns in store.layout.columns.values())
    assert all(not array[:, used:].any() for array in store.rows.tensors())  # padding stays zero


def random_ids(num_ids: int, num_gaussians: int) -> Tensor:
    return torch.randint(0, num_gaussians, (num_ids,))


# ------------------------------------------------------------------------------------------------ rows of a store


@pytest.mark.parametrize("group", GROUP_NAMES)
@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_operations_equal_those_on_a_plain_model(group, sh_degree, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    torch.manual_seed(0)
    model = PlainModel(500, sh_degree, NAMES[group])
    store = store_of(model, group, sh_degree, max_gaussians=5000, pad_to_cache_line=threads == "3")
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

        ids = torch.where(torch.rand(store.num_gaussians) > 0.3)[0]
        store.keep(ids)
        model.select(ids)
        assert_same(store, model)

        if group == "geometry":
            store.clamp_opacities(0.3)
            model.arrays[0]["opacities"].clamp_(max=0.3)
            for moments in model.arrays[1:]:
                moments["opacities"].zero_()
            assert_same(store, model)

        order = torch.randperm(store.num_gaussians)
        store.keep(order)
        model.select(order)
        assert_same(store, model)


@pytest.mark.parametrize("num_gaussians", slow_but(["1", "33"], [0, 1, 2, 33, 60_000]))
@pytest.mark.parametrize("kept", ["none", "all", "first", "last", "few", "most", "half", "unordered"])
@pytest.mark.parametrize("threads", ["1", "2", "7"])
def test_keep(num_gaussians, kept, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    torch.manual_seed(num_gaussians)
    everything = torch.arange(num_gaussians)
    draw = torch.rand(num_gaussians)
    ids = {
        "none": everything[:0],
        "all": everything,
        "first": everything[: num_gaussians // 2],
        "last": everything[num_gaussians // 2 :],
        "few": everything[draw < 0.01],
        "most": everything[draw < 0.999],
        "half": everything[draw < 0.5],
        "unordered": torch.randperm(num_gaussians)[: num_gaussians // 2],
    }[kept]
    array = HostStore(random_parameters(num_gaussians, 3), "appearance", max_gaussians=num_gaussians)
    expected = array.read("shN")[ids]
    array.last_step.copy_(everything)
    array.keep(ids)
    assert torch.equal(array.read("shN"), expected)
    assert torch.equal(array.last_step.long(), ids)


def test_keep_refuses_to_double_rows():
    store = HostStore(random_parameters(10), "geometry")
    with pytest.raises(ValueError, match="only once"):
        store.keep(torch.tensor([3, 5, 3]))


def permutations(n: int) -> dict[str, Tensor]:
    """Orders with few long, many short and no cycles, with and without a multiple of 32 in them."""
    everything = torch.arange(n)
    odd = everything.clone()
    odd[1::2] = odd[1::2].roll(3)  # one or three cycles of odd rows only, far longer than 32
    neighbours = everything.clone()
    neighbours[: n // 2 * 2] = neighbours[: n // 2 * 2].view(-1, 2).flip(1).flatten()
    return {
        "none": everything,
        "rotated": everything.roll(1),
        "reversed": everything.flip(0),
        "odd": odd,
        "neighbours": neighbours,
        "random": torch.randperm(n, generator=torch.Generator().manual_seed(n)),
    }


@pytest.mark.parametrize("n", slow_but(["1", "33"], [0, 1, 31, 32, 33, 1000, 30_001]))
@pytest.mark.parametrize("kind", ["none", "rotated", "reversed", "odd", "neighbours", "random"])
@pytest.mark.parametrize("threads", ["1", "5"])
@pytest.mark.parametrize("group", GROUP_NAMES)
def test_another_order_and_back(n, kind, threads, group, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    order = permutations(n)[kind]
    parameters = random_parameters(n)
    store = HostStore(parameters, group, max_gaussians=n)
    store.last_step.copy_(torch.arange(n))
    store.rows.exp_avg.copy_(store.rows.parameters)
    store.keep(order)
    for name, value in store.snapshot().items():
        assert torch.equal(value, parameters[name][order])
    assert torch.equal(store.last_step.long(), order)
    assert torch.equal(store.rows.exp_avg, store.rows.parameters)
    store.keep(order.argsort())
    for name, value in store.snapshot().items():
        assert torch.equal(value, parameters[name])


@pytest.mark.parametrize("order", [[0, 1, 1, 3], [1, 2, 2, 0]])
def test_a_row_is_not_kept_twice(order):
    parameters = random_parameters(4)
    store = HostStore(parameters, "geometry")
    with pytest.raises(ValueError, match="a row can be kept only once"):
        store.keep(torch.tensor(order))
    assert torch.equal(store.read("means"), parameters["means"])


@pytest.mark.parametrize("wrong", [-1, 10])
def test_rows_that_do_not_exist_are_refused(wrong):
    store = HostStore(random_parameters(10), "geometry")
    ids, others = torch.tensor([2, wrong]), torch.tensor([0, 1])
    for operation in (
        lambda: store.append_copies(ids),
        lambda: store.keep(ids),
        lambda: store.overwrite(ids, {}),
        lambda: store.relocate(ids, others),
        lambda: store.relocate(others, ids),
    ):
        with pytest.raises(IndexError, match="of 10"):
            operation()
    assert store.num_gaussians == 10


CHANGES = {
    "append_copies": lambda store: store.append_copies(torch.tensor([1, 3])),
    "truncate": lambda store: store.truncate(5),
    "overwrite": lambda store: store.overwrite(torch.tensor([2, 4]), {"means": torch.zeros(2, 3)}),
    "relocate": lambda store: store.relocate(torch.tensor([2, 4]), torch.tensor([7, 5])),
    "keep": lambda store: store.keep(torch.tensor([1, 3, 9])),
    "keep in another order": lambda store: store.keep(torch.arange(9, -1, -1)),
    "clamp_opacities": lambda store: store.clamp_opacities(-1.0),
}


@pytest.mark.parametrize("operation", CHANGES)
def test_a_store_tells_which_rows_change_before_they_do_and_afterwards(operation):
    store = HostStore(random_parameters(10), "geometry", max_gaussians=20)
    before = {name: value.clone() for name, value in store.arrays_by_name().items()}
    told, told_after = [], []

    def before_change(ids: torch.Tensor | None) -> None:
        assert all(torch.equal(value, before[name]) for name, value in store.arrays_by_name().items())
        told.append(ids)

    store.before_change = before_change
    store.on_change = lambda ids: told_after.append((ids, store.arrays_by_name()["parameters/means"].clone()))
    CHANGES[operation](store)
    after = store.arrays_by_name()
    (ids, means), *others = told_after
    assert not others
    assert (ids is None and told == [None]) or torch.equal(ids, told[0])
    assert torch.equal(means, after["parameters/means"])  # nothing changes after that
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    if store.num_gaussians == 10 and told[0] is not None:
        untold = torch.ones(10, dtype=torch.bool).index_fill(0, told[0], False)
        assert all(torch.equal(value[untold], before[name][untold]) for name, value in after.items())
    else:
        assert told == [None]


@pytest.mark.parametrize("group", GROUP_NAMES)
def test_a_store_of_no_gaussians_takes_every_operation(group):
    store = HostStore(random_parameters(1), group, max_gaussians=10)
    nothing = torch.arange(0)
    store.keep(nothing)
    assert store.num_gaussians == 0
    store.append_copies(nothing)
    store.overwrite(nothing, {"means": torch.zeros(0, 3)})
    store.relocate(nothing, nothing)
    if group == "geometry":
        store.clamp_opacities(0.0)
    store.keep(nothing)
    assert {name: tuple(value.shape) for name, value in store.snapshot().items()} == {
        "geometry": {"means": (0, 3), "scales": (0, 3), "quats": (0, 4), "opacities": (0,)},
        "appearance": {"sh0": (0, 1, 3), "shN": (0, 15, 3)},
    }[group]


# ------------------------------------------------------------------------- against the GPU-only trainer's Gaussians


def trained_pair(num_gaussians: int) -> tuple[DeviceGaussians, BaselineGaussians]:
    """The same Gaussians with the same non-zero moments on the device and in host stores."""
    parameters = random_parameters(num_gaussians)
    parameters["scales"] += math.log(2) * torch.randn(num_gaussians, 3)
    parameters["opacities"] += math.log(0.005)
    adam = AdamOptions(dict.fromkeys(parameters, 1e-3), lambda step: 1e-3, (0.9, 0.999))
    device_store = DeviceGaussians(parameters, adam, device=torch.device("cpu"))
    for parameter in device_store.fetch(None).values():
        parameter.grad = torch.randn_like(parameter)
    device_store.update()
    host_stores = BaselineGaussians(device_store.parameters, adam, device=torch.device("cpu"))
    host_stores.load_state(device_store.state())
    return device_store, host_stores


def assert_pair_same(device_store: DeviceGaussians, host_stores: BaselineGaussians) -> None:
    expected, actual = device_store.state(), host_stores.state()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("revised_opacity", [False, True])
def test_growth_equals_that_of_device_gaussians(revised_opacity):
    torch.manual_seed(0)
    pair = trained_pair(400)
    marks = torch.randint(0, 3, (400,))
    for store in pair:
        generator = torch.Generator().manual_seed(5)
        grow(store, torch.where(marks == 1)[0], torch.where(marks == 2)[0], revised_opacity, generator)
    assert pair[1].num_gaussians == 400 + int((marks > 0).sum())
    assert_pair_same(*pair)


@pytest.mark.parametrize("step", [600, 3100])
def test_refinement_equals_that_of_device_gaussians(step):
    torch.manual_seed(0)
    pair = trained_pair(500)
    count = torch.randint(0, 4, (500,)).float()
    statistics = [count * 4e-4 * torch.rand(500), count, 0.3 * torch.rand(500)]
    for store in pair:
        densification = DefaultStrategy(DensificationRules(), scene_scale=2.0, seed=3)
        densification.statistics = Statistics(*(values.clone() for values in statistics))
        densification.refine(step, store)
        store.clamp_opacities(-4.0)
    assert pair[1].num_gaussians not in (0, 500)
    assert_pair_same(*pair)


# ----------------------------------------------------------------------------------------------------- host memory


@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
@pytest.mark.parametrize("group", GROUP_NAMES)
@pytest.mark.parametrize("options", [{}, {"moments": "bfloat16", "pad_to_cache_line": True}], ids=["plain", "options"])
def test_row_bytes_are_the_bytes_of_all_arrays(sh_degree, group, options):
    store = HostStore(random_parameters(7, sh_degree), group, **options)
    held = [store.last_step, *store.rows.tensors()]
    assert 7 * row_bytes(group, sh_degree, **options) == sum(tensor.nbytes for tensor in held)


def test_bytes_of_one_gaussian_are_the_documented_ones():
    assert row_bytes("appearance", 3) == 576 + 4
    assert row_bytes("geometry", 3) == 144 + 4
    assert row_bytes("geometry", 3, pad_to_cache_line=True) == 192 + 4
    assert "728" in HostStore.__doc__


def test_growth_keeps_addresses_contents_and_views():
    array = HostArray(48, max_rows=200_000)
    array.resize(10)
    array.tensor.copy_(torch.arange(480.0).view(10, 48))
    early = array.tensor
    address = early.data_ptr()
    assert address % 64 == 0
    for rows in (11, 5000, 5001, 60_000, 200_000):
        array.resize(rows)
        assert array.tensor.shape == (rows, 48)
        assert array.tensor.data_ptr() == address
        assert torch.equal(array.tensor[:10].flatten(), torch.arange(480.0))
        assert not array.tensor[10:].any()
    array.tensor[3] = -1
    assert (early[3] == -1).all()


def test_rows_that_come_back_are_zero():
    array = HostArray(12, max_rows=500_000)
    for rows, fewer in ((1000, 999), (500_000, 3), (400_000, 200_000), (100_000, 0), (300_000, 299_000)):
        array.resize(rows)
        array.tensor.fill_(7.0)
        array.resize(fewer)
        assert (array.tensor == 7.0).all()
        array.resize(rows)
        assert (array.tensor[:fewer] == 7.0).all()
        assert not array.tensor[fewer:].any()
        array.resize(0)


def test_views_outlive_the_array():
    array = HostArray(3, max_rows=1000)
    array.resize(1000)
    view = array.tensor[500:]
    view.fill_(4.0)
    del array
    gc.collect()
    assert (view == 4.0).all()


def test_more_rows_than_reserved_name_the_option():
    array = HostArray(3, max_rows=10)
    with pytest.raises(InputError, match="raise max_gaussians"):
        array.resize(11)
    assert array.rows == 0
    store = HostStore(random_parameters(8), "appearance", max_gaussians=10)
    before = store.read("shN").clone()
    with pytest.raises(InputError, match=r"11 Gaussians .* 10: raise max_gaussians"):
        store.append_copies(torch.arange(3))
    assert store.num_gaussians == 8
    assert torch.equal(store.read("shN"), before)
    assert (
        HostStore(random_parameters(8), "appearance", max_gaussians=5).num_gaussians == 8
    )  # the bound is one of growth


def test_a_failure_half_way_leaves_all_arrays_as_they_were(monkeypatch):
    store = HostStore(random_parameters(8), "appearance", max_gaussians=10)
    monkeypatch.setattr(store._values[-1], "max_rows", 8)
    with pytest.raises(InputError):
        store.append_copies(torch.arange(1))
    lengths = {*map(len, store.rows.tensors())}
    assert lengths | {store.num_gaussians} == {8}


def test_address_space_that_cannot_be_had_names_the_option():
    with pytest.raises(InputError, match="set max_gaussians lower"):
        HostArray(48, max_rows=1 << 50)


def resident_bytes(array: HostArray) -> int:
    """Of all that is reserved; what the process has of memory besides comes and goes, with what ran before."""
    page, whole = os.sysconf("SC_PAGE_SIZE"), array._bytes
    pages = np.empty(-(-whole.nbytes // page), np.uint8)
    address, num_bytes, states = (ctypes.c_void_p(n) for n in (whole.ctypes.data, whole.nbytes, pages.ctypes.data))
    assert ctypes.CDLL(None).mincore(address, num_bytes, states) == 0
    return page * int((pages & 1).sum())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may keep what is given back")
def test_removed_rows_give_memory_back_and_reserved_ones_take_none():
    array = HostArray(48, max_rows=1 << 26)  # 12 GiB
    assert resident_bytes(array) == 0
    rows = (128 << 20) // 192
    array.resize(rows)
    array.tensor.fill_(1.0)
    # The system may give pages of 2 MiB: what lies behind the rows in the last of them stays.
    assert 128 << 20 <= resident_bytes(array) <= 130 << 20
    array.resize(rows // 4)
    assert 32 << 20 <= resident_bytes(array) <= (34 + 2) << 20
    array.resize(0)
    assert resident_bytes(array) <= 2 << 20


PEAK_SCRIPT = """
    import torch
    from offload.store.morton import morton_order
    from offload.store.host_store import HostStore
    from offload.store.layout import row_bytes

    def status(key):
        with open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith(key)).split()[1])

    groups = {groups}
    few = 1000
    parameters = {{
        "means": torch.rand(few, 3), "scales": torch.rand(few, 3), "quats": torch.rand(few, 4),
        "opacities": torch.rand(few), "sh0": torch.rand(few, 1, 3), "shN": torch.rand(few, 15, 3),
    }}
    morton_order(parameters["means"])
    HostStore(parameters, groups[-1]).append_copies(torch.arange(few))  # starts all threads
    stores = [HostStore(parameters, group) for group in groups]

    def each(operation):
        for store in stores:
            operation(store)

    before = status("VmRSS")
    each(lambda store: store.append_copies(torch.arange(400_000) % few))
    each(lambda store: store.append_copies(torch.arange(0, 400_000, 10)))
    grown = stores[0].num_gaussians
    values = {{"means": torch.rand(40_000, 3), "scales": torch.rand(40_000, 3)}}
    each(lambda store: store.overwrite(torch.arange(0, 400_000, 10), values))
    means = stores[0].read("means") if "geometry" in groups else torch.rand(grown, 3)
    order = morton_order(means)
    each(lambda store: store.keep(order))
    kept = torch.where(torch.arange(grown) % 20 > 0)[0]
    each(lambda store: store.keep(kept))
    print((status("VmHWM") - before) / grown / sum(row_bytes(group, 3) for group in groups))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("groups", [("geometry", "appearance"), ("appearance",)])
def test_peak_memory_of_densification(groups):
    script = textwrap.dedent(PEAK_SCRIPT).format(groups=groups)
    finished = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        # Working memory goes back to the system when it is freed, as that of larger stores does anyway. Each thread has
        # a megabyte of it, which 64 threads would add to 255.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "2"},
    )
    assert 1.0 < float(finished.stdout) <= 1.1


# -------------------------------------------------------------------------------------------------- pinned parts


class FakeCudart:
    """Registers memory as CUDA does, and complains about what CUDA would not survive."""

    def __init__(self) -> None:
        self.parts = {}  # start: end

    def cudaHostRegister(self, start: int, num_bytes: int, flags: int) -> int:
        assert start % 4096 == 0
        assert num_bytes % 4096 == 0
        assert all(end <= start or first >= start + num_bytes for first, end in self.parts.items())
        self.parts[start] = start + num_bytes
        return 0

    def cudaHostUnregister(self, start: int) -> int:
        del self.parts[start]
        return 0


@pytest.fixture
def cudart(monkeypatch) -> FakeCudart:
    fake = FakeCudart()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(host_memory, "PART_BYTES", 1 << 20)
    yield fake
    gc.collect()
    assert not fake.parts  # all memory has been unregistered before it went


def test_all_rows_are_registered_in_parts_that_no_row_straddles(cudart):
    array = HostArray(48, max_rows=100_000, pin=True)
    for rows in (1, 10_000, 10_001, 50_000, 20_000, 19_999, 100_000, 0, 30_000):
        array.resize(rows)
        address = array.tensor.data_ptr()
        parts = sorted(cudart.parts.items())
        assert all(end == start for (_, end), (start, _) in pairwise(parts))
        if rows:
            assert parts[0][0] == address
            assert parts[-1][1] >= address + rows * 192
        assert all((end - address) % 192 == 0 for _, end in parts)
    assert len(cudart.parts) > 1


def test_growing_by_little_makes_few_parts(cudart):
    array = HostArray(48, max_rows=100_000, pin=True)
    for rows in range(50_000, 60_000, 100):
        array.resize(rows)
    initial_parts = 50_000 * 192 // (1 << 20) + 1
    assert len(cudart.parts) < initial_parts + 12


def test_what_a_refinement_removes_of_what_it_has_added_registers_nothing_anew(cudart):
    array = HostArray(48, max_rows=100_000, pin=True)
    array.resize(50_000)
    array.resize(55_000)
    parts = dict(cudart.parts)
    array.resize(53_500)
    assert cudart.parts == parts
    array.resize(51_000)
    assert sum(cudart.parts.values()) - sum(cudart.parts) < 1.02 * 51_000 * 192  # whole pages of whole rows


def test_memory_that_cuda_does_not_pin_is_reported(cudart, monkeypatch):
    store = HostStore(random_parameters(10), "appearance", max_gaussians=100_000, pin=True)
    monkeypatch.setattr(FakeCudart, "cudaHostRegister", lambda *arguments: 2)
    with pytest.raises(InputError, match="cannot pin"):
        store.append_copies(torch.zeros(50_000, dtype=torch.int64))
    assert store.num_gaussians == 10


@pytest.mark.cuda
def test_pinned_rows_are_copied_asynchronously_part_by_part(monkeypatch):
    monkeypatch.setattr(host_memory, "PART_BYTES", 8 << 20)
    array = HostArray(48, max_rows=1_000_000, pin=True)
    for rows in (100_000, 150_000):
        array.resize(rows)
        array.tensor.copy_(torch.randn(rows, 48))
        borders = sorted({min(end // 192, rows) for end in array._part_ends})
        assert len(borders) > 1
        copied = torch.empty(rows, 48, device="cuda")
        for first, last in pairwise([0, *borders]):
            part = array.tensor[first:last]
            assert part.is_pinned()
            copied[first:last].copy_(part, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(copied.cpu(), array.tensor)
    array.resize(20_000)
    assert array.tensor.is_pinned()
    assert torch.equal(array.tensor.cuda().cpu(), array.tensor)
    kept = array.tensor
    del array
    gc.collect()
    assert kept.is_pinned()


# ---------------------------------------------------------------------------------------------------- Morton order


def interleaved(x: int, y: int, z: int) -> int:
    return sum(
        (x >> bit & 1) << 3 * bit | (y >> bit & 1) << 3 * bit + 1 | (z >> bit & 1) << 3 * bit + 2 for bit in range(21)
    )


@pytest.mark.parametrize("threads", ["1", "4"])
def test_morton_order_sorts_interleaved_bits_and_is_stable(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    cells = np.random.default_rng(0).integers(0, 16, (5000, 3))
    cells[:2] = [[0, 0, 0], [16, 16, 16]]  # so that a cell of 1/16 of the extent is a whole number of native ones
    means = torch.from_numpy(cells).float()
    order = morton_order(means).tolist()
    native = [[min(int(c / 16 * 2**21), 2**21 - 1) for c in cell] for cell in cells.tolist()]
    codes = [interleaved(*cell) for cell in native]
    assert order == sorted(range(5000), key=lambda row: (codes[row], row))


def test_morton_order_of_many_points_is_the_same_for_any_number_of_threads(monkeypatch):
    means = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0))
    orders = []
    for threads in ("1", "3", "8"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        orders.append(morton_order(means))
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0].sort().values, torch.arange(100_000))


def block_extent(means: Tensor) -> float:
    """Mean over blocks of 64 points of their largest side."""
    blocks = means[: len(means) // 64 * 64].view(-1, 64, 3)
    return float((blocks.amax(1) - blocks.amin(1)).amax(-1).mean())


def test_far_points_do_not_make_the_cells_coarse():
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(20_000, 3, generator=generator)
    expected = block_extent(means[morton_order(means)])
    assert expected < 0.35  # a cube of 64 of the 20,000 points is 0.147 wide; random blocks are 0.97
    means[::400] *= 1e6
    means[7] = math.nan
    means[8] = math.inf
    means[9] = -math.inf
    order = morton_order(means)
    assert torch.equal(order.sort().values, torch.arange(20_000))
    ordered = means[order]
    near = ordered[(ordered.abs() <= 1).all(dim=1)]
    assert block_extent(near) < 1.2 * expected


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_morton_order_of_few_and_of_equal_points(n):
    assert torch.equal(morton_order(torch.full((n, 3), 2.0)), torch.arange(n))
    assert torch.equal(morton_order(torch.full((n, 3), math.nan)), torch.arange(n))


def test_morton_order_reads_strided_rows():
    rows = torch.randn(1000, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(morton_order(rows[:, 2:5]), morton_order(rows[:, 2:5].contiguous()))


def test_native_functions_take_threads_without_rows():
    native.touch_pages(np.empty(0, np.uint8), 8)
    native.compact_rows(np.empty((0, 3), np.int32), np.empty(0, np.int64), 8)
