"""Every model keeps to one contract: what is asked in a wrong order is refused, and what is allowed means the same."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_culling import named_geometry, random_cameras, random_geometry
from torch import Tensor

from offload.adam.options import AdamOptions
from offload.adam.state import current_rows
from offload.culling.cameras import Cameras
from offload.culling.strays import Strays
from offload.models import offloaded
from offload.models.baseline import BaselineGaussians
from offload.models.contract import ORDER, PLACES, GaussianModel, WrongOrder
from offload.models.deferred import DeferredGaussians
from offload.models.device import DeviceGaussians
from offload.models.forwarded import ForwardedGaussians
from offload.models.streamed import StreamedGaussians
from offload.models.tiled import TiledGaussians, TileResult, ViewTile
from offload.pipelines.packed import PackedPipeline
from offload.pipelines.resident import ResidentPipeline
from offload.pipelines.streamed import StreamedPipeline
from offload.pipelines.streamed_host import StreamedHostPipeline
from offload.pipelines.transfer import RowTransfer
from offload.tiles.budget import RowLimit
from tests.training_scripts import slow_but

CPU = torch.device("cpu")
N = 600
RATES = {"means": 1e-2, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 1e-2, "shN": 1e-3}
ADAM = AdamOptions(RATES, lambda step: RATES["means"], (0.9, 0.999))
BOUND = {"device": CPU, "max_gaussians": 2 * N}
MODELS: dict[str, Callable[[dict[str, Tensor]], GaussianModel]] = {
    "GPU only": lambda start: DeviceGaussians(start, ADAM, device=CPU),
    "GPU only, deferred": lambda start: DeferredGaussians(start, ADAM, device=CPU),
    "baseline": lambda start: BaselineGaussians(start, ADAM, **BOUND),
    "forwarded": lambda start: ForwardedGaussians(start, ADAM, **BOUND),
    "forwarded, host": lambda start: ForwardedGaussians(start, ADAM, geometry="host", **BOUND),
    "streamed": lambda start: StreamedGaussians(start, ADAM, **BOUND),
    "streamed, host": lambda start: StreamedGaussians(start, ADAM, geometry="host", **BOUND),
    "GPU only, compact": lambda start: DeferredGaussians(start, ADAM, device=CPU, state="compact"),
    "forwarded, compact": lambda start: ForwardedGaussians(start, ADAM, state="compact", **BOUND),
    "forwarded, host, compact": lambda start: ForwardedGaussians(
        start, ADAM, geometry="host", state="compact", **BOUND
    ),
    "streamed, compact": lambda start: StreamedGaussians(start, ADAM, state="compact", **BOUND),
    "streamed, host, compact": lambda start: StreamedGaussians(start, ADAM, geometry="host", state="compact", **BOUND),
    "tiled": lambda start: TiledGaussians(start, ADAM, limit=RowLimit(1.0), **BOUND),
    "tiled, host": lambda start: TiledGaussians(start, ADAM, limit=RowLimit(1.0), geometry="host", **BOUND),
    "tiled, compact": lambda start: TiledGaussians(start, ADAM, limit=RowLimit(1.0), state="compact", **BOUND),
    "tiled, host, compact": lambda start: TiledGaussians(
        start, ADAM, limit=RowLimit(1.0), geometry="host", state="compact", **BOUND
    ),
}
# The quick set has one of each class and of each store.
QUICK = ("GPU only", "baseline", "forwarded, host", "streamed", "streamed, compact", "tiled")
KINDS = pytest.mark.parametrize("kind", slow_but(QUICK, MODELS))
A, B, C = (random_cameras(seed, count=1, fov=50) for seed in (3, 7, 11))


def start() -> dict[str, Tensor]:
    rows = random_geometry(N, seed=0)
    generator = torch.Generator().manual_seed(1)
    return {
        **named_geometry(rows),
        "sh0": torch.randn(N, 1, 3, generator=generator),
        "shN": torch.randn(N, 15, 3, generator=generator),
    }


def backward(rows: dict[str, Tensor]) -> None:
    """Give every row a gradient that depends on its values."""
    rows = dict(rows)
    if "colors" in rows:
        colors = rows.pop("colors")
        rows |= {"sh0": colors[:, :1], "shN": colors[:, 1:]}
    sum(value.square().sum() for value in rows.values()).backward()


def step(model: GaussianModel, cameras: Cameras, upcoming: Cameras | None = None) -> None:
    rows = model.fetch(cameras)
    if upcoming is not None:
        model.prefetch(upcoming)
    backward(rows)
    model.update()


def values_of(model: GaussianModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.rows(0, model.num_gaussians).items()}


def all_ids(model: GaussianModel) -> Tensor:
    return torch.arange(model.num_gaussians)


OF_EACH_STATE = {"parameters/means": torch.zeros(0, 3), "packed/geometry": torch.zeros(0, 28, dtype=torch.int32)}
NO_ROWS = defaultdict(lambda: torch.tensor(0), OF_EACH_STATE)  # of any model
READING = {
    "rows": lambda model: model.rows(0, 3),
    "read_view": lambda model: model.read_view(A),
    "state": lambda model: model.state(),
}
CHANGING = {
    "read": lambda model: model.read("means"),
    "append_copies": lambda model: model.append_copies(torch.arange(3)),
    "moving_rows": lambda model: model.moving_rows(torch.arange(3)),
    "append_rows": lambda model: model.append_rows(NO_ROWS),
    "truncate": lambda model: model.truncate(N),
    "overwrite": lambda model: model.overwrite(torch.arange(3), {"opacities": torch.zeros(3)}),
    "relocate": lambda model: model.relocate(torch.arange(3), torch.arange(5, 8)),
    "keep": lambda model: model.keep(all_ids(model)),
    "clamp_opacities": lambda model: model.clamp_opacities(3.0),
    "load_state": lambda model: model.load_state({}),
}


def refused(call: Callable[[], object], method: str, where: str) -> None:
    """The call is refused by one sentence that names the method and says where it was called."""
    with pytest.raises(WrongOrder, match=re.escape(f"{method}() was called {where}")) as error:
        call()
    assert str(error.value).count(".") == 1


@KINDS
def test_rows_that_have_moved_go_on_as_they_would_have_done(kind):
    """Into a model that was without, and within one."""
    stayed, left = MODELS[kind](start()), MODELS[kind](start())
    empty = MODELS[kind]({name: value[:0] for name, value in start().items()})
    for cameras in (A, B, A):
        for model in (stayed, left, empty):
            step(model, cameras)
    stayed.moving_rows(all_ids(stayed))  # which applies the steps that they have skipped
    order = torch.cat([torch.arange(5, N), torch.arange(5)])
    some, others = left.moving_rows(torch.arange(5)), left.moving_rows(torch.arange(5, N))
    left.append_rows(some)
    left.keep(torch.cat([torch.arange(5, N), torch.arange(N, N + 5)]))
    empty.append_rows(others)
    empty.append_rows(some)
    stayed.keep(order)
    for cameras in (A, B, A):
        for model in (stayed, left, empty):
            step(model, cameras)
    for name, value in values_of(stayed).items():
        assert torch.equal(values_of(left)[name], value)
        assert torch.equal(values_of(empty)[name], value)


@KINDS
def test_a_wrong_order_is_refused_and_changes_nothing(kind):
    model, twin = MODELS[kind](start()), MODELS[kind](start())
    refused(model.update, "update", "between steps")
    refused(lambda: model.prefetch(B), "prefetch", "between steps")
    rows = model.fetch(A)
    refused(lambda: model.fetch(A), "fetch", "between fetch() and update()")
    for method, call in (READING | CHANGING).items():
        refused(lambda call=call: call(model), method, "between fetch() and update()")
    model.prefetch(B)
    refused(lambda: model.prefetch(B), "prefetch", "between prefetch() and update()")
    refused(lambda: model.fetch(B), "fetch", "between prefetch() and update()")
    for method, call in (READING | CHANGING).items():
        refused(lambda call=call: call(model), method, "between prefetch() and update()")
    backward(rows)
    model.update()
    refused(model.update, "update", "between steps")
    for other in (C, replace(B)):
        with pytest.raises(WrongOrder, match="fetch\\(\\) was given other cameras than prefetch\\(\\)"):
            model.fetch(other)
    step(model, B)
    step(twin, A, B)
    step(twin, B)
    assert model.steps_done == 2
    expected = values_of(twin)
    assert all(torch.equal(value, expected[name]) for name, value in values_of(model).items())


@KINDS
@pytest.mark.parametrize("prefetched", [False, True])
def test_a_step_that_is_undone_leaves_no_trace(kind, prefetched):
    """Also where the next one is on another view, or where nothing had begun."""
    model, twin = MODELS[kind](start()), MODELS[kind](start())
    for gaussians in (model, twin):
        step(gaussians, A)
    before = values_of(model)
    for cameras in (B, C):
        rows = model.fetch(cameras)
        if prefetched:
            model.prefetch(A)
        backward(rows)
        for value in rows.values():
            value.grad = None
        model.undo_step()
        model.undo_step()
        assert all(torch.equal(value, before[name]) for name, value in values_of(model).items())
    step(model, C)
    step(twin, C)
    expected = values_of(twin)
    assert all(torch.equal(value, expected[name]) for name, value in values_of(model).items())


@KINDS
def test_looking_keeps_what_was_prefetched_and_changing_drops_it(kind):
    model = MODELS[kind](start())
    for look in READING.values():
        step(model, A, B)
        look(model)
        with pytest.raises(WrongOrder, match="other cameras"):
            model.fetch(C)
        step(model, B)
    for name, change in CHANGING.items():
        if name == "load_state":
            state = {key: value.clone() for key, value in model.state().items()}
            change = lambda model, state=state: model.load_state(state)  # noqa: E731
        step(model, A, B)
        change(model)
        model.truncate(N)
        assert "upcoming/ids" not in model.state()
        step(model, C)  # other rows than those of B


@KINDS
def test_rows_are_removed_from_the_end_right_after_a_step(kind):
    model = MODELS[kind](start())
    step(model, A)
    expected = values_of(model)
    model.truncate(N - 5)
    state = model.state()
    assert {len(value) for key, value in state.items() if key.startswith(("last_step/", "packed/g"))} <= {N - 5}
    assert all(torch.equal(value, expected[name][: N - 5]) for name, value in values_of(model).items())
    model.append_copies(torch.arange(3))
    assert len(model.read("means")) == N - 2


@KINDS
def test_rows_that_change_behind_a_prefetch_are_fetched_anew(kind):
    model, twin = MODELS[kind](start()), MODELS[kind](start())
    for gaussians, upcoming in ((model, B), (twin, None)):
        step(gaussians, A, upcoming)
        gaussians.overwrite(torch.arange(0, N, 2), {"sh0": torch.ones(N // 2, 1, 3)})
        gaussians.keep(torch.arange(N - 1, 9, -1))
        step(gaussians, B)
    expected = values_of(twin)
    for name, value in values_of(model).items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-7), name


@KINDS
def test_what_is_read_is_current_in_each_step_and_after_a_state_is_loaded(kind):
    """All rows are brought to a step but once in it, so what is done in a step before has no say in the next."""
    model, geometry = MODELS[kind](start()), ("means", "scales", "quats", "opacities")

    def check() -> None:
        expected, ids = values_of(model), torch.tensor([N - 1, 3, 3, 0])
        for name in geometry:
            assert torch.equal(model.read(name, ids), expected[name][ids])
            assert torch.equal(model.read(name), expected[name])

    for cameras in (A, B, C):
        step(model, cameras)
        check()
    step(model, A)
    lagging = {key: value.clone() for key, value in model.state().items()}
    check()
    model.load_state(lagging)
    check()
    check()


@KINDS
def test_relocated_rows_start_as_copies_without_moments(kind):
    generator = torch.Generator().manual_seed(0)
    model, reference = MODELS[kind](start()), MODELS["GPU only"](start())
    drawn = []
    for cameras in (A, B, A):
        step(model, cameras)
        drawn.append(model.ids)
    before = values_of(model)
    source, target = torch.randperm(N, generator=generator)[:40].view(2, 20)
    model.relocate(source, target)
    after = values_of(model)
    rounding = 2**-10 if "compact" in kind else 0.0  # of values that are caught up to be copied
    for name, value in after.items():
        assert torch.equal(value[target], value[source])
        assert torch.allclose(value[source], before[name][source], rtol=rounding, atol=rounding * 2**-14)
        others = torch.ones(N, dtype=torch.bool).index_fill(0, torch.cat([source, target]), False)
        assert torch.allclose(value[others], before[name][others], rtol=1e-6, atol=1e-7)
    state = model.state()
    for name in before:
        moments = next(current_rows(state, name))[1]
        assert not moments["exp_avg"][target].any()
        assert not moments["exp_avg_sq"][target].any()
        assert moments["exp_avg"][drawn[-1]].any()
    reference.load_state(state)
    for gaussians in (model, reference):
        step(gaussians, B)
    moved = torch.isin(target, model.ids)  # the GPU-only model gives a gradient to rows that B does not see
    assert moved.any()
    expected = values_of(reference)
    for name, value in values_of(model).items():
        step_on = expected[name][target[moved]]
        assert torch.allclose(value[target[moved]], step_on, rtol=1e-5 + rounding, atol=1e-6)


@KINDS
def test_overwritten_rows_go_on_with_the_moments_that_are_left(kind):
    """Those of the state, with all steps applied: rows that B alone has shown have slept through one."""
    model, reference = MODELS[kind](start()), MODELS["GPU only"](start())
    for cameras in (A, B, A):
        step(model, cameras)
    reference.load_state({key: value.clone() for key, value in model.state().items()})
    ids = torch.arange(0, N, 3)
    values = {"opacities": torch.randn(len(ids), generator=torch.Generator().manual_seed(2))}
    for gaussians in (model, reference):
        gaussians.overwrite(ids, values, leaves_moments=True)
    bound = 2e-2 if "compact" in kind else 1e-5  # of 8-bit moments
    states = [model.state(), reference.state()]
    for name, value in values_of(reference).items():
        actual, expected = (next(current_rows(state, name))[1] for state in states)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert expected[moment][ids].any()
            difference = actual[moment][ids] - expected[moment][ids]
            assert difference.norm() < bound * expected[moment][ids].norm(), (name, moment)
        assert (values_of(model)[name] - value).norm() < bound * value.norm(), name
    assert torch.allclose(values_of(model)["opacities"][ids], values["opacities"], rtol=2**-8)


@pytest.mark.parametrize("kind", ["tiled", "tiled, host"])
def test_a_view_in_tiles_is_a_fetch_and_a_prefetch(kind):
    model = MODELS[kind](start())

    def train_tile(tile: ViewTile) -> TileResult:
        refused(lambda: model.rows(0, 3), "rows", "before train_view() has succeeded")
        backward(tile.rows)
        return TileResult(torch.zeros(()), 1, 1)

    model.train_view(A, B, train_tile)
    refused(lambda: model.train_view(B, None, train_tile), "train_view", "between prefetch() and update()")
    refused(lambda: model.view_tiles(A), "view_tiles", "between prefetch() and update()")
    model.update()
    with pytest.raises(WrongOrder, match="other cameras"):
        model.train_view(C, None, train_tile)
    model.train_view(B, None, train_tile)
    model.undo_step()
    model.train_view(B, None, train_tile)
    model.update()
    assert model.steps_done == 2


def test_the_table_names_every_verb_and_leads_back_between_steps():
    assert {verb for _, verb in ORDER} == set(PLACES)
    phases = set(ORDER.values())
    assert {phase for phase, _ in ORDER} == phases | {"before fetch() has succeeded"}
    for phase in phases - {"between steps"}:
        assert ORDER[phase, "update"] == "between steps"


@KINDS
def test_counters_may_be_asked_at_any_time(kind):
    model = MODELS[kind](start())
    model.counters()
    rows = model.fetch(A)
    model.counters()
    model.prefetch(B)
    model.counters()
    backward(rows)
    model.update()
    counters = model.counters()
    if kind.startswith("streamed"):
        assert counters.traffic["rows_written"] > 0
    if kind == "GPU only":
        assert counters.staging_allocations is None


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    """Let device memory run out once, in the next call of a method."""
    method = getattr(owner, name)

    def fail(*arguments: object, **named: object) -> None:
        monkeypatch.setattr(owner, name, method)
        raise torch.cuda.OutOfMemoryError("on purpose")

    monkeypatch.setattr(owner, name, fail)


def travel_of(kind: str) -> tuple[type, str]:
    """Return what allocates the rows of a view on the device."""
    return {
        "GPU only, deferred": (ResidentPipeline, "_new_view"),
        "streamed": (StreamedPipeline, "_new_view"),
        "streamed, host": (StreamedHostPipeline, "_new_view"),
        "streamed, compact": (PackedPipeline, "_new_view"),
        "streamed, host, compact": (PackedPipeline, "_new_view"),
        "GPU only, compact": (ResidentPipeline, "_new_view"),
    }.get(kind, (RowTransfer, "upload"))


CAN_FAIL = slow_but(QUICK, [kind for kind in MODELS if kind != "GPU only"])
TRAVELLING = pytest.mark.parametrize("kind", CAN_FAIL)


@TRAVELLING
@pytest.mark.parametrize("begun", slow_but(["True"], [False, True]))
@pytest.mark.parametrize("where", ["travel", "rendering"])
def test_a_fetch_that_fails_may_be_repeated_or_undone(kind, begun, where, monkeypatch):
    model, repeating, twin, repeating_twin = (MODELS[kind](start()) for _ in range(4))
    for gaussians in (model, repeating, twin, repeating_twin):
        if begun:
            step(gaussians, A)
    for gaussians in (model, repeating):
        fail_once(monkeypatch, *(travel_of(kind) if where == "travel" else (gaussians, "_to_render")))
        with pytest.raises(torch.cuda.OutOfMemoryError):
            gaussians.fetch(B)
        for method, call in {**READING, **CHANGING, "update": lambda model: model.update()}.items():
            refused(lambda call=call, it=gaussians: call(it), method, "before fetch() has succeeded")
        with pytest.raises(WrongOrder, match="other cameras than the fetch\\(\\) before it"):
            gaussians.fetch(C)
    model.undo_step()
    rows, expected = model.fetch(C), twin.fetch(C)
    assert torch.equal(model.ids, twin.ids)
    assert all(torch.equal(value, expected[name]) for name, value in rows.items())
    for gaussians, got in ((model, rows), (twin, expected)):
        backward(got)
        gaussians.update()
    step(repeating, B)
    step(repeating_twin, B)
    for one, other in ((model, twin), (repeating, repeating_twin)):
        expected = values_of(other)
        assert all(torch.equal(value, expected[name]) for name, value in values_of(one).items())


@TRAVELLING
@pytest.mark.parametrize("fails", ["rows", "colours"])
def test_a_fetch_that_is_repeated_gives_the_rows_that_were_prefetched(kind, fails, monkeypatch):
    """And no others, which a row with a gradient of zero would round otherwise."""
    model, sh_degree = MODELS[kind](start()), None if fails == "rows" else 3
    if sh_degree is not None and vars(model).get("_stored") is None:
        pytest.skip("harmonics are rendered from their rows")
    step(model, A, B)
    known = model.state().get("upcoming/ids")
    if known is None:
        pytest.skip("nothing is prefetched")
    known = known.clone()
    fail_once(monkeypatch, *((model, "_to_render") if fails == "rows" else (offloaded, "StoredHarmonics")))
    monkeypatch.setattr(Strays, "beside", lambda strays, ids: pytest.fail("culled anew"))  # as each place does
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model.fetch(B, sh_degree)
    model.fetch(B, sh_degree)
    assert torch.equal(model.ids, known)


@TRAVELLING
def test_a_prefetch_that_fails_may_be_undone(kind, monkeypatch):
    model, twin = MODELS[kind](start()), MODELS[kind](start())
    for gaussians in (model, twin):
        step(gaussians, A)
    rows = model.fetch(B)
    fail_once(monkeypatch, *travel_of(kind))
    with contextlib.suppress(torch.cuda.OutOfMemoryError):  # where no worker has it
        model.prefetch(A)
    backward(rows)
    model.undo_step()
    monkeypatch.undo()
    step(model, C)
    step(twin, C)
    assert torch.equal(model.ids, twin.ids)
    expected = values_of(twin)
    assert all(torch.equal(value, expected[name]) for name, value in values_of(model).items())


@pytest.mark.parametrize("geometry", ["device", "host"])
@pytest.mark.parametrize("good_tiles", [0, 1])
def test_a_view_that_fails_in_a_tile_can_only_be_undone(geometry, good_tiles):
    model, twin = (TiledGaussians(start(), ADAM, limit=RowLimit(0.05), geometry=geometry, **BOUND) for _ in range(2))
    wide = scaled(A, 8)

    def train_tile(tile: ViewTile) -> TileResult:
        backward(tile.rows)
        return TileResult(torch.zeros(()), 1, 1)

    def fail_later(tile: ViewTile) -> TileResult:
        tiles.append(tile)
        if len(tiles) > good_tiles:
            raise ValueError("on purpose")
        return train_tile(tile)

    tiles: list[ViewTile] = []
    with pytest.raises(ValueError, match="on purpose"):
        model.train_view(wide, B, fail_later)
    assert len(tiles) == good_tiles + 1
    for method, call in {**READING, **CHANGING, "update": lambda model: model.update()}.items():
        refused(lambda call=call: call(model), method, "before train_view() has succeeded")
    for method, call in {
        "fetch": lambda: model.fetch(wide),
        "prefetch": lambda: model.prefetch(B),
        "train_view": lambda: model.train_view(wide, B, train_tile),
    }.items():
        refused(call, method, "before train_view() has succeeded")
    if good_tiles:
        with pytest.raises(RuntimeError, match="applied in part"):
            model.undo_step()
        return
    model.undo_step()
    for gaussians in (model, twin):
        gaussians.train_view(wide, None, train_tile)
        gaussians.update()
    expected = values_of(twin)
    assert all(torch.equal(value, expected[name]) for name, value in values_of(model).items())


def scaled(cameras: Cameras, factor: int) -> Cameras:
    """Return the same cameras with pictures of as many times the pixels a side."""
    Ks = cameras.Ks.clone()
    Ks[:, :2] *= factor
    return replace(cameras, width=factor * cameras.width, height=factor * cameras.height, Ks=Ks)


@KINDS
@pytest.mark.parametrize(
    ("sources", "targets", "sentence"),
    [
        ([1, 2, 3], [10, 11], "3 rows cannot be copied onto 2"),
        ([1, 2], [10, 11, 12], "2 rows cannot be copied onto 3"),
        ([1, 2, 3], [3, 4, 5], "the source and the target"),
        ([1, 2, 3], [10, 11, 10], "the target of several"),
    ],
)
def test_a_relocation_that_is_none_is_refused_and_changes_nothing(kind, sources, targets, sentence):
    model = MODELS[kind](start())
    step(model, A, B)
    before = values_of(model)
    with pytest.raises(ValueError, match=sentence):
        model.relocate(torch.tensor(sources), torch.tensor(targets))
    assert all(torch.equal(value, before[name]) for name, value in values_of(model).items())
    model.relocate(torch.tensor([1, 1, 2]), torch.tensor([10, 11, 12]))
    assert torch.equal(model.rows(11, 12)["means"], before["means"][1:2])


@pytest.mark.parametrize("geometry", ["device", "host"])
def test_tiles_are_read_while_rows_stay(geometry):
    model = TiledGaussians(start(), ADAM, limit=RowLimit(0.05), geometry=geometry, **BOUND)
    wide = scaled(A, 8)
    tiles = model.view_tiles(wide)
    next(tiles)
    model.rows(0, 3)
    model.fetch(B)
    refused(lambda: next(tiles), "view_tiles", "between fetch() and update()")
    model.undo_step()
    for change in (lambda: model.keep(all_ids(model)), lambda: step(model, B)):
        tiles = model.view_tiles(wide)
        next(tiles)
        change()
        with pytest.raises(WrongOrder, match="view_tiles\\(\\) was read on after rows had changed"):
            next(tiles)
    assert len(list(model.view_tiles(wide))) > 1


@pytest.mark.parametrize("is_next_there", [False, True])
@pytest.mark.parametrize(
    "kind", ["streamed, compact", "streamed, host, compact", "GPU only, compact", "forwarded, host, compact"]
)
def test_what_was_not_asked_for_before_the_update_is_refused(kind, is_next_there):
    model = MODELS[kind](start())
    rows = model.fetch(A)
    backward(dict(rows))
    model.update()
    before, rows = rows["opacities"], model.fetch(A)  # asked for by the copy
    assert len(before) == len(rows["means"])
    model.update()
    if is_next_there:
        model.fetch(A)
    with pytest.raises(WrongOrder, match="first asked for after the step"):
        _ = rows["opacities"]


@KINDS
@pytest.mark.parametrize("change", [name for name in CHANGING if name != "load_state"])
def test_ids_are_those_of_the_last_fetch_until_rows_are_changed(kind, change):
    model = MODELS[kind](start())
    step(model, A, B)
    ids = model.ids
    model.rows(0, 3)
    assert torch.equal(model.ids, ids)
    CHANGING[change](model)
    with pytest.raises(WrongOrder, match="ids was asked for after rows had changed"):
        _ = model.ids
    model.fetch(B)
    assert len(model.ids) > 0


@KINDS
def test_names_and_rows_that_there_are_not_are_refused(kind):
    model = MODELS[kind](start())
    before = values_of(model)
    for first, last in ((0, N + 1), (-1, 3), (3, 2), (N + 1, N + 1)):
        with pytest.raises(IndexError, match=f"rows {first} to {last - 1} of {N}"):
            model.rows(first, last)
    with pytest.raises(ValueError, match='"colors" is no parameter of Gaussians'):
        model.overwrite(torch.arange(2), {"opacities": torch.zeros(2), "colors": torch.zeros(2, 3)})
    assert all(torch.equal(value, before[name]) for name, value in values_of(model).items())
    assert len(model.rows(N, N)["means"]) == 0
