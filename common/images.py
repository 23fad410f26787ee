"""Reading image data: class folders, `.npz` files, pairs of `.npy` files, or the digits that come with scikit-learn."""

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import cluster, decoder
from common.errors import UserError
from common.report import log

EXTENSIONS = (".jpg", ".jpeg", ".png")
EXPECTED = "expected one folder per class with .jpg or .png files, one .npz file, or {0}_data.npy and {0}_labels.npy"


class Rows:
    """Some rows of an array, picked by their indices without copying the array."""

    def __init__(self, array, indices):
        self.array, self.indices, self.dtype = array, indices, array.dtype
        self.shape = (len(indices), *array.shape[1:])

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        return self.array[self.indices[key]]


class Dataset(NamedTuple):
    """Images as uint8 or float32 arrays (n, height, width, channels), labels as int64 arrays (n,) of class indices."""

    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    class_names: list

    @property
    def image_shape(self):
        """(height, width, channels)."""
        return tuple(self.train_images.shape[1:])

    def channel_statistics(self):
        """Return mean and standard deviation of each channel over the training images, as two float32 arrays."""
        count, total, squares = 0, 0.0, 0.0
        rows = max(1, 2**20 // math.prod(self.image_shape))  # parts of some megabytes: no float copy of all the images
        for start in range(0, self.train_images.shape[0], rows):
            part = self.train_images[start : start + rows].astype(np.float64)
            count += part[..., 0].size
            total, squares = total + part.sum((0, 1, 2)), squares + (part**2).sum((0, 1, 2))
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)

    def describe_content(self):
        """Return facts, as plain values, that are the same on all workers where all have the same data."""
        facts = {"class names": self.class_names}
        for name, images, labels in (("training", *self[:2]), ("validation", *self[2:4])):
            facts[f"shape of the {name} images"] = list(images.shape)
            facts[f"checksum of the {name} labels"] = zlib.crc32(np.ascontiguousarray(labels))
            facts[f"checksum of the first {name} images"] = zlib.crc32(np.ascontiguousarray(images[:16]))
        return facts

    def describe_job(self, args, optimizer):
        """Return what a checkpoint must have in common with the run that resumes from it."""
        return {
            "--model": args.model,
            "optimizer": type(optimizer).__name__,
            "--batch-size": args.batch_size,
            "--seed": args.seed,
            "number of training images": len(self.train_labels),
            "number of classes": len(self.class_names),
            "class names": self.class_names,
            "image shape": list(self.image_shape),
        }


def load_images(args):
    """Read the training and validation images that the flags name, all at once, as a Dataset.

    Without `--validation` a tenth of the training images, drawn with the seed, is held out.
    Raises UserError where the folders do not hold what is expected.
    """
    if args.train is None:
        images, labels, class_names = _digits(args)
    else:
        images, labels, class_names = _read_folder(args, args.train, "--train", "train")
    if len(class_names) < 2:
        raise UserError(
            f"--train {args.train} has one class only ({class_names[0]}): expected two or more to tell apart"
        )
    if args.validation is None:
        order = np.random.default_rng((args.seed, 0)).permutation(len(labels))
        held_out, kept = np.split(order, [max(1, len(order) // 10)])
        data = Dataset(Rows(images, kept), labels[kept], Rows(images, held_out), labels[held_out], class_names)
    else:
        data = Dataset(images, labels, *_read_validation(args, images.shape, class_names), class_names)
    if len(data.validation_labels) < cluster.size:
        raise UserError(
            f"{len(data.validation_labels)} validation samples for {cluster.size} workers: expected one for each"
        )
    num_images = len(data.train_labels) + len(data.validation_labels)
    megabytes = num_images * images[0].nbytes / 1e6
    log(
        f"Data: {len(data.train_labels)} training and {len(data.validation_labels)} validation images of shape "
        f"{data.image_shape}, {len(class_names)} classes, {megabytes:.1f} MB of {images.dtype} "
        f"{'on disk' if isinstance(images, np.memmap) else 'in memory'}"
    )
    return data


def _digits(args):
    from sklearn.datasets import load_digits

    log("No --train folder: using the handwritten digits that come with scikit-learn")
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)[..., np.newaxis]
    return _resize(images, args.image_size), digits.target.astype(np.int64), [str(name) for name in digits.target_names]


def _read_validation(args, train_shape, class_names):
    images, labels, found = _read_folder(args, args.validation, "--validation", "eval")
    if strange := sorted(set(found) - set(class_names)):
        raise UserError(f"--validation {args.validation} has classes that --train lacks: {', '.join(strange)}")
    if images.shape[1:] != train_shape[1:]:
        raise UserError(
            f"--validation {args.validation} has images of shape {images.shape[1:]}, but those of --train have "
            f"{train_shape[1:]}: pass --image-size to resize both"
        )
    return images, np.array([class_names.index(name) for name in found], dtype=np.int64)[labels]


def _read_folder(args, folder, flag, stem):
    """Return images, labels and class names of one channel folder."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder: {EXPECTED.format(stem)}")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    archives = [path for path in entries if path.suffix == ".npz"]
    pair = folder / f"{stem}_data.npy", folder / f"{stem}_labels.npy"
    if len(archives) == 1:
        with _readable(archives[0]), np.load(archives[0], allow_pickle=False) as archive:
            if not {"x", "y"} <= set(archive.files):
                raise UserError(f"{archives[0]} holds {', '.join(archive.files)}: expected arrays named x and y")
            return _check_arrays(args, archives[0], archive["x"], archive["y"])
    if all(path.is_file() for path in pair):
        with _readable(pair[0]):
            fits = pair[0].stat().st_size < _available_memory() / 2
            images = np.load(pair[0], mmap_mode=None if fits else "r", allow_pickle=False)
            labels = np.load(pair[1], allow_pickle=False)
        return _check_arrays(args, pair[0], images, labels)
    classes = {path.name: _image_files(path) for path in entries if path.is_dir()}
    if empty := [name for name, files in classes.items() if not files]:
        log(f"Skipping the folders without {', '.join(EXTENSIONS)} files in {flag} {folder}: {', '.join(empty)}")
    classes = {name: files for name, files in classes.items() if files}
    if not classes:
        names = ", ".join(path.name for path in entries[:5]) or "nothing"
        raise UserError(f"{flag} {folder} holds {names}: {EXPECTED.format(stem)}")
    files = [file for paths in classes.values() for file in paths]
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])
    return _decode(args, flag, folder, files), labels.astype(np.int64), list(classes)


def _check_arrays(args, path, images, labels):
    """Return arrays from a file in the form of a Dataset's, or say what is wrong with them."""
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.ndim != 4 or images.dtype.kind not in "uif" or 0 in images.shape[1:]:
        raise UserError(
            f"{path} holds images as {images.dtype} of shape {images.shape}: "
            "expected numbers of shape (n, height, width) or (n, height, width, channels)"
        )
    if images.shape[3] > 4 and images.shape[1] in (1, 3):
        raise UserError(f"{path} holds images of shape {images.shape}: expected the channels last, not first")
    labels = np.atleast_1d(labels)
    if len(images) != len(labels) or labels.size != len(labels):
        raise UserError(
            f"{path} holds {len(images)} images, but the labels have shape {labels.shape}: "
            "expected one integer per image"
        )
    if len(images) == 0:
        raise UserError(f"{path} holds no images: expected some")
    labels = labels.ravel()
    if labels.dtype.kind not in "uif" or not np.isfinite(labels).all() or (labels != np.floor(labels)).any():
        raise UserError(f"{path} has labels that are not integers ({labels.dtype}, such as {labels[0]!r})")
    names, indices = np.unique(labels.astype(np.int64), return_inverse=True)
    if images.dtype != np.uint8:
        images = images.astype(np.float32, copy=False)
        if not np.isfinite(images).all():
            raise UserError(f"{path} holds images with values that are infinite or not a number: expected finite ones")
    return _resize(images, args.image_size), indices.astype(np.int64), [str(name) for name in names]


def _image_files(folder):
    """Return the names of the image files anywhere below `folder`, folder by folder in order, hidden ones left out."""
    found = []
    for parent, folders, names in os.walk(folder):  # pathlib would take as long as decoding small images
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = [name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
        found += [f"{parent}/{name}" for name in sorted(images)]
    return found


def _decode(args, flag, folder, files):
    """Return image files as one uint8 array (n, height, width, 3), read by all cores."""
    first = _open(files[0]).size
    size = (args.image_size, args.image_size) if args.image_size else first
    log(f"Reading {len(files)} images from {flag} {folder}")
    if all(file.lower().endswith((".jpg", ".jpeg")) for file in files) and importlib.util.find_spec("simplejpeg"):
        images, finished = _read_jpegs(files, size, args.image_size, first)
    else:
        images, finished = _read_with_pillow(files, size, args.image_size)
    for index in np.flatnonzero(~finished):
        image = _open(files[index])
        if image.size != size and not args.image_size:
            raise UserError(
                f"{flag} has images of different sizes: {files[0]} is {size[0]}x{size[1]} and {files[index]} is "
                f"{image.width}x{image.height}: pass --image-size to resize them all"
            )
        images[index] = image.resize(size) if image.size != size else image
    return images


def _read_jpegs(files, size, resize, first):
    """Return the pixels of JPEG files and which were read, by threads of their own; `first` is the first one's size."""
    images, _ = _allocate((len(files), size[1], size[0], 3), np.uint8)
    finished, waiting = np.zeros(len(files), bool), deque(range(len(files)))

    def read():
        with contextlib.suppress(IndexError):  # none is waiting any more
            while True:
                index = waiting.popleft()
                finished[index] = _read_jpeg(files[index], images[index], resize)

    # Decoding 1,000 pixels takes as long as what is done to a file under Python's lock, where threads take turns.
    count = min(len(os.sched_getaffinity(0)), max(1, math.prod(first) // 1000))
    with ThreadPoolExecutor(count) as pool:
        try:
            for thread in [pool.submit(read) for _ in range(count)]:
                thread.result()
        finally:
            waiting.clear()  # nobody wants them after a signal
    return images, finished


def _read_jpeg(file, pixels, resize):
    """Put an image into the array `pixels` (height, width, 3) and return whether that was possible."""
    import simplejpeg
    from PIL import Image

    try:
        descriptor = os.open(file, os.O_RDONLY)  # `open` would ask the system twice as often
        try:
            content = os.read(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors not in ("YCbCr", "Gray"):
            return False
        if (height, width) == pixels.shape[:2]:
            simplejpeg.decode_jpeg(content, buffer=pixels)
        elif resize and height * width <= Image.MAX_IMAGE_PIXELS:
            pixels[:] = Image.fromarray(simplejpeg.decode_jpeg(content)).resize(pixels.shape[1::-1])
        else:
            return False
    except (OSError, ValueError):
        return False  # Pillow reads more than this, and tells what is wrong
    return True


def _read_with_pillow(files, size, resize):
    """Return the pixels of image files and which were read, by a process for each core: threads would take turns."""
    images, place = _allocate((len(files), size[1], size[0], 3), np.uint8, shared=True)
    finished = np.zeros(len(files), bool)
    count = min(len(os.sched_getaffinity(0)), len(files) // 100)  # a process starts in the time of some hundred images
    with contextlib.ExitStack() as stack:
        shares = ((files[first::count], range(first, len(files), count)) for first in range(count))
        processes = [stack.enter_context(_start_decoder(*share, size, resize, place)) for share in shares]
        for first, process in enumerate(processes):
            finished[first::count][: int(process.stdout.read() or 0)] = True
    return images, finished


def _start_decoder(files, indices, size, resize, place):
    """Return a process that writes the pixels of the files to the file `place`: see `decoder.py`."""
    numbers = [*size, int(bool(resize)), place.fileno(), indices.start, indices.step]
    command = [sys.executable, decoder.__file__, *map(str, numbers)]
    with tempfile.TemporaryFile() as names:
        names.write(b"\0".join(map(os.fsencode, files)))
        names.seek(0)
        pipes = {"stdin": names, "stdout": subprocess.PIPE, "pass_fds": [place.fileno()]}
        return subprocess.Popen(command, **pipes)  # noqa: S603 - nothing in it is from outside


def _open(path):
    """Return the image at `path` in colour."""
    from PIL import Image

    try:
        return decoder.open_image(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {error}. Replace or delete it") from error


def _resize(images, size):
    """Return (n, height, width, channels) images resized to (n, size, size, channels); no size: as they are."""
    if not size or images.shape[1:3] == (size, size):
        return images
    from PIL import Image

    resized, _ = _allocate((len(images), size, size, images.shape[3]), images.dtype)
    for image, target in zip(images, resized):
        for channel in range(images.shape[3]):
            target[..., channel] = Image.fromarray(image[..., channel]).resize((size, size), Image.BILINEAR)
    return resized


def _allocate(shape, dtype, shared=False):
    """Return an empty array in memory, or on disk where it does not fit there, and the file that `shared` ones are."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    fits = num_bytes < _available_memory() / 2
    if fits and not shared:
        return np.empty(shape, dtype), None  # in large pages, which makes it four times as fast to fill
    if fits:
        file = open(os.memfd_create("images"), "r+b")  # noqa: SIM115 - it lives as long as the array
        return np.asarray(np.memmap(file, dtype, shape=shape)), file
    file = tempfile.TemporaryFile()  # noqa: SIM115
    os.posix_fallocate(file.fileno(), 0, num_bytes)  # a full disk is an error now, not a crash later
    return np.memmap(file, dtype, shape=shape), file


def _available_memory():
    """Return the free memory in bytes; without Linux's own figure, no limit."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return float("inf")


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from error
