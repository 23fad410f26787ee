"""The metrics of each epoch in TensorBoard (`--tensorboard`) and in MLflow (`MLFLOW_TRACKING_URI`).

Each has a process of its own, which reads the rows of the history from a pipe. So a server that is slow or
down delays nothing, and no library draws from the random numbers of the training. Each start sends the whole
history of the checkpoint: an interruption leaves no gap, and an epoch that is repeated appears once.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import errors
from common.report import log

NAMES = {"write_events": "TensorBoard", "write_mlflow": "MLflow"}
RUN_ID = "mlflow-run-id"  # a file in the folder of checkpoints
SUFFIX = ".history"  # of the names of our event files
LAST_SECONDS = 60  # for the last rows and the model, when the training is over
PAUSE_SECONDS = 1  # between two requests to MLflow, which collects the rows of short epochs
RETRY_SECONDS = 30  # after a request that has failed
MAX_ROWS = 50  # in a request, which has room for 1,000 numbers
MAX_LETTERS = 500  # of the value of a parameter

_PROCESS = """
import sys
sys.path[:] = {}
from common import tracking
tracking.{}(tracking.Inbox())
"""


def check(args: argparse.Namespace) -> None:
    """Exit with one line if `--tensorboard` is set but TensorBoard is not installed."""
    if args.tensorboard:
        with errors.importing("TensorBoard for --tensorboard", "Install it with: pip install tensorboard"):
            import tensorboard  # noqa: F401 - it loads nothing else yet


def start(args: argparse.Namespace, history: list[dict]) -> Tracker | None:
    """Return a Tracker that has been sent the history so far, or None if there is nothing to track.

    Args:
        args: the flags.
        history: a dictionary of metrics for each epoch.
    """
    facts: dict = {"checkpoints": str(args.checkpoint_path), "model": str(args.model_dir)}
    functions = []
    if args.tensorboard:
        facts["events"] = str(_event_folder(args))
        functions.append("write_events")
        log(f"TensorBoard: tensorboard --logdir {facts['events']}")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        facts["params"] = {name: str(value)[:MAX_LETTERS] for name, value in vars(args).items()}
        functions.append("write_mlflow")
    return Tracker(functions, facts, history) if functions else None


def _event_folder(args):
    """Return the folder of event files: that of SageMaker's TensorBoardOutputConfig, or below the output."""
    if "SM_MODEL_DIR" in os.environ:
        return Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"), "output/tensorboard")
    return args.output / "tensorboard"


class Tracker:
    """Sends the rows of the history to the processes that write them, without waiting for these."""

    def __init__(self, functions, facts, history):
        self._writers = [_Writer(function) for function in functions]
        self._send(facts)
        ago = sum(row["seconds"] for row in history)
        for row in history:
            ago -= row["seconds"]
            self.add(row, ago)

    def add(self, row, ago=0):
        """Send a row of the history, of an epoch that has ended this many seconds ago."""
        self._send({**row, "time": time.time() - ago})

    def close(self, status, signals=None):
        """Send how the training has ended.

        Args:
            status: MLflow's word for it.
            signals: wait until all is written or `signals` has received one; None: do not wait.
        """
        self._send({"status": status})
        deadline = time.monotonic() + LAST_SECONDS
        while signals and not signals.received and any([writer.is_busy() for writer in self._writers]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for writer in self._writers:
            if signals and writer.is_busy():
                log(f"{writer.name}: not finished after {LAST_SECONDS} seconds, left out")
                writer.process.kill()
            writer.process.stdin.close()

    def _send(self, content):
        line = json.dumps(content).encode() + b"\n"
        for writer in self._writers:
            writer.send(line)


class _Writer:
    """The process that calls a function of this module with the lines that are sent to it."""

    def __init__(self, function):
        self.name = NAMES[function]
        paths = [str(Path(__file__).parents[1]), *sys.path]
        command = [sys.executable, "-c", _PROCESS.format(paths, function)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # In a session of its own: Ctrl-C must not end it before the last row.
        self.process = subprocess.Popen(command, bufsize=0, start_new_session=True, **pipes)  # noqa: S603
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._unsent = bytearray()

    def send(self, line=b""):
        """Write what the pipe has room for, keep the rest, and log what the process has to say."""
        self._unsent += line
        with contextlib.suppress(OSError):  # the pipe is full, or the process has ended
            while self._unsent:
                del self._unsent[: os.write(self.process.stdin.fileno(), self._unsent)]
        for message in (self.process.stdout.read() or b"").decode(errors="replace").splitlines():
            log(f"{self.name}: {message}")

    def is_busy(self):
        """Return whether the process is running."""
        is_running = self.process.poll() is None
        self.send()
        return is_running


# In the process of a writer ---------------------------------------------------------------------------------


class Inbox:
    """What the training has sent.

    Attributes:
        facts: see `start`.
        status: how the training has ended; None before.
    """

    def __init__(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the training decides when to end
        self.messages = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # libraries print too
        self._buffer = b""
        self.status = None
        self._rows = []
        while not self._rows and not self.status:
            self._read()
        self.facts = self._rows.pop(0) if self._rows else {}

    def take(self, seconds=None):
        """Return the rows that have arrived, after waiting this long for the first one; None: as needed."""
        if not self._rows and not self.status and select.select([0], [], [], seconds)[0]:
            self._read()
        rows, self._rows = self._rows, []
        return rows

    def _read(self):
        content = os.read(0, 2**20)
        *lines, self._buffer = (self._buffer + content).split(b"\n")
        self._rows += map(json.loads, lines)
        if not content:  # the training was killed
            self.status = "KILLED"
        elif self._rows and "status" in self._rows[-1]:
            self.status = self._rows.pop()["status"]

    def say(self, message):
        """Let the training log a line."""
        with contextlib.suppress(OSError):
            print(errors.in_one_line(message)[:300], file=self.messages)


def write_events(inbox: Inbox) -> None:
    """Write TensorBoard's event files, one for the training and one for the validation metrics."""
    try:
        _write_events(inbox, Path(inbox.facts["events"]))
    except Exception as error:
        inbox.say(f"{type(error).__name__}: {errors.first_line(error)}; the training continues without it")


def _write_events(inbox, folder):
    sys.modules["tensorflow"] = None  # TensorBoard would load it, which takes seconds, and works without
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    old = [*folder.glob(f"*/*{SUFFIX}")]
    writers = {}
    for split in ("train", "validation"):
        writers[split] = EventFileWriter(str(folder / split), filename_suffix=SUFFIX)
        # It makes TensorBoard forget the earlier files, also those that SageMaker has copied to S3.
        begin = SessionLog(status=SessionLog.START)
        writers[split].add_event(Event(wall_time=time.time(), step=0, session_log=begin))
    while inbox.status is None or old:
        for row in inbox.take():
            values = {"train": [], "validation": []}
            for name, value in row.items():
                split, _, metric = name.partition("_")
                if split not in values:
                    split, metric = "train", name
                if name not in ("epoch", "time"):
                    values[split].append(Summary.Value(tag=metric, simple_value=value))
            for split, writer in writers.items():
                summary = Summary(value=values[split])
                writer.add_event(Event(wall_time=row["time"], step=row["epoch"], summary=summary))
        for writer in writers.values():
            writer.flush()
        while old:
            old.pop().unlink(missing_ok=True)
    for writer in writers.values():
        writer.close()


def write_mlflow(inbox: Inbox) -> None:
    """Write parameters, metrics and the model to an MLflow server, into one run over all restarts."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the loop below tries again
    try:
        import mlflow
    except ImportError as error:
        inbox.say(f"MLFLOW_TRACKING_URI is set, but {error}; install it with: pip install mlflow")
        return
    with open(Path(inbox.facts["checkpoints"], RUN_ID), "a+") as file:
        # The process of a training that was killed may still be sending its last rows.
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_EX)
        _write_mlflow(inbox, _MlflowRun(mlflow, inbox.facts, file))
    os._exit(0)  # MLflow's own handlers at the exit would ask the server again


def _write_mlflow(inbox, run):
    rows = []
    has_failed = False
    next_try = 0.0
    while True:
        rows += inbox.take(PAUSE_SECONDS)
        if time.monotonic() < next_try and not inbox.status:
            continue
        if has_failed and inbox.status:
            inbox.say("the run on the server is not complete: run the same command again to complete it")
            return
        num_sent = run.num_sent
        try:
            run.send(rows)
            rows = []
            has_failed = False
            next_try = time.monotonic() + PAUSE_SECONDS
            if inbox.status:
                run.finish(inbox.status)
                return
        except Exception as error:  # each way to a server has its own
            if run.num_sent > num_sent:  # the server is slow
                continue
            if not has_failed:
                reason = errors.first_line(error)[:150]
                inbox.say(f"{reason}; the training continues, and the rows are sent later")
            has_failed = True
            next_try = time.monotonic() + RETRY_SECONDS


class _MlflowRun:
    """A run on the server, found again by its id in the file.

    Args:
        mlflow: the package.
        facts: see `start`.
        file: open for reading and writing.

    Attributes:
        num_sent: the number of rows that the server has taken.
    """

    def __init__(self, mlflow, facts, file):
        self._mlflow = mlflow
        self._client = mlflow.MlflowClient()
        self._facts = facts
        self._file = file
        self._id = None
        self._epochs = set()  # that the server has
        self.num_sent = 0  # rows

    def send(self, rows):
        """Send the rows that the server does not have."""
        if self._id is None:
            run_id = self._find() or self._begin()
            self._epochs = {metric.step for metric in self._client.get_metric_history(run_id, "seconds")}
            self._id = run_id
        rows = [row for row in rows if row["epoch"] not in self._epochs]
        run_id, self._id = self._id, None  # after a failure, the server says what it has
        for first in range(0, len(rows), MAX_ROWS):
            part = rows[first : first + MAX_ROWS]
            metrics = [metric for row in part for metric in self._to_metrics(row)]
            self._client.log_batch(run_id, metrics)
            self._epochs.update(row["epoch"] for row in part)
            self.num_sent += len(part)
        self._id = run_id

    def _to_metrics(self, row):
        milliseconds = int(1000 * row["time"])
        for name, value in row.items():
            if name not in ("epoch", "time"):
                key = re.sub(r"[^\w\-. /]", "-", name)  # such as ndcg@10
                yield self._mlflow.entities.Metric(key, value, milliseconds, row["epoch"])

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

    def finish(self, status):
        """Send the model of a training that has reached its end, and the status."""
        if status == "FINISHED":
            self._client.log_artifacts(self._id, self._facts["model"], "model")
        self._client.set_terminated(self._id, status)
