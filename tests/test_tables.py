"""Reading CSV, LIBSVM and Parquet files, and one clear line for each mistake in them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from scipy import sparse
from sklearn.datasets import dump_svmlight_file, load_digits

from common import cluster, flags, tables
from common.errors import UserError
from conftest import ROOT, environment


@pytest.fixture(scope="module")
def rows():
    """The digits with the label first, as SageMaker's algorithms want it: (1797, 65)."""
    bunch = load_digits()
    return np.column_stack([bunch.target, bunch.data]).astype(np.float32)


def load(**changes):
    args = flags.xgboost_flags().parse_args([])
    vars(args).update({"train": None, "validation": None, **changes})
    return tables.load_tables(args)


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, rows, fmt="%g", delimiter=",")


def write_libsvm(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    dump_svmlight_file(rows[:, 1:], rows[:, 0], str(path), zero_based=True)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({f"column-{index}": column for index, column in enumerate(rows.T)}), path)


def dense(table):
    features = table.features.toarray() if sparse.issparse(table.features) else table.features
    return np.column_stack([table.labels, features])


WRITERS = {"csv": write_csv, "libsvm": write_libsvm, "txt": write_libsvm, "parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_many_files_in_nested_folders_are_one_table(tmp_path, rows, suffix):
    for index, part in enumerate(np.array_split(rows, 5)):
        WRITERS[suffix](tmp_path / "train" / f"day={index}" / f"part.{suffix}", part)
    WRITERS[suffix](tmp_path / "validation" / f"all.{suffix}", rows[:100])
    (tmp_path / "train/_SUCCESS").touch()
    (tmp_path / "train/notes.md").touch()
    data = load(train=tmp_path / "train", validation=tmp_path / "validation")
    np.testing.assert_array_equal(dense(data.train), rows)
    np.testing.assert_array_equal(dense(data.validation), rows[:100])
    assert data.train.labels.dtype == data.train.features.dtype == np.float32


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_tenth_is_held_out(tmp_path, rows, suffix):
    WRITERS[suffix](tmp_path / f"all.{suffix}", rows)
    data = load(train=tmp_path)
    assert (len(data.train.labels), len(data.validation.labels)) == (1618, 179)
    together = np.concatenate([dense(data.train), dense(data.validation)])
    np.testing.assert_array_equal(together[np.lexsort(together.T)], rows[np.lexsort(rows.T)])
    np.testing.assert_array_equal(dense(load().validation), dense(data.validation))  # the built-in digits are the same


def test_an_empty_field_is_a_missing_value(tmp_path):
    (tmp_path / "data.csv").write_text("0,1.5,\n1,,2.5\n0,3,4\n1,5,6\n")
    data = load(train=tmp_path, validation=tmp_path)
    np.testing.assert_array_equal(dense(data.train), [[0, 1.5, np.nan], [1, np.nan, 2.5], [0, 3, 4], [1, 5, 6]])


def test_libsvm_files_of_different_widths_fit_together(tmp_path):
    for name, text in (("train", "1 0:1 3:2\n0 1:5\n"), ("validation", "1 7:1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.libsvm").write_text(text)
    data = load(train=tmp_path / "train", validation=tmp_path / "validation")
    assert data.train.features.shape == (2, 8)
    assert data.validation.features.shape == (1, 8)
    np.testing.assert_array_equal(data.train.features.toarray()[0], [1, 0, 0, 2, 0, 0, 0, 0])


MISTAKES = {
    "empty folder": ({}, ["--train", "holds nothing", ".csv", ".libsvm", ".parquet"]),
    "other files": ({"a.json": "{}"}, ["holds a.json", ".csv"]),
    "short row": ({"a.csv": "0,1,2\n1,2\n0,1,2\n"}, ["a.csv, line 2: Expected 3 columns, got 2"]),
    "long row": ({"a.csv": "0,1,2\n1,2,3\n0,1,2,4\n"}, ["a.csv, line 3: Expected 3 columns, got 4"]),
    "header": ({"a.csv": "label,x\n1,2\n"}, ["a.csv", "'label'", "no header"]),
    "text": ({"a.csv": "1,2\n1,red\n"}, ["a.csv", "'red'"]),
    "no rows": ({"a.csv": ""}, ["a.csv", "Empty CSV file"]),
    "no label": ({"a.csv": "1,2\n,3\n"}, ["without a label"]),
    "other width": (
        {"a.csv": "1,2\n", "b.csv": "1,2,3\n"},
        ["a.csv has 2 columns (f0, f1)", "b.csv has 3 (f0, f1, f2)"],
    ),
    "mixed kinds": ({"a.csv": "1,2\n", "b.libsvm": "1 1:2\n"}, ["a.csv is CSV", "b.libsvm is LIBSVM"]),
    "blank lines": ({"a.csv": "0,1,2\n\n\n1,2\n"}, ["a.csv, line 4: Expected 3 columns, got 2"]),
    "labels only": ({"a.csv": "0\n1\n"}, ["a.csv has 1 columns", "the label and at least one more"]),
    "no lines": ({"a.libsvm": ""}, ["without rows"]),
    "no libsvm": ({"a.libsvm": "1 1:2\n1 two:2\n"}, ["a.libsvm", "label index:value"]),
    "no parquet": ({"a.parquet": "nothing"}, ["a.parquet", "cannot read"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_data_is_told_with_its_place(tmp_path, name):
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
    with pytest.raises(UserError, match=r"a.parquet has 3 columns \(y, a, b\) and .*b.parquet has 3 \(y, b, a\)"):
        load(train=tmp_path)


def test_parquet_without_rows_or_columns(tmp_path):
    for columns, message in (({}, "has 0 columns"), ({"y": [], "x": []}, "without rows")):
        table = pyarrow.table({name: pyarrow.array(values, pyarrow.float64()) for name, values in columns.items()})
        parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UserError, match=message):
            load(train=tmp_path)


def test_the_line_is_named_in_a_large_file_too(tmp_path, rows):
    write_csv(tmp_path / "a.csv", np.tile(rows, (20, 1)))
    with open(tmp_path / "a.csv", "a") as file:
        file.write("1,2,3\n")
    with pytest.raises(UserError, match=f"a.csv, line {20 * len(rows) + 1}: Expected 65 columns, got 3"):
        load(train=tmp_path)


def test_validation_must_be_as_wide_as_the_training_data(tmp_path, rows):
    write_csv(tmp_path / "train/a.csv", rows)
    write_csv(tmp_path / "validation/a.csv", rows[:, :-1])
    with pytest.raises(
        UserError, match=r"has 65 columns .* and .*validation/a.csv has 64 .*: expected the same in every file"
    ):
        load(train=tmp_path / "train", validation=tmp_path / "validation")


def in_parts(table):
    parts = [dense(tables.Table(*part)) for part in table.parts()]
    return len(parts), np.concatenate(parts)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("held_out", [False, True])
def test_on_the_disk_are_the_same_rows_as_in_memory(tmp_path, monkeypatch, rows, suffix, held_out):
    monkeypatch.setattr(tables, "PART", 20_000)
    monkeypatch.setattr(tables, "_temporary_folder", lambda: Path(tempfile.mkdtemp(dir=tmp_path)))
    for index, part in enumerate(np.array_split(rows, 3)):
        WRITERS[suffix](tmp_path / "train" / f"{index}.{suffix}", part[:, : None if suffix != "libsvm" else 65 - index])
    WRITERS[suffix](tmp_path / "validation" / f"all.{suffix}", rows[:100])
    folders = {"train": tmp_path / "train", "validation": None if held_out else tmp_path / "validation"}
    memory, disk = load(**folders), load(**folders, external_memory=True)
    for name in ("train", "validation"):
        expected, table = getattr(memory, name), getattr(disk, name)
        count, found = in_parts(table)
        np.testing.assert_array_equal(found, dense(expected))
        assert count > 3 or name == "validation"
        assert table.features.shape == expected.features.shape
        assert max(len(labels) for _, labels in table.parts()) < len(rows) / 6
        np.testing.assert_array_equal(in_parts(table.rows(slice(1, None, 3)))[1], found[1::3])


def test_the_digits_can_be_on_the_disk_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_temporary_folder", lambda: tmp_path)
    np.testing.assert_array_equal(in_parts(load(external_memory=True).train)[1], dense(load().train))


@pytest.mark.parametrize("external_memory", [False, True])
def test_each_row_belongs_to_one_worker(tmp_path, monkeypatch, external_memory):
    monkeypatch.setattr(tables, "_temporary_folder", lambda: tmp_path)
    data = load(external_memory=external_memory)
    shares = []
    monkeypatch.setattr(cluster, "size", 4)
    for rank in range(4):
        monkeypatch.setattr(cluster, "rank", rank)
        shares.append([in_parts(table)[1] for table in data.shares()])
    for table, parts in zip(data, zip(*shares)):
        together, whole = np.concatenate(parts), in_parts(table)[1]
        np.testing.assert_array_equal(together[np.lexsort(together.T)], whole[np.lexsort(whole.T)])
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_fewer_rows_than_workers(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("0,1\n1,2\n" * 10)
    monkeypatch.setattr(cluster, "size", 3)
    with pytest.raises(UserError, match="2 training or validation rows are too few for 3 workers"):
        load(train=tmp_path).shares()


@pytest.mark.parametrize("line", ["1,2,3", "0," * 64 + "red"])
def test_a_mistake_in_a_later_part_is_told_with_its_line(tmp_path, monkeypatch, rows, line):
    monkeypatch.setattr(tables, "PART", 20_000)
    write_csv(tmp_path / "a.csv", rows)
    with open(tmp_path / "a.csv", "a") as file:
        file.write(f"\n\n{line}\n")
    with pytest.raises(UserError, match=rf"a.csv, line {len(rows) + 3}: .*(got 3|'red')"):
        load(train=tmp_path)


def test_numbers_may_have_another_form_in_a_later_part(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PART", 100)
    (tmp_path / "a.csv").write_text("0,1\n" * 100 + "1,0.5\n1,\n1,1e3\n")
    (tmp_path / "b.csv").write_text("0,\n" * 10)
    features = load(train=tmp_path, validation=tmp_path).train.features
    np.testing.assert_array_equal(features[99:, 0], [1, 0.5, np.nan, 1000, *[np.nan] * 10])


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_temporary_folder", lambda: tmp_path)
    usage = tables.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tables.shutil, "disk_usage", lambda folder: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"0 MB are left for XGBoost.* make room, or name another folder .* TMPDIR"):
        load(external_memory=True)

    def full(file, features):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"--external-memory: cannot write to .*: No space left on device"):
        load(external_memory=True)


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "os._exit(3)", "os.kill(os.getpid(), 9)", "time.sleep(60)"])
def test_nothing_is_left_of_it_however_the_process_ends(tmp_path, end):
    code = f"import os, time; from common import tables; folder = tables._temporary_folder(); {{}}; {end or 'pass'}"
    code = code.format("(folder / 'part').write_bytes(bytes(1000)); print(folder, flush=True)")
    command = [sys.executable, "-c", code]
    env = environment(TMPDIR=str(tmp_path))
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert Path(process.stdout.readline().decode().strip()).parent == tmp_path
        if "sleep" in end:
            os.killpg(process.pid, signal.SIGTERM)
    for _ in range(0 if end in ("", "raise SystemExit(3)") else 100):
        if not any(tmp_path.iterdir()):
            break
        time.sleep(0.05)
    assert not any(tmp_path.iterdir())
