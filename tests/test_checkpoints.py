"""The folder of checkpoints: which file is the newest, and that no write ever harms one."""

import errno
import os
import re
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common import checkpoints, files
from common.errors import UserError

PATTERN = "checkpoint-{}.pt"
FOREIGN = st.one_of(
    st.sampled_from(
        [
            "checkpoint-7.pt.sagemaker-uploading",
            "checkpoint-7.pt.sagemaker-uploaded",
            "checkpoint-8.pt.sagemaker-ignore",
            "checkpoint-9.pth",
            "checkpoint-010.pt",
            "checkpoint-+11.pt",
            "checkpoint-12-3.pt",
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
        lambda name: name not in (".", "..") and not re.fullmatch("checkpoint-(0|[1-9][0-9]*)[.]pt", name)
    ),
)


def write(folder, *names, content=b"x"):
    for name in names:
        Path(folder, name).write_bytes(content)


@given(st.sets(st.integers(0, 10**12), max_size=8), st.sets(FOREIGN, max_size=8))
@example({9, 10, 100}, {"checkpoint-11.pt.sagemaker-ignore"})
def test_checkpoints_are_found_by_number_whatever_else_lies_there(numbers, foreign):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, *(PATTERN.format(number) for number in numbers), *foreign)
        found = checkpoints.find_checkpoints(folder, PATTERN)
    assert found == [(number, Path(folder, f"checkpoint-{number}.pt")) for number in sorted(numbers, reverse=True)]


def test_a_folder_with_the_name_of_a_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoint-5.pt").mkdir()
    assert checkpoints.find_checkpoints(tmp_path, PATTERN) == []


def test_the_xgboost_container_names_are_found_from_zero(tmp_path):
    write(tmp_path, "xgboost-checkpoint.0", "xgboost-checkpoint.10", "xgboost-checkpoint.9", "xgboost-checkpointx11")
    assert [number for number, _ in checkpoints.find_checkpoints(tmp_path, "xgboost-checkpoint.{}")] == [10, 9, 0]


@given(st.dictionaries(st.integers(0, 99), st.booleans(), max_size=8))
def test_the_newest_readable_checkpoint_is_used(readable):
    def read(path):
        if path.read_bytes() != b"good":
            raise RuntimeError("damaged")
        return path.name

    with tempfile.TemporaryDirectory() as folder:
        for number, good in readable.items():
            write(folder, PATTERN.format(number), content=b"good" if good else b"bad")
        if not readable:
            assert checkpoints.read_newest_checkpoint(folder, PATTERN, read) is None
        elif not any(readable.values()):
            with pytest.raises(UserError, match=r"none of the checkpoints .* can be read") as caught:
                checkpoints.read_newest_checkpoint(folder, PATTERN, read)
            assert all(PATTERN.format(number) in str(caught.value) for number in readable)
        else:
            newest = max(number for number, good in readable.items() if good)
            path = Path(folder, PATTERN.format(newest))
            assert checkpoints.read_newest_checkpoint(folder, PATTERN, read) == (newest, path, path.name)
        assert len(os.listdir(folder)) == len(readable)  # the damaged ones are left for inspection


def test_an_empty_checkpoint_is_named_and_counts_as_none(tmp_path, capsys):
    write(tmp_path, "checkpoint-2.pt", content=b"")
    assert checkpoints.read_newest_checkpoint(tmp_path, PATTERN, Path.read_bytes) is None
    write(tmp_path, "checkpoint-1.pt")
    assert checkpoints.read_newest_checkpoint(tmp_path, PATTERN, Path.read_bytes)[0] == 1
    assert "Skipping checkpoint-2.pt: the file is empty\n" in capsys.readouterr().out


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


def numbers(folder):
    return [number for number, _ in checkpoints.find_checkpoints(folder, PATTERN)]


def test_old_checkpoints_are_removed_except_those_being_uploaded(tmp_path):
    write(tmp_path, *(PATTERN.format(number) for number in range(1, 13)), "checkpoint-x.pt")
    write(tmp_path, "checkpoint-2.pt.sagemaker-uploading")
    write(tmp_path, "checkpoint-3.pt.sagemaker-uploading", "checkpoint-3.pt.sagemaker-uploaded")
    checkpoints.remove_old_checkpoints(tmp_path, PATTERN, newest=12, keep=0)
    assert len(numbers(tmp_path)) == 12
    checkpoints.remove_old_checkpoints(tmp_path, PATTERN, newest=12, keep=3)
    assert numbers(tmp_path) == [12, 11, 10, 2]
    assert (tmp_path / "checkpoint-x.pt").exists()


@given(st.sets(st.integers(0, 30), min_size=1), st.integers(1, 5), st.data())
def test_the_checkpoint_just_written_is_never_removed(there, keep, data):
    """Higher numbers are damaged or foreign, or they would have been resumed from."""
    newest = data.draw(st.sampled_from(sorted(there)))
    with tempfile.TemporaryDirectory() as folder:
        write(folder, *map(PATTERN.format, there))
        checkpoints.remove_old_checkpoints(folder, PATTERN, newest, keep)
        kept = sorted(number for number in there if number <= newest)[-keep:]
        assert sorted(numbers(folder)) == kept + sorted(number for number in there if number > newest)


def test_leftovers_of_killed_saves_are_removed_and_nothing_else(tmp_path):
    write(tmp_path, "checkpoint-3.pt.sagemaker-ignore", "checkpoint-3.pt", "notes.sagemaker-ignore")
    checkpoints.remove_leftovers(tmp_path, PATTERN)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3.pt", "notes.sagemaker-ignore"]


def test_another_job_is_refused_and_changed_flags_are_logged(capsys):
    path = Path("checkpoint-5.pt")
    checkpoint = {"job": {"--model": "cnn", "number of classes": 10}, "flags": {"learning_rate": "0.1", "epochs": "5"}}
    args = Namespace(resume_anyway=False, learning_rate=0.1, epochs=5, new_flag=1)
    checkpoints.check_same_job(args, path, checkpoint, dict(checkpoint["job"]))
    assert capsys.readouterr().out == ""

    args.epochs, args.learning_rate = 10, 0.2
    checkpoints.check_same_job(args, path, checkpoint, dict(checkpoint["job"]))
    assert capsys.readouterr().out == "Changed since checkpoint-5.pt: --learning-rate was 0.1 and is now 0.2\n"

    other = {"--model": "resnet18", "number of classes": 3}
    changes = "--model was cnn and is now resnet18; number of classes was 10 and is now 3"
    with pytest.raises(UserError, match=changes):
        checkpoints.check_same_job(args, path, checkpoint, other)
    args.resume_anyway = True
    checkpoints.check_same_job(args, path, checkpoint, other)
    assert changes in capsys.readouterr().out


@given(st.binary(), st.binary(), st.data())
def test_any_damage_to_a_sealed_content_is_found(before, after, data):
    content = files.seal(before + files.UNSEALED + after)
    files.check_seal(content)
    files.check_seal(before)  # without a checksum there is nothing to check
    position = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    field = range(len(before), len(before) + len(files.UNSEALED))
    if position not in field:
        with pytest.raises(ValueError, match="damaged"):
            files.check_seal(bytes(damaged))
