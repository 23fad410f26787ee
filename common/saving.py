"""Saving in the background: the training waits until its state is copied in memory, not for the disk.

One save is in flight at a time: the next one waits for it. Its error is an error of the training, raised by the next of
these functions, by `interruption.check` or at the end.
"""

import time
from concurrent.futures import ThreadPoolExecutor

from common import cluster
from common.files import atomic_write

FREE = 100  # saves at the start of a training that may take what they want
SHARE = 0.03  # of its time that a training may wait for saves after that

memory = {}  # what a script copies its state into, kept from save to save: to fill new memory takes twice as long

_thread = ThreadPoolExecutor(1, "saving")  # it ends with the process, after the save in flight
_save = None  # the last one: a Future
_count = 0  # of saves so far
_began = None  # when the training began to wait for the last one
_rationed_since = None  # when it began to wait for the last free one
_waited = 0.0  # seconds that it has waited since then


def is_wanted(path):
    """Return whether this worker is to write `path`, which is not there yet; this waits for the save in flight."""
    global _began, _rationed_since, _waited
    _began = time.monotonic()
    if _count < FREE:
        _rationed_since, _waited = _began, 0.0
    wait()
    return cluster.leads() and not path.exists()


def start(path, write, finish):
    """Write `path` in the background, with `write(file)`, then call `finish()`; only after `is_wanted`."""
    global _save, _waited, _count
    _save = _thread.submit(_run, path, write, finish)
    _count += 1
    _waited += time.monotonic() - _began


def wait():
    """Wait until nothing is in flight any more."""
    global _save
    save, _save = _save, None
    if save:
        save.result()


def raise_error():
    """Raise what a save in the background has failed with."""
    if _save and _save.done():
        wait()


def is_affordable():
    """Return, the same to all workers, whether the training has waited for saves for 3 % of its time at most.

    For states that grow: to save each of 2,000 boosting rounds would take a time that grows with their square.
    """
    affordable = _count < FREE or _waited <= SHARE * (time.monotonic() - _rationed_since)
    return cluster.gather(affordable)[0]


def _run(path, write, finish):
    with atomic_write(path) as file:
        write(file)
    finish()
