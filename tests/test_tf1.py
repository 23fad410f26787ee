"""tensorflow/train_tf1.py with TensorFlow 1.15 on Python 3.7, which `make integration` installs (589 MB)."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers import ROOT, environment, finish, once, start_command

pytestmark = pytest.mark.integration

SCRIPT = ROOT / "tensorflow/train_tf1.py"
PYTHONS = [*Path.home().glob(".pyenv/versions/3.7.*/bin/python"), shutil.which("python3.7")]


@pytest.fixture(scope="module")
def python():
    """Return the interpreter of an environment with TensorFlow 1.15, made once."""

    def install(folder):
        subprocess.run([PYTHONS[0], "-m", "venv", folder], check=True)
        install = (folder / "bin/python", "-m", "pip", "install", "--quiet", "--requirement")
        subprocess.run([*install, ROOT / "tests/requirements-tf1.txt"], check=True)

    if not PYTHONS[0]:
        pytest.skip("needs Python 3.7, as TensorFlow 1.15 does: install it with pyenv, or as python3.7")
    return once(ROOT / ".venv-tf1", install) / "bin/python"


class Script:
    """The script in one folder, run with one thread of TensorFlow."""

    def __init__(self, python, folder):
        self.python = python
        self.folder = folder
        self.checkpoints = folder / "output/tensorflow-tf1/checkpoints"

    def start(self, epochs, *flags):
        """Start it."""
        command = [self.python, SCRIPT, "--epochs", epochs, *flags]
        return start_command(list(map(str, command)), self.folder, environment())

    def run(self, epochs, *flags, code=0):
        """Run it to its end; return the Result."""
        return finish(self.start(epochs, *flags), code)

    def variables(self):
        """Return the bits of the trained model."""
        return (
            self.folder / "output/tensorflow-tf1/model/1/variables/variables.data-00000-of-00001"
        ).read_bytes()

    def files(self):
        """Return the sorted names of the checkpoints."""
        return sorted(os.listdir(self.checkpoints))


def names(*epochs):
    return sorted(f"checkpoint-{epoch}.h5" for epoch in epochs)


@pytest.fixture
def script(python, tmp_path):
    return Script(python, tmp_path)


@pytest.fixture(scope="module")
def whole(python, tmp_path_factory):
    """A training of ten epochs that nothing interrupted."""
    script = Script(python, tmp_path_factory.mktemp("whole"))
    result = script.run(10)
    assert result.epochs == list(range(1, 11))
    assert result.metric("validation_accuracy") > 0.95
    return script


def test_five_epochs_and_then_ten_are_ten(script, whole):
    assert script.run(5).epochs == [1, 2, 3, 4, 5]
    result = script.run(10)
    assert "Starting training from epoch: 6\n" in result.output
    assert result.epochs == [6, 7, 8, 9, 10]
    assert script.files() == names(*range(1, 11))
    assert script.variables() == whole.variables()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_after_a_signal_at_most_the_running_epoch_is_lost(script, whole, number, code):
    process = script.start(10)
    for line in process.stdout:
        if line.startswith("epoch=3 "):
            break
    time.sleep(0.1)  # in the middle of an epoch or of a checkpoint
    process.send_signal(number)
    finish(process, code)
    assert {*names(1, 2, 3)} <= {*script.files()}
    result = script.run(10)
    assert result.epochs[0] in (4, 5)
    assert script.files() == names(*range(1, 11))
    assert script.variables() == whole.variables()


def damage(path, length):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:length])


@pytest.mark.parametrize("length", [None, 1000, 0], ids=["a bit", "cut off", "empty"])
def test_a_damaged_newest_checkpoint_is_passed_over(script, whole, length):
    shutil.copytree(whole.checkpoints, script.checkpoints)
    for epoch in (6, 7, 8, 9, 10):
        (script.checkpoints / f"checkpoint-{epoch}.h5").unlink()
    damage(script.checkpoints / "checkpoint-5.h5", length)
    result = script.run(10)
    assert "Damaged, not used: " in result.output
    assert "Starting training from epoch: 5\n" in result.output
    assert script.variables() == whole.variables()


def test_own_images_in_sagemakers_folders(python, script, tmp_path):
    code = """
import numpy as np, os
x = np.random.RandomState(0).randint(0, 256, (200, 16, 16, 3)).astype("uint8")
for name in ("train", "validation"):
    os.mkdir(name)
    np.savez(name + "/data.npz", x=x, y=np.arange(200) % 4)
"""
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
    flags = ("--train", "train", "--validation", "validation", "--model_dir", "s3://bucket/model")
    result = script.run(2, *flags)
    assert "Data: 200 training and 200 validation images\n" in result.output
    assert result.epochs == [1, 2]
    assert script.variables()
    assert (script.folder / "output/tensorflow-tf1/data/metrics.json").exists()
