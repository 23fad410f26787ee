"""Shared fixtures. Each shared training runs only once, even if several processes run the tests."""

import importlib.util

import hypothesis
import numpy as np
import pytest

from helpers import (
    EPOCHS,
    FRAMEWORKS,
    IMAGE_FRAMEWORKS,
    INTERRUPTIBLE,
    choose,
    once,
    run,
)

if importlib.util.find_spec("moto") is None:  # `make check` needs no simulator; `make test` installs it
    collect_ignore = ["test_launch.py", "test_spot.py"]

# The machine may be busy.
busy = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=busy)
hypothesis.settings.load_profile("tests")


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return choose(request.param)


@pytest.fixture(params=IMAGE_FRAMEWORKS)
def image_framework(request):
    return choose(request.param)


@pytest.fixture(scope="session")
def digits():
    """300 real handwritten digits as uint8 images (300, 8, 8), and their labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images[:300] * 15).astype(np.uint8), bunch.target[:300]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id):
    """A folder shared by all processes of the test run."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture(scope="session")
def uninterrupted(shared_folder):
    """Return the folder of an uninterrupted run of twelve epochs or a hundred rounds, by framework.

    The output is in its file `log`.
    """

    def folder_of(framework):
        return once(shared_folder / f"uninterrupted-{framework}", lambda folder: train(framework, folder))

    def train(framework, folder):
        result = run(framework, "--epochs", EPOCHS[framework], cwd=folder)
        assert "Starting training from epoch: 1\n" in result.output
        assert result.epochs == list(range(1, EPOCHS[framework] + 1))
        (folder / "log").write_text(result.output)

    return folder_of


@pytest.fixture(scope="session")
def interruptible(shared_folder):
    """Return the folder of a run with the flags of `INTERRUPTIBLE`, for comparison with interrupted ones."""

    def folder_of(framework):
        return once(shared_folder / f"interruptible-{framework}", lambda folder: train(framework, folder))

    def train(framework, folder):
        run(framework, *INTERRUPTIBLE[framework], cwd=folder)

    return folder_of
