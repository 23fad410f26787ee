"""Measure the PyTorch and XGBoost scripts on a GPU: speed, checkpoints, bit-identical resuming.

    python -m benchmarks.gpu                        all parts, each under four minutes on an H100
    python -m benchmarks.gpu step exactness         selected parts
    python -m benchmarks.gpu --tiny --device cpu    a trial of all parts in a minute; writes no results

The scripts run as processes with flags; the benchmark reads only their log lines and files. The data are
generated. The parts need PyTorch, torchvision, XGBoost, NumPy and PyArrow. The figures of a part are written
to `benchmarks/results/gpu.json` and then to the table in `benchmarks/results/README.md`. If a figure cannot
be measured, a line gives the reason, the other figures are still measured, and the exit code is 1.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import gpu_parts, harness

PARTS = {
    "step": gpu_parts.step,
    "checkpoint": gpu_parts.checkpoint,
    "exactness": gpu_parts.exactness,
    "xgboost": gpu_parts.xgboost,
}
SECONDS = 220  # of a part; a repetition starts only if it can end in time


def parse_args(argv=None):
    """Parse the flags."""
    names = ", ".join(PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"some of {names}; default: all")
    add("--tiny", action="store_true", help="small networks and tables, to test the benchmark itself")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU")
    add("--repetitions", type=int, default=3, help="maximum; fewer if a part would take over four minutes")
    add("--seed", type=int, help="seed of the random interruptions; default: random")
    add("--commit", help="the measured commit; default: git's HEAD")
    add("--output", type=Path, help="JSON file to write instead of results/gpu.json and its table")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(unknown)}; expected one or more of {names}")
    if args.repetitions < 1:
        parser.error(f"--repetitions {args.repetitions}: expected 1 or more")
    if args.device == "auto":
        if harness.machine()["GPU"] == "none":
            parser.error("no GPU found; to test the benchmark on CPUs use --tiny --device cpu")
        args.device = "cuda"
    if args.tiny:
        args.repetitions = 1
    if args.seed is None:
        args.seed = int.from_bytes(os.urandom(2), "big")
    return args


def measure(part, run):
    """Measure and print the figures of a part; return them, and the failures with their reasons."""
    figures = []
    failures = []

    def attempt(label, function):
        try:
            return function()
        except Exception as error:  # continue with the other figures and parts
            failures.append((label, reason(error)))
            print(f"  {label}: not measured: {reason(error)}", flush=True)
            return None

    measurements = PARTS[part](run)
    while measurement := attempt(part, lambda: next(measurements, None)):
        for figure in attempt(*measurement) or []:
            figures.append(figure)
            print(f"  {figure.what}: {figure.value:.3g} ({figure.detail})", flush=True)
    return figures, failures


def reason(error):
    """Return the last line of an error's text."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def keep(path, part, content):
    """Write the content of a part to a JSON file and keep the other parts in the file."""
    parts = json.loads(path.read_text()) if path.exists() else {}
    parts[part] = content
    path.write_text(json.dumps(parts, indent=1) + "\n")


def main(argv=None):
    """Measure the parts; return the exit code, 1 if a figure is missing."""
    args = parse_args(argv)
    exit_code = 0
    for part in args.parts or PARTS:
        description = PARTS[part].__doc__
        print(f"{part}: {description.splitlines()[0]}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            run = gpu_parts.Run(
                device=args.device,
                tiny=args.tiny,
                repetitions=args.repetitions,
                seed=args.seed,
                deadline=began + SECONDS,
                folder=Path(folder),
            )
            figures, failures = measure(part, run)
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
        if failures:
            exit_code = 1
        content = harness.result(description, figures, args.repetitions, args.commit)
        content["failures"] = failures
        if args.output:
            keep(args.output, part, content)
        elif not args.tiny:
            keep(harness.RESULTS / "gpu.json", part, content)
            harness.write_report(harness.NAMES, draw=False)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
