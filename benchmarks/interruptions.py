"""What SIGKILLs at random moments cost inside a long epoch, with the default saves and with one every 300 s.

`pytorch/train.py` trains the default network, and others with a training state of about 100 MB and 1 GB, and
is killed 10 to 50 seconds after its first step (with 1 GB: 60 to 240), again and again; each start continues
from the newest checkpoint. The lost seconds are those between the step in the newest checkpoint and the last
step in the log. With a save every 300 seconds there is none in such a time, and all of it is lost. The
overhead is the time for which a save stops the training, as the log reports it, divided by the time between
two saves.
"""

import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import harness, models
from common.checkpoints import find_checkpoints

# Size of the state: dense layers (0: the default network), kills for each repetition, and when in seconds
SIZES = {"0.8 MB": (0, 4, 10, 50), "100 MB": (3, 4, 10, 50), "1 GB": (30, 2, 60, 240)}


def measure(repetitions):
    """Yield the figures."""
    for size, (depth, kills, *limits) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            data = harness.write_images(Path(folder, "images"), 50_000)
            flags = ["--train", data, "--batch-size", 8, "--output", Path(folder, "output"), "--log-steps", 1]
            output = Path(folder, "output")
            runs = [_kill(depth, flags, output, limits) for _ in range(kills * repetitions)]
        lost = [run["lost"] for run in runs]
        trained = statistics.mean(run["trained"] for run in runs)
        detail = f"{len(lost)} kills; at most {max(lost):.1f} s; with a save every 300 s: {trained:.1f} s"
        yield harness.Figure(f"{size}: seconds lost at a SIGKILL", statistics.mean(lost), "", detail)
        costs = [run["cost"] for run in runs if run["cost"]]
        if costs:
            interval, stall, megabytes = (statistics.median(values) for values in zip(*costs))
            detail = (
                f"a save of {megabytes:.1f} MB stops the training for {stall:.1f} ms every {interval:.0f} s"
            )
            yield harness.Figure(f"{size}: share of the time", stall / 1000 / interval, "<= 0.01", detail)


def _kill(depth, flags, output, limits):
    """Start or resume a training, kill it between these seconds; return the seconds trained and lost."""
    command = [sys.executable, "-m", "benchmarks.interruptions", str(depth), *map(str, flags)]
    times = {}  # when each step ended
    cost = deadline = None
    with subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := re.match(r"step=(\d+)/", line):
                times[int(found[1])] = time.monotonic()
                deadline = deadline or time.monotonic() + random.uniform(*limits)  # noqa: S311
            if found := re.match(
                r"Saving every (\d+) seconds: .* for ([\d.]+) ms and writes ([\d.]+) MB", line
            ):
                cost = [float(number) for number in found.groups()]
            if deadline and time.monotonic() > deadline:
                process.kill()
                break
    first, last = min(times), max(times)
    found = find_checkpoints(output / "checkpoints", "checkpoint-{}.pt")
    saved = max(found[0][0][1] if found else 0, first)
    return {
        "trained": times[last] - times[first],
        "lost": times[last] - times.get(saved, times[first]),
        "cost": cost,
    }


def train(depth, flags):
    """Train in this process."""
    script = harness.import_script("pytorch")
    if depth:
        script.build_model = models.large_model("pytorch", script, depth=depth)
    script.main(script.parse_args(flags))


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2:])
