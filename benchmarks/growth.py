"""How costs grow, at three sizes each: an exponent of 1 means that twice the size costs twice as much.

Seconds per epoch and peak memory over the number of samples (32 x 32 images, a tiny network; rows of 20
columns). The same, and seconds per save, over the size of the training state (dense layers; XGBoost: trees),
saved in a file system in memory where there is one (/dev/shm), as a shared disk takes some saves fast and
delays the next ones. Seconds per epoch and per save over the number of epochs before, whose checkpoints are
in the folder and whose metrics are in each checkpoint; and the time to find the newest of these. A figure is
the largest of the scripts' exponents, over the two larger sizes: at the smallest, what does not grow at all
has the larger part. Up to 1.2 counts as linear: what no longer fits the processor's cache takes longer for
each byte.
"""

import math
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import harness, models
from common import checkpoints
from common.run import Run

IMAGES, ROWS = (5_000, 15_000, 45_000), (50_000, 150_000, 450_000)
WIDTHS, ROUNDS = (1024, 1536, 2048), (24, 48, 96)  # of three dense layers; of deep trees
EPOCHS = (100, 1_000, 10_000)
SAMPLES, STATE, BEFORE = "samples", "MB of training state", "epochs before"


def measure(repetitions):
    """Yield the figures, and draw `growth.png`."""
    curves = {}  # by title and size: for each script the sizes and what was measured at them
    with tempfile.TemporaryDirectory() as folder:
        for framework in harness.FRAMEWORKS:
            is_table = framework == "xgboost"
            rows = []
            for size in ROWS if is_table else IMAGES:
                path = Path(folder, f"{is_table}{size}")
                if not path.exists():
                    harness.write_table(path, size, 20) if is_table else harness.write_images(path, size)
                runs = [
                    harness.run_json("growth", "samples", framework, path) for _ in range(min(repetitions, 2))
                ]
                rows.append((size, *map(min, zip(*runs))))
            _add(curves, framework, SAMPLES, ("seconds per epoch", "peak memory, MB"), rows)
            sizes = ROUNDS if is_table else WIDTHS
            rows = [harness.run_json("growth", "state", framework, size, repetitions) for size in sizes]
            _add(curves, framework, STATE, ("seconds per epoch", "peak memory, MB", "seconds per save"), rows)
            rows = harness.run_json("growth", "before", framework, repetitions)
            _add(curves, framework, BEFORE, ("seconds per epoch", "seconds per save"), rows)
    rows = [(number, _find(number, repetitions)) for number in EPOCHS]
    _add(curves, "all", BEFORE, ("ms to find the newest",), rows)
    _draw(curves)
    for (title, size), scripts in curves.items():
        exponents = {name: _exponent(*curve) for name, curve in scripts.items()}
        steepest = max(exponents, key=exponents.get)
        points = ", ".join(f"{value:.3g} at {at:,.0f}" for at, value in zip(*scripts[steepest]))
        detail = ", ".join(f"{name} {exponent:.2f}" for name, exponent in exponents.items())
        detail += f"; {steepest}: {points}"
        yield harness.Figure(f"exponent of {title} over {size}", exponents[steepest], "<= 1.2", detail)


def _add(curves, script, size, titles, rows):
    sizes, *columns = zip(*rows)
    for title, values in zip(titles, columns):
        curves.setdefault((title, size), {})[script] = sizes, values


def _exponent(sizes, values):
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def _find(number, repetitions):
    with tempfile.TemporaryDirectory() as folder:
        for epoch in range(number):
            Path(folder, f"checkpoint-{epoch}.pt").touch()
        times = []
        for _ in range(repetitions):
            began = time.perf_counter()
            checkpoints.find_checkpoints(folder, "checkpoint-{}.pt")
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def _draw(curves):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, grid = pyplot.subplots(2, 4, figsize=(14, 6.5), layout="constrained")
    colours = {name: f"C{number}" for number, name in enumerate((*harness.FRAMEWORKS, "all"))}
    for axes, ((title, size), scripts) in zip(grid.flat, curves.items()):
        for name, (sizes, values) in scripts.items():
            axes.plot(sizes, values, marker="o", color=colours[name], label=name)
        low = min(values[0] for _, values in scripts.values())
        first, *_, last = next(iter(scripts.values()))[0]
        axes.plot([first, last], [low, low * last / first], "k:", linewidth=1, label="linear")
        axes.set(xscale="log", yscale="log", title=title, xlabel=size)
        axes.legend(fontsize=7)
    drawing.savefig(harness.RESULTS / "growth.png", dpi=110)
    pyplot.close(drawing)


def samples(framework, data):
    """Return the seconds of an epoch after the first, and the peak in MB."""
    script = harness.import_script(framework)
    flags = ["--train", data, "--checkpoint-seconds", "0"]
    if framework == "xgboost":
        flags += ["--num-round", "20"]
    else:
        script.build_model = models.tiny_model(framework, script)
        flags += ["--epochs", "2", "--batch-size", "128", "--log-steps", "0"]
    args = script.parse_args(flags)
    script.main(args)
    return statistics.median(harness.history(args, "seconds")[1:]), harness.peak_memory()


class Saves:
    """Replaces the saves of a training: waits until each file is written, and keeps the times.

    Args:
        before_save: called with the Saves and the Run.
    """

    def __init__(self, before_save=None):
        self.save = Run.save
        self.before_save = before_save
        self.ended = None
        self.epochs = []  # seconds
        self.saves = []
        Run.save = lambda run: self.save_and_wait(run)

    def save_and_wait(self, run):
        """Write a checkpoint."""
        if self.before_save:
            self.before_save(self, run)
        began = time.perf_counter()
        if self.ended:
            self.epochs.append(began - self.ended)
        self.save(run)
        run.saver.wait()
        self.ended = time.perf_counter()
        self.saves.append(self.ended - began)


def state(framework, size, repetitions):
    """Return MB of training state, seconds per epoch, the peak in MB and seconds per save."""
    script, repetitions = harness.import_script(framework), int(repetitions)
    if framework == "xgboost":
        flags = models.deep_trees("deep", size)  # so few rounds are all saved; the last have about the size
    else:
        script.build_model = models.large_model(framework, script, int(size))
        flags = ["--epochs", str(repetitions + 1), "--log-steps", "0", "--learning-rate", "1e-6"]
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        args = script.parse_args([*flags, "--checkpoint-path", folder])
        saves = Saves()
        script.export_model = lambda *_: None
        script.main(args)
        megabytes = max(path.stat().st_size for path in args.checkpoint_path.iterdir()) / 1e6
    return megabytes, min(saves.epochs[-repetitions:]), harness.peak_memory(), min(saves.saves[-repetitions:])


def before(framework, repetitions):
    """Return for each number of epochs before: the number, seconds per epoch and per save."""
    script, each = harness.import_script(framework), int(repetitions) + 1

    def add_epochs(saves, run):
        group, number = divmod(len(saves.saves), each)
        if number:
            return
        saves.ended = None
        history = run.progress.history
        history += [dict(history[-1]) for _ in range(EPOCHS[group] - len(history))]
        for epoch in range(EPOCHS[group]):
            (run.checkpoints.folder / run.checkpoints.name_of(10**6 + epoch)).touch()

    saves = Saves(add_epochs)
    script.export_model = lambda *_: None
    script.main(script.parse_args(["--epochs", str(len(EPOCHS) * each), "--checkpoint-seconds", "0"]))
    epochs = [saves.epochs[i * (each - 1) : (i + 1) * (each - 1)] for i in range(len(EPOCHS))]
    times = [saves.saves[i * each + 1 : (i + 1) * each] for i in range(len(EPOCHS))]
    return list(zip(EPOCHS, map(min, epochs), map(min, times)))


if __name__ == "__main__":
    harness.print_json(samples=samples, state=state, before=before)
