"""The columns of a table: the label, weights, numbers, categories, and columns that are left out.

Text becomes a category: a number that XGBoost does not order, the index of the text among the sorted texts of
the training files. All workers read all files, so that their results agree.
"""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from common import table_values
from common.errors import UserError
from common.report import log, shortened

MAX_CLASSES = 100  # labels with more values are those of a regression
FEW_CLASSES = 10
MAX_CATEGORIES = 1000  # a column with more texts has no categories
ALMOST_ALL = 0.9  # the share of rows with a new text that makes a column names, or with a date, dates
MISTAKES = 0.05  # a smaller share of texts among numbers are mistakes; a larger one makes categories
ROW_NUMBERS = ("unnamed: 0", "rownames", "row.names", "__index_level_0__")  # columns that R and pandas add
MAYBE_ROW_NUMBERS = r"^(X|index|row|.*[iI][dD])$"  # if they count the rows
DATE = (
    r"^[0-9]{4}[-/.][0-9]{1,2}[-/.][0-9]{1,2}([ T].*)?$"
    r"|^[0-9]{1,2}[-/.][0-9]{1,2}[-/.][0-9]{2,4}( .*)?$"
    r"|^[0-9]{1,2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?$"
)
# Numbers that people can read, but programs cannot: 1,234.5 and 12 % and $5 and 0,5 in a file with commas.
DECORATED = (
    r"^[$€£]? ?[+-]?[0-9]{1,3}([.,' ][0-9]{3})+([.,][0-9]+)? ?[%$€£]?$"
    r"|^[$€£] ?[+-]?[0-9.,]+$"
    r"|^[+-]?[0-9.,]+ ?[%$€£]$"
    r"|^[+-]?[0-9]*,[0-9]+$"
)


class Feature(NamedTuple):
    """A column that the model sees.

    Attributes:
        index: its number in the files.
        name: in the files.
        type: as XGBoost names it, "float", "int" or "c".
        values: the texts of a category, sorted; None for numbers.
    """

    index: int  # type: ignore[assignment]  # tuple.index is not needed
    name: str
    type: str
    values: list[str] | None


class Layout(NamedTuple):
    """The columns of the training files.

    Attributes:
        features: a list of Feature.
        label, weight: numbers of columns; `weight` may be None.
        label_name: that of the label's column.
        label_values: the texts of the label, sorted; None for numbers.
        careful: whether numbers are read as text, because some have spaces around them.
        left_out: the columns that are no features, and why, for the log.
        notes: other lines for the log.
    """

    features: list[Feature]
    label: int
    weight: int | None
    label_name: str
    label_values: list[str] | None
    careful: bool
    left_out: list[str]
    notes: list[str]


# The layout of the training files ---------------------------------------------------------------------------


def find_layout(files: Sequence[Any], args: Namespace, careful: bool = False) -> Layout:
    """Return the Layout of opened training files.

    A plain table of numbers is read once. Columns of text need a look at all rows, because a category's
    number depends on all texts; so do columns that may be row numbers.

    Args:
        files: from `table_files.open_files`.
        args: the flags.
        careful: look at all rows of all columns.
    """
    first = files[0]
    has_row_numbers = _has_row_numbers(files, careful)
    label = _find_column("--label-column", args.label_column, first)
    if label is None:
        label = int(has_row_numbers)  # the first column, or the one after row numbers
    weight = _find_column("--weight-column", args.weight_column, first)
    if weight == label:
        raise UserError(f"--weight-column {args.weight_column} is the label: expected another column")
    others = [index for index in range(len(first.names)) if index not in (label, weight)]
    left_out: list[str] = []
    if has_row_numbers and others[0] == 0:
        left_out.append(f"{first.names[others.pop(0)]} (row numbers)")
    to_scan = [label, *others]
    if not careful:
        to_scan = [index for index in to_scan if first.kinds[index] == "text"]
    texts = _scan(files, to_scan)
    layout = Layout(
        features=[],
        label=label,
        weight=weight,
        label_name=first.names[label],
        label_values=_label_values(first, label, texts.get(label)),
        careful=careful,
        left_out=left_out,
        notes=[],
    )
    for index in others:
        _add_feature(layout, first, index, texts.get(index))
    if not layout.features:
        raise UserError(
            f"{first.path} has no columns to learn from besides the label {layout.label_name}: left out are "
            f"{shortened(left_out)}"
        )
    return layout


def _add_feature(layout, file, index, text):
    """Add a column to the features of a layout, or to the columns that are left out.

    Args:
        layout: the Layout.
        file: a training file.
        index: the number of the column.
        text: its _Texts, or None for numbers.
    """
    name = file.names[index]
    if text and text.is_name():
        layout.left_out.append(f"{name} ({text.describe()})")
        return
    values = text and text.categories()
    kind = "c" if values else "float"
    if file.has_whole_numbers(index):
        kind = "int"
    layout.features.append(Feature(index, name, kind, values or None))
    if values and text.num_numbers:
        layout.notes.append(f"{name} has numbers and text such as {text.example!r:.50}: used as categories")


def _label_values(file, label, text):
    if file.has_truth_values(label):
        return ["False", "True"]
    if not text or not text.categories():
        return None
    if text.is_name():
        raise UserError(
            f"{file.path}: the label {file.names[label]} has {text.describe()}: expected classes or numbers; "
            "pass another --label-column"
        )
    return text.categories()


def _find_column(flag, wanted, file):
    """Return the number of a column that a flag names; None without the flag."""
    if wanted is None:
        return None
    names = file.names
    if file.has_header and wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    expected = f"a number from 0 to {len(names) - 1}"
    if file.has_header:
        expected = f"one of {', '.join(names)[:300]}, or {expected}"
    raise UserError(f"{flag} {wanted}: {file.path} has no such column: expected {expected}")


def _has_row_numbers(files, careful):
    """Return whether the first column has row numbers, possibly those of a larger table."""
    name = files[0].names[0]
    is_added = name.lower() in ROW_NUMBERS
    if not files[0].has_header or not (is_added or re.match(MAYBE_ROW_NUMBERS, name)):
        return False
    if files[0].kinds[0] != "number":
        return False
    parts = [np.zeros(0)]
    try:
        for file in files:
            for [column] in file.batches([0], [0] if careful else [], careful):
                parts.append(_to_numbers(file, column, file.names[0], 0))
    except table_values.NotNumbersError:
        if careful:
            return False
        raise
    values = np.concatenate(parts)
    first = values[0] if len(values) else 0
    if first in (0, 1) and np.array_equal(values, np.arange(first, first + len(values))):
        return len(values) > 1
    is_whole = np.array_equal(values, np.round(values))
    return is_added and bool(is_whole) and len(np.unique(values)) == len(values) > 1


class _Texts:
    """Statistics of a column of text."""

    def __init__(self, name):
        self.name = name
        self.values = set()  # at most MAX_CATEGORIES and those of one part
        self.num_values = self.num_numbers = self.num_dates = self.num_decorated = 0
        self.example = None  # the first text that is not a number
        self.place = None  # of the example: (file, row)

    def add(self, file, column, first_row):
        """Add the values of a part of a file."""
        import pyarrow.compute as pc

        column = file.to_text(column)
        counted = pc.value_counts(column.drop_null())
        values, counts = counted.field("values"), counted.field("counts").to_numpy()
        is_number = _matches(values, table_values.NUMBER)
        self.num_values += int(counts.sum())
        self.num_numbers += int(counts[is_number].sum())
        self.num_dates += int(counts[_matches(values, DATE)].sum())
        self.num_decorated += int(counts[_matches(values, DECORATED) & ~is_number].sum())
        if self.example is None and not is_number.all():
            self.example = values[int(np.flatnonzero(~is_number)[0])].as_py()
            self.place = file, first_row + pc.index(column, self.example).as_py()
        if len(self.values) <= MAX_CATEGORIES:
            self.values.update(values.to_pylist())

    def categories(self):
        """Return the texts, sorted; an empty list if all values are numbers or missing."""
        return sorted(self.values) if self.num_numbers < self.num_values else []

    def is_name(self):
        """Return whether the texts are too many for categories: names, or free text."""
        if self.num_numbers == self.num_values:
            return False
        return len(self.values) > MAX_CATEGORIES or len(self.values) >= ALMOST_ALL * self.num_values > 1

    def describe(self):
        """Return why the texts are no categories."""
        count = f"more than {MAX_CATEGORIES}" if len(self.values) > MAX_CATEGORIES else len(self.values)
        return f"{count} different texts in {self.num_values} rows, such as {self.example!r:.50}"

    def check(self):
        """Raise UserError for dates, and for texts that must be mistakes, such as units after numbers."""
        if self.num_values == self.num_numbers:
            return
        file, row = self.place
        place = f"{file.path}, {file.place(row)}"
        if self.num_dates > ALMOST_ALL * self.num_values:
            raise table_values.dates_error(place, self.name, f"such as {self.example}")
        if self.num_numbers and self.example == self.name:
            raise UserError(f"{place}: the header is repeated: remove it, or use a file per table")
        if self.num_decorated and self.num_decorated + self.num_numbers > ALMOST_ALL * self.num_values:
            raise UserError(
                f"{place}: the column {self.name} has numbers such as {self.example!r:.50}: expected a "
                "decimal point, no other separators and no units, such as 1234.5"
            )
        share = 0.5 if self.is_name() else 1 - MISTAKES
        if self.num_numbers >= share * self.num_values:
            raise UserError(_stray_text(file, row, self.example, self.name))


def _matches(column, pattern):
    import pyarrow.compute as pc

    return pc.match_substring_regex(column, pattern).to_numpy(zero_copy_only=False)


def _scan(files, columns):
    """Return the _Texts of columns, by number, of all rows of all files."""
    texts = {index: _Texts(files[0].names[index]) for index in columns}
    if not columns:
        return texts
    for file in files:
        file.check_quotes()
        row = 0
        for batch in file.batches(columns, columns, careful=True):
            for index, column in zip(columns, batch):
                texts[index].add(file, column, row)
            row += len(batch[0])
    for text in texts.values():
        text.check()
    return texts


# Rows -------------------------------------------------------------------------------------------------------


def read(
    file: Any, layout: Layout, unseen: Any
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yield features, labels, and weights or None of one part of a file after the other.

    Args:
        file: an opened file.
        layout: of the training files.
        unseen: a Counter of (name, text), which counts categories that are not in the training files.
    """
    columns = [layout.label, *(feature.index for feature in layout.features)]
    text = [feature.index for feature in layout.features if feature.values]
    if layout.label_values:
        text.append(layout.label)
    if layout.weight is not None:
        columns.append(layout.weight)
    if layout.careful:
        text = columns
    if text:
        file.check_quotes()
    row = 0
    for label, *batch in file.batches(columns, text, layout.careful):
        features = np.empty((len(label), len(layout.features)), np.float32)
        for index, feature in enumerate(layout.features):
            if feature.values:
                features[:, index] = _to_codes(file, batch[index], feature, unseen)
            else:
                features[:, index] = _to_float32(file, batch[index], feature.name, row)
        labels = _read_labels(file, label, layout, row)
        weights = None
        if layout.weight is not None:
            name = file.names[layout.weight]
            weights = _to_float32(file, batch[-1], name, row)
        check_numbers(file, features, labels, weights, row)
        yield features, labels, weights
        row += len(label)


def check_numbers(
    file: Any, features: Any, labels: np.ndarray, weights: np.ndarray | None, first_row: int
) -> None:
    """Raise UserError, with the place, for a missing label, an infinite value, or a weight below zero."""
    faults = {"has no label, or an infinite one": ~np.isfinite(labels)}
    is_sparse = hasattr(features, "tocsr")
    values = features.data if is_sparse else features
    if np.isinf(values).any():
        rows = np.isinf(values).nonzero()[0]
        if is_sparse:
            rows = np.searchsorted(features.indptr, rows, side="right") - 1
        is_infinite = np.zeros(len(labels), bool)
        is_infinite[rows] = True
        faults["has an infinite value, or one beyond the range of 32-bit numbers"] = is_infinite
    if weights is not None:
        faults["has no weight, or one below zero"] = ~(np.isfinite(weights) & (weights >= 0))
    for fault, rows in faults.items():
        if rows.any():
            place = file.place(first_row + int(rows.argmax()))
            raise UserError(f"{file.path}, {place}: the row {fault}: correct or remove it")


def _read_labels(file, column, layout, first_row):
    if not layout.label_values:
        return _to_float32(file, column, layout.label_name, first_row)
    import pyarrow
    import pyarrow.compute as pc

    if pyarrow.types.is_boolean(column.type):
        column = pc.if_else(column, "True", "False")
    text = file.to_text(column)
    codes = pc.index_in(text, pyarrow.array(layout.label_values))
    is_unknown = pc.and_(codes.is_null(), text.is_valid()).to_numpy(zero_copy_only=False)
    if is_unknown.any():
        row = int(is_unknown.argmax())
        raise UserError(
            f"{file.path}, {file.place(first_row + row)}: the label {text[row].as_py()!r:.50} is unknown: no "
            f"training row has it; expected one of {', '.join(layout.label_values)[:200]}"
        )
    return codes.cast("float32").to_numpy(zero_copy_only=False)


def _to_codes(file, column, feature, unseen):
    import pyarrow
    import pyarrow.compute as pc

    text = file.to_text(column)
    codes = pc.index_in(text, pyarrow.array(feature.values))
    if codes.null_count > text.null_count:
        unknown = text.filter(pc.and_(codes.is_null(), text.is_valid()))
        for count in pc.value_counts(unknown).to_pylist():
            unseen[feature.name, count["values"]] += count["counts"]
    return codes.cast("float32").to_numpy(zero_copy_only=False)


def _to_numbers(file, column, name, first_row):
    """Return a column as float64, with NaN for missing values."""
    from pyarrow import types

    if types.is_float64(column.type):
        return column.to_numpy(zero_copy_only=False)  # without the slow import of pyarrow.compute
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_number = types.is_floating(column.type) or types.is_integer(column.type)
    if not (is_number or types.is_decimal(column.type) or types.is_boolean(column.type)):
        column = file.to_text(column)
        is_wrong = ~_matches(column.fill_null("0"), table_values.NUMBER)
        if is_wrong.any():
            row = int(is_wrong.argmax())
            raise table_values.NotNumbersError(_stray_text(file, first_row + row, column[row].as_py(), name))
    return column.cast("float64").to_numpy(zero_copy_only=False)


def _to_float32(file, column, name, first_row):
    with np.errstate(over="ignore"):  # `check_numbers` finds infinite values
        return _to_numbers(file, column, name, first_row).astype(np.float32)


def _stray_text(file, row, text, name):
    return (
        f"{file.path}, {file.place(row)}: {text!r:.50} in the column {name} is not a number: expected "
        "a number, or nothing for a missing value"
    )


# Names and labels -------------------------------------------------------------------------------------------


def model_names(layout: Layout, has_header: bool) -> list[str] | None:
    """Return the names of the features in the model, or None without any; log renamed ones."""
    if not has_header and not any(feature.values for feature in layout.features):
        return None
    titles = [feature.name for feature in layout.features]
    names = table_values.unique_names(list(map(to_model_name, titles)))
    changed = [f"{title} to {name}" for title, name in zip(titles, names) if title != name]
    if changed:
        log(f"Renamed, as XGBoost allows no [, ] and <: {shortened(changed)}")
    return names


def to_model_name(name: str) -> str:
    """Return a name without the characters that XGBoost refuses."""
    return re.sub(r"<", "_lt_", name.replace("[", "(").replace("]", ")"))


def find_classes(labels: np.ndarray, args: Namespace) -> np.ndarray | None:
    """Return the sorted values of labels that are classes other than 0, 1, 2, ...; otherwise None.

    Classes are two whole numbers, up to MAX_CLASSES without a gap from 0 or 1, or FEW_CLASSES without a gap
    elsewhere: 3 to 8 are grades, but 20 to 60 are ages. A classification objective takes any labels.
    """
    values = np.unique(labels)
    kind = (args.objective or "").partition(":")[0]
    if len(values) > MAX_CLASSES or not np.array_equal(values, np.round(values)) or len(values) < 2:
        return None
    num_classes = args.num_class or len(values)
    if kind not in ("", "multi", "binary") or np.isin(values, np.arange(num_classes)).all():
        return None
    limit = MAX_CLASSES if values[0] in (0, 1) else FEW_CLASSES
    is_row = values[-1] - values[0] == len(values) - 1 and len(values) <= limit
    return values if kind or is_row or len(values) == 2 else None


def number_labels(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the index of each label among the values of the training labels."""
    unknown = np.setdiff1d(labels, values)
    if len(unknown):
        raise UserError(
            f"the validation rows have the label {unknown[0]:g}, which no training row has: "
            f"expected labels from {values[0]:g} to {values[-1]:g}"
        )
    return np.searchsorted(values, labels).astype(np.float32)


# The log ----------------------------------------------------------------------------------------------------


def log_features(layout: Layout, kind: str) -> None:
    """Log the kinds of the columns, and the columns that are left out."""
    categories = [f"{feature.name} ({len(feature.values)})" for feature in layout.features if feature.values]
    num_numbers = len(layout.features) - len(categories)
    texts = f", {len(categories)} with categories: {shortened(categories)}" if categories else ""
    weights = "; the rows have weights" if layout.weight is not None else ""
    log(f"Files: {kind}; features: {num_numbers} with numbers{texts}{weights}")
    if layout.left_out:
        log(f"Left out of the features: {shortened(layout.left_out)}")
    for note in layout.notes[:3]:
        log(f"Note: {note}")


def log_label(name: str, labels: np.ndarray, classes: list[str] | None) -> None:
    """Log which column is the label, and its values: their counts, or their range."""
    values, counts = np.unique(labels, return_counts=True)
    is_classes = len(values) <= MAX_CLASSES and np.array_equal(values, np.arange(len(values)))
    if classes or is_classes:
        names = classes or [f"{value:g}" for value in values]
        found = [f"{names[int(value)]} {count}" for value, count in zip(values, counts)]
        text = shortened(found, 10)
    else:
        text = f"numbers from {values[0]:g} to {values[-1]:g}"
    log(f"Label: {name} ({text})")


def log_unseen(flag: str, unseen: Any) -> None:
    """Log which texts count as missing, with their counts, if there are any."""
    if unseen:
        found = [f"{name} {text!r:.50} ({count})" for (name, text), count in unseen.most_common()]
        log(
            f"Missing values instead of {sum(unseen.values())} texts of {flag} that no training row has: "
            f"{shortened(found)}"
        )
