"""Generated data and training processes for `gpu.py`."""

import csv
import os
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

from benchmarks import harness


class Workload(NamedTuple):
    """A network of `pytorch/train.py` with the size of its generated data set."""

    network: str
    image_size: int
    batch_size: int
    precision: str
    steps_per_epoch: int
    epochs: int

    def __str__(self):
        return f"{self.network} {self.image_size} x {self.image_size} {self.precision}"

    def write(self, folder, device):
        """Write the images and return the flags of the script."""
        write_images(folder / "train", self.steps_per_epoch * self.batch_size, self.image_size)
        write_images(folder / "validation", self.batch_size, self.image_size)
        flags = ["--train", folder / "train", "--validation", folder / "validation"]
        flags += ["--model", self.network, "--batch-size", self.batch_size, "--epochs", self.epochs]
        flags += ["--precision", self.precision, "--device", device]
        return [*flags, "--checkpoint-seconds", 0]


class Training:
    """A process of a training script that writes checkpoints, model and metrics below `folder`."""

    def __init__(self, framework, flags, folder, env):
        self.script = f"{framework}/train.py"
        self.last_line = "no output"
        command = [sys.executable, harness.ROOT / self.script, *flags]
        command += ["--checkpoint-path", folder / "checkpoints", "--model-dir", folder / "model"]
        command += ["--output-data-dir", folder / "data"]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def wait_for(self, beginning):
        """Return the seconds from the start of the process to its next line that starts with this text."""
        for line in self._lines():
            if line.startswith(beginning):
                return time.monotonic() - self.began
        raise RuntimeError(f"{self.script} ended before a line {beginning!r}: {self.last_line}")

    def finish(self, code=0):
        """Wait for the process to end; raise RuntimeError if its exit code is not the expected one."""
        for _ in self._lines():
            pass
        found = self.process.wait()
        if found != code:
            raise RuntimeError(f"{self.script}: exit code {found} instead of {code}: {self.last_line}")

    def _lines(self):
        for line in self.process.stdout:
            self.last_line = line.strip() or self.last_line
            yield line


def run_to_end(framework, flags, folder, env):
    """Run a training script to completion."""
    with Training(framework, flags, folder, env) as training:
        training.finish()


def history(folder, column):
    """Return a column of the `history.csv` of a training, epoch by epoch."""
    with open(folder / "data" / "history.csv") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def write_images(folder, count, size):
    """Write `count` colour images in ten classes as an .npz file: the higher the label, the brighter."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, count)
    labels[:10] = np.arange(10)  # each file contains all classes
    images = generator.integers(0, 128, (count, size, size, 3), dtype=np.uint8)
    images += (12 * labels).astype(np.uint8)[:, None, None, None]
    folder.mkdir(parents=True)
    np.savez(folder / "images.npz", x=images, y=labels)


def write_table(folder, rows, columns):
    """Write a Parquet table whose first column, the label, depends on the next five."""
    import pyarrow
    from pyarrow import parquet

    generator = np.random.default_rng(0)
    features = generator.normal(size=(columns, rows)).astype(np.float32)
    labels = features[:5].sum(0) + generator.normal(size=rows) > 0
    names = ["label", *(f"feature_{index}" for index in range(columns))]
    folder.mkdir(parents=True)
    table = pyarrow.table([labels.astype(np.float32), *features], names)
    parquet.write_table(table, folder / "table.parquet")


def compare_checkpoints(path, other):
    """Return the number of tensors in two checkpoints and the names of those that are not bit-identical."""
    import torch

    def read(path):
        return dict(named_tensors(torch.load(path, map_location="cpu", weights_only=True)))

    def named_tensors(state, name=""):
        if isinstance(state, torch.Tensor):
            yield name, state
        if isinstance(state, (list, tuple)):
            state = dict(enumerate(state))
        if isinstance(state, dict):
            for key, value in state.items():
                yield from named_tensors(value, f"{name}.{key}" if name else str(key))

    def is_identical(tensor, twin):
        if tensor is None or twin is None:
            return False
        if tensor.dtype != twin.dtype or tensor.shape != twin.shape:
            return False
        return torch.equal(as_bytes(tensor), as_bytes(twin))  # NaN equals NaN, 0.0 differs from -0.0

    def as_bytes(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    tensors = read(path)
    twins = read(other)
    names = list({**tensors, **twins})
    if not names:
        raise RuntimeError(f"{path} contains no tensors")
    different = [name for name in names if not is_identical(tensors.get(name), twins.get(name))]
    return len(names), different
