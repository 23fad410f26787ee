"""Tables for XGBoost: CSV, LIBSVM and Parquet files, or the digits that come with scikit-learn.

Files are read in parts of bounded size, see `common/table_files.py`. The parts become one array in memory, or
files on disk with `--external-memory`.
"""

from __future__ import annotations

import collections
import functools
import json
import shutil
import tempfile
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from common import atomic_io, machine, table_columns, table_files, table_values
from common.datasets import FINGERPRINT_ROWS, check_apart, hold_out, spread
from common.errors import UserError
from common.report import log
from common.table_columns import MAX_CLASSES

BYTES_PER_ROW = 70  # besides the features: labels, gradients and predictions, as measured
BYTES_PER_COLUMN = 450  # that XGBoost needs for an almost empty column, as measured


class Table(NamedTuple):
    """The rows of a data set.

    Attributes:
        features: (n, columns), a float32 array with NaN for missing values, a scipy CSR matrix, a pandas
            DataFrame, or Parts.
        labels: float32 (n,).
        weights: float32 (n,), or None if all rows weigh the same.
        names: the names of the columns, or None.
        types: their types as XGBoost names them, "int", "float", or "c" for categories; or None.
        categories: the texts of each column of categories by its name, which are numbers from 0 in `features`
            in this order; or None.
        classes: the names of the classes if they are not 0, 1, 2, ..., or None; `labels` are numbers from 0.
    """

    features: Any
    labels: np.ndarray
    weights: np.ndarray | None = None
    names: list[str] | None = None
    types: list[str] | None = None
    categories: dict[str, list[str]] | None = None
    classes: list[str] | None = None

    def rows(self, chosen: Any) -> Table:
        """Return the rows that a slice or a mask chooses, in order."""
        weights = None
        if self.weights is not None:
            weights = self.weights[chosen]
        return self._replace(features=self.features[chosen], labels=self.labels[chosen], weights=weights)

    def parts(self) -> Iterator[Table]:
        """Yield the rows as tables, with one at a time in memory."""
        if not isinstance(self.features, Parts):
            yield self
            return
        end = 0
        for features in self.features:
            start, end = end, end + features.shape[0]
            part = slice(start, end)
            weights = None
            if self.weights is not None:
                weights = self.weights[part]
            yield self._replace(features=features, labels=self.labels[part], weights=weights)


class Parts:
    """Features in files, with `shape` and `[rows]` like an array. An iteration reads one part at a time.

    Attributes:
        cache: the prefix of the paths of XGBoost's files.
    """

    def __init__(self, files: Sequence[Any], num_columns: int, chosen: np.ndarray) -> None:
        self.files = files
        self.chosen = chosen  # a mask of the files' rows
        self.shape = (np.count_nonzero(chosen), num_columns)
        self.cache = str(files[0].path.parent / "cache")

    def __getitem__(self, rows: Any) -> Parts:
        chosen = np.zeros_like(self.chosen)
        chosen[np.flatnonzero(self.chosen)[rows]] = True
        return Parts(self.files, self.shape[1], chosen)

    def __iter__(self) -> Iterator[Any]:
        end = 0
        for file in self.files:
            start, end = end, end + file.shape[0]
            chosen = self.chosen[start:end]
            if chosen.any():
                yield _widen(file.read(), self.shape[1])[chosen]


class Tables(NamedTuple):
    """The training and the validation rows."""

    train: Table
    validation: Table

    def describe_job(self) -> dict[str, Any]:
        """Return the facts that a checkpoint and the run that resumes from it must share."""
        num_rows, num_columns = self.train.features.shape
        facts: dict[str, Any] = {
            "number of columns": int(num_columns),
            "number of training rows": int(num_rows),
        }
        if self.train.classes:
            facts["classes"] = list(self.train.classes)
        if self.train.categories:
            text = json.dumps(self.train.categories, sort_keys=True)
            names = ", ".join(self.train.categories)
            facts["categories"] = f"those of {names[:100]} with the checksum {zlib.crc32(text.encode())}"
        return facts

    def fingerprint(self) -> dict[str, Any]:
        """Return plain values that differ if the data differ."""
        facts: dict[str, Any] = {"number of rows (validation data)": len(self.validation.labels)}
        for name, table in zip(("training", "validation"), self):
            facts[f"checksum of the labels ({name} data)"] = _checksum(table.labels)
            if isinstance(table.features, np.ndarray) or hasattr(table.features, "tocsr"):
                rows = table.features[spread(len(table.labels), FINGERPRINT_ROWS)]
                rows = rows if isinstance(rows, np.ndarray) else rows.toarray()
                facts[f"checksum of some rows ({name} data)"] = _checksum(rows)
            if table.weights is not None:
                facts[f"checksum of the weights ({name} data)"] = _checksum(table.weights)
        facts["names of the columns"] = self.train.names
        return facts

    def shard(self, workers: Any) -> Tables:
        """Return the rows of this worker; each row belongs to one worker.

        A worker gets every n-th row instead of a block: files may be sorted, and XGBoost's auc needs all
        labels in each shard.
        """
        fewest = min(len(table.labels) for table in self)
        if fewest < workers.size:
            raise UserError(
                f"{fewest} training or validation rows are too few for {workers.size} workers: "
                "expected at least one row for each"
            )
        rows = slice(workers.rank, None, workers.size)
        return Tables(self.train.rows(rows), self.validation.rows(rows))


def describe(train: Any, validation: Any) -> Tables:
    """Return two tables as Tables. They may be plain tuples such as (features, labels).

    Raises UserError if they do not fit together.
    """
    tables = Tables(_to_table("training", train), _to_table("validation", validation))
    columns = [table.names or table.features.shape[1] for table in tables]
    if columns[0] != columns[1]:
        raise UserError(
            f"the training rows have the columns {columns[0]!s:.100}, but the validation rows have "
            f"{columns[1]!s:.100}: make them equal in load_data"
        )
    return tables


def _to_table(name, table):
    if not isinstance(table, (tuple, list)) or not 2 <= len(table) <= len(Table._fields):
        raise UserError(
            f"load_data returns a {type(table).__name__} as the {name} table: expected (features, labels), "
            "(features, labels, weights) or (features, labels, weights, names)"
        )
    features, labels, weights, names, *others = Table(*table)
    num_rows, num_columns = features.shape
    labels = np.asarray(labels, np.float32)
    if weights is not None:
        weights = np.asarray(weights, np.float32)
    if names is not None:
        names = [str(column) for column in names]
        if len(names) != num_columns:
            raise UserError(
                f"load_data returns {len(names)} names for the {num_columns} columns of the {name} rows: "
                "expected one per column"
            )
    for title, values in (("labels", labels), ("weights", weights)):
        if values is not None and len(values) != num_rows:
            raise UserError(
                f"load_data returns {num_rows} {name} rows with {len(values)} {title}: expected one per row"
            )
    if num_rows == 0:
        raise UserError(f"load_data returns no {name} rows: expected at least one")
    return Table(features, labels, weights, names, *others)


def _checksum(values):
    return zlib.crc32(np.ascontiguousarray(values))


def load_tables(args: Namespace) -> tuple[Table, ...]:
    """Read every file below `--train` and `--validation`; return the training and the validation Table.

    Without `--validation` a tenth of the training rows, drawn with the seed, is held out. The training
    files define the columns, see `common/table_columns.py`.

    Raises UserError if the folders do not contain what is expected.
    """
    folder = None
    if args.external_memory:
        folder = atomic_io.temporary_folder("training-data-")
    facts: dict[str, Any] = {}
    if args.train is None:
        channels = [_digits(folder)]
    else:
        check_apart(args.train, args.validation)
        channels, facts = _read_channels(args, folder)
    num_columns = 0
    for parts in channels:
        num_columns = max(num_columns, *(part.features.shape[1] for part in parts))
    _check_memory(num_columns)
    if folder:
        _check_room(folder, num_columns * args.max_bin)
    tables = [_join(parts, num_columns)._replace(**facts) for parts in channels]
    channels.clear()  # the next step needs memory
    if len(tables) == 1:
        if len(tables[0].labels) < 2:
            raise UserError(f"--train {args.train} has one row only: expected more, and --validation")
        if args.train:
            log("No --validation: a tenth of the training rows is held out")
        return _hold_out(tables[0], args.seed)
    return tuple(tables)


def _hold_out(table, seed):
    """Return a table as two: nine tenths of the rows, and a tenth."""
    labels = table.labels
    if len(np.unique(labels)) > MAX_CLASSES and not table.classes:  # a regression
        labels = np.zeros(len(labels))
    held_out = np.zeros(len(labels), bool)
    held_out[hold_out(labels, seed)[0]] = True
    return table.rows(~held_out), table.rows(held_out)


def _digits(folder):
    from sklearn.datasets import load_digits

    log("No --train folder: using the handwritten digits that come with scikit-learn")
    digits = load_digits()
    features = digits.data.astype(np.float32)
    return [_Part(_keep(features, folder), digits.target.astype(np.float32), None)]


# Files -----------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Some rows: features in memory or in a file on disk."""

    features: object
    labels: np.ndarray
    weights: object


def _read_channels(args, folder):
    """Return the parts of the training and, with `--validation`, the validation files, and their facts.

    The facts are attributes of Table: names, types, categories and classes.
    """
    outputs = [args.output, args.checkpoint_path, args.model_dir, args.output_data_dir]
    paths = {"--train": table_files.find_files("--train", args.train, outputs)}
    if args.validation is not None:
        paths["--validation"] = table_files.find_files("--validation", args.validation, outputs)
    wanted = [name for name in (args.label_column, args.weight_column) if name and not name.isdecimal()]
    files = table_files.open_files([path for channel in paths.values() for path in channel], wanted)
    num_training = len(paths["--train"])
    channels = {"--train": files[:num_training]}
    if len(paths) > 1:
        channels["--validation"] = files[num_training:]
    if isinstance(files[0], table_files.LibsvmFile):
        return _read_libsvm(args, channels, folder)
    _check_rows(files, args.external_memory)
    try:
        layout = table_columns.find_layout(channels["--train"], args)
        return _read_columns(args, channels, layout, folder)
    except table_values.NotNumbersError:  # a later row has text: look at all rows
        _remove_parts(folder)
    layout = table_columns.find_layout(channels["--train"], args, careful=True)
    return _read_columns(args, channels, layout, folder)


def _check_rows(files, is_external):
    """Raise UserError if memory is too small for the rows, whose number Parquet files contain.

    Equal rows take almost no space in such a file.
    """
    num_rows = sum(getattr(file, "num_rows", 0) for file in files)
    num_columns = len(files[0].names)
    needed = num_rows * (BYTES_PER_ROW + (0 if is_external else 4 * num_columns))
    free = machine.available_memory()
    if needed > free:
        hint = "" if is_external else ", or pass --external-memory"
        others = f" and {len(files) - 1} other files have" if len(files) > 1 else " has"
        raise UserError(
            f"{files[0].path}{others} {num_rows} rows, for which {needed / 1e9:.2f} GB are needed, but "
            f"{free / 1e9:.2f} GB are free: use fewer{hint}"
        )


def _read_columns(args, channels, layout, folder):
    first = channels["--train"][0]
    unseen = {flag: collections.Counter() for flag in channels}
    parts = []
    for flag, files in channels.items():
        read = functools.partial(table_columns.read, layout=layout, unseen=unseen[flag])
        parts.append(_read_channel(flag, files, read, folder))
    num_files = sum(map(len, channels.values()))
    table_columns.log_features(layout, f"{num_files}, {first}")
    names = table_columns.model_names(layout, first.has_header)
    types = categories = None
    if names:
        types = [feature.type for feature in layout.features]
        categories = {}
        for name, feature in zip(names, layout.features):
            if feature.values:
                categories[name] = feature.values
    name = layout.label_name if args.label_column else f"{layout.label_name}, by default the first column"
    parts, classes = _find_classes(args, parts, name, layout.label_values)
    for flag, counts in unseen.items():
        table_columns.log_unseen(flag, counts)
    return parts, {"names": names, "types": types, "categories": categories or None, "classes": classes}


def _read_libsvm(args, channels, folder):
    for flag in ("label_column", "weight_column"):
        if getattr(args, flag):
            raise UserError(
                f"--{flag.replace('_', '-')}: LIBSVM files have no such columns; a line is "
                "`label index:value ...` or `label:weight index:value ...`"
            )

    def read(file):
        row = 0
        for features, labels, weights in file.parts():
            table_columns.check_numbers(file, features, labels, weights, row)
            yield features, labels, weights
            row += len(labels)

    parts = [_read_channel(flag, files, read, folder) for flag, files in channels.items()]
    parts, classes = _find_classes(args, parts, "the first number of each line", None)
    return parts, {"classes": classes}


def _read_channel(flag, files, read, folder):
    """Return the parts of all files; `read` is a function of a file that yields them."""
    parts = []
    for file in files:
        for features, labels, weights in read(file):
            if len(labels):
                parts.append(_Part(_keep(features, folder), labels, weights))
    if not parts:
        raise UserError(f"{flag} has files without rows, such as {files[0].path}: expected at least one row")
    if len({part.weights is None for part in parts}) > 1:
        raise UserError(
            f"{flag}: some files or lines have weights and others have none: expected all or none"
        )
    return parts


def _find_classes(args, channels, name, texts):
    """Return the channels, with labels from 0 if they are classes, and the names of the classes or None."""
    labels = np.concatenate([part.labels for part in channels[0]])
    kind = (args.objective or "").partition(":")[0]
    if texts:
        if kind not in ("", "multi", "binary"):
            raise UserError(
                f"--objective {args.objective} needs numbers as labels, but {name} has text: {texts[0]!r}"
            )
        table_columns.log_label(name, labels, texts)
        return channels, texts
    values = table_columns.find_classes(labels, args)
    if values is None:
        table_columns.log_label(name, labels, None)
        return channels, None
    numbered = []
    for parts in channels:
        numbers = [table_columns.number_labels(part.labels, values) for part in parts]
        numbered.append([part._replace(labels=new) for part, new in zip(parts, numbers)])
    classes = [f"{value:g}" for value in values]
    table_columns.log_label(name, np.concatenate([part.labels for part in numbered[0]]), classes)
    return numbered, classes


def _join(parts, num_columns):
    """Return parts (features, labels) as one table."""
    from scipy import sparse

    features, labels, weights = zip(*parts)
    labels = np.concatenate(labels)
    weights = None if weights[0] is None else np.concatenate(weights)
    if isinstance(features[0], _File):
        joined = Parts(features, num_columns, np.ones(len(labels), bool))
    elif sparse.issparse(features[0]):
        joined = sparse.vstack([_widen(part, num_columns) for part in features], "csr")
    else:
        joined = np.concatenate(features)
    return Table(joined, labels, weights)


def _widen(features, num_columns):
    """Return the features with `num_columns` columns: the parts of LIBSVM files differ in their width."""
    if not isinstance(features, np.ndarray):
        features.resize(features.shape[0], num_columns)
    return features


# External memory -------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """Features in a file on disk."""

    path: Path
    shape: tuple[int, int]

    def read(self):
        from scipy import sparse

        if self.path.suffix == ".npz":
            return sparse.load_npz(self.path)
        return np.load(self.path)


def _keep(features, folder):
    """Return the features as a _File in the folder; unchanged without a folder."""
    from scipy import sparse

    if folder is None:
        return features
    is_dense = isinstance(features, np.ndarray)
    suffix = ".npy" if is_dense else ".npz"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=suffix, delete=False) as file:
            if is_dense:
                np.save(file, features)
            else:
                sparse.save_npz(file, features, compressed=False)
    except OSError as error:
        raise _no_room(folder, error.strerror or error) from error
    return _File(Path(file.name), features.shape)


def _check_memory(num_columns):
    """Raise UserError if the limits of XGBoost's bins alone need more than the free memory."""
    needed = num_columns * BYTES_PER_COLUMN
    free = machine.available_memory()
    if needed > free:
        raise UserError(
            f"the table has {num_columns} columns, for which XGBoost needs {needed / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB are free: number the columns from 0 without large gaps"
        )


def _remove_parts(folder):
    for file in folder.iterdir() if folder else ():
        file.unlink()


def _check_room(folder, num_bins):
    """Raise UserError if XGBoost might fill the disk, which would abort the process."""
    sizes = [file.stat().st_size for file in folder.iterdir()]
    # XGBoost's files have half the size of the rows; each part also has the limits of all bins.
    needed = sum(sizes) + 16 * num_bins * len(sizes)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _no_room(folder, f"{free >> 20} MB are left for XGBoost, which may need {needed >> 20} MB")


def _no_room(folder, reason):
    return UserError(
        f"--external-memory: cannot write to {folder}: {reason}. It needs twice the size of the table, as "
        "numbers of 4 bytes: free some space, or set the environment variable TMPDIR to another folder"
    )
