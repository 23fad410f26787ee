"""What all benchmarks share: runs that take turns, ratios within one run, table and picture of their figures."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
FRAMEWORKS = ("pytorch", "tensorflow", "mxnet", "xgboost")
IMAGES = FRAMEWORKS[:3]
PACKAGES = ("torch", "torchvision", "tensorflow", "keras", "mxnet", "xgboost", "numpy", "pillow", "simplejpeg")


class Figure(NamedTuple):
    """A line of the table."""

    what: str
    value: float
    limit: str = ""  # such as "<= 1.1"; empty where there is none
    detail: str = ""  # what was measured: medians, sizes

    @property
    def reached(self):
        """Whether the limit is kept; None where there is none."""
        if not self.limit:
            return None
        sign, bound = self.limit.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


def take_turns(repetitions, **variants):
    """Call each of the functions in turn, so that all meet the same noise; return the lists of their values by name."""
    values = {name: [] for name in variants}
    for repetition in range(repetitions):
        names = list(variants)
        for name in names if repetition % 2 == 0 else reversed(names):
            values[name].append(variants[name]())
    return values


def ratio(values, others):
    """Return the median of the ratios of neighbours."""
    return statistics.median(value / other for value, other in zip(values, others))


def run(command, cwd=None, env=None):
    """Run a command in an empty folder, or in `cwd`; return its standard output. RuntimeError where it fails."""
    with contextlib.ExitStack() as stack:
        cwd = cwd or stack.enter_context(tempfile.TemporaryDirectory())
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        command = [sys.executable, *map(str, command)]
        finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{command}\n{finished.stdout}\n{finished.stderr}")
    return finished.stdout


def run_script(framework, *flags, cwd=None):
    """Run a training script; return its standard output."""
    return run([ROOT / framework / "train.py", *flags], cwd)


def run_json(module, *words, env=None):
    """Run a part of a benchmark's own, see `print_json`, in a process; return its result."""
    return json.loads(run(["-m", f"benchmarks.{module}", *words], ROOT, env).splitlines()[-1])


def print_json(part=None, **parts):
    """Call the one part, or that of the parts the command line names first, with the words that follow there.

    It runs in an empty folder, and what it returns is printed as JSON.
    """
    words = sys.argv[1:]
    part = part or parts[words.pop(0)]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        result = part(*words)
        os.chdir(ROOT)
    print(json.dumps(result))


def history(args, column):
    """Return a column of the metrics that a training has written, epoch by epoch."""
    names, *lines = (args.output_data_dir / "history.csv").read_text().splitlines()
    return [float(line.split(",")[names.split(",").index(column)]) for line in lines]


def rates(output):
    """Return the samples per second of each epoch."""
    return [float(rate) for rate in re.findall(r" samples_per_second=(\d+)", output)]


def peak_memory():
    """Return the peak of this process's memory in MB."""
    # Not ru_maxrss, which begins with the peak of the process that has started this one.
    return int(re.search(r"^VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) * 1024 / 1e6


def import_script(framework):
    """Return a training script as a module, to call parts of it."""
    sys.path.insert(0, str(ROOT / framework))
    specification = importlib.util.spec_from_file_location("train", ROOT / framework / "train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_images(folder, count, size=32):
    """Write `count` colour images of random pixels in ten classes as an .npz file in `folder`; return the folder."""
    generator = np.random.default_rng(0)
    Path(folder).mkdir(parents=True, exist_ok=True)
    pixels = generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    np.savez(Path(folder, "images.npz"), x=pixels, y=generator.integers(0, 10, count))
    return Path(folder)


def write_table(folder, rows, columns):
    """Write a CSV table of two classes that can be learned in `folder`; return the folder."""
    generator = np.random.default_rng(0)
    Path(folder).mkdir(parents=True, exist_ok=True)
    features = generator.normal(size=(rows, columns)).astype(np.float32)
    labels = features[:, :5].sum(1) + generator.normal(size=rows) > 0
    np.savetxt(Path(folder, "table.csv"), np.column_stack([labels, features]), "%.5g", ",")
    return Path(folder)


def machine():
    """Return versions and hardware as a dictionary of texts."""
    described = dict(
        re.findall(r"^(model name|MemTotal)\s*:\s*(.*)$", _read("/proc/cpuinfo") + _read("/proc/meminfo"), re.M)
    )
    cards = Path("/proc/driver/nvidia/gpus").glob("*/information")
    gpus = [re.search(r"^Model:\s*(.*)$", card.read_text(), re.M)[1] for card in cards]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "CPU": f"{len(os.sched_getaffinity(0))} cores of {described.get('model name', platform.machine())}",
        "memory": f"{int(described.get('MemTotal', '0 kB').split()[0]) / 2**20:.0f} GiB",
        "GPU": ", ".join(gpus) or "none",
        "Python": platform.python_version(),
        **versions,
    }


def write_results(name, description, figures, repetitions):
    """Keep the figures of one benchmark, and write table and picture of all that are there."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "description": description,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "repetitions": repetitions,
        "machine": machine(),
        "figures": figures,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def write_report(order):
    """Write `results/README.md` and `results/figures.png` from the kept figures, benchmarks in this order."""
    kept = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in order if _has(name)}
    lines = ["# Results", "", "Made by `make bench`, or one part of it by `make bench BENCH=checkpoint`."]
    for facts in dict.fromkeys(json.dumps(content["machine"]) for content in kept.values()):
        lines += ["", "; ".join(f"{key} {value}" for key, value in json.loads(facts).items()) + "."]
    lines += ["", "![Each figure relative to its limit](figures.png)"]
    for name, content in kept.items():
        paragraphs = [" ".join(paragraph.split()) for paragraph in content["description"].strip().split("\n\n")]
        lines += ["", f"## {name}", "", *"\n\n".join(paragraphs).splitlines()]
        lines += ["", f"{content['date']}, medians of {content['repetitions']} repetitions.", ""]
        lines += ["| What | Figure | Limit | Reached | Detail |", "|---|---|---|---|---|"]
        for figure in map(Figure._make, content["figures"]):
            reached = {None: "", True: "yes", False: "**no**"}[figure.reached]
            lines.append(f"| {figure.what} | {figure.value:.3g} | {figure.limit} | {reached} | {figure.detail} |")
        if (RESULTS / f"{name}.png").exists():
            lines += ["", f"![{name}]({name}.png)"]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")
    _draw([(name, Figure._make(figure)) for name, content in kept.items() for figure in content["figures"]])


def _has(name):
    return (RESULTS / f"{name}.json").exists()


def _read(path):
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _draw(figures):
    """Draw how far each figure is on the good side of its limit, the right one, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    limited = [(name, figure) for name, figure in figures if figure.limit]
    better = []
    for _, figure in limited:
        sign, bound = figure.limit.split()
        value = max(figure.value, 1e-3)
        better.append(float(bound) / value if sign == "<=" else value / float(bound))
    drawing, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(limited)), layout="constrained")
    colours = ["tab:green" if figure.reached else "tab:red" for _, figure in limited]
    shown = [min(max(value, 0.25), 8) for value in better]
    axes.barh(range(len(limited)), [value - 1 for value in shown], left=1, color=colours)
    axes.set_yticks(range(len(limited)), [f"{name}: {figure.what}" for name, figure in limited], fontsize=7)
    for place, (_, figure) in enumerate(limited):
        axes.annotate(f" {figure.value:.3g} ({figure.limit})", (max(shown[place], 1), place), va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.axvspan(0.25, 1, color="tab:red", alpha=0.08)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.25, 24)
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "limit", "2", "4", "8"])
    axes.set_xlabel("times better than the limit (bars end at 8)")
    axes.set_title("missed < limit > reached", fontsize=9)
    axes.invert_yaxis()
    drawing.savefig(RESULTS / "figures.png", dpi=110)
    pyplot.close(drawing)
