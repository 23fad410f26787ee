"""The simulated SageMaker: starts a training job in a container, interrupts it, and starts it again.

Everything that happens becomes an event in a list, a dictionary with `time` (seconds since 1970), `attempt`
(from 1) and `event`: started, log (a line), stalled, uploaded, deleted (a file), sigterm, killed, ended (an
exit code).
"""

import contextlib
import io
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import boto3
from botocore.exceptions import ClientError

from common.errors import UserError
from common.s3 import split_uri
from spot import container
from spot.report import EPOCH

ROOT = Path(__file__).resolve().parents[1]
UPLOAD = "upload"


class Epochs(NamedTuple):
    """An interruption after a number of epochs of an attempt, however long they take."""

    count: int


@contextlib.contextmanager
def s3_server(endpoint_url=None):
    """Yield a client of an S3 server, and point the environment to that server inside the block.

    The server is a given one, with the usual AWS credentials, or a new one on the loopback address.
    """
    server, variables = None, {}
    if endpoint_url is None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would log each request
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        endpoint_url = f"http://{host}:{port}"
        # boto3 needs some credentials.
        variables.update(AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any")  # noqa: S106
        variables.update(AWS_DEFAULT_REGION="us-east-1", NO_PROXY=host, no_proxy=host)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL"):  # the last is the toolkit's
        variables[name] = endpoint_url
    variables["AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"] = "false"
    try:
        with mock.patch.dict(os.environ, variables):
            yield boto3.client("s3")
    finally:
        if server:
            server.stop()


def make_request(
    s3, name, script, hyperparameters, channels, checkpoint_uri, entry_point=None, environment=None, count=1
):
    """Upload the folder of `script` as SageMaker's SDK does, and return a CreateTrainingJob request for it.

    Args:
        hyperparameters: a dictionary of strings.
        channels: local folders by channel name.
        checkpoint_uri: where the checkpoints go in S3.
        entry_point: the command of process 1; default: `train`, as in SageMaker's own images.
        environment: variables for the container.
        count: the number of instances.
    """
    bucket, _ = split_uri(checkpoint_uri)
    with contextlib.suppress(ClientError):  # it usually exists
        s3.create_bucket(Bucket=bucket)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", dereference=True) as tar:
        for path in sorted(script.parent.iterdir()):
            if path.name not in ("__pycache__", "output"):  # written by the script and this simulator
                tar.add(path, path.name)
    key = f"{name}-source/sourcedir.tar.gz"
    s3.put_object(Bucket=bucket, Key=key, Body=archive.getvalue())
    program = {"sagemaker_program": script.name, "sagemaker_submit_directory": f"s3://{bucket}/{key}"}
    program["sagemaker_container_log_level"] = 40  # of the toolkit, which would print its whole environment
    algorithm = {"TrainingInputMode": "File"}
    if entry_point:
        algorithm["ContainerEntrypoint"] = entry_point
    return {
        "TrainingJobName": name,
        "AlgorithmSpecification": algorithm,
        "HyperParameters": {key: json.dumps(value) for key, value in {**program, **hyperparameters}.items()},
        "InputDataConfig": [
            {"ChannelName": channel, "DataSource": {"S3DataSource": {"S3Uri": f"file://{folder.resolve()}"}}}
            for channel, folder in channels.items()
        ],
        "CheckpointConfig": {"S3Uri": checkpoint_uri},
        "ResourceConfig": {"InstanceCount": count},
        "Environment": environment or {},
    }


class Job:
    """A training job with Managed Spot Training.

    Args:
        s3: a boto3 client.
        request: a CreateTrainingJob request.
        folder: for the containers' base folders and logs.
        interruptions: for each attempt the seconds after which it is interrupted, or Epochs, or UPLOAD: in
            the middle of its second upload; later attempts are not interrupted.
        grace: seconds from SIGTERM to SIGKILL.
        sync: flags of `spot.sync`.
        watch: called with each event.
    """

    def __init__(
        self,
        s3,
        request,
        folder,
        interruptions=(),
        grace=120,
        sync=("--rate=50e6",),
        watch=lambda event: None,
    ):
        self.s3, self.request, self.folder, self.interruptions = s3, request, folder, interruptions
        self.grace, self.sync, self.watch = grace, sync, watch
        self.events = []
        self.num_epochs = 0  # of this attempt

    def run(self):
        """Run attempts until one completes; return its base folder.

        Raises UserError, with the job's FailureReason, when the training fails.
        """
        for attempt, interruption in enumerate(
            itertools.chain(self.interruptions, itertools.repeat(None)), 1
        ):
            folder = self.folder / f"attempt-{attempt}"
            code = self._attempt(attempt, folder, interruption)
            if code == 0:
                return folder
            if code is not None:
                reason = container.failure(folder) or f"exit code {code}"
                raise UserError(f"the training job failed: {reason.strip()}; its log is {folder / 'log.txt'}")

    def _attempt(self, attempt, folder, interruption):
        """Return the first nonzero exit code of a process 1, otherwise 0; None after an interruption."""
        self.num_epochs = 0

        def emit(event, **more):
            self.events.append({"time": time.time(), "attempt": attempt, "event": event, **more})
            self.watch(self.events[-1])

        with contextlib.ExitStack() as exits:
            folders, copies, boxes = {}, [], []
            for host in container.hosts_of(self.request):
                # Only the first instance writes to the log and saves checkpoints; all of them receive these.
                folders[host] = folder.with_name(f"{folder.name}-{host}") if folders else folder
                container.lay_out(folders[host], self.request, self.s3, host)
            for place in folders.values():
                stall = interruption == UPLOAD and place == folder
                sync = _SyncProcess(place / "checkpoints", self.request, self.sync, stall, emit)
                exits.callback(sync.kill)
                copies.append(sync)
            for sync in copies:
                sync.ready.wait()
            emit("started")
            for place in folders.values():
                box = self._start(place, exits, emit if place == folder else None)
                exits.callback(box.wait)
                exits.callback(box.kill)
                boxes.append(box)
            return self._watch(boxes, copies, interruption, emit)

    def _start(self, folder, exits, emit):
        log = exits.enter_context(open(folder / "log.txt", "w"))  # noqa: SIM115

        def tell_line(line):
            if emit:
                emit("log", line=line)
                self.num_epochs += bool(EPOCH.match(line))
            log.write(line + "\n")

        return container.Container(folder, self.request, tell_line)

    def _watch(self, boxes, copies, interruption, emit):
        interrupt_at = (
            time.monotonic() + interruption if isinstance(interruption, (int, float)) else float("inf")
        )
        epochs = interruption.count if isinstance(interruption, Epochs) else float("inf")
        stalled = copies[0].stalled
        while not (stalled.is_set() or self.num_epochs >= epochs or time.monotonic() >= interrupt_at):
            for sync in copies:
                sync.check()
            codes = [box.wait(0.02) for box in boxes]
            if None not in codes or any(codes):  # workers fail together
                emit("ended", code=_first_failure(codes))
                for sync in copies:
                    sync.finish()
                return _first_failure(codes)
        emit("sigterm")
        for box in boxes:
            box.terminate()
        deadline = time.monotonic() + self.grace
        codes = [box.wait(max(0, deadline - time.monotonic())) for box in boxes]
        if None not in codes:
            emit("ended", code=_first_failure(codes))
            for sync in copies:
                sync.finish(deadline - time.monotonic())
            return None if any(codes) else 0
        emit("killed")
        for process in [*copies, *boxes]:
            process.kill()
        return None


def _first_failure(codes):
    return next((code for code in codes if code), 0)


class _SyncProcess:
    """Runs `spot.sync` beside a container."""

    def __init__(self, folder, request, flags, stall, emit):
        command = [sys.executable, "-m", "spot.sync", str(folder), request["CheckpointConfig"]["S3Uri"]]
        command += [*flags, f"--stall-upload={2 if stall else 0}"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.ready, self.stalled = threading.Event(), threading.Event()
        self.reader = threading.Thread(target=self._read, args=(emit,), daemon=True)
        self.reader.start()

    def _read(self, emit):
        for line in self.process.stdout:
            happened = json.loads(line)
            if happened["event"] == "ready":
                self.ready.set()
                continue
            emit(happened["event"], name=happened["name"])
            if happened["event"] == "stalled":
                self.stalled.set()
        self.ready.set()  # if it has failed, `check` raises

    def check(self):
        """Raise UserError if it has failed: S3 would receive nothing more."""
        if self.process.poll() is not None:
            raise UserError("copying to S3 has failed, for the reason above")

    def finish(self, seconds=None):
        """Copy the rest, for at most this number of seconds."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(None if seconds is None else max(seconds, 0))
        self.kill()

    def kill(self):
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
