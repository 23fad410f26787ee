"""Log lines and result files of a training."""

import contextlib
import csv
import json
import re
import subprocess
import sys

import pytest

from common import errors, report
from common.train_state import Progress
from helpers import ROOT, environment

pytestmark = pytest.mark.quick


def test_an_epoch_is_logged_as_one_line_of_keys_and_values():
    progress = Progress(epoch=5, samples=2030, seconds=1.2)
    row = progress.finish_epoch({"loss": 0.10336, "accuracy": 0.9712}, {"loss": 0.0921, "accuracy": 0.9783})
    line = report.epoch_line(row)
    assert line == (
        "epoch=6 train_loss=0.1034 train_accuracy=0.9712 validation_loss=0.0921 validation_accuracy=0.9783 "
        "seconds=1.20 samples_per_second=1692"
    )
    found = {}
    for definition in report.metric_definitions():
        match = re.search(definition["Regex"], line)
        if match:
            found[definition["Name"]] = match[1]
    assert found == {
        "train:loss": "0.1034",
        "train:accuracy": "0.9712",
        "validation:loss": "0.0921",
        "validation:accuracy": "0.9783",
        "seconds": "1.20",
        "samples_per_second": "1692",
    }


def test_only_the_main_process_logs_and_logging_is_restored(capsys):
    before = report.LOGGER.level, report.LOGGER.propagate, list(report.LOGGER.handlers)
    for is_main_process, expected in ((True, "a line\n"), (False, "")):
        stop = report.start_logging(is_main_process)
        report.log("a line")
        stop()
        assert capsys.readouterr().out == expected
    assert (report.LOGGER.level, report.LOGGER.propagate, list(report.LOGGER.handlers)) == before


def test_an_external_name_cannot_start_a_log_line(capsys):
    stop = report.start_logging(True)
    report.log("Training images: caf\u00e9\nepoch=9 train_loss=0.1 \x1b[31m\udcff 5")
    stop()
    expected = "Training images: caf\u00e9\\nepoch=9 train_loss=0.1 \\x1b[31m\\udcff 5\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit):
        errors.fail("no class a\nb")
    assert capsys.readouterr().err == "error: no class a\\nb\n"


def test_a_failed_log_line_does_not_end_the_training():
    """As in `train.py | head`: neither the log line nor the exit of Python fails."""
    code = "import sys; from common import report; report.start_logging(True)\n"
    code += "sys.stdin.readline(); report.log('a line'); report.log('another'); sys.exit(7)"
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 7


@pytest.mark.parametrize("target", ["/dev/full", "closed"])
def test_a_failed_progress_bar_does_not_end_the_training(target):
    stream = open("/dev/full" if target == "/dev/full" else "/dev/null", "w", buffering=1)  # noqa: SIM115
    quiet = report.QuietStream(stream)
    if target == "closed":
        stream.close()
    quiet.write("50 %\n")
    quiet.flush()
    with contextlib.suppress(OSError):
        stream.close()


def test_a_usage_error_keeps_its_exit_code_if_it_cannot_be_written():
    command = [sys.executable, str(ROOT / "xgboost/train.py"), "--nope"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, env=environment()).returncode == 2


def test_only_known_messages_are_removed_from_standard_error():
    code = "import os, sys; from common import quiet\n"
    code += "with quiet.without_lines('I0000 .*stub'):\n"
    code += "    os.write(2, b'I0000 cuda_stub.cc\\nE0000 broken\\n'); print('ours', file=sys.stderr)\n"
    code += "os.write(2, b'I0000 cuda_stub.cc\\n'); 1 / 0"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment()
    )
    lines = finished.stderr.splitlines()
    assert lines[:3] == ["E0000 broken", "ours", "I0000 cuda_stub.cc"]
    assert lines[-1].startswith("ZeroDivisionError")


def test_results_with_metrics_that_changed_during_the_training(tmp_path):
    history = [{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_auc": float("nan")}]
    report.write_results(tmp_path, history, 2, {"epochs": 2, "class_names": ["a", "b"]})
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=None)
    assert metrics == {"epoch": 2, "epochs": 2, "train_auc": None, "class_names": ["a", "b"]}
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"epoch": "1", "train_loss": "0.5", "train_auc": ""},
        {"epoch": "2", "train_loss": "", "train_auc": "nan"},
    ]


def test_results_without_an_epoch(tmp_path):
    report.write_results(tmp_path, [], 0, {"epochs": 5})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"epochs": 5}
