"""Verify that a training script resumes exactly: train once without and once with interruptions.

    python -m verify my-job/train.py
    python -m verify my-job/train.py --interruptions 10 --signal KILL -- --epochs 4 --augment
    python -m verify my-job/train.py --at 1,57 -- --train photos

The flags after `--` are passed to the script; choose a training of about a minute. For each step, both
trainings record checksums of the batch and of the training state: weights, optimizer and everything else in a
checkpoint. The first difference is reported with its position and the likely cause; the exit code is then 1.
"""

import argparse
import random
import signal
import sys
from pathlib import Path

from common import errors
from common.flags import integer
from verify.training import Training, chosen_moments, random_moments
from verify.verdict import find_difference

OUTPUT_FLAGS = ("--output", "--checkpoint-path", "--model-dir", "--output-data-dir")


def parse_args(argv=None):
    """Parse the flags; `script_flags` are the flags for the script."""
    argv = sys.argv[1:] if argv is None else argv
    description = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m verify", description=__doc__, formatter_class=description)
    add = parser.add_argument
    add("script", type=Path, help="such as my-job/train.py")
    add("--interruptions", type=integer(1), default=3, help="number of random interruptions (default: 3)")
    add("--at", type=steps, metavar="STEP,...", help="interrupt after these steps instead, counted from 1")
    add("--signal", choices=("TERM", "KILL"), help="signal of all interruptions (default: both, alternating)")
    add("--seed", type=integer(0), help="seed of the random moments (default: random)")
    output = Path("output/verify")
    add("--output", type=Path, default=output, help=f"folder of the two trainings (default: {output})")
    split = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:split])
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}; flags of the script follow --, such as: -- --epochs 2")
    args.script_flags = argv[split + 1 :]
    if not args.script.is_file():
        parser.error(f"there is no script {args.script}")
    for flag in args.script_flags:
        if flag.partition("=")[0].replace("_", "-") in OUTPUT_FLAGS:
            parser.error(f"{flag} after --: both trainings write below --output of this command")
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(10**6)
    return args


def steps(text):
    """Parse `3,57`."""
    return sorted(map(integer(1), text.split(",")))


def main(args):
    """Run both trainings and print the verdict; return the exit code."""
    print(f"Training without interruption (log: {args.output}/whole/log-1.txt)", flush=True)
    whole = Training(args, "whole")
    whole.run()
    if len(whole.steps()) < 2:
        raise errors.UserError("the training has fewer than two steps: choose flags for a longer one")
    moments = chosen_moments(args, whole) if args.at else random_moments(args, whole)
    print(f"Training with interruptions (log: {args.output}/interrupted/log-*.txt)", flush=True)
    interrupted = Training(args, "interrupted")
    has_ended = False
    for moment in moments:
        has_ended = interrupted.run(moment)
        if has_ended:
            break
        print(f"  {moment}", flush=True)
    if not has_ended:
        interrupted.run()
    return report(args, whole, interrupted)


def report(args, whole, interrupted):
    """Print the verdict; return the exit code. Raise UserError if an interruption is missing."""
    difference = find_difference(whole, interrupted)
    warnings = {line: None for line in interrupted.log.splitlines() if line.startswith("Warning: ")}
    for warning in warnings:
        print(f"The script's log: {warning}")
    if difference:
        print(f"Not exact: the trainings differ {difference.what}")
        print(f"Likely cause: {difference.cause}")
        return 1
    num_interruptions = sum(code != 0 for _, code in interrupted.exits)
    expected = len(args.at) if args.at else args.interruptions
    if num_interruptions < expected:
        raise errors.UserError(
            f"only {num_interruptions} of {expected} interruptions: the training ended before the next one. "
            "Run this again, or choose flags for a longer training"
        )
    num_steps = len(whole.steps())
    num_repeated = len(interrupted.steps()) - num_steps
    print(
        f"Exact: {num_steps} steps, interruptions: {num_interruptions}, repeated steps: {num_repeated}; "
        f"the same batches, training state, history and model (--seed {args.seed})"
    )
    return 0


def end(number, frame):
    """Exit after a signal, so that the training is ended too."""
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    args = parse_args()
    try:
        sys.exit(main(args))
    except (errors.UserError, OSError) as error:
        errors.fail(error)
