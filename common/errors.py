"""Report a mistake that a user can correct in one clear line, without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from pathlib import Path
from typing import Collection, Iterator, NoReturn, TextIO


class UserError(Exception):
    """A mistake of the user or a limit of the machine: what happened, what was expected, what to do."""


class DataError(UserError):
    """Data that turn out to be unreadable when a batch needs them."""


@contextlib.contextmanager
def importing(name: str, hint: str) -> Iterator[None]:
    """Import a library inside this block. If it is missing, exit with one line that ends with `hint`."""
    try:
        yield
    except ImportError as error:
        fail(f"this script needs {name}, which cannot be imported ({error}). {hint}")


def read_count(name: str, default: int) -> int:
    """Return the whole number in an environment variable. Raises UserError for another value."""
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit():
        raise UserError(f"the environment variable {name} is {text!r}: expected a whole number, or unset it")
    return int(text)


def check_choice(flag: str, value: str, choices: Collection[str]) -> None:
    """Raise UserError if `value` is not one of `choices`; the message names the nearest ones."""
    if value not in choices:
        nearest = ", ".join(difflib.get_close_matches(value, choices, n=3, cutoff=0.0))
        raise UserError(
            f"{flag} {value} is unknown: expected one of {len(choices)} names, the nearest are {nearest}"
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether memory ran out; not every library raises MemoryError."""
    while error:
        if isinstance(error, MemoryError):
            return True
        if re.search(r"bad_alloc|(can't|cannot|unable to) allocate|out of memory", str(error), re.IGNORECASE):
            return True
        error = error.__cause__
    return False


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Traceback"):  # then the message itself is at the end
        return lines[-1]
    return lines[0] if lines else type(error).__name__


def in_one_line(text: str) -> str:
    """Return a text with its control characters escaped, so that names from outside cannot add a line."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def fail(message: str | BaseException, code: int = 1) -> NoReturn:
    """Exit with one line. In a SageMaker container the line is also the FailureReason of the job."""
    message = in_one_line(str(message))
    write_failure_reason(f"error: {message}")
    with contextlib.suppress(OSError, ValueError):
        is_red = is_terminal(sys.stderr) and not os.environ.get("NO_COLOR")  # https://no-color.org
        label = "\033[31merror:\033[0m" if is_red else "error:"
        print(f"{label} {message}\n", end="", file=sys.stderr, flush=True)  # in one piece
    sys.exit(code)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether an output stream is a terminal. It may be None or closed."""
    with contextlib.suppress(OSError, ValueError):
        return stream is not None and stream.isatty()
    return False


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line at once, on standard output by default; ignore a line that cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        print(in_one_line(line) + "\n", end="", file=file or sys.stdout, flush=True)  # in one piece


def write_failure_reason(reason: str) -> None:
    """Write `reason` to the file that SageMaker reads; the service shows the first 1,024 characters.

    https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo.html
    """
    folder = os.environ.get("SM_OUTPUT_DIR")
    if folder:
        with contextlib.suppress(OSError):  # the log contains the reason too
            Path(folder, "failure").write_text(reason)
