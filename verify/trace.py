"""Run a training script and record the batch of each step and the training state after it.

    python verify/trace.py TRACE SCRIPT [FLAGS ...]

A line of JSON is appended to the file TRACE for the restored state, and for each step, round and epoch. They
contain only checksums. The training runs in this process, which receives the signals and has its exit code.
"""

import json
import random
import runpy
import sys
import time
import zlib
from pathlib import Path

began = time.monotonic()
trace, script, *flags = sys.argv[1:]
sys.argv = [script, *flags]
sys.path[0] = str(Path(script).parent)  # as if the script were run directly: with its own `common`

import numpy as np  # noqa: E402

import common.run  # noqa: E402


class TracedRun(common.run.Run):
    """A Run that records batches and training states."""

    def __init__(self, args, engine):
        super().__init__(args, engine)
        self._file = open(trace, "a")  # noqa: SIM115 - until the process ends
        self._memory = {}
        self._batches = {}  # checksums by step
        self._validation = 0
        self._generators = {}

    def load_data(self, data_sets):
        """Also record the batches of a data set that yields batches."""
        data = super().load_data(data_sets)
        if hasattr(data.train, "batches"):
            load = data.train.batches
            data.train.batches = lambda epoch=0, first=0: self._record_batches(load(epoch, first), first)
        return data

    def restore(self, state):
        """Also record the restored state."""
        epoch = super().restore(state)
        if self.progress.epoch or self.progress.step:
            self._record("restored", self.progress.epoch, self.progress.step)
        return epoch

    def training_batches(self, epoch, augment=None):
        """Also record the batches."""
        return self._record_batches(super().training_batches(epoch, augment), self.progress.step)

    def validation_batches(self):
        """Also record the batches."""
        for batch in super().validation_batches():
            self._validation = checksum(batch[:3], self._validation)
            yield batch

    def finish_step(self, metrics, num_samples=None):
        """Also record the step."""
        if not self._is_validating:
            step = self.progress.step
            now = states()
            draws = [name for name, before in self._generators.items() if before != now[name]]
            batch = self._batches.pop(step, None)
            self._record("step", self.progress.epoch, step + 1, batch=batch, draws=draws)
        super().finish_step(metrics, num_samples)

    def finish_epoch(self, metrics=None, validation_metrics=None):
        """Also record the epoch."""
        self._record("epoch", self.progress.epoch + 1, 0, validation=self._validation)
        self._validation = 0
        return super().finish_epoch(metrics, validation_metrics)

    def finish_round(self, metrics, validation_metrics, samples):
        """Also record the round."""
        self._record("epoch", self.progress.epoch + 1, 0)
        return super().finish_round(metrics, validation_metrics, samples)

    def _record_batches(self, batches, first_step):
        for step, batch in enumerate(batches, first_step):
            self._batches[step] = checksum(batch[:3])
            self._generators = states() if self.args.loaders == 0 else {}
            yield batch

    def _record(self, kind, epoch, step, **facts):
        """Append a line and flush it, so that it survives SIGKILL."""
        seconds = time.monotonic() - began
        line = {"kind": kind, "epoch": epoch, "step": step, "seconds": seconds, **facts}
        self._file.write(json.dumps({**line, "state": self._state_checksums()}) + "\n")
        self._file.flush()

    def _state_checksums(self):
        """Return a checksum for each part of a checkpoint of the current state."""
        content = self.engine.copy_to_host(self.state.state_dict(), self._memory)
        if isinstance(content, (bytes, bytearray)):
            return {"booster": zlib.crc32(content)}
        arrays = {}
        if isinstance(content, tuple):  # (arrays by name, everything else)
            arrays, content = content[:2]
        checksums = {}
        for name, value in [*content.items(), *arrays.items()]:
            part = name.split("/")[0] if name in content or "/" in name else "model"  # MXNet's weights
            checksums[part] = checksum(value, checksums.get(part, 0))
        return checksums


def states():
    """Return checksums of the process-wide random generators, by name."""
    return {"numpy.random": checksum(np.random.get_state()), "random": checksum(random.getstate())}


def checksum(value, start=0):
    """Return the CRC-32 of arrays and plain values in dictionaries, lists and tuples."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value, key=str)]
    if isinstance(value, (list, tuple)):
        for part in value:
            start = checksum(part, start)
        return zlib.crc32(f"{len(value)}".encode(), start)
    if hasattr(value, "__array__"):
        return zlib.crc32(np.ascontiguousarray(as_array(value)), start)
    return zlib.crc32(repr(value).encode(), start)


def as_array(value):
    """Return a tensor as a NumPy array; bfloat16, which NumPy does not have, as float32."""
    try:
        return np.asarray(value)
    except TypeError:
        return np.asarray(value.float())


if __name__ == "__main__":
    common.run.Run = TracedRun
    runpy.run_path(script, run_name="__main__")
