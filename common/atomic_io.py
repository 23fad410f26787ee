"""Write files atomically: no reader sees an incomplete file, and a full disk loses nothing."""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import io
import logging
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Iterator

from common.errors import UserError, first_line

log = logging.getLogger("train").info  # as in `report.py`, which needs this module

NO_CHECKSUM = "0" * 64  # the value of "sha256" in a JSON text until `write_sealed` puts the checksum there
UNSEALED = f'"sha256": "{NO_CHECKSUM}"'.encode()
TEMPORARY = ".sagemaker-ignore"  # SageMaker does not copy files with this suffix to S3
EXPORT = f"export{TEMPORARY}"  # the folder in which a model is written


def write_sealed(content: bytearray, file: BinaryIO) -> None:
    """Write the bytearray `content` with its SHA-256 instead of `NO_CHECKSUM`."""
    end = content.index(UNSEALED) + len(UNSEALED) - 1
    content[end - len(NO_CHECKSUM) : end] = hashlib.sha256(content).hexdigest().encode()
    file.write(content)


def check_seal(content: bytes) -> None:
    """Raise ValueError if `content` has no checksum by `write_sealed`, or a wrong one."""
    found = re.search(rb'"sha256": "([0-9a-f]{64})"', content)
    if not found:
        raise ValueError("it has no checksum: it is truncated, or not a checkpoint of this script")
    if hashlib.sha256(content.replace(found[0], UNSEALED)).hexdigest().encode() != found[1]:
        raise ValueError("its checksum is wrong: the file is damaged")


def check_zip(file: BinaryIO) -> None:
    """Raise ValueError if the zip archive `file`, such as a .pt file, does not match its own checksums."""
    try:
        num_bytes = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > num_bytes:
                raise ValueError("it contains more bytes than it has")  # which might fill the memory
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many types for a damaged archive
        raise ValueError(f"the file is damaged: {error}") from error
    if damaged:
        raise ValueError(f"the checksum of its {damaged} is wrong: the file is damaged")
    file.seek(0)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends; a block that fails leaves no file.

    The content reaches the disk before the name, so that a visible file is complete even after a crash.
    Raises UserError if the disk is full or cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.unlink(missing_ok=True)  # of a run that was killed; a link would be followed
        raw = _ErrorKeepingWriter(temporary, "xb")
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            if raw.error:
                raise raw.error
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            _warn_of_unflushed(path.parent, error)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Earlier checkpoints are intact. "
            "Free some disk space, or pass --keep-checkpoints or another folder, then run the same command "
            "to resume"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _warn_of_unflushed(folder, error):
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
        raise error
    if folder not in _unflushed:
        log(
            f"Warning: the file system of {folder} cannot flush folders ({error.strerror}): after a "
            "power loss the newest file may be missing"
        )
    _unflushed.add(folder)


_unflushed: set[Path] = set()  # folders


class ErrorKeepingReader(io.FileIO):
    """A file to read that keeps the first disk error in `error`.

    Not every library passes an error on unchanged.
    """

    error: OSError | None = None

    @contextlib.contextmanager
    def _keeping_error(self):
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            raise

    def readinto(self, buffer: Any) -> int:
        with self._keeping_error():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with self._keeping_error():
            return super().readall()

    def close(self) -> None:
        with self._keeping_error():
            super().close()

    def size(self) -> int:
        """Return the number of bytes."""
        with self._keeping_error():
            return os.fstat(self.fileno()).st_size


class _ErrorKeepingWriter(io.FileIO):
    """A file to write that keeps the first disk error in `error`."""

    error = None

    def write(self, content):
        try:
            return super().write(content)
        except OSError as error:
            self.error = self.error or error
            num_bytes = memoryview(content).nbytes
            self.seek(num_bytes, os.SEEK_CUR)  # as if it had been written
            return num_bytes


@contextlib.contextmanager
def atomic_export(folder: Path, flag: str) -> Iterator[Path]:
    """Yield an empty folder. When the block ends, its files replace those of the same names in `folder`.

    Nothing in `folder` changes if the block fails. Raises UserError, with the name of the flag, if a
    framework cannot write.
    """
    temporary = folder / EXPORT
    remove_export(folder)
    try:
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        for path in temporary.iterdir():
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
        _flush(folder)
    except UserError:
        raise
    except Exception as error:  # each framework has its own types
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot write the model to {flag} {folder}: {reason}. The checkpoints are intact: fix this, or "
            f"pass another {flag}, and run the same command again"
        ) from error
    finally:
        remove_export(folder)


def remove_export(folder: Path) -> None:
    """Delete the leftovers of a killed export into this folder."""
    shutil.rmtree(folder / EXPORT, ignore_errors=True)


def _flush(path):
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        _warn_of_unflushed(path, error)
    finally:
        os.close(descriptor)


def temporary_folder(prefix: str) -> Path:
    """Return a new folder that is removed when this process ends, even if it is killed."""
    folder = tempfile.mkdtemp(prefix=prefix)
    # The shell waits until the other end of the pipe is closed. Ctrl-C does not reach its session.
    command = ["/bin/sh", "-c", 'read -r _; rm -rf "$0"', folder]
    remover = subprocess.Popen(  # noqa: S603 - nothing in it is from outside
        command,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(remover.communicate)
    return Path(folder)


def prepare_folder(folder: Path, flag: str) -> None:
    """Create a folder and try to write there, before hours of training. Raises UserError if that fails."""
    probe = folder / f"write-test{TEMPORARY}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.unlink(missing_ok=True)  # a link would be followed
        open(probe, "xb").close()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{flag} {folder} cannot be written ({error.strerror}): pass a folder you can write to"
        ) from error
