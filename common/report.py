"""What a training script tells: log lines, a progress bar, and the files `metrics.json` and `history.csv`."""

import csv
import json
import time

_STARTED = time.time()


def log(message):
    """Print one line, at once."""
    print(message, flush=True)


def log_start(initial_epoch, epochs):
    """Say where training starts, or that nothing is left to train."""
    if initial_epoch < epochs:
        log(f"Starting training from epoch: {initial_epoch + 1}")
    else:
        log(f"Nothing left to train: {initial_epoch} epochs are finished, --epochs asks for {epochs}")


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


def progress_bar(epoch, total, batches=None):
    """Return a tqdm bar over the `total` batches of an epoch, which shows on a terminal only."""
    from tqdm import tqdm

    return tqdm(batches, total=total, desc=f"epoch {epoch}", unit="step", leave=False, disable=None)


def write_results(args, history, initial_epoch, **facts):
    """Write `metrics.json` (the last epoch's metrics and `facts`) and `history.csv` (one row per epoch).

    `history` is a list of one dictionary per epoch; `initial_epoch` counts the epochs finished before this run.
    """
    folder = args.output_data_dir
    metrics = {**(history[-1] if history else {}), "initial_epoch": initial_epoch, **facts}
    metrics["epochs"] = metrics.pop("epoch", initial_epoch)
    metrics["wall_seconds"] = time.time() - _STARTED
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, history[0] if history else ["epoch"])
        writer.writeheader()
        writer.writerows(history)
