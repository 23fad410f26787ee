"""Interrupt one training at random moments, again and again, and compare its bits with those of a run left alone.

    python tests/soak.py pytorch --signal KILL --workers 2 --interruptions 20

What must hold: the same bits in the exported model and in history.csv (but for times), no damaged checkpoint is ever
met, and after SIGTERM the exit code is 143 and not one step is trained twice. It prints a line of figures for each
combination, and fails where anything does not hold. Without a framework, signal or number of workers it runs them all;
that is `make soak`, and takes about three quarters of an hour on two cores.
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

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import FRAMEWORKS, start
from test_scripts import history, model_bytes

STEPS_PER_EPOCH = 405  # 1,618 digits in batches of four
JOBS = {  # trainings of 20 to 60 seconds with checkpoints so often that many interruptions hit one
    "pytorch": ["--epochs", 8, "--batch-size", 4, "--augment", "--checkpoint-steps", 9],
    "tensorflow": ["--epochs", 8, "--batch-size", 4, "--augment", "--checkpoint-steps", 40],
    "mxnet": ["--epochs", 8, "--batch-size", 4, "--augment", "--checkpoint-steps", 9],
    "xgboost": ["--epochs", 800, "--subsample", 0.7, "--colsample-bytree", 0.5, "--checkpoint-steps", 5],
}


def steps_done(framework, name):
    """Return the steps that the checkpoint `name` stands for."""
    epoch, step = (int(number or 0) for number in re.search(r"[-.](\d+)(?:-(\d+))?", name).groups())
    return epoch + 1 if framework == "xgboost" else epoch * STEPS_PER_EPOCH + step


def attempt(framework, flags, folder, seconds, number):
    """Start the training, interrupt it after so many seconds; return exit code, output, errors and seconds to exit."""
    with start(framework, *flags, cwd=folder) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
            return process.returncode, output, errors, 0.0
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            told = time.monotonic()
            output, errors = process.communicate(timeout=120)
            return process.returncode, output, errors, time.monotonic() - told


def soak(framework, number, interruptions, flags, generator, folder):
    """Return a line of figures; raise AssertionError where the promise does not hold."""
    whole = folder / "whole"
    whole.mkdir()
    began = time.monotonic()
    code, output, errors, _ = attempt(framework, flags, whole, None, number)
    assert code == 0, output + errors
    whole_seconds = time.monotonic() - began
    exits, trainings = [], 0
    while len(exits) < interruptions:
        trainings += 1
        parts = folder / f"parts-{trainings}"
        parts.mkdir()
        done, code, epochs = 0, None, []
        while code != 0:
            wait = generator.uniform(0.2, 0.35 * whole_seconds) if len(exits) < interruptions else None
            code, output, errors, seconds = attempt(framework, flags, parts, wait, number)
            assert "Traceback" not in errors, errors
            assert "Cannot read" not in output, output
            epochs += [int(epoch) for epoch in re.findall(r"^epoch=(\d+) ", output, re.MULTILINE)]
            if code != 0:
                exits.append(seconds)
            if number == signal.SIGTERM:
                done = check_that_no_step_is_lost(framework, code, output, done)
            elif code != 0:
                assert code == -number, errors
        assert history(parts, framework) == history(whole, framework)
        assert model_bytes(parts, framework) == model_bytes(whole, framework)
        if number == signal.SIGTERM:  # a SIGKILL between log line and checkpoint repeats the line
            assert epochs == list(range(1, epochs[-1] + 1)), epochs
    name = f"{framework} {' '.join(map(str, flags[-2:]))} {signal.Signals(number).name}"
    seconds = f"slowest exit {max(exits):.1f} s, " if number == signal.SIGTERM else ""
    return f"{name}: {len(exits)} interruptions in {trainings} trainings, {seconds}always the same bits"


def check_that_no_step_is_lost(framework, code, output, done):
    """Return the steps trained after a run that began after `done` steps, from what it says itself."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=FRAMEWORKS, nargs="?")
    parser.add_argument("--signal", choices=("TERM", "KILL"))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--interruptions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the moments")
    args, more_flags = parser.parse_known_args()  # the rest is for the script
    for framework in [args.framework] if args.framework else FRAMEWORKS:
        counts = [2, 0] if args.workers is None else [args.workers]
        workers = [[]] if framework == "xgboost" else [["--workers", count] for count in counts]
        for name, flags in itertools.product([args.signal] if args.signal else ["TERM", "KILL"], workers):
            generator = random.Random(args.seed)  # noqa: S311 - not for secrets
            with tempfile.TemporaryDirectory() as folder:
                flags = [*JOBS[framework], *more_flags, *flags]
                number = signal.Signals[f"SIG{name}"]
                figures = soak(framework, number, args.interruptions, flags, generator, Path(folder))
            print(f"{figures} (--seed {args.seed})", flush=True)


if __name__ == "__main__":
    main()
