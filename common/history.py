"""The metrics of a long training's earlier epochs, in a file beside the checkpoints.

A checkpoint holds the rows of the last 1,000 to 2,000 epochs, so that it does not grow with the number of
epochs. The rows before them are in `history.jsonl`, one JSON object per line.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from common import checkpoint_schema
from common.errors import UserError
from common.report import log

FILE_NAME = "history.jsonl"
BLOCK = 1000  # rows that leave the checkpoints at a time


class HistoryFile:
    """The file of the rows that newer checkpoints no longer hold.

    Args:
        folder: of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self.unwritten: list[dict] = []  # rows that the next checkpoint does not hold
        self._num_written = 0
        self._size = 0  # in bytes, of the rows that have been written

    def split(self, rows: list[dict], best: dict | None) -> list[dict]:
        """Return the rows for a checkpoint, the last ones and the best one; `write` writes those before them.

        Args:
            rows: of all epochs; the next call may get the same list with more rows.
            best: the row of the best epoch, which `--patience` and `--best-metric` need.
        """
        num_earlier = max(0, len(rows) // BLOCK - 1) * BLOCK
        self.unwritten = rows[self._num_written : num_earlier]
        recent = rows[num_earlier:]
        if best and best["epoch"] < recent[0]["epoch"]:
            return [best, *recent]
        return recent

    def write(self) -> None:
        """Append the unwritten rows. Raises UserError if that fails."""
        lines = b"".join(map(_to_line, self.unwritten))
        try:
            with open(self.path, "ab") as file:
                file.truncate(self._size)  # without rows after the checkpoint from which this run resumed
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}. The checkpoints are intact: "
                "fix this and run the same command again"
            ) from error
        self._size += len(lines)
        self._num_written += len(self.unwritten)

    def merge(self, rows: list[dict], content: bytes) -> list[dict]:
        """Return the rows of all epochs; log a warning if some are lost.

        Args:
            rows: of the checkpoint from which this run resumes.
            content: of the file, which may have rows of later epochs.
        """
        has_best = len(rows) > 1 and rows[0]["epoch"] + 1 < rows[1]["epoch"]
        recent = rows[1:] if has_best else rows
        if not recent:
            return rows
        first = recent[0]["epoch"]
        earlier, self._size = _read_lines(content, first)
        self._num_written = len(earlier)
        last = earlier[-1]["epoch"] if earlier else 0
        if last + 1 < first and first > BLOCK:
            log(
                f"Warning: {self.path} lacks the epochs {last + 1} to {first - 1}: history.csv lacks them too"
            )
        if has_best and last < rows[0]["epoch"]:
            earlier.append(rows[0])
        return earlier + recent


def _to_line(row):
    """Return a row as JSON, which has no NaN and no infinity, so that these become text."""
    values = {}
    for name, value in row.items():
        values[name] = value if math.isfinite(value) else str(value)
    return json.dumps(values).encode() + b"\n"


def _read_lines(content, first):
    """Return the rows of the epochs before `first`, and the length of their lines in bytes.

    A line that is damaged, or was cut off by an interruption, ends the rows.
    """
    rows = []
    size = last = 0
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line, object_hook=_to_numbers)
            checkpoint_schema.check_row(row, last, first - 1)
        except (ValueError, RecursionError):
            break
        if not line.endswith(b"\n"):
            break
        rows.append(row)
        last = row["epoch"]
        size += len(line)
    return rows, size


def _to_numbers(row):
    """Return the row that `_to_line` has written."""
    return {name: float(value) if isinstance(value, str) else value for name, value in row.items()}
