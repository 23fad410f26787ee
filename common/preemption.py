"""SIGTERM and Ctrl-C end a training between two steps, with a checkpoint and an exit code that says so.

SageMaker sends SIGTERM two minutes before it reclaims a Spot instance.
"""

import contextlib
import os
import signal
import sys
import threading

from common import errors

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 - not an error
    """Ends the training after a signal.

    Args:
        number: the signal's number.
        saved: the name of the checkpoint that holds the whole training state; None if there was nothing to
            save.
    """

    def __init__(self, number, saved=None):
        done = f"saved {saved}" if saved else "nothing new to save"
        super().__init__(f"Interrupted: {done}, run the same command to resume")
        self.exit_code = 128 + number  # as shells report a signal: 143 for SIGTERM, 130 for Ctrl-C


class SignalHandlers:
    """Handlers for SIGTERM and SIGINT that take a note.

    Attributes:
        received: the first signal's number, or None.
        deferred: set it when there is something to save; from then on the training reads `received` between
            two steps. Before, a signal calls `on_early_signal(number, frame)`.
    """

    def __init__(self, on_early_signal):
        self.received = None
        self._on_early_signal = on_early_signal
        self.deferred = False
        self._found = {}  # the handlers before `install`, by signal number

    def install(self):
        """Take over both signals. A second call takes them back from a library that has replaced them."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers in the main thread only
        for number in NUMBERS:
            found = signal.signal(number, self._receive)
            self._found.setdefault(number, found)

    def pass_on(self, number, frame):
        """Call the handler that `install` found."""
        found = self._found[number]
        if callable(found):
            found(number, frame)
        elif found is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def restore(self):
        """Put back the handlers that `install` found. A script, which is about to exit, ignores signals."""
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
            print_safely(f"{signal.Signals(number).name} received: finishing the running step and saving")
        else:
            self._on_early_signal(number, frame)


def exit_at_once(number, frame=None):
    """Handle a signal while there is nothing to save: end this process.

    This raises no exception, as a library that is being imported may swallow one.
    """
    interrupted = Interrupted(number)
    begin_line(number)
    print_safely(str(interrupted))
    os._exit(interrupted.exit_code)


def begin_line(number):
    """Begin a new line on a terminal after Ctrl-C, which shows ^C beside what is there."""
    if number == signal.SIGINT and errors.is_terminal(sys.stdout):
        print_safely("")


def print_safely(message):
    """Print a line where print() is unsafe, as in a signal handler, and ignore a closed stdout."""
    with contextlib.suppress(OSError):
        os.write(1, f"{message}\n".encode())
