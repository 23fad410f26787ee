"""Reading images: class folders, `.npz` files, pairs of `.npy` files, or the digits of scikit-learn."""

import contextlib
import importlib.util
import io
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import decoder
from common.datasets import ArrayDataset, check_apart, hold_out
from common.errors import UserError
from common.report import log, log_left_out

JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif")
EXTENSIONS = (
    *JPEG_EXTENSIONS,
    ".png",
    ".webp",
    ".bmp",
    ".dib",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
)
EXTENSIONS += (".tga", ".ico", ".jp2", ".avif", ".mpo", ".pcx")
EXPECTED = "expected one folder per class with images, one .npz file, or {0}_data.npy and {0}_labels.npy"
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}  # no classes, likely


# Limit and use of the memory of a container, for both versions of Linux's control groups.
CONTAINER_MEMORY = [
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


def load_images(args):
    """Return the training and the validation data set that the flags name, as a pair of `ArrayDataset`.

    Without `--validation` a tenth of the training images, drawn with the seed, is held out.
    Raises UserError if the folders do not contain what is expected.
    """
    if args.train is None:
        images, labels, classes = _digits(args)
    else:
        images, labels, classes = _read_folder(args, args.train, "--train", "train")
    if len(classes) < 2:
        raise UserError(
            f"--train {args.train} has one class only ({classes[0]}): expected two or more to tell apart"
        )
    train_indices = validation_indices = None
    if args.validation is None:
        validation_indices, train_indices = hold_out(labels, args.seed)
        validation_images, validation_labels = images, labels
    else:
        validation_images, validation_labels = _read_validation(args, images.shape, classes)
    train = ArrayDataset(images, labels, classes, train_indices)
    validation = ArrayDataset(validation_images, validation_labels, classes, validation_indices)
    num_images = len(train) + len(validation)
    megabytes = num_images * images[0].nbytes / 1e6
    log(
        f"Data: {len(train)} training and {len(validation)} validation images of shape {images.shape[1:]}, "
        f"{len(classes)} classes, {megabytes:.1f} MB of {images.dtype} "
        f"{'on disk' if isinstance(images, np.memmap) else 'in memory'}"
    )
    return train, validation


def random_crop_and_flip(images, rng):
    """Return images (n, height, width, channels), shifted at random, and about every second one mirrored.

    The shift is up to an eighth of the size; black moves in. This is the augmentation of "Deep Residual
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

    row = width * channels  # a row of pixels as one dimension: it is copied in one piece
    margin = margin_x * channels
    padded = np.zeros((count, height + 2 * margin_y, row + 2 * margin), images.dtype)
    padded[:, margin_y:-margin_y, margin:-margin] = images.reshape(count, height, row)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, row), axis=(1, 2))
    rows = windows[np.arange(count), top, left * channels]
    columns = np.arange(row).reshape(width, channels)
    mirrored = columns[::-1].ravel()
    rows[flip] = rows[flip].take(mirrored, axis=2)
    return rows.reshape(images.shape)


def _digits(args):
    from sklearn.datasets import load_digits

    log("No --train folder: using the handwritten digits that come with scikit-learn")
    digits = load_digits()
    pixels = digits.images * (255 / 16)
    images = pixels.round().astype(np.uint8)[..., np.newaxis]
    images = _resize(images, args.image_size)
    classes = [str(name) for name in digits.target_names]
    return images, digits.target.astype(np.int64), classes


def _read_validation(args, train_shape, class_names):
    images, labels, found = _read_folder(args, args.validation, "--validation", "eval")
    if strange := sorted(set(found) - set(class_names)):
        raise UserError(
            f"--validation {args.validation} has classes that --train lacks: {', '.join(strange)}"
        )
    if images.shape[1:] != train_shape[1:]:
        raise UserError(
            f"--validation {args.validation} has images of shape {images.shape[1:]}, "
            f"but those of --train have {train_shape[1:]}: pass --image-size to resize both"
        )
    indices = [class_names.index(name) for name in found]
    return images, np.array(indices, dtype=np.int64)[labels]


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
                raise UserError(
                    f"{archives[0]} holds {', '.join(archive.files)}: expected arrays named x and y"
                )
            return _check_arrays(args, archives[0], archive["x"], archive["y"])
    if all(path.is_file() for path in pair):
        with _readable(pair[0]):
            fits = pair[0].stat().st_size < _available_memory() / 2
            mode = None if fits else "r"
            images = np.load(pair[0], mmap_mode=mode, allow_pickle=False)
            labels = np.load(pair[1], allow_pickle=False)
        return _check_arrays(args, pair[0], images, labels)
    check_apart(args)
    left_out = [path.name for path in entries if not path.is_dir()]
    classes = {path.name: _image_files(path, left_out) for path in entries if path.is_dir()}
    if empty := [name for name, files in classes.items() if not files]:
        log(f"Skipping the folders without images in {flag} {folder}: {', '.join(empty)}")
    classes = {name: files for name, files in classes.items() if files}
    if classes:
        log_left_out(flag, folder, left_out, "images")
    if classes and {name.lower() for name in classes} <= SPLITS:
        raise UserError(
            f"{flag} {folder} holds the folders {', '.join(classes)}: they look like data sets, not classes; "
            f"pass one of them, such as {flag} {folder / next(iter(classes))}"
        )
    if not classes:
        names = ", ".join(path.name for path in entries[:5]) or "nothing"
        raise UserError(f"{flag} {folder} holds {names}: {EXPECTED.format(stem)}")
    files = [file for paths in classes.values() for file in paths]
    counts = [len(paths) for paths in classes.values()]
    labels = np.repeat(np.arange(len(classes)), counts)
    images = _decode(args, flag, folder, files)
    return images, labels.astype(np.int64), list(classes)


def _check_arrays(args, path, images, labels):
    """Return arrays from a file as those of an ArrayDataset. Raises UserError if that is impossible."""
    if images.ndim == 3:
        images = images[..., np.newaxis]
    are_images = images.ndim == 4 and 0 not in images.shape[1:]
    if not are_images or images.dtype.kind not in "uif":
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
        raise UserError(f"{path} contains no images")
    labels = labels.ravel()
    are_numbers = labels.dtype.kind in "uif" and np.isfinite(labels).all()
    if not are_numbers or (labels != np.floor(labels)).any():
        raise UserError(f"{path} has labels that are not integers ({labels.dtype}, such as {labels[0]!r})")
    names, indices = np.unique(labels.astype(np.int64), return_inverse=True)
    if images.dtype != np.uint8:
        images = images.astype(np.float32, copy=False)
        if not np.isfinite(images).all():
            raise UserError(
                f"{path} holds images with values that are infinite or not a number: expected finite ones"
            )
    images = _resize(images, args.image_size)
    classes = [str(name) for name in names]
    return images, indices.astype(np.int64), classes


def _image_files(folder, left_out):
    """Return the names of the image files below `folder`, folder by folder in order, without hidden ones.

    Other files are added to the list `left_out`. Links to folders are followed, each folder once.
    """
    found = []
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):  # pathlib would be much slower
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in visited:
            folders.clear()
            continue
        visited.add((place.st_dev, place.st_ino))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if name.lower().endswith(EXTENSIONS):
                found.append(f"{parent}/{name}")
            else:
                left_out.append(name)
    return found


def _decode(args, flag, folder, files):
    """Return image files as one uint8 array (n, height, width, 3), read by all cores."""
    first = _open(files[0]).size
    size = (args.image_size, args.image_size) if args.image_size else first
    log(f"Reading {len(files)} images from {flag} {folder}")
    are_jpegs = all(file.lower().endswith(JPEG_EXTENSIONS) for file in files)
    if are_jpegs and importlib.util.find_spec("simplejpeg"):
        images, finished = _read_jpegs(files, size, args.image_size, first)
        num_on_white = 0
    else:
        images, finished, num_on_white = _read_with_pillow(files, size, args.image_size)
    for index in np.flatnonzero(~finished):
        image = _open(files[index])
        num_on_white += decoder.ON_WHITE in image.info
        if image.size != size and not args.image_size:
            raise UserError(
                f"{flag} has images of different sizes: {files[0]} is {size[0]}x{size[1]} "
                f"and {files[index]} is {image.width}x{image.height}: pass --image-size to resize them all"
            )
        if image.size != size:
            image = image.resize(size)
        images[index] = image
    if num_on_white:
        log(f"{num_on_white} images in {flag} {folder} are partly transparent: they are drawn on white")
    return images


def _read_jpegs(files, size, resize, first):
    """Return the pixels of JPEG files, and which were read, by threads; `first` is the size of the first."""
    width, height = size
    images, _ = _allocate((len(files), height, width, 3), np.uint8)
    finished = np.zeros(len(files), bool)
    waiting = deque(range(len(files)))

    def read():
        with contextlib.suppress(IndexError):  # none is waiting any more
            while True:
                index = waiting.popleft()
                finished[index] = _read_jpeg(files[index], images[index], resize)

    # Under Python's lock, where threads take turns, opening a file takes as long as decoding 1,000 pixels.
    num_useful = max(1, math.prod(first) // 1000)
    count = min(len(os.sched_getaffinity(0)), num_useful)
    with ThreadPoolExecutor(count) as pool:
        try:
            for thread in [pool.submit(read) for _ in range(count)]:
                thread.result()
        finally:
            waiting.clear()  # not needed after a signal
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
        if b"Exif\0\0" in content[:4096] and _is_turned(content):
            return _read_turned_jpeg(content, pixels, resize)
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors not in ("YCbCr", "Gray"):
            return False
        if (height, width) == pixels.shape[:2]:
            simplejpeg.decode_jpeg(content, buffer=pixels)
        elif resize and height * width <= Image.MAX_IMAGE_PIXELS:
            image = Image.fromarray(simplejpeg.decode_jpeg(content))
            pixels[:] = image.resize(pixels.shape[1::-1])
        else:
            return False
    except Exception:
        return False  # Pillow reads more kinds of files, and its errors say what is wrong
    return True


def _is_turned(content):
    """Return whether a camera was held sideways when it took this JPEG file."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return image.getexif().get(decoder.ORIENTATION, 1) != 1


def _read_turned_jpeg(content, pixels, resize):
    image = decoder.open_image(io.BytesIO(content))
    size = pixels.shape[1::-1]
    if image.size != size and not resize:
        return False
    pixels[:] = image.resize(size) if image.size != size else image
    return True


def _read_with_pillow(files, size, resize):
    """Return the pixels of image files, which were read, and how many of these were transparent.

    Processes read them: threads would take turns.
    """
    width, height = size
    images, place = _allocate((len(files), height, width, 3), np.uint8, shared=True)
    finished = np.zeros(len(files), bool)
    num_on_white = 0
    num_useful = len(files) // 100  # a process starts in the time of some hundred images
    count = min(len(os.sched_getaffinity(0)), num_useful)
    with contextlib.ExitStack() as stack:
        processes = []
        for first in range(count):
            indices = range(first, len(files), count)
            process = _start_decoder(files[first::count], indices, size, resize, place)
            processes.append(stack.enter_context(process))
        for first, process in enumerate(processes):
            num_read, num_transparent = map(int, process.stdout.read().split() or (0, 0))
            finished[first::count][:num_read] = True
            num_on_white += num_transparent
    return images, finished, num_on_white


def _start_decoder(files, indices, size, resize, place):
    """Return a process that writes the pixels of the files to the file `place`: see `decoder.py`."""
    numbers = [os.getpid(), place.fileno()]
    numbers += [indices.start, indices.step]
    numbers += [*size, int(bool(resize))]
    command = [sys.executable, decoder.__file__, *map(str, numbers)]
    with tempfile.TemporaryFile() as names:
        names.write(b"\0".join(map(os.fsencode, files)))
        names.seek(0)
        return subprocess.Popen(  # noqa: S603 - nothing in it is from outside
            command,
            stdin=names,
            stdout=subprocess.PIPE,
            pass_fds=[place.fileno()],
        )


def _open(path):
    """Return the image at `path` in colour."""
    try:
        return decoder.open_image(path)
    except Exception as error:  # each format has its own errors
        raise UserError(f"cannot read the image {path}: {error}. Replace or delete it") from error


def _resize(images, size):
    """Return images (n, height, width, channels) resized to (n, size, size, channels), if there is a size."""
    if not size or images.shape[1:3] == (size, size):
        return images
    from PIL import Image

    num_channels = images.shape[3]
    resized, _ = _allocate((len(images), size, size, num_channels), images.dtype)
    for image, target in zip(images, resized):
        for channel in range(num_channels):
            plane = Image.fromarray(image[..., channel])
            target[..., channel] = plane.resize((size, size), Image.BILINEAR)
    return resized


def _allocate(shape, dtype, shared=False):
    """Return an empty array in memory, or on disk if it does not fit, and the file of a `shared` one."""
    num_values = int(np.prod(shape, dtype=np.int64))
    num_bytes = num_values * np.dtype(dtype).itemsize
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
    """Return the free memory in bytes, of the machine or of the container; without any figure, no limit."""
    free = [float("inf")]
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":") for line in lines)
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for limit, used in CONTAINER_MEMORY:
        with contextlib.suppress(OSError, ValueError):  # no such limit
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return min(free)


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from error
