"""Scaling on one machine: two processes on two cores against one process on two cores.

    python benchmarks/scaling.py --framework pytorch --repetitions 5

Three variants alternate, so that noise affects all alike: one process with two threads; two workers with one
thread each that train one model, with the same global batch size; and two independent processes with one
thread each and half the batch size. The difference between the last two is the share of the communication.
A run counts with the rate of its last epoch (XGBoost: the median of its rounds); the table has medians, and
medians of ratios.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ["127.0.0.1", "127.0.0.2"]


def start(framework, flags, threads, **variables):
    """Start a training in an empty folder; return the process and the folder."""
    folder = tempfile.TemporaryDirectory()
    names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
    env = {**os.environ, **dict.fromkeys(names, str(threads)), "SM_NETWORK_INTERFACE_NAME": "lo", **variables}
    command = [sys.executable, str(ROOT / framework / "train.py"), *flags]
    process = subprocess.Popen(command, cwd=folder.name, env=env, stdout=subprocess.PIPE, text=True)
    return process, folder


def rates(processes):
    """Wait for the processes; return the samples per second of each one that logs them."""
    figures = []
    for process, folder in processes:
        found = [float(rate) for rate in re.findall(r" samples_per_second=(\d+)", process.communicate()[0])]
        folder.cleanup()
        if process.returncode != 0:
            sys.exit(f"error: a training ended with exit code {process.returncode}")
        if found:
            figures.append(found[-1] if len(found) < 10 else statistics.median(found))
    return figures


def measure(framework, flags, batch_size):
    """Return the samples per second of one process, two workers, and two independent processes."""

    def batch(size):
        return [] if framework == "xgboost" else ["--batch-size", str(size)]

    one = rates([start(framework, [*flags, *batch(batch_size)], threads=2)])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = [*flags, *batch(batch_size), "--port", str(port)]
    two = [start(framework, shared, 1, SM_HOSTS=json.dumps(HOSTS), SM_CURRENT_HOST=host) for host in HOSTS]
    workers = rates(two)
    apart = rates([start(framework, [*flags, *batch(batch_size // 2)], threads=1) for _ in HOSTS])
    # Each independent booster trains on all rows, each worker on half of them.
    return sum(one), sum(workers), sum(apart)


def make_data(folder):
    """Write images of 32x32x3 and a table of 60 columns, and return their flags."""
    generator = np.random.default_rng(0)
    images, table = Path(folder, "images"), Path(folder, "table")
    images.mkdir()
    table.mkdir()
    pixels = generator.integers(0, 256, (3000, 32, 32, 3)).astype(np.uint8)
    np.savez(images / "images.npz", x=pixels, y=generator.integers(0, 10, 3000))
    rows = generator.normal(size=(100_000, 60)).round(3)
    labels = (rows[:, :10].sum(1) + generator.normal(size=len(rows)) > 0).astype(int)
    np.savetxt(table / "table.csv", np.column_stack([labels, rows]), fmt="%g", delimiter=",")
    return ["--train", str(images)], ["--train", str(table)]


def main():
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--framework", choices=("pytorch", "tensorflow", "mxnet", "xgboost"), action="append")
    args = parser.parse_args()
    columns = ["Script", "Data", "One process", "Two workers", "Two independent"]
    print(f"| {' | '.join([*columns, 'Two workers / one process', 'Communication'])} |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        images, table = make_data(folder)
        for framework in args.framework or ("pytorch", "tensorflow", "mxnet", "xgboost"):
            if framework == "xgboost":
                jobs = {"100,000 x 60": ["--epochs", "30", "--checkpoint-steps", "1000", *table]}
            else:
                flags = ["--epochs", "3", "--checkpoint-seconds", "0"]
                jobs = {"8x8x1": flags, "32x32x3": [*flags, *images]}
            for name, flags in jobs.items():
                runs = [measure(framework, flags, batch_size=128) for _ in range(args.repetitions)]
                one, workers, apart = map(statistics.median, zip(*runs))
                ratio = statistics.median(run[1] / run[0] for run in runs)
                share = statistics.median(1 - run[1] / run[2] for run in runs)
                figures = f"{one:.0f} | {workers:.0f} | {apart:.0f} | {ratio:.2f} | {share:.0%}"
                print(f"| {framework} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
