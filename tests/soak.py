"""Interrupt one training at random moments, again and again, and compare its bits with an uninterrupted one.

    python tests/soak.py pytorch --signal KILL --loaders 2 --interruptions 20

It fails unless the exported model and history.csv (except times) have the same bits, no checkpoint was
damaged, and after SIGTERM the exit code was 143 and no step was trained twice. It prints a line of figures
for each combination. Without a framework, signal or number of loaders it runs them all; that is
`make integration`, and takes about three quarters of an hour on two cores.
"""

import argparse
import itertools
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import FRAMEWORKS, HAS_MXNET, NO_MXNET, assert_same_bits, start

STEPS_PER_EPOCH = 405  # 1,618 digits in batches of four
JOBS = {  # trainings of 20 to 60 seconds with checkpoints so often that many interruptions hit one
    "pytorch": ["--epochs", 8, "--batch-size", 4, "--augment", "--checkpoint-steps", 9],
    "tensorflow": ["--epochs", 8, "--batch-size", 4, "--augment", "--checkpoint-steps", 40],
    "mxnet": ["--epochs", 8, "--batch-size", 4, "--augment", "--checkpoint-steps", 9],
    "xgboost": ["--epochs", 800, "--subsample", 0.7, "--colsample-bytree", 0.5, "--checkpoint-steps", 5],
}


def steps_done(framework, name):
    """Return the steps that the checkpoint `name` stands for."""
    numbers = re.search(r"[-.](\d+)(?:-(\d+))?", name).groups()
    epoch, step = (int(number or 0) for number in numbers)
    return epoch + 1 if framework == "xgboost" else epoch * STEPS_PER_EPOCH + step


def attempt(framework, flags, folder, seconds, number):
    """Train, with a signal after `seconds`; return exit code, output, errors and the seconds to exit."""
    with start(framework, *flags, cwd=folder) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
            return process.returncode, output, errors, 0.0
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            began = time.monotonic()
            output, errors = process.communicate(timeout=120)
            return process.returncode, output, errors, time.monotonic() - began


class Soak:
    """The interruptions of one job by one signal."""

    def __init__(self, framework, flags, number, generator):
        self.framework = framework
        self.flags = flags
        self.number = number
        self.generator = generator
        self.exits = []

    def run(self, interruptions, folder):
        """Return a line of figures; raise AssertionError if the promise does not hold."""
        whole = folder / "whole"
        whole.mkdir()
        began = time.monotonic()
        code, output, errors, _ = attempt(self.framework, self.flags, whole, None, self.number)
        assert code == 0, output + errors
        longest_wait = 0.35 * (time.monotonic() - began)
        trainings = 0
        while len(self.exits) < interruptions:
            trainings += 1
            parts = folder / f"parts-{trainings}"
            parts.mkdir()
            self.train(parts, interruptions, longest_wait)
            assert_same_bits(parts, whole, self.framework)
        seconds = f"slowest exit {max(self.exits):.1f} s, " if self.number == signal.SIGTERM else ""
        name = f"{self.framework} {' '.join(map(str, self.flags[-2:]))} {signal.Signals(self.number).name}"
        return (
            f"{name}: {len(self.exits)} interruptions in {trainings} trainings, {seconds}always the same bits"
        )

    def train(self, folder, interruptions, longest_wait):
        """Train to the end, with interruptions as long as some are left."""
        done, code, epochs = 0, None, []
        while code != 0:
            wait = None
            if len(self.exits) < interruptions:
                wait = self.generator.uniform(0.2, longest_wait)
            code, output, errors, seconds = attempt(self.framework, self.flags, folder, wait, self.number)
            assert "Traceback" not in errors, errors
            assert "Cannot read" not in output, output
            epochs += [int(epoch) for epoch in re.findall(r"^epoch=(\d+) ", output, re.MULTILINE)]
            if code != 0:
                self.exits.append(seconds)
            if self.number == signal.SIGTERM:
                done = check_that_no_step_is_lost(self.framework, code, output, done)
            elif code != 0:
                assert code == -self.number, errors
        if self.number == signal.SIGTERM:  # a SIGKILL between log line and checkpoint repeats the line
            assert epochs == list(range(1, epochs[-1] + 1)), epochs


def check_that_no_step_is_lost(framework, code, output, done):
    """Return the steps trained after a run that began after `done` steps, from its log."""
    resumed = re.search(r"^Resuming training from (\S+)$", output, re.MULTILINE)
    if "Starting training" in output:
        assert (steps_done(framework, resumed[1]) if resumed else 0) == done, output
    if code == 0:
        return done
    if code == -signal.SIGTERM:  # Python had not started yet, or all was done and it was ending
        assert not output or "\nModel: " in output, output
        return done
    assert code == 143, (code, output)
    saved = re.search(r"^Interrupted: saved (\S+), run the same command to resume$", output, re.MULTILINE)
    assert saved or "Starting training" not in output or "\nModel: " in output, output
    return steps_done(framework, saved[1]) if saved else done


def main():
    """Parse the flags and print a line for each combination."""
    description = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=description)
    parser.add_argument("framework", choices=FRAMEWORKS, nargs="?")
    parser.add_argument("--signal", choices=("TERM", "KILL"))
    parser.add_argument("--loaders", type=int)
    parser.add_argument("--interruptions", type=int, default=20)
    seed = random.SystemRandom().randrange(10**6)
    parser.add_argument("--seed", type=int, default=seed, help="of the moments")
    args, more_flags = parser.parse_known_args()  # the rest is for the script
    frameworks = [args.framework] if args.framework else FRAMEWORKS
    names = [args.signal] if args.signal else ["TERM", "KILL"]
    counts = [2, 0] if args.loaders is None else [args.loaders]
    for framework, name in itertools.product(frameworks, names):
        if framework == "mxnet" and not HAS_MXNET:
            print(NO_MXNET)
            continue
        for count in [None] if framework == "xgboost" else counts:
            generator = random.Random(args.seed)  # noqa: S311 - not for secrets
            flags = [*JOBS[framework], *more_flags]
            if count is not None:
                flags += ["--loaders", count]
            with tempfile.TemporaryDirectory() as folder:
                soak = Soak(framework, flags, signal.Signals[f"SIG{name}"], generator)
                figures = soak.run(args.interruptions, Path(folder))
            print(f"{figures} (--seed {args.seed})", flush=True)


if __name__ == "__main__":
    main()
