"""Requests to a model of tables: text in rows becomes the numbers that the training assigned to it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from common import table_values
from common.serving import RequestError
from common.table_columns import to_model_name


def to_rows(content: Any, facts: dict[str, Any]) -> np.ndarray:
    """Return the result of `serving.decode` as a float32 array (n, columns) for boosted trees.

    Text that the training rows do not have counts as missing, with a warning on standard error. The numbers
    of an `.npy` file are used unchanged: those of categories are their codes.

    Args:
        content: an array, or a list of rows; a row is a dictionary, or a list in the order of the columns.
            The first row may be a header.
        facts: the content of `model.json`.

    Raises RequestError if that is impossible.
    """
    names = facts["column_names"]
    count = facts["num_columns"]
    expected = f"expected {count} columns"
    if names:
        expected += f" ({', '.join(names[:5])}{', ...' if count > 5 else ''})"
    if isinstance(content, list):
        content = _read_rows(content, facts, expected)
    if hasattr(content, "convert") or content.dtype.kind not in "uifb":
        raise RequestError(f"the request contains no numbers: {expected}")
    rows = content[np.newaxis] if content.ndim == 1 else content
    if rows.ndim != 2 or rows.shape[1] != count or len(rows) == 0:
        raise RequestError(f"the request contains an array of shape {content.shape}: {expected}")
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)
    if np.isinf(rows).any():
        raise RequestError(f"the request contains infinite or too large values: {expected}")
    return rows


def _read_rows(rows, facts, expected):
    """Return rows of numbers and text as an array."""
    names = facts["column_names"]
    if rows and not isinstance(rows[0], (list, dict)):
        rows = [rows]  # one row
    if rows and names and isinstance(rows[0], list):
        header = table_values.unique_names([str(field).strip() for field in rows[0]])
        if set(map(to_model_name, header)) & set(names):
            rows = [dict(zip(header, row)) for row in rows[1:]]
    if rows and isinstance(rows[0], dict):
        rows = [_to_list(row, names, expected) for row in rows]
    width = facts["num_columns"]
    for row in rows:
        if not isinstance(row, list) or len(row) != width:
            size = len(row) if isinstance(row, list) else type(row).__name__
            raise RequestError(f"the request has a row of {size}: {expected}")
    array = np.empty((len(rows), width))
    for index in range(width):
        column = [row[index] for row in rows]
        name = names[index] if names else f"number {index}"
        categories = (facts.get("categories") or {}).get(name)
        array[:, index] = _to_codes(column, name, categories) if categories else _to_numbers(column, name)
    return array


def _to_list(row, names, expected):
    if not isinstance(row, dict):
        raise RequestError(f"the request has rows with and without names: {expected}")
    values = {to_model_name(name): value for name, value in row.items()}
    missing = [name for name in names or [] if name not in values]
    if not names or missing:
        raise RequestError(f"the rows have no column {', '.join(missing) or 'names here'}: {expected}")
    return [values[name] for name in names]


def _to_numbers(column, name):
    numbers = []
    for value in column:
        text = "" if value is None else str(value).strip()
        try:
            numbers.append(np.nan if text in table_values.MISSING else float(table_values.with_point(text)))
        except ValueError:
            if value not in (True, False):
                raise RequestError(f"the column {name} contains {value!r:.50}: expected a number") from None
            numbers.append(float(value))
    return numbers


def _to_codes(column, name, categories):
    codes = {text: code for code, text in enumerate(categories)}
    numbers = []
    unknown = []
    for value in column:
        text = _to_text(value, codes)
        if text not in codes and text not in table_values.MISSING:
            unknown.append(text)
        numbers.append(codes.get(text, np.nan))
    if unknown:
        print(
            f"warning: {len(unknown)} values of the column {name}, such as {unknown[0]!r:.50}, count as "
            "missing: no training row has them",
            file=sys.stderr,
        )
    return numbers


def _to_text(value, codes):
    """Return a value of JSON as the text that the training file had: true as TRUE, 1.0 as 1."""
    if value is None:
        return ""
    text = str(value).strip()
    spellings = [text]
    if isinstance(value, bool):
        spellings += [text.lower(), text.upper()]
    elif isinstance(value, float):
        spellings.append(f"{value:g}")
    return next((each for each in spellings if each in codes), text)
