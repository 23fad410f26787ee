"""Writing files so that nobody ever sees half of one, and nothing is lost when the disk is full."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import zipfile

import numpy as np

from common import cluster
from common.errors import UserError

NO_CHECKSUM = "0" * 64  # what stands under "sha256" in a JSON text until `seal` puts the checksum there
UNSEALED = f'"sha256": "{NO_CHECKSUM}"'.encode()
TEMPORARY = ".sagemaker-ignore"  # SageMaker does not copy files to S3 whose names end like this


def seal(content):
    """Return the bytearray `content`, its SHA-256 put in the place of `NO_CHECKSUM`, which must stand in it once."""
    end = content.index(UNSEALED) + len(UNSEALED) - 1
    content[end - len(NO_CHECKSUM) : end] = hashlib.sha256(content).hexdigest().encode()
    return content


def check_seal(content):
    """Raise ValueError where `content` has no checksum written by `seal`, or one that is not that of the rest."""
    found = re.search(rb'"sha256": "([0-9a-f]{64})"', content)
    if not found:
        raise ValueError("it has no checksum: it is cut off, or not a checkpoint of this script")
    if hashlib.sha256(content.replace(found[0], UNSEALED)).hexdigest().encode() != found[1]:
        raise ValueError("its checksum is wrong: the file is damaged")


def check_zip(file):
    """Raise ValueError where the zip archive `file`, as .pt and .keras files are, is damaged: it has checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile has no one error for what damage can look like
        raise ValueError(f"the file is damaged: {error}") from error
    if damaged:
        raise ValueError(f"the checksum of its {damaged} is wrong: the file is damaged")
    file.seek(0)


def write_arrays(file, arrays, facts):
    """Write arrays by name, and `facts` as JSON, into a zip file for `np.load`; `np.savez` would copy parts of them."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in {**arrays, "json": json.dumps(facts)}.items():
            array = np.asarray(array, order="C")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, np.lib.format.header_data_from_array_1_0(array))
                member.write(array.reshape(-1).view(np.uint8))


def read_arrays(file):
    """Return the arrays by name and the facts that `write_arrays` has written; nothing in the file is executed.

    Raises ValueError where it is damaged, and what NumPy raises where it is something else.
    """
    check_zip(file)
    arrays = dict(np.load(file, allow_pickle=False))
    return arrays, json.loads(str(arrays.pop("json")))


def prepare_folders(args):
    """Create the folders that training writes to and try to write there, before hours of training.

    Of several workers only the leader writes. Raises UserError where a folder cannot be written.
    """
    if not cluster.leads():
        return
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


@contextlib.contextmanager
def atomic_write(path):
    """Yield a binary file that becomes `path` when the block ends, and leaves nothing behind when it fails.

    The content reaches the disk before the name does: whoever sees the name sees the whole file, also after a crash.
    Raises UserError when the disk is full or cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        raw = _File(temporary, "wb")
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            if raw.error:
                raise raw.error
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Earlier checkpoints are whole: "
            "make room or pass another folder, then run the same command to resume"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


class _File(io.FileIO):
    """A file that keeps a failed write's error to itself, in `error`: not every library passes it on as it is."""

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
def atomic_export(folder):
    """Yield an empty folder; when the block ends, what was written there replaces what has the same name in `folder`.

    Nothing in `folder` changes when the block fails.
    """
    temporary = folder / f"export{TEMPORARY}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
