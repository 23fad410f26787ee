"""Reading CSV, LIBSVM and Parquet files, and a one-line error for each invalid file."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from scipy import sparse
from sklearn.datasets import load_digits

from common import flags, table_values, tables
from common.distributed import Workers
from common.errors import UserError
from helpers import ROOT, TABLE_WRITERS, environment, write_csv

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def rows():
    """The digits with the label first, as SageMaker's algorithms expect: (1797, 65)."""
    bunch = load_digits()
    return np.column_stack([bunch.target, bunch.data]).astype(np.float32)


def load(**changes):
    args = flags.xgboost_flags().parse_args([])
    vars(args).update({"train": None, "validation": None, **changes})
    return tables.describe(*tables.load_tables(args))


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Return the folder of temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def dense(table):
    features = table.features.toarray() if sparse.issparse(table.features) else table.features
    return np.column_stack([table.labels, features])


@pytest.mark.parametrize("suffix", TABLE_WRITERS)
def test_many_files_in_nested_folders_are_one_table(tmp_path, rows, suffix):
    for index, part in enumerate(np.array_split(rows, 5)):
        TABLE_WRITERS[suffix](tmp_path / "train" / f"day={index}" / f"part.{suffix}", part)
    TABLE_WRITERS[suffix](tmp_path / "validation" / f"all.{suffix}", rows[:100])
    (tmp_path / "train/_SUCCESS").touch()
    (tmp_path / "train/notes.md").touch()
    data = load(train=tmp_path / "train", validation=tmp_path / "validation")
    np.testing.assert_array_equal(dense(data.train), rows)
    np.testing.assert_array_equal(dense(data.validation), rows[:100])
    assert data.train.labels.dtype == data.train.features.dtype == np.float32


def test_a_single_file_is_a_table(tmp_path, rows):
    for name, part in (("train.csv", rows), ("validation.csv", rows[:100]), ("other.csv", rows[:9])):
        write_csv(tmp_path / name, part)
    data = load(train=tmp_path / "train.csv", validation=tmp_path / "validation.csv")
    np.testing.assert_array_equal(dense(data.train), rows)
    np.testing.assert_array_equal(dense(data.validation), rows[:100])
    (tmp_path / "photo.png").touch()
    with pytest.raises(UserError, match=r"photo\.png is not a folder or a table: expected \.csv"):
        load(train=tmp_path / "photo.png")


def test_hidden_folders_are_ignored_and_other_files_are_logged(tmp_path, rows, caplog):
    caplog.set_level("INFO", logger="train")
    write_csv(tmp_path / "part.CSV", rows)
    write_csv(tmp_path / ".ipynb_checkpoints/part.csv", rows)
    write_csv(tmp_path / "_temporary/0/part.csv", rows)
    (tmp_path / "notes.md").touch()
    data = load(train=tmp_path)
    assert len(data.train.labels) + len(data.validation.labels) == len(rows)
    assert f"Left out of --train {tmp_path}, not tables (1): notes.md" in caplog.messages


def test_validation_rows_inside_the_training_folder_are_rejected(tmp_path, rows):
    write_csv(tmp_path / "a.csv", rows)
    write_csv(tmp_path / "validation/b.csv", rows)
    with pytest.raises(UserError, match="is inside --train"):
        load(train=tmp_path, validation=tmp_path / "validation")


def test_the_held_out_tenth_is_stratified(tmp_path, rows):
    few = np.concatenate([rows[rows[:, 0] == 0][:95], rows[rows[:, 0] == 1][:5]])
    write_csv(tmp_path / "rows.csv", few)
    held_out = load(train=tmp_path).validation.labels
    assert np.bincount(held_out.astype(int)).tolist() == [9, 1]


@pytest.mark.parametrize("suffix", TABLE_WRITERS)
def test_a_tenth_is_held_out(tmp_path, rows, suffix, caplog):
    caplog.set_level("INFO", logger="train")
    TABLE_WRITERS[suffix](tmp_path / f"all.{suffix}", rows)
    data = load(train=tmp_path)
    assert (len(data.train.labels), len(data.validation.labels)) == (1618, 179)
    assert "No --validation: a tenth of the training rows is held out" in caplog.messages
    together = np.concatenate([dense(data.train), dense(data.validation)])
    np.testing.assert_array_equal(together[np.lexsort(together.T)], rows[np.lexsort(rows.T)])
    np.testing.assert_array_equal(
        dense(load().validation), dense(data.validation)
    )  # the built-in digits are identical


def test_an_empty_field_is_a_missing_value(tmp_path):
    (tmp_path / "data.csv").write_text("0,1.5,\n1,,2.5\n0,3,4\n1,5,6\n")
    data = load(train=tmp_path, validation=tmp_path)
    np.testing.assert_array_equal(
        dense(data.train), [[0, 1.5, np.nan], [1, np.nan, 2.5], [0, 3, 4], [1, 5, 6]]
    )


def test_libsvm_files_may_have_different_widths(tmp_path):
    for name, text in (("train", "1 0:1 3:2\n0 1:5\n"), ("validation", "1 7:1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.libsvm").write_text(text)
    data = load(train=tmp_path / "train", validation=tmp_path / "validation")
    assert data.train.features.shape == (2, 8)
    assert data.validation.features.shape == (1, 8)
    np.testing.assert_array_equal(data.train.features.toarray()[0], [1, 0, 0, 2, 0, 0, 0, 0])


MISTAKES = {
    "empty folder": ({}, ["--train", "contains nothing", ".csv", ".libsvm", ".parquet"]),
    "other files": ({"a.json": "{}"}, ["contains a.json", ".csv"]),
    "short row": ({"a.csv": "0,1,2\n1,2\n0,1,2\n"}, ["a.csv, line 2: Expected 3 columns, got 2"]),
    "long row": ({"a.csv": "0,1,2\n1,2,3\n0,1,2,4\n"}, ["a.csv, line 3: Expected 3 columns, got 4"]),
    "no rows below the header": ({"a.csv": "label,x\n"}, ["without rows"]),
    "text": ({"a.csv": "1,2\n1,red\n"}, ["a.csv", "'red'"]),
    "no rows": ({"a.csv": ""}, ["without rows"]),
    "no label": ({"a.csv": "1,2\n,3\n"}, ["a.csv, line 2: the row has no label"]),
    "other width": (
        {"a.csv": "1,2\n", "b.csv": "1,2,3\n"},
        ["a.csv has 2 columns (f0, f1)", "b.csv has 3 (f0, f1, f2)"],
    ),
    "mixed kinds": ({"a.csv": "1,2\n", "b.libsvm": "1 1:2\n"}, ["a.csv is CSV", "b.libsvm is LIBSVM"]),
    "blank lines": ({"a.csv": "0,1,2\n\n\n1,2\n"}, ["a.csv, line 4: Expected 3 columns, got 2"]),
    "labels only": ({"a.csv": "0\n1\n"}, ["a.csv has one column", "the label and at least one more"]),
    "no lines": ({"a.libsvm": ""}, ["without rows"]),
    "no libsvm": ({"a.libsvm": "1 1:2\n1 two:2\n"}, ["a.libsvm", "label index:value"]),
    "no parquet": ({"a.parquet": "nothing"}, ["a.parquet", "cannot read"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_error_names_file_and_line(tmp_path, name):
    files, parts = MISTAKES[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as caught:
        load(train=tmp_path)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_parquet_columns_must_have_the_same_names_in_the_same_order(tmp_path):
    for file, names in (("a", ["y", "a", "b"]), ("b", ["y", "b", "a"])):
        parquet.write_table(pyarrow.table({name: [0.0, 1.0] for name in names}), tmp_path / f"{file}.parquet")
    with pytest.raises(
        UserError, match=r"a.parquet has 3 columns \(y, a, b\) and .*b.parquet has 3 \(y, b, a\)"
    ):
        load(train=tmp_path)


def test_parquet_without_rows_or_columns(tmp_path):
    for columns, message in (({}, "has 0 columns"), ({"y": [], "x": []}, "without rows")):
        table = pyarrow.table(
            {name: pyarrow.array(values, pyarrow.float64()) for name, values in columns.items()}
        )
        parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UserError, match=message):
            load(train=tmp_path)


def test_an_error_names_the_line_in_a_large_file(tmp_path, rows):
    write_csv(tmp_path / "a.csv", np.tile(rows, (20, 1)))
    with open(tmp_path / "a.csv", "a") as file:
        file.write("1,2,3\n")
    with pytest.raises(UserError, match=f"a.csv, line {20 * len(rows) + 1}: Expected 65 columns, got 3"):
        load(train=tmp_path)


def test_validation_must_be_as_wide_as_the_training_data(tmp_path, rows):
    write_csv(tmp_path / "train/a.csv", rows)
    write_csv(tmp_path / "validation/a.csv", rows[:, :-1])
    with pytest.raises(
        UserError,
        match=r"has 65 columns .* and .*validation/a.csv has 64 .*: expected the same in every file",
    ):
        load(train=tmp_path / "train", validation=tmp_path / "validation")


def in_parts(table):
    """Return the number of parts of a table, and all its rows."""
    parts = [dense(part) for part in table.parts()]
    return len(parts), np.concatenate(parts)


@pytest.mark.parametrize("suffix", TABLE_WRITERS)
@pytest.mark.parametrize("held_out", [False, True])
def test_the_rows_on_disk_equal_those_in_memory(tmp_path, monkeypatch, scratch, rows, suffix, held_out):
    monkeypatch.setattr(table_values, "PART", 20_000)
    for index, part in enumerate(np.array_split(rows, 3)):
        TABLE_WRITERS[suffix](
            tmp_path / "train" / f"{index}.{suffix}", part[:, : None if suffix != "libsvm" else 65 - index]
        )
    TABLE_WRITERS[suffix](tmp_path / "validation" / f"all.{suffix}", rows[:100])
    folders = {"train": tmp_path / "train", "validation": None if held_out else tmp_path / "validation"}
    memory, disk = load(**folders), load(**folders, external_memory=True)
    for name in ("train", "validation"):
        expected, table = getattr(memory, name), getattr(disk, name)
        count, found = in_parts(table)
        np.testing.assert_array_equal(found, dense(expected))
        assert count > 3 or name == "validation"
        assert table.features.shape == expected.features.shape
        assert max(len(part.labels) for part in table.parts()) < len(rows) / 6
        np.testing.assert_array_equal(in_parts(table.rows(slice(1, None, 3)))[1], found[1::3])


@pytest.mark.usefixtures("scratch")
def test_the_digits_can_be_on_disk():
    np.testing.assert_array_equal(in_parts(load(external_memory=True).train)[1], dense(load().train))


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("external_memory", [False, True])
def test_each_row_belongs_to_one_worker(external_memory):
    data = load(external_memory=external_memory)
    shards = []
    for rank in range(4):
        shard = data.shard(Workers(rank, ["host"] * 4))
        shards.append([in_parts(table)[1] for table in shard])
    for table, parts in zip(data, zip(*shards)):
        together, whole = np.concatenate(parts), in_parts(table)[1]
        np.testing.assert_array_equal(together[np.lexsort(together.T)], whole[np.lexsort(whole.T)])
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_fewer_rows_than_workers(tmp_path):
    (tmp_path / "a.csv").write_text("0,1\n1,2\n" * 10)
    with pytest.raises(UserError, match="2 training or validation rows are too few for 3 workers"):
        load(train=tmp_path).shard(Workers(0, ["host"] * 3))


@pytest.mark.parametrize("line", ["1,2,3", "0," * 64 + "red"])
def test_an_error_names_the_line_in_a_later_part(tmp_path, monkeypatch, rows, line):
    monkeypatch.setattr(table_values, "PART", 20_000)
    write_csv(tmp_path / "a.csv", rows)
    with open(tmp_path / "a.csv", "a") as file:
        file.write(f"\n\n{line}\n")
    with pytest.raises(UserError, match=rf"a.csv, line {len(rows) + 3}: .*(got 3|'red')"):
        load(train=tmp_path)


def test_numbers_may_have_another_format_in_a_later_part(tmp_path, monkeypatch):
    monkeypatch.setattr(table_values, "PART", 100)
    (tmp_path / "a.csv").write_text("0,1\n" * 100 + "1,0.5\n1,\n1,1e3\n")
    (tmp_path / "b.csv").write_text("0,\n" * 10)
    features = load(train=tmp_path, validation=tmp_path).train.features
    np.testing.assert_array_equal(features[99:, 0], [1, 0.5, np.nan, 1000, *[np.nan] * 10])


def test_a_full_disk_is_a_one_line_error(monkeypatch, scratch):
    usage = shutil.disk_usage(scratch)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100_000))
    expected = r"0 MB are left for XGBoost.* free some space, or set .* TMPDIR"
    with pytest.raises(UserError, match=expected):
        load(external_memory=True)

    def full(file, features):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"--external-memory: cannot write to .*: No space left on device"):
        load(external_memory=True)


ENDS = ["pass", "raise SystemExit(3)", "os._exit(3)", "os.kill(os.getpid(), 9)", "time.sleep(60)"]
LOAD = """
import os, time
from common import flags, table_values, tables
data = tables.load_tables(flags.xgboost_flags().parse_args(["--external-memory"]))
print(flush=True)
"""


@pytest.mark.parametrize("end", ENDS)
def test_no_temporary_file_remains_after_any_exit(tmp_path, end):
    command = [sys.executable, "-c", LOAD + end]
    env = environment(TMPDIR=str(tmp_path))
    options = {"stdout": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=env, **options) as process:
        process.stdout.readline()
        if "sleep" in end:
            assert any(tmp_path.iterdir())
            os.killpg(process.pid, signal.SIGTERM)
    is_immediate = end in ("pass", "raise SystemExit(3)")
    deadline = time.monotonic() + (0 if is_immediate else 10)
    while any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(tmp_path.iterdir())


# Custom tables ----------------------------------------------------------------------------------------------


def test_plain_tuples_are_tables_with_weights_and_names():
    features, labels = np.zeros((4, 2), np.float32), [0, 1, 0, 1]
    data = tables.describe((features, labels, [1, 2, 3, 4], ["a", "b"]), (features, labels, None, ["a", "b"]))
    assert data.train.weights.dtype == data.train.labels.dtype == np.float32
    assert data.train.names == ["a", "b"]
    assert data.describe_job() == {"number of columns": 2, "number of training rows": 4}
    other = tables.describe((features, labels, [1, 2, 3, 5], ["a", "b"]), data.validation)
    assert other.fingerprint() != data.fingerprint()
    other = tables.describe((features + 1, *data.train[1:]), data.validation)
    assert other.fingerprint() != data.fingerprint()
    np.testing.assert_array_equal(data.shard(Workers(1, ["host"] * 2)).train.weights, [2, 4])


FEATURES, LABELS = np.zeros((4, 2)), np.array([0, 1, 0, 1])
OWN_MISTAKES = {
    "no table": (FEATURES, "load_data returns a ndarray as the training table"),
    "labels": ((FEATURES, LABELS[:3]), "4 training rows with 3 labels: expected one per row"),
    "weights": ((FEATURES, LABELS, LABELS[:3]), "4 training rows with 3 weights"),
    "names": ((FEATURES, LABELS, None, ["a"]), "1 names for the 2 columns of the training rows"),
    "no rows": ((FEATURES[:0], LABELS[:0]), "no training rows"),
    "columns": (
        (FEATURES[:, :1], LABELS),
        "the training rows have the columns 1, but the validation rows have 2",
    ),
}


@pytest.mark.parametrize("name", OWN_MISTAKES)
def test_an_error_in_a_custom_table_is_one_line(name):
    train, message = OWN_MISTAKES[name]
    with pytest.raises(UserError, match=message):
        tables.describe(train, (FEATURES, LABELS))


def test_output_of_an_earlier_training_in_the_folder_is_not_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "rows.csv", np.arange(60).reshape(20, 3) % 7)
    results = tmp_path / "output/xgboost/data/history.csv"
    results.parent.mkdir(parents=True)
    results.write_text("epoch,loss\n1,0.5\n")
    args = flags.xgboost_flags().parse_args(["--train", "."])
    train, validation = tables.load_tables(args)
    assert len(train.labels) + len(validation.labels) == 20
