"""Saving in the background: no error is lost, and the training waits only as long as allowed."""

import threading
import time

import pytest

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
        return 1  # byte

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


def save(saver, stall, size):
    """Save a file of a number of bytes, for which the training waits a number of seconds."""
    saver.stall = stall
    saver.in_flight = saver.thread.submit(lambda: size)
    saver.wait()


@pytest.mark.parametrize(
    ("stall", "size", "seconds"),
    [(0.0001, 1e6, 20), (0.5, 1e6, 50), (0.01, 1e9, 100), (60, 1e10, 300)],
)
def test_the_interval_follows_from_what_a_save_costs(saver, stall, size, seconds):
    """At most 1 % of the time and 10 MB/s, between 20 and 300 seconds."""
    assert saver.interval == 20
    save(saver, stall, size)
    assert saver.interval == pytest.approx(seconds)


def test_one_slow_save_on_a_busy_machine_does_not_lengthen_the_interval(saver):
    for stall in (0.01, 2.0, 0.01):
        save(saver, stall, 1e6)
        assert saver.interval == 20
    for _ in range(3):
        save(saver, 2.0, 1e6)
    assert saver.interval == pytest.approx(200)


@pytest.mark.parametrize(("seconds", "interval"), [(7, 7), (0, float("inf"))])
def test_a_chosen_interval_stays(seconds, interval):
    saver = AsyncSaver(seconds)
    save(saver, 60, 1e10)
    assert saver.interval == interval
    saver.close()


def test_saves_of_boosting_rounds_take_a_small_share_of_the_time():
    """Their time grows with the model."""
    saver = AsyncSaver(shortest=1)
    now = waited = last = longest = 0.0
    for boosting_round in range(40_000):
        now += 0.01  # a round
        if now - last >= saver.interval:
            stall = 0.000002 * boosting_round
            save(saver, stall, 100 * boosting_round)
            waited += stall
            now += stall
            longest = max(longest, now - last)
            last = now
    saver.close()
    assert waited <= 0.011 * now
    assert longest < 9
