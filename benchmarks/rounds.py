"""XGBoost: 2,000 boosting rounds with the default checkpoints, relative to one checkpoint at the end.

The time is that of the whole process. Then runs are killed at random moments: the lost time is measured from
the round of the newest checkpoint to the kill.
"""

import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import harness

ROUNDS = 2000
AT_THE_END = ["--checkpoint-steps", ROUNDS]


def measure(repetitions):
    """Return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        data = ["--train", harness.write_table(folder, 20_000, 20), "--num-round", ROUNDS]
        counts = []

        def seconds(*flags, cwd=None):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as cwd:
                harness.run_script("xgboost", *data, *flags, cwd=cwd)
                counts.append(len(list(Path(cwd, "output/xgboost/checkpoints").iterdir())))
            return time.monotonic() - began

        turns = harness.take_turns(repetitions, default=seconds, end=lambda: seconds(*AT_THE_END))
        raw = f"{min(turns['default']):.1f} to {max(turns['default']):.1f} s with {max(counts)} checkpoints, "
        raw += f"{min(turns['end']):.1f} to {max(turns['end']):.1f} s with one; 20,000 x 20, two classes"
        ratio = harness.ratio(turns["default"], turns["end"])
        figures = [harness.Figure(f"{ROUNDS} rounds: saved / not saved", ratio, "<= 1.1", raw)]
        whole = min(turns["default"])
        lost = [_lost(data, random.uniform(0.3, 0.95) * whole) for _ in range(repetitions)]  # noqa: S311
        raw = f"{len(lost)} kills: {', '.join(f'{seconds:.2f}' for seconds in lost)} s"
        return [*figures, harness.Figure("maximum seconds lost at SIGKILL", max(lost), "<= 2", raw)]


def _lost(data, after):
    """Start a run and kill it after `after` seconds; return the seconds of training that are lost."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(harness.ROOT / "xgboost/train.py"), *map(str, data)]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        deadline, ends = time.monotonic() + after, {0: time.monotonic()}
        for line in process.stdout:
            if found := re.match(r"epoch=(\d+) ", line):
                ends[int(found[1])] = time.monotonic()
            if time.monotonic() > deadline:
                process.kill()
                break
        killed = time.monotonic()
        process.wait()
        names = [path.name for path in Path(folder, "output/xgboost/checkpoints").iterdir()]
        finished = [
            int(name.split(".")[1]) + 1 for name in names if re.fullmatch(r"xgboost-checkpoint\.\d+", name)
        ]
        return killed - ends.get(max(finished, default=0), killed)
