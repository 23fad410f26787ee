"""Tables as users have them: headers, delimiters, missing values, text, weights, and any labels."""

import csv
import gzip
import io
import shutil

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from common import flags, machine, table_csv, table_files, table_values, tables
from common.errors import UserError

pytestmark = pytest.mark.quick

ROWS = "y,a,b\n" + "0,1.5,2\n1,,3\n" * 20
ARCHIVE = gzip.compress(ROWS.encode() * 50)
NAN = np.nan


class Raw(bytes):
    """The content of a .gz file, already compressed or damaged."""


@pytest.fixture
def load(tmp_path, caplog):
    """Return a function that writes files and loads them as training and validation data."""
    caplog.set_level("INFO", logger="train")

    def load_files(files, validation=None, **changes):
        for folder, contents in (("train", files), ("validation", validation or files)):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
            for name, content in contents.items():
                path = tmp_path / folder / name
                path.parent.mkdir(exist_ok=True)
                if isinstance(content, pyarrow.Table):
                    parquet.write_table(content, path)
                else:
                    content = content if isinstance(content, bytes) else content.encode()
                    is_packed = name.lower().endswith(".gz") and not isinstance(content, Raw)
                    path.write_bytes(gzip.compress(content) if is_packed else content)
        args = flags.xgboost_flags().parse_args([])
        vars(args).update({"train": tmp_path / "train", "validation": tmp_path / "validation", **changes})
        return tables.describe(*tables.load_tables(args))

    return load_files


def refuse(load, files, *arguments, **options):
    """Return the error line for these files."""
    with pytest.raises(UserError) as caught:
        load(files, *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(table):
    return np.column_stack([table.labels, table.features])


# Header, delimiter, names -----------------------------------------------------------------------------------

SAME = {
    "header": ("a.csv", ROWS),
    "no header": ("a.csv", ROWS.partition("\n")[2]),
    "tabs": ("a.tsv", ROWS.replace(",", "\t")),
    "semicolons": ("a.csv", ROWS.replace(",", ";")),
    "decimal commas": ("a.csv", ROWS.replace(",", ";").replace(".", ",")),
    "byte order mark": ("a.csv", "\ufeff" + ROWS),
    "lines of Windows": ("a.csv", ROWS.replace("\n", "\r\n")),
    "lines of an old Mac": ("a.csv", ROWS.replace("\n", "\r")),
    "quotes": ("a.csv", '"y","a","b"\n' + '"0","1.5","2"\n"1","","3"\n' * 20),
    "capitals": ("A.CSV", ROWS),
    "packed": ("a.csv.gz", ROWS),
    "packed tabs": ("a.TSV.GZ", ROWS.replace(",", "\t")),
    "spaces": ("a.csv", ROWS.replace(",", " , ")),
    "spaces around a missing word": ("a.csv", ROWS.replace(",,", " , NA ,")),
    "blank lines": ("a.csv", "\n\n" + ROWS + "\n  \n\n"),
    "no line end": ("a.csv", ROWS[:-1]),
    "Parquet": ("a.parquet", pyarrow.table({"y": [0, 1] * 20, "a": [1.5, None] * 20, "b": [2, 3] * 20})),
    **{f"missing {word}": ("a.csv", ROWS.replace("1,,3", f"1,{word},3")) for word in table_values.MISSING},
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_table_in_another_form_has_the_same_rows(load, name):
    file, content = SAME[name]
    data = load({file: content})
    np.testing.assert_array_equal(rows_of(data.train), [[0, 1.5, 2], [1, NAN, 3]] * 20)
    assert data.train.names == (None if name == "no header" else ["a", "b"])


def test_libsvm_may_be_compressed_and_have_comments_and_weights(load):
    for name in ("a.libsvm.gz", "a.txt.gz", "a.TXT"):
        data = load({name: "# comment\n1:2 0:1 2:3 # another\n\n0:0.5 1:5\n" * 3})
        np.testing.assert_array_equal(data.train.features.toarray(), [[1, 0, 3], [0, 5, 0]] * 3)
        assert data.train.weights.tolist() == [2, 0.5] * 3
        assert data.train.labels.tolist() == [1, 0] * 3


def test_a_header_is_found_by_the_columns_below_it(load, caplog):
    text_only = "color,size\n" + "red,big\nblue,small\nred,small\n" * 9
    assert load({"a.csv": text_only}).train.names == ["size"]
    no_header = text_only.partition("\n")[2]
    data = load({"a.csv": no_header})
    assert (len(data.train.labels), data.train.names) == (27, ["f1"])
    assert (
        "Files: 2, CSV with commas and no header; features: 0 with numbers, 1 with categories: f1 (2)"
        in caplog.text
    )
    line = refuse(load, {"a.csv": "1,2,x\n" + "0,5,6\n1,7,8\n" * 20})
    assert "a.csv, line 1: 'x' in the column f2 is not a number" in line
    assert len(load({"a.csv": "1990,1991\n" + "0,2\n1,3\n" * 9}).train.labels) == 19


def test_names_are_unique_and_valid_for_xgboost(load, caplog):
    names = load({"a.csv": ROWS.replace("y,a,b", "y,x[1],x[1]")}).train.names
    assert names == ["x(1)", "x(1).1"]
    assert "Renamed, as XGBoost allows no [, ] and <: x[1] to x(1), x[1].1 to x(1).1" in caplog.text
    assert load({"a.csv": ROWS.replace("y,a,b", "y,<5,")}).train.names == ["_lt_5", "Unnamed: 2"]


def test_the_label_is_a_name_or_a_number_and_the_log_says_which(load, caplog):
    for label in ("b", "2"):
        data = load({"a.csv": ROWS}, label_column=label)
        np.testing.assert_array_equal(rows_of(data.train), [[0, 0, 1.5], [1, 1, NAN]] * 20)
    assert "Label: b (2 20, 3 20)" in caplog.messages
    load({"a.csv": ROWS})
    assert "Label: y, by default the first column (0 20, 1 20)" in caplog.messages
    line = refuse(load, {"a.csv": ROWS}, label_column="c")
    assert "--label-column c" in line
    assert "one of y, a, b, or a number from 0 to 2" in line
    assert "expected a number from 0 to 1" in refuse(load, {"a.csv": "0,1\n1,2\n"}, label_column="2")


def test_columns_that_are_no_features_are_left_out_and_named(load, caplog):
    lines = [f"{i + 1},id{i},{i % 2},{i * 1.5}" for i in range(40)]
    for first in ("", "rownames", "X", "Unnamed: 0", "id", "PassengerId"):
        data = load({"a.csv": "\n".join([f"{first},name,y,a", *lines])}, label_column="y")
        assert data.train.names == ["a"]
        assert (
            f"Left out of the features: {first or 'Unnamed: 0'} (row numbers), name (40 different"
            in caplog.text
        )
    shuffled = "\n".join([",y,a", *(f"{(7 * i) % 40},{i % 2},{i}" for i in range(40))])
    data = load({"a.csv": shuffled})
    assert (data.train.names, data.train.labels.tolist()) == (["a"], [0, 1] * 20)
    assert load({"a.csv": shuffled.replace(",y", "X,y", 1)}, label_column="y").train.names == ["X", "a"]
    numbered = shuffled.replace(",y", "day,y", 1)  # an ordinary name
    assert load({"a.csv": numbered}, label_column="y").train.names == ["day", "a"]
    line = refuse(load, {"a.csv": "y,name\n" + "".join(f"{i % 2},n{i}\n" for i in range(9))})
    assert (
        "no columns to learn from besides the label y: left out are name (9 different texts in 9 rows" in line
    )


# Text -------------------------------------------------------------------------------------------------------

CARS = "color,sold,size,price\n" + "red,TRUE,1,low\nblue,FALSE,2,high\n ?,TRUE,3,low\nred,TRUE,4,mid\n" * 10


@pytest.mark.parametrize("form", ["csv", "parquet", "dictionary"])
def test_text_becomes_categories_and_classes(load, monkeypatch, form, caplog):
    monkeypatch.setattr(table_values, "PART", 200)
    train, validation = {"a.csv": CARS}, {"a.csv": CARS.replace("blue", "green")}
    if form != "csv":
        kind = pyarrow.string() if form == "parquet" else pyarrow.dictionary(pyarrow.int8(), pyarrow.string())

        def convert(text):
            rows = [line.split(",") for line in text.splitlines()[1:]]
            columns = [pyarrow.array(column).cast(kind) for column in zip(*rows)]
            columns[2] = pyarrow.array([int(row[2]) for row in rows])
            return {"a.parquet": pyarrow.table(dict(zip(text.splitlines()[0].split(","), columns)))}

        train, validation = convert(train["a.csv"]), convert(validation["a.csv"])
    data = load(train, validation, label_column="price")
    expected = [[1, 1, 1, 1], [0, 0, 0, 2], [1, NAN, 1, 3], [2, 1, 1, 4]] * 10
    np.testing.assert_array_equal(rows_of(data.train), expected)
    assert data.train.classes == ["high", "low", "mid"]
    assert data.train.categories == {"color": ["blue", "red"], "sold": ["FALSE", "TRUE"]}
    assert data.train.types == ["c", "c", "float" if form == "csv" else "int"]
    assert "Label: price (high 10, low 20, mid 10)" in caplog.messages
    assert np.isnan(data.validation.features[1::4, 0]).all()
    assert (
        "Missing values instead of 10 texts of --validation that no training row has: color 'green' (10)"
        in caplog.messages
    )
    job = data.describe_job()
    assert job["classes"] == ["high", "low", "mid"]
    other = load({**train}, validation, label_column="price").describe_job()
    assert other == job


def test_categories_are_the_same_on_disk_and_for_every_worker(load):
    memory = load({"a.csv": CARS}, label_column="price")
    disk = load({"a.csv": CARS}, label_column="price", external_memory=True)
    np.testing.assert_array_equal(np.concatenate(list(disk.train.features)), memory.train.features)
    assert (disk.train.categories, disk.train.classes) == (memory.train.categories, memory.train.classes)


def test_changed_categories_are_another_job(load):
    job = load({"a.csv": CARS}, label_column="price").describe_job()
    other = load({"a.csv": CARS.replace("blue", "azure")}, label_column="price").describe_job()
    assert job["categories"] != other["categories"]
    assert "color" in job["categories"]


def test_text_near_the_end_of_a_column_is_found(load, monkeypatch, caplog):
    monkeypatch.setattr(table_values, "PART", 2000)
    rows = "".join(f"{i % 2},{i},{i % 5}\n" for i in range(2000))
    more = "".join(f"{i % 2},{i},{'many' if i % 3 else ' 7'}\n" for i in range(900))
    files = {"a.csv": "y,a,b\n" + rows, "b.csv": "y,a,b\n" + more}
    data = load(files)
    disk = load(files, external_memory=True).train.features
    np.testing.assert_array_equal(np.concatenate(list(disk)), data.train.features)
    assert sum(1 for _ in disk.files[0].path.parent.iterdir()) == 2 * len(disk.files)  # of both channels
    assert data.train.categories == {"b": ["0", "1", "2", "3", "4", "7", "many"]}
    assert data.train.features[-3:, 1].tolist() == [5, 6, 6]
    assert "Note: b has numbers and text such as 'many': used as categories" in caplog.messages


def test_text_by_mistake_among_numbers_is_reported_with_its_line(load, monkeypatch):
    monkeypatch.setattr(table_values, "PART", 2000)
    rows = "y,a\n" + "".join(f"{i % 2},{i}\n" for i in range(3000))
    line = refuse(load, {"a.csv": rows + "1,red\n"})
    assert "a.csv, line 3002: 'red' in the column a is not a number" in line
    line = refuse(load, {"a.csv": rows}, {"a.csv": rows[:400].rsplit("\n", 1)[0] + "\n\n1,red\n0,5\n"})
    assert "validation/a.csv, line" in line
    assert "'red' in the column a is not a number" in line


DATES = ["2024-05-01", "2024-05-01 10:30:00", "1/31/2024", "31.01.24", "10:30", "2024/1/5"]


@pytest.mark.parametrize("date", DATES)
def test_dates_are_refused_by_the_name_of_their_column(load, date):
    line = refuse(load, {"a.csv": "y,when,a\n" + f"0,{date},1\n1,NA,2\n" * 5})
    assert "the column when has dates or times" in line
    assert "year, month" in line


@pytest.mark.parametrize("external_memory", [False, True])
def test_more_rows_than_memory_are_refused_before_they_are_read(load, monkeypatch, external_memory):
    """Equal rows need almost no space in a Parquet file."""
    table = pyarrow.table({"y": np.arange(200_000) % 2, "a": np.zeros(200_000), "b": np.zeros(200_000)})
    monkeypatch.setattr(table_files.ParquetFile, "batches", None)
    monkeypatch.setattr(machine, "available_memory", lambda: 10e6)
    line = refuse(load, {"a.parquet": table}, external_memory=external_memory)
    assert "a.parquet and 1 other files have 400000 rows, for which 0.0" in line
    assert ("pass --external-memory" in line) is not external_memory


def test_columns_of_parquet_of_any_type(load):
    from datetime import date
    from decimal import Decimal

    base = {"a": [1.5, 2.5] * 9, "y": [0, 1] * 9}
    extra = {
        "flag": pyarrow.array([True, False] * 9),
        "money": pyarrow.array([Decimal("1.25"), None] * 9),
        "small": pyarrow.array([1, 2] * 9, pyarrow.int8()),
        "big": pyarrow.array(["x", "y"] * 9, pyarrow.large_string()),
    }
    data = load({"a.parquet": pyarrow.table({**base, **extra})}, label_column="y")
    assert data.train.names == ["a", "flag", "money", "small", "big"]
    assert data.train.types == ["float", "int", "float", "int", "c"]
    np.testing.assert_array_equal(data.train.features[:2], [[1.5, 1, 1.25, 1, 0], [2.5, 0, NAN, 2, 1]])
    assert load({"a.parquet": pyarrow.table({**base, **extra})}, label_column="flag").train.classes == [
        "False",
        "True",
    ]
    line = refuse(load, {"a.parquet": pyarrow.table({**base, "day": [date(2024, 5, 1)] * 18})})
    assert "the column day has dates or times (the type date32[day])" in line
    line = refuse(load, {"a.parquet": pyarrow.table({**base, "list": [[1]] * 18})})
    assert "the column list has the type list<" in line


# Labels and weights -----------------------------------------------------------------------------------------

LABELS = {
    "-1 and 1": (["-1", "1"], {}, ["-1", "1"]),
    "1 and 2": (["1", "2"], {}, ["1", "2"]),
    "0 and 5": (["0", "5"], {}, ["0", "5"]),
    "grades": (["3", "4", "5", "6"], {}, ["3", "4", "5", "6"]),
    "from 1": ([str(i) for i in range(1, 41)], {}, [str(i) for i in range(1, 41)]),
    "ages": ([str(i) for i in range(20, 61)], {}, None),
    "a gap": (["1", "2", "4"], {}, None),
    "a gap, but classes": (["1", "2", "4"], {"objective": "multi:softprob"}, ["1", "2", "4"]),
    "a gap, but named": (["0", "2"], {"num_class": 3}, None),
    "from 0": (["0", "1", "2"], {}, None),  # as they are
    "halves": (["0.5", "1.5"], {}, None),
    "a regression": (["1", "2"], {"objective": "reg:squarederror"}, None),
    "counts": (["1", "2"], {"objective": "count:poisson"}, None),
    "too many": ([str(i) for i in range(1, 103)], {}, None),
    "text": (["no", "yes"], {}, ["no", "yes"]),
}


@pytest.mark.parametrize("name", LABELS)
def test_the_labels_decide_between_classes_and_numbers(load, name):
    labels, options, classes = LABELS[name]
    rows = "y,a\n" + "".join(f"{label},{index}\n" for index, label in enumerate(labels)) * 3
    data = load({"a.csv": rows}, **options)
    assert data.train.classes == classes
    numbers = range(len(labels)) if classes else map(float, labels)
    np.testing.assert_array_equal(data.train.labels[: len(labels)], np.array(list(numbers), np.float32))


def test_the_labels_of_libsvm_are_classes_too(load, caplog):
    data = load({"a.libsvm": "+1 0:1\n-1 1:2\n" * 5})
    assert (data.train.classes, data.train.labels[:2].tolist()) == (["-1", "1"], [1, 0])
    assert "Label: the first number of each line (-1 5, 1 5)" in caplog.messages


def test_invalid_labels_are_refused(load):
    good = {"a.csv": "y,a\n" + "yes,1\nno,2\n" * 9}
    line = refuse(load, good, {"a.csv": "y,a\nyes,1\nmaybe,2\n"})
    assert "validation/a.csv, line 3: the label 'maybe' is unknown" in line
    assert "expected one of no, yes" in line
    line = refuse(load, {"a.csv": "y,a\n" + "1,1\n2,2\n" * 9}, {"a.csv": "y,a\n1,1\n3,2\n"})
    assert "the validation rows have the label 3" in line
    assert "needs numbers as labels" in refuse(load, good, objective="reg:squarederror")
    names = {"a.csv": "y,a\n" + "".join(f"name{i},{i}\n" for i in range(50))}
    assert "the label y has 50 different texts in 50 rows" in refuse(load, names)
    line = refuse(load, {"a.csv": "y,a\n0,1\nNA,2\n1,3\n"})
    assert "a.csv, line 3: the row has no label" in line


def test_rows_may_have_weights(load):
    for options in ({"weight_column": "a"}, {"weight_column": "1"}):
        data = load({"a.csv": "y,a,b\n" + "0,0.5,7\n1,2,8\n" * 5}, **options)
        assert data.train.weights.tolist() == data.validation.weights.tolist() == [0.5, 2] * 5
        np.testing.assert_array_equal(rows_of(data.train), [[0, 7], [1, 8]] * 5)
    table = pyarrow.table({"w": [1, 2] * 5, "a": [3, 4] * 5, "y": [0, 1] * 5})
    data = load({"a.parquet": table}, label_column="y", weight_column="w")
    assert (data.train.weights.tolist(), data.train.names) == ([1, 2] * 5, ["a"])


WEIGHTS = {"weight_column": "w"}
MISTAKES = {
    "negative weight": (
        {"a.csv": "y,w,a\n0,1,2\n1,-1,3\n"},
        "line 3: the row has no weight, or one below zero",
    ),
    "missing weight": ({"a.csv": "y,w,a\n0,,2\n1,1,3\n"}, "line 2: the row has no weight"),
    "text as weight": (
        {"a.csv": "y,w,a\n" + "0,1,2\n1,x,3\n" * 5},
        "'x' in the column w is not a number",
    ),
    "negative weight in LIBSVM": (
        {"a.libsvm": "1:1 0:1\n0:-1 0:2\n"},
        "line 2: the row has no weight, or one",
    ),
    "weights in some lines": ({"a.libsvm": "1:1 0:1\n0 0:2\n"}, "a.libsvm, line 2: it has no weight, unlike"),
    "bad weight": ({"a.libsvm": "1:x 0:1\n"}, "a.libsvm, line 1: the weight"),
    "weights in some files": ({"a.libsvm": "1:1 0:1\n", "b.libsvm": "0 0:1\n"}, "and others have none"),
    "groups": ({"a.libsvm": "1 0:1\n1 qid:1 0:1\n"}, "a.libsvm, line 2: query groups (qid:)"),
    "infinite": ({"a.csv": "y,a\n0,1\n\n1,inf\n"}, "a.csv, line 4: the row has an infinite value"),
    "too large": ({"a.csv": "y,a\n0,1e39\n1,2\n"}, "line 2: the row has an infinite value, or one beyond"),
    "infinite in LIBSVM": ({"a.libsvm": "0 0:1\n1 3:1 5:inf\n"}, "line 2: the row has an infinite value"),
    "last index": ({"a.libsvm": "0 0:1\n1 2147483647:1\n"}, "line 2: an index is larger than 2147483646"),
    "index": ({"a.libsvm": "0 0:1\n1 3000000000:1\n"}, "line 2: an index is larger than 2147483646"),
    "huge index": ({"a.libsvm": "0 0:1\n1 99999999999999999999:1\n"}, "a.libsvm, line 2: an index is larger"),
    "columns": (
        {"a.libsvm": "0 0:1\n1 2000000000:1\n"},
        "2000000001 columns, for which XGBoost needs 900.0 GB",
    ),
    "order": ({"a.libsvm": "0 0:1\n1 3:1 2:1\n"}, "a.libsvm, line 2: "),
    "other header": (
        {"a.csv": ROWS, "b.csv": ROWS.replace("y,a", "y,c")},
        "a.csv has 3 columns (y, a, b) and ",
    ),
    "no header in one": ({"a.csv": ROWS, "b.csv": "0,1,2\n"}, "b.csv has 3 (f0, f1, f2)"),
    "open quote": ({"a.csv": 'y,a\n0,"b"\n1,"c\n' + "0,d\n" * 9}, "line 3: a field begins with a quote that"),
    "Latin 1": ({"a.csv": b"y,a\n" + "0,é\n1,è\n".encode("latin1") * 9}, "it is not text in UTF-8"),
    "UTF-16": ({"a.csv": ROWS.encode("utf-16")}, "UTF-16"),
    "cut archive": ({"a.csv.gz": Raw(ARCHIVE[:-20])}, "a.csv.gz: Compressed file ended"),
    "no archive": ({"a.csv.gz": Raw(b"no archive")}, "a.csv.gz: Not a gzipped file"),
    "damaged archive": ({"a.csv.gz": Raw(ARCHIVE[:30] + b"xxxx" + ARCHIVE[34:])}, "cannot read"),
    "repeated header": ({"a.csv": ROWS * 3}, "a.csv, line 42: the header is repeated"),
    "thousands": (
        {"a.csv": 'y,a\n0,"1,234"\n1,950\n' * 1 + '0,"5,678.5"\n' * 9},
        "a.csv, line 2: the column a has",
    ),
    "per cent": ({"a.csv": "y,a\n" + "0,12%\n1,5 %\n" * 9}, "the column a has numbers such as '12%'"),
    "money": ({"a.csv": "y,a\n" + "0,$12\n1,$5.50\n" * 9}, "the column a has numbers such as '$12'"),
    "decimal commas": ({"a.csv": "y,a\n" + '0,"0,5"\n1,"1,5"\n' * 9}, "expected a decimal point"),
    "for Excel": ({"a.csv": "sep=;\ny;a\n0;1\n"}, "its first line sep=; is for Excel only"),
    "another delimiter": ({"a.csv": "y|a\n0|1\n"}, "with commas, semicolons or tabs between them, got 'y|a'"),
    "only a header": ({"a.csv": "y,a\n"}, "files without rows"),
    "ragged text": ({"a.csv": "y,a\n0,b\n1,b,c\n"}, "a.csv, line 3: Expected 2 columns, got 3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported_with_its_location(load, name):
    files, part = MISTAKES[name]
    line = refuse(load, files, **(WEIGHTS if "w," in str(files) else {}))
    assert part in line, line


def test_flags_of_columns_that_do_not_fit(load):
    assert "--weight-column y is the label" in refuse(load, {"a.csv": ROWS}, weight_column="y")
    line = refuse(load, {"a.libsvm": "1 0:1\n"}, label_column="0")
    assert "--label-column: LIBSVM files have no such columns" in line


def test_a_row_may_be_longer_than_the_sample(load, monkeypatch):
    monkeypatch.setattr(table_csv, "SAMPLE", 100)
    header = ",".join(["y", *(f"column-{index}" for index in range(200))])
    rows = "".join(f"{number % 2}," + ",".join(["1.5"] * 200) + "\n" for number in range(9))
    for text in (rows, f"{header}\n{rows}"):
        assert load({"a.csv": text, "b.csv": text}).train.features.shape == (18, 200)


def test_part_files_may_have_other_delimiters_blank_lines_and_rows_like_a_header(load):
    files = {"a.csv": ROWS, "b.tsv": ROWS.replace(",", "\t"), "c.csv": "\n" + ROWS, "d.csv": ROWS[:6]}
    assert len(load(files).train.labels) == 120
    plain = ROWS.partition("\n")[2]
    assert len(load({"a.csv": plain, "b.csv": plain, "c.csv": "\n" + plain}).train.labels) == 120
    decimals = "y;a\n" + "0;1\n1;2\n" * 2000 + "0;1,5\n"
    assert load({"a.csv": decimals, "b.csv": decimals}).train.features[-1, 0] == 1.5


def test_empty_part_files_are_left_out(load, caplog):
    data = load({"a.csv": ROWS, "b.csv": "", "c.csv": "\n\n", "d.csv": ROWS.partition("\n")[0] + "\n"})
    assert len(data.train.labels) == 40
    assert "without rows (2): " in caplog.text


def test_a_quoted_field_may_have_lines_delimiters_and_quotes(load, monkeypatch):
    text = "y,a,b\n" + '0,"x\ny, ""z""",1\n1,plain,2\n' * 20
    for size in range(100, 120):  # parts end at every position
        monkeypatch.setattr(table_values, "PART", size)
        data = load({"a.csv": text})
    assert data.train.categories == {"a": ["plain", 'x\ny, "z"']}
    assert len(data.train.labels) == 40
    assert "a.csv, line 62: the row has no label" in refuse(load, {"a.csv": text + ",plain,3\n"})


# Any bytes --------------------------------------------------------------------------------------------------

WORDS = "0 1 -1.5 red blue NA , ; : # ' nan inf 1e400 2024-01-01 é 3000000000 0:1 1:x qid: \" \ufeff \0"
PIECES = st.sampled_from([*WORDS.split(" "), "", " ", "\t", "\n", "\r\n"])
CONTENTS = st.one_of(
    st.binary(max_size=200), st.lists(PIECES, max_size=60).map(lambda parts: "".join(parts).encode())
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(folder, *words):
    """Return the training table and None, or None and the error line."""
    args = flags.xgboost_flags().parse_args(list(words))
    args.train = args.validation = folder
    try:
        return tables.load_tables(args)[0], None
    except UserError as error:
        return None, str(error)


@FUZZ
@given(content=CONTENTS, name=st.sampled_from(["a.csv", "a.tsv", "a.libsvm", "a.csv.gz"]))
def test_any_bytes_are_a_table_or_one_line_with_the_file(tmp_path_factory, content, name):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / name).write_bytes(content)
    train, error = read(folder)
    if error:
        assert "\n" not in error.strip()
        assert name in error or "--train" in error or "--validation" in error, error
        return
    lines = [line for line in content.replace(b"\r", b"\n").split(b"\n") if line.strip()]
    assert 0 < len(train.labels) <= len(lines)


FIELDS = st.sampled_from(["red", "blue", "NA", "", "1", "2.5", "-3", '"x, y"', '"two\nlines"', "TRUE"])
TABLES = st.lists(st.tuples(st.sampled_from(["yes", "no"]), FIELDS, FIELDS), min_size=4, max_size=30)


@FUZZ
@given(rows=TABLES, delimiter=st.sampled_from(",;\t"), end=st.sampled_from(["\n", "\r\n"]), data=st.data())
def test_no_row_is_lost(tmp_path_factory, rows, delimiter, end, data):
    """A good table has all its rows; after a change of one byte, the rest, or one line says why not."""
    folder = tmp_path_factory.mktemp("fuzz")
    content = end.join(delimiter.join(row) for row in [("label", "first", "second"), *rows]).encode()
    position = data.draw(st.one_of(st.none(), st.integers(0, len(content) - 1)))
    if position is not None:
        byte = data.draw(st.sampled_from([b'"', b",", b"\n", b"\xff", b"5", b"x", b" ", b""]))
        content = content[:position] + byte + content[position + 1 :]
    (folder / "a.csv").write_bytes(content)
    train, error = read(folder, "--label-column", "0")
    if error:
        assert "a.csv" in error, error
        return
    if position is None:
        classes = sorted({row[0] for row in rows})
        assert train.labels.tolist() == [classes.index(row[0]) for row in rows]
    lines = io.StringIO(content.decode(), newline="")
    found = [row for row in csv.reader(lines, delimiter=delimiter) if "".join(row).strip()]
    assert len(train.labels) in (len(found), len(found) - 1)
