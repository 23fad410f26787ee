"""The folder of checkpoints: finding the newest, checking that it fits, and removing old ones.

A script names its checkpoints by a pattern with one `{}`, such as `checkpoint-{}.pt`; the number that stands there
orders them.
"""

import contextlib
import re
from pathlib import Path

from common.errors import UserError
from common.files import TEMPORARY
from common.report import log

# Flags that do not change what is learned.
HARMLESS = {
    "--epochs",
    "--device",
    "--num-gpus",
    "--train",
    "--validation",
    "--checkpoint-path",
    "--keep-checkpoints",
    "--resume-anyway",
    "--model-dir",
    "--output-data-dir",
    "--hosts",
    "--current-host",
    "--workers",
}


def find_checkpoints(folder, pattern):
    """Return the checkpoints in `folder` as a list of (number, path), the newest first, found by name alone."""
    name = re.compile(re.escape(pattern).replace(r"\{\}", "(0|[1-9][0-9]*)"))
    matches = ((name.fullmatch(path.name), path) for path in Path(folder).iterdir() if path.is_file())
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def read_newest_checkpoint(folder, pattern, read):
    """Return (number, path, `read(path)`) of the newest checkpoint that can be read; None where there is none.

    Raises UserError when there are checkpoints but not one can be read: starting over in silence would lose them.
    """
    checkpoints = []
    for number, path in find_checkpoints(folder, pattern):
        if path.stat().st_size == 0:  # nothing to lose
            log(f"Skipping {path.name}: the file is empty")
        else:
            checkpoints.append((number, path))
    for number, path in checkpoints:
        try:
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


def check_same_job(args, path, checkpoint, job):
    """Raise UserError where the checkpoint at `path` belongs to another job than this run; log flags that have changed.

    `job` and `checkpoint["job"]` are dictionaries of what makes a job, such as {"--model": "cnn"}, and
    `checkpoint["flags"]` holds the flags of the earlier run as strings. With `--resume-anyway` nothing is refused.
    """
    saved = checkpoint["job"]
    changes = [f"{key} was {saved.get(key)} and is now {now}" for key, now in job.items() if saved.get(key) != now]
    if changes and not args.resume_anyway:
        raise UserError(
            f"{path} belongs to another job: {'; '.join(changes)}. Use the same flags and data again, "
            "or pass another --checkpoint-path, or --resume-anyway where that makes sense"
        )
    flags = {
        f"--{name.replace('_', '-')}": (checkpoint["flags"].get(name), value) for name, value in vars(args).items()
    }
    for flag, (old, value) in flags.items():
        if old not in (None, str(value)) and flag not in HARMLESS and flag not in job:
            changes.append(f"{flag} was {old} and is now {value}")
    if changes:
        log(f"Changed since {path.name}: {'; '.join(changes)}")


@contextlib.contextmanager
def restoring(path):
    """Load the checkpoint at `path` into the model inside this block; UserError where it does not fit."""
    try:
        yield
    except Exception as error:  # each framework has its own errors for weights of another shape
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} does not fit the model that build_model returns: {reason}. "
            "Build the same model again, or pass another --checkpoint-path"
        ) from error


def remove_leftovers(folder, pattern):
    """Delete what saves that were killed halfway have left."""
    for _, path in find_checkpoints(folder, pattern + TEMPORARY):
        path.unlink()


def remove_old_checkpoints(folder, pattern, newest, keep):
    """Delete the checkpoints up to the number `newest`, just written, except the last `keep` of them (0: delete none).

    Higher numbers are left alone: they are what this run could not read. So is a file that SageMaker is uploading.
    """
    written = [path for number, path in find_checkpoints(folder, pattern) if number <= newest]
    for path in written[keep:] if keep else ():
        uploading, uploaded = (path.with_name(path.name + f".sagemaker-{word}") for word in ("uploading", "uploaded"))
        if uploaded.exists() or not uploading.exists():
            path.unlink()
