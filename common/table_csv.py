"""CSV files: find the delimiter and the header, and read the rows in parts of bounded size."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import re
from pathlib import Path
from typing import Any, Collection, Iterator

from common import table_values
from common.errors import UserError
from common.table_values import (
    DECIMAL_COMMA,
    MISSING,
    NotNumbersError,
    explain_errors,
    is_number,
    is_number_or_missing,
    open_bytes,
    to_text,
    unique_names,
    with_point,
)

SAMPLE = 1 << 18  # bytes of text that show the delimiter and the header
SAMPLE_ROWS = 1000
DELIMITERS = ",;\t"


class CsvFile:
    """A text file with a row in each line.

    Args:
        path: of the file.
        wanted: names of columns; a first row with one of them is a header.
        first: the first file of the same table, if there is one.

    Attributes:
        names: of the columns, unique; "f0", "f1" and so on without a header.
        has_header: whether the first row has the names.
        kinds: "number" or "text" for each column, as far as the first rows show.
    """

    def __init__(self, path: Path, wanted: Collection[str] = (), first: CsvFile | None = None) -> None:
        self.path = path
        with explain_errors(path):
            text = self._read_sample()
            if first and self._continues(text, first):
                return
            self._delimiter = find_delimiter(text)
            rows = list(_read_rows(text, self._delimiter, SAMPLE_ROWS))
        self._skipped = next((index for index, row in enumerate(rows) if not _is_blank(row)), len(rows))
        rows = [row for row in rows if not _is_blank(row)]
        if not rows:
            raise UserError(f"{path} has no rows: expected at least one")
        self._first_row = rows[0]
        width = len(rows[0])
        if width < 2:
            raise UserError(
                f"{path} has one column: expected the label and at least one more, with commas, semicolons "
                f"or tabs between them, got {rows[0][0]!r:.50}"
            )
        self._decimal_point = _find_decimal_point(rows, self._delimiter)
        if self._decimal_point == ",":
            rows = [[with_point(field) for field in row] for row in rows]
        self.has_header = any(name in rows[0] for name in wanted) or _is_header(rows)
        self.names = [f"f{index}" for index in range(width)]
        if self.has_header:
            self.names = unique_names(rows.pop(0))
            self._skipped += 1
        self._is_empty = not rows
        self.kinds: list[str] = []
        for index in range(width):
            column = [row[index] for row in rows if len(row) > index]
            self.kinds.append("number" if all(map(is_number_or_missing, column)) else "text")

    def _continues(self, text, first):
        """Copy the properties of the first file, if this one has the same header, or numbers like it.

        This saves time with thousands of files.
        """
        rows = list(_read_rows(text, first._delimiter, 2))
        is_same_header = first.has_header and rows[:1] == [first._first_row]
        is_same_table = not first.has_header and len(rows[0]) == len(first.names) and is_number(rows[0][0])
        if not (is_same_header or is_same_table) or len(rows) < 2 or _is_blank(rows[0]):
            return False
        path = self.path
        vars(self).update(vars(first))
        self.path = path
        self._skipped = int(first.has_header)
        self._is_empty = False
        return True

    def _read_sample(self):
        """Return the first lines as text: at least two of them, and the whole text if it is short."""
        with open_bytes(self.path) as file:
            sample = part = file.read(SAMPLE)
            while part and len(sample.splitlines()) < 3 and len(sample) < 3 * table_values.PART:
                part = file.read(len(sample))
                sample += part
            if file.read(1):
                sample = sample[: max(sample.rfind(b"\n"), sample.rfind(b"\r")) + 1] or sample
        if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("it is text in UTF-16, expected UTF-8")
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(sample)
        if text.startswith("sep="):
            raise ValueError(f"its first line {text[:5]} is for Excel only: remove it")
        return re.sub("\r\n?", "\n", text).replace("\0", "\ufffd")  # Python's reader accepts neither

    def batches(self, columns: list[int], text: list[int], careful: bool = False) -> Iterator[list[Any]]:
        """Yield the rows as lists of PyArrow arrays, one for each of the `columns`.

        Args:
            columns: numbers of columns.
            text: the ones that are text; the rest are numbers.
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
            block_size=table_values.PART,
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
            f"{self.path}, {place}: {row[2][:200]}. Expected the same number of columns in every row"
        )

    def place(self, row: int, with_blanks: bool = False) -> str:
        """Return the place of a row, counted from 0 without blank lines; optionally lines of spaces count."""
        with contextlib.suppress(csv.Error, StopIteration), open_bytes(self.path) as file:
            lines = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
            reader = csv.reader(lines, delimiter=self._delimiter)
            for _ in range(self._skipped):
                next(reader)
            rows = (fields for fields in reader if (fields if with_blanks else not _is_blank(fields)))
            next(itertools.islice(rows, row, None))
            return f"line {reader.line_num}"
        return f"row {row + 1}"

    def has_truth_values(self, index: int) -> bool:
        """Return False: TRUE and FALSE are text here."""
        return False

    def has_whole_numbers(self, index: int) -> bool:
        """Return False: later rows may have other numbers."""
        return False

    def check_quotes(self) -> None:
        """Raise UserError if the last quoted field is not closed, as it would contain all following rows."""
        with explain_errors(self.path), open_bytes(self.path) as file:
            count = sum(part.count(b'"') for part in iter(lambda: file.read(table_values.PART), b""))
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

    def to_text(self, column: Any) -> Any:
        """Return a text column without spaces around the values, and with null for a missing one."""
        import pyarrow.compute as pc

        column = to_text(column)
        if self._decimal_point == ",":
            is_decimal = pc.match_substring_regex(column, DECIMAL_COMMA)
            column = pc.if_else(is_decimal, pc.replace_substring(column, ",", "."), column)
        return column

    def __str__(self) -> str:
        separator = {"\t": "tabs", ",": "commas", ";": "semicolons"}[self._delimiter]
        return f"CSV with {separator} and {'a' if self.has_header else 'no'} header"


def _read_rows(text, delimiter, limit):
    """Return an iterator over the first rows of a text, without spaces around the fields."""
    for row in itertools.islice(csv.reader(io.StringIO(text), delimiter=delimiter), limit):
        yield [field.strip() for field in row]


def _skip_blank(row):
    return "error" if row.text.strip() else "skip"


def _is_blank(fields):
    return not "".join(fields).strip() and len(fields) < 2


def find_delimiter(text: str) -> str:
    """Return the delimiter that splits the first lines evenly; if several do, the one with most numbers."""

    def score(delimiter):
        rows = [row for row in _read_rows(text, delimiter, 100) if not _is_blank(row)]
        widths = [len(row) for row in rows] or [1]
        is_even = min(widths) == max(widths) > 1
        fields = [with_point(field) for row in rows for field in row]
        share = sum(1 for field in fields if is_number(field)) / max(1, len(fields))
        return is_even, share if is_even else 0, widths[0]

    return max(DELIMITERS, key=score)


def _find_decimal_point(rows, delimiter):
    """Return the character before decimals: a comma in files without commas between the fields or points."""
    fields = itertools.chain.from_iterable(rows)
    has_points = any("." in field and is_number(field) for field in fields)
    return "." if delimiter == "," or has_points else ","


def _is_header(rows):
    """Return whether the first row names the columns: it has text in columns of numbers."""
    first, *others = rows
    num_contradictions = 0
    recurs = False
    for index, field in enumerate(first):
        if is_number_or_missing(field):
            continue
        below = [row[index] for row in others if len(row) > index]
        recurs = recurs or field in below
        # A header may be repeated.
        values = [value for value in below if value != field and value not in MISSING]
        if values and all(map(is_number, values)):
            num_contradictions += 1
    num_numbers = sum(1 for field in first if is_number(field))
    if num_contradictions:
        return num_numbers <= len(first) / 2
    return not recurs and not num_numbers and any(field not in MISSING for field in first)
