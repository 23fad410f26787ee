"""Time to the first step of a training on class folders of JPEG files, and the cost of decoding.

Before the first step the script lists the files, and decodes some of them for the statistics and then the
first batch. The time is measured from the start of the process, fresh and resumed, for 1,000 to 100,000
files: links to 1,000 images of 128 x 128 pixels, resized to 32 x 32. The throughput of the first epoch is
compared with later epochs, with memory for all decoded images and for half of them.
"""

import os
import statistics
import tempfile
from pathlib import Path

from benchmarks import harness
from benchmarks.input import write_jpegs
from benchmarks.restart import until

COUNTS = (1000, 10_000, 100_000)
FLAGS = ("--image-size", 32, "--log-steps", 1, "--checkpoint-seconds", 0)
LIMITED = """
import os, runpy, sys
from common import machine
machine.available_memory = lambda: {memory}
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measure(repetitions):
    """Yield the figures."""
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder, "files"), COUNTS[0], 128)
        for count in COUNTS[1:]:
            link_files(Path(folder, "files"), Path(folder, f"files-{count}"), count, 10)
        yield from _first_steps(Path(folder), repetitions)
        yield from _rates(Path(folder, "files-10000"), repetitions)


def link_files(source, target, count, num_classes):
    """Fill `num_classes` folders in `target` with `count` links to the JPEG files below `source`."""
    files = sorted(source.rglob("*.jpg"))
    for number in range(num_classes):
        (target / f"class-{number}").mkdir(parents=True)
    for index in range(count):
        os.link(files[index % len(files)], target / f"class-{index % num_classes}" / f"{index}.jpg")


def _first_steps(folder, repetitions):
    variants = {}
    for count in COUNTS:
        data = folder / "files" if count == COUNTS[0] else folder / f"files-{count}"
        flags = ["--train", data, *FLAGS]
        output = folder / f"output-{count}"
        until("pytorch", "step=3/", [*flags, "--checkpoint-steps", 1, "--output", output], folder)
        variants[f"fresh, {count}"] = lambda flags=flags: _fresh(flags)
        variants[f"resumed, {count}"] = lambda flags=flags, output=output: until(
            "pytorch", "step=", [*flags, "--output", output], folder
        )
    turns = harness.take_turns(repetitions, **variants)
    seconds = {name: statistics.median(values) for name, values in turns.items()}
    for kind in ("fresh", "resumed"):
        detail = ", ".join(f"{count:,}: {seconds[f'{kind}, {count}']:.1f} s" for count in COUNTS)
        more = seconds[f"{kind}, {COUNTS[-1]}"] - seconds[f"{kind}, {COUNTS[0]}"]
        what = f"{kind}: delay of the first step, {COUNTS[-1]:,} against {COUNTS[0]:,} images, s"
        yield harness.Figure(what, more, "<= 2", detail)


def _fresh(flags):
    with tempfile.TemporaryDirectory() as folder:
        return until("pytorch", "step=", flags, folder)


def _rates(data, repetitions):
    num_bytes = len(list(data.rglob("*.jpg"))) * 32 * 32 * 3
    turns = harness.take_turns(
        repetitions,
        all=lambda: _epoch_rates(data, 4 * num_bytes),  # images may use half of the free memory
        half=lambda: _epoch_rates(data, num_bytes),
    )
    for name, values in turns.items():
        first = [rates[0] for rates in values]
        later = [statistics.mean(rates[1:]) for rates in values]
        detail = f"{statistics.median(first):,.0f} and then {statistics.median(later):,.0f} samples/s"
        yield harness.Figure(
            f"room for {name}: first / later epochs", harness.ratio(first, later), "", detail
        )


def _epoch_rates(data, memory):
    with tempfile.TemporaryDirectory() as folder:
        script = harness.ROOT / "pytorch/train.py"
        flags = ["--train", data, "--image-size", 32, "--epochs", 3]
        command = ["-c", LIMITED.format(memory=memory), script, *flags]
        return harness.rates(harness.run(command, folder))
