"""The metrics of each epoch in TensorBoard (`--tensorboard`) and in MLflow (`MLFLOW_TRACKING_URI`).

Both follow the history: each start sends the whole history of the checkpoint, so that an interruption leaves
no gap, and an epoch that is repeated appears once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import errors
from common.report import log

SUFFIX = ".history"  # of the names of these event files
RUN_ID = "mlflow-run-id"  # a file in the folder of checkpoints
LAST_SECONDS = 30  # for the last rows and the model, when the training is over
SOON = 5  # seconds for the last rows, when the training is interrupted
MAX_ROWS = 50  # in a request to MLflow, which has room for 1,000 numbers
MAX_LETTERS = 500  # of the value of a parameter in MLflow


def start(args: Namespace, history: list[dict]) -> list:
    """Return the trackers of a training, which have received the history so far.

    A tracker has `add(row)` and `close(status, seconds)`: the status of the run in MLflow's terms, and the
    maximum time to wait until everything is written.
    """
    trackers: list = []
    if args.tensorboard:
        trackers.append(EventFiles(event_folder(args)))
    if os.environ.get("MLFLOW_TRACKING_URI"):
        trackers.append(MlflowProcess(args))
    for tracker in trackers:
        for row in history:
            tracker.add(row)
    return trackers


def event_folder(args: Namespace) -> Path:
    """Return the folder of event files: that of SageMaker's TensorBoardOutputConfig, or in `--output`."""
    if "SM_MODEL_DIR" in os.environ:
        return Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"), "output/tensorboard")
    return args.output / "tensorboard"


class EventFiles:
    """TensorBoard's event files, which a thread of tensorboardX writes."""

    def __init__(self, folder: Path) -> None:
        with errors.importing("tensorboardX for --tensorboard", "Install it with: pip install tensorboardX"):
            from tensorboardX import SummaryWriter

        log(f"TensorBoard: tensorboard --logdir {folder}")
        self._writers: dict[str, Any] = {}
        for split in ("train", "validation"):
            for path in (folder / split).glob(f"*{SUFFIX}"):
                path.unlink()
            # TensorBoard drops the steps of earlier files from step 0 on, even of files that are still in S3.
            options: dict[str, Any] = {"purge_step": 0, "filename_suffix": SUFFIX, "flush_secs": 1}
            self._writers[split] = SummaryWriter(str(folder / split), **options)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row of the history."""
        for name, value in row.items():
            split, _, metric = name.partition("_")
            if split not in self._writers:
                split, metric = "train", name
            if name != "epoch":
                self._writers[split].add_scalar(metric, value, row["epoch"])

    def close(self, status: str, seconds: float) -> None:
        """Write the rest."""
        for writer in self._writers.values():
            writer.close()


class MlflowProcess:
    """A separate process that sends the history to an MLflow server, which may be slow or down."""

    def __init__(self, args: Namespace) -> None:
        paths = [str(Path(__file__).parents[1]), *sys.path]
        code = f"import sys; sys.path[:] = {paths!r}; from common import tracking; tracking.send_to_mlflow()"
        command = [sys.executable, "-c", code]
        # In a separate session, Ctrl-C does not end it before the last row.
        options: Any = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self._process = subprocess.Popen(command, **options)  # noqa: S603 - nothing in it is from outside
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        params = {name: str(value)[:MAX_LETTERS] for name, value in vars(args).items()}
        self._put(checkpoints=str(args.checkpoint_path), model=str(args.model_dir), params=params)

    def _put(self, **content):
        self._lines.put(json.dumps(content).encode() + b"\n")

    def _write(self):
        with contextlib.suppress(OSError), self._process.stdin as pipe:  # the process may have ended
            while line := self._lines.get():
                pipe.write(line)
                pipe.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Send a row of the history."""
        self._put(row=row, milliseconds=int(1000 * time.time()))

    def close(self, status: str, seconds: float) -> None:
        """Send the status of the training, and wait until the server has everything."""
        self._put(status=status)
        self._lines.put(b"")
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            log(f"MLflow: not finished after {seconds} seconds; run the same command again to complete it")
            self._process.kill()


# In the separate process ------------------------------------------------------------------------------------


def send_to_mlflow() -> None:
    """Send the lines from standard input to the server, as one run over all restarts."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the training decides when to end
    lines: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(lines,), daemon=True).start()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the next rows are the retry
    try:
        import mlflow
    except ImportError as error:
        errors.say(f"MLflow: MLFLOW_TRACKING_URI is set, but {error}; install it with: pip install mlflow")
        return

    facts = json.loads(lines.get())
    with open(Path(facts["checkpoints"], RUN_ID), "a+") as file:
        with contextlib.suppress(OSError):  # the process of a killed training may be sending its last rows
            fcntl.flock(file, fcntl.LOCK_EX)
        _send(lines, _ServerRun(mlflow, facts, file))
    os._exit(0)  # MLflow's exit handlers would contact the server again


def _receive(lines):
    for line in sys.stdin:
        lines.put(line)
    lines.put("")


def _send(lines, run):
    rows = []
    status = None
    has_failed = False
    is_complete = False
    while status is None:
        for line in _take(lines):
            content = json.loads(line or '{"status": "KILLED"}')
            status = status or content.get("status")
            if "row" in content:
                rows.append(content)
        try:
            is_complete = False
            run.send(rows, status)
            rows = []
            is_complete = True
        except Exception as error:  # each kind of server has its own errors
            if not has_failed:
                reason = errors.first_line(error)[:150]
                errors.say(f"MLflow: {reason}; the training continues, and the rows are sent later")
            has_failed = True
    if not is_complete:
        errors.say("MLflow: the run is not complete; run the same command again to complete it")


def _take(lines):
    """Return all lines that have arrived, at least one."""
    taken = [lines.get()]
    while not lines.empty():
        taken.append(lines.get())
    return taken


class _ServerRun:
    """A run on the server, found again by its id in the file."""

    def __init__(self, mlflow, facts, file):
        self._mlflow = mlflow
        self._client = mlflow.MlflowClient()
        self._facts = facts
        self._file = file
        self._id = None
        self._epochs = set()  # epochs that the server has

    def send(self, rows, status):
        """Send the rows that the server does not have, and at the end the model and the status."""
        if self._id is None:
            run_id = self._find() or self._begin()
            self._epochs = {metric.step for metric in self._client.get_metric_history(run_id, "seconds")}
            self._id = run_id
        rows = [each for each in rows if each["row"]["epoch"] not in self._epochs]
        for first in range(0, len(rows), MAX_ROWS):
            part = rows[first : first + MAX_ROWS]
            self._client.log_batch(self._id, [metric for each in part for metric in self._metrics(each)])
            self._epochs.update(each["row"]["epoch"] for each in part)
        if status == "FINISHED":
            self._client.log_artifacts(self._id, self._facts["model"], "model")
        if status:
            self._client.set_terminated(self._id, status)

    def _metrics(self, content):
        row = content["row"]
        for name in row.keys() - {"epoch"}:
            key = re.sub(r"[^\w\-. /]", "-", name)  # such as ndcg@10
            yield self._mlflow.entities.Metric(key, row[name], content["milliseconds"], row["epoch"])

    def _find(self):
        """Return the id of the run of earlier starts; None if the server has no such run."""
        self._file.seek(0)
        run_id = self._file.read().strip()
        if not run_id:
            return None
        try:
            stage = self._client.get_run(run_id).info.lifecycle_stage
        except self._mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if stage == "deleted":
            return None
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _begin(self):
        run_id = self._mlflow.start_run().info.run_id
        self._file.truncate(0)
        self._file.write(run_id)
        self._file.flush()
        self._mlflow.log_params(self._facts["params"])
        return run_id
