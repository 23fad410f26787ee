"""Parsers of flag values, for argparse: numbers in a range, durations, and choices."""

from __future__ import annotations

import argparse
import re
from typing import Callable


def integer(minimum: float, maximum: float = float("inf")) -> Callable[[str], int]:
    """Return a parser of whole numbers from `minimum` to `maximum`, for argparse."""
    return _number(_whole, "a whole number", minimum, maximum)


def real(minimum: float, maximum: float = float("inf")) -> Callable[[str], float]:
    """Return a parser of numbers from `minimum` to `maximum`, for argparse."""
    return _number(float, "a number", minimum, maximum)


def duration(text: str) -> float:
    """Parse a duration such as 3h50m, 90m or 45s, or a number of seconds; return seconds, for argparse."""
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", str(text))
    if not text or not parts:
        raise argparse.ArgumentTypeError(f"expected a time such as 3h50m, 90m or 45s, got {text!r}")
    return sum(float(part or 0) * unit for part, unit in zip(parts.groups(), (86400, 3600, 60, 1)))


def share(text: str) -> float:
    """Parse a number above 0 and up to 1, for argparse."""
    value = real(0, 1)(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _number(kind, what, minimum, maximum):
    expected = (
        f"{what} of at least {minimum}" if maximum == float("inf") else f"{what} from {minimum} to {maximum}"
    )

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum or value == float("inf"):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def _whole(text):
    """Return a whole number; SageMaker may pass 5 as 5.0."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


def choice(*values: str) -> Callable[[str], str]:
    """Return a parser that accepts one of `values`, for argparse."""

    def parse(text):
        if str(text) not in values:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(values)}, got {text!r}")
        return str(text)

    return parse
