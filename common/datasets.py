"""Data sets, and their properties: shape, classes, statistics, fingerprint.

A data set has `__len__` and `__getitem__(index)`, which returns a sample and its label, and optionally the
sample's weight. A torch or Gluon `Dataset` is one. These are optional:

- `__getitems__(indices)` returns many samples at once, as a list of samples or as a tuple of stacked arrays;
- `classes`, the names of the classes;
- `fingerprint()`, a dictionary of plain values that differs if the data differ.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import numpy as np

from common.errors import UserError

STATISTICS_SAMPLES = 256  # the error of a channel's mean is about a thirtieth of its deviation
STATISTICS_PART = 16  # of them are in memory at once
FINGERPRINT_SAMPLES = 16  # of a data set that reads them one by one
FINGERPRINT_ROWS = 256  # of arrays


class ArrayDataset:
    """Images and labels in arrays.

    Args:
        images: of shape (n, height, width, channels), an array, a memory map, or another object that returns
            the array of a batch for an array of indices, such as `common.image_files.ImageFiles`.
        labels: int64 array of class indices of shape (n,).
        classes: the names of the classes.
        indices: the rows that belong to this data set, in order; default: all of them. They are not copied.
    """

    def __init__(
        self, images: Any, labels: np.ndarray, classes: list[str], indices: np.ndarray | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.classes = classes
        self.indices = np.arange(len(labels)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.indices[index]
        return self.images[row], self.labels[row]

    def __getitems__(self, indices: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the images (n, height, width, channels) and labels (n,) of many samples."""
        rows = self.indices[indices]
        return self.images[rows], self.labels[rows]

    @property
    def is_in_memory(self) -> bool:
        """Whether a batch needs no reading or decoding."""
        return getattr(self.images, "is_in_memory", not isinstance(self.images, np.memmap))

    def fingerprint(self) -> dict[str, int]:
        """Return the checksums of all labels, and of some images or of their names and sizes."""
        labels = self.labels[self.indices]
        if hasattr(self.images, "fingerprint"):
            return {
                "checksum of the labels": zlib.crc32(np.ascontiguousarray(labels)),
                "checksum of the names and sizes": self.images.fingerprint(),
            }
        images = self.images[self.indices[spread(len(self), FINGERPRINT_ROWS)]]
        return {
            "checksum of the labels": zlib.crc32(np.ascontiguousarray(labels)),
            "checksum of some images": zlib.crc32(np.ascontiguousarray(images)),
        }


class Data(NamedTuple):
    """The training and the validation data set, and the properties of their samples.

    Attributes:
        sample_shape: of an image (height, width, channels).
        dtype: the NumPy dtype of the samples.
        classes: the names of the classes, or None.
        mean, std: of each channel over training images of uint8, float32 arrays; None for other samples,
            which reach the network as they are.
        label_shape, label_dtype: of the label of a sample.
    """

    train: Any
    validation: Any
    sample_shape: tuple
    dtype: np.dtype
    classes: list[str] | None
    mean: np.ndarray | None
    std: np.ndarray | None
    label_shape: tuple
    label_dtype: np.dtype

    @property
    def num_classes(self) -> int:
        """The number of classes. Raises UserError if the training data set has no `classes`."""
        if self.classes is None:
            raise UserError(
                "the training data set has no `classes`: add a list of their names to it, "
                "or write the number of outputs into build_model"
            )
        return len(self.classes)


def describe(
    train: Any,
    validation: Any,
    read_samples: Callable[..., Any],
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> Data:
    """Return the Data of two data sets.

    Args:
        train, validation: the data sets.
        read_samples: a function of (dataset, indices) that returns arrays (samples, labels, weights).
        statistics: mean and standard deviation of each channel if they are known, as from a checkpoint.

    Raises UserError for an empty data set, and for training and validation samples of different shapes or
    types.
    """
    for name, dataset in (("training", train), ("validation", validation)):
        if len(dataset) == 0:
            raise UserError(f"the {name} data set has no samples: expected at least one")
    samples, labels, _ = read_samples(train, np.arange(1))
    others, _, _ = read_samples(validation, np.arange(1))
    if samples.shape[1:] != others.shape[1:]:
        raise UserError(
            f"the training samples have the shape {samples.shape[1:]}, but the validation samples have "
            f"{others.shape[1:]}: make them equal in load_data"
        )
    if samples.dtype != others.dtype:
        raise UserError(
            f"the training samples are {samples.dtype}, but the validation samples are {others.dtype}: make "
            "them equal in load_data"
        )
    mean = std = None
    if samples.dtype == np.uint8 and samples.ndim == 4:
        if statistics is not None and len(statistics[0]) == samples.shape[3]:
            mean, std = statistics
        else:
            mean, std = channel_statistics(_some_images(train, read_samples))
    label = labels[0]
    return Data(
        train,
        validation,
        samples.shape[1:],
        samples.dtype,
        find_classes(train),
        mean,
        std,
        label.shape,
        label.dtype,
    )


def spread(count: int, wanted: int) -> np.ndarray:
    """Return at most `wanted` of the indices below `count`, evenly spread."""
    return np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)


def _some_images(dataset, read_samples):
    """Yield images of a data set one by one, read in parts: they may be large."""
    indices = spread(len(dataset), STATISTICS_SAMPLES)
    if hasattr(dataset, "batches"):  # it returns the samples for statistics at once
        yield from read_samples(dataset, indices)[0]
        return
    for part in np.array_split(indices, max(1, len(indices) // STATISTICS_PART)):
        yield from read_samples(dataset, part)[0]


def channel_statistics(images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel of an iterable of uint8 images."""
    histograms: Any = 0
    for image in images:  # one by one they stay in the processor's cache
        channels = range(image.shape[2])
        counts = [np.bincount(image[..., channel].ravel(), minlength=256) for channel in channels]
        histograms = histograms + np.array(counts, np.float64)
    levels = np.arange(256, dtype=np.float64)
    means, stds = [], []
    for counts in histograms:
        mean = (counts * levels).sum() / counts.sum()
        variance = (counts * (levels - mean) ** 2).sum() / counts.sum()
        means.append(mean)
        stds.append(np.sqrt(variance) or 1.0)
    return np.array(means, np.float32), np.array(stds, np.float32)


def find_classes(dataset: Any) -> list[str] | None:
    """Return the names of the classes; those of the data set inside for a wrapper such as torch's Subset."""
    while dataset is not None:
        classes = getattr(dataset, "classes", None)
        if classes is not None:
            return [str(name) for name in classes]
        dataset = getattr(dataset, "dataset", None)
    return None


def fingerprint(dataset: Any, read_samples: Callable[..., Any]) -> dict[str, Any]:
    """Return plain values that differ if the data differ: the data set's own, or checksums of samples."""
    if hasattr(dataset, "fingerprint"):
        return dataset.fingerprint()
    indices = spread(len(dataset), FINGERPRINT_SAMPLES)
    samples, labels, _ = read_samples(dataset, indices)
    return {
        "checksum of some samples": zlib.crc32(np.ascontiguousarray(samples)),
        "checksum of some labels": zlib.crc32(np.ascontiguousarray(labels)),
    }


def hold_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of a tenth of the samples, and of the rest, both in random order.

    Each class contributes its share, and at least one sample if a tenth suffices for that.

    Args:
        labels: (n,), the classes of the samples.
        seed: of the random order.
    """
    order = np.random.default_rng((seed, 0)).permutation(len(labels))
    _, classes, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(classes, kind="stable")
    starts = np.cumsum(counts) - counts
    shares = np.empty(len(labels))
    shares[by_class] = (np.arange(len(labels)) - np.repeat(starts, counts)) / np.repeat(counts, counts)
    chosen = np.argsort(shares, kind="stable")[: max(1, len(labels) // 10)]
    is_held_out = np.zeros(len(labels), bool)
    is_held_out[chosen] = True
    return order[is_held_out], order[~is_held_out]


def check_apart(train: Path, validation: Path | None) -> None:
    """Raise UserError if the folder `--validation` is inside `--train`."""
    if validation and train.resolve() in validation.resolve().parents:
        raise UserError(
            f"--validation {validation} is inside --train {train}, so that the training would see it: "
            "pass two separate folders"
        )
