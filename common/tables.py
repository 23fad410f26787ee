"""Tables for XGBoost: CSV, LIBSVM and Parquet files, or the digits that come with scikit-learn.

Files are read in parts of bounded size. The parts become one array in memory, or files on disk with
`--external-memory`.
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

from common.datasets import FINGERPRINT_ROWS, check_apart, hold_out, spread
from common.errors import UserError
from common.report import log, log_left_out

EXPECTED = "expected .csv (label first, no header), .libsvm or .txt, or .parquet files (label first) below it"
MAX_CLASSES = 100  # with more values the labels count as those of a regression
PART = 1 << 23  # bytes of text, or of floats, that are read at once; no row of a CSV file may be longer
KINDS = {".csv": "CSV", ".libsvm": "LIBSVM", ".txt": "LIBSVM", ".parquet": "Parquet"}


class Table(NamedTuple):
    """The rows of a data set.

    Attributes:
        features: (n, columns), a float32 array with NaN for missing values, a scipy CSR matrix, a pandas
            DataFrame, or Parts.
        labels: float32 (n,).
        weights: float32 (n,), or None if all rows weigh the same.
        names: the names of the columns, or None.
        types: their types as XGBoost has them, "int" or "float", or None.
    """

    features: object
    labels: np.ndarray
    weights: object = None
    names: object = None
    types: object = None

    def rows(self, chosen):
        """Return the rows that a slice or a mask chooses, in order."""
        weights = None
        if self.weights is not None:
            weights = self.weights[chosen]
        return self._replace(features=self.features[chosen], labels=self.labels[chosen], weights=weights)

    def parts(self):
        """Yield the rows as tables, of which one at a time is in memory."""
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
        cache: the beginning of the paths of the files that XGBoost makes of the parts.
    """

    def __init__(self, files, num_columns, chosen):
        self.files = files
        self.chosen = chosen  # a mask of the files' rows
        self.shape = (np.count_nonzero(chosen), num_columns)
        self.cache = str(files[0].path.parent / "cache")

    def __getitem__(self, rows):
        chosen = np.zeros_like(self.chosen)
        chosen[np.flatnonzero(self.chosen)[rows]] = True
        return Parts(self.files, self.shape[1], chosen)

    def __iter__(self):
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

    def describe_job(self):
        """Return what a checkpoint must have in common with the run that resumes from it."""
        num_rows, num_columns = self.train.features.shape
        return {"number of columns": int(num_columns), "number of training rows": int(num_rows)}

    def fingerprint(self):
        """Return plain values that differ if the data differ."""
        facts = {"number of rows (validation data)": len(self.validation.labels)}
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

    def shard(self, workers):
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


def describe(train, validation):
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
    if not isinstance(table, (tuple, list)) or not 2 <= len(table) <= 5:
        raise UserError(
            f"load_data returns a {type(table).__name__} as the {name} table: expected (features, labels), "
            "(features, labels, weights) or (features, labels, weights, names)"
        )
    features, labels, weights, names, types = Table(*table)
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
    return Table(features, labels, weights, names, types)


def _checksum(values):
    return zlib.crc32(np.ascontiguousarray(values))


def load_tables(args):
    """Read every file below `--train` and `--validation`; return the training and the validation Table.

    Without `--validation` a tenth of the training rows, drawn with the seed, is held out. Parquet files
    name the columns.

    Raises UserError if the folders do not contain what is expected.
    """
    folder = None
    if args.external_memory:
        folder = _temporary_folder()
    names = types = None
    if args.train is None:
        channels = [_digits(folder)]
    else:
        paths = {"--train": args.train}
        if args.validation is not None:
            paths["--validation"] = args.validation
        check_apart(args.train, args.validation)
        channels, names, types = _read_channels(paths, folder)
    num_columns = 0
    for parts in channels:
        num_columns = max(num_columns, *(features.shape[1] for features, _ in parts))
    if folder:
        _check_room(folder, num_columns * args.max_bin)
    tables = [_join(parts, num_columns)._replace(names=names, types=types) for parts in channels]
    channels.clear()  # the next step needs memory
    if len(tables) == 1:
        return _hold_out(tables[0], args.seed)
    return tuple(tables)


def _hold_out(table, seed):
    """Return a table as two: without, and with a tenth of the rows."""
    labels = table.labels
    if len(np.unique(labels)) > MAX_CLASSES:  # a regression
        labels = np.zeros(len(labels))
    held_out = np.zeros(len(labels), bool)
    held_out[hold_out(labels, seed)[0]] = True
    return table.rows(~held_out), table.rows(held_out)


def _digits(folder):
    from sklearn.datasets import load_digits

    log("No --train folder: using the handwritten digits that come with scikit-learn")
    digits = load_digits()
    features = digits.data.astype(np.float32)
    return [(_keep(features, folder), digits.target.astype(np.float32))]


# Files -----------------------------------------------------------------------------------------------------


def _read_channels(paths, folder):
    """Return a list of parts (features, labels) for each folder, and the columns' names and types."""
    files = {flag: _find_files(flag, path) for flag, path in paths.items()}
    names = _check_files([path for channel in files.values() for path in channel])
    channels = []
    for flag, path in paths.items():
        parts = []
        for file in files[flag]:
            for features, labels in _read(file, names):
                if not np.isfinite(labels).all():
                    raise UserError(
                        f"{flag} {path} has rows without a label: expected a number first in each row"
                    )
                if len(labels):
                    parts.append((_keep(features, folder), labels))
        if not parts:
            raise UserError(f"{flag} {path} has files without rows: expected some")
        channels.append(parts)
    return channels, *_feature_names(next(iter(files.values()))[0], names)


def _find_files(flag, folder):
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder: {EXPECTED}")
    files = []
    left_out = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if any(name.startswith((".", "_")) for name in inside) or path.is_dir():
            continue
        if _kind(path):
            files.append(path)
        else:
            left_out.append(path.name)
    if files:
        log_left_out(flag, folder, left_out, "tables")
    if not files:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"{flag} {folder} holds {names}: {EXPECTED}")
    return files


def _check_files(files):
    """Return the names of the columns, which all files must have in common; see `_column_names`."""
    first, *others = files
    for path in others:
        if _kind(path) != _kind(first):
            raise UserError(
                f"{first} is {_kind(first)} and {path} is {_kind(path)}: expected files of one kind"
            )
    names = _column_names(first)
    for path in others:
        other = _column_names(path)
        if other != names:
            raise UserError(
                f"{first} has {len(names)} columns ({_shorten(names)}) and {path} has {len(other)} "
                f"({_shorten(other)}): expected the same in every file"
            )
    return names


def _kind(path):
    if path.is_file():
        return KINDS.get(path.suffix.lower())
    return None


def _shorten(names):
    if len(names) > 5:
        names = [*names[:4], "..."]
    return ", ".join(names)


def _column_names(path):
    """Return the names of the columns; an empty list for LIBSVM, whose files end with their largest index."""
    from pyarrow import csv, parquet

    if _kind(path) == "LIBSVM":
        return []
    with _explain_errors(path):
        if _kind(path) == "Parquet":
            names = parquet.read_schema(path).names
        else:
            with open(path, "rb") as file:
                line = next((line for line in file if line.strip()), b"")
            numbered = csv.ReadOptions(autogenerate_column_names=True)
            names = csv.read_csv(io.BytesIO(line), numbered).column_names
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} columns: expected the label and at least one more")
    return names


def _feature_names(path, names):
    """Return names and types of the features if the files have some that XGBoost accepts, otherwise None."""
    if _kind(path) != "Parquet":
        return None, None
    features = names[1:]
    if len(set(features)) < len(features) or re.search(r"[\[\]<]", "".join(features)):
        log(f"Column names are not used: XGBoost allows no duplicates, and no [, ] and < ({path})")
        return None, None
    return features, _feature_types(path)


def _feature_types(path):
    """Return the types of the features in a Parquet file, as XGBoost names them."""
    import pyarrow
    from pyarrow import parquet

    types = parquet.read_schema(path).types[1:]
    return ["int" if pyarrow.types.is_integer(each) else "float" for each in types]


def _read(path, names):
    """Yield features and labels of one part of a file after the other."""
    import pyarrow

    with _explain_errors(path):
        if _kind(path) == "LIBSVM":
            yield from _read_libsvm(path)
            return
        batches = _read_csv(path, names) if _kind(path) == "CSV" else _read_parquet(path, names)
        for batch in batches:
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

    # With these options it does not read a whole row group at once.
    file = parquet.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False)
    return file.iter_batches(max(1, PART // 4 // len(names)))


def _read_libsvm(path):
    from sklearn.datasets import load_svmlight_file

    with open(path, "rb") as file:
        for lines in iter(lambda: file.readlines(PART), []):
            text = io.BytesIO(b"".join(lines))
            # Indices count from 0, as they do in SageMaker's own XGBoost container.
            features, labels = load_svmlight_file(text, dtype=np.float32, zero_based=True)
            yield features, labels.astype(np.float32)


@contextlib.contextmanager
def _explain_errors(path):
    """Raise UserError with the file, and if possible the line, for an error of a reader inside this block."""
    try:
        yield
    except (ValueError, NotImplementedError, OSError) as error:  # PyArrow's are among them
        row = re.search(r"Row #(\d+): (.*)", str(error))
        if row is None:
            expected = "numbers, the label first"
            if _kind(path) == "LIBSVM":
                expected = "lines of `label index:value ...`"
            raise UserError(f"cannot read {path}: {error}. Expected {expected}, no header") from error
        line = _line_number(path, int(row[1]))
        raise UserError(
            f"{path}, line {line}: {row[2][:200]}. Expected numbers, the label first, no header"
        ) from error


def _line_number(path, row):
    """Return the line of a row of a CSV file. Both are counted from 1, rows without blank lines."""
    with open(path, "rb") as file:
        numbers = (number for number, line in enumerate(file, start=1) if line.strip())
        return next(itertools.islice(numbers, row - 1, None))


def _join(parts, num_columns):
    """Return parts (features, labels) as one table."""
    from scipy import sparse

    features, labels = zip(*parts)
    labels = np.concatenate(labels)
    if isinstance(features[0], _File):
        joined = Parts(features, num_columns, np.ones(len(labels), bool))
    elif sparse.issparse(features[0]):
        joined = sparse.vstack([_widen(part, num_columns) for part in features], "csr")
    else:
        joined = np.concatenate(features)
    return Table(joined, labels)


def _widen(features, num_columns):
    """Return the features with `num_columns` columns: the parts of LIBSVM files differ in their width."""
    if not isinstance(features, np.ndarray):
        features.resize(features.shape[0], num_columns)
    return features


# External memory -------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """Features in a file on disk."""

    path: Path
    shape: Tuple[int, int]

    def read(self):
        from scipy import sparse

        if self.path.suffix == ".npz":
            return sparse.load_npz(self.path)
        return np.load(self.path)


def _keep(features, folder):
    """Return the features as they are without a folder, otherwise as a _File in it."""
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


def _check_room(folder, num_bins):
    """Raise UserError if XGBoost might fill the disk, as it aborts the process then."""
    sizes = [file.stat().st_size for file in folder.iterdir()]
    # XGBoost's files have half the size of the rows; each part also has the limits of all bins.
    needed = sum(sizes) + 16 * num_bins * len(sizes)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _no_room(folder, f"{free >> 20} MB are left for XGBoost, which may need {needed >> 20} MB")


def _no_room(folder, reason):
    return UserError(
        f"--external-memory: cannot write to {folder}: {reason}. It needs twice the size of the table, as "
        "numbers of 4 bytes: make room, or name another folder in the environment variable TMPDIR"
    )


def _temporary_folder():
    """Return a new folder that is removed when this process ends, even if it is killed."""
    folder = tempfile.mkdtemp(prefix="training-data-")
    # The shell waits until no process holds the other end of the pipe. No Ctrl-C reaches its own session.
    command = ["/bin/sh", "-c", 'read -r _; rm -rf "$0"', folder]
    remover = subprocess.Popen(  # noqa: S603 - nothing in it is from outside
        command,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(remover.communicate)
    return Path(folder)
