"""Cost of bit-identical resuming: samples per second of each script with and without it.

    python benchmarks/exactness.py --framework mxnet --repetitions 5

"Without" is a copy of the script that lacks the lines below, run with `--no-deterministic`. The runs
alternate, so that noise affects both alike. A run counts with the rate of its last epoch (XGBoost: the median
of its rounds). The table has the medians of the runs, and the median of the ratios of adjacent runs.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ONLY_FOR_EXACTNESS = {  # file, text to replace, replacement
    "pytorch": ("engine.py", "torch.default_generator.manual_seed(batch.seed)", "pass"),
    "tensorflow": None,  # its checkpoints contain the RNG state
    "mxnet": (
        "engine.py",
        "                mx.random.seed(batch.seed)\n            elif",
        "                pass\n            elif",
    ),
    "xgboost": ("engine.py", ', "seed_per_iteration": True', ""),
}
FLAGS = ["--epochs", "3", "--checkpoint-seconds", "0"]
TREES = ["--epochs", "60", "--subsample", "0.7", "--checkpoint-steps", "1000"]


def copy_without(framework, folder):
    """Copy the framework's folder without the lines for exactness; return the script."""
    copy = Path(folder, framework)
    shutil.copytree(ROOT / framework, copy)
    if ONLY_FOR_EXACTNESS[framework] is None:
        return copy / "train.py"
    name, old, new = ONLY_FOR_EXACTNESS[framework]
    text = (copy / name).read_text()
    if text.count(old) != 1:
        sys.exit(f"error: {framework}/{name} has changed: adapt ONLY_FOR_EXACTNESS in {__file__}")
    (copy / name).write_text(text.replace(old, new))
    return copy / "train.py"


def samples_per_second(script, flags):
    """Train in a new process and folder; return the rate of the last epoch (XGBoost: of all rounds)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), *flags]
        output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    rates = [float(rate) for rate in re.findall(r" samples_per_second=(\d+)", output)]
    return rates[-1] if len(rates) < 10 else statistics.median(rates)


def main():
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--framework", choices=ONLY_FOR_EXACTNESS, action="append")
    args = parser.parse_args()
    print(
        "| Script | Images | With, samples/s | Without, samples/s | With / without |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (6000, 32, 32, 3)).astype(np.uint8)
        images = Path(folder, "images")
        images.mkdir()
        np.savez(images / "images.npz", x=pixels, y=generator.integers(0, 10, 6000))
        for framework in args.framework or ONLY_FOR_EXACTNESS:
            exact_script, loose_script = ROOT / framework / "train.py", copy_without(framework, folder)
            loosely = [] if framework == "xgboost" else ["--no-deterministic"]
            for name, data in (("digits", []), ("32x32x3", ["--train", str(images)])):
                if framework == "xgboost" and data:
                    continue
                flags = (TREES if framework == "xgboost" else FLAGS) + data
                pairs = [
                    (
                        samples_per_second(exact_script, flags),
                        samples_per_second(loose_script, flags + loosely),
                    )
                    for _ in range(args.repetitions)
                ]
                exact, loose = map(statistics.median, zip(*pairs))
                ratio = statistics.median(a / b for a, b in pairs)
                print(f"| {framework} | {name} | {exact:.0f} | {loose:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
