"""Reading images: class folders, records, arrays, downloaded data sets, or the digits of scikit-learn."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from argparse import Namespace
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import decoder, image_archives, machine
from common.datasets import ArrayDataset, check_apart, hold_out
from common.errors import UserError, first_line, read_count
from common.image_files import ImageFiles, Source
from common.report import log, log_left_out, shortened

EXTENSIONS: tuple[str, ...] = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".apng",
    ".webp",
    ".bmp",
    ".dib",
    ".gif",
)
EXTENSIONS += (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".avif", ".mpo", ".pcx")
EXTENSIONS += (".jp2", ".j2k", ".jpx")
EXPECTED = "expected one folder per class with images, one .npz file, "
EXPECTED += "{0}_data.npy and {0}_labels.npy, or the files of CIFAR (binary) or MNIST"
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}  # rarely classes
MAX_SHOWN = 10  # classes in the log
MAX_LABEL = 2**53  # above it a floating-point number is not exact
OWN_VALIDATION = "the validation data in --train"  # instead of a flag, for messages
KINDS = {"train": "training", "eval": "validation"}  # for messages
# Words in the names of record files that are not for training, by split.
RECORD_SPLITS = {
    "validation": "eval",
    "valid": "eval",
    "val": "eval",
    "eval": "eval",
    "test": "test",
    "testing": "test",
}


class Channel(NamedTuple):
    """A folder with data, and how to read it.

    Attributes:
        flag: the flag that names it, for messages.
        folder: its path.
        stem: "train" or "eval", the prefix of the names of its files.
        image_size: of `--image-size`, or None.
        size: (width, height) to which images in files are resized; None: that of the first one.
        memory: bytes for decoded images.
        record_file: see `load_images`.
    """

    flag: str
    folder: Path
    stem: str
    image_size: int | None
    size: tuple[int, int] | None
    memory: float
    record_file: Any


def load_images(args: Namespace, record_file: Any = None) -> tuple[ArrayDataset, ArrayDataset]:
    """Return the training and the validation data set that the flags name, as a pair of `ArrayDataset`.

    Without `--validation` the validation data in the folder `--train` are used if there are any; otherwise a
    tenth of the training images, drawn with the seed, is held out.

    Args:
        args: the flags.
        record_file: the class of a framework for files that contain many images, or None. An object
            `record_file(path)` has the integer array `labels`, the list `sizes` of the encoded images in
            bytes, the dictionary `names` of the class names by label, which may be empty, and the method
            `read(index)`, which returns the bytes of an image. The class has `is_one(name)`, which returns
            whether the name is that of such a file, `EXPECTED`, which describes the format, and `COMPANIONS`,
            the suffixes of files that may be beside them.

    Raises UserError if the folders do not contain what is expected.
    """
    size = None
    if args.image_size:
        size = (args.image_size, args.image_size)
    free = _memory_for_images()
    channel = Channel("--train", args.train, "train", args.image_size, size, free, record_file)
    if args.train is None:
        images, labels, classes = _digits(args.image_size)
    else:
        images, labels, classes = _read_channel(channel)
    if len(classes) < 2:
        raise UserError(f"--train {args.train} has one class only ({classes[0]}): expected two or more")
    if isinstance(images, ImageFiles):
        check_apart(args.train, args.validation)
    flag, validation_folder = "--validation", args.validation
    if validation_folder is None and args.train and _has_validation_data(channel):
        flag, validation_folder = OWN_VALIDATION, args.train
        log(f"No --validation folder: using the validation or test data in --train {args.train}")
    if validation_folder is None:
        if args.train:
            log("No --validation folder: a tenth of the training images is held out")
        validation_indices, train_indices = hold_out(labels, args.seed)
        train = ArrayDataset(images, labels, classes, train_indices)
        validation = ArrayDataset(images, labels, classes, validation_indices)
    else:
        train = ArrayDataset(images, labels, classes)
        if isinstance(images, ImageFiles):
            free -= images.kept_bytes
        channel = channel._replace(
            flag=flag,
            folder=validation_folder,
            stem="eval",
            size=images.shape[2:0:-1],
            memory=max(0, free),
        )
        validation = _read_validation(channel, images.shape, classes)
    _log_data(train, validation)
    return train, validation


def _log_data(train, validation):
    images = train.images
    parts = {id(dataset.images): dataset.images for dataset in (train, validation)}.values()
    megabytes = sum(part.nbytes for part in parts) / 1e6
    place = f"{megabytes:.1f} MB of {images.dtype} in memory"
    if isinstance(images, np.memmap):
        place = f"{megabytes:.1f} MB of {images.dtype} on disk"
    if isinstance(images, ImageFiles):
        kept = sum(part.kept_bytes for part in parts if isinstance(part, ImageFiles)) / 1e6
        place = f"decoded when first needed: {megabytes:.1f} MB"
        if kept < megabytes:
            place += f", of which {kept:.1f} MB stay in memory, and the rest are decoded in each epoch"
    log(
        f"Data: {len(train)} training and {len(validation)} validation images of shape {images.shape[1:]}, "
        f"{len(train.classes)} classes, {place}"
    )
    counts = np.bincount(train.labels[train.indices], minlength=len(train.classes)).tolist()
    found = [f"{name} {count}" for name, count in zip(train.classes, counts)]
    log(f"Training images: {shortened(found, MAX_SHOWN)}")


def random_crop_and_flip(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return images (n, height, width, channels), shifted at random, and about half of them mirrored.

    The shift is up to an eighth of the size; the border is black. This is the augmentation of "Deep Residual
    Learning for Image Recognition", https://arxiv.org/abs/1512.03385.

    Args:
        images: the batch.
        rng: NumPy's random generator.
    """
    count, height, width, channels = images.shape
    margin_y = max(1, height // 8)
    margin_x = max(1, width // 8)
    top = rng.integers(0, 2 * margin_y + 1, count)
    left = rng.integers(0, 2 * margin_x + 1, count)
    flip = rng.integers(0, 2, count).astype(bool)

    row = width * channels  # a row of pixels as one dimension, to copy it in one piece
    margin = margin_x * channels
    padded = np.zeros((count, height + 2 * margin_y, row + 2 * margin), images.dtype)
    padded[:, margin_y:-margin_y, margin:-margin] = images.reshape(count, height, row)
    windows = np.lib.stride_tricks.sliding_window_view(  # type: ignore[call-overload]
        padded, (height, row), axis=(1, 2)
    )
    rows = windows[np.arange(count), top, left * channels]
    columns = np.arange(row).reshape(width, channels)
    mirrored = columns[::-1].ravel()
    rows[flip] = rows[flip].take(mirrored, axis=2)
    return rows.reshape(images.shape)


def _digits(image_size):
    from sklearn.datasets import load_digits

    log("No --train folder: using the handwritten digits that come with scikit-learn")
    digits = load_digits()
    pixels = digits.images * (255 / 16)
    images = pixels.round().astype(np.uint8)[..., np.newaxis]
    images = _resize(images, image_size)
    classes = [str(name) for name in digits.target_names]
    return images, digits.target.astype(np.int64), classes


def _read_validation(channel, train_shape, class_names):
    place = f"{channel.flag} {channel.folder}"
    images, labels, found = _read_channel(channel)
    if strange := sorted(set(found) - set(class_names)):
        raise UserError(f"{place} has classes that --train lacks: {', '.join(strange)}")
    if images.shape[1:] != train_shape[1:]:
        raise UserError(
            f"{place} has images of shape {images.shape[1:]}, "
            f"but those of --train have {train_shape[1:]}: pass --image-size to resize both"
        )
    indices = [class_names.index(name) for name in found]
    return ArrayDataset(images, np.array(indices, dtype=np.int64)[labels], class_names)


def _read_channel(channel):
    """Return images, labels and class names of one channel."""
    folder, stem = channel.folder, channel.stem
    expected = EXPECTED.format(stem)
    if channel.record_file:
        expected += f", or {channel.record_file.EXPECTED}"
    if not folder.is_dir():
        raise UserError(f"{channel.flag} {folder} is not a folder: {expected}")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if paths := _find_arrays(folder, stem):
        return _read_arrays(channel, paths)
    if archive := image_archives.read(folder, stem):
        images, labels, classes = archive
        return _resize(images, channel.image_size), labels, classes
    if channel.record_file and (found := _read_records(channel, entries)):
        return found
    return _read_class_folders(channel, entries, expected)


def _has_validation_data(channel):
    """Return whether the folder `--train` also contains files with validation data."""
    folder = channel.folder
    if _find_arrays(folder, "train"):
        return False
    if image_archives.has_data(folder, "train"):
        return image_archives.has_data(folder, "eval")
    if channel.record_file is None:
        return False
    splits = _find_records(channel, folder.iterdir())
    return "train" in splits and len(splits) > 1


def _find_arrays(folder, stem):
    """Return the .npz file of a folder, or its two .npy files, as a list; empty if there are none."""
    archives = [path for path in folder.glob("*.npz") if path.name[0] != "." and path.is_file()]
    if len(archives) == 1:
        return archives
    pair = [folder / f"{stem}_data.npy", folder / f"{stem}_labels.npy"]
    return pair if all(path.is_file() for path in pair) else []


def _read_arrays(channel, paths):
    """Return images, labels and class names of the files that `_find_arrays` returns."""
    if len(paths) == 1:
        with _readable(paths[0]), np.load(paths[0], allow_pickle=False) as archive:
            if not {"x", "y"} <= set(archive.files):
                raise UserError(f"{paths[0]} has {', '.join(archive.files)}: expected arrays named x and y")
            if sum(member.file_size for member in archive.zip.infolist()) > machine.available_memory():
                raise MemoryError  # a small file may contain many equal pixels
            return _check_arrays(channel, paths[0], archive["x"], archive["y"])
    with _readable(paths[0]):
        fits = paths[0].stat().st_size < machine.available_memory() / 2
        mode = None if fits else "r"
        images = np.load(paths[0], mmap_mode=mode, allow_pickle=False)
        labels = np.load(paths[1], allow_pickle=False)
    return _check_arrays(channel, paths[0], images, labels)


def _read_class_folders(channel, entries, expected):
    flag, folder = channel.flag, channel.folder
    left_out = [path.name for path in entries if not path.is_dir()]
    classes = {path.name: _find_files(path, left_out) for path in entries if path.is_dir()}
    if empty := [name for name, files in classes.items() if not files]:
        log(f"Skipping the folders without images in {flag} {folder}: {', '.join(empty)}")
    classes = {name: files for name, files in classes.items() if files}
    if not classes:
        names = ", ".join(path.name for path in entries[:5]) or "nothing"
        raise UserError(f"{flag} {folder} contains {names}: {expected}")
    log_left_out(flag, folder, left_out, "images")
    _check_class_names(flag, folder, classes)
    files = [file for found in classes.values() for file in found]
    counts = [len(found) for found in classes.values()]
    labels = np.repeat(np.arange(len(classes)), counts)
    names, sizes = zip(*files)

    def read(index):
        with open(f"{folder}/{names[index]}", "rb", buffering=0) as file:
            return file.read()

    images = _image_files(channel, Source(folder, names, sizes, read))
    return images, labels.astype(np.int64), list(classes)


def _check_class_names(flag, folder, classes):
    """Raise UserError for folders that are not classes, or whose names are not UTF-8."""
    splits = [name for name in classes if name.lower() in SPLITS]
    if len(splits) == len(classes) or {name.lower()[:2] for name in splits} >= {"tr", "va"}:
        raise UserError(
            f"{flag} {folder} contains the folders {', '.join(splits)}, which look like data sets: "
            f"pass one of them, such as {flag} {folder / splits[0]}"
        )
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{flag} {folder} has a class folder named {os.fsencode(name)}, which is not UTF-8: rename it"
            ) from error


def _find_records(channel, entries):
    """Return the record files of a folder by split: "train", "eval" or "test", by their names."""
    splits = {}
    for path in sorted(entries):
        if path.name.startswith(".") or not channel.record_file.is_one(path.name) or not path.is_file():
            continue
        words = re.split("[^a-z]+", path.name.lower())
        found = {RECORD_SPLITS[word] for word in words if word in RECORD_SPLITS}
        split = found.pop() if len(found) == 1 else "train"
        splits.setdefault(split, []).append(path)
    return splits


def _read_records(channel, entries):
    """Return images, labels and class names of the record files in a folder; None if there are none."""
    splits = _find_records(channel, entries)
    if not splits:
        return None
    # In a folder with several splits each channel reads its own; otherwise the names do not matter.
    order = ("train", "eval", "test") if channel.stem == "train" else ("eval", "test", "train")
    paths = next(splits[split] for split in order if split in splits)
    if channel.flag != OWN_VALIDATION:
        others = [path for path in entries if path not in paths]
        left_out = [path.name for path in others if path.suffix not in channel.record_file.COMPANIONS]
        log_left_out(channel.flag, channel.folder, left_out, f"its {KINDS[channel.stem]} data")
    gigabytes = sum(path.stat().st_size for path in paths) / 1e9
    log(
        f"Reading the labels of {len(paths)} record files ({gigabytes:.1f} GB) in {channel.flag} "
        f"{channel.folder}, such as {paths[0].name}"
    )
    records = [channel.record_file(path) for path in paths]
    labels = np.concatenate([record.labels for record in records])
    if len(labels) == 0:
        raise UserError(f"{channel.flag} {channel.folder} has record files without any images")
    labels, indices = np.unique(labels, return_inverse=True)
    images = _image_files(channel, _record_source(channel.folder, records))
    return images, indices.astype(np.int64), _record_classes(labels.tolist(), records)


def _record_source(folder, records):
    """Return the Source of the images in record files."""
    firsts = np.cumsum([0, *(len(record.labels) for record in records)])
    names, sizes = [], array("q")
    for record in records:
        names += [f"{record.path.name}, record {index}" for index in range(len(record.labels))]
        sizes += record.sizes

    def read(index):
        number = int(np.searchsorted(firsts, index, side="right")) - 1
        return records[number].read(index - int(firsts[number]))

    return Source(folder, names, sizes, read)


def _record_classes(labels, records):
    """Return the class names of labels: those of the records, if each label has its own, or the labels."""
    pairs = {pair for record in records for pair in record.names.items()}
    names = dict(pairs)
    if len(names) == len(pairs) and set(labels) <= set(names) and len(set(names.values())) == len(names):
        return [names[label] for label in labels]
    return [str(label) for label in labels]


def _image_files(channel, source):
    is_resizing = channel.image_size is not None
    return ImageFiles(source, channel.size, channel.memory, is_resizing)


def _find_files(folder, left_out):
    """Return the image files below a class folder: a list of (path from the parent of the folder, bytes).

    They are in order, folder by folder, without hidden files. The names of other files are added to the list
    `left_out`. Links to folders are followed, each folder once.
    """
    found = []
    visited = set()
    waiting = [folder.name]
    while waiting:
        parent = waiting.pop()
        place = os.stat(folder.parent / parent)
        if (place.st_dev, place.st_ino) in visited:
            continue
        visited.add((place.st_dev, place.st_ino))
        with os.scandir(folder.parent / parent) as entries:  # pathlib would be much slower
            entries = sorted(entries, key=lambda entry: entry.name)
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{parent}/{entry.name}"
            if entry.is_dir():
                folders.append(path)
            elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                found.append((path, entry.stat().st_size))
            else:
                left_out.append(entry.name)
        waiting += reversed(folders)
    return found


def _check_arrays(channel, path, images, labels):
    """Return arrays from a file in the form of an ArrayDataset. Raises UserError if that is impossible."""
    if images.ndim == 3:
        images = images[..., np.newaxis]
    are_images = images.ndim == 4 and 0 not in images.shape[1:]
    if not are_images or images.dtype.kind not in "uif":
        raise UserError(
            f"{path} contains images as {images.dtype} of shape {images.shape}: "
            "expected numbers of shape (n, height, width) or (n, height, width, channels)"
        )
    if images.shape[3] > 4 and images.shape[1] in (1, 3):
        raise UserError(f"{path} contains images of shape {images.shape}: expected the channels last")
    labels = np.atleast_1d(labels)
    if len(images) != len(labels) or labels.size != len(labels):
        raise UserError(
            f"{path} contains {len(images)} images, but the labels have shape {labels.shape}: "
            "expected one integer per image"
        )
    if len(images) == 0:
        raise UserError(f"{path} contains no images")
    labels = labels.ravel()
    are_numbers = labels.dtype.kind in "uif" and np.isfinite(labels).all()
    if not are_numbers or (labels != np.floor(labels)).any():
        raise UserError(f"{path} has labels that are not integers ({labels.dtype}, such as {labels[0]!r})")
    if np.abs(labels).max() > MAX_LABEL:
        raise UserError(f"{path} has the label {labels[np.abs(labels).argmax()]:g}: expected small integers")
    names, indices = np.unique(labels.astype(np.int64), return_inverse=True)
    if images.dtype != np.uint8:
        images = images.astype(np.float32, copy=False)
        if not np.isfinite(images).all():
            raise UserError(
                f"{path} contains images with values that are infinite or not a number: expected finite ones"
            )
    images = _resize(images, channel.image_size)
    classes = [str(name) for name in names]
    return images, indices.astype(np.int64), classes


def _resize(images, size):
    """Return images (n, height, width, channels) as (n, size, size, channels), if there is a size.

    They are cropped around the centre if they are not square.
    """
    if not size or images.shape[1:3] == (size, size):
        return images
    from PIL import Image

    num_channels = images.shape[3]
    resized = _allocate((len(images), size, size, num_channels), images.dtype)
    for image, target in zip(images, resized):
        for channel in range(num_channels):
            plane = Image.fromarray(image[..., channel])
            target[..., channel] = decoder.fit(plane, (size, size))
    return resized


def _allocate(shape, dtype):
    """Return an empty array in memory, or in a temporary file if it does not fit."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if num_bytes < machine.available_memory() / 2:
        return np.empty(shape, dtype)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the array exists
    if hasattr(os, "posix_fallocate"):  # not on macOS; a full disk raises an error now, not later
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    return np.memmap(file, dtype, shape=shape)


def _memory_for_images():
    """Return the bytes that decoded images may take in this process: half of the free memory."""
    num_processes = read_count("LOCAL_WORLD_SIZE", 1)  # torchrun's, on this host
    return max(0, machine.available_memory() / 2 / max(1, num_processes))


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"cannot read {path}: it does not fit into memory") from error
    except Exception as error:  # NumPy and zipfile have many types for a damaged file
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
