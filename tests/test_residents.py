"""Rows that stay on the device: which they are, and that nothing else depends on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import simple_trainer_hybrid_streamed
from offload.pipelines import residents as resident_rows
from offload.pipelines.arena import Arena
from offload.pipelines.residents import BYTES, MOST_SHOWN, most_shown
from tests.interrupted_runs import DENSIFYING, STEPS, assert_same_state, run_script, saved
from tests.test_packed_pipeline import ROW_BYTES, N, Training, ids, views_of_all_kinds
from tests.test_streamed_pipeline import random_views
from tests.training_scripts import slow_but


@pytest.fixture(autouse=True)
def _soon(monkeypatch) -> None:
    """Residents are chosen after three views, six more, and so on."""
    monkeypatch.setattr(resident_rows, "FIRST_CHOICE", 3)
    monkeypatch.setattr(resident_rows, "CHOICES", 6)


def train(
    views: list[Tensor], share: float, after: Callable[[Training, int], None] = lambda training, step: None
) -> Training:
    """Train on all views, each known ahead; every value of every view is compared, and all rows in the end."""
    training = Training(views, resident_share=share)
    training.prefetches = lambda step: True
    training.run(lambda step: after(training, step))
    training.assert_exact()
    return training


def resident_ids(training: Training) -> list[int]:
    rows = training.pipeline._residents.rows
    return [] if rows is None else (rows.places >= 0).nonzero().squeeze(1).tolist()


def test_the_rows_that_are_shown_most_often():
    shown = torch.tensor([3, 0, 1, 2, 1, 3, 0, 2, 255], dtype=torch.uint8)
    assert [most_shown(shown, most).tolist() for most in (0, 1, 2, 4, 5, 6, 7, 9)] == [
        [],
        [8],
        [0, 8],  # of equals the first
        [0, 3, 5, 8],
        [0, 3, 5, 7, 8],
        [0, 2, 3, 5, 7, 8],
        [0, 2, 3, 4, 5, 7, 8],
        [0, 2, 3, 4, 5, 7, 8],  # none that was never shown
    ]
    torch.manual_seed(0)
    shown = torch.randint(0, 20, (1000,), dtype=torch.uint8)
    for most in (1, 50, 333, 1000):
        chosen = most_shown(shown, most)
        assert (chosen[1:] > chosen[:-1]).all()
        others = torch.ones(1000, dtype=torch.bool)
        others[chosen] = False
        assert len(chosen) == min(most, int((shown > 0).sum()))
        assert shown[chosen].min() >= shown[others].max()


@pytest.mark.parametrize("share", slow_but(["0.5"], [0.1, 0.5, 1.0]))
def test_no_bit_depends_on_where_rows_lie(share):
    counts = []
    train(views_of_all_kinds(0), share, lambda training, step: counts.append(len(resident_ids(training))))
    assert counts[:3] == [0, 0, 0]
    assert max(counts) == share * N if share < 1 else max(counts) > 0.9 * N


def test_rows_counted_as_travelling():
    """A resident row is fetched once and written once, by `finish`; other rows each time."""
    views = [ids(0, 1), ids(0, 1), ids(0, 1), ids(2), ids(3), ids(4), ids(0, 5), ids(5), ids(7), ids(1, 5)]
    resident, moved = [], []

    def note(training: Training, step: int) -> None:
        moved.append(training.pipeline.rows_moved)
        resident.append(resident_ids(training))

    training = train(views, 2 / N, note)
    assert resident == [[]] * 3 + [[0, 1]] * 6 + [[0, 5]]
    fetched, written = ([counts[name] for counts in moved] for name in ("rows_fetched", "rows_written"))
    # Both residents, and then what the view after the present one needs, each time: 3, 4, 5, nothing, 7, and 5
    # again, which a small view does not take from the view before the last; and the next residents.
    assert [count - fetched[2] for count in fetched[3:]] == [2 + 1, 4, 5, 5, 6, 7, 7 + 2]
    # Rows 3, 4, none, 5 and 7; in the end the first residents, and row 1 of the last view.
    assert [count - written[3] for count in written[3:]] == [0, 1, 2, 2, 3, 4, 4 + 2 + 1]
    assert training.pipeline.rows_moved["rows_written"] == written[-1] + 2  # by `assert_exact`, which finishes


def test_counts_end_at_the_largest_and_what_is_long_ago_counts_less():
    training = Training([ids(0, 1)], resident_share=0.5)
    residents = training.pipeline._residents
    for _ in range(MOST_SHOWN + 10):
        residents.count(ids(3))
    residents.count(ids(4))
    assert residents._shown.tolist()[3:5] == [MOST_SHOWN, 1]
    assert residents.chosen(10**9).tolist() == [3, 4]
    assert residents._shown.tolist()[3:5] == [MOST_SHOWN // 2, 0]


@pytest.mark.slow
def test_what_views_leave_bounds_the_share(monkeypatch):
    monkeypatch.setattr(Arena, "spare_bytes", lambda self: 5 * ROW_BYTES + BYTES * N)
    counts = []
    train(random_views(N, 20), 1.0, lambda training, step: counts.append(len(resident_ids(training))))
    assert max(counts) == 5


@pytest.mark.slow
def test_fewer_rows_stay_where_memory_cannot_be_had(monkeypatch):
    """However it was counted: half as many, and so on, and the run goes on."""
    with_space = resident_rows.Residents._with_space

    def has_space(self, count: int) -> object:
        if count > 6:
            raise torch.OutOfMemoryError("a defect")
        return with_space(self, count)

    monkeypatch.setattr(resident_rows.Residents, "_with_space", has_space)
    counts = []
    train(random_views(N, 20), 0.5, lambda training, step: counts.append(len(resident_ids(training))))
    assert max(counts) == 5  # of 20


def test_views_come_first_where_memory_is_short(monkeypatch):
    """A view that finds no space lets all residents go, which are chosen anew when it is time."""
    monkeypatch.setattr(
        Arena, "_most_rows", lambda self, count, caution=1: 30 - self._beside // ROW_BYTES if self._beside else 60
    )
    torch.manual_seed(0)
    counts = []
    train(random_views(N, 40), 0.4, lambda training, step: counts.append(len(resident_ids(training))))
    assert 0 in counts[counts.index(16) :]


@pytest.mark.slow
def test_the_store_has_all_after_a_finish_and_until_the_next_step():
    """And nothing is written twice."""
    torch.manual_seed(0)
    written: list[int] = []

    def finish(training: Training, step: int) -> None:
        training.assert_exact()
        before = training.pipeline.rows_moved["rows_written"]
        training.pipeline.finish()
        assert torch.equal(
            training.pipeline.read("geometry", torch.arange(N)), training.reference.read("geometry", torch.arange(N))
        )
        written.append(training.pipeline.rows_moved["rows_written"] - before)

    training = train(random_views(N, 20), 0.5, finish)
    assert resident_ids(training)
    assert set(written) == {0}


@pytest.mark.slow
def test_residents_are_forgotten_where_rows_change():
    torch.manual_seed(0)
    counts: list[int] = []

    def change(training: Training, step: int) -> None:
        counts.append(len(resident_ids(training)))
        if step == 10:
            training.pipeline.catch_up("geometry", torch.arange(0, N, 3))
            training.reference.catch_up("geometry", torch.arange(0, N, 3))
            assert not resident_ids(training)

    train(random_views(N, 24), 0.5, change)
    assert counts[10] == 20
    assert counts[11:14] == [0, 0, 0]
    assert counts[14] > 0


def test_an_undone_step_with_residents():
    torch.manual_seed(0)
    training = Training(random_views(N, 20), resident_share=0.5)
    training.prefetches = lambda step: True
    for step in range(20):
        training.fetch_and_prefetch(step)
        if step % 3 == 2:
            training.pipeline.undo_step(step)
            training.reference.undo_step(step)
            training.assert_exact()
            training.fetch_and_prefetch(step)
        training.update()
    training.assert_exact()
    assert resident_ids(training)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["device", "host"])
def test_a_run_with_residents_ends_in_the_bits_of_one_without(monkeypatch, city_block, tmp_path, place):
    """Also where it stops, is resumed, densifies, resets opacities and is evaluated."""
    options = ("--state", "compact", "--geometry", place, *DENSIFYING)
    chosen, bring = [], resident_rows.Residents.bring
    monkeypatch.setattr(
        resident_rows.Residents, "bring", lambda self, rows: (chosen.append(len(rows)), bring(self, rows))
    )
    run = (monkeypatch, simple_trainer_hybrid_streamed, city_block)
    assert run_script(*run, tmp_path / "without", *options) == 0
    assert not chosen
    share = ("--resident_share", 0.3, "--save_steps", 34, STEPS, "--eval_steps", 17)
    assert run_script(*run, tmp_path / "with", *options, *share) == 0
    assert len(chosen) == 10
    assert_same_state(saved(tmp_path / "with"), saved(tmp_path / "without"))
    (tmp_path / f"with/ckpts/ckpt_{STEPS}.pt").unlink()
    assert run_script(*run, tmp_path / "with", *options, "--resident_share", 0.6, "--resume") == 0
    assert_same_state(saved(tmp_path / "with"), saved(tmp_path / "without"))
