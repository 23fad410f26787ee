"""Large jobs, at a tenth of their size and at the whole: seconds and peak memory until the first step ends.

PyTorch starts on links to JPEG files of 128 x 128 pixels in 1,000 classes, resized to 32 x 32: 100,000 and
1,000,000. XGBoost reads a CSV table of ten columns: 1,000,000 and 10,000,000 rows. PyTorch saves a training
state of 0.4 and 4 GB, and resumes from it. An exponent of 1 means that ten times the size costs ten times as
much. One run each.
"""

import json
import math
import os
import tempfile
import time
from pathlib import Path

from benchmarks import harness, models
from benchmarks.first_step import link_files
from benchmarks.input import write_jpegs

CLASSES, IMAGES = 1000, (100_000, 1_000_000)
COLUMNS, ROWS = 10, (1_000_000, 10_000_000)
DEPTHS = {0.4: 12, 4: 120}  # GB of state, and dense layers
FLAGS = ("--checkpoint-seconds", 0)
LIMIT = 1.1


def measure(repetitions):
    """Yield the figures."""
    for measured in (_images, _tables, _states):
        with tempfile.TemporaryDirectory() as folder:
            yield from measured(Path(folder))


def _images(folder):
    write_jpegs(folder / "files", CLASSES, 128)
    runs = {}
    for count in IMAGES:
        target = folder / str(count)
        link_files(folder / "files", target, count, CLASSES)
        flags = ["--train", target, "--image-size", 32, "--output", folder / f"output-{count}"]
        saved = _start("pytorch", 0, *flags, "--checkpoint-steps", 1)
        resumed = _start("pytorch", 0, *flags, *FLAGS)
        runs[count] = {"first step, s": saved["first step, s"], **_renamed(resumed)}
    yield from _figures("images", runs)


def _tables(folder):
    harness.write_table(folder, ROWS[0], COLUMNS)
    block = (folder / "table.csv").read_bytes()
    runs = {}
    for count in ROWS:
        (folder / str(count)).mkdir()
        with open(folder / str(count) / "table.csv", "wb") as file:
            for _ in range(count // ROWS[0]):
                file.write(block)
        runs[count] = _start("xgboost", 0, "--train", folder / str(count), *FLAGS)
    yield from _figures("rows", runs)


def _states(folder):
    data = harness.write_images(folder / "images", 64)
    runs = {}
    for size, depth in DEPTHS.items():
        flags = ["--train", data, "--batch-size", 8, "--output", folder / f"output-{size}"]
        saved = _start("pytorch", depth, *flags, "--checkpoint-steps", 1)
        resumed = _start("pytorch", depth, *flags, *FLAGS)
        runs[size] = {**saved, **_renamed(resumed)}
    yield from _figures("GB of state", runs)


def _start(*words):
    return harness.run_json("large", time.time(), *words)


def _renamed(run):
    return {f"resumed, {name}": value for name, value in run.items()}


def _figures(unit, runs):
    (small, few), (large, many) = runs.items()
    for name in few:
        exponent = math.log(many[name] / few[name]) / math.log(large / small)
        detail = f"{few[name]:,.2f} with {small:,} and {many[name]:,.2f} with {large:,} {unit}"
        yield harness.Figure(f"{unit}: exponent of {name}", exponent, f"<= {LIMIT}", detail)


def start(began, framework, depth, *flags):
    """Train to the end of the first step, and of its checkpoint; print seconds and peak memory.

    Args:
        began: the time when the process was started.
        depth: of the large network; 0: the default network.
    """
    began = float(began)
    script = harness.import_script(framework)
    run = script.Run
    if int(depth):
        script.build_model = models.large_model(framework, script, depth=int(depth))
    name = "finish_round" if framework == "xgboost" else "finish_step"
    finish, save = getattr(run, name), run.save
    seen = {}

    def timed_save(self, *args, **options):
        seen["first step, s"] = time.time() - began
        saving = time.time()
        save(self, *args, **options)
        seen["stall, s"] = time.time() - saving
        self.saver.wait()
        seen["save, s"] = time.time() - saving

    def finish_step(self, *args, **options):
        finish(self, *args, **options)
        seen.setdefault("first step, s", time.time() - began)
        seen["peak memory, MB"] = harness.peak_memory()
        print(json.dumps(seen), flush=True)
        os._exit(0)  # without the rest of the training

    run.save = timed_save
    setattr(run, name, finish_step)
    script.main(script.parse_args(list(flags)))


if __name__ == "__main__":
    harness.print_json(start)
