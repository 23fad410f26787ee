"""The plain values in each checkpoint, besides the weights and the optimizer's state, and their types.

A readable file may still contain something else, if another program or version has written it.
"""

from __future__ import annotations

import json

import numpy as np

DICTIONARIES = ("progress", "job", "data", "machine", "flags", "code", "export")
# The fields of `train_state.Progress`; "sums" has a dictionary for each worker.
PROGRESS = {
    "epoch": int,
    "step": int,
    "samples": int,
    "sums": list,
    "seconds": float,
    "history": list,
    "stopped": bool,
}
LARGEST = 2**53  # a float represents every whole number up to this one


def check(content: dict) -> None:
    """Raise ValueError if the plain values in a checkpoint cannot be those of `Run.save`."""
    _expect(isinstance(content, dict) and "progress" in content, "it is not a checkpoint of this script")
    plain = {name: content[name] for name in DICTIONARIES if name in content}
    for name, value in plain.items():
        _expect(isinstance(value, dict), f"{name} is a {type(value).__name__}: expected a dictionary")
    try:
        json.dumps(plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it contains values that are not plain: {error}") from error
    _check_progress(content["progress"])
    _check_step(content["progress"]["step"], content.get("job", {}))
    resumed = content.get("resumed", [])
    is_list = isinstance(resumed, list)
    _expect(is_list, "resumed is not a list")
    are_numbers = all(map(_is_number, resumed))
    _expect(are_numbers, "resumed contains values that are not numbers")
    if "export" in content:
        _check_export(content["export"])


def _expect(is_right, message):
    if not is_right:
        raise ValueError(message)


def _is_number(value):
    """Return whether a value is a number that fits into a float; NaN and infinity are metrics too."""
    if type(value) is int:
        return abs(value) <= LARGEST
    return type(value) is float


def _check_progress(progress):
    differing = sorted(map(str, set(progress) ^ set(PROGRESS)))
    _expect(not differing, f"progress has missing or unknown fields: {', '.join(differing)[:100]}")
    for name, kind in PROGRESS.items():
        value = progress[name]
        is_right = type(value) is kind or (kind is float and type(value) is int)
        _expect(is_right, f"{name} is {str(value)[:50]!r}: expected a value of type {kind.__name__}")
        if kind in (int, float):
            _expect(0 <= value <= LARGEST, f"{name} is {str(value)[:50]}: expected a number from 0")
    last = 0
    for row in progress["history"]:
        check_row(row, last, progress["epoch"])
        last = row["epoch"]
    for sums in progress["sums"]:
        _check_sums(sums)


def check_row(row: dict, last: int, epoch: int) -> None:
    """Raise ValueError if a row of the history does not follow that of epoch `last`, up to `epoch`."""
    kind = type(row).__name__
    _expect(kind == "dict", f"history has a {kind}: expected dictionaries")
    are_names = all(isinstance(name, str) for name in row)
    _expect(are_names, "history has a metric without a name")
    are_numbers = all(map(_is_number, row.values()))
    _expect(are_numbers, "history has a metric that is not a number")
    number = row.get("epoch")
    is_next = type(number) is int and last < number <= epoch
    _expect(is_next, f"history has a row of epoch {number} after {last}, but {epoch} are finished")


def _check_sums(sums):
    """Raise ValueError if these are not pairs of numbers, or of lists of numbers, by name."""
    _expect(isinstance(sums, dict), f"sums has a {type(sums).__name__}: expected dictionaries")
    for name, pair in sums.items():
        _expect(isinstance(name, str), "sums has a metric without a name")
        _expect(isinstance(pair, (list, tuple)) and len(pair) == 2, f"the sums of {name} are not a pair")
        arrays = [np.asarray(value) for value in pair]  # raises ValueError if the lists have no shape
        kinds = {array.dtype.kind for array in arrays}
        _expect(kinds <= set("iuf"), f"the sums of {name} are not numbers")
        np.broadcast(*arrays)  # raises ValueError if their shapes do not match


def _check_step(step, job):
    """Raise ValueError for a step beyond the end of an epoch, whose length follows from `job`."""
    num_steps = job.get("number of training batches")
    sizes = job.get("number of training samples"), job.get("--batch-size")
    if all(type(size) is int and size > 0 for size in sizes):
        num_steps = -(-sizes[0] // sizes[1])  # rounded up
    if type(num_steps) is int:
        _expect(step <= num_steps, f"it contains step {step} of an epoch of {num_steps} steps")


def _check_export(facts):
    """Raise ValueError if flags or channel statistics do not have the format of `model_folder`."""
    flags, paths = facts.get("flags"), facts.get("paths")
    _expect(isinstance(flags, dict) and isinstance(paths, list), "export has no flags and paths")
    are_texts = all(isinstance(name, str) and isinstance(flags.get(name, ""), str) for name in paths)
    _expect(are_texts, "export has a path that is not text")
    mean, std = facts.get("mean"), facts.get("std")
    if mean is None and std is None:
        return
    for values in (mean, std):
        is_list = isinstance(values, list) and all(map(_is_number, values))
        shape = facts.get("sample_shape")
        is_list = is_list and isinstance(shape, list) and shape[-1:] == [len(values)]
        _expect(is_list, "export has no mean and std of each channel")
