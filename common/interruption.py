"""SIGTERM and Ctrl-C end the training between two steps, with a checkpoint, and an exit code that says so.

SageMaker sends SIGTERM two minutes before it takes a Spot instance away.
"""

import contextlib
import os
import signal

from common import cluster, saving

_received = None  # the number of the first signal
_deferred = False


class Interrupted(Exception):  # noqa: N818 - not an error
    """Ends the training after a signal; `saved` is the name of the checkpoint that holds all of it."""

    saved = None

    def __str__(self):
        done = f"saved {self.saved}" if self.saved else "nothing new to save"
        return f"Interrupted: {done}, run the same command to resume"

    @property
    def exit_code(self):
        """128 and the signal's number, as shells say it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + _received


def install():
    """Take over SIGTERM and SIGINT. Until `defer` is called there is nothing to save: they end the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _receive)


def defer():
    """Let a signal wait from now on until `check` is called; all workers begin that together."""
    global _deferred
    cluster.gather(None)
    _deferred = True


def check():
    """Raise Interrupted where a signal has come, to this worker or to another one, or a failed save's error.

    To be called between two steps, when nothing is half done; all workers have to call it equally often.
    """
    global _received
    saving.raise_error()
    received = [number for number in cluster.gather(_received) if number]
    if received:
        _received = _received or received[0]
        raise Interrupted


def ignore():
    """Let no further signal be the reason for the end of this process, in whose last moments Python obeys them again.

    `launch/forward_sigterm.sh` and impatient people send SIGTERM again and again.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def tell(message):
    """Print a line from where nothing may fail: after Ctrl-C on `train.py | tee log` nobody reads it any more."""
    with contextlib.suppress(OSError):
        os.write(1, f"{message}\n".encode())  # print is not safe in a signal handler


def _receive(number, frame):
    global _received
    if _received is not None:
        return  # the first one is being obeyed
    _received = number
    name = signal.Signals(number).name
    if _deferred:
        tell(f"{name} received: finishing the running step and saving")
    else:
        tell(str(Interrupted()))
        cluster.stop(128 + number, str(Interrupted()))  # no exception: a framework being imported might swallow it
