"""Forty real tables, selected at random (tests/data/README.md): each trains with just --label-column."""

import json
import shutil

import pytest

from helpers import ROOT, run_many

pytestmark = pytest.mark.quick

FOLDER = ROOT / "tests/data/tables"
LABELS = json.loads((FOLDER / "labels.json").read_text())
REFUSED = {"Ecdat-Mofa.csv.gz": r"line 51: '6.2\x1a' in the column netinc is not a number"}


def test_real_tables_train_or_give_a_one_line_error(tmp_path):
    jobs = []
    for name, label in LABELS.items():
        folder = tmp_path / name
        (folder / "data").mkdir(parents=True)
        shutil.copy(FOLDER / name, folder / "data")
        jobs.append((folder, ["--train", "data", "--num-round", 2, "--label-column", label]))
    reasons = {}
    for name, result in zip(LABELS, run_many("xgboost", jobs, cwd=tmp_path)):
        if result.code:
            reasons[name] = result.error_line
        else:
            assert result.epochs == [1, 2]
            assert f"Label: {LABELS[name]} (" in result.output
    for name, reason in reasons.items():
        print(name, reason)
    assert len(LABELS) == 40
    assert set(reasons) == set(REFUSED)
    for name, part in REFUSED.items():
        assert part in reasons[name]
