"""The account of a step: what a script does in Python beyond the lean loop of `step`, in microseconds.

The functions of the script and its engine are timed while it trains on 8 x 8 images (XGBoost: a table of 20
columns), and each row is the median over the steps. The lean loop does nothing of this: it has its batches
ready and on the device, computes no metrics and no learning rate, and neither counts nor logs nor listens to
signals. Any loop with real input and metrics has the work on arrays, too, so it is counted apart. Between two
steps these operations take about five times as long as in a separate loop, probably because the caches of the
processor are cold. TensorFlow's step is that of Keras's `fit`, with Keras's metrics.
"""

import importlib
import statistics
import sys
import time

from benchmarks import harness

FRAMEWORKS = ("pytorch", "mxnet", "xgboost", "tensorflow")
LIMIT = 60  # microseconds
ARRAYS = ("pixels", "tensors", "tensors, normalized", "metrics")
# (owner in the script or its modules, function, what it does)
PARTS = {
    "pytorch": [
        ("common.batches:BatchLoader", "__call__", "pixels"),
        ("engine:State", "load_batch", "tensors, normalized"),
        ("train", "learning_rate_factor", "learning rate"),
        ("train", "compute_metrics", "metrics"),
        ("common.run:Run", "finish_step", "sums, progress, clock, signals"),
    ],
    "mxnet": [
        ("common.batches:BatchLoader", "__call__", "pixels"),
        ("engine:State", "load_batch", "tensors, normalized"),
        ("train", "learning_rate_factor", "learning rate"),
        ("train", "compute_metrics", "metrics"),
        ("common.run:Run", "finish_step", "sums, progress, clock, signals"),
    ],
    "xgboost": [("engine:Rounds", "after_iteration", "progress, history, clock, signals, log line")],
    "tensorflow": [
        ("common.batches:BatchLoader", "__call__", "pixels"),
        ("engine:Batches", "_tensors", "tensors"),
        ("engine:Callbacks", "on_train_batch_end", "progress, clock, signals"),
    ],
}


def measure(repetitions):
    """Yield the figures."""
    for framework in FRAMEWORKS:
        runs = [harness.run_json("account", framework) for _ in range(repetitions)]
        parts = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        arrays = {name: value for name, value in parts.items() if name in ARRAYS}
        ours = {name: value for name, value in parts.items() if name not in arrays}
        what = f"{framework}: a step's own Python, µs"
        yield harness.Figure(what, sum(ours.values()), f"<= {LIMIT}", _detail(ours))
        if arrays:
            what = f"{framework}: a step's work on arrays outside the network, µs"
            yield harness.Figure(what, sum(arrays.values()), "", _detail(arrays))


def _detail(parts):
    return "; ".join(f"{name} {value:.1f}" for name, value in parts.items())


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
