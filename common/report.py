"""The log of a training, its progress bar, and the files `metrics.json` and `history.csv`."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, Callable, Collection

from common import errors
from common.atomic_io import atomic_write

METRICS_SECONDS = 1  # between two readings for the progress bar: reading them waits for the device
LOGGER = logging.getLogger("train")
log = LOGGER.info


class LogHandler(logging.StreamHandler):
    """Prints each log line at once. A line that cannot be written is dropped, as it must not end a training.

    Attributes:
        bar: the progress bar on the terminal, or None; a line appears above it.
    """

    bar: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print the line of a record."""
        if self.bar:
            self.bar.clear()
        super().emit(record)
        if self.bar:
            self.bar.refresh()

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record; names in it cannot add a line."""
        line = super().format(record)
        return line if line.isprintable() else errors.in_one_line(line)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name of the base class
        """Ignore an error; after `train.py | head` Python itself would fail when it exits."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class QuietStream:
    """A stream that ignores errors, such as those of a closed terminal."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        """Write a text, if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        """Write the buffer, if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def start_logging(is_main_process: bool) -> Callable[[], None]:
    """Let `log` print, on the main process only; return a function that restores the previous state."""
    handler = LogHandler(sys.stdout)
    level, propagate = LOGGER.level, LOGGER.propagate
    LOGGER.setLevel(logging.INFO if is_main_process else logging.CRITICAL)
    LOGGER.propagate = False
    LOGGER.addHandler(handler)

    def stop_logging():
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate

    return stop_logging


def log_weights(path: Path, num_loaded: int, missing: Collection[str], unused: Collection[str]) -> None:
    """Log which tensors of `--weights` are used.

    Args:
        path: the file.
        num_loaded: the number of tensors that the model has taken.
        missing: the names of the model's other tensors.
        unused: the names of the file's other tensors.
    """
    found = f"Weights: {num_loaded} of {num_loaded + len(missing)} tensors from {path}"
    log(f"{found}; not in it: {shortened(sorted(missing))}" if missing else found)
    if unused:
        log(f"Weights: not used: {shortened(sorted(unused))}")


def log_left_out(flag: str, folder: Path, names: Collection[str], kind: str) -> None:
    """Log which files of a data folder are not read, if there are any; `kind` is the kind that is read."""
    if names:
        log(f"Left out of {flag} {folder}, not {kind} ({len(names)}): {shortened(sorted(names))}")


def shortened(names: Collection[Any], limit: int = 6) -> str:
    """Return the first names as text, and the number of the rest."""
    names = list(map(str, names))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def epoch_line(row: dict) -> str:
    """Return the log line of a finished epoch; the keys have the same order in all four scripts."""
    digits = {"epoch": "d", "seconds": ".2f", "samples_per_second": ".0f"}
    return " ".join(f"{key}={value:{digits.get(key, '.4f')}}" for key, value in row.items())


def metric_definitions(metrics: Collection[str] = ("loss", "accuracy", "rmse")) -> list[dict[str, str]]:
    """Return SageMaker's `metric_definitions` for `epoch_line`: a list of {"Name": ..., "Regex": ...}.

    Args:
        metrics: the names that a script may log; the default covers all scripts unless `--eval-metric` names
            others.
    """
    keys = [f"{split}_{metric}" for split in ("train", "validation") for metric in metrics]
    keys += ["seconds", "samples_per_second"]
    definitions = []
    for key in keys:
        name = re.sub("^(train|validation)_", r"\1:", key)  # SageMaker's own spelling: train:loss
        definitions.append({"Name": name, "Regex": f"^epoch=.* {re.escape(key)}=([-+.0-9a-z]+)"})
    return definitions


class ProgressBar:
    """A bar over all steps of a training, with the running metrics and the remaining time, on a terminal.

    Without a terminal each method does nothing, and the bar is false.

    Args:
        num_epochs: the number of epochs in total.
        is_main_process: other workers show nothing.
    """

    def __init__(self, num_epochs: int, is_main_process: bool) -> None:
        self._num_epochs = num_epochs
        self._is_shown = is_main_process and errors.is_terminal(sys.stderr)
        self._began: tuple[int, float] | None = None
        self._last_read = 0.0
        self._bar: Any = None

    def __bool__(self) -> bool:
        return self._is_shown

    def start_epoch(self, epoch: int, step: int, steps_per_epoch: int) -> None:
        """Show the bar at a step of an epoch; both are counted from 0."""
        if not self._is_shown:
            return
        from tqdm import tqdm

        position = epoch * steps_per_epoch + step
        self._began = self._began or (position, time.time())
        self.close()
        self._bar = tqdm(
            desc=f"epoch {epoch + 1}/{self._num_epochs}",
            initial=self._began[0],  # with the time of the start: the rate includes validation
            total=self._num_epochs * steps_per_epoch,
            smoothing=0,
            delay=0.1,
            miniters=1,
            unit="step",
            leave=False,
            file=QuietStream(sys.stderr),
        )
        self._bar.start_t = self._began[1]
        self._last_read = time.monotonic()
        self._bar.update(position - self._began[0])
        LogHandler.bar = self._bar

    def update(self, read_metrics: Callable[[], dict[str, float]]) -> None:
        """Count a step; `read_metrics()` returns the metrics of the epoch so far, by name."""
        now = time.monotonic()
        if now - self._last_read >= METRICS_SECONDS:
            self._bar.set_postfix(read_metrics(), refresh=False)
            self._last_read = now
        self._bar.update()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar:
            self._bar.close()
        self._bar = LogHandler.bar = None


def write_results(folder: Path, history: list[dict], epoch: int | None, facts: dict) -> None:
    """Write `metrics.json` and `history.csv`.

    Args:
        folder: of both files.
        history: a dictionary of metrics for each epoch, which is a row of `history.csv`.
        epoch: that of the exported model, whose metrics are in `metrics.json`; None for one inside an epoch.
        facts: more for `metrics.json`.
    """
    exported = [row for row in history if row["epoch"] == epoch]
    metrics = {**(exported[0] if exported else {}), **facts}
    finite = {key: _finite_or_none(value) for key, value in metrics.items()}  # JSON has no NaN
    _write_text(folder / "metrics.json", json.dumps(finite, indent=2) + "\n")

    table = io.StringIO(newline="")
    columns = dict.fromkeys(
        key for row in history for key in row
    )  # in order; the metrics may change with a restart
    writer = csv.DictWriter(table, columns or ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    _write_text(folder / "history.csv", table.getvalue())


def _finite_or_none(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_text(path, text):
    with atomic_write(path) as file:
        file.write(text.encode())
