"""Batches as functions of (seed, epoch, step): order of the samples, augmentation, all random numbers.

They have no state, so that a checkpoint need not contain any, and a training that resumes at any step is
bit-identical.
"""

from __future__ import annotations

import math
import random
import threading
from argparse import Namespace
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import numpy as np

from common.datasets import ArrayDataset
from common.errors import UserError

ORDER, AUGMENTATION, SAMPLES, FRAMEWORK = range(4)  # independent streams of random numbers


class Batch(NamedTuple):
    """This worker's part of a batch, in NumPy arrays.

    Attributes:
        images: (n, height, width, channels), or what the data set returns, stacked.
        labels: (n, ...).
        weights: float32 (n,), ones unless the data set returns weights.
        step: counted from 0 over all epochs.
        steps_per_epoch: the number of steps in an epoch.
        seed: for the framework's own random numbers in this step, such as dropout's.
        samples_per_worker: the number of samples in the whole batch, divided by the number of workers.
    """

    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    step: int
    steps_per_epoch: int
    seed: int
    samples_per_worker: float


def batch_sizes(num_samples: int, batch_size: int) -> list[int]:
    """Return the number of samples in each batch of an epoch; no sample is left out.

    The parts are even, without a small last batch: batch normalization learns badly from a few samples, and
    nothing from one.
    """
    num_batches = math.ceil(num_samples / batch_size)
    return [len(part) for part in np.array_split(np.arange(num_samples), num_batches)]


def check_sizes(num_samples: int, args: Namespace, workers: Any) -> None:
    """Raise UserError if a batch has fewer samples than there are workers."""
    smallest = batch_sizes(num_samples, args.batch_size)[-1]
    if smallest < workers.size:
        raise UserError(
            f"{num_samples} samples in batches of --batch-size {args.batch_size} make batches of {smallest}, "
            f"but there are {workers.size} workers: expected a sample for each; raise --batch-size or use "
            "fewer workers"
        )


class BatchLoader:
    """Loads this worker's part of the batches of one epoch: `loader(step)` returns a Batch.

    Args:
        args: the flags.
        dataset: see `common/datasets.py`.
        workers: each of them gets its shard of every batch.
        engine: `seed_sample(seed)` seeds the framework's random numbers and `to_array(sample)` makes a NumPy
            array.
        epoch: counted from 0; the number of the shuffled order. None: all samples in order, for validation.
    """

    def __init__(
        self, args: Namespace, dataset: Any, workers: Any, engine: Any, epoch: int | None = None
    ) -> None:
        self.dataset = dataset
        self.engine = engine
        self.rank = workers.rank
        self.key = (args.seed, 0 if epoch is None else epoch + 1)
        self.augment: Any = None
        self.sizes = batch_sizes(len(dataset), args.batch_size)
        self.world_size = workers.size
        self.first_step = 0 if epoch is None else epoch * len(self.sizes)
        order = np.arange(len(dataset))
        if epoch is not None:
            order = self.generator(ORDER).permutation(len(dataset))
        batches = np.split(order, np.cumsum(self.sizes)[:-1])
        self.indices = [batch[workers.shard(len(batch))] for batch in batches]
        # One call for all steps: it takes as long as the rest of a small batch.
        self.seeds = np.random.SeedSequence((*self.key, FRAMEWORK, self.rank)).generate_state(len(self.sizes))

    def generator(self, *key: int) -> np.random.Generator:
        """Return a NumPy random generator that follows from the seed, the epoch and `key`."""
        return np.random.default_rng((*self.key, *key))

    def __call__(self, step: int) -> Batch:
        """Return the Batch of a step, counted from 0 in this epoch."""
        indices = self.indices[step]
        if isinstance(self.dataset, ArrayDataset):
            images, labels = self.dataset.__getitems__(indices)
            weights = np.ones(len(indices), np.float32)
        else:
            images, labels, weights = read_samples(self.dataset, indices, self.engine, self.key)
        if self.augment:
            dtype = images.dtype
            images, labels = self.augment(images, labels, self.generator(AUGMENTATION, step, self.rank))
            if images.dtype != dtype:
                raise UserError(
                    f"augment returns {images.dtype} for images of {dtype}: expected the same type"
                )
        seed = int(self.seeds[step])
        share = self.sizes[step] / self.world_size
        return Batch(images, labels, weights, self.first_step + step, len(self.sizes), seed, share)


_reading = threading.Lock()  # a data set that draws random numbers uses global generators


def read_samples(
    dataset: Any, indices: np.ndarray, engine: Any, key: tuple[int, ...] = (0,)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return arrays (samples, labels, weights) of the samples at `indices`.

    Random numbers that the data set draws follow from `key` and the index. A data set with `__getitems__`
    draws them for all of its samples at once, so that they follow from `key` and the first index.
    """
    with _reading:
        samples = _read_seeded(dataset, indices.tolist(), engine, key)
    if not isinstance(samples, tuple):
        samples = _stack(samples, engine)
    if len(samples) == 2:
        return (*samples, np.ones(len(samples[1]), np.float32))
    images, labels, weights = samples
    return images, labels, np.asarray(weights, np.float32)


def _read_seeded(dataset, indices, engine, key):
    if hasattr(dataset, "__getitems__"):
        _seed_everything(engine, (*key, SAMPLES, indices[0]))
        return dataset.__getitems__(indices)
    samples = []
    for index in indices:
        if not samples or not hasattr(engine, "SEED_ONCE_PER_BATCH"):
            _seed_everything(engine, (*key, SAMPLES, index))
        samples.append(dataset[index])
    return samples


def _seed_everything(engine, key):
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    engine.seed_sample(seed)


def _stack(samples, engine):
    """Return a list of samples (image, label) or (image, label, weight) as a tuple of arrays."""
    columns = list(zip(*samples))
    if len(columns) not in (2, 3):
        raise UserError(
            f"a sample of the data set has {len(columns)} parts: "
            "expected (sample, label) or (sample, label, weight)"
        )
    images = [engine.to_array(image) for image in columns[0]]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise UserError(
            f"the samples have different shapes, such as {sorted(shapes)[:2]}: make them equal in load_data"
        )
    labels, *weights = [np.asarray([_to_array(value) for value in column]) for column in columns[1:]]
    return (np.stack(images), labels, *weights)


def _to_array(value):
    """Return a label or a weight of any shape as a NumPy array."""
    return value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value)  # MXNet has `asnumpy`


def load_ahead(load: Callable[[int], Any], steps: Iterable[int], num_threads: int) -> Iterator[Any]:
    """Yield `load(step)` for each step in order, prepared ahead by threads."""
    # Once a block of this size is freed, the C library keeps memory for the next batch (mallopt(3):
    # M_MMAP_THRESHOLD). Allocating it takes longer than filling it.
    np.empty(31 * 2**20, np.uint8)
    if num_threads == 0:
        return map(load, steps)
    return _load_with_threads(load, steps, num_threads)


def _load_with_threads(load, steps, num_threads):
    waiting = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for step in steps:
                waiting.append(pool.submit(load, step))
                if len(waiting) > 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # not needed after an error or a signal
                future.cancel()
