"""What a training script tells: log lines, a progress bar, and the files `metrics.json` and `history.csv`."""

import csv
import io
import json
import math
import os
import re
import sys
import time

from common import cluster
from common.files import atomic_write

_STARTED = time.time()


def log(message):
    """Print one line, at once; of several workers only the leader does."""
    if not cluster.leads():
        return
    try:
        print(f"{message}\n", end="", flush=True)  # at once: a signal's line must not come into the middle
    except BrokenPipeError:  # nobody reads it any more, which is no reason to lose a training
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log_device(args, device):
    """Say where the network is computed, and which share of a batch each worker gets."""
    log(f"Device: {device} ({args.precision}){cluster.describe(args.batch_size, 'samples of a batch')}")


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


def metric_definitions(metrics=("loss", "accuracy", "rmse")):
    """Return SageMaker's `metric_definitions` for the lines of `log_epoch`: a list of {"Name": ..., "Regex": ...}.

    Args:
        metrics: what a script may log; these are all, unless `--eval-metric` names others.
    """
    keys = [f"{split}_{metric}" for split in ("train", "validation") for metric in metrics]
    keys += ["seconds", "samples_per_second"]
    names = [re.sub("^(train|validation)_", r"\1:", key) for key in keys]  # as SageMaker writes them: train:loss
    regexes = [f"^epoch=.* {re.escape(key)}=([-+.0-9a-z]+)" for key in keys]
    return [{"Name": name, "Regex": regex} for name, regex in zip(names, regexes)]


class _Lines:
    """What `progress_bar` returns where there is no terminal: now and then a line."""

    def __init__(self, args, progress, total, batches):
        self.args, self.progress, self.total, self.batches = args, progress, total, batches

    def __iter__(self):
        for batch in self.batches:
            yield batch
            self.update()

    def update(self):
        step = self.progress.step
        if self.args.log_steps and step % self.args.log_steps == 0:
            log(f"step={step}/{self.total} epoch={self.progress.epoch + 1}")

    def close(self):
        pass


def progress_bar(args, progress, total, batches=()):
    """Return a bar over the `total` batches of an epoch: tqdm's on a terminal, otherwise lines (`--log-steps`)."""
    if not sys.stderr.isatty() or not cluster.leads():
        return _Lines(args, progress, total, batches)
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
