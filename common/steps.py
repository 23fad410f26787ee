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
    batches = _split(np.arange(num_samples), batch_size)
    return [len(batch[cluster.share(len(batch))]) for batch in batches]


def training_batches(images, labels, args, epoch, first_step=0):
    """Yield (images, labels, batch_size) for each step of an epoch, shuffled and augmented, from `first_step` on.

    Of several workers each gets its share of every batch, as numpy arrays; `batch_size` is the whole batch's, and all
    that is random is drawn for the whole batch, so that together they train on the same for any number of workers.

    Args:
        images: whatever gives (n, height, width, channels) for `images[indices]`, such as an array or a memory map.
        labels: int64 array of shape (n,).
        epoch: counted from 1; another epoch is another order.
    """

    def load(step, indices):
        share = cluster.share(len(indices))
        batch = images[indices[share]]
        if args.augment:
            draws = draw_crops_and_flips(images.shape, len(indices), _generator(args.seed, epoch, step + 1))
            batch = crop_and_flip(batch, *(drawn[share] for drawn in draws))
        return batch, labels[indices[share]], len(indices)

    order = _generator(args.seed, epoch, 0).permutation(len(labels))
    return _prefetch(load, _split(order, args.batch_size), args.workers, first_step)


def validation_batches(images, labels, args):
    """Yield (images, labels): all samples once, in order and unchanged; of several workers each gets its share."""
    order = np.arange(len(labels))

    def load(step, indices):
        mine = indices[cluster.share(len(indices))]
        return images[mine], labels[mine]

    return _prefetch(load, _split(order, args.batch_size), args.workers)


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
    row, x = width * channels, _margin(width)
    margin = _margin(height) * row + x * channels
    flat = np.zeros((count, height * row + 2 * margin), images.dtype)
    flat[:, margin:-margin] = images.reshape(count, -1)
    # In memory a shift by rows and columns is one by so many numbers: a single copy for each image.
    windows = np.lib.stride_tricks.sliding_window_view(flat, height * row, axis=1)
    shifted = windows[np.arange(count), top * row + left * channels].reshape(images.shape)
    for columns in range(1, x + 1):  # what has come in from the row beside becomes black
        shifted[left == x + columns, :, -columns:] = 0
        shifted[left == x - columns, :, :columns] = 0
    rows = shifted.reshape(count, height, row)
    rows[flip] = rows[flip].take(np.arange(row).reshape(width, channels)[::-1].ravel(), axis=2)
    return shifted


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


def _split(order, batch_size):
    # Even parts rather than a small rest: batch normalisation learns badly from a few samples, and nothing from one.
    parts = np.array_split(order, steps_per_epoch(len(order), batch_size))
    if len(parts[-1]) < cluster.size:
        raise UserError(
            f"{len(order)} samples in batches of --batch-size {batch_size} make batches of {len(parts[-1])}, but there "
            f"are {cluster.size} workers: expected a sample for each; raise --batch-size or use fewer workers"
        )
    return parts


def _prefetch(load, parts, workers, first_step=0):
    """Yield `load(step, part)` in order from `first_step` on, prepared ahead by `workers` threads."""
    numbered = list(enumerate(parts))[first_step:]
    if workers == 0:
        yield from (load(step, part) for step, part in numbered)
        return
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for step, part in numbered:
                waiting.append(pool.submit(load, step, part))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # nobody wants them after an error or a signal
                future.cancel()
