"""Reading tables for XGBoost: CSV, LIBSVM and Parquet files, or the digits that come with scikit-learn.

All are read in parts of bounded size: they become one array in memory, or with `--external-memory` files on the disk.
"""

import atexit
import contextlib
import io
import itertools
import re
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple, Tuple

import numpy as np

from common import cluster
from common.errors import UserError
from common.report import log

EXPECTED = "expected .csv (label first, no header), .libsvm or .txt (LIBSVM), or .parquet files (label first) below it"
PART = 1 << 23  # bytes of text, or of floats, that are read at once; no row of a CSV file may be longer


class Table(NamedTuple):
    """Features (n, columns), float32 with NaN where missing or a scipy CSR matrix or Parts; labels (n,) as float32."""

    features: object
    labels: np.ndarray

    def rows(self, chosen):
        """Return the rows that a slice or a mask chooses, in the order of the files."""
        return Table(self.features[chosen], self.labels[chosen])

    def parts(self):
        """Yield features and labels of one part after the other; what is in memory is one part."""
        end = 0
        for features in self.features if isinstance(self.features, Parts) else [self.features]:
            start, end = end, end + features.shape[0]
            yield features, self.labels[start:end]


class Parts:
    """Features in files, with `shape` and `[rows]` as an array has them; iterating reads one part after the other."""

    def __init__(self, files, columns, chosen):
        self.files, self.chosen = files, chosen  # a mask of the files' rows
        self.shape = (np.count_nonzero(chosen), columns)
        self.cache = str(files[0].path.parent / "cache")  # where what XGBoost makes of them begins

    def __getitem__(self, rows):
        chosen = np.zeros_like(self.chosen)
        chosen[np.flatnonzero(self.chosen)[rows]] = True
        return Parts(self.files, self.shape[1], chosen)

    def __iter__(self):
        end = 0
        for file in self.files:
            start, end = end, end + file.shape[0]
            if self.chosen[start:end].any():
                yield _widened(file.read(), self.shape[1])[self.chosen[start:end]]


class Dataset(NamedTuple):
    """Training and validation rows."""

    train: Table
    validation: Table

    def describe_content(self):
        """Return facts, as plain values, that are the same on all workers where all have the same data."""
        facts = {}
        for name, table in zip(("training", "validation"), self):
            facts[f"shape of the {name} rows"] = [int(size) for size in table.features.shape]
            facts[f"checksum of the {name} labels"] = zlib.crc32(np.ascontiguousarray(table.labels))
        return facts

    def describe_job(self, args, model):
        """Return what a checkpoint must have in common with the run that resumes from it."""
        return {
            "--booster": args.booster,
            "--objective": model["objective"],
            "--seed": args.seed,
            "number of classes": model.get("num_class", 0),
            "number of columns": self.train.features.shape[1],
            "number of training rows": self.train.features.shape[0],
        }

    def shares(self):
        """Return this worker's share of both; each row is in one share."""
        fewest = min(len(table.labels) for table in self)
        if fewest < cluster.size:
            raise UserError(f"{fewest} training or validation rows are too few for {cluster.size} workers")
        # Every n-th row rather than one piece: files may be sorted, and XGBoost's auc wants all labels in each share.
        return Dataset(*(table.rows(slice(cluster.rank, None, cluster.size)) for table in self))


def load_tables(args):
    """Read every file below the folders that the flags name, as a Dataset.

    Without `--validation` a tenth of the training rows, drawn with the seed, is held out.
    Raises UserError where the folders do not hold what is expected.
    """
    folder = _temporary_folder() if args.external_memory else None
    if args.train is None:
        channels = [_digits(folder)]
    else:
        channels = {"--train": args.train, "--validation": args.validation}
        channels = _read_channels({flag: path for flag, path in channels.items() if path is not None}, folder)
    columns = max(features.shape[1] for parts in channels for features, _ in parts)
    if folder:
        _check_room(folder, columns * args.max_bin)
    tables = [_join(parts, columns) for parts in channels]
    if len(tables) == 1:
        count = len(tables[0].labels)
        held_out = np.zeros(count, bool)
        held_out[np.random.default_rng((args.seed, 0)).permutation(count)[: max(1, count // 10)]] = True
        tables = [tables[0].rows(~held_out), tables[0].rows(held_out)]
    data = Dataset(*tables)
    log(
        f"Data: {len(data.train.labels)} training and {len(data.validation.labels)} validation rows of "
        f"{data.train.features.shape[1]} columns{cluster.describe(len(data.train.labels), 'training rows')}"
    )
    return data


def _digits(folder):
    from sklearn.datasets import load_digits

    log("No --train folder: using the handwritten digits that come with scikit-learn")
    digits = load_digits()
    return [(_keep(digits.data.astype(np.float32), folder), digits.target.astype(np.float32))]


def _read_channels(channels, folder):
    """Return a list of parts (features, labels) per channel folder, all of the same columns."""
    files = {flag: _table_files(flag, path) for flag, path in channels.items()}
    first, *others = [path for channel in files.values() for path in channel]
    for path in others:
        if _kind(path) != _kind(first):
            raise UserError(f"{first} is {_kind(first)} and {path} is {_kind(path)}: expected files of one kind")
    names = _column_names(first)
    for path in others:
        other = _column_names(path)
        if other != names:
            raise UserError(
                f"{first} has {len(names)} columns ({_shortened(names)}) and {path} has {len(other)} "
                f"({_shortened(other)}): expected the same in every file"
            )
    parts = {flag: [] for flag in channels}
    for flag, path in channels.items():
        for features, labels in (part for file in files[flag] for part in _read(file, names)):
            if not np.isfinite(labels).all():
                raise UserError(f"{flag} {path} has rows without a label: expected a number first in each row")
            if len(labels):
                parts[flag].append((_keep(features, folder), labels))
        if not parts[flag]:
            raise UserError(f"{flag} {path} has files without rows: expected some")
    return list(parts.values())


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


def _shortened(names):
    return ", ".join(names if len(names) <= 5 else [*names[:4], "..."])


def _column_names(path):
    """Return the names of the columns; of LIBSVM none, whose files are as wide as their largest index."""
    from pyarrow import csv, parquet

    if _kind(path) == "LIBSVM":
        return []
    with _reading(path):
        if _kind(path) == "Parquet":
            names = parquet.read_schema(path).names
        else:
            with open(path, "rb") as file:
                line = next((line for line in file if line.strip()), b"")
            names = csv.read_csv(io.BytesIO(line), csv.ReadOptions(autogenerate_column_names=True)).column_names
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} columns: expected the label and at least one more")
    return names


def _read(path, names):
    """Yield features and labels of one part of a file after the other."""
    import pyarrow

    with _reading(path):
        if _kind(path) == "LIBSVM":
            yield from _read_libsvm(path)
            return
        for batch in _read_csv(path, names) if _kind(path) == "CSV" else _read_parquet(path, names):
            rows = np.empty((batch.num_rows, len(names)), np.float32)
            for index, column in enumerate(batch.columns):
                rows[:, index] = column.cast("float64").to_numpy(zero_copy_only=False)
            yield rows[:, 1:], rows[:, 0].copy()
        pyarrow.default_memory_pool().release_unused()


def _read_csv(path, names):
    import pyarrow
    from pyarrow import csv

    # With one thread the errors name the row.
    reading = csv.ReadOptions(column_names=names, use_threads=False, block_size=PART)
    converting = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.float64()))
    return csv.open_csv(path, read_options=reading, convert_options=converting)


def _read_parquet(path, names):
    from pyarrow import parquet

    # So it does not read the whole of a row group at once.
    file = parquet.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False)
    return file.iter_batches(max(1, PART // 4 // len(names)))


def _read_libsvm(path):
    from sklearn.datasets import load_svmlight_file

    with open(path, "rb") as file:
        for lines in iter(lambda: file.readlines(PART), []):
            # Indices count from 0, as they do in SageMaker's own XGBoost container.
            features, labels = load_svmlight_file(io.BytesIO(b"".join(lines)), dtype=np.float32, zero_based=True)
            yield features, labels.astype(np.float32)


@contextlib.contextmanager
def _reading(path):
    """Name the file, and where possible the line, in what goes wrong inside this block."""
    try:
        yield
    except (ValueError, NotImplementedError, OSError) as error:  # PyArrow's are among them
        row = re.search(r"Row #(\d+): (.*)", str(error))
        if row is None:
            wanted = "lines of `label index:value ...`" if _kind(path) == "LIBSVM" else "numbers, the label first"
            raise UserError(f"cannot read {path}: {error}. Expected {wanted}, no header") from error
        with open(path, "rb") as file:  # PyArrow counts no blank lines
            lines = (number for number, line in enumerate(file, start=1) if line.strip())
            line = next(itertools.islice(lines, int(row[1]) - 1, None))
        raise UserError(f"{path}, line {line}: {row[2][:200]}. Expected numbers, the label first, no header") from error


def _join(parts, columns):
    """Return parts (features, labels) as one table."""
    from scipy import sparse

    features, labels = zip(*parts)
    labels = np.concatenate(labels)
    if isinstance(features[0], _File):
        return Table(Parts(features, columns, np.ones(len(labels), bool)), labels)
    if sparse.issparse(features[0]):
        return Table(sparse.vstack([_widened(part, columns) for part in features], "csr"), labels)
    return Table(np.concatenate(features), labels)


def _widened(features, columns):
    if not isinstance(features, np.ndarray):
        features.resize(features.shape[0], columns)
    return features


class _File(NamedTuple):
    """Features in a file on the disk."""

    path: Path
    shape: Tuple[int, int]

    def read(self):
        from scipy import sparse

        return sparse.load_npz(self.path) if self.path.suffix == ".npz" else np.load(self.path)


def _keep(features, folder):
    """Return the features as they are, or where there is a folder as a _File in it."""
    from scipy import sparse

    if folder is None:
        return features
    save, suffix = (np.save, ".npy") if isinstance(features, np.ndarray) else (sparse.save_npz, ".npz")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=suffix, delete=False) as file:
            save(file, features, **({"compressed": False} if suffix == ".npz" else {}))
    except OSError as error:
        raise _no_room(folder, error.strerror or error) from error
    return _File(Path(file.name), features.shape)


def _check_room(folder, bins):
    """Raise UserError where XGBoost might fill the disk, at which it aborts the process."""
    sizes = [file.stat().st_size for file in folder.iterdir()]
    needed = sum(sizes) + 16 * bins * len(sizes)  # of the rows it takes about half; each part has all bins' limits
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _no_room(folder, f"{free >> 20} MB are left for XGBoost, which may need {needed >> 20} MB")


def _no_room(folder, reason):
    return UserError(
        f"--external-memory: cannot write to {folder}: {reason}. It needs twice the size of the table, as numbers of 4 "
        "bytes: make room, or name another folder in the environment variable TMPDIR"
    )


def _temporary_folder():
    """Return a new folder that is removed when this process ends, also where it is killed."""
    folder = tempfile.mkdtemp(prefix="training-data-")
    # The shell waits until nobody holds the other end of the pipe; in a session of its own no Ctrl-C reaches it.
    command = ["/bin/sh", "-c", 'read -r _; rm -rf "$0"', folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    remover = subprocess.Popen(command, start_new_session=True, **pipes)  # noqa: S603 - nothing in it is from outside
    atexit.register(remover.communicate)
    return Path(folder)
