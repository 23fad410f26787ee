"""The file that holds the metrics of a long training's earlier epochs."""

import json
import math
import re

import numpy as np
import pytest

from common.errors import UserError
from common.history import BLOCK, FILE_NAME, HistoryFile
from helpers import assert_same_bits, checkpoint_folder, files, names, run, run_with, write_csv

ROWS = [{"epoch": epoch, "train_loss": 1 / epoch} for epoch in range(1, 4 * BLOCK + 2)]


def content_of(folder):
    path = folder / FILE_NAME
    return path.read_bytes() if path.is_file() else b""


def save(history, num_rows, best=None):
    """Return the rows of a checkpoint after `num_rows` epochs."""
    saved = history.split(ROWS[:num_rows], best)
    if history.unwritten:
        history.write()
    return saved


@pytest.mark.quick
@pytest.mark.parametrize("num_rows", [0, 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK])
def test_a_checkpoint_and_the_file_have_all_rows(num_rows, tmp_path):
    history = HistoryFile(tmp_path)
    for earlier in range(0, num_rows, 300):
        save(history, earlier)
    saved = save(history, num_rows)
    assert len(saved) < 2 * BLOCK
    assert HistoryFile(tmp_path).merge(saved, content_of(tmp_path)) == ROWS[:num_rows]


@pytest.mark.quick
def test_rows_after_the_resumed_epoch_are_dropped(tmp_path):
    save(HistoryFile(tmp_path), 4 * BLOCK)
    older = HistoryFile(tmp_path / "other").split(ROWS[: 2 * BLOCK], None)
    history = HistoryFile(tmp_path)
    merged = history.merge(older, content_of(tmp_path))
    assert merged == ROWS[: 2 * BLOCK]
    changed = [*merged, *({**row, "train_loss": 0.0} for row in ROWS[2 * BLOCK :])]
    saved = history.split(changed, None)
    history.write()
    assert HistoryFile(tmp_path).merge(saved, content_of(tmp_path)) == changed


@pytest.mark.quick
@pytest.mark.parametrize("best", [ROWS[0], ROWS[BLOCK - 1], ROWS[BLOCK], ROWS[3 * BLOCK - 1]])
def test_lost_rows_are_reported_and_the_best_one_is_kept(best, tmp_path, caplog):
    caplog.set_level("INFO")
    saved = save(HistoryFile(tmp_path), 3 * BLOCK, best)
    assert HistoryFile(tmp_path).merge(saved, content_of(tmp_path)) == ROWS[: 3 * BLOCK]
    assert not caplog.messages
    cut = content_of(tmp_path)[:-2]  # in the middle of the last line
    history = HistoryFile(tmp_path)
    assert best in HistoryFile(tmp_path).merge(saved, b"")
    merged = history.merge(saved, cut)
    assert f"lacks the epochs {2 * BLOCK} to {2 * BLOCK}" in caplog.text
    assert best in merged
    assert merged[: 2 * BLOCK - 1] == ROWS[: 2 * BLOCK - 1]


@pytest.mark.quick
@pytest.mark.parametrize("line", [b'{"epoch": 1, "train_loss": null}\n', b"[1]\n", b"[" * 10**5 + b"\n"])
def test_a_line_that_is_no_row_ends_the_rows(line, tmp_path):
    saved = save(HistoryFile(tmp_path), 2 * BLOCK)
    later = content_of(tmp_path).splitlines(keepends=True)[1:]
    assert HistoryFile(tmp_path).merge(saved, b"".join([line, *later])) == saved


@pytest.mark.quick
def test_every_line_is_json_and_every_value_is_restored(tmp_path):
    values = {
        "train_loss": math.inf,
        "validation_loss": -math.inf,
        "count": 3,
        "tiny": 1e-320,
        "third": 1 / 3,
    }
    rows = [{"epoch": epoch, **values} for epoch in range(1, 2 * BLOCK + 1)]
    history = HistoryFile(tmp_path)
    saved = history.split(rows, None)
    history.write()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in content_of(tmp_path).splitlines():
        json.loads(line, parse_constant=refuse)
    merged = HistoryFile(tmp_path).merge(saved, content_of(tmp_path))
    assert list(map(repr, merged)) == list(map(repr, rows))


@pytest.mark.quick
def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(UserError, match=r"cannot write .*history\.jsonl: Is a directory"):
        save(HistoryFile(tmp_path), 2 * BLOCK)


def test_a_training_of_many_rounds_is_bit_identical_after_a_restart(tmp_path):
    """The best round is 1, as the validation labels are wrong."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(40, 2))
    labels = features[:, :1] > 0
    write_csv(tmp_path / "train/table.csv", np.hstack([labels, features]))
    write_csv(tmp_path / "validation/table.csv", np.hstack([~labels, features]))
    data = ["--train", tmp_path / "train", "--validation", tmp_path / "validation"]
    flags = ["--max-depth", 1, "--nthread", 1, "--best-metric", "loss"]
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    run("xgboost", *data, *flags, "--num-round", 2 * BLOCK + 20, cwd=tmp_path / "whole")
    run("xgboost", *data, *flags, "--num-round", 2 * BLOCK + 10, cwd=tmp_path / "resumed")
    result = run("xgboost", *data, *flags, "--num-round", 2 * BLOCK + 20, cwd=tmp_path / "resumed")
    assert "lacks" not in result.output
    lines = (checkpoint_folder(tmp_path / "resumed", "xgboost") / FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, BLOCK + 1))
    assert_same_bits(tmp_path / "whole", tmp_path / "resumed", "xgboost")
    later = names("xgboost", *range(2 * BLOCK + 11, 2 * BLOCK + 21))
    assert len(set(later) & set(files(tmp_path / "resumed", "xgboost"))) < len(later)  # not every round


def test_the_first_boosting_round_does_not_count_the_building_of_the_matrices(tmp_path):
    slow = 'import time; at_call(Run, "defer_signals", 1, lambda: time.sleep(3))'
    result = run_with(slow, "xgboost", "--num-round", 2, cwd=tmp_path, code=0)
    seconds = re.search(r"^epoch=1 .* seconds=(\S+) ", result.output, re.MULTILINE)[1]
    assert float(seconds) < 3
