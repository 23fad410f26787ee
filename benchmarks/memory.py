"""Peak memory of checkpoints, in copies of the training state, and of images, in copies of the data set.

Checkpoints: the peak of a training with about 300 MB of weights and momentum (XGBoost: 130 MB of trees) and
three saves, minus the peak of the same training without checkpoints. Images: the peak with 3,000 images of
224 x 224 minus the peak with 1,000, with a tiny network. Finally, XGBoost trains with `--external-memory` on
a CSV table of 4,000 columns whose size in float32 is four times the memory limit of the process (RLIMIT_DATA,
`ulimit -d`, which excludes the disk cache).
"""

import resource
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import harness, models
from common.run import Run

ROWS, COLUMNS = 200_000, 4_000  # 3.2 GB as float32
ROUNDS = 240  # of trees of maximum depth


def measure(repetitions):
    """Yield the figures."""
    with tempfile.TemporaryDirectory() as folder:
        few = harness.write_images(Path(folder, "few"), 1000, 224)
        many = harness.write_images(Path(folder, "many"), 3000, 224)
        extra = 2000 * 224 * 224 * 3 / 1e6
        for framework in harness.FRAMEWORKS:

            def run(*words, framework=framework):
                return harness.run_json("memory", framework, *words)

            turns = harness.take_turns(
                repetitions, saved=lambda: run("large", "saved"), unsaved=lambda: run("large", "unsaved")
            )
            size = turns["saved"][0]["state"]
            saved, unsaved = (statistics.median(seen["peak"] for seen in turns[name]) for name in turns)
            raw = f"{saved:.0f} and {unsaved:.0f} MB; the state has {size:.0f} MB"
            yield harness.Figure(f"{framework}: copies of the state", (saved - unsaved) / size, "<= 1.1", raw)
            if framework == "xgboost":
                break
            turns = harness.take_turns(
                repetitions,
                many=lambda: run("tiny", "unsaved", many),
                few=lambda: run("tiny", "unsaved", few),
            )
            large, small = (statistics.median(seen["peak"] for seen in turns[name]) for name in turns)
            raw = f"{large:.0f} MB with {extra:.0f} MB of images more than {small:.0f} MB"
            yield harness.Figure(f"{framework}: copies of the images", (large - small) / extra, "<= 1.1", raw)
        yield _external_memory(Path(folder))


def _external_memory(folder):
    """Return the size of the table relative to the memory with which XGBoost trains on it."""
    _write_digits(folder / "table")
    size = ROWS * COLUMNS * 4
    # RLIMIT_DATA includes reserved memory: PyArrow's allocator reserves a gigabyte at once, the C library
    # 64 MB per thread.
    environment = {"TMPDIR": str(folder), "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "1000000", "MALLOC_MMAP_THRESHOLD_": "100000"}
    try:
        words = ["xgboost", "table", "unsaved", folder / "table", size // 4]
        seen = harness.run_json("memory", *words, env=environment)
        value, ended = (
            size / (size // 4),
            f"finished; at most {seen['peak']:.0f} MB resident, files among them",
        )
    except RuntimeError as error:
        value, ended = 0, f"ended with {str(error).strip().splitlines()[-1][:100]}"
    raw = f"{ended}; {ROWS:,} x {COLUMNS:,} float32, {size / 1e6:.0f} MB, allowed {size / 4e6:.0f} MB"
    return harness.Figure("xgboost: table / allowed memory", value, ">= 4", raw)


def _write_digits(folder):
    """Write a CSV table of one-digit numbers in small parts, which takes no memory in this process."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    with open(folder / "table.csv", "wb") as file:
        for _ in range(ROWS // 1000):
            text = np.full((1000, 2 * COLUMNS + 2), ord(","), np.uint8)
            text[:, ::2] = ord("0") + generator.integers(0, 10, (1000, COLUMNS + 1))
            text[:, 0] = ord("0") + (text[:, 2] > ord("4"))
            text[:, -1] = ord("\n")
            file.write(text)


def main(framework, what, saved, data=None, allowed=None):
    """Train, and return the peak and the size of the state in MB."""
    if allowed:
        resource.setrlimit(resource.RLIMIT_DATA, (int(allowed),) * 2)
    script = harness.import_script(framework)
    if what == "table":
        flags = ["--train", data, "--external-memory", "--num-round", "2", "--max-bin", "16"]
    elif framework == "xgboost":
        flags = [*models.deep_trees("deep", ROUNDS), "--checkpoint-steps", str(ROUNDS // 3)]
    else:
        large = what == "large"
        build = (
            models.large_model(framework, script, depth=9) if large else models.tiny_model(framework, script)
        )
        script.build_model = build
        flags = ["--epochs", "3" if large else "1", "--log-steps", "0", "--learning-rate", "1e-6"]
        flags += ["--train", data, "--batch-size", "50"] if data else ["--batch-size", "256"]
    if saved == "unsaved":
        Run.save = lambda run: None
    script.export_model = lambda *_: None
    args = script.parse_args(flags)
    script.main(args)
    size = max((path.stat().st_size for path in args.checkpoint_path.iterdir()), default=0) / 1e6
    return {"peak": harness.peak_memory(), "state": size}


if __name__ == "__main__":
    harness.print_json(main)
