"""The checkpoint folder: finding the newest checkpoint, and never damaging one."""

import contextlib
import copy
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import tempfile
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common import atomic_io, checkpoint_schema, checkpoints
from common.checkpoint_schema import LARGEST
from common.checkpoints import Checkpoints, find_checkpoints
from common.distributed import Workers
from common.errors import UserError
from common.model_folder import STRUCTURE, describe_metrics, describe_structure
from common.train_state import BestEpoch, Progress, add_up, mean_metrics
from helpers import ROOT, environment, run_python

pytestmark = pytest.mark.quick

PATTERN = "checkpoint-{}.pt"
NAMES = re.compile("checkpoint-(0|[1-9][0-9]*)(-[1-9][0-9]*)?[.]pt")
FOREIGN = st.one_of(
    st.sampled_from(
        [
            "checkpoint-7.pt.sagemaker-uploading",
            "checkpoint-7.pt.sagemaker-uploaded",
            "checkpoint-8.pt.sagemaker-ignore",
            "checkpoint-9.pth",
            "checkpoint-010.pt",
            "checkpoint-+11.pt",
            "checkpoint-12-0.pt",
            "checkpoint-12-03.pt",
            "checkpoint-12-3-4.pt",
            "checkpoint-12.pt.damaged",
            "checkpoint-.pt",
            "checkpoint-1٣.pt",  # an Arabic digit, which \d and int() accept
            "xcheckpoint-13.pt",
            "checkpoint-14xpt",
            "Checkpoint-15.pt",
            "checkpoint-16.pt\n",
            "model.pth",
        ]
    ),
    st.text(
        st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=20
    ).filter(lambda name: name not in (".", "..") and not NAMES.fullmatch(name)),
)


class Engine:
    """A framework whose checkpoints are JSON."""

    CHECKPOINT = PATTERN
    FIRST_NUMBER = 1

    @staticmethod
    def read_checkpoint(file):
        content = file.read()
        if not content.startswith(b"{"):
            raise ValueError("damaged")
        return json.loads(content)

    @staticmethod
    def write_checkpoint(content, file):
        file.write(json.dumps(content).encode())


def checkpoints_in(folder, engine=Engine, **flags):
    args = Namespace(
        **{
            "checkpoint_path": Path(folder),
            "epochs": 3,
            "keep_checkpoints": 0,
            "resume_anyway": False,
            **flags,
        }
    )
    return Checkpoints(args, engine, Workers())


def content_of(position):
    progress = {**vars(Progress(*position)), "sums": [{}]}
    return json.dumps({"progress": progress}).encode()


@pytest.fixture
def log(caplog):
    """Return a function that returns the text logged since its last call."""
    caplog.set_level("INFO", logger="train")

    def read():
        text = "".join(f"{message}\n" for message in caplog.messages)
        caplog.clear()
        return text

    return read


def write(folder, *names, content=b"x"):
    for name in names:
        Path(folder, name).write_bytes(content)


def name(position):
    epoch, step = position
    return PATTERN.format(f"{epoch}-{step}" if step else epoch)


POSITIONS = st.tuples(st.integers(0, 10**12), st.one_of(st.just(0), st.integers(0, 10**12)))


@given(st.sets(POSITIONS, max_size=8), st.sets(FOREIGN, max_size=8))
@example({(9, 0), (10, 0), (100, 0), (10, 9), (10, 10), (9, 11)}, {"checkpoint-11.pt.sagemaker-ignore"})
def test_checkpoints_are_found_by_number_beside_other_files(positions, foreign):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, *map(name, positions), *foreign)
        found = find_checkpoints(folder, PATTERN)
    assert found == [(position, name(position)) for position in sorted(positions, reverse=True)]


def test_a_checkpoint_inside_an_epoch_is_between_those_of_the_epochs(tmp_path):
    write(tmp_path, *map(PATTERN.format, ["3", "3-9", "3-10", "4", "0-1"]))
    found = [name for _, name in find_checkpoints(tmp_path, PATTERN)]
    assert found == [PATTERN.format(text) for text in ("4", "3-10", "3-9", "3", "0-1")]
    for epoch, step in ((3, 0), (3, 9), (0, 1)):
        assert checkpoints_in(tmp_path).name_of(epoch, step) == name((epoch, step))


def test_a_folder_with_the_name_of_a_checkpoint_is_ignored(tmp_path):
    (tmp_path / "checkpoint-5.pt").mkdir()
    assert find_checkpoints(tmp_path, PATTERN) == []


def test_names_of_the_xgboost_container_count_from_zero(tmp_path):
    write(
        tmp_path,
        "xgboost-checkpoint.0",
        "xgboost-checkpoint.10",
        "xgboost-checkpoint.9",
        "xgboost-checkpointx11",
    )
    found = find_checkpoints(tmp_path, "xgboost-checkpoint.{}")
    assert [position for position, _ in found] == [(10, 0), (9, 0), (0, 0)]

    class FromZero(Engine):
        CHECKPOINT = "xgboost-checkpoint.{}"
        FIRST_NUMBER = 0

    assert checkpoints_in(tmp_path, FromZero).name_of(10) == "xgboost-checkpoint.9"


SMALL = st.tuples(st.integers(0, 9), st.integers(0, 3))


@given(
    st.dictionaries(SMALL, st.sampled_from(["good", "bad", "empty"]), max_size=8),
    st.sets(FOREIGN, max_size=4),
)
def test_the_newest_readable_checkpoint_is_used_and_damaged_ones_are_set_aside(kinds, foreign):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, *foreign)
        contents = {}
        for position, kind in kinds.items():
            contents[position] = {"good": content_of(position), "bad": b"bad", "empty": b""}[kind]
            write(folder, name(position), content=contents[position])
        before = sorted(os.listdir(folder))
        good = [position for position, kind in kinds.items() if kind == "good"]
        if not kinds:
            assert checkpoints_in(folder).read_newest() is None
        elif not good:
            with pytest.raises(UserError, match=r"none of the checkpoints .* can be read") as caught:
                checkpoints_in(folder).read_newest()
            assert all(name(position) in str(caught.value) for position in kinds)
            assert sorted(os.listdir(folder)) == before
        else:
            expected = name(max(good)), json.loads(contents[max(good)])
            damaged = [position for position in kinds if position > max(good)]
            for _ in range(2):
                assert checkpoints_in(folder).read_newest() == expected
                assert find_checkpoints(folder, PATTERN)[0] == (max(good), expected[0])
                for position in damaged:  # kept for inspection
                    assert Path(folder, name(position) + ".damaged").read_bytes() == contents[position]
            marks = {f"{name(position)}.sagemaker-uploaded" for position in damaged}
            assert len(os.listdir(folder)) == len(set(before) - marks)


def test_a_damaged_checkpoint_is_named_with_the_reason(tmp_path, log):
    write(tmp_path, "checkpoint-4.pt", content=content_of((3, 0)))
    write(tmp_path, "checkpoint-2.pt", content=b"")
    write(tmp_path, "checkpoint-1-5.pt")
    write(tmp_path, "checkpoint-1.pt", content=content_of((1, 0)))
    checkpoints_in(tmp_path).read_newest()
    assert log().splitlines() == [
        "Cannot read checkpoint-4.pt, trying the one before: ValueError: it contains epoch 3 and step 0, "
        "which does not match its name",
        "Cannot read checkpoint-2.pt, trying the one before: ValueError: the file is empty",
        "Cannot read checkpoint-1-5.pt, trying the one before: ValueError: damaged",
        "Kept for inspection: checkpoint-4.pt.damaged",
        "Kept for inspection: checkpoint-2.pt.damaged",
        "Kept for inspection: checkpoint-1-5.pt.damaged",
    ]


GOOD = {
    "progress": {
        "epoch": 2,
        "step": 7,
        "samples": 70,
        "sums": [{"loss": [1.5, 70], "f1": [[1.0, 2.0], [3.0, 4.0]]}],
        "seconds": 0.5,
        "history": [
            {"epoch": 1, "train_loss": 2.0, "validation_loss": math.nan},
            {"epoch": 2, "train_loss": 1, "validation_loss": 1.5},
        ],
        "stopped": False,
    },
    "job": {"--batch-size": 10, "number of training samples": 95, "classes": ["a", "b"]},
    "data": {"checksum": 1},
    "machine": {"CPU threads": 2},
    "flags": {"--epochs": "3"},
    "export": {
        "flags": {"seed": 0, "output": "x"},
        "paths": ["output"],
        "sample_shape": [8, 8, 1],
        "mean": [0.5],
        "std": [2],
    },
}


def changed(path, value):
    """Return GOOD with another value at one path; the value `...` removes the entry."""
    content = copy.deepcopy(GOOD)
    *parents, last = path
    owner = content
    for key in parents:
        owner = owner[key]
    if value is ...:
        del owner[last]
    else:
        owner[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["progress"], ..., "not a checkpoint of this script"),
        (["progress"], [], "progress is a list: expected a dictionary"),
        (["progress", "history"], ..., "missing or unknown fields: history"),
        (["progress", "momentum"], 1, "missing or unknown fields: momentum"),
        (["progress", "epoch"], "2", "epoch is '2': expected a value of type int"),
        (["progress", "epoch"], True, "epoch is 'True': expected a value of type int"),
        (["progress", "samples"], -1, "samples is -1: expected a number from 0"),
        (["progress", "seconds"], math.nan, "seconds is nan"),
        (["progress", "stopped"], 0, "stopped is '0'"),
        (["progress", "step"], 10**9, "it contains step 1000000000 of an epoch of 10 steps"),
        (["progress", "history"], [1], "history has a int: expected dictionaries"),
        (["progress", "history", 0, "epoch"], 3, "a row of epoch 3 after 0, but 2 are finished"),
        (["progress", "history", 1, "epoch"], 1, "a row of epoch 1 after 1"),
        (["progress", "history", 1, "train_loss"], "1", "history has a metric that is not a number"),
        (["progress", "sums", 0], [], "sums has a list: expected dictionaries"),
        (["progress", "sums", 0, "f1"], [[1, 2], [3, 4], 5], "the sums of f1 are not a pair"),
        (["progress", "sums", 0, "f1"], ["1", 2], "the sums of f1 are not numbers"),
        (["progress", "sums", 0, "f1"], [[1, 2], [1, 2, 3]], "shape mismatch"),
        (["job"], ["--model"], "job is a list: expected a dictionary"),
        (["job", "--model"], b"cnn", "values that are not plain"),
        (["export"], None, "export is a NoneType: expected a dictionary"),
        (["export", "flags"], ..., "export has no flags and paths"),
        (["export", "mean"], ["a"], "export has no mean and std of each channel"),
        (["export", "std"], [1, 2], "export has no mean and std of each channel"),
    ],
)
def test_a_readable_file_with_other_content_is_damaged_too(tmp_path, log, path, value, reason):
    checkpoint_schema.check(GOOD)

    class Prepared(Engine):
        """Reads values that JSON cannot contain but the formats of other frameworks can."""

        @staticmethod
        def read_checkpoint(file):
            content = Engine.read_checkpoint(file)
            return content if content["progress"]["epoch"] == 1 else changed(path, value)

    write(tmp_path, "checkpoint-2-7.pt", content=content_of((2, 7)))
    write(tmp_path, "checkpoint-1.pt", content=content_of((1, 0)))
    assert checkpoints_in(tmp_path, Prepared).read_newest()[0] == "checkpoint-1.pt"
    assert reason in log()
    assert (tmp_path / "checkpoint-2-7.pt.damaged").is_file()


def places(content, path=()):
    """Return the paths of all values in the content of a checkpoint."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, value in items:
        found.append([*path, key])
        if isinstance(value, (dict, list)):
            found += places(value, (*path, key))
    return found


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@given(ANY)
@example(10**400)
@example("text")
@example(...)
def test_any_content_of_a_checkpoint_is_refused_or_usable(value):
    for path in places(GOOD):
        content = changed(path, value)
        try:
            checkpoint_schema.check(content)
        except ValueError:
            continue
        progress = Progress(**content["progress"])
        mean_metrics(add_up(progress.sums))
        with contextlib.suppress(UserError):  # the last epoch has no such metric
            BestEpoch("loss", -1).find(progress.history)
        describe_metrics(progress, progress.epoch)
        assert 0 <= progress.epoch <= LARGEST
        checkpoints_in(".", resume_anyway=True).check_same_job("", content, {**GOOD, "progress": {}})


def test_the_schema_has_the_fields_of_the_progress():
    assert list(checkpoint_schema.PROGRESS) == [field.name for field in dataclasses.fields(Progress)]


@pytest.mark.parametrize(
    ("error", "operation"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "open"),
        (OSError("bad block"), "open"),
        (OSError(errno.EIO, "bad block"), "read"),
        (MemoryError(), "parse"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "parse"),
        (RuntimeError("std::bad_alloc"), "parse"),
    ],
)
def test_a_checkpoint_that_is_temporarily_unreadable_is_not_damaged(tmp_path, monkeypatch, error, operation):
    write(tmp_path, "checkpoint-2.pt", "checkpoint-1.pt", content=b"x" * 100)

    def fail(*_):
        raise error

    class BadDisk(io.FileIO):
        readinto = readall = fail

    class BadFile(atomic_io.ErrorKeepingReader, BadDisk):
        """A file on a disk with a bad block."""

    class Careless(Engine):
        @staticmethod
        def read_checkpoint(file):  # as in the scripts, for which a failing disk is a damaged file
            try:
                return fail() if operation == "parse" else atomic_io.check_zip(file)
            except OSError as error:
                raise ValueError("damaged") from error

    if operation == "open":
        monkeypatch.setattr(checkpoints, "ErrorKeepingReader", fail)
    if operation == "read":
        monkeypatch.setattr(checkpoints, "ErrorKeepingReader", BadFile)
    expected = r"cannot read .*checkpoint-2.pt: (Permission denied|bad block|not enough memory)"
    with pytest.raises(UserError, match=expected):
        checkpoints_in(tmp_path, Careless).read_newest()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1.pt", "checkpoint-2.pt"]


def test_atomic_write_shows_the_name_only_with_the_complete_content(tmp_path):
    path = tmp_path / "checkpoint-1.pt"
    with atomic_io.atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1.pt.sagemaker-ignore"]
        file.write(b" and half")
        written = os.fstat(file.fileno()).st_ino
    assert path.read_bytes() == b"half and half"
    assert path.stat().st_ino == written  # renamed, not copied
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "checkpoint-1.pt"
    write(tmp_path, path.name, content=b"earlier")

    def fail():
        with atomic_io.atomic_write(path) as file:
            file.write(b"half")
            raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        fail()
    if expected is UserError:
        assert f"cannot write {path}: No space left on device" in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"earlier"


def test_a_file_system_that_cannot_flush_folders_is_reported_once(tmp_path, monkeypatch, log):
    flush = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    for name in ("checkpoint-1.pt", "checkpoint-2.pt"):
        with atomic_io.atomic_write(tmp_path / name) as file:
            file.write(b"whole")
    assert len(list(tmp_path.iterdir())) == 2
    assert log().count("cannot flush folders (Invalid argument)") == 1


def test_links_are_not_followed_when_files_are_written(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("write-test", "checkpoint-1.pt"):
        (folder / f"{name}.sagemaker-ignore").symlink_to(outside)
    atomic_io.prepare_folder(folder, "--checkpoint-path")
    with atomic_io.atomic_write(folder / "checkpoint-1.pt") as file:
        file.write(b"new")
    assert outside.read_bytes() == b"precious"
    assert (folder / "checkpoint-1.pt").read_bytes() == b"new"


def test_a_model_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    with atomic_io.atomic_export(tmp_path, "--model-dir") as folder:
        (folder / "1").mkdir()
        (folder / "1/weights").write_bytes(b"weights")
        assert not flushed
    written = [
        "export.sagemaker-ignore/1",
        "export.sagemaker-ignore/1/weights",
        "export.sagemaker-ignore",
        "",
    ]
    assert flushed == [str(tmp_path / path) for path in written]
    assert os.listdir(tmp_path) == ["1"]


# A worker other than the main process exports its model and is killed.
KILLED = """
import os, signal, sys
from common.distributed import Workers
from common.run import Run
run = Run.__new__(Run)
run.workers = Workers(1, ["main", "other"])
with run.export() as folder:
    (folder / "model").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_is_killed_leaves_no_model_behind(tmp_path):
    run_python(KILLED, cwd=ROOT, env=environment(TMPDIR=str(tmp_path)), exit_code=-signal.SIGKILL)
    deadline = time.monotonic() + 10
    while os.listdir(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.listdir(tmp_path)


def test_the_mark_of_a_damaged_checkpoint_does_not_apply_to_its_successor(tmp_path, log):
    write(tmp_path, "checkpoint-1.pt", content=content_of((1, 0)))
    write(tmp_path, "checkpoint-2.pt", "checkpoint-2.pt.sagemaker-uploaded")
    folder = checkpoints_in(tmp_path, keep_checkpoints=1)
    assert folder.read_newest()[0] == "checkpoint-1.pt"
    write(tmp_path, "checkpoint-1.pt.sagemaker-uploaded")
    folder.write("checkpoint-2.pt", json.loads(content_of((2, 0))), None)
    assert [name for _, name in find_checkpoints(tmp_path, PATTERN)] == ["checkpoint-2.pt", "checkpoint-1.pt"]


def test_a_disk_that_will_be_full_is_reported_after_the_first_save(tmp_path, monkeypatch, log):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    folder = checkpoints_in(tmp_path, epochs=300)
    for epoch in (1, 2):
        folder.write(f"checkpoint-{epoch}.pt", "x" * 1000, None)
        folder.check_room()
    expected = f"299 more checkpoints of 0.0 MB will not fit into the 0 MB that are free in {tmp_path}"
    assert log().count(expected) == 1
    checkpoints_in(tmp_path, epochs=300, keep_checkpoints=2).check_room()
    assert "will not fit" not in log()


def test_a_checkpoint_that_cannot_be_deleted_stays_and_the_training_continues(tmp_path, monkeypatch, log):
    write(tmp_path, *map(PATTERN.format, (1, 2, 3)))
    folder = checkpoints_in(tmp_path, keep_checkpoints=2)

    def refuse(path, missing_ok=False):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    folder.remove_old()
    folder.remove_old()
    assert log().count(f"cannot delete {tmp_path}/checkpoint-1.pt: Operation not permitted") == 1


def test_a_link_or_folder_with_the_name_of_the_next_checkpoint_is_not_overwritten(tmp_path):
    write(tmp_path, "checkpoint-1.pt")
    (tmp_path / "checkpoint-2.pt").symlink_to("checkpoint-1.pt")
    (tmp_path / "checkpoint-3.pt").mkdir()
    folder = checkpoints_in(tmp_path)
    folder.write("checkpoint-2.pt", "new", None)
    assert not (tmp_path / "checkpoint-2.pt").is_symlink()
    with pytest.raises(UserError, match=r"cannot write .*checkpoint-3.pt: Is a directory"):
        folder.write("checkpoint-3.pt", "new", None)


def test_an_export_replaces_the_earlier_model_when_it_is_complete(tmp_path):
    (tmp_path / "1").mkdir()
    write(tmp_path, "1/old", "shapes.json", "other", content=b"old")

    def export(fail):
        with atomic_io.atomic_export(tmp_path, "--model-dir") as folder:
            (folder / "1").mkdir()
            write(folder, "1/new", "shapes.json", content=b"new")
            if fail:
                raise RuntimeError("no space\nand more")

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"^cannot write the model to --model-dir .*: no space\. The "):
        export(fail=True)
    assert sorted(tmp_path.rglob("*")) == before
    export(fail=False)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "1",
        "1/new",
        "other",
        "shapes.json",
    ]
    assert (tmp_path / "shapes.json").read_bytes() == b"new"


def retain(folder, keep, best=None):
    """Apply `--keep-checkpoints` and return the remaining checkpoints."""
    checkpoints_in(folder, keep_checkpoints=keep).remove_old(best)
    return [position for position, _ in find_checkpoints(folder, PATTERN)]


def test_only_the_newest_epochs_and_the_best_one_are_kept(tmp_path):
    write(tmp_path, *map(PATTERN.format, range(1, 13)), "checkpoint-x.pt")
    assert len(retain(tmp_path, keep=0)) == 12
    assert retain(tmp_path, keep=3, best=5) == [(12, 0), (11, 0), (10, 0), (5, 0)]
    assert retain(tmp_path, keep=2, best=11) == [(12, 0), (11, 0)]
    assert (tmp_path / "checkpoint-x.pt").exists()


def test_a_checkpoint_inside_an_epoch_is_deleted_after_a_newer_one_and_not_counted(tmp_path):
    write(tmp_path, *map(PATTERN.format, ["1", "2", "2-50", "2-100"]))
    assert retain(tmp_path, keep=2) == [(2, 100), (2, 0), (1, 0)]
    write(tmp_path, PATTERN.format(3))
    assert retain(tmp_path, keep=2) == [(3, 0), (2, 0)]


def test_checkpoints_are_kept_while_they_are_uploaded(tmp_path):
    write(tmp_path, *map(PATTERN.format, ["1", "2", "2-50", "3"]))
    write(tmp_path, "checkpoint-1.pt.sagemaker-uploading", "checkpoint-2-50.pt.sagemaker-uploading")
    assert retain(tmp_path, keep=1) == [(3, 0), (2, 50), (1, 0)]
    (tmp_path / "checkpoint-2-50.pt.sagemaker-uploading").unlink()
    assert retain(tmp_path, keep=1) == [(3, 0), (1, 0)]


def test_checkpoints_in_s3_are_kept_until_their_successors_are_in_s3(tmp_path):
    write(tmp_path, *map(PATTERN.format, ["1", "1-50", "2"]))
    write(tmp_path, "checkpoint-1.pt.sagemaker-uploaded", "checkpoint-1-50.pt.sagemaker-uploaded")
    write(tmp_path, "checkpoint-2.pt.sagemaker-uploading")
    assert retain(tmp_path, keep=1) == [(2, 0), (1, 50), (1, 0)]
    write(tmp_path, "checkpoint-2.pt.sagemaker-uploaded")
    assert retain(tmp_path, keep=1) == [(2, 0)]


def test_checkpoints_from_s3_are_kept_until_another_one_is_uploaded(tmp_path, monkeypatch):
    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path))
    write(tmp_path, *map(PATTERN.format, ["1", "2"]))
    folder = checkpoints_in(tmp_path, keep_checkpoints=1)
    folder.open()
    write(tmp_path, PATTERN.format(3))
    folder.remove_old()
    assert len(find_checkpoints(tmp_path, PATTERN)) == 3
    write(tmp_path, "checkpoint-3.pt.sagemaker-uploaded")
    folder.remove_old()
    assert find_checkpoints(tmp_path, PATTERN) == [((3, 0), "checkpoint-3.pt")]
    folder.close()


@given(
    st.dictionaries(SMALL, st.sets(st.sampled_from(["uploading", "uploaded"])), min_size=1, max_size=10),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(0, 9)),
)
def test_the_newest_and_the_newest_uploaded_are_kept_with_any_markers(markers, keep, best):
    with tempfile.TemporaryDirectory() as folder:
        for position, words in markers.items():
            write(folder, name(position), *(f"{name(position)}.sagemaker-{word}" for word in words))
        left = retain(Path(folder), keep, best)
    uploaded = [position for position, words in markers.items() if "uploaded" in words]
    epochs = sorted((position for position in markers if position[1] == 0), reverse=True)
    must_stay = [max(markers), *epochs[:keep], *([max(uploaded)] if uploaded else [])]
    must_stay += [position for position, words in markers.items() if words == {"uploading"}]
    must_stay += epochs if keep == 0 else []
    must_stay += [(best, 0)] if (best, 0) in markers else []
    assert set(must_stay) <= set(left) <= set(markers)
    if not uploaded and not any(markers.values()) and best is None and keep:
        newest_inside = [max(markers)] if max(markers)[1] else []
        assert left == newest_inside + epochs[:keep]


def test_only_leftovers_of_killed_saves_are_removed(tmp_path):
    write(tmp_path, "checkpoint-3.pt.sagemaker-ignore", "checkpoint-3.pt", "notes.sagemaker-ignore")
    folder = checkpoints_in(tmp_path)
    folder.open()
    folder.close()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3.pt", "notes.sagemaker-ignore"]


def test_another_job_is_refused_and_changed_flags_are_logged(tmp_path, log):
    def description(job=(), data=(), machine=(), flags=(), code=()):
        return {
            "job": {"--model": "cnn", "classes": ["a", "b"], **dict(job)},
            "data": {"checksum of the labels (training data)": 1, **dict(data)},
            "machine": {"CPU threads": 2, "torch": "1.0", **dict(machine)},
            "flags": {"--learning-rate": "0.1", "--epochs": "5", "--schedule": "constant", **dict(flags)},
            "code": {"train.py": "1", **dict(code)},
        }

    def check(now, resume_anyway=False):
        folder = checkpoints_in(tmp_path, resume_anyway=resume_anyway)
        folder.check_same_job("checkpoint-5.pt", description(), now)
        return log()

    changed = "Changed since checkpoint-5.pt: "
    assert check(description()) == ""
    assert check(description(flags={"--new-flag": "1", "--epochs": "10", "--loaders": "2"})) == ""
    rate = "--learning-rate was 0.1 and is now 0.2"
    assert check(description(flags={"--learning-rate": "0.2"})) == f"{changed}{rate}\n"
    cosine = description(flags={"--schedule": "cosine", "--epochs": "10"})  # depends on --epochs
    assert "--epochs was 5 and is now 10" in check(cosine)
    other_bits = "the result will be equally good but not bit-identical\n"
    threads = "CPU threads was 2 and is now 1"
    assert check(description(machine={"CPU threads": 1})) == f"Warning: {threads}: {other_bits}"
    assert check(description(machine={"torch": "2"})) == f"Warning: torch was 1.0 and is now 2: {other_bits}"
    data = "Warning: the data has changed since checkpoint-5.pt: checksum of the labels (training data) was 1"
    assert data in check(description(data={"checksum of the labels (training data)": 2}))

    code = "train.py has changed since checkpoint-5.pt: pass another --output"
    assert code in check(description(code={"train.py": "2"}))

    other = description(job={"--model": "resnet18", "classes": ["a"]})
    changes = "--model was cnn and is now resnet18; classes was ['a', 'b'] and is now ['a']"
    with pytest.raises(UserError, match=re.escape(changes)) as caught:
        check(other)
    assert "--output" in str(caught.value)
    assert "--resume-anyway" in str(caught.value)
    assert changes in check(other, resume_anyway=True)


def test_structures_are_compared_only_if_both_runs_describe_them_in_the_same_way(tmp_path, log):
    def description(structure, version):
        job = {"optimizer": "SGD", **structure}
        return {"job": job, "data": {}, "machine": {"torch": version}, "flags": {}}

    class Torch(Engine):
        FRAMEWORK = "torch"

    folder = checkpoints_in(tmp_path, Torch)
    first, second = {STRUCTURE: "1"}, {STRUCTURE: "2"}
    folder.check_same_job("checkpoint-5.pt", description(first, "1"), description(first, "1"))
    folder.check_same_job("checkpoint-5.pt", description({}, "1"), description(first, "1"))  # an earlier one
    assert log() == ""
    with pytest.raises(UserError, match=f"{STRUCTURE} was 1 and is now 2"):
        folder.check_same_job("checkpoint-5.pt", description(first, "1"), description(second, "1"))
    folder.check_same_job("checkpoint-5.pt", description(first, "1"), description(second, "2"))
    assert "torch was 1 and is now 2" in log()


def test_addresses_in_memory_do_not_change_the_structure():
    lines = [[f"Lambda(<function f at 0x{address}>)"] for address in ("7f00aa", "7f11bb")]
    assert describe_structure(lines[0]) == describe_structure(lines[1])
    assert describe_structure(["ReLU()"]) != describe_structure(["GELU()"])


def test_a_state_that_does_not_fit_is_an_error_of_one_line(tmp_path):
    error = checkpoints.misfit(tmp_path / "checkpoint-1.pt", RuntimeError("size mismatch\n  for 3: expected"))
    assert isinstance(error, UserError)
    assert "checkpoint-1.pt does not fit this script" in str(error)
    assert "load_state_dict raises RuntimeError: size mismatch for 3: expected. Build" in str(error)


def test_the_lock_of_the_folder_ends_with_the_run(tmp_path):
    first, second = checkpoints_in(tmp_path), checkpoints_in(tmp_path)
    first.open()
    first.close()
    second.open()
    second.close()


@given(st.binary(), st.binary(), st.data())
def test_any_damage_to_a_sealed_content_is_found(before, after, data):
    file = io.BytesIO()
    atomic_io.write_sealed(bytearray(before + atomic_io.UNSEALED + after), file)
    content = bytearray(file.getvalue())
    atomic_io.check_seal(content)
    damaged = flip_a_bit(content, data)
    if damaged[: len(before)] != before or damaged[len(content) - len(after) :] != after:
        with pytest.raises(ValueError, match="damaged"):
            atomic_io.check_seal(damaged)
    with pytest.raises(ValueError, match="no checksum"):
        atomic_io.check_seal(before)


def flip_a_bit(content, data):
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(damaged)


def test_a_small_file_that_unpacks_to_a_large_one_is_damaged():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights", bytes(10**6))
    with pytest.raises(ValueError, match="more bytes than it has"):
        atomic_io.check_zip(file)


@given(
    st.dictionaries(st.text("abc/", min_size=1), st.binary(max_size=50), min_size=1, max_size=3), st.data()
)
def test_damage_to_a_zip_file_is_found_or_harmless(members, data):
    def write_members(file):
        with zipfile.ZipFile(file, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)

    def read_members(path):
        with zipfile.ZipFile(path) as archive:
            return {member: archive.read(member) for member in archive.namelist()}

    buffer = io.BytesIO()
    write_members(buffer)
    content = buffer.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint-1.pt")
        path.write_bytes(content)
        atomic_io.check_zip(io.BytesIO(path.read_bytes()))
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(ValueError, match="damaged"):
            atomic_io.check_zip(io.BytesIO(path.read_bytes()))
        path.write_bytes(flip_a_bit(content, data))
        try:
            atomic_io.check_zip(io.BytesIO(path.read_bytes()))
        except ValueError:
            return
        left = read_members(path)
    assert set(left.values()) <= set(
        members.values()
    )  # whole members: one may be missing or have another name
