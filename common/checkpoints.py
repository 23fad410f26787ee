"""The folder of checkpoints: finding the newest one, checking that it fits, and removing old ones.

The name of a checkpoint contains the number of finished epochs and, for a checkpoint inside an epoch, a
hyphen and the number of finished steps: `checkpoint-3.pt`, `checkpoint-3-117.pt`. These numbers order the
checkpoints.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import checkpoint_schema, errors
from common.atomic_io import TEMPORARY, ErrorKeepingReader, atomic_write
from common.distributed import PER_WORKER_FLAGS
from common.errors import UserError
from common.history import HistoryFile
from common.model_folder import STRUCTURE
from common.report import log

DAMAGED = ".damaged"
UPLOAD_SECONDS = 900  # that a checkpoint waits, without a new mark by SageMaker, until a warning

# Flags that do not affect the learned model, besides those that may differ between workers.
HARMLESS_FLAGS = PER_WORKER_FLAGS | {
    "--epochs",
    "--checkpoint-seconds",
    "--checkpoint-steps",
    "--keep-checkpoints",
    "--best-metric",
    "--patience",
    "--stop-after",
    "--tensorboard",
    "--resume-anyway",
    "--port",
    "--external-memory",
}


def find_checkpoints(folder: Path, pattern: str) -> list[tuple[tuple[int, int], str]]:
    """Return the checkpoints in `folder`, found by name, newest first: a list of ((number, step), name)."""
    name = re.compile(re.escape(pattern).replace(r"\{\}", "(0|[1-9][0-9]*)(?:-([1-9][0-9]*))?"))
    with os.scandir(folder) as entries:
        matches = map(name.fullmatch, [entry.name for entry in entries if entry.is_file()])
    return sorted(
        [((int(match[1]), int(match[2] or 0)), match[0]) for match in matches if match], reverse=True
    )


class Checkpoints:
    """The checkpoints of one training.

    Args:
        args: the flags.
        engine: knows the file format: `CHECKPOINT` (the pattern of the names), `FIRST_NUMBER` (the number in
            the name after the first epoch), `read_checkpoint(file)` and `write_checkpoint(content, file)`.
        workers: only the main process uses its folder; the others receive the newest checkpoint from it.
    """

    def __init__(self, args: Namespace, engine: Any, workers: Any) -> None:
        self.args = args
        self.folder = args.checkpoint_path
        self.engine = engine
        self.workers = workers
        self.history = HistoryFile(args.checkpoint_path)
        self._lock: int | None = None
        self._has_checked_room = False
        self._undeletable: set[str] = set()
        self._has_checked_uploads = False
        # Names of the checkpoints that SageMaker copied from S3 before the start.
        self._from_s3: set[str] = set()

    def name_of(self, epoch: int, step: int = 0) -> str:
        """Return the name of the checkpoint after `epoch` epochs and `step` steps."""
        number = epoch - 1 + self.engine.FIRST_NUMBER
        return self.engine.CHECKPOINT.format(f"{number}-{step}" if step else number)

    def open(self) -> None:
        """Lock the folder, and delete the leftovers of interrupted saves.

        Another run with this folder may be saving after a signal: wait until it ends.
        """
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"Another run is using --checkpoint-path {self.folder}; waiting for it to finish")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError:  # not every file system has locks
            log(f"{self.folder} cannot be locked; make sure no other run is using it")
        for _, name in find_checkpoints(self.folder, self.engine.CHECKPOINT + TEMPORARY):
            Path(self.folder, name).unlink()
        if "SM_MODEL_DIR" in os.environ:
            self._from_s3.update(name for _, name in find_checkpoints(self.folder, self.engine.CHECKPOINT))

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read_newest(self) -> tuple[str, dict[str, Any]] | None:
        """Return (name, content) of the newest checkpoint that can be read; None without any checkpoint.

        Newer, damaged checkpoints are renamed and kept for inspection. Raises UserError if none of the
        checkpoints can be read, as a silent new start would lose them, and if disk or memory fail, as the
        file may be intact.
        """
        damaged: list[str] = []
        for _, name in find_checkpoints(self.folder, self.engine.CHECKPOINT):
            try:
                content = self.read(name)
            except UserError:
                raise
            except Exception as error:  # each framework has its own errors for a damaged file
                reason = " ".join(str(error).split())[:200]
                log(f"Cannot read {name}, trying the one before: {type(error).__name__}: {reason}")
                damaged.append(name)
                continue
            for bad in damaged:
                Path(self.folder, bad).replace(Path(self.folder, bad + DAMAGED))
                # SageMaker's mark that it is in S3 would count for the next file of this name.
                Path(self.folder, f"{bad}.sagemaker-uploaded").unlink(missing_ok=True)
                log(f"Kept for inspection: {bad}{DAMAGED}")
            return name, content
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read: {', '.join(damaged)}. "
                "Delete them to start over, or pass another --checkpoint-path"
            )
        return None

    def share_newest(self) -> tuple[str, dict[str, Any]] | None:
        """Return what `read_newest` returns on the main process, on every worker."""
        folder_has = find_checkpoints(self.folder, self.engine.CHECKPOINT) if self.folder.is_dir() else []
        newest = self.workers.all_gather([*folder_has[0][0], folder_has[0][1]] if folder_has else [-1, 0, ""])
        if max(newest) > newest[0]:
            names = self.workers.names
            log(
                f"Warning: {names[newest.index(max(newest))]} has {max(newest)[2]}, "
                f"but the main process, {names[0]}, has {newest[0][2] or 'no checkpoint'} and decides"
            )
        if self.workers.is_main_process:
            found = self.read_newest()
            self.workers.broadcast(found[0].encode() if found else b"")
            if found:
                self.workers.broadcast(Path(self.folder, found[0]).read_bytes())
            return found
        name = self.workers.broadcast().decode()
        if not name:
            return None
        return name, self.engine.read_checkpoint(io.BytesIO(self.workers.broadcast()))

    def read(self, name: str) -> dict[str, Any]:
        """Return the content of a checkpoint.

        Raises UserError if the disk or the memory fails, and another error if the file is damaged or not a
        checkpoint.
        """
        path = Path(self.folder, name)
        raw = cause = None
        try:
            raw = ErrorKeepingReader(path)
            with io.BufferedReader(raw) as file:
                if not raw.size():
                    raise ValueError("the file is empty")
                content = self.engine.read_checkpoint(file)
        except Exception as error:
            # These errors do not mean that the file is damaged.
            if raw is None or raw.error:
                failed = error if raw is None else raw.error
                cause = getattr(failed, "strerror", None) or failed
            if errors.is_out_of_memory(error):
                cause = "not enough memory"
            if cause is None:
                raise
            raise UserError(
                f"cannot read {path}: {cause}. Fix this and run the same command again"
            ) from error
        checkpoint_schema.check(content)
        position = content["progress"]["epoch"], content["progress"]["step"]
        if self.name_of(*position) != name:
            raise ValueError(
                f"it contains epoch {position[0]} and step {position[1]}, which does not match its name"
            )
        return content

    def write(
        self, name: str, content: dict[str, Any], best_epoch: int | None, origin: tuple[Any, str] = (None, "")
    ) -> int:
        """Write a checkpoint, then delete those that it replaces; return its size in bytes.

        Args:
            name: of the file.
            content: the result of `copy_to_host`.
            best_epoch: to keep, or None.
            origin: the training state, and the epoch and step after which it was copied.

        Raises UserError if some weights are infinite or not a number: they must not replace better ones.
        """
        state, place = origin
        if hasattr(state, "has_finite_weights") and not state.has_finite_weights(content):
            found = find_checkpoints(self.folder, self.engine.CHECKPOINT)
            last = f"the last finite checkpoint is {found[0][1]}" if found else "there is no checkpoint"
            raise UserError(
                f"after {place} some weights are infinite or not a number: they are not saved, {last}. "
                "Try a lower --learning-rate or some --warmup-epochs, with another --output"
            )
        if self.history.unwritten:
            self.history.write()
        with atomic_write(Path(self.folder, name)) as file:
            self.engine.write_checkpoint(content, file)
            size = file.seek(0, os.SEEK_END)
        self.remove_old(best_epoch)
        return size

    def merge_history(self, rows: list[dict]) -> list[dict]:
        """Return the rows of all epochs, from those of the checkpoint that was read. A collective call."""
        content = b""
        if self.workers.is_main_process and self.history.path.is_file():
            content = self.history.path.read_bytes()
        return self.history.merge(rows, self.workers.broadcast(content))

    def check_room(self) -> None:
        """Log a warning, once, if the remaining checkpoints will probably not fit on the disk."""
        if self._has_checked_room or not self.workers.is_main_process:
            return
        self._has_checked_room = True
        found = find_checkpoints(self.folder, self.engine.CHECKPOINT)
        try:
            size = max(Path(self.folder, name).stat().st_size for _, name in found)
        except (OSError, ValueError):  # one or all have been deleted
            return
        num_left = (self.args.keep_checkpoints or self.args.epochs) - len(found)
        free = shutil.disk_usage(self.folder).free
        if num_left * size > free:
            log(
                f"Warning: {num_left} more checkpoints of {size / 1e6:,.1f} MB will not fit into the "
                f"{free / 1e6:,.0f} MB that are free in {self.folder}: pass --keep-checkpoints"
            )

    def remove_old(self, best_epoch: int | None = None) -> None:
        """Delete outdated checkpoints, except those of the best epoch and of the last `--keep-checkpoints`.

        A checkpoint is deleted only after its successor is in S3, because SageMaker repeats a deletion there:
        a file that is being uploaded stays, and if SageMaker marks the files that it has uploaded, only
        uploaded checkpoints replace others. A file copied from S3 before the start stays until there is a
        mark, as S3 may have no other checkpoint.
        """
        found = find_checkpoints(self.folder, self.engine.CHECKPOINT)
        entries = set(os.listdir(self.folder))
        uploaded = [position for position, name in found if f"{name}.sagemaker-uploaded" in entries]
        if uploaded and not self._has_checked_uploads:
            self._check_uploads([name for position, name in found if position > uploaded[0]])
        available = uploaded or [position for position, _ in found]
        epochs = [position for position in available if position[1] == 0]
        keep = self.args.keep_checkpoints
        oldest = epochs[keep - 1] if 0 < keep <= len(epochs) else (0, 0)
        best = None if best_epoch is None else self.name_of(best_epoch)
        for position, name in found:
            is_replaced = position < (oldest if position[1] == 0 else available[0]) and name != best
            is_safe = f"{name}.sagemaker-uploading" not in entries and (uploaded or name not in self._from_s3)
            if is_replaced and is_safe:
                self._delete(name)

    def _check_uploads(self, waiting):
        """Log a warning, once, if SageMaker has marked files as uploaded, but none for a long time.

        Args:
            waiting: the names of the checkpoints without a mark, newest first.
        """
        waiting = [name for name in waiting if name not in self._from_s3]
        if not waiting:
            return
        changes = [Path(self.folder, waiting[-1]), *self.folder.glob("*.sagemaker-upload*")]
        with contextlib.suppress(FileNotFoundError):  # SageMaker has just changed a mark
            idle = time.time() - max(path.stat().st_mtime for path in changes)
            if idle > UPLOAD_SECONDS:
                self._has_checked_uploads = True
                log(
                    f"Warning: for {idle / 60:.0f} minutes SageMaker has copied no checkpoint to S3, where "
                    f"{len(waiting)} are missing: an interruption would lose them; it is a known fault of "
                    "the service: https://github.com/aws/sagemaker-python-sdk/issues/3062"
                )

    def _delete(self, name):
        """Delete a checkpoint; one that cannot be deleted stays, which is logged once."""
        try:
            Path(self.folder, name).unlink(missing_ok=True)
        except OSError as error:
            if name not in self._undeletable:
                log(f"Warning: cannot delete {Path(self.folder, name)}: {error.strerror}")
            self._undeletable.add(name)

    def check_same_job(self, name: str, content: dict[str, Any], now: dict[str, dict[str, Any]]) -> None:
        """Log what differs between the run that saved `content` and this one, which `now` describes.

        Both have the dictionaries "job", "data", "machine", "flags" and "code". Raises UserError if the
        checkpoint belongs to another job, unless `--resume-anyway` is set.
        """
        changes = {}
        for kind, values in now.items():
            saved = content.get(kind, {})
            differing = [key for key, value in values.items() if key in saved and saved[key] != value]
            changes[kind] = {key: f"{key} was {saved[key]} and is now {values[key]}" for key in differing}
        if getattr(self.engine, "FRAMEWORK", None) in changes["machine"]:
            changes["job"].pop(STRUCTURE, None)  # the description of the layers differs between versions
        other_job = changes["job"]
        if other_job and not self.args.resume_anyway:
            raise UserError(
                f"{Path(self.folder, name)} belongs to another job: {'; '.join(other_job.values())}. "
                "Use the same flags, data and model again, or pass another --output, "
                "or --resume-anyway if that makes sense"
            )
        harmless = HARMLESS_FLAGS | set(now["job"])
        if now["flags"].get("--schedule") == "cosine":
            harmless -= {"--epochs"}  # the learning rates depend on it
        other_flags = {flag: text for flag, text in changes["flags"].items() if flag not in harmless}
        changed = {**other_job, **other_flags}
        if changed:
            log(f"Changed since {name}: {'; '.join(changed.values())}")
        if changes["data"]:
            log(f"Warning: the data has changed since {name}: {'; '.join(changes['data'].values())}")
        if changes.get("code"):
            log(f"train.py has changed since {name}: pass another --output to train from the start with it")
        if changes["machine"]:
            machine = "; ".join(changes["machine"].values())
            log(f"Warning: {machine}: the result will be equally good but not bit-identical")


def misfit(path: Path, error: Exception) -> UserError:
    """Return the UserError for a checkpoint that cannot be loaded into the model because of `error`."""
    if isinstance(error, UserError):
        return error
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UserError(
        f"{path} does not fit this script, load_state_dict raises {reason}. "
        "Build the same model and training state again, or pass another --output"
    )
