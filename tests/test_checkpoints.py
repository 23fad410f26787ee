"""The folder of checkpoints: which file is the newest, and that no write ever harms one."""

import errno
import io
import os
import re
import tempfile
import types
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common import checkpoints, files
from common.errors import UserError
from common.progress import Progress

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
            "checkpoint-1٣.pt",  # an Arabic digit, which \d and int() take
            "xcheckpoint-13.pt",
            "checkpoint-14xpt",
            "Checkpoint-15.pt",
            "checkpoint-16.pt\n",
            "model.pth",
        ]
    ),
    st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=20).filter(
        lambda name: name not in (".", "..") and not NAMES.fullmatch(name)
    ),
)


def write(folder, *names, content=b"x"):
    for name in names:
        Path(folder, name).write_bytes(content)


def name(position):
    epoch, step = position
    return PATTERN.format(f"{epoch}-{step}" if step else epoch)


POSITIONS = st.tuples(st.integers(0, 10**12), st.one_of(st.just(0), st.integers(0, 10**12)))


@given(st.sets(POSITIONS, max_size=8), st.sets(FOREIGN, max_size=8))
@example({(9, 0), (10, 0), (100, 0), (10, 9), (10, 10), (9, 11)}, {"checkpoint-11.pt.sagemaker-ignore"})
def test_checkpoints_are_found_by_number_whatever_else_lies_there(positions, foreign):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, *map(name, positions), *foreign)
        found = checkpoints.find_checkpoints(folder, PATTERN)
    assert found == [(position, name(position)) for position in sorted(positions, reverse=True)]


def test_a_checkpoint_inside_an_epoch_lies_between_those_of_the_epochs(tmp_path):
    write(tmp_path, *map(PATTERN.format, ["3", "3-9", "3-10", "4", "0-1"]))
    found = [name for _, name in checkpoints.find_checkpoints(tmp_path, PATTERN)]
    assert found == [PATTERN.format(text) for text in ("4", "3-10", "3-9", "3", "0-1")]
    for epoch, step in ((3, 0), (3, 9), (0, 1)):
        assert checkpoints.name_of(PATTERN, Progress(epoch=epoch, step=step)) == name((epoch, step))


def test_a_folder_with_the_name_of_a_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoint-5.pt").mkdir()
    assert checkpoints.find_checkpoints(tmp_path, PATTERN) == []


def test_the_xgboost_container_names_are_found_from_zero(tmp_path):
    write(tmp_path, "xgboost-checkpoint.0", "xgboost-checkpoint.10", "xgboost-checkpoint.9", "xgboost-checkpointx11")
    found = checkpoints.find_checkpoints(tmp_path, "xgboost-checkpoint.{}")
    assert [position for position, _ in found] == [(10, 0), (9, 0), (0, 0)]


SMALL = st.tuples(st.integers(0, 9), st.integers(0, 3))


def read_good(file):
    if file.read() != b"good":
        raise RuntimeError("damaged")
    return Path(file.name).name


@given(st.dictionaries(SMALL, st.sampled_from([b"good", b"bad", b""]), max_size=8), st.sets(FOREIGN, max_size=4))
def test_the_newest_readable_checkpoint_is_used_and_damaged_ones_never_count_again(contents, foreign):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, *foreign)
        for position, content in contents.items():
            write(folder, name(position), content=content)
        before = sorted(os.listdir(folder))
        good = [position for position, content in contents.items() if content == b"good"]
        if not contents:
            assert checkpoints.read_newest_checkpoint(folder, PATTERN, read_good) is None
        elif not good:
            with pytest.raises(UserError, match=r"none of the checkpoints .* can be read") as caught:
                checkpoints.read_newest_checkpoint(folder, PATTERN, read_good)
            assert all(name(position) in str(caught.value) for position in contents)
            assert sorted(os.listdir(folder)) == before
        else:
            path = Path(folder, name(max(good)))
            damaged = [position for position in contents if position > max(good)]
            for _ in range(2):
                assert checkpoints.read_newest_checkpoint(folder, PATTERN, read_good) == (path, path.name)
                assert checkpoints.find_checkpoints(folder, PATTERN)[0] == (max(good), path.name)
                for position in damaged:  # left for inspection
                    assert Path(folder, name(position) + ".damaged").read_bytes() == contents[position]
            assert len(os.listdir(folder)) == len(before)


def test_a_damaged_checkpoint_is_named_with_the_reason(tmp_path, capsys):
    write(tmp_path, "checkpoint-2.pt", content=b"")
    write(tmp_path, "checkpoint-1-5.pt")
    write(tmp_path, "checkpoint-1.pt", content=b"good")
    checkpoints.read_newest_checkpoint(tmp_path, PATTERN, read_good)
    assert capsys.readouterr().out.splitlines() == [
        "Cannot read checkpoint-2.pt, trying the one before: ValueError: the file is empty",
        "Cannot read checkpoint-1-5.pt, trying the one before: RuntimeError: damaged",
        "Kept for inspection: checkpoint-2.pt.damaged",
        "Kept for inspection: checkpoint-1-5.pt.damaged",
    ]


@pytest.mark.parametrize(
    ("error", "operation"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "open"),
        (OSError("bad block"), "open"),
        (OSError(errno.EIO, "bad block"), "read"),
        (MemoryError(), "parse"),
    ],
)
def test_a_checkpoint_that_only_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, error, operation):
    write(tmp_path, "checkpoint-2.pt", "checkpoint-1.pt")

    def fail(*_):
        raise error

    class BadDisk(io.BytesIO):
        """As a file on a disk with a bad block."""

        read = fail

    def parse(file):  # as the scripts do, for which a disk that fails is a damaged file
        try:
            return fail() if operation == "parse" else files.check_zip(file)
        except OSError as error:
            raise ValueError("damaged") from error

    if operation != "parse":
        opened = fail if operation == "open" else lambda *_: BadDisk()
        monkeypatch.setattr(checkpoints, "open", opened, raising=False)
    expected = r"cannot read .*checkpoint-2.pt: (Permission denied|bad block|not enough memory)"
    with pytest.raises(UserError, match=expected):
        checkpoints.read_newest_checkpoint(tmp_path, PATTERN, parse)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1.pt", "checkpoint-2.pt"]


def test_atomic_write_shows_the_name_only_with_the_whole_content(tmp_path):
    path = tmp_path / "checkpoint-1.pt"
    with files.atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1.pt.sagemaker-ignore"]
        file.write(b" and half")
        written = os.fstat(file.fileno()).st_ino
    assert path.read_bytes() == b"half and half"
    assert path.stat().st_ino == written  # renamed, not copied
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "checkpoint-1.pt"
    write(tmp_path, path.name, content=b"earlier")

    def fail():
        with files.atomic_write(path) as file:
            file.write(b"half")
            raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        fail()
    if expected is UserError:
        assert f"cannot write {path}: No space left on device" in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"earlier"


def test_an_export_replaces_what_was_there_when_all_of_it_is_written(tmp_path):
    (tmp_path / "1").mkdir()
    write(tmp_path, "1/old", "shapes.json", "other", content=b"old")

    def export(fail):
        with files.atomic_export(tmp_path) as folder:
            (folder / "1").mkdir()
            write(folder, "1/new", "shapes.json", content=b"new")
            if fail:
                raise RuntimeError

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError):
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
    """Apply the flags and return what is left."""
    args = Namespace(checkpoint_path=folder, keep_checkpoints=keep, keep_best=best is not None)
    checkpoints.remove_old_checkpoints(args, PATTERN, best)
    return [position for position, _ in checkpoints.find_checkpoints(folder, PATTERN)]


def test_only_the_newest_epochs_are_kept_and_the_best(tmp_path):
    write(tmp_path, *map(PATTERN.format, range(1, 13)), "checkpoint-x.pt")
    assert len(retain(tmp_path, keep=0)) == 12
    assert retain(tmp_path, keep=3, best=5) == [(12, 0), (11, 0), (10, 0), (5, 0)]
    assert retain(tmp_path, keep=2, best=11) == [(12, 0), (11, 0)]
    assert (tmp_path / "checkpoint-x.pt").exists()


def test_a_checkpoint_inside_an_epoch_goes_when_a_newer_one_is_there_and_never_counts(tmp_path):
    write(tmp_path, *map(PATTERN.format, ["1", "2", "2-50", "2-100"]))
    assert retain(tmp_path, keep=2) == [(2, 100), (2, 0), (1, 0)]
    write(tmp_path, PATTERN.format(3))
    assert retain(tmp_path, keep=2) == [(3, 0), (2, 0)]


def test_what_is_being_uploaded_stays_until_later(tmp_path):
    write(tmp_path, *map(PATTERN.format, ["1", "2", "2-50", "3"]))
    write(tmp_path, "checkpoint-1.pt.sagemaker-uploading", "checkpoint-2-50.pt.sagemaker-uploading")
    assert retain(tmp_path, keep=1) == [(3, 0), (2, 50), (1, 0)]
    (tmp_path / "checkpoint-2-50.pt.sagemaker-uploading").unlink()
    assert retain(tmp_path, keep=1) == [(3, 0), (1, 0)]


def test_what_is_in_s3_stays_until_what_replaces_it_is_there_too(tmp_path):
    write(tmp_path, *map(PATTERN.format, ["1", "1-50", "2"]))
    write(tmp_path, "checkpoint-1.pt.sagemaker-uploaded", "checkpoint-1-50.pt.sagemaker-uploaded")
    write(tmp_path, "checkpoint-2.pt.sagemaker-uploading")
    assert retain(tmp_path, keep=1) == [(2, 0), (1, 50), (1, 0)]
    write(tmp_path, "checkpoint-2.pt.sagemaker-uploaded")
    assert retain(tmp_path, keep=1) == [(2, 0)]


@given(
    st.dictionaries(SMALL, st.sets(st.sampled_from(["uploading", "uploaded"])), min_size=1, max_size=10),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(0, 9)),
)
def test_whatever_the_markers_the_newest_and_the_newest_uploaded_stay(markers, keep, best):
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


def test_leftovers_of_killed_saves_are_removed_and_nothing_else(tmp_path):
    write(tmp_path, "checkpoint-3.pt.sagemaker-ignore", "checkpoint-3.pt", "notes.sagemaker-ignore")
    checkpoints.prepare_folder(tmp_path, PATTERN)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3.pt", "notes.sagemaker-ignore"]


def test_another_job_is_refused_and_changed_flags_are_logged(capsys):
    path = Path("checkpoint-5.pt")
    args = Namespace(resume_anyway=False, learning_rate=0.1, epochs=5)
    job = {"--model": "cnn", "number of classes": 10}
    saved = checkpoints.describe_run(args, job, os_like("1.0"), threads=2)

    def check(args, job, version="1.0", threads=2):
        checkpoints.check_same_job(args, path, saved, checkpoints.describe_run(args, job, os_like(version), threads))
        *changes, resuming = capsys.readouterr().out.splitlines(keepends=True)
        assert resuming == "Resuming training from checkpoint-5.pt\n"
        return "".join(changes)

    args.new_flag = 1
    assert check(args, job) == ""
    args.epochs, args.learning_rate = 10, 0.2
    assert check(args, job) == "Changed since checkpoint-5.pt: --learning-rate was 0.1 and is now 0.2\n"
    args.learning_rate = 0.1
    other_bits = "the result will be equally good but not bit-identical\n"
    assert check(args, job, threads=1) == f"Warning: CPU threads was 2 and is now 1: {other_bits}"
    assert check(args, job, version="2.0") == f"Warning: framework was 1.0 and is now 2.0: {other_bits}"

    other = {"--model": "resnet18", "number of classes": 3}
    changes = "--model was cnn and is now resnet18; number of classes was 10 and is now 3"
    with pytest.raises(UserError, match=changes):
        check(args, other)
    args.resume_anyway = True
    assert changes in check(args, other)


def os_like(version):
    """Return a module with a version."""
    module = types.ModuleType("framework")
    module.__version__ = version
    return module


def test_the_number_of_threads_is_that_of_openmp_or_of_the_cpus(monkeypatch):
    def threads(wanted):
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
        return checkpoints.describe_run(Namespace(), {}, os_like("1"))["machine"]["CPU threads"]

    cpus = len(os.sched_getaffinity(0))
    assert [threads("3"), threads(""), threads("0"), threads("4,2")] == [3, cpus, cpus, cpus]


@given(st.binary(), st.binary(), st.data())
def test_any_damage_to_a_sealed_content_is_found(before, after, data):
    content = files.seal(bytearray(before + files.UNSEALED + after))
    files.check_seal(content)
    damaged = flip_a_bit(content, data)
    if damaged[: len(before)] != before or damaged[len(content) - len(after) :] != after:
        with pytest.raises(ValueError, match="damaged"):
            files.check_seal(damaged)
    with pytest.raises(ValueError, match="no checksum"):
        files.check_seal(before)


def flip_a_bit(content, data):
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(damaged)


@given(st.dictionaries(st.text("abc/", min_size=1), st.binary(max_size=50), min_size=1, max_size=3), st.data())
def test_damage_to_a_zip_file_is_found_or_does_no_harm(members, data):
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
        files.check_zip(io.BytesIO(path.read_bytes()))
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(ValueError, match="damaged"):
            files.check_zip(io.BytesIO(path.read_bytes()))
        path.write_bytes(flip_a_bit(content, data))
        try:
            files.check_zip(io.BytesIO(path.read_bytes()))
        except ValueError:
            return
        left = read_members(path)
    assert set(left.values()) <= set(members.values())  # whole members: one may be missing or have another name


def test_arrays_come_back_as_they_were_written(tmp_path):
    arrays = {
        "scalar": np.array(7, np.int64),
        "none": np.zeros((0, 3), np.float32),
        "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "every second": np.arange(10, dtype=np.uint8)[::2],
        "a/b": np.array([np.nan, -0.0, np.inf], np.float16),
    }
    facts = {"class names": ["Käse"], "history": [{"epoch": 1, "loss": 0.1 + 0.2}]}
    path = tmp_path / "arrays"
    with path.open("wb") as file:
        files.write_arrays(file, arrays, facts)
    with path.open("rb") as file:
        read, told = files.read_arrays(file)
    assert told == facts
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape, read[name].tobytes()) == (array.dtype, array.shape, array.tobytes())
    with path.open("wb") as file:
        np.savez(file, objects=np.array([{}], dtype=object), json="{}")  # a pickle, which could execute something
    with path.open("rb") as file, pytest.raises(ValueError, match="pickle"):
        files.read_arrays(file)
