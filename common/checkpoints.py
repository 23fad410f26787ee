"""Checkpoint files: finding the newest, and writing them so that nobody ever sees half of one.

A script names its checkpoints by a pattern with one `{}`, such as `checkpoint-{}.pt`; the number that stands there
orders them. Files whose names end in `.sagemaker-ignore` are not copied to S3 by SageMaker.
"""

import contextlib
import os
import re
from pathlib import Path

from common.errors import UserError
from common.report import log

TEMPORARY = ".sagemaker-ignore"


def find_checkpoints(folder, pattern):
    """Return the checkpoints in `folder` as a list of (number, path), the newest first, found by name alone."""
    name = re.compile(re.escape(pattern).replace(r"\{\}", "(0|[1-9][0-9]*)"))
    matches = ((name.fullmatch(path.name), path) for path in Path(folder).iterdir() if path.is_file())
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def read_newest_checkpoint(folder, pattern, read):
    """Return (number, path, `read(path)`) of the newest checkpoint that can be read; None where there is none.

    Raises UserError when there are checkpoints but not one can be read: starting over in silence would lose them.
    """
    checkpoints = find_checkpoints(folder, pattern)
    for number, path in checkpoints:
        try:
            if path.stat().st_size == 0:
                raise ValueError("the file is empty")
            return number, path, read(path)
        except Exception as error:  # each framework has its own errors for a damaged file
            reason = " ".join(str(error).split())[:200]
            log(f"Cannot read {path.name}, trying the one before: {type(error).__name__}: {reason}")
    if checkpoints:
        names = ", ".join(path.name for _, path in checkpoints)
        raise UserError(
            f"none of the checkpoints in {folder} can be read: {names}. "
            "Delete them to start over, or pass another --checkpoint-path"
        )
    return None


def check_same_job(path, saved, current):
    """Raise UserError where the checkpoint at `path` belongs to another model or other data than this run.

    `saved` and `current` are dictionaries that describe the job, such as {"--model": "cnn", "number of classes": 10}.
    """
    changes = [f"{key} was {saved.get(key)} and is now {now}" for key, now in current.items() if saved.get(key) != now]
    if changes:
        raise UserError(
            f"{path} belongs to another job: {'; '.join(changes)}. "
            "Use the same model and data again, or pass another --checkpoint-path"
        )


def remove_old_checkpoints(folder, pattern, keep):
    """Delete all but the `keep` newest checkpoints (0: none is deleted), but no file that SageMaker is uploading."""
    for _, path in find_checkpoints(folder, pattern)[keep:] if keep else ():
        uploading, uploaded = (path.with_name(path.name + f".sagemaker-{word}") for word in ("uploading", "uploaded"))
        if uploaded.exists() or not uploading.exists():
            path.unlink()


@contextlib.contextmanager
def atomic_write(path):
    """Yield a binary file that becomes `path` when the block ends, and leaves nothing behind when it fails.

    The content reaches the disk before the name does: whoever sees the name sees the whole file, also after a crash.
    Raises UserError when the disk is full or cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. Earlier checkpoints are whole: "
            "make room or pass another folder, then run the same command to resume"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def prepare_folders(args, pattern):
    """Create the folders that training writes to and try to write there, before hours of training; tidy up.

    Raises UserError where a folder cannot be written.
    """
    for flag in ("--checkpoint-path", "--model-dir", "--output-data-dir"):
        folder = vars(args)[flag[2:].replace("-", "_")]
        probe = folder / f"write-test{TEMPORARY}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"{flag} {folder} cannot be written ({error.strerror}): pass a folder you can write to"
            ) from error
    for _, leftover in find_checkpoints(args.checkpoint_path, pattern + TEMPORARY):
        leftover.unlink()  # a save that was killed halfway


def _flush_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
