"""What a run tells: log lines and result files."""

import csv
import json
from argparse import Namespace

from common import report
from common.progress import Progress


def test_an_epoch_is_one_line_of_keys_and_values(capsys):
    row = report.log_epoch(6, {"loss": 0.10336, "accuracy": 0.9712}, {"loss": 0.0921, "accuracy": 0.9783}, 1.2, 1692)
    assert capsys.readouterr().out == (
        "epoch=6 train_loss=0.1034 train_accuracy=0.9712 validation_loss=0.0921 validation_accuracy=0.9783 "
        "seconds=1.20 samples_per_second=1410\n"
    )
    assert row["train_loss"] == 0.10336


def test_without_a_terminal_some_steps_are_lines(capsys):
    progress = Progress(epoch=3, step=7)
    args = Namespace(log_steps=4)
    for _ in report.progress_bar(args, progress, 16, range(9)):
        progress.step += 1
    assert capsys.readouterr().out == "step=8/16 epoch=4\nstep=12/16 epoch=4\nstep=16/16 epoch=4\n"
    assert list(report.progress_bar(Namespace(log_steps=0), progress, 16, range(9))) == list(range(9))
    assert capsys.readouterr().out == ""


def test_results_with_metrics_that_changed_on_the_way(tmp_path):
    history = [{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_auc": float("nan")}]
    progress = Progress(epoch=2, history=history)
    progress.initial_epoch = 1
    report.write_results(Namespace(output_data_dir=tmp_path, keep_best=False), progress, class_names=["a", "b"])
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=None)
    assert metrics.pop("wall_seconds") >= 0
    assert metrics == {"epochs": 2, "initial_epoch": 1, "train_auc": None, "class_names": ["a", "b"]}
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"epoch": "1", "train_loss": "0.5", "train_auc": ""},
        {"epoch": "2", "train_loss": "", "train_auc": "nan"},
    ]


def test_results_without_any_epoch(tmp_path):
    report.write_results(Namespace(output_data_dir=tmp_path, keep_best=True), Progress(epoch=5))
    assert json.loads((tmp_path / "metrics.json").read_text())["epochs"] == 5
