"""A recorded training, in one process or in several consecutive ones."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError

TRACE = Path(__file__).with_name("trace.py")
POLL_SECONDS = 0.002
FIRST = (0, 0)  # a position that every step has reached


class Record(NamedTuple):
    """The record of a step, a boosting round, a finished epoch, or a restored state.

    Attributes:
        run: the number of the process, counted from 1.
        position: (finished epochs, finished steps of the current epoch).
        kind: "restored", "step" or "epoch"; a boosting round is an epoch.
        facts: checksums; `facts["state"]` has the checksum of each part of the checkpoint.
    """

    run: int
    position: tuple
    kind: str
    facts: dict

    @property
    def name(self):
        """The position in words."""
        epoch, step = self.position
        return f"epoch {epoch + 1}, step {step}" if step else f"the end of epoch {epoch}"


class Moment(NamedTuple):
    """The time and the signal of an interruption.

    Attributes:
        signal: the signal's number.
        position: the step, or None for an interruption before the first step.
        seconds: the delay after the step, or the maximum delay after the start of the process.
    """

    signal: int
    position: tuple
    seconds: float

    def __str__(self):
        name = signal.Signals(self.signal).name
        if self.position is None:
            return f"{name} before the first step"
        return f"{name} sent after {Record(0, self.position, '', {}).name}"


class Training:
    """A training in a separate folder.

    Attributes:
        records: the records of all processes, in order.
        log: the output of all processes.
        exits: for each process (Moment or None, exit code).
    """

    def __init__(self, args, name):
        self.args = args
        self.folder = args.output / name
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self.trace = self.folder / "trace.jsonl"
        self.trace.touch()
        self.records = []
        self.log = ""
        self.exits = []
        self._num_bytes = 0

    def run(self, moment=None):
        """Run the script to its end or to the Moment; return whether it finished.

        Raise UserError if it fails.
        """
        command = [sys.executable, TRACE, self.trace, self.args.script.absolute(), *self.args.script_flags]
        command += ["--output", self.folder]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SM_", "SAGEMAKER_"))
        }
        path = self.folder / f"log-{len(self.exits) + 1}.txt"
        with open(path, "w") as log:
            process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
            try:
                if moment:
                    self._interrupt(process, moment)
                code = process.wait()
            finally:
                process.kill()
                process.wait()
        self._read()
        self.exits.append((moment, code))
        self.log += path.read_text()
        expected = [0]
        if moment:
            expected += [-moment.signal, 128 + moment.signal]
        if code not in expected:
            reason = path.read_text().strip().rpartition("\n")[2]
            raise UserError(f"{self.args.script} failed with exit code {code}, see {path}: {reason}")
        return code == 0

    def steps(self):
        """Return the positions of the steps, or of the boosting rounds, in order."""
        steps = [record.position for record in self.records if record.kind == "step"]
        return steps or [record.position for record in self.records if record.kind == "epoch"]

    def seconds(self):
        """Return the seconds from the start to the first step, and the average seconds per step."""
        times = [record.facts["seconds"] for record in self.records if record.kind != "restored"]
        return times[0], (times[-1] - times[0]) / len(times)

    def _interrupt(self, process, moment):
        """Send the signal at the moment, unless the process ends earlier."""
        latest = time.monotonic() + moment.seconds if moment.position is None else math.inf
        position = moment.position or FIRST
        while time.monotonic() < latest and not self._has_reached(position):
            if process.poll() is not None:
                return
            time.sleep(POLL_SECONDS)
        if moment.position:
            time.sleep(moment.seconds)
        process.send_signal(moment.signal)

    def _has_reached(self, position):
        """Return whether the current process has recorded this step or a later one."""
        new = self._read()
        return any(record.kind != "restored" and record.position >= position for record in new)

    def _read(self):
        """Read and return the records since the last call."""
        with open(self.trace, "rb") as file:
            file.seek(self._num_bytes)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]  # the last line may be incomplete
        self._num_bytes += len(content)
        new = []
        for line in content.splitlines():
            facts = json.loads(line)
            position = facts.pop("epoch"), facts.pop("step")
            new.append(Record(len(self.exits) + 1, position, facts.pop("kind"), facts))
        self.records += new
        return new


def random_moments(args, whole):
    """Return `--interruptions` Moments for a recorded training: one in five is before the first step."""
    generator = random.Random(args.seed)  # noqa: S311 - not for secrets
    steps = whole.steps()
    steps = steps[: max(1, len(steps) * 9 // 10)]  # the signal must come before the end
    seconds_to_start, seconds_per_step = whole.seconds()
    moments = []
    for position in sorted(generator.choice(steps) for _ in range(args.interruptions)):
        if generator.random() < 0.2:
            moments.append((None, generator.uniform(0, seconds_to_start)))
        else:
            moments.append((position, generator.uniform(0, 1.5 * seconds_per_step)))
    numbers = signals(args)
    first = generator.randrange(2)
    return [Moment(numbers[(first + index) % len(numbers)], *moment) for index, moment in enumerate(moments)]


def chosen_moments(args, whole):
    """Return the Moments of `--at`. Raise UserError for a step that the training does not have."""
    steps = whole.steps()
    if args.at[-1] >= len(steps):
        raise UserError(f"--at {args.at[-1]}: the training has {len(steps)} steps; expected an earlier step")
    numbers = signals(args)
    return [Moment(numbers[index % len(numbers)], steps[step - 1], 0.0) for index, step in enumerate(args.at)]


def signals(args):
    """Return the signals, which alternate."""
    numbers = {"TERM": [signal.SIGTERM], "KILL": [signal.SIGKILL]}
    return numbers.get(args.signal, [signal.SIGTERM, signal.SIGKILL])
