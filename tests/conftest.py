"""Running the scripts as their users do: the real file, in a process of its own, in an empty folder."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FRAMEWORKS = ("pytorch", "tensorflow", "mxnet", "xgboost")
IMAGE_FRAMEWORKS = FRAMEWORKS[:3]
CHECKPOINTS = {
    "pytorch": "checkpoint-{}.pt",
    "tensorflow": "checkpoint-{}.keras",
    "mxnet": "checkpoint-{}.params",
    "xgboost": "xgboost-checkpoint.{}",
}


def checkpoint_name(framework, epoch):
    """Return the name of the checkpoint after `epoch` finished epochs."""
    return CHECKPOINTS[framework].format(epoch - 1 if framework == "xgboost" else epoch)


def environment(**variables):
    """Return this process's environment without what SageMaker might have set, and with `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SM_", "SAGEMAKER_"))}
    return {**kept, **variables}


class Result:
    """A finished run: exit code, both outputs, and the epochs that its log tells of."""

    def __init__(self, process, output, errors):
        self.code, self.output, self.errors = process.returncode, output, errors

    @property
    def epochs(self):
        return [int(number) for number in re.findall(r"^epoch=(\d+) ", self.output, re.MULTILINE)]

    def metric(self, name):
        """Return the last logged value of a metric."""
        return float(re.findall(rf" {name}=(\S+)", self.output)[-1])

    @property
    def error_line(self):
        """Return the one line on standard error that is an error of ours; fail where there is a traceback."""
        assert "Traceback" not in self.errors, self.errors
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.errors
        return lines[0]


def start(framework, *flags, cwd, env=None, **options):
    """Start a framework's script in the folder `cwd` and return the process."""
    command = [sys.executable, str(ROOT / framework / "train.py"), *map(str, flags)]
    return subprocess.Popen(
        command, cwd=cwd, env=env or environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def run(framework, *flags, cwd, env=None, code=0, **options):
    """Run a framework's script to its end and return a Result; fail where its exit code is not `code`."""
    with start(framework, *flags, cwd=cwd, env=env, **options) as process:
        result = Result(process, *process.communicate(timeout=300))
    assert result.code == code, f"exit code {result.code}\n{result.output}\n{result.errors}"
    return result


# Where requirements.txt asks for MXNet: elsewhere it does not exist.
HAS_MXNET = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 13)


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    if request.param == "mxnet" and not HAS_MXNET:
        pytest.skip("MXNet 1.9.1 exists for Linux on x86-64 and Python up to 3.12")
    return request.param


@pytest.fixture(params=IMAGE_FRAMEWORKS)
def image_framework(request):
    if request.param == "mxnet" and not HAS_MXNET:
        pytest.skip("MXNet 1.9.1 exists for Linux on x86-64 and Python up to 3.12")
    return request.param


@pytest.fixture(scope="session")
def digits():
    """300 real handwritten digits as uint8 images (300, 8, 8), and their labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images[:300] * 15).astype(np.uint8), bunch.target[:300]
