"""Reading tables for XGBoost: CSV, LIBSVM and Parquet files, or the digits that come with scikit-learn."""

import re
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.report import log

EXPECTED = "expected .csv (label first, no header), .libsvm or .txt (LIBSVM), or .parquet files (label first) below it"


class Table(NamedTuple):
    """Features (n, columns) as a float32 array, NaN where missing, or a scipy CSR matrix; labels (n,) as float32."""

    features: object
    labels: np.ndarray


class Dataset(NamedTuple):
    """Training and validation rows."""

    train: Table
    validation: Table


def load_tables(args):
    """Read every file below the folders that the flags name, as a Dataset.

    Without `--validation` a tenth of the training rows, drawn with the seed, is held out.
    Raises UserError where the folders do not hold what is expected.
    """
    if args.train is None:
        tables = [_digits()]
    else:
        channels = {"--train": args.train, "--validation": args.validation}
        tables = _read_channels({flag: folder for flag, folder in channels.items() if folder is not None})
    if len(tables) == 1:
        order = np.random.default_rng((args.seed, 0)).permutation(len(tables[0].labels))
        held_out, kept = np.split(order, [max(1, len(order) // 10)])
        tables = [Table(tables[0].features[rows], tables[0].labels[rows]) for rows in (kept, held_out)]
    data = Dataset(*tables)
    log(
        f"Data: {len(data.train.labels)} training and {len(data.validation.labels)} validation rows of "
        f"{data.train.features.shape[1]} columns"
    )
    return data


def _digits():
    from sklearn.datasets import load_digits

    log("No --train folder: using the handwritten digits that come with scikit-learn")
    digits = load_digits()
    return Table(digits.data.astype(np.float32), digits.target.astype(np.float32))


def _read_channels(channels):
    """Return one table per channel folder, all with the same columns."""
    files = {flag: _table_files(flag, folder) for flag, folder in channels.items()}
    paths = [path for channel in files.values() for path in channel]
    for path in paths:
        if _kind(path) != _kind(paths[0]):
            raise UserError(f"{paths[0]} is {_kind(paths[0])} and {path} is {_kind(path)}: expected files of one kind")
    tables = _read_libsvm(files) if _kind(paths[0]) == "LIBSVM" else _read_dense(files)
    for table, (flag, folder) in zip(tables, channels.items()):
        if len(table.labels) == 0:
            raise UserError(f"{flag} {folder} has files without rows: expected some")
        if not np.isfinite(table.labels).all():
            raise UserError(f"{flag} {folder} has rows without a label: expected a number first in each row")
    return tables


def _table_files(flag, folder):
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder: {EXPECTED}")
    files = sorted(path for path in folder.rglob("*") if _kind(path) and not path.name.startswith((".", "_")))
    if not files:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"{flag} {folder} holds {names}: {EXPECTED}")
    return files


def _kind(path):
    kinds = {".csv": "CSV", ".libsvm": "LIBSVM", ".txt": "LIBSVM", ".parquet": "Parquet"}
    return kinds.get(path.suffix) if path.is_file() else None


def _read_dense(files):
    """Return one table per channel folder from CSV or Parquet files."""
    loaded = {path: _load_dense(path) for paths in files.values() for path in paths}
    (first, (names, _)), *others = loaded.items()
    for path, (other_names, _) in others:
        if other_names != names:
            raise UserError(
                f"{first} has {len(names)} columns ({_shortened(names)}) and {path} has {len(other_names)} "
                f"({_shortened(other_names)}): expected the same in every file"
            )
    stacked = [np.concatenate([loaded[path][1] for path in paths]) for paths in files.values()]
    return [Table(rows[:, 1:], rows[:, 0]) for rows in stacked]


def _shortened(names):
    return ", ".join(names if len(names) <= 5 else [*names[:4], "..."])


def _load_dense(path):
    """Return the names of a CSV or Parquet file's columns, and its rows as a float32 array, the label first."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = _load_csv(path) if _kind(path) == "CSV" else parquet.read_table(path)
        columns = [column.cast(pyarrow.float64()).to_numpy() for column in table.columns]
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}. Expected numbers, the label first, no header") from error
    if len(columns) < 2:
        raise UserError(f"{path} has {len(columns)} columns: expected the label and at least one more")
    return table.column_names, np.stack(columns, axis=1).astype(np.float32)


def _load_csv(path):
    import pyarrow
    from pyarrow import csv

    # With one thread the errors name the row; a block must hold the longest row.
    reading = csv.ReadOptions(autogenerate_column_names=True, use_threads=False, block_size=1 << 26)
    try:
        return csv.read_csv(path, read_options=reading)
    except pyarrow.ArrowInvalid as error:
        row = re.search(r"Row #(\d+): (.*)", str(error))
        if row is None:
            raise
        with open(path, "rb") as file:  # the row that PyArrow names does not count blank lines
            lines = [number for number, line in enumerate(file, start=1) if line.strip()]
        raise UserError(f"{path}, line {lines[int(row[1]) - 1]}: {row[2][:200]}") from error


def _read_libsvm(files):
    """Return one sparse table per channel folder, as wide as the widest of all files."""
    from scipy import sparse

    loaded = {path: _load_libsvm(path) for paths in files.values() for path in paths}
    width = max(features.shape[1] for features, _ in loaded.values())
    for features, _ in loaded.values():
        features.resize(features.shape[0], width)
    parts = [[loaded[path] for path in paths] for paths in files.values()]
    return [
        Table(sparse.vstack([features for features, _ in part], "csr"), np.concatenate([labels for _, labels in part]))
        for part in parts
    ]


def _load_libsvm(path):
    from sklearn.datasets import load_svmlight_file

    try:
        # Indices count from 0, as they do in SageMaker's own XGBoost container.
        features, labels = load_svmlight_file(str(path), dtype=np.float32, zero_based=True)
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}. Expected lines of `label index:value ...`") from error
    return features, labels.astype(np.float32)
