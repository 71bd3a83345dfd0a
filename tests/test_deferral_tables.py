"""The tables of deferred Adam: sums over the steps that a row has skipped, on the CPU and as a kernel in Triton."""

from __future__ import annotations

import math

import pytest
import torch

from offload.adam import deferral
from offload.adam.deferral import DeferralTables, begin_steps
from tests.triton_places import ON_GPU, WITHOUT_GPU

BETAS = (0.9, 0.999)


def rates_at(step: int) -> list[float]:
    """Of two schedules; the second falls, and has more digits than float32 holds."""
    return [1.0, 1e-3 * 0.97**step]


def tables_of(kind: str, device: str, schedules: int, monkeypatch: pytest.MonkeyPatch) -> DeferralTables:
    monkeypatch.setattr(deferral, "FIRST_CAPACITY", 512)  # two blocks: the interpreter takes milliseconds for each
    if kind == "triton":
        from offload.adam import deferral_triton

        monkeypatch.setattr(deferral, "kernels_for", lambda device, module: deferral_triton)
    else:
        monkeypatch.setattr(deferral, "kernels_for", lambda device, module: deferral)
    return DeferralTables(torch.ones(schedules, 4), BETAS, 1e-15, torch.device(device))


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("schedules", [1, 2])
def test_sums_are_those_of_the_formula(kind, device, schedules, monkeypatch):
    """In float64: over more steps than matter, of which the kernel takes more than a block; what is older rests."""
    tables, (b1, b2), steps = tables_of(kind, device, schedules, monkeypatch), BETAS, 330
    expected = torch.zeros(schedules, steps + 1, dtype=torch.float64)
    for t in range(1, steps + 1):
        tables.begin_step(rates_at(t)[:schedules])
        size = math.sqrt(1 - b2**t) / (1 - b1**t)
        ages = t - torch.arange(t, dtype=torch.float64)  # of the steps before
        for schedule, rate in enumerate(rates_at(t)[:schedules]):
            expected[schedule, :t] += rate * size * (b1 / math.sqrt(b2)) ** ages
    # What is older than `NEGLIGIBLE` says is left out: 1e-12 of the first term, over all steps 1e-11 of the sum.
    torch.testing.assert_close(tables.sums[:, : steps + 1].cpu(), expected, rtol=1e-10, atol=0.0)
    assert not tables.sums[:, steps + 1 :].any()


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("steps", [0, 3, 300])
def test_a_step_that_is_undone_leaves_no_trace(kind, device, steps, monkeypatch):
    tables = tables_of(kind, device, 2, monkeypatch)
    for t in range(1, steps + 1):
        tables.begin_step(rates_at(t))
    before = tables.sums.clone()
    tables.begin_step(rates_at(steps + 1))
    assert not torch.equal(tables.sums, before)
    tables.undo_step()
    assert torch.equal(tables.sums, before)


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("schedules", [(2, 1), (1, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize("apart", [0, 1])
def test_steps_that_begin_together_are_those_that_begin_alone(kind, device, schedules, apart, monkeypatch):
    """Bit for bit, and as they are undone; also where one table is a step ahead, so that each has its own launch."""
    alone, together = ([tables_of(kind, device, n, monkeypatch) for n in schedules] for _ in range(2))
    for tables in (alone, together):
        for t in range(1, 1 + apart):
            tables[0].begin_step(rates_at(t)[: schedules[0]])
    for t in (1, 2, 3, 4, 5):
        rates = [rates_at(t)[:n] for n in schedules]
        for tables, of_table in zip(alone, rates, strict=True):
            tables.begin_step(of_table)
        begin_steps(together, rates)
        if t == 3:
            for tables in (*alone, *together):
                tables.undo_step()
        for one, other in zip(alone, together, strict=True):
            assert (one.step, one.eps, one.rates) == (other.step, other.eps, other.rates)
            assert torch.equal(one.sums, other.sums)
            assert torch.equal(one.skipped(previous=True).sums, other.skipped(previous=True).sums)
    assert [each.step for each in together] == [4 + apart, 4]


@pytest.mark.parametrize("lacking", ["_add", "_grow"])
def test_a_step_for_which_memory_lacks_has_not_begun(lacking, monkeypatch):
    """Nor is the step before undone with it, by whoever undoes those that have begun; the next try ends as any."""
    tables, others = (tables_of("torch", "cpu", 2, monkeypatch) for _ in range(2))
    steps = tables.sums.shape[1] - 1 if lacking == "_grow" else 3
    for each in (tables, others):
        each.load_state({"step_count": torch.tensor(steps - 1)})
        each.begin_step(rates_at(0))

    def fail(*_args: object) -> None:
        raise MemoryError

    before, eps = tables.sums.clone(), tables.eps
    with monkeypatch.context() as patch:
        patch.setattr(tables, lacking, fail)
        with pytest.raises(MemoryError):
            tables.begin_step(rates_at(1))
    assert tables.step == steps
    assert tables.eps == eps
    assert torch.equal(tables.sums, before)
    for each in (tables, others):
        each.begin_step(rates_at(1))
    assert torch.equal(tables.sums, others.sums)
    assert tables.step == steps + 1 < tables.decays.shape[1]


@pytest.mark.cuda
def test_the_kernel_adds_as_torch_does():
    """Bit for bit, on a GPU."""
    from offload.adam import deferral_triton

    torch.manual_seed(0)
    sums, powers = torch.rand(2, 700, dtype=torch.float64).cuda(), torch.rand(300, dtype=torch.float64).cuda()
    others, changed = sums.clone(), slice(13, 310)
    (before,) = deferral.add_step([sums], changed, powers, [rates_at(7)])
    assert torch.equal(deferral_triton.add_step([others], changed, powers, [rates_at(7)])[0], before)
    assert torch.equal(others, sums)
