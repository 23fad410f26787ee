"""What a training script tells: log lines, a progress bar, and the files `metrics.json` and `history.csv`."""

import csv
import io
import json
import math
import os
import sys
import time

from common.files import atomic_write

_STARTED = time.time()


def log(message):
    """Print one line, at once."""
    try:
        print(message, flush=True)
    except BrokenPipeError:  # nobody reads it any more, which is no reason to lose a training
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log_start(progress, epochs):
    """Say where training starts, or that nothing is left to train."""
    if progress.epoch < epochs:
        step = f", step: {progress.step + 1}" if progress.step else ""
        log(f"Starting training from epoch: {progress.epoch + 1}{step}")
    else:
        log(f"Nothing left to train: {progress.epoch} epochs are finished, --epochs asks for {epochs}")


def log_epoch(epoch, train, validation, seconds, num_samples):
    """Log an epoch in one line, keys in the same order in all four scripts, and return it as a dictionary.

    Args:
        epoch: counted from 1.
        train, validation: metrics by name, such as {"loss": 0.1, "accuracy": 0.97}.
        seconds: what the training took, without validation and checkpoint.
        num_samples: what was trained on in these seconds.
    """
    row = {"epoch": epoch}
    row.update({f"train_{name}": value for name, value in train.items()})
    row.update({f"validation_{name}": value for name, value in validation.items()})
    row.update(seconds=seconds, samples_per_second=num_samples / seconds)
    digits = {"epoch": "d", "seconds": ".2f", "samples_per_second": ".0f"}
    log(" ".join(f"{key}={value:{digits.get(key, '.4f')}}" for key, value in row.items()))
    return row


class _NoBar:
    """What `progress_bar` returns where there is nobody to look at it."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def update(self):
        pass

    def close(self):
        pass


def progress_bar(progress, total, batches=()):
    """Return a bar over the `total` batches of an epoch: tqdm's on a terminal, otherwise one that shows nothing."""
    if not sys.stderr.isatty():
        return _NoBar(batches)
    from tqdm import tqdm

    name = f"epoch {progress.epoch + 1}"
    return tqdm(batches, desc=name, initial=progress.step, total=total, unit="step", leave=False)


def write_results(args, progress, **facts):
    """Write `metrics.json` (the last epoch's metrics and `facts`) and `history.csv` (one row per epoch)."""
    history = progress.history
    metrics = {**(history[-1] if history else {}), "initial_epoch": progress.initial_epoch, **facts}
    metrics["epochs"] = metrics.pop("epoch", progress.epoch)
    if args.keep_best and history:
        metrics["best_epoch"] = progress.best_epoch()
    metrics["wall_seconds"] = time.time() - _STARTED
    # JSON has no word for a loss that is not a number.
    finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in metrics.items()}
    _write(args.output_data_dir / "metrics.json", json.dumps(finite, indent=2) + "\n")

    table = io.StringIO(newline="")
    columns = dict.fromkeys(key for row in history for key in row)  # in order; the metrics may change with a restart
    writer = csv.DictWriter(table, columns or ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    _write(args.output_data_dir / "history.csv", table.getvalue())


def _write(path, text):
    with atomic_write(path) as file:
        file.write(text.encode())
