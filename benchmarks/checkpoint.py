"""Cost of a checkpoint with the default model and with a training state of about 100 MB.

Stall: the extra time of the step with the save and of the next step. The write is delayed, so that only the
copy counts (TensorFlow copies in the next step). The stall is divided by the time of a bare memory copy of
the same size, and by that of a plain save, which writes and flushes everything before the next step.
Overhead: the most that a save can take from the training, as a share of the save interval of ten seconds. It
is the stall and the processor time of the save thread. The extra time of 40 steps with a save over 40 steps
without is given beside it, because the wall clock of a shared machine cannot resolve so little. A bare writer
copies the same number of bytes, and writes and flushes them in a thread, to a new file that replaces the one
before, as a checkpoint must: to overwrite a file is faster, because the machine already has memory for it.
The variants alternate in one process.
"""

import os
import statistics
import threading
import time

import numpy as np

from benchmarks import harness, models
from common.checkpoints import Checkpoints
from common.run import Run

BLOCK = 40  # steps
SAVED = 6  # the step of a block that is followed by the save, counted from 0
INTERVAL = 10_000  # milliseconds between two saves
HOLD = 0.5  # seconds by which the write is delayed, to measure only the copy


def measure(repetitions):
    """Return the figures."""
    figures = []
    for framework in harness.IMAGES:
        for model in ("cnn", "100 MB"):
            seen = harness.run_json("checkpoint", framework, model, repetitions)
            label, size = f"{framework}, {model}", f"{seen['bytes'] / 1e6:.1f} MB"
            stall, copy, plain = (1000 * seen[key] for key in ("stall", "copy", "plain"))
            written, bare = 1000 * seen["write"], 1000 * seen["bare_write"]
            if model != "cnn":
                raw = f"{stall:.1f} ms; bare copy {copy:.1f} ms, plain save {plain:.0f} ms, {size}"
                figures.append(harness.Figure(f"{label}: stall / bare copy", stall / copy, "<= 1.5", raw))
                figures.append(harness.Figure(f"{label}: stall / plain save", stall / plain, "<= 0.1", raw))
            limit = f"<= {0.01 if model == 'cnn' else (copy + bare) / INTERVAL + 0.01:.3f}"
            raw = f"stall {stall:.1f} and thread {written:.0f} ms; bare writer {copy:.1f} and {bare:.0f} ms; "
            raw += f"by the clock {1000 * seen['ours']:.0f} and {1000 * seen['bare']:.0f} ms; {size}"
            overhead = (stall + written) / INTERVAL
            figures.append(harness.Figure(f"{label}: overhead, every 10 s", overhead, limit, raw))
    return figures


class Probe:
    """Replace the saves of a training: each block of steps has one, and the kinds alternate.

    An epoch has one block of each kind. It ends after the last step of a block, which is not counted.
    """

    KINDS = ("none", "ours", "held", "plain", "bare")

    def __init__(self):
        self.save = Run.save
        self.finish_step = Run.finish_step
        self.write = Checkpoints.write
        self.count = 0  # finished steps
        self.ends = []  # of the steps
        self.copies = []  # seconds
        self.writes = {kind: [] for kind in self.KINDS}  # seconds of processor time of the thread that writes
        self.num_bytes = 0
        Run.save = lambda run: None  # at the end of an epoch
        Run.finish_step = lambda run, *arguments: self.after_step(run, arguments)
        Checkpoints.write = lambda *arguments: self.write_in_background(*arguments)

    def kind(self):
        """Return the kind of the current block."""
        return self.KINDS[self.count // BLOCK % len(self.KINDS)]

    def after_step(self, run, arguments):
        """Finish a step, and save if a save is due."""
        step = run.progress.step
        self.finish_step(run, *arguments)
        if run.progress.step == step:  # a validation step
            return
        if self.count % BLOCK == SAVED:
            self.save_as(self.kind(), run)
        self.count += 1
        self.ends.append(time.perf_counter())

    def save_as(self, kind, run):
        """Save as in blocks of this kind."""
        if kind == "bare":
            began = time.perf_counter()
            for target, source in zip(self.targets, self.sources):
                np.copyto(target, source)
            self.copies.append(time.perf_counter() - began)
            threading.Thread(target=self.write_bare).start()
        elif kind != "none":
            self.save(run)
            if kind == "plain":
                run.saver.wait()

    def write_in_background(self, checkpoints, name, *more):
        """Write a checkpoint in the save thread."""
        kind = self.kind()
        if kind == "held":
            time.sleep(HOLD)
        began = time.thread_time()
        size = self.write(checkpoints, name, *more)
        self.writes[kind].append(time.thread_time() - began)
        if not self.num_bytes:
            self.num_bytes = size
            self.sources = [np.ones(self.num_bytes // 24, np.float32) for _ in range(6)]
            self.targets = [np.ones_like(source) for source in self.sources]
        return size

    def write_bare(self):
        """Write and flush the copies of the bare writer."""
        began = time.thread_time()
        with open("bare.new", "wb") as file:
            for target in self.targets:
                file.write(target)
            file.flush()
            os.fsync(file.fileno())
        os.replace("bare.new", "bare")
        self.writes["bare"].append(time.thread_time() - began)

    def result(self):
        """Return the medians over the blocks, in seconds, without the first block of each kind."""
        lengths = np.diff(self.ends, prepend=self.ends[0])
        by_kind = {kind: [] for kind in self.KINDS}
        for block, part in enumerate(np.split(lengths, len(lengths) // BLOCK)):
            if block >= len(self.KINDS):
                by_kind[self.KINDS[block % len(self.KINDS)]].append(part[1:])

        def stall(kind):
            return statistics.median(
                part[SAVED - 1 : SAVED + 1].sum() - 2 * np.median(part) for part in by_kind[kind]
            )

        def extra(kind):
            pairs = zip(by_kind[kind], by_kind["none"])
            return statistics.median(part.sum() - without.sum() for part, without in pairs)

        return {
            "bytes": self.num_bytes,
            "stall": stall("held"),
            "plain": stall("plain"),
            "copy": statistics.median(self.copies[1:]),
            "write": statistics.median(self.writes["ours"][1:]),
            "bare_write": statistics.median(self.writes["bare"][1:]),
            "ours": extra("ours"),
            "bare": extra("bare"),
        }


def main(framework, model, repetitions):
    """Train, and return the measurements."""
    script = harness.import_script(framework)
    batch_size = 64
    if model != "cnn":
        batch_size = 8
        script.build_model = models.large_model(framework, script)
    probe = Probe()
    steps_per_epoch = BLOCK * len(probe.KINDS)
    train = harness.write_images("train", steps_per_epoch * batch_size)
    validation = harness.write_images("validation", 10)
    flags = ["--train", train, "--validation", validation, "--batch-size", batch_size]
    flags += ["--epochs", 1 + int(repetitions), "--checkpoint-seconds", 0, "--log-steps", 0]
    script.main(script.parse_args([*map(str, flags), "--learning-rate", "1e-6"]))
    return probe.result()


if __name__ == "__main__":
    harness.print_json(main)
