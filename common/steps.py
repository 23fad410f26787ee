"""All that is decided by (seed, epoch, step) alone: the order of the samples, augmentation, randomness, learning rate.

None of it has a state, so a checkpoint need not hold any of it and training goes on from any step with the same bits.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def steps_per_epoch(num_samples, batch_size):
    """Return the number of batches in an epoch; no sample is left out."""
    return math.ceil(num_samples / batch_size)


def batch_sizes(num_samples, batch_size):
    """Return the number of samples in each batch of an epoch."""
    return [len(part) for part in _split(np.arange(num_samples), batch_size)]


def training_batches(images, labels, args, epoch, first_step=0):
    """Yield an epoch's shuffled, augmented batches as numpy arrays, without reading those before `first_step`.

    Args:
        images: whatever gives (n, height, width, channels) for `images[indices]`, such as an array or a memory map.
        labels: int64 array of shape (n,).
        epoch: counted from 1; another epoch is another order.
    """

    def load(step, indices):
        batch = images[indices]
        if args.augment:
            batch = random_crop_flip(batch, _generator(args.seed, epoch, step + 1))
        return batch, labels[indices]

    order = _generator(args.seed, epoch, 0).permutation(len(labels))
    return _prefetch(load, _split(order, args.batch_size), args.workers, first_step)


def validation_batches(images, labels, args):
    """Yield all samples once, in order and unchanged, as batches like those of `training_batches`."""
    order = np.arange(len(labels))

    def load(step, indices):
        return images[indices], labels[indices]

    return _prefetch(load, _split(order, args.batch_size), args.workers)


def random_crop_flip(images, generator):
    """Shift each image by up to an eighth of its size, black moving in, and mirror every second one at random.

    The crop-and-flip augmentation of "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385.
    """
    count, height, width, _ = images.shape
    pad = max(1, height // 8), max(1, width // 8)
    padded = np.pad(images, ((0, 0), (pad[0], pad[0]), (pad[1], pad[1]), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    top, left = (generator.integers(0, 2 * size + 1, count) for size in pad)
    cropped = windows[np.arange(count), top, left].transpose(0, 2, 3, 1)
    flip = generator.integers(0, 2, count).astype(bool)
    cropped[flip] = cropped[flip, :, ::-1]
    return np.ascontiguousarray(cropped)


def step_seed(seed, step):
    """Return the 32-bit seed of the framework's own randomness (dropout) in one training step."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def learning_rate(args, step, total_steps):
    """Return the learning rate of a step, counted from 0 over all epochs.

    Cosine: "SGDR: Stochastic Gradient Descent with Warm Restarts", https://arxiv.org/abs/1608.03983, without restarts.
    """
    factor = (1 + math.cos(math.pi * step / total_steps)) / 2 if args.schedule == "cosine" else 1.0
    return args.learning_rate * factor


def _generator(seed, epoch, stream):
    return np.random.default_rng((seed, epoch, stream))


def _split(order, batch_size):
    # Even parts rather than a small rest: batch normalisation learns badly from a few samples, and nothing from one.
    return np.array_split(order, steps_per_epoch(len(order), batch_size))


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
