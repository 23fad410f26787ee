"""Shared parts of the benchmarks: alternating runs, ratios of adjacent runs, table and chart."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
NAMES = (
    "input",
    "first_step",
    "step",
    "account",
    "checkpoint",
    "interruptions",
    "rounds",
    "restart",
    "memory",
    "growth",
    "large",
    "predecessor",
)
FRAMEWORKS = ("pytorch", "tensorflow", "mxnet", "xgboost")
IMAGES = FRAMEWORKS[:3]
ROW_INCHES, LARGEST = 0.22, 8  # of the picture of all figures
PACKAGES = (
    "torch",
    "torchvision",
    "tensorflow",
    "keras",
    "mxnet",
    "xgboost",
    "numpy",
    "pillow",
    "simplejpeg",
)


class Figure(NamedTuple):
    """A row of the table."""

    what: str
    value: float
    limit: str = ""  # such as "<= 1.1"; empty for no limit
    detail: str = ""  # the measurements: medians, sizes

    @property
    def reached(self):
        """Whether the figure meets its limit; None without a limit."""
        if not self.limit:
            return None
        sign, bound = self.limit.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


def take_turns(repetitions, seconds=math.inf, **variants):
    """Call each function in turn, so that noise affects all alike; return lists of their values by name.

    After the first repetition, another one starts only if it would end within `seconds`.
    """
    values = {name: [] for name in variants}
    began = time.monotonic()
    for repetition in range(repetitions):
        elapsed = time.monotonic() - began
        if repetition and elapsed + elapsed / repetition > seconds:
            break
        names = list(variants)
        for name in names if repetition % 2 == 0 else reversed(names):
            values[name].append(variants[name]())
    return values


def ratio(values, others):
    """Return the median of the ratios of adjacent values."""
    return statistics.median(value / other for value, other in zip(values, others))


def run(command, cwd=None, env=None):
    """Run a command in an empty folder, or in `cwd`; return its standard output, or raise RuntimeError."""
    with contextlib.ExitStack() as stack:
        cwd = cwd or stack.enter_context(tempfile.TemporaryDirectory())
        search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": search_path, **(env or {})}
        command = [sys.executable, *map(str, command)]
        finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{command}\n{finished.stdout}\n{finished.stderr}")
    return finished.stdout


def run_script(framework, *flags, cwd=None):
    """Run a training script; return its standard output."""
    return run([ROOT / framework / "train.py", *flags], cwd)


def run_json(module, *words, env=None):
    """Run a part of a benchmark (see `print_json`) in a separate process; return its result."""
    return json.loads(run(["-m", f"benchmarks.{module}", *words], ROOT, env).splitlines()[-1])


def print_json(part=None, **parts):
    """Call the part, or the one of several that the command line names, with the remaining arguments.

    The part runs in an empty folder, and its result is printed as JSON.
    """
    words = sys.argv[1:]
    part = part or parts[words.pop(0)]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        result = part(*words)
        os.chdir(ROOT)
    print(json.dumps(result))


def history(args, column):
    """Return a column of the metrics of a training, epoch by epoch."""
    names, *lines = (args.output_data_dir / "history.csv").read_text().splitlines()
    return [float(line.split(",")[names.split(",").index(column)]) for line in lines]


def rates(output):
    """Return the samples per second of each epoch."""
    return [float(rate) for rate in re.findall(r" samples_per_second=(\d+)", output)]


def peak_memory():
    """Return the peak of this process's memory in MB."""
    # Not ru_maxrss, which starts with the peak of the parent process.
    return int(re.search(r"^VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) * 1024 / 1e6


def import_script(framework):
    """Import a training script as a module, to call its functions."""
    sys.path.insert(0, str(ROOT / framework))  # `engine.py` is beside it
    specification = importlib.util.spec_from_file_location("train", ROOT / framework / "train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_images(folder, count, size=32):
    """Write `count` random colour images in ten classes as an .npz file in `folder`; return the folder."""
    generator = np.random.default_rng(0)
    Path(folder).mkdir(parents=True, exist_ok=True)
    pixels = generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    np.savez(Path(folder, "images.npz"), x=pixels, y=generator.integers(0, 10, count))
    return Path(folder)


def write_table(folder, rows, columns):
    """Write a learnable CSV table of two classes in `folder`; return the folder."""
    generator = np.random.default_rng(0)
    Path(folder).mkdir(parents=True, exist_ok=True)
    features = generator.normal(size=(rows, columns)).astype(np.float32)
    labels = features[:, :5].sum(1) + generator.normal(size=rows) > 0
    np.savetxt(Path(folder, "table.csv"), np.column_stack([labels, features]), "%.5g", ",")
    return Path(folder)


def machine():
    """Return versions and hardware as a dictionary of strings."""
    described = dict(
        re.findall(
            r"^(model name|MemTotal)\s*:\s*(.*)$", _read("/proc/cpuinfo") + _read("/proc/meminfo"), re.M
        )
    )
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _is_installed(name)}
    return {
        "CPU": f"{len(os.sched_getaffinity(0))} cores of {described.get('model name', platform.machine())}",
        "memory": f"{int(described.get('MemTotal', '0 kB').split()[0]) / 2**20:.0f} GiB",
        "GPU": _gpus() or "none",
        "Python": platform.python_version(),
        **versions,
    }


def _is_installed(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _gpus():
    """Return the names and the driver of the GPUs, as reported by nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    finished = subprocess.run(query, capture_output=True, text=True)
    if finished.returncode:
        return ""
    return ", ".join(line.replace(", ", " (driver ") + ")" for line in finished.stdout.splitlines())


def head():
    """Return the commit of the working tree, or "unknown"."""
    program = shutil.which("git")
    if program is None:
        return "unknown"
    finished = subprocess.run(
        [program, "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return finished.stdout.strip() or "unknown"


def result(description, figures, repetitions, commit=None):
    """Return the record of one benchmark, to be saved as JSON."""
    return {
        "description": description,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit or head(),
        "repetitions": repetitions,
        "machine": machine(),
        "figures": figures,
    }


def write_results(name, description, figures, repetitions):
    """Save the figures of one benchmark."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result(description, figures, repetitions), indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")


def write_report(order, draw=True):
    """Write `results/README.md` and `results/figures.png` from the saved figures, in this order."""
    names = [name for name in (*order, "learning") if _has(name)]
    kept = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in names}
    lines = ["# Results", "", "Generated by `make bench`; `make bench BENCH=checkpoint` runs one benchmark."]
    for facts in dict.fromkeys(json.dumps(content["machine"]) for content in kept.values()):
        lines += ["", _sentence(json.loads(facts))]
    lines += ["", "![Each figure relative to its limit](figures.png)"]
    for name, content in kept.items():
        lines += ["", f"## {name}", "", *_paragraphs(content["description"])]
        source = f"{content['date']}, commit {content['commit']}"
        lines += ["", f"{source}, medians of {content['repetitions']} repetitions.", ""]
        lines += ["| Measurement | Value | Limit | Reached | Detail |", "|---|---|---|---|---|"]
        for figure in map(Figure._make, content["figures"]):
            reached = {None: "", True: "yes", False: "**no**"}[figure.reached]
            lines.append(
                f"| {figure.what} | {figure.value:.3g} | {figure.limit} | {reached} | {figure.detail} |"
            )
        if (RESULTS / f"{name}.png").exists():
            lines += ["", f"![{name}]({name}.png)"]
    lines += _gpu_report()
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")
    if draw:
        _draw(
            [(name, Figure._make(figure)) for name, content in kept.items() for figure in content["figures"]]
        )


def _gpu_report():
    """Return the report of the figures saved by `gpu.py`, part by part."""
    lines = ["", "## On a GPU", ""]
    if not _has("gpu"):
        return [*lines, "Not measured yet. Run `python -m benchmarks.gpu` on a machine with a GPU."]
    lines.append("Generated by `python -m benchmarks.gpu`; `python -m benchmarks.gpu step` runs one part.")
    for part, content in json.loads((RESULTS / "gpu.json").read_text()).items():
        lines += ["", f"### {part}", "", *_paragraphs(content["description"])]
        lines += ["", f"{content['date']}, commit {content['commit']}. {_sentence(content['machine'])}", ""]
        lines += ["| Measurement | Value | Detail |", "|---|---|---|"]
        for figure in map(Figure._make, content["figures"]):
            lines.append(f"| {figure.what} | {figure.value:.3g} | {figure.detail} |")
        for what, reason in content["failures"]:
            lines.append(f"| {what} | not measured | {reason.replace('|', '/')} |")
    return lines


def _sentence(facts):
    return "; ".join(f"{key} {value}" for key, value in facts.items()) + "."


def _paragraphs(description):
    """Return the lines of a docstring, with each paragraph joined to one line."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in description.strip().split("\n\n")]
    return "\n\n".join(paragraphs).splitlines()


def _has(name):
    return (RESULTS / f"{name}.json").exists()


def _read(path):
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _draw(figures):
    """Draw how many times better or worse than its limit each figure is, on a logarithmic scale."""
    from matplotlib.figure import Figure as Drawing

    limited = [(name, figure) for name, figure in figures if figure.limit]
    rows = []  # the name of each benchmark, and below it its figures
    for name, figure in limited:
        if name not in rows:
            rows.append(name)
        rows.append(figure)
    drawing = Drawing(figsize=(9, 1 + ROW_INCHES * len(rows)))
    axes = drawing.add_axes((0.45, 0.7 / drawing.get_figheight(), 0.37, 1 - 1 / drawing.get_figheight()))

    def write(x, place, text, **options):
        axes.text(x, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10, **options)

    for place, row in enumerate(rows):
        if isinstance(row, str):
            write(-1.24, place, row.replace("_", " "), weight="bold")
            continue
        better = _times_better(row)
        shown = min(max(better, 1 / LARGEST), LARGEST)
        colour = "#0072b2" if row.reached else "#d55e00"  # that colour-blind readers can distinguish
        axes.plot([1, shown], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(shown, place, ">" if better > LARGEST else "o", color=colour, markersize=7)
        write(-1.2, place, row.what)
        limit = row.limit.replace("<=", "≤").replace(">=", "≥")
        weight = "normal" if row.reached else "bold"
        write(1.03, place, f"{row.value:.3g}", color=colour, weight=weight)
        write(1.29, place, limit)
    for title, x in (("figure", 1.03), ("limit", 1.29)):
        write(x, -1, title, color="#666666")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = {0.5: "2 times\nworse", 1: "limit", 2: "2 times\nbetter", 4: "4 times", 8: "8 times"}
    axes.set_xticks(list(ticks), ticks.values(), fontsize=10)
    axes.set(xlim=(0.45, LARGEST * 1.1), ylim=(len(rows) - 0.3, -0.7), yticks=[])
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    drawing.savefig(RESULTS / "figures.png", dpi=100, bbox_inches="tight")


def _times_better(figure):
    """Return how many times better than its limit a figure is."""
    sign, bound = figure.limit.split()
    value = max(figure.value, 1e-3)
    return float(bound) / value if sign == "<=" else value / float(bound)
