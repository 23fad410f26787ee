"""How far the training has come: what a checkpoint holds besides the weights and the optimizer's state."""

import dataclasses
import math
import time

from common import cluster, report

# XGBoost's metrics of which more is better; of all others less is. They may carry a number: ndcg@10.
RISING = ("accuracy", "auc", "aucpr", "pre", "ndcg", "map", "ams")


def mean_metrics(loss_sum, correct, num_samples):
    """Return loss and accuracy from this worker's sums, which may be on a device, over the samples of all workers."""
    loss_sum, correct = cluster.total([float(loss_sum), int(correct)])
    return {"loss": loss_sum / num_samples, "accuracy": correct / num_samples}


@dataclasses.dataclass
class Progress:
    """Finished epochs, finished steps of the epoch that is running, and the metrics so far.

    `samples` counts those of all workers in these steps; `loss_sum` and `correct` are sums over this worker's share of
    them, and may be scalars on a device. `seconds` is what these steps took. `history` holds what `report.log_epoch`
    returned, one row per epoch.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    history: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.initial_epoch = self.epoch
        self._last_save = time.monotonic()
        self._running_since = None

    def count_step(self, samples, loss_sum, correct):
        """Count a finished step: its samples, the sum of their losses, how many are predicted correctly (see above)."""
        self.step += 1
        self.samples += samples
        self.loss_sum = self.loss_sum + loss_sum  # not +=, which would change a device's array that was handed out
        self.correct = self.correct + correct

    def start_clock(self):
        """Count the time from now on as time of training steps."""
        self._running_since = time.monotonic()

    def stop_clock(self):
        """Do not count what comes now."""
        self._count_seconds()
        self._running_since = None

    def training_metrics(self):
        """Return mean loss and accuracy over the steps of the epoch of all workers; this stops the clock."""
        metrics = mean_metrics(*self._sums(), max(self.samples, 1))
        self.stop_clock()
        return metrics

    def finish_epoch(self, metrics, validation):
        """Log the epoch and begin the next one; both are metrics by name, such as {"loss": 0.1, "accuracy": 0.97}."""
        self.epoch += 1
        self.history.append(report.log_epoch(self.epoch, metrics, validation, self.seconds, self.samples))
        self.step = self.samples = self.correct = 0
        self.loss_sum = self.seconds = 0.0

    def save_is_due(self, args, steps):
        """Return whether `--checkpoint-steps` or `--checkpoint-seconds` ask for a checkpoint after so many steps."""
        if args.checkpoint_steps and steps % args.checkpoint_steps == 0:
            return True
        if not args.checkpoint_seconds:
            return False
        due = time.monotonic() - self._last_save >= args.checkpoint_seconds
        return cluster.broadcast(b"1" if due else b"0") == b"1"  # the workers' clocks may differ

    def describe(self):
        """Return it as plain numbers for a checkpoint, `loss_sum` and `correct` as lists by worker."""
        self._count_seconds()
        self._last_save = time.monotonic()
        described = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        loss_sums, correct = zip(*cluster.gather(self._sums()))
        # A copy of the history: the next epoch may be over before this is written.
        return {**described, "history": [*self.history], "loss_sum": list(loss_sums), "correct": list(correct)}

    @classmethod
    def restore(cls, described):
        """Return this worker's Progress from what `describe` has returned to as many workers, or to another number."""
        progress = cls(**described)
        for name in ("loss_sum", "correct"):
            by_worker = described.get(name, [0])
            by_worker = by_worker if isinstance(by_worker, list) else [by_worker]  # as it was before there were workers
            if len(by_worker) != cluster.size:  # the leader takes it all
                by_worker = [sum(by_worker), *[0] * cluster.size]
            setattr(progress, name, by_worker[cluster.rank])
        return progress

    def best_epoch(self):
        """Return the epoch with the best validation metric: the accuracy, or else the one that is reported last.

        Before the first epoch is finished it is 0.
        """
        if not self.history:
            return 0
        names = [name for name in self.history[-1] if name.startswith("validation_")]
        name = "validation_accuracy" if "validation_accuracy" in names else names[-1]
        sign = 1 if name[len("validation_") :].split("@")[0] in RISING else -1
        values = [(row.get(name, math.nan), row["epoch"]) for row in self.history]
        finite = [(sign * value, -epoch) for value, epoch in values if not math.isnan(value)]
        return -max(finite)[1] if finite else self.epoch

    def _sums(self):
        return [float(self.loss_sum), int(self.correct)]

    def _count_seconds(self):
        if self._running_since is not None:
            now = time.monotonic()
            self.seconds += now - self._running_since
            self._running_since = now
