"""The cost of a restart: from the start of the process to the end of the first training step or round.

The time to resume is divided by the time of a fresh start plus the time to read the checkpoint once from the
page cache; with the default model, and with a model of the framework's zoo whose training state has 100 MB or
more. Then: the time with PyTorch's --compile and the compilations of an earlier run, relative to that without
them; the time to find the newest of 10,000 checkpoints with their markers; and the time of `--help` and of a
misspelt flag.

The picture shows where the time to the first step goes with the default model. The share of this repository's
own code is that of its modules' imports, the flags, the data and the checkpoint; the rest is Python, the
framework, and the first step, which compiles.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import harness
from common import checkpoints

# Few layers but many weights, so that building the network does not hide the time to load them.
LARGE = {"pytorch": "resnet18", "tensorflow": "VGG16", "mxnet": "resnet18_v1"}
PHASES = {  # name: colour
    "Python and NumPy": "#bbbbbb",
    "our modules": "#d55e00",
    "flags": "#e69f00",
    "framework": "#0072b2",
    "device": "#56b4e9",
    "data": "#cc79a7",
    "model": "#009e73",
    "checkpoint": "#f0e442",
    "first step": "#555555",
}
OURS = ("our modules", "flags", "data", "checkpoint")
# Runs a script to its first step and prints the seconds of each phase. The script is the first argument.
TIMED = """
import json, os, runpy, sys, time
import numpy
times = {"Python and NumPy": time.time()}
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from common import run
times["our modules"] = time.time()

def mark(owner, name, before=None, after=None):
    function = getattr(owner, name)
    def marked(*args, **options):
        times.setdefault(before, time.time())
        result = function(*args, **options)
        times.setdefault(after, time.time())
        if after == "first step":
            times.pop(None, None)
            print(json.dumps(times), flush=True)
            os._exit(0)
        return result
    setattr(owner, name, marked)

mark(run, "start", after="flags")
mark(run.Run, "__enter__", before="framework", after="device")
mark(run.Run, "load_data", after="data")
mark(run.Run, "load_tables", after="data")
mark(run.Run, "restore", before="model", after="checkpoint")
mark(run.Run, "finish_step", after="first step")
mark(run.Run, "finish_round", after="first step")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measure(repetitions):
    """Yield the figures."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _phases(Path(folder), repetitions)
        data = harness.write_images(Path(folder, "images"), 80)
        table = harness.write_table(Path(folder, "table"), 20_000, 20)
        for framework in harness.IMAGES:
            yield _restart(framework, "cnn", data, repetitions)
            yield _restart(framework, LARGE[framework], data, repetitions)
        yield _restart("xgboost", "500 rounds", table, repetitions)
        yield _compile(data, repetitions)
        yield _find(Path(folder, "many"), repetitions)
    for framework in harness.FRAMEWORKS:
        yield from _usage(framework, repetitions)


def _phases(folder, repetitions):
    bars = {}
    for framework in harness.FRAMEWORKS:
        if framework == "xgboost":
            data, epochs, more = harness.write_table(folder / "phases-table", 20_000, 20), 100, 101
        else:
            data, epochs, more = harness.write_images(folder / "phases-images", 5000), 1, 2
        flags = ["--train", data, "--output", folder / f"phases-{framework}"]
        harness.run_script(framework, *flags, "--epochs", epochs)
        turns = harness.take_turns(
            repetitions,
            fresh=lambda: _seconds(framework, "--train", data),  # noqa: B023
            resumed=lambda: _seconds(framework, *flags, "--epochs", more),  # noqa: B023
        )
        for kind, runs in turns.items():
            phases = {name: statistics.median(run[name] for run in runs) for name in PHASES}
            bars[f"{framework}, {kind}"] = phases
            share = sum(phases[name] for name in OURS) / sum(phases.values())
            detail = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items())
            what = f"{framework}, {kind}: our share of the time to the first step"
            yield harness.Figure(what, share, "<= 0.05", detail)
    _draw(bars)


def _seconds(framework, *flags):
    """Return the seconds of each phase of a start."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        script = harness.ROOT / framework / "train.py"
        times = json.loads(harness.run(["-c", TIMED, script, *flags], folder).splitlines()[-1])
    seconds = {}
    for name in PHASES:
        seconds[name] = times[name] - began
        began = times[name]
    return seconds


def _draw(bars):
    """Draw the phases of each start, of a dictionary by its name."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(9, 0.9 + 0.4 * len(bars)))
    axes = drawing.subplots()
    for place, phases in enumerate(bars.values()):
        began = 0
        for name, seconds in phases.items():
            label = name if place == 0 else None
            axes.barh(place, seconds, left=began, color=PHASES[name], height=0.7, label=label)
            began += seconds
        axes.text(began + 0.03, place, f"{began:.1f} s", va="center", fontsize=10)
    axes.set_yticks(range(len(bars)), bars, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlabel("seconds from the start of the process to the end of the first step")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=10)
    drawing.savefig(harness.RESULTS / "restart.png", dpi=100, bbox_inches="tight")


def _restart(framework, model, data, repetitions):
    if framework == "xgboost":
        flags, line = ["--train", data], "epoch="
        trained, longer = ["--num-round", 500, "--checkpoint-steps", 500], ["--num-round", 501]
    else:
        flags, line = ["--train", data, "--log-steps", 1, "--batch-size", 8, "--model", model], "step="
        trained, longer = ["--epochs", 1], ["--epochs", 9]
    with tempfile.TemporaryDirectory() as folder:
        harness.run_script(framework, *flags, *trained, cwd=folder)
        path = max(Path(folder, "output", framework, "checkpoints").iterdir(), key=os.path.getmtime)
        size = path.stat().st_size

        def seconds(*more):
            with tempfile.TemporaryDirectory() as copy:
                if "fresh" not in more:
                    target = Path(copy, "output", framework, "checkpoints")
                    target.mkdir(parents=True)
                    os.link(path, target / path.name)  # a copy might not be on the disk yet
                return until(framework, line, [*flags, *longer], copy)

        turns = harness.take_turns(
            repetitions, resumed=seconds, fresh=lambda: seconds("fresh"), read=lambda: _read(path)
        )
    expected = [fresh + read for fresh, read in zip(turns["fresh"], turns["read"])]
    middle = {name: statistics.median(values) for name, values in turns.items()}
    raw = (
        f"{middle['resumed']:.2f} s; fresh {middle['fresh']:.2f} s, reading the file of {size / 1e6:.1f} MB "
    )
    raw += f"{1000 * middle['read']:.0f} ms ({size / 1e6 / middle['read']:,.0f} MB/s)"
    return harness.Figure(
        f"{framework}, {model}: resumed / fresh", harness.ratio(turns["resumed"], expected), "<= 1.1", raw
    )


def _compile(data, repetitions):
    flags = ["--train", data, "--log-steps", 1, "--epochs", 9]
    with tempfile.TemporaryDirectory() as kept, tempfile.TemporaryDirectory() as folder:

        def seconds(*more, cache=kept):
            with tempfile.TemporaryDirectory(dir=folder) as work:
                variable = {"TORCHINDUCTOR_CACHE_DIR": cache or work}
                return until("pytorch", "step=", [*flags, *more], work, variable)

        seconds("--compile")
        turns = harness.take_turns(
            repetitions,
            kept=lambda: seconds("--compile"),
            new=lambda: seconds("--compile", cache=None),
            plain=seconds,
        )
        size = sum(path.stat().st_size for path in Path(kept).rglob("*") if path.is_file())
    middle = {name: statistics.median(values) for name, values in turns.items()}
    detail = f"{middle['kept']:.1f} s and {middle['new']:.1f} s; without --compile {middle['plain']:.1f} s; "
    detail += f"the folder has {size / 1e6:.1f} MB"
    what = "pytorch, --compile: with the kept compilations / without"
    return harness.Figure(what, harness.ratio(turns["kept"], turns["new"]), "", detail)


def until(framework, start, flags, folder, env=None):
    """Return the seconds from the start of the process to its first line that starts with this text.

    Args:
        env: environment variables for the script, besides those of this process.
    """
    command = [sys.executable, str(harness.ROOT / framework / "train.py"), *map(str, flags)]
    began = time.monotonic()
    environment = {**os.environ, **(env or {})}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith(start):
                seconds = time.monotonic() - began
                process.kill()
                return seconds
    raise RuntimeError(f"{command} ended without a line that starts with {start}")


def _read(path):
    began = time.monotonic()
    path.read_bytes()
    return time.monotonic() - began


def _find(folder, repetitions):
    folder.mkdir()
    for number in range(10_000):
        (folder / f"checkpoint-{number}.pt").touch()
        (folder / f"checkpoint-{number}.pt.sagemaker-uploaded").touch()

    def milliseconds():
        began = time.monotonic()
        found = checkpoints.find_checkpoints(folder, "checkpoint-{}.pt")
        assert found[0][1] == "checkpoint-9999.pt"  # noqa: S101
        return 1000 * (time.monotonic() - began)

    times = sorted(milliseconds() for _ in range(repetitions))
    detail = f"{times[0]:.0f} to {times[-1]:.0f} ms; 20,000 files with the markers of SageMaker"
    return harness.Figure("newest of 10,000 checkpoints, ms", times[len(times) // 2], "<= 50", detail)


def _usage(framework, repetitions):
    def seconds(flag, code):
        began = time.monotonic()
        command = [sys.executable, str(harness.ROOT / framework / "train.py"), flag]
        assert subprocess.run(command, capture_output=True).returncode == code  # noqa: S101
        return time.monotonic() - began

    turns = harness.take_turns(
        repetitions, help=lambda: seconds("--help", 0), error=lambda: seconds("--epoch", 2)
    )
    for name, flag in (("help", "--help"), ("error", "a misspelt flag")):
        times = sorted(turns[name])
        detail = f"{times[0]:.2f} to {times[-1]:.2f} s"
        yield harness.Figure(f"{framework}: {flag}, seconds", times[len(times) // 2], "<= 0.5", detail)
