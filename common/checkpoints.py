"""The folder of checkpoints: finding the newest, checking that it fits, and removing old ones.

A script names its checkpoints by a pattern with one `{}`, such as `checkpoint-{}.pt`. There stands the number of
finished epochs, and for a checkpoint inside an epoch a hyphen and the number of its finished steps; these order them.
"""

import contextlib
import fcntl
import functools
import os
import re
import tempfile
from pathlib import Path

from common import cluster, saving
from common.errors import UserError
from common.files import TEMPORARY
from common.report import log

DAMAGED = ".damaged"

_received = []  # the temporary folder with the leader's checkpoint
_restored = set()  # names of the checkpoints that SageMaker has copied from S3 before the start

# Flags that do not change what is learned: those that may differ between workers, and these.
HARMLESS = cluster.OWN | {
    "--epochs",
    "--checkpoint-seconds",
    "--checkpoint-steps",
    "--keep-checkpoints",
    "--keep-best",
    "--resume-anyway",
    "--port",
    "--external-memory",
}


def name_of(pattern, progress):
    """Return the name of the checkpoint that holds this Progress: `checkpoint-3.pt`, or `checkpoint-3-117.pt`."""
    return pattern.format(f"{progress.epoch}-{progress.step}" if progress.step else progress.epoch)


def find_checkpoints(folder, pattern):
    """Return the checkpoints in `folder` as a list of ((epoch, step), name), the newest first, found by name alone."""
    name = re.compile(re.escape(pattern).replace(r"\{\}", "(0|[1-9][0-9]*)(?:-([1-9][0-9]*))?"))
    with os.scandir(folder) as entries:
        matches = map(name.fullmatch, [entry.name for entry in entries if entry.is_file()])
    return sorted([((int(match[1]), int(match[2] or 0)), match[0]) for match in matches if match], reverse=True)


def read_newest_checkpoint(folder, pattern, read):
    """Return (path, `read(file)`) of the newest checkpoint that can be read; None where there is none.

    `read` takes a binary file. Of several workers the leader chooses, from its folder, and the others get a copy of the
    file from it. Damaged checkpoints that are newer are kept for inspection under another name, so that they never
    count again. Raises UserError when there are checkpoints but not one can be read, as to start over in silence would
    lose them, and where disk or memory fail, as the file may be whole.
    """
    found = find_checkpoints(folder, pattern) if Path(folder).is_dir() else []
    newest = cluster.gather([*found[0][0], found[0][1]] if found else [-1, 0, ""])
    if max(newest) > newest[0]:
        holder = cluster.names[newest.index(max(newest))]
        log(f"Warning: {holder} has {max(newest)[2]}, but {cluster.names[0]} leads and has {newest[0][2] or 'nothing'}")
    path, checkpoint = _read_first(folder, found, read) if cluster.leads() else (None, None)
    name = cluster.broadcast(path.name.encode() if path else b"").decode()
    if not name:
        return None
    if cluster.size > 1:
        content = cluster.broadcast(path.read_bytes() if path else b"")
        if not cluster.leads():
            _received.append(tempfile.TemporaryDirectory())
            path = Path(_received[-1].name, name)
            path.write_bytes(content)
            checkpoint = _read(path, read)
    return path, checkpoint


def _read(path, read):
    try:
        with open(path, "rb") as file:
            while file.read(2**20):  # the whole file, first: from a disk that fails `read` would make a damaged file
                pass
            if not file.tell():
                raise ValueError("the file is empty")
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from error
    try:
        with open(path, "rb") as file:
            return read(file)
    except MemoryError as error:
        raise _unreadable(path, "not enough memory") from error


def _unreadable(path, reason):
    return UserError(f"cannot read {path}: {reason}. Mend that, then run the same command again")


def _read_first(folder, found, read):
    """Return path and `read(file)` of the first of the checkpoints `found` that can be read."""
    damaged = []
    for _, name in found:
        path = Path(folder, name)
        try:
            checkpoint = _read(path, read)
        except UserError:
            raise
        except Exception as error:  # each framework has its own errors for a damaged file
            reason = " ".join(str(error).split())[:200]
            log(f"Cannot read {path.name}, trying the one before: {type(error).__name__}: {reason}")
            damaged.append(path)
            continue
        for bad in damaged:
            bad.replace(bad.with_name(bad.name + DAMAGED))
            log(f"Kept for inspection: {bad.name}{DAMAGED}")
        return path, checkpoint
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise UserError(
            f"none of the checkpoints in {folder} can be read: {names}. "
            "Delete them to start over, or pass another --checkpoint-path"
        )
    return None, None


def write(args, pattern, path, best, write_content):
    """Write the checkpoint `path` in the background, with `write_content(file)`, and then remove old ones."""
    saving.start(path, write_content, functools.partial(remove_old_checkpoints, args, pattern, best))


def describe_run(args, job, framework, threads=None):
    """Return what a checkpoint tells of the run that saved it, all of it plain: "job", "machine" and "flags".

    Args:
        job: what makes a job, such as {"--model": "cnn"}.
        framework: the framework's module; its version, the CPU threads and the workers change the bits of the result,
            not its worth.
        threads: their number where it is known, else what OpenMP and the frameworks take by default.
    """
    wanted = str(threads or os.environ.get("OMP_NUM_THREADS"))
    threads = int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))
    return {
        "job": job,
        "machine": {
            "CPU threads": threads,
            "number of workers": cluster.size,
            framework.__name__: str(framework.__version__),
        },
        "flags": {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()},
    }


def check_same_job(args, path, checkpoint, run):
    """Log the resuming, and what differs between the run that saved `checkpoint` and `run`, see `describe_run`.

    Raises UserError where the checkpoint at `path` belongs to another job, unless `--resume-anyway` is there.
    """

    def changes(kind):
        pairs = ((key, checkpoint[kind].get(key), now) for key, now in run[kind].items())
        return [(key, f"{key} was {old} and is now {now}") for key, old, now in pairs if old != now]

    other_job = [text for _, text in changes("job")]
    if other_job and not args.resume_anyway:
        raise UserError(
            f"{path} belongs to another job: {'; '.join(other_job)}. Use the same flags and data again, "
            "or pass another --checkpoint-path, or --resume-anyway where that makes sense"
        )
    known = HARMLESS | set(run["job"]) | (set(run["flags"]) - set(checkpoint["flags"]))
    known -= {"--epochs"} if run["flags"].get("--schedule") == "cosine" else set()  # its learning rates follow from it
    other_flags = [text for flag, text in changes("flags") if flag not in known]
    if other_job or other_flags:
        log(f"Changed since {path.name}: {'; '.join(other_job + other_flags)}")
    other_machine = [text for key, text in changes("machine") if key in checkpoint["machine"]]
    if other_machine:
        log(f"Warning: {'; '.join(other_machine)}: the result will be equally good but not bit-identical")
    log(f"Resuming training from {path.name}")


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


def prepare_folder(folder, pattern):
    """Lock the folder for the life of this process, and delete what saves that were killed halfway have left there.

    Waits for the end of another run: after a signal one may still be saving. Of several workers only the leader writes
    there.
    """
    if not cluster.leads():
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log(f"Waiting for the end of another run with --checkpoint-path {folder}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # not every file system has locks
        log(f"{folder} cannot be locked: see to it that no other run uses it")
    for _, name in find_checkpoints(folder, pattern + TEMPORARY):
        Path(folder, name).unlink()
    if "SM_MODEL_DIR" in os.environ:
        _restored.update(name for _, name in find_checkpoints(folder, pattern))


def remove_old_checkpoints(args, pattern, best):
    """Delete what `--keep-checkpoints` and `--keep-best` do not keep, and what is inside an epoch and outdated.

    `best` is the number in the name of the best checkpoint. What is deleted here is deleted in S3 too. So a file that
    SageMaker is uploading stays, and where SageMaker marks what it has uploaded, only uploaded checkpoints count as
    those that replace others. What it has copied from S3 before the start stays until there is a mark: it may be all
    that S3 has. What stays is deleted later.
    """
    found = find_checkpoints(args.checkpoint_path, pattern)
    kept = [(best, 0)] if args.keep_best else []
    uploaded = [(position, name) for position, name in found if _marked(args, name, "uploaded")]
    there = [position for position, _ in (uploaded or found)]
    epochs = [position for position in there if position[1] == 0]
    oldest = epochs[args.keep_checkpoints - 1] if 0 < args.keep_checkpoints <= len(epochs) else (0, 0)
    for position, name in found:
        replaced = position < (oldest if position[1] == 0 else there[0]) and position not in kept
        if replaced and not _marked(args, name, "uploading") and (uploaded or name not in _restored):
            Path(args.checkpoint_path, name).unlink()


def read_best_checkpoint(args, pattern, best, read):
    """Return (path, `read(file)`) of the best checkpoint, `best` being the number in its name.

    Raises UserError where it is gone or damaged.
    """
    path = args.checkpoint_path / pattern.format(best)
    try:
        return path, _read(path, read)
    except Exception as error:  # each framework has its own errors for a damaged file
        raise UserError(
            f"--keep-best: the best checkpoint, {path}, cannot be read ({error}). "
            "Run the same command without --keep-best to export the last epoch's model"
        ) from error


def _marked(args, name, word):
    return os.path.exists(f"{args.checkpoint_path}/{name}.sagemaker-{word}")
