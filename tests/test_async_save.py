"""Saving in the background: no error is lost, and the training waits only as long as allowed."""

import threading
import time

import pytest

from common import async_save
from common.async_save import AsyncSaver

pytestmark = pytest.mark.quick


@pytest.fixture
def saver():
    saver = AsyncSaver()
    yield saver
    saver.close()


def test_training_continues_during_a_write_and_the_next_save_waits(saver):
    proceed, written = threading.Event(), []

    def write(name):
        proceed.wait(10)
        written.append(name)

    saver.in_flight = saver.thread.submit(write, "first")
    assert written == []
    assert not saver.in_flight.done()
    threading.Timer(0.2, proceed.set).start()
    began = time.monotonic()
    saver.wait()
    assert time.monotonic() - began > 0.1
    saver.in_flight = saver.thread.submit(write, "second")
    saver.wait()
    assert written == ["first", "second"]
    assert saver.in_flight is None


def test_a_save_error_is_raised_once(saver):
    def write():
        raise OSError(28, "No space left on device")

    saver.in_flight = saver.thread.submit(write)
    with pytest.raises(OSError, match="No space left"):
        saver.wait()
    saver.wait()


def test_close_waits_for_the_running_save():
    saver, written = AsyncSaver(), []
    saver.in_flight = saver.thread.submit(lambda: time.sleep(0.2) or written.append(1))
    saver.close()
    assert written == [1]


def test_saves_after_the_first_hundred_take_a_small_share_of_the_time(saver, monkeypatch):
    now = 0.0
    monkeypatch.setattr(async_save.time, "monotonic", lambda: now)
    saved = []
    for boosting_round in range(2000):
        now += 0.01  # a round
        if saver.is_affordable():
            seconds = 0.00002 * boosting_round  # proportional to the size of the copy
            now += seconds
            saver.count(seconds)
            saved.append((boosting_round, now))
    assert [boosting_round for boosting_round, _ in saved[:100]] == list(range(100))
    assert now <= 2000 * 0.01 * 1.05
    assert max(after - before for (_, before), (_, after) in zip(saved, saved[1:])) < 2
