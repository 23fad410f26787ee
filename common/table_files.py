"""The files of tables: CSV, LIBSVM and Parquet. Finding them, and reading them in parts of bounded size."""

import contextlib
import csv
import gzip
import io
import itertools
import re
import zlib

import numpy as np

from common import errors
from common.errors import UserError
from common.report import log, log_left_out

KINDS = {".csv": "CSV", ".tsv": "CSV", ".libsvm": "LIBSVM", ".txt": "LIBSVM", ".parquet": "Parquet"}
EXPECTED = "expected .csv, .tsv, .libsvm, .txt (LIBSVM) or .parquet files below it"
PART = 1 << 23  # bytes of text, or of floats, that are read at once; no row of a CSV file may be longer
SAMPLE = 1 << 18  # bytes of text that tell the delimiter and the header
SAMPLE_ROWS = 1000
DELIMITERS = ",;\t"
MAX_INDEX = 2**31 - 2  # in a LIBSVM file: SciPy and XGBoost count columns in 32 bits

NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^[+-]?([iI]nf|INF|[iI]nfinity)$"
DECIMAL_COMMA = r"^[+-]?[0-9]*,[0-9]+$"
_is_number = re.compile(NUMBER).match
_is_decimal_comma = re.compile(DECIMAL_COMMA).match


def _spellings(*words):
    every = [[word, word.lower(), word.upper(), word.capitalize()] for word in words]
    return sorted(set(itertools.chain.from_iterable(every)))


MISSING = _spellings("", "NA", "N/A", "#N/A", "<NA>", "?", "null", "NaN", "None")  # words for no value


class NotNumbersError(UserError):
    """A column that has been taken for numbers contains something else."""


# Finding ----------------------------------------------------------------------------------------------------


def find_files(flag, folder):
    """Return the paths of the files in a folder and below it, in order, without empty ones."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder: {EXPECTED}")
    paths = []
    left_out = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if any(name.startswith((".", "_")) for name in inside) or path.is_dir():
            continue
        if kind_of(path):
            paths.append(path)
        else:
            left_out.append(path.name)
    if not paths:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"{flag} {folder} holds {names}: {EXPECTED}")
    log_left_out(flag, folder, left_out, "tables")
    empty = [path for path in paths if _is_empty(path)]
    paths = [path for path in paths if path not in empty]
    if not paths:
        raise UserError(f"{flag} {folder} has files without rows: expected some")
    if empty:
        log(f"Left out of {flag} {folder}, without rows ({len(empty)}): {_shorten(empty)}")
    return paths


def kind_of(path):
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


def open_files(paths, wanted=()):
    """Return the files at these paths as CsvFile, LibsvmFile or ParquetFile.

    Args:
        paths: of one kind, and with the same columns.
        wanted: names of columns that the user has given.
    """
    classes = {"CSV": CsvFile, "LIBSVM": LibsvmFile, "Parquet": ParquetFile}
    first, *others = paths
    for path in others:
        if kind_of(path) != kind_of(first):
            raise UserError(
                f"{first} is {kind_of(first)} and {path} is {kind_of(path)}: expected files of one kind"
            )
    opened = []
    for path in paths:
        if opened and opened[0].has_header:
            wanted = opened[0].names[:1]
        opened.append(classes[kind_of(path)](path, wanted))
    for other in opened[1:]:
        _check_same_columns(opened[0], other)
    return opened


def _check_same_columns(first, other):
    if first.names == other.names:
        return
    raise UserError(
        f"{first.path} has {len(first.names)} columns ({_shorten(first.names)}) and {other.path} has "
        f"{len(other.names)} ({_shorten(other.names)}): expected the same in every file"
    )


def _shorten(names):
    if len(names) > 5:
        names = [*names[:4], "..."]
    return ", ".join(map(str, names))


def open_bytes(path):
    """Return a file of bytes, unpacked if its name ends with .gz."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


@contextlib.contextmanager
def explain_errors(path):
    """Raise UserError with the file for an error of a reader inside this block."""
    try:
        yield
    except (
        ValueError,
        OverflowError,
        NotImplementedError,
        OSError,
        EOFError,
        zlib.error,
        csv.Error,
    ) as error:
        reason = errors.first_line(error)[:200]
        if "straddl" in reason:
            reason = f"a row is longer than {PART >> 20} MB"
        if isinstance(error, UnicodeError) or "UTF8" in reason:
            reason = "it is not text in UTF-8, convert it with: iconv -f latin1 -t utf-8"
        raise UserError(f"cannot read {path}: {reason}") from error


# CSV --------------------------------------------------------------------------------------------------------


class CsvFile:
    """A file of text with a row in each line.

    Args:
        path: of the file.
        wanted: names of columns; a first row that has one of them is a header.

    Attributes:
        names: of the columns, unique; "f0", "f1" and so on without a header.
        has_header: whether the first row has the names.
        kinds: "number" or "text" for each column, as far as the first rows tell.
    """

    def __init__(self, path, wanted=()):
        self.path = path
        with explain_errors(path):
            text = self._read_sample()
            self._delimiter = find_delimiter(text)
            rows = list(
                itertools.islice(csv.reader(io.StringIO(text), delimiter=self._delimiter), SAMPLE_ROWS)
            )
        self._skipped = next((index for index, row in enumerate(rows) if not _is_blank(row)), len(rows))
        rows = [[field.strip() for field in row] for row in rows if not _is_blank(row)]
        if not rows:
            raise UserError(f"{path} has no rows: expected some")
        width = len(rows[0])
        if width < 2:
            raise UserError(f"{path} has {width} columns: expected the label and at least one more")
        self._decimal_point = _find_decimal_point(rows, self._delimiter)
        if self._decimal_point == ",":
            rows = [[with_point(field) for field in row] for row in rows]
        self.has_header = any(name in rows[0] for name in wanted) or _is_header(rows)
        self.names = [f"f{index}" for index in range(width)]
        if self.has_header:
            self.names = unique_names(rows.pop(0))
            self._skipped += 1
        self._is_empty = not rows
        self.kinds = []
        for index in range(width):
            column = [row[index] for row in rows if len(row) > index]
            self.kinds.append("number" if all(map(_is_number_or_missing, column)) else "text")

    def _read_sample(self):
        """Return the first lines as text."""
        with open_bytes(self.path) as file:
            sample = file.read(SAMPLE)
            if file.read(1):
                sample = sample[: max(sample.rfind(b"\n"), sample.rfind(b"\r")) + 1] or sample
        if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("it is text in UTF-16, expected UTF-8")
        return sample.decode("utf-8-sig", errors="replace").replace("\0", "\ufffd")

    def batches(self, columns, text, careful=False):
        """Yield the rows as lists of PyArrow arrays, one for each of the `columns`.

        Args:
            columns: numbers of columns.
            text: those of them that are text; the others are numbers.
            careful: read in one thread, so that the error for a row names its line.

        Raises NotNumbersError if other columns have text.
        """
        import pyarrow
        from pyarrow import csv as arrow_csv

        if self._is_empty:
            return
        types = {self.names[index]: pyarrow.float64() for index in columns}
        types.update({self.names[index]: pyarrow.string() for index in text})
        reading = arrow_csv.ReadOptions(
            column_names=self.names,
            skip_rows_after_names=self._skipped,
            use_threads=not careful,
            block_size=PART,
        )
        parsing = arrow_csv.ParseOptions(
            delimiter=self._delimiter, newlines_in_values=True, invalid_row_handler=_skip_blank
        )
        converting = arrow_csv.ConvertOptions(
            column_types=types,
            include_columns=[self.names[index] for index in columns],
            null_values=MISSING,
            decimal_point=self._decimal_point,
        )
        with explain_errors(self.path), open_bytes(self.path) as file:
            try:
                for batch in arrow_csv.open_csv(file, reading, parsing, converting):
                    yield batch.columns
            except pyarrow.ArrowInvalid as error:
                if not careful:
                    raise NotNumbersError(f"{self.path}: {error}") from error
                raise self._explain(error) from error

    def _explain(self, error):
        """Return an error as a UserError that names the line if possible."""
        row = re.search(r"Row #(\d+): (.*)", str(error))
        if not row or "UTF8" in row[2]:
            return ValueError(str(error))
        place = self.place(int(row[1]) - 1 - self._skipped, with_blanks=True)
        return UserError(
            f"{self.path}, {place}: {row[2][:200]}. Expected the same number of columns in each row"
        )

    def place(self, row, with_blanks=False):
        """Return where a row is, counted from 0 without blank lines or, optionally, with lines of spaces."""
        with contextlib.suppress(csv.Error, StopIteration), open_bytes(self.path) as file:
            lines = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
            reader = csv.reader(lines, delimiter=self._delimiter)
            for _ in range(self._skipped):
                next(reader)
            rows = (fields for fields in reader if (fields if with_blanks else not _is_blank(fields)))
            next(itertools.islice(rows, row, None))
            return f"line {reader.line_num}"
        return f"row {row + 1}"

    def check_quotes(self):
        """Raise UserError if the last quoted field is not closed, as it would contain all following rows."""
        with explain_errors(self.path), open_bytes(self.path) as file:
            count = sum(part.count(b'"') for part in iter(lambda: file.read(PART), b""))
            if count % 2 == 0:
                return
            file.seek(0)
            lines = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
            reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
            line = 0
            try:
                for _ in reader:
                    line = reader.line_num
            except csv.Error as error:
                if "end of data" in str(error):
                    raise UserError(
                        f"{self.path}, line {line + 1}: a field begins with a quote that is never closed"
                    ) from error

    def to_text(self, column):
        """Return a text column without spaces around the values, and with null for a missing one."""
        import pyarrow.compute as pc

        column = to_text(column)
        if self._decimal_point == ",":
            is_decimal = pc.match_substring_regex(column, DECIMAL_COMMA)
            column = pc.if_else(is_decimal, pc.replace_substring(column, ",", "."), column)
        return column

    def __str__(self):
        separator = {"\t": "tabs", ",": "commas", ";": "semicolons"}[self._delimiter]
        return f"CSV with {separator} and {'a' if self.has_header else 'no'} header"


def _skip_blank(row):
    return "error" if row.text.strip() else "skip"


def _is_blank(fields):
    return not "".join(fields).strip() and len(fields) < 2


def _is_number_or_missing(field):
    return field in MISSING or _is_number(field)


def with_point(field):
    """Return the text of a number with a decimal point instead of a comma."""
    return field.replace(",", ".") if _is_decimal_comma(field) else field


def find_delimiter(text):
    """Return the delimiter that splits the first lines evenly; of several, into the most numbers."""

    def score(delimiter):
        reader = csv.reader(io.StringIO(text), delimiter=delimiter)
        rows = [row for row in itertools.islice(reader, 100) if not _is_blank(row)]
        widths = [len(row) for row in rows] or [1]
        is_even = min(widths) == max(widths) > 1
        fields = [with_point(field.strip()) for row in rows for field in row]
        share = sum(1 for field in fields if _is_number(field)) / max(1, len(fields))
        return is_even, share if is_even else 0, widths[0]

    return max(DELIMITERS, key=score)


def _find_decimal_point(rows, delimiter):
    fields = list(itertools.chain.from_iterable(rows))
    has_points = any("." in field and _is_number(field) for field in fields)
    has_commas = any(map(_is_decimal_comma, fields))
    return "," if delimiter != "," and has_commas and not has_points else "."


def _is_header(rows):
    """Return whether the first row names the columns: it has text where the others have numbers."""
    first, *others = rows
    num_contradictions = 0
    recurs = False
    for index, field in enumerate(first):
        below = [row[index] for row in others if len(row) > index]
        values = [value for value in below if value not in MISSING]
        is_text = field not in MISSING and not _is_number(field)
        if is_text and values and all(map(_is_number, values)):
            num_contradictions += 1
        recurs = recurs or (is_text and field in values)
    num_numbers = sum(1 for field in first if _is_number(field))
    if num_contradictions:
        return num_numbers <= len(first) / 2
    return not recurs and not num_numbers and any(field not in MISSING for field in first)


def unique_names(fields):
    """Return the names in a header; one without a name gets its number, as in pandas."""
    names = []
    for index, field in enumerate(fields):
        name = field or f"Unnamed: {index}"
        number = 0
        unique = name
        while unique in names:
            number += 1
            unique = f"{name}.{number}"
        names.append(unique)
    return names


def to_text(column):
    """Return a PyArrow array as text without spaces around it, and with null for a missing value."""
    import pyarrow
    import pyarrow.compute as pc

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = pc.utf8_trim_whitespace(column.cast(pyarrow.string()))
    is_missing = pc.is_in(column, pyarrow.array(MISSING))
    return pc.if_else(is_missing, pyarrow.scalar(None, pyarrow.string()), column)


# Parquet ----------------------------------------------------------------------------------------------------


class ParquetFile:
    """A Parquet file, with the attributes and methods of CsvFile.

    Attributes:
        is_integer: whether a column has whole numbers or truth values, for each of them.
        is_truth: whether it has truth values.
    """

    has_header = True

    def __init__(self, path, wanted=()):
        import pyarrow
        from pyarrow import parquet

        self.path = path
        with explain_errors(path):
            schema = parquet.read_schema(path)
        self.names = unique_names(schema.names)
        self._has_unique_names = len(set(schema.names)) == len(schema.names)
        if len(self.names) < 2:
            raise UserError(f"{path} has {len(self.names)} columns: expected the label and at least one more")
        self.kinds = []
        self.is_integer = []
        self.is_truth = []
        for name, kind in zip(self.names, schema.types):
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            self.kinds.append(self._kind_of(name, kind))
            self.is_truth.append(pyarrow.types.is_boolean(kind))
            self.is_integer.append(pyarrow.types.is_integer(kind))

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

    def batches(self, columns, text, careful=False):
        """Yield the rows as lists of PyArrow arrays, one for each of the `columns`, which are numbers."""
        import pyarrow
        from pyarrow import parquet

        with explain_errors(self.path):
            # With these options it does not read a whole row group at once.
            file = parquet.ParquetFile(self.path, buffer_size=1 << 16, pre_buffer=False)
            names = [self.names[index] for index in columns] if self._has_unique_names else None
            for batch in file.iter_batches(max(1, PART // 4 // len(self.names)), columns=names):
                order = batch.schema.names if names else self.names
                yield [batch.columns[order.index(self.names[index])] for index in columns]
            pyarrow.default_memory_pool().release_unused()

    def place(self, row):
        """Return where a row is, counted from 0."""
        return f"row {row + 1}"

    def check_quotes(self):
        """Do nothing: Parquet has no quotes."""

    def to_text(self, column):
        """Return a text column without spaces around the values, and with null for a missing one."""
        return to_text(column)

    def __str__(self):
        return "Parquet"


def dates_error(path, name, found):
    """Return the UserError for a column of dates or times."""
    return UserError(
        f"{path}: the column {name} has dates or times ({found}): expected numbers or text; turn it into "
        "numbers such as year, month and weekday, or remove it"
    )


# LIBSVM -----------------------------------------------------------------------------------------------------


class LibsvmFile:
    """A file of lines `label index:value ...` or `label:weight index:value ...`; columns have no names."""

    has_header = False
    names = ()

    def __init__(self, path, wanted=()):
        self.path = path

    def parts(self):
        """Yield a sparse matrix (rows, columns), labels, and weights or None for one part after the other."""
        first_line = 1
        with explain_errors(self.path), open_bytes(self.path) as file:
            for lines in iter(lambda: file.readlines(PART), []):
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
        """Return an error of the whole part as a UserError that names the line."""
        line = _first(lines, _is_wrong)
        place = f"cannot read {self.path}" if line is None else f"{self.path}, line {first_line + line}"
        reason = errors.first_line(error)[:200]
        if isinstance(error, OverflowError):
            reason = f"an index is larger than {MAX_INDEX}"
        return UserError(
            f"{place}: {reason}. Expected lines of `label index:value ...` with rising indices, no header"
        )

    def place(self, row):
        """Return where a row is, counted from 0 without blank lines and comments."""
        with open_bytes(self.path) as file:
            numbers = (number for number, line in enumerate(file, 1) if line.partition(b"#")[0].strip())
            return f"line {next(itertools.islice(numbers, row, None), 0)}"

    def __str__(self):
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
