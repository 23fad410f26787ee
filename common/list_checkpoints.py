"""List the checkpoints of a training: what is in them, whether they are intact, which one a restart takes.

    python -m common.list_checkpoints pytorch/train.py [FOLDER]

FOLDER is that of the checkpoints; default: where the script would look for them. Nothing in it changes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from common import errors, run
from common.atomic_io import TEMPORARY
from common.checkpoints import DAMAGED, Checkpoints, find_checkpoints
from common.distributed import Workers
from common.errors import UserError
from common.export import import_script

MARKS = {".sagemaker-uploaded": "yes", ".sagemaker-uploading": "running"}  # that SageMaker writes
COLUMNS = ("checkpoint", "epoch", "step", "MB", "age", "in S3", "state")


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit code: 1 if there are checkpoints and none can be read."""
    parser = argparse.ArgumentParser(
        prog="python -m common.list_checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, help="train.py")
    parser.add_argument("folder", type=Path, nargs="?", help="folder of the checkpoints")
    args = parser.parse_args(argv)
    try:
        train = import_script(args.script)
        flags = train.parse_args([])
        flags.checkpoint_path = args.folder or flags.checkpoint_path
        return print_table(Checkpoints(flags, train.engine, Workers()))
    except Exception as error:
        return run.report_error(error)


def print_table(checkpoints):
    """Print what is in the folder of checkpoints, newest first; return the exit code."""
    folder, pattern = checkpoints.folder, checkpoints.engine.CHECKPOINT
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected checkpoints such as {pattern.format(1)}")
    found = find_checkpoints(folder, pattern)
    rows = [_describe(checkpoints, name) for _, name in found]
    metrics = list(dict.fromkeys(name for _, values in rows for name in values))
    titles = [*COLUMNS, *metrics]
    lines = [titles]
    for cells, values in rows:
        lines.append([*cells, *(f"{values[name]:.4f}" if name in values else "" for name in metrics)])
    widths = [max(len(line[index]) for line in lines) for index in range(len(titles))]
    for line in lines if found else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    for path in sorted(folder.iterdir()):
        if path.name.endswith(DAMAGED):
            print(f"{path.name}: damaged, kept for inspection")
        elif path.name.endswith(TEMPORARY):
            print(f"{path.name}: being written, or left over")
    intact = [cells[0] for cells, _ in rows if cells[-1] == "intact"]
    if intact:
        print(f"A restart takes {intact[0]}")
    elif found:
        print("A restart would end with an error: none of the checkpoints can be read")
    else:
        print(f"A restart would begin at the first epoch: no checkpoints in {folder}")
    return 1 if found and not intact else 0


def _describe(checkpoints, name):
    """Return the cells of a checkpoint's row, and the validation metrics of its last finished epoch."""
    path = checkpoints.folder / name
    size, age = path.stat().st_size / 1e6, max(0, time.time() - path.stat().st_mtime)
    marks = [text for suffix, text in MARKS.items() if path.with_name(name + suffix).exists()]
    epoch = step = ""
    state = "intact"
    metrics = {}
    try:
        progress = checkpoints.read(name)["progress"]
        epoch, step = progress["epoch"], progress["step"] or ""
        for row in progress["history"][-1:]:
            metrics = {key: value for key, value in row.items() if key.startswith("validation_")}
    except UserError as error:  # of the disk or the memory: the file may be intact
        state = f"unknown: {errors.first_line(error)}"
    except Exception as error:  # each framework has its own errors for a damaged file
        state = f"damaged: {errors.first_line(error)[:60]}"
    cells = [name, epoch, step, f"{size:.1f}", _age(age), "".join(marks[:1]) or "-", state]
    return list(map(str, cells)), metrics


def _age(seconds):
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
