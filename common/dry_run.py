"""`--dry-run`: a training of a few steps that reads all data, writes into a temporary folder, and reports."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable

import numpy as np

from common import checkpoints, datasets
from common.errors import UserError
from common.image_files import ImageFiles
from common.report import log

STEPS = 3  # per epoch
EPOCHS = 2  # the first one warms up
ROUNDS = 3  # of XGBoost
MAX_SHOWN = 100  # bad files


class DryRun:
    """Changes the flags of a training, and later its data, so that it is short and changes no file.

    Args:
        args: the flags; epochs and folders are changed in place.
        pattern: of the names of checkpoints.
    """

    def __init__(self, args: Namespace, pattern: str) -> None:
        self.args = args
        self.pattern = pattern
        self.epochs = args.epochs
        self.steps_per_epoch: int | None = None
        self._temporary = tempfile.TemporaryDirectory(prefix="dry-run-")
        self._folders: dict[str, Path] = {}
        for name in ("checkpoint_path", "model_dir", "output_data_dir"):
            self._folders[name] = getattr(args, name)
            setattr(args, name, Path(self._temporary.name, name))
        args.epochs = EPOCHS if hasattr(args, "batch_size") else ROUNDS

    def close(self) -> None:
        """Remove the files that the training has written."""
        self._temporary.cleanup()

    def check(self, name: str, dataset: Any, read_samples: Callable[..., Any]) -> None:
        """Read all samples of a data set.

        Args:
            name: "training" or "validation".
            dataset: see `common/datasets.py`.
            read_samples: a function of (dataset, indices) that returns arrays (samples, labels, weights).

        Raises UserError if some cannot be read, after logging a line for each.
        """
        if hasattr(dataset, "batches"):
            return  # a data set of the framework; the training reads some batches
        is_ours = isinstance(dataset, datasets.ArrayDataset)
        if is_ours and not isinstance(dataset.images, ImageFiles):
            return  # in memory already
        indices = np.arange(len(dataset))
        bad: list[str] = []
        for part in np.array_split(indices, max(1, len(indices) // self.args.batch_size)):
            if not _try(read_samples, dataset, part):
                continue
            for index in part:
                reason = _try(read_samples, dataset, np.array([index]))
                if reason:
                    bad.append(reason if is_ours else f"sample {index} of the {name} data set: {reason}")
        for line in bad[:MAX_SHOWN]:
            log(line)
        if bad:
            raise UserError(f"{len(bad)} of {len(dataset)} {name} samples cannot be read, see above")

    def shorten(self, train: Any, validation: Any) -> tuple[Any, Any]:
        """Return the first samples of both data sets."""
        size = self.args.batch_size
        if hasattr(train, "batches"):
            self.steps_per_epoch = len(train)
            return train.take(STEPS), validation
        self.steps_per_epoch = -(-len(train) // size)
        return _first(train, STEPS * size), _first(validation, size)

    def report(self, progress: Any) -> None:
        """Log the time, memory and disk space that the training would need, and the folders."""
        folder = self._folders["checkpoint_path"]
        row = progress.history[-1]
        unit: Any  # a text, and later a number of bytes
        if self.steps_per_epoch is None:
            seconds, unit = row["seconds"], "a boosting round"
        else:
            seconds = row["seconds"] * self.steps_per_epoch / min(STEPS, self.steps_per_epoch)
            unit = f"the {self.steps_per_epoch} steps of an epoch"
        log(f"Dry run: about {seconds:.3g} s for {unit}, {seconds * self.epochs:.3g} s for {self.epochs}")
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        log(f"Dry run: {_megabytes(peak)} of memory at most (without that of a GPU)")
        sizes = [path.stat().st_size for path in self.args.checkpoint_path.iterdir() if path.is_file()]
        free = shutil.disk_usage(_existing(folder)).free
        log(
            f"Dry run: a checkpoint takes {_megabytes(max(sizes))}, and {folder} has room for "
            f"{_megabytes(free)}; --keep-checkpoints keeps {self.args.keep_checkpoints or 'all'} epochs"
        )
        if folder.is_dir() and (found := checkpoints.find_checkpoints(folder, self.pattern)):
            log(f"Dry run: {folder} contains {found[0][1]}, from which a training would resume")
        places = ", ".join(str(path) for path in self._folders.values())
        log(f"Dry run: nothing was written; a training would write into {places}")


def _try(read_samples, dataset, indices):
    """Return why samples cannot be read, or None."""
    try:
        read_samples(dataset, indices)
    except UserError as error:
        return str(error)
    except Exception as error:  # the data set is the user's
        return f"{type(error).__name__}: {error}"
    return None


def _first(dataset, count):
    """Return a data set of the first samples."""
    if isinstance(dataset, datasets.ArrayDataset):
        indices = dataset.indices[:count]
        return datasets.ArrayDataset(dataset.images, dataset.labels, dataset.classes, indices)
    return _FirstSamples(dataset, count)


class _FirstSamples:
    """The first samples of a data set, with its other attributes."""

    def __init__(self, dataset, count):
        self.dataset = dataset
        self._count = min(count, len(dataset))

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return self.dataset[index]

    def __getattr__(self, name):
        return getattr(self.dataset, name)


def _existing(folder):
    """Return a folder, or the nearest one above it that exists."""
    folder = Path(os.path.abspath(folder))
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _megabytes(count):
    return f"{count / 1e6:,.1f} MB"
