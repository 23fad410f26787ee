"""The training container of a script: the base folder (/opt/ml in SageMaker) and process 1."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from common.s3 import download

ADDRESS = "127.0.0.{}"  # of the instances, counted from 1; all are on this machine
# Run by a shell in a new namespace before it becomes process 1: set the host names.
NAMING = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'


def hosts_of(request):
    """Return the names of the instances: algo-1, algo-2, ..., or addresses if namespaces are forbidden."""
    name = "algo-{}" if namespace() else ADDRESS
    count = request.get("ResourceConfig", {}).get("InstanceCount", 1)
    return [name.format(number) for number in range(1, count + 1)]


def lay_out(folder, request, s3, host=None):
    """Make the base folder of a new container for a CreateTrainingJob request, as the service does."""
    for name in ("model", "output/data", "checkpoints", "input/config", "input/data", "code"):
        (folder / name).mkdir(parents=True)
    channels = request.get("InputDataConfig", [])
    hosts = hosts_of(request)
    resources = {"current_host": host or hosts[0], "hosts": hosts, "network_interface_name": "lo"}
    documents = {
        "hyperparameters.json": request["HyperParameters"],
        "inputdataconfig.json": {
            channel["ChannelName"]: {"TrainingInputMode": "File"} for channel in channels
        },
        "resourceconfig.json": resources,
    }
    for name, document in documents.items():
        (folder / "input/config" / name).write_text(json.dumps(document))
    for channel in channels:
        uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
        path = folder / "input/data" / channel["ChannelName"]
        if uri.startswith("file://"):
            path.symlink_to(uri.removeprefix("file://"), target_is_directory=True)
        else:
            path.mkdir()
            download(s3, uri, path)
    names = [f"{ADDRESS.format(number)} algo-{number}" for number in range(1, len(hosts) + 1)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
    download(s3, request["CheckpointConfig"]["S3Uri"], folder / "checkpoints")


@functools.cache
def namespace():
    """Return the command that runs another command as process 1 of a container, or [] if that is forbidden.

    It creates namespaces for processes, mounts and names. Its two arguments are a file that replaces
    /etc/hosts, and the host name.
    """
    as_root = ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child"]
    as_user = ["unshare", "--user", "--map-root-user", *as_root[1:]]
    for command in (as_root, as_user):
        with contextlib.suppress(OSError):
            whole = [*command, "sh", "-c", NAMING]
            if subprocess.run([*whole, "/dev/null", "algo-1", "true"], capture_output=True).returncode == 0:
                return whole
    return []


class Container:
    """A running container: process 1 and its descendants.

    Args:
        folder: its base folder.
        request: the CreateTrainingJob request.
        on_line: called with each line of the log.
    """

    def __init__(self, folder, request, on_line):
        command = request["AlgorithmSpecification"].get("ContainerEntrypoint", ["train"])
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("SM_", "SAGEMAKER_"))
        }
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the toolkit's `train` is
        job = {"SAGEMAKER_BASE_DIR": str(folder), "TRAINING_JOB_NAME": request["TrainingJobName"]}
        if namespace():
            resources = json.loads((folder / "input/config/resourceconfig.json").read_text())
            command = [*namespace(), str(folder / "hosts"), resources["current_host"], *command]
        self.process = subprocess.Popen(
            command,
            env={**kept, **job, "PATH": path, **request.get("Environment", {})},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self.reader.start()

    def _read(self, on_line):
        for line in self.process.stdout:
            on_line(line.rstrip("\n"))

    def terminate(self):
        """Send SIGTERM to process 1, as the service does."""
        for _ in range(100):  # `unshare` takes a moment to start it
            if self._signal_process_1(signal.SIGTERM) or self.process.poll() is not None:
                break
            time.sleep(0.01)

    def kill(self):
        """Kill all processes of the container at once, as if the machine was gone."""
        self._signal_process_1(signal.SIGKILL)  # the kernel ends the rest of the namespace
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self, seconds=None):
        """Return the exit code of process 1 after killing all others; None if it is still running."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self.kill()
        self.reader.join()
        return code

    def _signal_process_1(self, number):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process = psutil.Process(self.process.pid)
            targets = process.children() if namespace() else [process]
            for target in targets:
                target.send_signal(number)
            return bool(targets)
        return False


def failure(folder):
    """Return what the service shows as FailureReason: the first 1,024 characters of the file `failure`."""
    path = folder / "output/failure"
    return path.read_text(errors="replace")[:1024] if path.exists() else ""
