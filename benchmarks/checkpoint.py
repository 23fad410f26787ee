"""What a checkpoint costs the training, with the default model and with a training state of about 100 MB.

Stall: by how much the step with the save and the next one are longer than others while the disk is not written yet, so
that only the copy counts (TensorFlow makes it in the next step). It is divided by a bare memory copy of as many bytes,
and by a plain save: everything written and flushed before the next step. Overhead: by how much 40 steps with a save are
longer than 40 steps without, as a share of the ten seconds from one save to the next; a bare writer copies as many
bytes and writes and flushes them in a thread. All take turns in one process.
"""

import os
import statistics
import threading
import time

import numpy as np

from benchmarks import harness, models

BLOCK = 40  # steps
HOLD = 0.5  # seconds by which the writing is put off to see the copy alone


def measure(repetitions):
    """Return the figures."""
    figures = []
    for framework in harness.IMAGES:
        for model in ("cnn", "100 MB"):
            seen = harness.run_json("checkpoint", framework, model, repetitions)
            label, size = f"{framework}, {model}", f"{seen['bytes'] / 1e6:.1f} MB"
            stall, copy, plain = (1000 * seen[key] for key in ("stall", "copy", "plain"))
            ours, bare = seen["ours"] / 10, seen["bare"] / 10
            if model != "cnn":
                raw = f"{stall:.1f} ms; bare copy {copy:.1f} ms, plain save {plain:.0f} ms, {size}"
                figures.append(harness.Figure(f"{label}: stall / bare copy", stall / copy, "<= 1.5", raw))
                figures.append(harness.Figure(f"{label}: stall / plain save", stall / plain, "<= 0.1", raw))
            limit = f"<= {0.01 if model == 'cnn' else max(bare, 0) + 0.01:.3f}"
            raw = f"a save costs {1000 * seen['ours']:.0f} ms, a bare writer {1000 * seen['bare']:.0f} ms, {size}"
            figures.append(harness.Figure(f"{label}: overhead, every 10 s", ours, limit, raw))
    return figures


class Probe:
    """Stands in for `save_checkpoint` and `interruption.check` of a script, and does something else in each block."""

    KINDS = ("none", "ours", "held", "plain", "bare")

    def __init__(self, script, blocks):
        self.script, self.blocks = script, blocks
        self.save, self.run = script.save_checkpoint, script.saving._run
        self.starts, self.count, self.copies, self.num_bytes = [], 0, [], 0
        script.interruption.check = self.check
        script.save_checkpoint = self.save_checkpoint
        script.Progress.save_is_due = lambda progress, args, step: self.count % BLOCK == 6
        script.saving._run = self.write

    def check(self):
        """At the beginning of each step."""
        self.starts.append(time.perf_counter())
        self.count += 1
        if self.count > BLOCK * self.blocks:
            raise self.script.interruption.Interrupted

    def save_checkpoint(self, *arguments):
        kind = self.KINDS[self.count // BLOCK % len(self.KINDS)]
        if arguments[-1].step == 0:  # at the end of an epoch
            return
        if kind == "bare":
            self.copies.append(time.perf_counter())
            for target, source in zip(self.targets, self.sources):
                np.copyto(target, source)
            self.copies[-1] = time.perf_counter() - self.copies[-1]
            threading.Thread(target=self.write_bare).start()
        elif kind != "none":
            self.save(*arguments)
            if kind == "plain":
                self.script.saving.wait()

    def write(self, path, write, finish):
        """In the background."""
        if self.KINDS[self.count // BLOCK % len(self.KINDS)] == "held":
            time.sleep(HOLD)
        self.run(path, write, finish)
        if not self.num_bytes:
            self.num_bytes = next(iter(path.parent.iterdir())).stat().st_size
            self.sources = [np.ones(self.num_bytes // 24, np.float32) for _ in range(6)]
            self.targets = [np.ones_like(source) for source in self.sources]

    def write_bare(self):
        with open("bare", "wb") as file:
            for target in self.targets:
                file.write(target)
            file.flush()
            os.fsync(file.fileno())

    def result(self):
        """Return the medians over the blocks, in seconds; the first round of blocks warms everything up."""
        lengths = np.diff(self.starts)
        by_kind = {kind: [] for kind in self.KINDS}
        for block in range(len(self.KINDS), self.blocks):
            part = lengths[block * BLOCK : (block + 1) * BLOCK - 1]
            by_kind[self.KINDS[block % len(self.KINDS)]].append(part)
        saved = 5  # the number of the step in its block that the save follows

        def stall(kind):
            return statistics.median(part[saved : saved + 2].sum() - 2 * np.median(part) for part in by_kind[kind])

        def extra(kind):
            pairs = zip(by_kind[kind], by_kind["none"])
            return statistics.median(part.sum() - without.sum() for part, without in pairs)

        return {
            "bytes": self.num_bytes,
            "stall": stall("held"),
            "plain": stall("plain"),
            "copy": statistics.median(self.copies[1:]),
            "ours": extra("ours"),
            "bare": extra("bare"),
        }


def main(framework, model, repetitions):
    """Train, and return what was seen."""
    script = harness.import_script(framework)
    flags = ["--epochs", 1000, "--checkpoint-seconds", 0, "--log-steps", 0, "--learning-rate", 1e-6]
    if model == "cnn":
        flags += ["--train", harness.write_images("images", 4000)]
    else:
        flags += ["--batch-size", 8]
        script.build_model = models.large_model(framework, script)
    args = script.parse_args(list(map(str, flags)))
    probe = Probe(script, len(Probe.KINDS) * (1 + int(repetitions)))
    evaluate = {"loss": 0.0, "accuracy": 0.0}
    script.evaluate = lambda *_: evaluate
    try:
        script.main(args)
    except script.interruption.Interrupted:
        script.saving.wait()
    return probe.result()


if __name__ == "__main__":
    harness.print_json(main)
