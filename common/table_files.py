"""Find the files of tables (CSV, LIBSVM and Parquet), and read them in parts of bounded size."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from pathlib import Path
from typing import Any, Collection, Iterator, Sequence

import numpy as np

from common import errors, table_values
from common.errors import UserError
from common.report import log, log_left_out, shortened
from common.table_csv import SAMPLE, CsvFile
from common.table_values import dates_error, explain_errors, open_bytes, to_text, unique_names

KINDS = {".csv": "CSV", ".tsv": "CSV", ".libsvm": "LIBSVM", ".txt": "LIBSVM", ".parquet": "Parquet"}
EXPECTED = "expected .csv, .tsv, .libsvm, .txt (LIBSVM) or .parquet files below it"
MAX_INDEX = 2**31 - 2  # in a LIBSVM file: SciPy and XGBoost count columns in 32 bits

# Finding ----------------------------------------------------------------------------------------------------


def find_files(flag: str, folder: Path, outputs: Sequence[Path] = ()) -> list[Path]:
    """Return the paths of the files in a folder and below it, in order, without empty ones.

    Args:
        flag: the flag that names the folder, for messages.
        folder: the path, such as the current folder, or that of a single file.
        outputs: folders that trainings write into, which may be inside it.
    """
    paths = [folder] if kind_of(folder) else _list_files(flag, folder, outputs)
    empty = [path for path in paths if _is_empty(path)]
    paths = [path for path in paths if path not in empty]
    if not paths:
        raise UserError(f"{flag} {folder} has files without rows: expected at least one row")
    if empty:
        log(f"Left out of {flag} {folder}, without rows ({len(empty)}): {shortened(empty)}")
    return paths


def _list_files(flag, folder, outputs):
    own = [output.resolve() for output in outputs if folder.resolve() in output.resolve().parents]
    own = [output.relative_to(folder.resolve()).parts for output in own]
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder or a table: {EXPECTED}")
    paths = []
    left_out = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        is_hidden = any(name.startswith((".", "_")) for name in inside)
        is_own = any(inside[: len(parts)] == parts for parts in own)
        if is_hidden or is_own or path.is_dir():
            continue
        if kind_of(path):
            paths.append(path)
        else:
            left_out.append(path.name)
    if not paths:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"{flag} {folder} contains {names}: {EXPECTED}")
    log_left_out(flag, folder, left_out, "tables")
    return paths


def kind_of(path: Path) -> str | None:
    """Return the kind of a file by its name, which may end with .gz for text; None for other files."""
    if not path.is_file():
        return None
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        kind = KINDS.get("".join(suffixes[-2:-1]))
        return None if kind == "Parquet" else kind
    return KINDS.get("".join(suffixes[-1:]))


def _is_empty(path):
    if kind_of(path) == "Parquet":
        return False
    with explain_errors(path), open_bytes(path) as file:
        return not file.read(SAMPLE).replace(b"\xef\xbb\xbf", b"").strip()


def open_files(paths: list[Path], wanted: Collection[str] = ()) -> list[Any]:
    """Return the files at these paths as CsvFile, LibsvmFile or ParquetFile.

    Args:
        paths: files of one kind, with the same columns.
        wanted: names of columns from the flags.
    """
    classes: dict[Any, Any] = {"CSV": CsvFile, "LIBSVM": LibsvmFile, "Parquet": ParquetFile}
    first, *others = paths
    for path in others:
        if kind_of(path) != kind_of(first):
            raise UserError(
                f"{first} is {kind_of(first)} and {path} is {kind_of(path)}: expected files of one kind"
            )
    opened = [classes[kind_of(first)](first, wanted)]
    for path in others:
        opened.append(classes[kind_of(path)](path, wanted, opened[0]))
        _check_same_columns(opened[0], opened[-1])
    return opened


def _check_same_columns(first, other):
    if first.names == other.names:
        return
    raise UserError(
        f"{first.path} has {len(first.names)} columns ({shortened(first.names)}) and {other.path} has "
        f"{len(other.names)} ({shortened(other.names)}): expected the same in every file"
    )


# Parquet ----------------------------------------------------------------------------------------------------


class ParquetFile:
    """A Parquet file, with the attributes and methods of CsvFile."""

    has_header = True

    def __init__(self, path: Path, wanted: Collection[str] = (), first: ParquetFile | None = None) -> None:
        import pyarrow
        from pyarrow import parquet

        self.path = path
        with explain_errors(path):
            metadata = parquet.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        self.num_rows = metadata.num_rows
        self.names = unique_names(schema.names)
        self._has_unique_names = len(set(schema.names)) == len(schema.names)
        if len(self.names) < 2:
            raise UserError(f"{path} has {len(self.names)} columns: expected the label and at least one more")
        self._types: list[Any] = []
        self.kinds: list[str] = []
        for name, kind in zip(self.names, schema.types):
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            self._types.append(kind)
            self.kinds.append(self._kind_of(name, kind))

    def _kind_of(self, name, kind):
        from pyarrow import types

        if types.is_temporal(kind):
            raise dates_error(self.path, name, f"the type {kind}")
        is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
        if is_number or types.is_boolean(kind) or types.is_null(kind):
            return "number"
        if types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view":
            return "text"
        raise UserError(
            f"{self.path}: the column {name} has the type {kind}: expected numbers or text; remove the column"
        )

    def batches(self, columns: list[int], text: list[int], careful: bool = False) -> Iterator[list[Any]]:
        """Yield the rows as lists of PyArrow arrays, one for each of the `columns`, which are numbers."""
        import pyarrow
        from pyarrow import parquet

        with explain_errors(self.path):
            # These options avoid reading a whole row group at once.
            file = parquet.ParquetFile(self.path, buffer_size=1 << 16, pre_buffer=False)
            names = [self.names[index] for index in columns] if self._has_unique_names else None
            for batch in file.iter_batches(max(1, table_values.PART // 4 // len(self.names)), columns=names):
                order = batch.schema.names if names else self.names
                positions = {name: position for position, name in enumerate(order)}
                yield [batch.columns[positions[self.names[index]]] for index in columns]
            pyarrow.default_memory_pool().release_unused()

    def has_truth_values(self, index: int) -> bool:
        """Return whether a column has the type bool."""
        from pyarrow import types

        return types.is_boolean(self._types[index])

    def has_whole_numbers(self, index: int) -> bool:
        """Return whether a column has a type of whole numbers, or bool."""
        from pyarrow import types

        return types.is_integer(self._types[index]) or self.has_truth_values(index)

    def place(self, row: int) -> str:
        """Return the place of a row, counted from 0."""
        return f"row {row + 1}"

    def check_quotes(self) -> None:
        """Do nothing: Parquet has no quotes."""

    def to_text(self, column: Any) -> Any:
        """Return a text column without spaces around the values, and with null for a missing one."""
        return to_text(column)

    def __str__(self) -> str:
        return "Parquet"


# LIBSVM -----------------------------------------------------------------------------------------------------


class LibsvmFile:
    """A file of lines `label index:value ...` or `label:weight index:value ...`; columns have no names."""

    has_header = False
    names = ()

    def __init__(self, path: Path, wanted: Collection[str] = (), first: LibsvmFile | None = None) -> None:
        self.path = path

    def parts(self) -> Iterator[tuple[Any, np.ndarray, np.ndarray | None]]:
        """Yield a sparse matrix (rows, columns), labels, and weights or None for one part after the other."""
        first_line = 1
        with explain_errors(self.path), open_bytes(self.path) as file:
            for lines in iter(lambda: file.readlines(table_values.PART), []):
                yield self._parse(lines, first_line)
                first_line += len(lines)

    def _parse(self, lines, first_line):
        from sklearn.datasets import load_svmlight_file

        text = b"".join(lines)
        if b"qid:" in text:
            line = _first(lines, lambda line: b"qid:" in line)
            raise UserError(
                f"{self.path}, line {first_line + line}: query groups (qid:) are not read here; remove them"
            )
        weights = None
        if re.search(rb"^[ \t]*[^\s#:]+:", text, re.MULTILINE):
            text, weights = self._split_weights(lines, first_line)
        try:
            # Indices count from 0, as they do in SageMaker's own XGBoost container.
            features, labels = load_svmlight_file(io.BytesIO(text), dtype=np.float32, zero_based=True)
        except (ValueError, OverflowError) as error:
            raise self._explain(error, text.splitlines(keepends=True), first_line) from error
        if features.shape[1] > MAX_INDEX + 1:
            raise self._explain(OverflowError(), lines, first_line)
        return features, labels.astype(np.float32), weights

    def _split_weights(self, lines, first_line):
        """Return the lines without the weights, as one text, and the weights."""
        weights = []
        rest = []
        for number, line in enumerate(lines):
            words = line.partition(b"#")[0].split(maxsplit=1)
            if not words:
                rest.append(b"\n")
                continue
            label, colon, weight = words[0].partition(b":")
            if not colon:
                raise UserError(
                    f"{self.path}, line {first_line + number}: it has no weight, unlike other lines; "
                    "expected lines of `label:weight index:value ...`"
                )
            with contextlib.suppress(ValueError):
                weights.append(float(weight))
                rest.append(b" ".join([label, *words[1:]]).rstrip() + b"\n")
                continue
            raise UserError(
                f"{self.path}, line {first_line + number}: the weight {weight!r:.50} is not a number"
            )
        return b"".join(rest), np.array(weights, np.float32)

    def _explain(self, error, lines, first_line):
        """Return an error of a part as a UserError that names the line."""
        line = _first(lines, _is_wrong)
        place = f"cannot read {self.path}" if line is None else f"{self.path}, line {first_line + line}"
        reason = errors.first_line(error)[:200]
        if isinstance(error, OverflowError):
            reason = f"an index is larger than {MAX_INDEX}"
        return UserError(
            f"{place}: {reason}. Expected lines of `label index:value ...` with rising indices, no header"
        )

    def place(self, row: int) -> str:
        """Return the place of a row, counted from 0 without blank lines and comments."""
        with open_bytes(self.path) as file:
            numbers = (number for number, line in enumerate(file, 1) if line.partition(b"#")[0].strip())
            return f"line {next(itertools.islice(numbers, row, None), 0)}"

    def __str__(self) -> str:
        return "LIBSVM"


def _is_wrong(line):
    """Return whether a line is not `label index:value ...`."""
    words = line.partition(b"#")[0].split()
    indices = []
    try:
        for label in words[:1]:
            float(label)
        for word in words[1:]:
            index, value = word.split(b":")
            float(value)
            indices.append(int(index))
    except ValueError:
        return True
    is_rising = indices == sorted(set(indices))
    return not is_rising or min(indices, default=0) < 0 or max(indices, default=0) > MAX_INDEX


def _first(lines, matches):
    """Return the index of the first line that matches, or None."""
    return next((index for index, line in enumerate(lines) if matches(line)), None)
