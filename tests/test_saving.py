"""Saving in the background: nothing is torn, no error is lost, and no more time is spent than is allowed."""

import threading
import time

import pytest

from common import cluster, interruption, saving
from common.errors import UserError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name, value in (("_save", None), ("_rationed_since", None), ("_waited", 0.0), ("_count", 0)):
        monkeypatch.setattr(saving, name, value)
    yield
    saving._save = None


def save(path, write=lambda file: file.write(b"state"), finish=lambda: None):
    assert saving.is_wanted(path)
    saving.start(path, write, finish)


def test_the_training_goes_on_while_a_checkpoint_is_written_and_the_next_save_waits_for_it(tmp_path):
    go_on, finished = threading.Event(), []

    def write(file):
        go_on.wait(10)
        file.write(b"state")

    save(tmp_path / "1", write, lambda: finished.append((tmp_path / "1").read_bytes()))
    interruption.check()
    assert not (tmp_path / "1").exists()
    threading.Timer(0.2, go_on.set).start()
    began = time.monotonic()
    save(tmp_path / "2")
    assert time.monotonic() - began > 0.1
    assert finished == [b"state"]  # what comes after a save is done before the next one, and when the file is there
    saving.wait()
    assert (tmp_path / "2").read_bytes() == b"state"
    assert not saving.is_wanted(tmp_path / "2")


@pytest.mark.parametrize("tell", [interruption.check, saving.wait, lambda: saving.is_wanted(None)])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a mistake")])
def test_the_error_of_a_save_in_the_background_is_one_of_the_training_once(tmp_path, tell, error):
    def write(file):
        raise error

    save(tmp_path / "1", write)
    while not saving._save.done():
        time.sleep(0.01)
    with pytest.raises(UserError if isinstance(error, OSError) else ValueError, match=r"No space|a mistake"):
        tell()
    saving.wait()
    assert list(tmp_path.iterdir()) == []


def test_only_the_leader_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "rank", 1)
    assert not saving.is_wanted(tmp_path / "1")


def test_after_the_first_hundred_saves_take_little_of_the_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    monkeypatch.setattr(saving._thread, "submit", lambda *_: None)
    saved = []
    for boosting_round in range(2000):
        now += 0.01  # a round
        if saving.is_affordable():
            assert saving.is_wanted(tmp_path / "1")
            now += 0.00002 * boosting_round  # the longer the more there is to copy
            saving.start(tmp_path / "1", None, None)
            saved.append((boosting_round, now))
    assert [boosting_round for boosting_round, _ in saved[:100]] == list(range(100))
    assert now <= 2000 * 0.01 * 1.05
    assert max(after - before for (_, before), (_, after) in zip(saved, saved[1:])) < 2
