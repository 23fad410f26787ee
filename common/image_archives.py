"""The files of downloaded data sets: CIFAR's binary version and MNIST's IDX files.

Formats: https://www.cs.toronto.edu/~kriz/cifar.html, http://yann.lecun.com/exdb/mnist/
"""

import gzip
import re
import zlib

import numpy as np

from common.errors import UserError

CIFAR_SHAPE = (3, 32, 32)
IDX_NAME = r"({})-(images|labels)[-.]idx[13]-ubyte(\.gz)?"
MAX_COMPRESSION = 1032  # of gzip's algorithm
SPLITS = {"train": "train", "eval": "t10k|test"}  # how the names of IDX files begin
# The files of CIFAR-10 and CIFAR-100 for both splits, by the name of the file with the class names.
CIFAR_NAMES = {
    "batches.meta.txt": {"train": r"data_batch_\d+\.bin", "eval": r"test_batch\.bin"},
    "fine_label_names.txt": {"train": r"train\.bin", "eval": r"test\.bin"},
}
NUM_LABELS = {"batches.meta.txt": 1, "fine_label_names.txt": 2}  # bytes of labels before those of the pixels


def has_test_data(folder):
    """Return whether a folder contains training and test data of a downloaded data set."""
    return folder.is_dir() and all(_find(folder, split) for split in SPLITS)


def read(folder, split):
    """Return images (n, height, width, channels), labels and class names of a downloaded data set, or None.

    Args:
        folder: with its files.
        split: "train" or "eval"; for "eval" a folder with training data alone is fine too.

    Raises UserError for a damaged file.
    """
    found = _find(folder, split)
    if not found and split == "eval":
        found = _find(folder, "train")
    if not found:
        _refuse_pickles(folder)
        return None
    names, paths = found
    if names is None:
        return _read_mnist(folder, paths)
    return _read_cifar(names, paths)


def _find(folder, split):
    """Return the path of the class names, None for IDX, and the files of a split; or None without any."""
    paths = sorted(folder.iterdir())
    for name, patterns in CIFAR_NAMES.items():
        batches = [path for path in paths if re.fullmatch(patterns[split], path.name)]
        if batches and (folder / name).is_file():
            return folder / name, batches
    idx = [path for path in paths if re.fullmatch(IDX_NAME.format(SPLITS[split]), path.name)]
    if len(idx) >= 2:
        return None, idx
    return None


def _refuse_pickles(folder):
    is_cifar_10 = (folder / "batches.meta").is_file()
    is_cifar_100 = (folder / "meta").is_file() and (folder / "train").is_file()
    if is_cifar_10 or is_cifar_100:
        raise UserError(
            f"{folder} contains the Python version of CIFAR, and reading it could execute code: "
            "download the binary version, such as cifar-10-binary.tar.gz"
        )


def _read_cifar(names, paths):
    classes = names.read_text().split()
    num_labels = NUM_LABELS[names.name]
    num_bytes = num_labels + int(np.prod(CIFAR_SHAPE))
    parts = []
    for path in paths:
        content = np.fromfile(path, np.uint8)
        if len(content) == 0 or len(content) % num_bytes:
            raise UserError(
                f"{path} has {len(content)} bytes, expected a multiple of {num_bytes}: "
                "it is truncated, or no file of CIFAR"
            )
        parts.append(content.reshape(-1, num_bytes))
    rows = np.concatenate(parts)
    labels = rows[:, num_labels - 1].astype(np.int64)  # of CIFAR-100's two labels the second is the class
    if labels.max() >= len(classes):
        raise UserError(
            f"{paths[0].parent} has the label {labels.max()}, but {names.name} has {len(classes)} names"
        )
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
        raise UserError(f"{folder} has {paths[0].name} and {paths[1].name}: expected images and labels")
    images, labels = (_read_idx(found[kind]) for kind in ("images", "labels"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or len(images) == 0:
        raise UserError(
            f"{found['images']} has the shape {images.shape} and {found['labels'].name} {labels.shape}: "
            "expected (n, height, width) and (n,)"
        )
    classes, indices = np.unique(labels, return_inverse=True)
    return images[..., np.newaxis], indices.astype(np.int64), [str(name) for name in classes]


def _read_idx(path):
    """Return the array of bytes in an IDX file. Raises UserError if it is damaged."""
    is_compressed = path.suffix == ".gz"
    opener = gzip.open if is_compressed else open
    limit = path.stat().st_size * (MAX_COMPRESSION if is_compressed else 1)
    try:
        with opener(path, "rb") as file:
            header = np.frombuffer(file.read(4), np.uint8)
            if len(header) < 4 or header[:3].tolist() != [0, 0, 8]:
                raise UserError(f"{path} is no IDX file of bytes: it begins with {header.tolist()}")
            shape = np.frombuffer(file.read(4 * int(header[3])), ">u4").astype(np.int64).tolist()
            count = int(np.prod(shape, dtype=object))
            content = b""
            if count <= limit:  # otherwise the header is wrong, and reading it might fill the memory
                content = file.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(shape) != header[3] or len(content) != count:
        raise UserError(f"{path} does not have the {count} bytes of shape {shape} that it announces")
    return np.frombuffer(content, np.uint8).reshape(shape)
