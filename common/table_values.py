"""The code that all files of tables share: values, opening, and error messages."""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import re
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any, Iterator

from common import errors
from common.errors import UserError

PART = 1 << 23  # bytes of text, or of floats, that are read at once; no row of a CSV file may be longer

NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^[+-]?([iI]nf|INF|[iI]nfinity)$"
DECIMAL_COMMA = r"^[+-]?[0-9]*,[0-9]+([eE][+-]?[0-9]+)?$"
is_number = re.compile(NUMBER).match
is_decimal_comma = re.compile(DECIMAL_COMMA).match


def _spellings(*words):
    every = [[word, word.lower(), word.upper(), word.capitalize()] for word in words]
    return sorted(set(itertools.chain.from_iterable(every)))


MISSING = _spellings("", "NA", "N/A", "#N/A", "<NA>", "?", "null", "NaN", "None")  # words for no value


class NotNumbersError(UserError):
    """A column read as numbers contains something else."""


def open_bytes(path: Path) -> gzip.GzipFile | BufferedReader:
    """Return a file of bytes, unpacked if its name ends with .gz."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


@contextlib.contextmanager
def explain_errors(path: Path) -> Iterator[None]:
    """Raise UserError with the file for an error of a reader inside this block."""
    try:
        yield
    except (
        ValueError,
        OverflowError,
        NotImplementedError,
        OSError,
        EOFError,
        zlib.error,
        csv.Error,
    ) as error:
        reason = errors.first_line(error)[:200]
        if "straddl" in reason:
            reason = f"a row is longer than {PART >> 20} MB"
        if isinstance(error, UnicodeError) or "UTF8" in reason:
            reason = "it is not text in UTF-8: convert it with: iconv -f latin1 -t utf-8"
        raise UserError(f"cannot read {path}: {reason}") from error


def is_number_or_missing(field: str) -> bool:
    """Return whether a text field is a number or a missing value."""
    return bool(is_number(field)) or field in MISSING  # in this order: most fields are numbers


def with_point(field: str) -> str:
    """Return the text of a number with a decimal point instead of a comma."""
    return field.replace(",", ".") if is_decimal_comma(field) else field


def unique_names(fields: list[str]) -> list[str]:
    """Return the names in a header; one without a name gets its number, as in pandas."""
    names = {}
    for index, field in enumerate(fields):
        name = unique = field or f"Unnamed: {index}"
        number = 0
        while unique in names:
            number += 1
            unique = f"{name}.{number}"
        names[unique] = index
    return list(names)


def to_text(column: Any) -> Any:
    """Return a PyArrow array as text without spaces around it, and with null for a missing value."""
    import pyarrow
    import pyarrow.compute as pc

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = pc.utf8_trim_whitespace(column.cast(pyarrow.string()))
    is_missing = pc.is_in(column, pyarrow.array(MISSING))
    return pc.if_else(is_missing, pyarrow.scalar(None, pyarrow.string()), column)


def dates_error(path: Path | str, name: str, found: str) -> UserError:
    """Return the UserError for a column of dates or times."""
    return UserError(
        f"{path}: the column {name} has dates or times ({found}): expected numbers or text; turn it into "
        "numbers such as year, month and weekday, or remove it"
    )
