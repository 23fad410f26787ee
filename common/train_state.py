"""The progress of a training, which a checkpoint contains besides the weights and optimizer state."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Iterable

import numpy as np

from common.errors import UserError

# The direction of well-known metrics; XGBoost's may have a number: ndcg@10.
MAXIMIZED = [
    "accuracy",
    "auc",
    "aucpr",
    "f1",
    "precision",
    "recall",
    "iou",
    "dice",
    "r2",
    "pre",
    "map",
    "ndcg",
    "ams",
]
MINIMIZED = [
    "loss",
    "error",
    "merror",
    "logloss",
    "mlogloss",
    "rmse",
    "rmsle",
    "mae",
    "mape",
    "mphe",
    "mse",
    "cox-nloglik",
    "poisson-nloglik",
]
MINIMIZED += ["gamma-nloglik", "gamma-deviance", "tweedie-nloglik", "aft-nloglik", "quantile", "hinge"]


@dataclasses.dataclass
class Progress:
    """How far the training has come.

    Attributes:
        epoch: the number of finished epochs.
        step: the number of finished steps in the running epoch.
        samples: the number of samples of all workers in these steps.
        sums: this worker's metrics of these steps by name, each a pair (numerator, denominator) of sums,
            which may be scalars or vectors on a device.
        seconds: the duration of these steps.
        history: a dictionary of the metrics of each finished epoch.
        stopped: whether a callback of the user has ended the training.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    sums: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    history: list = dataclasses.field(default_factory=list)
    stopped: bool = False

    def finish_epoch(self, metrics: dict[str, float], validation_metrics: dict[str, float]) -> dict[str, Any]:
        """Start the next epoch; return the new row of the history, with both kinds of metrics by name."""
        self.epoch += 1
        row: dict[str, Any] = {"epoch": self.epoch}
        row.update({f"train_{name}": value for name, value in metrics.items()})
        row.update({f"validation_{name}": value for name, value in validation_metrics.items()})
        rate = self.samples / self.seconds if self.seconds else 0.0
        row.update(seconds=self.seconds, samples_per_second=rate)
        self.history.append(row)
        self.step = self.samples = 0
        self.seconds = 0.0
        self.sums = {}
        return row


def plain_sums(sums: dict[str, Any]) -> dict[str, list[Any]]:
    """Return metrics with Python numbers or lists instead of arrays; this waits for the device."""
    plain: dict[str, list[Any]] = {}
    for name, pair in sums.items():
        plain[name] = []
        for value in pair:
            if hasattr(value, "asnumpy"):  # MXNet
                value = value.asnumpy()
            plain[name].append(value.tolist() if hasattr(value, "tolist") else value)
    return plain


def add_up(sums_by_worker: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the totals of all workers' sums, added by rank, so that all workers get identical bits."""
    totals: dict[str, list[Any]] = {}
    for sums in sums_by_worker:
        for name, pair in sums.items():
            earlier = totals.get(name, [0.0, 0.0])
            totals[name] = [(np.asarray(old) + np.asarray(new)).tolist() for old, new in zip(earlier, pair)]
    return totals


def mean_metrics(sums: dict[str, Any]) -> dict[str, float]:
    """Return the ratio of each metric's sums; for vectors the mean of the ratios, as in macro F1.

    Entries with a denominator of zero do not count.
    """
    metrics = {}
    for name, (numerator, denominator) in sums.items():
        numerator, denominator = np.broadcast_arrays(
            np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
        )
        counted = denominator != 0
        ratios = numerator[counted] / denominator[counted]
        metrics[name] = float(ratios.mean()) if ratios.size else math.nan
    return metrics


def parse_metric(text: str, flag: str) -> tuple[str, int]:
    """Return (name, sign) of a metric such as "accuracy", "f1:max" or "validation_loss"; a minimum has -1.

    Raises UserError if its direction is neither known nor given.
    """
    name, _, direction = text.partition(":")
    name = name[len("validation_") :] if name.startswith("validation_") else name
    known = name.split("@")[0]
    if not direction and known in MAXIMIZED:
        direction = "max"
    if not direction and known in MINIMIZED:
        direction = "min"
    if direction not in ("min", "max"):
        choice = f"Pass --best-metric {name}:max or {name}:min"
        raise UserError(f"{flag}: is more of {name} better or less? {choice}")
    return name, 1 if direction == "max" else -1


class BestEpoch:
    """Finds the epoch with the best validation metric in a history that grows.

    Args:
        name: of the metric.
        sign: 1 if more is better, else -1.
    """

    def __init__(self, name: str, sign: int) -> None:
        self.metric = name, sign
        self._value = -math.inf  # of the best row, times the sign
        self._row: dict | None = None
        self._num_seen = 0

    def find(self, history: list[dict]) -> dict | None:
        """Return the best row, the first of equal ones; None before the first epoch.

        Raises UserError if the last epoch has no such metric. Values that are not a number do not count.

        Args:
            history: the rows of the previous call, and new ones.
        """
        if not history:
            return None
        name, sign = self.metric
        key = f"validation_{name}"
        if key not in history[-1]:
            names = [key[len("validation_") :] for key in history[-1] if key.startswith("validation_")]
            raise UserError(f"there is no validation metric {name}: expected one of {', '.join(names)}")
        for row in history[self._num_seen :]:
            value = sign * row.get(key, math.nan)
            if value > self._value or (value == self._value and self._row is None):
                self._value = value
                self._row = row
        self._num_seen = len(history)
        return self._row or history[-1]
