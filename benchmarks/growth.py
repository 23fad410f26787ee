"""Growth of the costs over three sizes: an exponent of 1 means that twice the size costs twice as much.

Seconds per epoch and peak memory over the number of samples (32 x 32 images, a tiny network; rows of 20
columns). The same, and seconds per save, over the size of the training state (dense layers; XGBoost: trees).
It is saved to a file system in memory (/dev/shm) if available, because a shared disk accepts some saves fast
and delays the next ones. Seconds per epoch and per save over the number of earlier epochs, whose checkpoints
are in the folder; and the time to find the newest checkpoint. A figure is the largest exponent of all
scripts, over the two larger sizes: at the smallest size, constant costs dominate. Up to 1.2 counts as linear,
because data that exceeds the processor's cache takes longer per byte.
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
LIMIT = 1.2
COLOURS = "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#555555"  # that colour-blind readers can distinguish
SAMPLES, STATE, EARLIER = "samples", "MB of training state", "earlier epochs"


def measure(repetitions):
    """Yield the figures, and draw `growth.png`."""
    curves = {}  # by title and size: the sizes and measurements of each script
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
            _add(curves, framework, EARLIER, ("seconds per epoch", "seconds per save"), rows)
    rows = [(number, _find(number, repetitions)) for number in EPOCHS]
    _add(curves, "all", EARLIER, ("ms to find the newest",), rows)
    all_exponents = {}
    for (title, size), scripts in curves.items():
        exponents = {name: _exponent(*curve) for name, curve in scripts.items()}
        all_exponents[title, size] = exponents
        steepest = max(exponents, key=exponents.get)
        points = ", ".join(f"{value:.3g} at {at:,.0f}" for at, value in zip(*scripts[steepest]))
        detail = ", ".join(f"{name} {exponent:.2f}" for name, exponent in exponents.items())
        detail += f"; {steepest}: {points}"
        yield harness.Figure(f"exponent of {title} over {size}", exponents[steepest], f"<= {LIMIT}", detail)
    _draw(all_exponents)


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


def _draw(exponents):
    """Draw the exponents of each script, of a dictionary by title and size."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(9, 0.8 + 0.8 * len(exponents)))
    axes = drawing.subplots()
    colours = dict(zip((*harness.FRAMEWORKS, "all"), COLOURS))
    for row, scripts in enumerate(exponents.values()):
        for lane, (name, exponent) in enumerate(scripts.items()):
            place = row + 0.21 * (lane - (len(scripts) - 1) / 2)
            axes.plot([0, exponent], [place, place], color=colours[name], linewidth=1.5, alpha=0.5)
            axes.plot(exponent, place, "o", color=colours[name], markersize=7)
            label = name if row == 0 or name == "all" else f"{exponent:.2f}" if exponent > LIMIT else ""
            axes.text(exponent + 0.03, place, label, color=colours[name], va="center", fontsize=9)
    rows = [f"{title}\nover {size}" for title, size in exponents]
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    lowest, highest = axes.get_xlim()
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(lowest, max(2.4, highest)))
    axes.set_xticks(
        [0, 1, 2],
        ["0: does not grow", "1: twice the size,\ntwice the cost", "2: twice the size,\nfour times the cost"],
    )
    axes.axvspan(LIMIT, 9, color="#d55e00", alpha=0.08, linewidth=0)
    axes.text(LIMIT + 0.02, len(rows) - 0.6, f"above the limit of {LIMIT}", color="#666666", fontsize=9)
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    for row in range(1, len(rows)):
        axes.axhline(row - 0.5, color="#dddddd", linewidth=0.7)
    axes.axvline(0, color="black", linewidth=1)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.set_title("How costs grow: exponents at the two larger sizes", loc="left", fontsize=12, pad=10)
    drawing.savefig(harness.RESULTS / "growth.png", dpi=100, bbox_inches="tight")


def samples(framework, data):
    """Return the seconds per epoch, without the first epoch, and the peak in MB."""
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
    """Replace the saves of a training: wait until each file is written, and record the times.

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
    """Return MB of training state, seconds per epoch, peak MB and seconds per save."""
    script, repetitions = harness.import_script(framework), int(repetitions)
    if framework == "xgboost":
        flags = models.deep_trees("deep", size)  # few rounds: all are saved
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
    """Return each number of earlier epochs with the seconds per epoch and per save."""
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
    flags = ["--epochs", str(len(EPOCHS) * each)]
    if framework != "xgboost":  # whose first rounds are saved one by one
        flags += ["--checkpoint-seconds", "0"]
    script.main(script.parse_args(flags))
    epochs = [saves.epochs[i * (each - 1) : (i + 1) * (each - 1)] for i in range(len(EPOCHS))]
    times = [saves.saves[i * each + 1 : (i + 1) * each] for i in range(len(EPOCHS))]
    return list(zip(EPOCHS, map(min, epochs), map(min, times)))


if __name__ == "__main__":
    harness.print_json(samples=samples, state=state, before=before)
