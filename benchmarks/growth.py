"""How costs grow, at three sizes each: the exponent is 1 where twice the size costs twice as much, 0 where as much.

Time per epoch and peak memory over the number of samples (32 x 32 images; rows of 20 columns), the time of a whole save
over the size of the training state, and the time to find the newest checkpoint over the number of epochs before it.
"""

import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.checkpoint import large_model
from common import checkpoints

IMAGES, ROWS = (2_000, 6_000, 18_000), (50_000, 150_000, 450_000)
WIDTHS = (1024, 1536, 2048)  # of three dense layers
EPOCHS = (100, 1_000, 10_000)


def measure(repetitions):
    """Return the figures, and draw `growth.png`."""
    repetitions = min(repetitions, 3)
    curves = {"seconds per epoch": {}, "peak memory, MB": {}, "seconds per save": {}, "ms to find the newest": {}}
    with tempfile.TemporaryDirectory() as folder:
        for framework in harness.FRAMEWORKS:
            sizes = ROWS if framework == "xgboost" else IMAGES
            write = harness.write_table if framework == "xgboost" else harness.write_images
            more = (20,) if framework == "xgboost" else ()
            seen = []
            for size in sizes:
                data = write(Path(folder, f"{framework}{size}"), size, *more)
                runs = [harness.run_json("growth", framework, "train", data) for _ in range(repetitions)]
                seen.append([statistics.median(values) for values in zip(*runs)])
            for name, values in zip(list(curves)[:2], zip(*seen)):
                curves[name][framework] = sizes, values
        for framework in harness.IMAGES:
            runs = [harness.run_json("growth", framework, "save", width, repetitions) for width in WIDTHS]
            curves["seconds per save"][framework] = tuple(zip(*runs))
    curves["ms to find the newest"]["all"] = EPOCHS, [_find(number, repetitions) for number in EPOCHS]
    _draw(curves)
    return [
        _figure(framework, name, sizes, values)
        for name, frameworks in curves.items()
        for framework, (sizes, values) in frameworks.items()
    ]


def _figure(framework, name, sizes, values):
    # Over the two larger sizes: at the smallest what does not grow at all has the larger part.
    exponent = math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])
    measured = ", ".join(f"{value:.3g} at {size:,.0f}" for size, value in zip(sizes, values))
    return harness.Figure(f"{framework}: exponent of {name}", exponent, "<= 1.1", measured)


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

    drawing, all_axes = pyplot.subplots(1, len(curves), figsize=(14, 3.5), layout="constrained")
    labels = ("samples", "samples", "MB of training state", "epochs before")
    for axes, (name, frameworks), label in zip(all_axes, curves.items(), labels):
        for framework, (sizes, values) in frameworks.items():
            axes.plot(sizes, values, marker="o", label=framework)
        axes.set(xscale="log", yscale="log", title=name, xlabel=label)
        axes.legend(fontsize=7)
    drawing.savefig(harness.RESULTS / "growth.png", dpi=110)
    pyplot.close(drawing)


def train(framework, data):
    """Return seconds per epoch, the fastest of some, and the peak in MB."""
    script = harness.import_script(framework)
    flags = ["--train", data, "--log-steps", "0", "--checkpoint-seconds", "0"]
    flags += ["--num-round", "20"] if framework == "xgboost" else ["--epochs", "2", "--batch-size", "128"]
    args = script.parse_args(flags)
    script.main(args)
    lines = (args.output_data_dir / "history.csv").read_text().splitlines()
    column = lines[0].split(",").index("seconds")
    seconds = sorted(float(line.split(",")[column]) for line in lines[2:])
    return seconds[len(seconds) // 2], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def save(framework, width, repetitions):
    """Return the size of the training state in MB and the seconds that it takes until it is on the disk."""
    script = harness.import_script(framework)
    script.build_model = large_model(framework, script, int(width))
    original, seconds = script.save_checkpoint, []

    def timed(*arguments):
        began = time.perf_counter()
        original(*arguments)
        script.saving.wait()
        seconds.append(time.perf_counter() - began)

    script.save_checkpoint, script.export_model = timed, lambda *_: None
    flags = ["--epochs", str(int(repetitions) + 1), "--log-steps", "0", "--learning-rate", "1e-6"]
    args = script.parse_args(flags)
    script.main(args)
    size = next(args.checkpoint_path.iterdir()).stat().st_size / 1e6
    return size, statistics.median(seconds[1:])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        os.chdir(own)
        result = {"train": train, "save": save}[sys.argv[2]](sys.argv[1], *sys.argv[3:])
        os.chdir("/")
    print(json.dumps(result))
