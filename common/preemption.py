"""Handle signals: end a training between two steps, with a checkpoint and the exit code of the signal.

SageMaker sends SIGTERM two minutes before it reclaims a Spot instance. Slurm sends SIGTERM, or the signal of
`sbatch --signal`. A closed terminal sends SIGHUP, a limit on CPU time SIGXCPU, the timer of `--stop-after`
SIGALRM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any, Callable, NoReturn

from common import errors

NUMBERS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGALRM,
)
STOPPED = 75  # the exit code after --stop-after: EX_TEMPFAIL of sysexits.h, "try again later"


class Interrupted(Exception):  # noqa: N818 - not an error
    """Ends the training after a signal.

    Args:
        number: the signal's number.
        saved: the name of the checkpoint with the whole training state; None if there was nothing to save.
    """

    def __init__(self, number: int, saved: str | None = None) -> None:
        done = f"saved {saved}" if saved else "nothing new to save"
        super().__init__(f"Interrupted: {done}, run the same command to resume")
        # As shells report a signal: 143 for SIGTERM, 130 for Ctrl-C.
        self.exit_code = STOPPED if number == signal.SIGALRM else 128 + number


class SignalHandlers:
    """Handlers that record a signal.

    Attributes:
        received: the first signal's number, or None.
        deferred: set it once there is something to save; the training then reads `received` between two
            steps. Until then, a signal calls `on_early_signal(number, frame)`.
    """

    def __init__(self, on_early_signal: Callable[[int, Any], Any]) -> None:
        self.received: int | None = None
        self._on_early_signal = on_early_signal
        self.deferred = False
        self._found: dict[int, Any] = {}  # the handlers before `install`, by signal number

    def install(self) -> None:
        """Take over the signals. A second call takes them back from a library that has replaced them."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers in the main thread only
        for number, found in take_over(self._receive).items():
            self._found.setdefault(number, found)

    def pass_on(self, number: int, frame: Any) -> None:
        """Call the handler that `install` found."""
        found = self._found[number]
        if callable(found):
            found(number, frame)
        elif found is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def restore(self) -> None:
        """Restore the handlers that `install` found. A script, which is about to exit, ignores signals."""
        if self._found:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, found in self._found.items():
            if found is exit_at_once:
                found = signal.SIG_IGN
            signal.signal(number, found)

    def _receive(self, number, frame):
        if self.received is not None:
            return  # the first signal is being handled
        self.received = number
        if self.deferred:
            begin_line(number)
            reason = f"{signal.Signals(number).name} received"
            if number == signal.SIGALRM:
                reason = "The time of --stop-after has passed"
            print_safely(f"{reason}: finishing the running step and saving")
        else:
            self._on_early_signal(number, frame)


def take_over(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Set the handler of all signals that end a training; return the handlers before, by signal number."""
    found: dict[int, Any] = {}
    for number in NUMBERS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup
        found[number] = signal.signal(number, handler)
    return found


def exit_at_once(number: int, frame: Any = None) -> NoReturn:
    """Handle a signal while there is nothing to save: end this process.

    This raises no exception, as a library that is being imported may swallow one.
    """
    interrupted = Interrupted(number)
    begin_line(number)
    print_safely(str(interrupted))
    os._exit(interrupted.exit_code)


def begin_line(number: int) -> None:
    """Begin a new line on a terminal after Ctrl-C, which shows ^C in the current line."""
    if number == signal.SIGINT and errors.is_terminal(sys.stdout):
        print_safely("")


def print_safely(message: str) -> None:
    """Print a line where print() is unsafe, as in a signal handler, and ignore a closed stdout."""
    with contextlib.suppress(OSError):
        os.write(1, f"{message}\n".encode())
