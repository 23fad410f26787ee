"""Event files and MLflow have one row per epoch, even if the training was interrupted."""

import csv
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import tracking
from helpers import ROOT, environment, free_port, run, run_python, run_with, start_command

MLFLOW = ROOT / ".venv-mlflow/bin"

# The checkpoint of epoch 4 is missing when the process is killed in epoch 5, although epoch 4 is logged.
KILL = """
at_call(Run, "save", 3, lambda: replace(Run, "save", lambda run: "nothing"))
at_call(Run, "finish_epoch", 5, lambda: (time.sleep(SECONDS), send(signal.SIGKILL)))
"""

READ = """
import json, sys
sys.modules["tensorflow"] = None
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = {}
for split in ("train", "validation"):
    events = EventAccumulator(sys.argv[1] + "/" + split, size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        found[split + "_" + tag] = [(event.step, event.value) for event in events.Scalars(tag)]
print(json.dumps(found))
"""


def read_events(folder, cwd):
    """Return TensorBoard's scalars: lists of (step, value) by the column names of the history."""
    found = json.loads(run_python(READ, folder, cwd=cwd).last_line)
    for name in ("seconds", "samples_per_second"):
        found[name] = found.pop(f"train_{name}")
    return {name: [tuple(pair) for pair in pairs] for name, pairs in found.items()}


def read_history(folder, framework):
    """Return the same of history.csv."""
    with open(folder / "output" / framework / "data/history.csv") as file:
        rows = list(csv.DictReader(file))
    columns = {}
    for name in rows[0].keys() - {"epoch"}:
        columns[name] = [(int(row["epoch"]), pytest.approx(float(row[name]), rel=1e-6)) for row in rows]
    return columns


def test_event_files_have_each_epoch_once_after_a_kill_between_log_and_save(tmp_path):
    flags = ["--epochs", 6, "--tensorboard"]
    result = run_with(KILL.replace("SECONDS", "3"), "pytorch", *flags, cwd=tmp_path, code=-9)
    assert result.epochs == [1, 2, 3, 4]
    folder = tmp_path / "output/pytorch/tensorboard"
    assert len(read_events(folder, tmp_path)["train_loss"]) == 4
    shutil.copytree(folder, tmp_path / "s3")
    result = run("pytorch", *flags, cwd=tmp_path)
    assert result.epochs == [4, 5, 6]
    expected = read_history(tmp_path, "pytorch")
    assert read_events(folder, tmp_path) == expected
    assert len(list(folder.glob("*/*"))) == 2
    shutil.copytree(folder, tmp_path / "s3", dirs_exist_ok=True)  # keeps the earlier files
    assert len(list((tmp_path / "s3").glob("*/*"))) == 4
    assert read_events(tmp_path / "s3", tmp_path) == expected


def test_rounds_of_milliseconds_are_all_in_the_event_files(tmp_path):
    result = run("xgboost", "--num-round", 300, "--tensorboard", cwd=tmp_path)
    assert "tensorboard --logdir output/xgboost/tensorboard\n" in result.output
    assert read_events(tmp_path / "output/xgboost/tensorboard", tmp_path) == read_history(tmp_path, "xgboost")


def test_on_sagemaker_event_files_are_in_the_expected_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SM_MODEL_DIR", raising=False)
    args = SimpleNamespace(output=Path("runs/1"))
    assert tracking.event_folder(args) == Path("runs/1/tensorboard")
    monkeypatch.setenv("SM_MODEL_DIR", "/opt/ml/model")
    assert tracking.event_folder(args) == Path("/opt/ml/output/tensorboard")


def test_a_missing_tensorboard_is_one_line_before_the_training(tmp_path):
    event = 'sys.modules["tensorboardX"] = None'
    result = run_with(event, "xgboost", "--tensorboard", cwd=tmp_path, code=1)
    assert "pip install tensorboardX" in result.error_line
    assert result.epochs == []


def test_a_process_that_hangs_delays_no_row_and_no_exit(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    args = SimpleNamespace(tensorboard=False, checkpoint_path=tmp_path, model_dir=tmp_path)
    [tracker] = tracking.start(args, [])
    tracker._process.send_signal(signal.SIGSTOP)
    for epoch in range(1, 5001):  # the pipe has room for 600
        tracker.add({"epoch": epoch, "train_loss": 1 / epoch, "validation_loss": 0.5, "seconds": 0.1})
    tracker.close("FINISHED", 0.1)
    assert tracker._process.wait() == -signal.SIGKILL


def test_a_missing_mlflow_is_one_line_and_the_training_continues(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "mlflow.py").write_text("raise ImportError('there is none')")
    env = environment(MLFLOW_TRACKING_URI="http://127.0.0.1:1", PYTHONPATH=str(blocked))
    result = run("xgboost", "--num-round", 3, cwd=tmp_path, env=env)
    assert result.output.count("MLflow: ") == 1
    assert "pip install mlflow" in result.output


# A real MLflow server ---------------------------------------------------------------------------------------

RUNS = """
import json, mlflow
client = mlflow.MlflowClient()
found = []
for run in client.search_runs(["0"]):
    rows = {}
    for key in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            rows.setdefault(key, []).append((metric.step, metric.value))
    artifacts = [item.path for item in client.list_artifacts(run.info.run_id, "model")]
    facts = {"id": run.info.run_id, "status": run.info.status, "params": run.data.params}
    found.append({**facts, "rows": rows, "artifacts": artifacts})
print(json.dumps(found))
"""


class Server:
    """An MLflow server on the loopback address."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.env = environment(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{self.port}")

    def __enter__(self):
        store = [f"--backend-store-uri=sqlite:///{self.folder}/runs.db"]
        store.append(f"--artifacts-destination={self.folder}/artifacts")
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command = [str(MLFLOW / "mlflow"), "server", *address, *store]
        output = open(self.folder / "server.log", "w")
        options = {"stdout": output, "stderr": output, "start_new_session": True}
        self.process = start_command(command, self.folder, self.env, **options)
        return self

    def __exit__(self, *error):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def runs(self):
        """Return all runs on the server, newest first."""
        for _ in range(120):
            process = start_command([str(MLFLOW / "python"), "-c", RUNS], self.folder, self.env)
            output, _ = process.communicate()
            if process.returncode == 0:
                return json.loads(output.splitlines()[-1])
            time.sleep(1)
        raise AssertionError((self.folder / "server.log").read_text())


@pytest.fixture
def python_with_mlflow(monkeypatch):
    """Let the scripts run in the environment with MLflow."""
    monkeypatch.setattr(sys, "executable", str(MLFLOW / "python"))


@pytest.mark.integration
@pytest.mark.usefixtures("python_with_mlflow")
def test_mlflow_has_one_run_over_all_restarts(tmp_path):
    with Server(tmp_path) as server:
        assert server.runs() == []
        flags = ["--epochs", 6]
        event = KILL.replace("SECONDS", "30")
        result = run_with(event, "pytorch", *flags, cwd=tmp_path, code=-9, env=server.env)
        assert result.epochs == [1, 2, 3, 4]
        time.sleep(5)
        [found] = server.runs()
        assert [step for step, _ in found["rows"]["train_loss"]] == [1, 2, 3, 4]
        assert found["status"] == "KILLED"
        run("pytorch", *flags, cwd=tmp_path, env=server.env)
        [again] = server.runs()
        assert again["id"] == found["id"]
        assert again["status"] == "FINISHED"
        assert again["params"]["epochs"] == "6"
        assert "model/model.pth" in again["artifacts"]
        expected = read_history(tmp_path, "pytorch")
        for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
            assert sorted(map(tuple, again["rows"][name])) == expected[name]


@pytest.mark.integration
@pytest.mark.usefixtures("python_with_mlflow")
def test_a_server_that_is_down_delays_no_training_and_the_next_start_completes_the_run(tmp_path):
    server = Server(tmp_path)
    flags = ["--num-round", 2000, "--max-depth", 2]
    result = run("xgboost", *flags, cwd=tmp_path, env=server.env)
    assert "the training continues" in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("MLflow: ")]) == 2
    assert result.epochs == list(range(1, 2001))
    with server:
        assert server.runs() == []
        run("xgboost", *flags, cwd=tmp_path, env=server.env)
        [found] = server.runs()
        assert [step for step, _ in found["rows"]["validation_loss"]] == list(range(1, 2001))
        assert "model/xgboost-model" in found["artifacts"]
