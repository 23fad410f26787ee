"""How far the training has come: what a checkpoint holds besides the weights and the optimizer's state."""

import dataclasses
import math
import time

from common import report

# XGBoost's metrics of which more is better; of all others less is. They may carry a number: ndcg@10.
RISING = ("accuracy", "auc", "aucpr", "pre", "ndcg", "map", "ams")


@dataclasses.dataclass
class Progress:
    """Finished epochs, finished steps of the epoch that is running, and the metrics so far.

    `loss_sum` and `correct` are sums over the `samples` of these steps; they may be scalars on a device.
    `seconds` is what these steps took. `history` holds what `report.log_epoch` returned, one row per epoch.
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
        """Count a finished step: its samples, the sum of their losses, and how many are predicted correctly."""
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
        """Return mean loss and accuracy over the steps of the epoch; this stops the clock."""
        samples = max(self.samples, 1)
        metrics = {"loss": float(self.loss_sum) / samples, "accuracy": int(self.correct) / samples}
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
        seconds = time.monotonic() - self._last_save
        by_steps = args.checkpoint_steps and steps % args.checkpoint_steps == 0
        return bool(by_steps or (args.checkpoint_seconds and seconds >= args.checkpoint_seconds))

    def describe(self):
        """Return it as plain numbers for a checkpoint; `Progress(**described)` goes on with the same bits."""
        self._count_seconds()
        self._last_save = time.monotonic()
        described = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**described, "loss_sum": float(self.loss_sum), "correct": int(self.correct)}

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

    def _count_seconds(self):
        if self._running_since is not None:
            now = time.monotonic()
            self.seconds += now - self._running_since
            self._running_since = now
