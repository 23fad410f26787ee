"""The account of a step: what a script does in Python beyond the lean loop of `step`, in microseconds.

The functions of the script and its engine are timed while it trains on 8 x 8 images (XGBoost: a table of 20
columns), each without the timed functions that it calls. A row is the median of the calls, times the calls
per step. The lean loop does nothing of this: it has its batches ready and on the device, computes no metrics
and no learning rate, and neither counts nor logs nor listens to signals. Any loop with real input and metrics
has the work on arrays, too, so it is counted apart. Between two steps these operations take about five times
as long as in a separate loop, probably because the caches of the processor are cold. TensorFlow's step is
that of Keras's `fit`, with Keras's metrics.
"""

import importlib
import statistics
import sys
import time
from types import SimpleNamespace

from benchmarks import harness
from common.run import Run

FRAMEWORKS = ("pytorch", "mxnet", "xgboost", "tensorflow")
LIMIT = 60  # microseconds
ARRAYS = ("pixels", "copies", "normalization", "metrics")
LOOP = [
    ("common.batches:BatchLoader", "__call__", "pixels"),
    ("engine:State", "load_batch", "copies"),
    ("train", "learning_rate_factor", "learning rate"),
    ("train", "compute_metrics", "metrics"),
]
# (owner in the script or its modules, function, what it does).
PARTS = {
    "pytorch": [
        ("torch:default_generator", "manual_seed", "seed"),
        ("engine", "normalize", "normalization"),
        *LOOP,
    ],
    "mxnet": [("mxnet:random", "seed", "seed"), ("engine:Normalize", "__call__", "normalization"), *LOOP],
    "xgboost": [
        ("common.report", "epoch_line", "text of the log line"),
        ("common.run", "log", "printing it"),
        ("common.train_state:Progress", "finish_epoch", "history"),
        ("engine:Rounds", "after_iteration", "progress, clock, signals"),
    ],
    "tensorflow": [
        ("common.batches:BatchLoader", "__call__", "pixels"),
        ("engine:Batches", "_tensors", "copies"),
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
    """Train in this process; return the microseconds per step of each part."""
    script = harness.import_script(framework)
    sys.modules["train"] = script
    if framework == "pytorch":  # a function of its generator cannot be replaced
        manual_seed = script.torch.default_generator.manual_seed
        script.torch.default_generator = SimpleNamespace(manual_seed=manual_seed)
    times = {}
    nested = []
    for place, name, what in PARTS[framework]:
        module, _, kind = place.partition(":")
        owner = importlib.import_module(module)
        owner = getattr(owner, kind) if kind else owner
        times[what] = []
        setattr(owner, name, _timed(getattr(owner, name), times[what], nested))
    with_metrics, without = [], []
    if framework in ("pytorch", "mxnet"):  # Keras adds up its metrics itself
        Run.finish_step = _alternating(Run.finish_step, with_metrics, without, nested)
    if framework == "xgboost":
        flags = ["--train", harness.write_table("table", 1000, 20), "--epochs", 1000]
    else:
        flags = ["--train", harness.write_images("images", 6400, 8), "--epochs", 4, "--log-steps", 0]
    script.main(script.parse_args([*map(str, flags), "--checkpoint-seconds", "0"]))
    num_steps = len(with_metrics) + len(without) or len(times[what])
    parts = {}
    for name, values in times.items():
        parts[name] = statistics.median(values) * len(values) / num_steps / 1000
    if with_metrics:
        parts["progress, clock, signals"] = statistics.median(without) / 1000
        parts["sums of the metrics"] = (statistics.median(with_metrics) - statistics.median(without)) / 1000
    return parts


def _alternating(finish_step, with_metrics, without, nested):
    """Return `finish_step`, timed; only every second step has metrics, which it adds up."""
    timed_with = _timed(finish_step, with_metrics, nested)
    timed_without = _timed(finish_step, without, nested)

    def finish(run, metrics, num_samples=None):
        if len(with_metrics) > len(without):
            timed_without(run, {}, num_samples)
        else:
            timed_with(run, metrics, num_samples)

    return finish


def _timed(function, times, nested):
    """Return `function`, which then appends its nanoseconds, without those of other timed ones, to `times`.

    Args:
        nested: for each timed function that is running, the nanoseconds of those that it has called.
    """

    def timed(*args, **options):
        nested.append(0)
        began = time.thread_time_ns()
        result = function(*args, **options)
        spent = time.thread_time_ns() - began
        times.append(spent - nested.pop())
        if nested:
            nested[-1] += spent
        return result

    return timed


if __name__ == "__main__":
    harness.print_json(account)
