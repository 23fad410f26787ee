"""All that is decided by (seed, epoch, step) alone: the order of the samples, augmentation, randomness, learning rate.

None of it has a state, so a checkpoint need not hold any of it and training goes on from any step with the same bits.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from common import cluster
from common.errors import UserError


def steps_per_epoch(num_samples, batch_size):
    """Return the number of batches in an epoch; no sample is left out."""
    return math.ceil(num_samples / batch_size)


def batch_sizes(num_samples, batch_size):
    """Return the number of samples in this worker's share of each batch of an epoch."""
    return [len(share) for share in _shares(num_samples, batch_size)[0]]


def training_batches(images, labels, args, epoch, first_step=0):
    """Yield (images, labels, batch_size) for each step of an epoch, shuffled and augmented, from `first_step` on.

    Of several workers each gets its share of every batch, as numpy arrays; `batch_size` is the whole batch's, and all
    that is random is drawn for the whole batch, so that together they train on the same for any number of workers.

    Args:
        images: whatever gives (n, height, width, channels) for `images[indices]`, such as an array or a memory map.
        labels: int64 array of shape (n,).
        epoch: counted from 1; another epoch is another order.
    """

    order = _generator(args.seed, epoch, 0).permutation(len(labels))
    draws = draw_crops_and_flips(images.shape, len(labels), _generator(args.seed, epoch, 1)) if args.augment else ()

    def load(positions):
        batch = images[order[positions]]
        if args.augment:
            batch = crop_and_flip(batch, *(drawn[positions] for drawn in draws))
        return batch, labels[order[positions]]

    shares, sizes = _shares(len(labels), args.batch_size)
    loaded = _prefetch(load, shares[first_step:], args.workers)
    yield from ((*batch, size) for batch, size in zip(loaded, sizes[first_step:]))


def validation_batches(images, labels, args):
    """Yield (images, labels): all samples once, in order and unchanged; of several workers each gets its share."""
    shares, _ = _shares(len(labels), args.batch_size)
    return _prefetch(lambda positions: (images[positions], labels[positions]), shares, args.workers)


def draw_crops_and_flips(shape, count, generator):
    """Return what `crop_and_flip` takes for `count` images of shape (n, height, width, channels): 3 arrays (count,).

    Each image is to be shifted by up to an eighth of its size, and every second one to be mirrored. The augmentation of
    "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385.
    """
    top, left = (generator.integers(0, 2 * _margin(size) + 1, count) for size in shape[1:3])
    return top, left, generator.integers(0, 2, count).astype(bool)


def crop_and_flip(images, top, left, flip):
    """Return the images (n, height, width, channels) shifted, black moving in, and mirrored where `flip` says so."""
    count, height, width, channels = images.shape
    y, x, row = _margin(height), _margin(width), width * channels
    padded = np.zeros((count, height + 2 * y, row + 2 * x * channels), images.dtype)
    padded[:, y:-y, x * channels : -x * channels] = images.reshape(count, height, row)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, row), axis=(1, 2))
    rows = windows[np.arange(count), top, left * channels]
    rows[flip] = rows[flip].take(np.arange(row).reshape(width, channels)[::-1].ravel(), axis=2)
    return rows.reshape(images.shape)


def step_seed(seed, step):
    """Return the 32-bit seed of the framework's own randomness (dropout) in one training step of this worker."""
    return int(np.random.SeedSequence((seed, step, cluster.rank)).generate_state(1)[0])


def learning_rate(args, step, total_steps):
    """Return the learning rate of a step, counted from 0 over all epochs.

    Cosine: "SGDR: Stochastic Gradient Descent with Warm Restarts", https://arxiv.org/abs/1608.03983, without restarts.
    """
    factor = (1 + math.cos(math.pi * step / total_steps)) / 2 if args.schedule == "cosine" else 1.0
    return args.learning_rate * factor


def _margin(size):
    return max(1, size // 8)


def _generator(seed, epoch, stream):
    return np.random.default_rng((seed, epoch, stream))


def _shares(num_samples, batch_size):
    """Return this worker's part of each batch, as arrays of positions in the epoch, and the sizes of the batches."""
    # Even parts rather than a small rest: batch normalisation learns badly from a few samples, and nothing from one.
    batches = np.array_split(np.arange(num_samples), steps_per_epoch(num_samples, batch_size))
    if len(batches[-1]) < cluster.size:
        raise UserError(
            f"{num_samples} samples in batches of --batch-size {batch_size} make batches of {len(batches[-1])}, but "
            f"there are {cluster.size} workers: expected a sample for each; raise --batch-size or use fewer workers"
        )
    return [batch[cluster.share(len(batch))] for batch in batches], [len(batch) for batch in batches]


def _prefetch(load, parts, workers):
    """Yield `load(part)` in order, prepared ahead by `workers` threads."""
    # Once so large a block is freed, the C library keeps memory for the next batch (mallopt(3): M_MMAP_THRESHOLD): to
    # get it from the system takes longer than what is done with it.
    np.empty(31 * 2**20, np.uint8)
    if workers == 0:
        yield from map(load, parts)
        return
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(load, part))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # nobody wants them after an error or a signal
                future.cancel()
