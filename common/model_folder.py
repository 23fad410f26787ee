"""The folder of an exported model: `model.json` describes the model, and `code/` predicts with it.

`common.serving` and `common.export` read the files that this module writes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Iterable

import numpy as np

from common import datasets
from common.errors import UserError

FILE_NAME = "model.json"
CODE = "code"  # where SageMaker's containers look for inference.py
STRUCTURE = "structure of the model"  # the key of `describe_structure` in the description of a job
OTHER_COLUMNS = ("epoch", "seconds", "samples_per_second")  # of the history, besides the metrics


def describe_origin(args: Namespace, job: dict) -> dict:
    """Return the origin of a model, in plain values.

    Args:
        args: the flags.
        job: the description of the job, such as {"--model": "cnn"}.
    """
    # The relative path stays valid if both folders are moved together.
    checkpoints = os.path.relpath(args.checkpoint_path.resolve(), args.model_dir.resolve())
    return {"checkpoints": checkpoints, "job": job}


def describe_data(data: datasets.Data) -> dict[str, Any]:
    """Return the facts about the data for `restore_data` and for readers of `model.json`, in plain values."""
    facts: dict[str, Any] = {
        "sample_shape": list(data.sample_shape),  # of an image (height, width, channels)
        "sample_type": str(data.dtype),
        "value_range": None,
        "mean": None,
        "std": None,
        "class_names": data.classes,
        "label_shape": list(data.label_shape),
        "label_type": str(data.label_dtype),
        "num_training_samples": len(data.train),
    }
    if data.dtype == np.uint8:
        facts["value_range"] = [0, 255]
    if data.mean is not None:
        facts["mean"] = data.mean.tolist()
        facts["std"] = data.std.tolist()  # type: ignore[union-attr]  # it has one if it has a mean
    return facts


def restore_data(facts: dict[str, Any]) -> datasets.Data:
    """Return the `common.datasets.Data` of `describe_data`; the samples of both its data sets are zeros."""
    num_samples = facts["num_training_samples"]
    sample = np.zeros(facts["sample_shape"], facts["sample_type"])
    label = np.zeros(facts["label_shape"], facts["label_type"])
    images = np.broadcast_to(sample, (num_samples, *sample.shape))
    labels = np.broadcast_to(label, (num_samples, *label.shape))
    zeros = datasets.ArrayDataset(images, labels, facts["class_names"])
    mean = std = None
    if facts["mean"] is not None:
        mean = np.array(facts["mean"], np.float32)
        std = np.array(facts["std"], np.float32)
    return datasets.Data(
        train=zeros,
        validation=zeros,
        sample_shape=sample.shape,
        dtype=sample.dtype,
        classes=facts["class_names"],
        mean=mean,
        std=std,
        label_shape=label.shape,
        label_dtype=label.dtype,
    )


def describe_script(engine: str) -> dict:
    """Return a checksum of the train.py beside an engine, by name; empty if there is none."""
    script = Path(engine).with_name("train.py")
    if not script.is_file():
        return {}
    return {script.name: f"{zlib.crc32(script.read_bytes()):08x}"}


def describe_flags(args: Namespace) -> dict:
    """Return the input of `restore_flags`: the flags by name, paths as text, and the names of the paths."""
    flags = {name: _plain(value) for name, value in vars(args).items()}
    paths = [name for name, value in vars(args).items() if isinstance(value, Path)]
    return {"flags": flags, "paths": paths}


def restore_flags(facts: dict[str, Any], parse_args: Callable[[list[str]], Namespace]) -> Namespace:
    """Return the flags of `describe_flags`; others have their defaults, if `parse_args` needs no flag."""
    args = argparse.Namespace()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        args = parse_args([])
    for name, value in facts["flags"].items():
        setattr(args, name, Path(value) if name in facts["paths"] else value)
    return args


def _plain(value):
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def describe_metrics(progress: Any, epoch: int) -> dict[str, Any]:
    """Return the metrics of an epoch without its times; none of them for a model from inside an epoch."""
    metrics: dict[str, Any] = {}
    if progress.step:
        return metrics
    for row in progress.history:
        if row["epoch"] == epoch:
            metrics = {name: value for name, value in row.items() if name not in OTHER_COLUMNS}
    for name, value in metrics.items():
        if not np.isfinite(value):  # JSON has no such numbers
            metrics[name] = None
    return metrics


def describe_structure(lines: Iterable[str]) -> str:
    """Return a short checksum of text that describes layers and parameters, for `STRUCTURE`.

    Args:
        lines: the same in every process; addresses in memory are left out.
    """
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(lines))
    return f"{zlib.crc32(text.encode()):08x}"


def describe_outputs(outputs: np.ndarray | None, classes: list[str] | None) -> str:
    """Return the kind of a network's outputs: "logits" or "probabilities" of the classes, or "values".

    Args:
        outputs: the array that it has computed for some samples; None for several arrays.
        classes: the names of the classes, or None.
    """
    if outputs is None or classes is None or outputs.ndim != 2 or outputs.shape[1] != len(classes):
        return "values"
    sums = outputs.astype(np.float64).sum(1)
    is_distribution = (outputs >= 0).all() and np.allclose(sums, 1, atol=1e-3)
    return "probabilities" if is_distribution else "logits"


def write(path: Path, facts: dict) -> None:
    """Write `model.json`."""
    path.write_text(json.dumps(facts, indent=2) + "\n")


def copy_code(folder: Path, target: Path, requirements: list[str] | None = None) -> None:
    """Copy the code that predicts: the Python files of the training script and the packages beside it.

    Args:
        folder: that of `train.py`.
        target: a new folder.
        requirements: the lines of its `requirements.txt`; default: those of the file beside `train.py`.
    """
    target.mkdir()
    for path in sorted(folder.iterdir()):
        if path.name == "train_tf1.py":
            continue  # trains other models
        if path.suffix == ".py" or path.name == "requirements.txt":
            shutil.copyfile(path, target / path.name)
        elif (path / "__init__.py").is_file():
            shutil.copytree(path, target / path.name, ignore=_not_python)
    if requirements:
        (target / "requirements.txt").write_text("".join(f"{name}\n" for name in requirements))


def _not_python(folder, names):
    other = []
    for name in names:
        is_package = os.path.isfile(os.path.join(folder, name, "__init__.py"))
        if not is_package and not name.endswith(".py"):
            other.append(name)
    return other


def check_same_job(folder: Path, path: Path, origin: dict) -> None:
    """Raise UserError if a folder contains the model of another job, which would be lost.

    Args:
        folder: that of the model.
        path: its `model.json`.
        origin: see `describe_origin`.
    """
    try:
        earlier = json.loads(path.read_text())
        earlier_job = {**earlier["job"], "the folder of checkpoints": earlier["checkpoints"]}
    except (OSError, ValueError, KeyError, TypeError):
        return  # no model, or not one of ours
    origin = json.loads(json.dumps(origin))
    job = {**origin["job"], "the folder of checkpoints": origin["checkpoints"]}
    for key, value in job.items():
        if key in earlier_job and earlier_job[key] != value:
            raise UserError(
                f"--model-dir {folder} contains the model of another job: "
                f"{key} was {earlier_job[key]} and is now {value}. "
                "Pass another --output or --model-dir, delete that folder, or add --resume-anyway"
            )
