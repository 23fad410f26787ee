"""List the checkpoints of a training: their content, whether they are intact, which one a restart uses.

    python -m common.list_checkpoints pytorch/train.py [FOLDER]
    python -m common.list_checkpoints pytorch/train.py s3://bucket/job/checkpoints/

FOLDER contains the checkpoints; default: the folder that the script would use. Nothing in it changes. From an
address in S3, which needs boto3, one checkpoint after the other is copied to a temporary folder and read.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator

from common import errors, run, s3
from common.atomic_io import TEMPORARY
from common.checkpoints import DAMAGED, Checkpoints, find_checkpoints
from common.distributed import Workers
from common.errors import UserError
from common.export import import_script

MARKS = {".sagemaker-uploaded": "yes", ".sagemaker-uploading": "running"}  # that SageMaker writes
COLUMNS = ("checkpoint", "epoch", "step", "MB", "age", "in S3", "state")


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit code: 1 if there are checkpoints but none can be read."""
    parser = argparse.ArgumentParser(
        prog="python -m common.list_checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, help="train.py")
    parser.add_argument("folder", nargs="?", help="folder of the checkpoints, or its address in S3")
    args = parser.parse_args(argv)
    try:
        train = import_script(args.script)
        flags = train.parse_args([])
        flags.checkpoint_path = Path(args.folder or flags.checkpoint_path)
        if not (args.folder or "").startswith("s3://"):
            return print_table(Checkpoints(flags, train.engine, Workers()))
        address = args.folder.rstrip("/") + "/"
        with names_in_s3(address) as (flags.checkpoint_path, fetch):
            return print_table(Checkpoints(flags, train.engine, Workers()), address, fetch)
    except Exception as error:
        if type(error).__module__.startswith("boto"):
            error = UserError(f"cannot read {args.folder}: {error}")
        return run.report_error(error)


@contextlib.contextmanager
def names_in_s3(address: str) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Yield a temporary folder with the names at an address in S3, and a function that fetches one."""
    with errors.importing("boto3 for addresses in S3", "Install it with: pip install boto3"):
        import boto3
    client, (bucket, prefix) = boto3.client("s3"), s3.split_uri(address)
    found = s3.list_objects(client, address)
    with tempfile.TemporaryDirectory() as folder:

        def fetch(path):
            client.download_file(bucket, prefix + path.name, str(path))
            os.utime(path, (found[prefix + path.name],) * 2)

        for name in [key[len(prefix) :] for key in found]:
            if "/" not in name:
                Path(folder, name).touch()
                Path(folder, f"{name}.sagemaker-uploaded").touch()
        yield Path(folder), fetch


def print_table(
    checkpoints: Checkpoints, place: str | None = None, fetch: Callable[[Path], None] | None = None
) -> int:
    """Print the content of the folder of checkpoints, newest first; return the exit code.

    Args:
        place: the name of the folder in the messages.
        fetch: downloads the content of a file, which is removed after reading.
    """
    place = place or checkpoints.folder
    folder, pattern = checkpoints.folder, checkpoints.engine.CHECKPOINT
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected checkpoints such as {pattern.format(1)}")
    found = find_checkpoints(folder, pattern)
    rows = []
    for _, name in found:
        if fetch:
            fetch(folder / name)
        rows.append(_describe(checkpoints, name))
        if fetch:
            os.truncate(folder / name, 0)
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
        print(f"A restart resumes from {intact[0]}")
    elif found:
        print("A restart would end with an error: none of the checkpoints can be read")
    else:
        print(f"A restart would start at the first epoch: no checkpoints in {place}")
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
    except UserError as error:  # the disk or the memory failed: the file may be intact
        state = f"unknown: {errors.first_line(error)}"
    except Exception as error:  # each framework has its own errors for a damaged file
        state = f"damaged: {errors.first_line(error)[:80]}"
    cells = [name, epoch, step, f"{size:.1f}", _age(age), "".join(marks[:1]) or "-", state]
    return list(map(str, cells)), metrics


def _age(seconds):
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
