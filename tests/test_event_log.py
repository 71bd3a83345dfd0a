"""The log of a run: TensorBoard's own reader is the oracle of what is written, and torch's writer of what is read."""

import os
import signal
import threading

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from training.event_log import EventLog, read_scalars


def shown(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def read(folder) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(entry.step, entry.value) for entry in entries] for tag, entries in read_scalars(folder).items()}


def test_what_is_logged_is_in_the_file_at_once_and_nothing_runs_beside(tmp_path):
    """So that a kill loses nothing, and the end of a run waits for no thread and no queue."""
    before = set(threading.enumerate())  # some of which, of other tests, may just be ending
    log = EventLog(tmp_path / "tb")
    for step in range(100):
        log.add_scalar("train/loss", step / 4, step)
        log.add_scalar("train/num_GS", 600, step)
    assert set(threading.enumerate()) <= before
    expected = {"train/loss": [(i, i / 4) for i in range(100)], "train/num_GS": [(i, 600.0) for i in range(100)]}
    assert read(tmp_path / "tb") == shown(tmp_path / "tb") == expected
    log.close()
    log.close()
    log.add_scalar("train/loss", 1.0, 100)  # goes nowhere
    assert read(tmp_path / "tb") == expected


def test_what_was_done_once_more_is_there_once_and_nobody_is_told(tmp_path, caplog):
    for first, last in ((None, 9), (6, 12), (11, 14)):
        log = EventLog(tmp_path, first)
        for step in range(first or 0, last):
            log.add_scalar("loss", float(step if first is None else 100 * first + step), step)
        log.close()
    expected = [*range(6), *(600 + step for step in range(6, 11)), *(1100 + step for step in range(11, 14))]
    assert read(tmp_path) == {"loss": [(step, float(value)) for step, value in enumerate(expected)]}
    assert not caplog.records
    assert shown(tmp_path) == read(tmp_path)


def test_logs_of_torch_are_read(tmp_path):
    for purge_step in (None, 3):
        folder = tmp_path / "its own"  # since the name of its file changes by the second
        writer = SummaryWriter(str(folder), purge_step=purge_step)
        for step in range(purge_step or 0, 5):
            writer.add_scalar("loss", 1.5 * step, step)
        writer.close()
        next(folder.iterdir()).rename(tmp_path / f"events.out.tfevents.{purge_step or 0}")
        folder.rmdir()
    assert read(tmp_path) == shown(tmp_path) == {"loss": [(step, 1.5 * step) for step in range(5)]}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_half_a_record_is_taken_back(monkeypatch, tmp_path, error):
    log, pwrite, calls = EventLog(tmp_path), os.pwrite, []

    def write_half(file: int, content: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            raise error
        return pwrite(file, content[: len(content) // 2], offset)

    log.add_scalar("loss", 1.0, 1)
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", write_half)
        with pytest.raises(type(error)):
            log.add_scalar("loss", 2.0, 2)
    assert read(tmp_path) == {"loss": [(1, 1.0)]}
    log.add_scalar("loss", 3.0, 3)
    assert read(tmp_path) == shown(tmp_path) == {"loss": [(1, 1.0), (3, 3.0)]}


def test_ctrl_c_at_any_moment_leaves_whole_records(tmp_path):
    log, kept = EventLog(tmp_path), 0
    before = signal.getsignal(signal.SIGALRM)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(100):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + turn))
                while True:
                    log.add_scalar("loss", float(kept), kept)
                    kept += 1
            except KeyboardInterrupt:
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found = read(tmp_path)["loss"]
    assert found == shown(tmp_path)["loss"]
    # Each that returned is there; one that was interrupted may be, and then is there again.
    assert sorted({step for step, _ in found} | {kept}) == list(range(kept + 1))


def test_damaged_files_are_read_as_far_as_they_go(tmp_path):
    log = EventLog(tmp_path)
    log.add_scalar("loss", 1.0, 1)
    (file,) = tmp_path.iterdir()
    first = len(file.read_bytes())
    log.add_scalar("loss", 2.0, 2)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert read(tmp_path).get("loss", []) == ([(1, 1.0)] if length >= first else [])
    file.write_bytes(whole[:first] + b"\xff" + whole[first + 1 :])  # a wrong length
    assert read(tmp_path) == {"loss": [(1, 1.0)]}
    (tmp_path / "events.out.tfevents.0").write_bytes(b"not a log, but long enough for a header")
    file.write_bytes(whole)
    assert read(tmp_path) == {"loss": [(1, 1.0), (2, 2.0)]}
    assert read(tmp_path / "missing") == {}


def test_pictures_are_shown(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 15:] = 200
    EventLog(tmp_path).add_picture("val/0000", pixels, 7)
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("val/0000")
    assert (event.step, event.width, event.height) == (7, 30, 20)
    assert event.encoded_image_string.startswith(b"\xff\xd8")
