"""The account of a step: what a script does in Python beyond the lean loop of `step`, in microseconds.

The functions of the script and its engine are timed while it trains on 8 x 8 images (XGBoost: a table of 20
columns), and each row is the median over the steps. The lean loop does nothing of this: it has its batches
ready and on the device, computes no metrics and no learning rate, and neither counts nor logs nor listens to
signals. TensorFlow's step is that of Keras's `fit`; the time of an empty step there is Keras's own.
"""

import importlib
import statistics
import sys
import time

from benchmarks import harness

FRAMEWORKS = ("pytorch", "mxnet", "xgboost", "tensorflow")
LIMIT = 60  # microseconds
# (owner in the script or its modules, function, what it does)
PARTS = {
    "pytorch": [
        ("common.batches:BatchLoader", "__call__", "pixels of the batch, and its seed"),
        ("engine:State", "load_batch", "tensors, normalization, seeding"),
        ("train", "learning_rate_factor", "learning rate"),
        ("train", "compute_metrics", "metrics"),
        ("common.run:Run", "finish_step", "sums, progress, clock, signals"),
    ],
    "mxnet": [
        ("common.batches:BatchLoader", "__call__", "pixels of the batch, and its seed"),
        ("engine:State", "load_batch", "arrays, normalization, seeding"),
        ("train", "learning_rate_factor", "learning rate"),
        ("train", "compute_metrics", "metrics"),
        ("engine:State", "add_up", "metrics of the devices"),
        ("common.run:Run", "finish_step", "sums, progress, clock, signals"),
    ],
    "xgboost": [("engine:Rounds", "after_iteration", "progress, history, clock, signals, log line")],
    "tensorflow": [
        ("common.batches:BatchLoader", "__call__", "pixels of the batch, and its seed"),
        ("engine:Batches", "_tensors", "tensors"),
        ("engine:Callbacks", "on_train_batch_end", "progress, clock, signals"),
    ],
}


def measure(repetitions):
    """Yield the figures."""
    for framework in FRAMEWORKS:
        runs = [harness.run_json("account", framework) for _ in range(repetitions)]
        parts = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        detail = "; ".join(f"{name} {value:.1f}" for name, value in parts.items())
        limit = "" if framework == "tensorflow" else f"<= {LIMIT}"
        yield harness.Figure(
            f"{framework}: Python beyond the lean loop, µs", sum(parts.values()), limit, detail
        )


def account(framework):
    """Train in this process; return the median microseconds of each part."""
    script = harness.import_script(framework)
    sys.modules["train"] = script
    times = {}
    for place, name, what in PARTS[framework]:
        module, _, kind = place.partition(":")
        owner = importlib.import_module(module)
        owner = getattr(owner, kind) if kind else owner
        times[what] = []
        setattr(owner, name, _timed(getattr(owner, name), times[what]))
    if framework == "xgboost":
        flags = ["--train", harness.write_table("table", 1000, 20), "--epochs", 1000]
    else:
        flags = ["--train", harness.write_images("images", 6400, 8), "--epochs", 4, "--log-steps", 0]
    script.main(script.parse_args([*map(str, flags), "--checkpoint-seconds", "0"]))
    return {what: statistics.median(values) / 1000 for what, values in times.items()}


def _timed(function, times):
    def timed(*args, **options):
        began = time.thread_time_ns()
        result = function(*args, **options)
        times.append(time.thread_time_ns() - began)
        return result

    return timed


if __name__ == "__main__":
    harness.print_json(account)
