"""Warn at the start of the usual mistakes that make a resumed training differ from an uninterrupted one."""

from __future__ import annotations

import contextlib
import math
import random
import types
import zlib
from typing import Any, Callable, Iterable

import numpy as np

from common.report import log

NUM_SAMPLES = 4  # few: reading them must not delay the start
MAX_VALUES = 2**16  # in a list or an array to compare
# Attributes of torch's optimizers and modules.
IN_CHECKPOINT = ("state", "param_groups", "defaults", "_parameters", "_buffers", "_modules")


def check_data_set(name: str, dataset: Any, read_samples: Callable[..., Any]) -> None:
    """Log a warning if a data set returns different samples when it is read again with the same seed.

    Args:
        name: "training" or "validation".
        dataset: see `common/datasets.py`.
        read_samples: a function of (dataset, indices) that returns arrays (samples, labels, weights).
    """
    indices = np.linspace(0, len(dataset) - 1, min(NUM_SAMPLES, len(dataset))).astype(np.int64)
    if hasattr(dataset, "batches"):
        indices = indices[:1]  # of the first batch
    if is_same(read_samples(dataset, indices), read_samples(dataset, indices)):
        return
    log(
        f"Warning: the {name} data set returns different samples when read again: after an interruption "
        "the result will not be bit-identical. Take random numbers from `random`, `numpy.random` or the "
        "framework, which are seeded for each sample, not from your own generator"
    )


def check_augment(
    augment: Callable[..., Any],
    images: np.ndarray,
    labels: np.ndarray,
    make_rng: Callable[[], np.random.Generator],
) -> None:
    """Log a warning if `augment` returns different images for the same samples and random numbers.

    Args:
        augment: the function of `train.py`.
        images, labels: some samples.
        make_rng: a function that returns a new generator, in the same state each time.
    """
    first = augment(images.copy(), labels.copy(), make_rng())
    if is_same(first, augment(images.copy(), labels.copy(), make_rng())):
        return
    log(
        "Warning: augment returns different samples for the same `rng`: after an interruption the result "
        "will not be bit-identical. Take all random numbers from `rng`"
    )


def check_loss(once: float, twice: float) -> None:
    """Log a warning if the loss of a sample that is twice in a batch is not twice as large.

    Args:
        once, twice: the losses of batches of one and of two such samples.
    """
    if math.isfinite(once) and math.isfinite(twice) and not math.isclose(twice, 2 * once, rel_tol=1e-3):
        log(
            "Warning: compute_loss is not the sum over the samples: for one sample it is "
            f"{once:.4g}, and for two that are equal {twice:.4g}. train_step divides it by the batch size: "
            "return the sum, not the mean"
        )


def is_same(arrays: Iterable[Any], others: Iterable[Any]) -> bool:
    """Return whether two sequences of arrays are bit-identical."""
    pairs = zip(map(np.asarray, arrays), map(np.asarray, others))
    return all(array.tobytes() == other.tobytes() for array, other in pairs)


class Attributes:
    """Finds attributes that training changes but no checkpoint contains.

    Args:
        state: the training state.
        owners: a function that returns dictionaries of attributes, by the name of their owner in the log.
    """

    def __init__(self, state: Any, owners: Callable[[], dict[str, Any]]) -> None:
        self._state = state
        self._owners = owners
        self._before: dict[str, Any] | None = None

    def compare(self) -> bool:
        """Log a warning for attributes changed since the previous call; return whether there was one.

        Call it after the first step too, which sets some attributes for the first time.
        """
        now = {}
        for owner, attributes in self._owners().items():
            for name, value in attributes.items():
                if name not in IN_CHECKPOINT and not name.startswith("__"):
                    now[f"{name} ({owner})"] = _checksum(value)
        before, self._before = self._before, now
        if before is None:
            return False
        changed = [name for name, value in now.items() if value != before.get(name, value)]
        if changed:
            held = {_checksum(value) for value in self._state.state_dict().values()}
            changed = [name for name in changed if now[name] not in held]
        if changed:
            log(
                f"Warning: training changes {', '.join(changed)}, which no checkpoint contains: after an "
                "interruption the result may not be bit-identical. Return it from state_dict()"
            )
        return True


def own_attributes(state: Any) -> dict[str, Any]:
    """Return the attributes of a training state that `train.py` itself sets, not `engine.py`."""
    names: set[str] = set()
    for value in vars(type(state)).values():
        if hasattr(value, "__code__"):
            names.update(value.__code__.co_names)
    return {name: value for name, value in vars(state).items() if name in names}


def _checksum(value, depth=5):
    """Return a checksum of numbers, arrays and random generators, also in containers; else None."""
    if isinstance(value, (type, types.ModuleType)):
        return None
    if isinstance(value, (bool, int, float, str)):
        return zlib.crc32(repr(value).encode())
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, np.random.Generator):
        return zlib.crc32(repr(value.bit_generator.state).encode())
    if isinstance(value, np.random.RandomState):
        return _checksum(value.get_state()[1:])
    for method in ("state_dict", "get_state"):  # torch's modules, optimizers, schedulers, generators
        if hasattr(value, method):
            with contextlib.suppress(TypeError):  # a user's method with arguments
                return _checksum(getattr(value, method)(), depth)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        if depth == 0 or len(value) > MAX_VALUES:
            return None
        return hash(tuple(_checksum(part, depth - 1) for part in value))
    return _array_checksum(value)


def _array_checksum(value):
    """Return the checksum of an array, or of a tensor on the CPU, that is not large; else None."""
    if not hasattr(type(value), "__array__"):
        return None
    if hasattr(value, "detach"):  # a tensor of torch
        value = value.detach()
    if math.prod(value.shape) > MAX_VALUES:
        return None
    try:
        return zlib.crc32(np.ascontiguousarray(value))
    except (TypeError, ValueError):  # on a GPU, or of a type that NumPy does not have
        return None
