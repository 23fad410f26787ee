"""The examples equal their templates outside "Make it yours", are complete, and resume exactly."""

import json
import re
import shutil
import sys

import pytest

from examples import renew
from helpers import LATER, ROOT, SAMPLING, finish, run, run_verify, start_command
from verify.compare import read_history

EXAMPLES = sorted(renew.TEMPLATES)
FLAGS = {
    "finetune": ["--image-size", 8, "--epochs", 2, "--batch-size", 512, "--best-metric", "f1"],
    "keras_fit": ["--epochs", 5, "--learning-rate", 0.003],
    "own_objective": ["--num-round", 200, *SAMPLING, "--best-metric", "cost:min", "--patience", 20],
}
INTERRUPTIONS = {"finetune": 1, "keras_fit": 1, "own_objective": 3}


def contents(folder):
    """Return the files below a folder and the targets of the links, by path."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[path.relative_to(folder)] = path.readlink()
        elif path.suffix == ".py":
            found[path.relative_to(folder)] = path.read_text()
    return found


@pytest.fixture
def repository(tmp_path):
    """A copy of the examples and their templates."""
    for folder in ("examples", "common", *renew.TEMPLATES.values()):
        ignored = shutil.ignore_patterns("__pycache__", "output")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    return tmp_path


def renew_in(repository):
    """Run `renew.py` of a repository; return its output."""
    return finish(start_command([sys.executable, "examples/renew.py"], cwd=repository)).output


@pytest.mark.quick
def test_the_examples_are_up_to_date(repository):
    before = contents(repository)
    assert renew_in(repository) == ""
    assert contents(repository) == before
    names = {path.parent.name for path in ROOT.glob("examples/*/train.py")}
    assert names == set(EXAMPLES)
    for name in EXAMPLES:
        assert (ROOT / "examples" / name / "engine.py").samefile(ROOT / renew.TEMPLATES[name] / "engine.py")
        assert (ROOT / "examples" / name / "common").samefile(ROOT / "common")


@pytest.mark.quick
@pytest.mark.parametrize("name", EXAMPLES)
def test_renewing_replaces_everything_outside_the_section(repository, name):
    before = contents(repository)
    script = repository / "examples" / name / "train.py"
    text = script.read_text().replace("run.restore(state)", "0", 1)
    text = text.replace("from common import flags", "from common import flags as all_flags", 1)
    script.write_text(text)
    (script.parent / "common").unlink()
    (script.parent / "engine.py").unlink()
    output = renew_in(repository)
    assert sorted(re.findall(r"^\w+ examples/\w+/(\S+)$", output, re.MULTILINE)) == [
        "common",
        "engine.py",
        "train.py",
    ]
    assert contents(repository) == before


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_copy_is_complete(tmp_path, name):
    copy = tmp_path / "my-job"
    shutil.copytree(ROOT / "examples" / name, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert not any(path.is_symlink() for path in copy.rglob("*"))
    assert "--best-metric" in run(copy / "train.py", "--help", cwd=tmp_path).output


@pytest.mark.parametrize(
    "name", [name if name == "own_objective" else pytest.param(name, marks=LATER) for name in EXAMPLES]
)
def test_an_example_is_bit_identical_after_random_interruptions(tmp_path, name):
    flags = list(FLAGS[name])
    if name == "finetune":
        pretraining = ["--model", "resnet18", "--image-size", 8, "--epochs", 1, "--batch-size", 512]
        run("pytorch", *pretraining, cwd=tmp_path)
        flags += ["--weights", tmp_path / "output/pytorch/model/model.pth"]
    options = ["--interruptions", INTERRUPTIONS[name]]
    script = ROOT / "examples" / name / "train.py"
    result = run_verify(script, *flags, folder=tmp_path / "verify", options=options)
    assert result.last_line.startswith("Exact: "), result.output
    log = (tmp_path / "verify/whole/log-1.txt").read_text()
    if name == "finetune":
        assert "not in it: fc.1.bias, fc.1.weight" in log
        checkpoint = tmp_path / "verify/whole/checkpoints/checkpoint-2.pt"
        rates = [group["lr"] for group in torch_load(checkpoint)["optimizer"]["param_groups"]]
        assert rates == [0.001, 0.01]  # with --learning-rate 0.01, the default
    if name == "keras_fit":  # EarlyStopping restores the best weights
        exported = json.loads((tmp_path / "verify/whole/data/metrics.json").read_text())
        losses = [row["validation_loss"] for row in read_history(tmp_path / "verify/whole/data/history.csv")]
        assert exported["epoch"] == 1 + losses.index(min(losses, key=float))
    if name == "own_objective":
        assert "Stopping early: " in log
        again = run(script, *flags, "--output", tmp_path / "verify/interrupted", cwd=tmp_path)
        assert again.epochs == []


def torch_load(path):
    """Return the content of a PyTorch checkpoint; the import takes seconds."""
    import torch

    return torch.load(path, weights_only=True)
