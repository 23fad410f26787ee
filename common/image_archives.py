"""The files of downloaded data sets: CIFAR's binary version and MNIST's IDX files.

Formats: https://www.cs.toronto.edu/~kriz/cifar.html, http://yann.lecun.com/exdb/mnist/
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np

from common.errors import UserError

CIFAR_SHAPE = (3, 32, 32)
IDX_NAME = r"({})-(images|labels)[-.]idx[13]-ubyte(\.gz)?"
MAX_COMPRESSION = 1032  # of gzip's algorithm
SPLITS = {"train": "train", "eval": "t10k|test"}  # prefixes of the names of IDX files
# The files of CIFAR-10 and CIFAR-100 for both splits, by the name of the file with the class names.
CIFAR_NAMES = {
    "batches.meta.txt": {"train": r"data_batch_\d+\.bin", "eval": r"test_batch\.bin"},
    "fine_label_names.txt": {"train": r"train\.bin", "eval": r"test\.bin"},
}
NUM_LABELS = {"batches.meta.txt": 1, "fine_label_names.txt": 2}  # bytes of labels before the pixels


def has_data(folder: Path, split: str) -> bool:
    """Return whether a folder contains data of a downloaded data set for a split, "train" or "eval"."""
    return folder.is_dir() and _find(folder, split) is not None


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """Return images (n, height, width, channels), labels and class names of a downloaded data set, or None.

    Args:
        folder: the folder with its files.
        split: "train" or "eval"; for "eval" a folder with only training data is accepted too.

    Raises UserError for a damaged file.
    """
    found = _find(folder, split)
    if not found and split == "eval":
        found = _find(folder, "train")
    if not found:
        _refuse_pickles(folder)
        _refuse_without_names(folder)
        return None
    names, paths = found
    try:
        if names is None:
            return _read_mnist(folder, paths)
        return _read_cifar(names, paths)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error}") from error


def _find(folder, split):
    """Return the path of the class names (None for IDX) and the files of a split; None without files."""
    for name, patterns in CIFAR_NAMES.items():
        batches = _find_files(folder, patterns[split])
        if batches and (folder / name).is_file():
            return folder / name, batches
    idx = _find_files(folder, IDX_NAME.format(SPLITS[split]))
    return (None, idx) if idx else None


def _find_files(folder, pattern):
    return [path for path in sorted(folder.iterdir()) if re.fullmatch(pattern, path.name) and path.is_file()]


def _refuse_pickles(folder):
    is_cifar_10 = (folder / "batches.meta").is_file()
    is_cifar_100 = (folder / "meta").is_file() and (folder / "train").is_file()
    if is_cifar_10 or is_cifar_100:
        raise UserError(
            f"{folder} contains the Python version of CIFAR, and reading it could execute code: "
            "download the binary version, such as cifar-10-binary.tar.gz"
        )


def _refuse_without_names(folder):
    """Raise UserError for CIFAR files without class names, unless the folder has subfolders."""
    if any(path.is_dir() for path in folder.iterdir()):
        return
    for name, patterns in CIFAR_NAMES.items():
        if batches := _find_files(folder, "|".join(patterns.values())):
            raise UserError(
                f"{folder} has {batches[0].name}, but not {name} with the names of the classes: "
                "copy it from the downloaded archive"
            )


def _read_cifar(names, paths):
    try:
        classes = names.read_text("utf-8").split()
    except UnicodeDecodeError as error:
        raise UserError(f"{names} is not UTF-8: expected the names of the classes, one a line") from error
    if len(set(classes)) < len(classes):
        raise UserError(f"{names} has a name twice: expected a different one for each class")
    num_labels = NUM_LABELS[names.name]
    num_bytes = num_labels + int(np.prod(CIFAR_SHAPE))
    parts = []
    for path in paths:
        content = np.fromfile(path, np.uint8)
        if len(content) == 0 or len(content) % num_bytes:
            raise UserError(
                f"{path} has {len(content)} bytes, expected a multiple of {num_bytes}: "
                "it is truncated, or not a CIFAR file"
            )
        rows = content.reshape(-1, num_bytes)
        label = rows[:, num_labels - 1].max()  # the second of CIFAR-100's two labels is the class
        if label >= len(classes):
            raise UserError(f"{path} has the label {label}, but {names.name} has {len(classes)} names")
        parts.append(rows)
    rows = np.concatenate(parts)
    labels = rows[:, num_labels - 1].astype(np.int64)
    images = rows[:, num_labels:].reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels, classes


def _read_mnist(folder, paths):
    found = {}
    for path in paths:
        kind = re.fullmatch(IDX_NAME.format(r"\w+"), path.name)[2]
        if kind in found:
            raise UserError(f"{found[kind]} and {path.name} have the same content: delete one of them")
        found[kind] = path
    if set(found) != {"images", "labels"}:
        missing = "labels" if "images" in found else "images"
        raise UserError(f"{folder} has {paths[0].name}, but not the file with its {missing}: add it")
    images = _read_idx(found["images"], 3)
    labels = _read_idx(found["labels"], 1)
    if len(images) != len(labels):
        raise UserError(
            f"{found['images']} has {len(images)} images, but {found['labels'].name} has {len(labels)} "
            "labels: expected one label per image"
        )
    if images.size == 0:
        raise UserError(f"{found['images']} has the shape {images.shape}: expected some images")
    classes, indices = np.unique(labels, return_inverse=True)
    return images[..., np.newaxis], indices.astype(np.int64), [str(name) for name in classes]


def _read_idx(path, num_dimensions):
    """Return the array of bytes in an IDX file. Raises UserError if it is damaged."""
    is_compressed = path.suffix == ".gz"
    opener = gzip.open if is_compressed else open
    limit = path.stat().st_size * (MAX_COMPRESSION if is_compressed else 1)
    expected = bytes([0, 0, 8, num_dimensions])  # 8 means bytes
    try:
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * num_dimensions)
            if not header.startswith(expected) or len(header) % 4:
                raise UserError(
                    f"{path} is not an IDX file of bytes in {num_dimensions} dimensions: it begins with "
                    f"{header[:4].hex(' ')}, expected {expected.hex(' ')}"
                )
            shape = np.frombuffer(header[4:], ">u4").tolist()
            count = math.prod(shape)
            content = b""
            if count <= limit:  # otherwise the header is wrong, and reading might fill the memory
                content = file.read(count + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(shape) != num_dimensions or len(content) != count:
        raise UserError(f"{path} does not have the {count} bytes of shape {shape} that it announces")
    return np.frombuffer(content, np.uint8).reshape(shape)
