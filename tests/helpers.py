"""Shared helpers of the tests: run the scripts as users do, and read the files that they write.

Each script runs in a separate process, in an empty folder. `train` and `engine` exist four times, so no test
imports them into its own process.
"""

import ast
import fcntl
import inspect
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from verify import compare

ROOT = Path(__file__).resolve().parents[1]

FRAMEWORKS = ("pytorch", "tensorflow", "mxnet", "xgboost")
IMAGE_FRAMEWORKS = FRAMEWORKS[:3]
CHECKPOINTS = {
    "pytorch": "checkpoint-{}.pt",
    "tensorflow": "checkpoint-{}.keras",
    "mxnet": "checkpoint-{}.params",
    "xgboost": "xgboost-checkpoint.{}",
}
MODEL_FILES = {
    "pytorch": "model.pth",
    "tensorflow": "1/variables/variables.data-00000-of-00001",
    "mxnet": "model-0000.params",
    "xgboost": "xgboost-model",
}

# XGBoost before 3.4, used with Python 3.11, draws different samples after a restart.
HAS_EXACT_SAMPLING = tuple(map(int, version("xgboost").split(".")[:2])) >= (3, 4)
SAMPLING = ("--subsample", 0.7, "--colsample-bytree", 0.5) if HAS_EXACT_SAMPLING else ()

LATER = pytest.mark.integration  # for slow variants of another test


def in_make_test(*names):
    """Return a decorator: `make test` runs a test for these frameworks, `make integration` for the others."""

    def decorate(test):
        is_general = "framework" in inspect.signature(test).parameters
        fixture, known = ("framework", FRAMEWORKS) if is_general else ("image_framework", IMAGE_FRAMEWORKS)
        variants = [pytest.param(name, marks=() if name in names else LATER) for name in known]
        return pytest.mark.parametrize(fixture, variants, indirect=True)(test)

    return decorate


# The flags of shared trainings; an epoch of XGBoost is a boosting round, which takes milliseconds.
EPOCHS = {**dict.fromkeys(IMAGE_FRAMEWORKS, 12), "xgboost": 100}
INTERRUPTIBLE = dict.fromkeys(IMAGE_FRAMEWORKS, ("--epochs", 2, "--batch-size", 16, "--augment"))
INTERRUPTIBLE["xgboost"] = ("--epochs", 30, *SAMPLING)
STEPS = 102  # per epoch of an interruptible training: 1,618 digits in batches of 16

# requirements.txt installs MXNet on this platform only.
HAS_MXNET = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 13)
NO_MXNET = "MXNet 1.9.1 exists for Linux on x86-64 and Python up to 3.12"

SECONDS = 300  # time limit of a run


# Running ----------------------------------------------------------------------------------------------------


def environment(**variables):
    """Return this process's environment without SageMaker's variables, and with `variables`.

    Unless PYTHONPATH is one of them, matplotlib cannot be imported: most tests need no pictures.
    """
    unwanted = ("SM_", "SAGEMAKER_", "MLFLOW_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return {**kept, "PYTHONPATH": str(ROOT / "tests/data/without_matplotlib"), **variables}


def choose(framework):
    """Return a framework; skip the test if it is not available."""
    if framework == "mxnet" and not HAS_MXNET:
        pytest.skip(NO_MXNET)
    return framework


class Result:
    """A finished run: exit code and both outputs."""

    def __init__(self, process, output, errors):
        self.code = process.returncode
        self.output = output
        self.errors = errors

    @property
    def epochs(self):
        """The epochs that the log reports, in order."""
        return [int(number) for number in re.findall(r"^epoch=(\d+) ", self.output, re.MULTILINE)]

    def metric(self, name):
        """Return the last logged value of a metric."""
        return float(re.findall(rf" {name}=(\S+)", self.output)[-1])

    @property
    def last_line(self):
        """The last line of the output."""
        return self.output.splitlines()[-1]

    @property
    def error_line(self):
        """Our error line on standard error; a traceback fails the test."""
        assert "Traceback" not in self.errors, self.errors
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.errors
        return lines[0]


def script_of(framework):
    """Return the path of a framework's script; a path is returned as it is."""
    return ROOT / framework / "train.py" if isinstance(framework, str) else framework


def start(framework, *flags, cwd, env=None, **options):
    """Start a framework's script, or the script at a path, in the folder `cwd`; return the process."""
    command = [sys.executable, str(script_of(framework)), *map(str, flags)]
    return start_command(command, cwd, env, **options)


def start_command(command, cwd, env=None, **options):
    """Start a command whose outputs are text in pipes; return the process."""
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=env or environment(), **{**pipes, **options})


def finish(process, code=0, seconds=SECONDS):
    """Wait for a process and return its Result; fail if its exit code is not `code`."""
    try:
        outputs = process.communicate(timeout=seconds)
    finally:
        process.kill()
    result = Result(process, *outputs)
    assert result.code == code, f"exit code {result.code}\n{result.output}\n{result.errors}"
    return result


def run(framework, *flags, cwd, env=None, code=0, **options):
    """Run a framework's script, or the script at a path, to its end; fail if its exit code is not `code`."""
    return finish(start(framework, *flags, cwd=cwd, env=env, **options), code)


def run_python(code, *arguments, cwd, env=None, exit_code=0):
    """Run Python code in a separate process; return its Result."""
    return finish(start_command([sys.executable, "-c", code, *map(str, arguments)], cwd, env), exit_code)


# Causes an event at an exact point of a script.
EVENTS = """
import contextlib, io, json, os, resource, runpy, signal, sys, time
from common.run import Run
undo = []
def replace(owner, name, replacement):
    undo.append((owner, name, getattr(owner, name)))
    setattr(owner, name, replacement)
def at_call(owner, name, number, action):
    original, calls = getattr(owner, name), []
    def counted(*args, **options):
        calls.append(args)
        if len(calls) == number:
            action()
        return original(*args, **options)
    replace(owner, name, counted)
def send(number):
    os.kill(os.getpid(), number)
def fail():
    raise OSError(5, "Input/output error")
def limit_file_size(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
"""

# Runs a script as a user does, with an event.
SCRIPT = """
import sys
event, path, *flags = sys.argv[1:]
sys.argv = [path, *flags]
sys.path.insert(0, path.rsplit("/", 1)[0])
{EVENTS}
exec(event)
runpy.run_path(path, run_name="__main__")
""".replace("{EVENTS}", EVENTS)


def run_with(event, framework, *flags, cwd, code, env=None):
    """Run a script after executing `event`, Python code that may use EVENTS; return the Result."""
    result = run_python(SCRIPT, event, script_of(framework), *flags, cwd=cwd, env=env, exit_code=code)
    assert "Traceback" not in result.errors, result.errors
    return result


# Calls `main` several times in one process, each time in a folder, with flags and with an event.
MANY = """
import sys
path, jobs = sys.argv[1:]
sys.argv = [path]
sys.path.insert(0, path.rsplit("/", 1)[0])
{EVENTS}
from common.run import execute
import train
results = []
for folder, flags, event in json.loads(jobs):
    os.chdir(folder)
    output, errors, code = io.StringIO(), io.StringIO(), 0
    exec(event)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            execute(train.main, train.parse_args(flags))
        except SystemExit as end:
            code = end.code
    while undo:
        setattr(*undo.pop())
    limit_file_size(resource.RLIM_INFINITY)
    results.append((code, output.getvalue(), errors.getvalue()))
print()
print(json.dumps(results))
"""


def run_many(framework, jobs, cwd, env=None):
    """Call `main` for each of the `jobs` in one process; return their Results.

    A job is (folder, flags) or (folder, flags, event). Starting a process and importing a framework takes
    longer than most tests of an error.
    """
    jobs = [(str(folder), list(map(str, flags)), "".join(event)) for folder, flags, *event in jobs]
    script = MANY.replace("{EVENTS}", EVENTS)
    finished = run_python(script, script_of(framework), json.dumps(jobs), cwd=cwd, env=env)
    results = json.loads(finished.last_line)
    assert len(results) == len(jobs)
    return [Result(SimpleNamespace(returncode=code), *outputs) for code, *outputs in results]


def copy_script(framework, folder, changes=()):
    """Copy a framework's folder as a user does, replace texts in its train.py, and return the script's path.

    Args:
        framework: its name.
        folder: the copy is created in it.
        changes: pairs (old, new); each old text must be in the script.
    """
    copy = folder / "copy" / framework  # the default output has the name of the folder
    shutil.copytree(
        ROOT / framework, copy, symlinks=False, ignore=shutil.ignore_patterns("__pycache__", "output")
    )
    script = copy / "train.py"
    text = script.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    script.write_text(text)
    return script


def copy_with(folder, framework, changes, imports=""):
    """Copy a framework's folder to `folder`, as `cp -rL` does, with other functions in "Make it yours".

    Args:
        folder: a new one.
        framework: its name.
        changes: functions and classes that replace those of the same name or are added.
        imports: statements before that section.
    """
    shutil.copytree(ROOT / framework, folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "train.py"
    lines = path.read_text().splitlines()
    new = {node.name: node for node in ast.parse(textwrap.dedent(changes)).body}
    for node in reversed(ast.parse(path.read_text()).body):
        name = getattr(node, "name", None)
        if name in new:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines[first - 1 : node.end_lineno] = ast.unparse(new.pop(name)).splitlines()
    banner = next(number for number, line in enumerate(lines) if line.startswith("# Make it yours"))
    added = [line for node in new.values() for line in ast.unparse(node).splitlines()]
    lines[banner - 1 : banner - 1] = [*textwrap.dedent(imports).splitlines(), *added]
    path.write_text("\n".join(lines) + "\n")
    return path


def run_verify(script, *flags, folder, options=("--interruptions", 2), code=0, seconds=SECONDS):
    """Run `python -m verify` with `options` on a script with `flags`; return the Result.

    The two trainings are in `folder`, as `whole` and `interrupted`.
    """
    command = [sys.executable, "-m", "verify", script, *options, "--output", folder, "--", *flags]
    return finish(start_command(list(map(str, command)), ROOT), code, seconds)


def replace_body(script, **bodies):
    """Replace the bodies of functions in the script at a path; they follow the docstring."""
    text = script.read_text()
    for name, body in bodies.items():
        pattern = rf'(def {name}\(.*?\):\n    """.*?"""\n).*?(?=\n\n\n)'
        text, count = re.subn(
            pattern, lambda found, body=body: found[1] + body.rstrip(), text, count=1, flags=re.DOTALL
        )
        assert count == 1, name
    script.write_text(text)


# Bodies of build_model without dropout and batch normalization, which depend on the shard of a device.
PLAIN_NETWORKS = {
    "pytorch": """
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)
""",
    "tensorflow": """
    inputs = keras.Input(data.sample_shape, dtype=str(data.dtype))
    outputs = layers.Normalization(mean=data.mean, variance=data.std**2, dtype="float32")(inputs)
    outputs = layers.Conv2D(16, 3, padding="same", activation="relu")(outputs)
    outputs = layers.Flatten()(layers.MaxPooling2D(2)(outputs))
    return keras.Model(inputs, layers.Dense(10)(outputs))
""",
    "mxnet": """
    model = nn.HybridSequential()
    model.add(nn.Conv2D(16, 3, padding=1, activation="relu"), nn.MaxPool2D(2), nn.Flatten(), nn.Dense(10))
    return model
""",
}


def once(folder, make):
    """Return `folder`, filled by `make(folder)` once for all test processes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    finished = folder.with_name(f"{folder.name}.finished")
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


# Reading what a run has written -----------------------------------------------------------------------------


def checkpoint_name(framework, epoch):
    """Return the name of the checkpoint after `epoch` finished epochs."""
    return CHECKPOINTS[framework].format(epoch - 1 if framework == "xgboost" else epoch)


def names(framework, *epochs):
    """Return the sorted names of the checkpoints after these epochs."""
    return sorted(checkpoint_name(framework, epoch) for epoch in epochs)


def checkpoint_folder(folder, framework):
    """Return the folder of checkpoints of a run in `folder`."""
    return folder / "output" / framework / "checkpoints"


def copy_checkpoints(source, folder, framework, *epochs):
    """Copy the checkpoints after these epochs from the run in `source` to a new `folder`; return it."""
    target = checkpoint_folder(folder, framework)
    target.mkdir(parents=True)
    for name in names(framework, *epochs):
        shutil.copy(checkpoint_folder(source, framework) / name, target)
    return folder


def files(folder, framework):
    """Return the sorted names of the files in the folder of checkpoints."""
    return sorted(os.listdir(checkpoint_folder(folder, framework)))


def model_bytes(folder, framework):
    """Return the bits of the exported model, by the names of its files or variables."""
    model = compare.read_model(folder / "output" / framework / "model")
    assert len(model) > 4 if framework == "tensorflow" else model
    return model


def history(folder, framework):
    """Return the rows of history.csv without the columns that contain times."""
    return compare.read_history(folder / "output" / framework / "data/history.csv")


def metrics(folder, framework):
    """Return the content of metrics.json."""
    return json.loads((folder / "output" / framework / "data/metrics.json").read_text())


def assert_same_bits(folder, other, framework):
    """Fail if two runs are not bit-identical."""
    assert history(folder, framework) == history(other, framework)
    assert model_bytes(folder, framework) == model_bytes(other, framework)


# Data -------------------------------------------------------------------------------------------------------


def save_images(folder, pixels, labels, suffixes=(".png",), size=None):
    """Write one folder per class, alternating between these suffixes, resized to `size` x `size` pixels."""
    for index, (array, label) in enumerate(zip(pixels, labels)):
        path = folder / f"class-{label}" / f"{index}{suffixes[index % len(suffixes)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(array)
        if size:
            image = image.resize((size, size))
        options = {} if path.suffix == ".png" else {"quality": 100}
        image.save(path, **options)


def write_csv(path, rows):
    """Write a table without a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, rows, fmt="%g", delimiter=",")


def write_libsvm(path, rows):
    """Write a table whose first column is the label."""
    from sklearn.datasets import dump_svmlight_file

    path.parent.mkdir(parents=True, exist_ok=True)
    dump_svmlight_file(rows[:, 1:], rows[:, 0], str(path), zero_based=True)


def write_parquet(path, rows):
    """Write a table with column names."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {f"column-{index}": column for index, column in enumerate(rows.T)}
    parquet.write_table(pyarrow.table(columns), path)


TABLE_WRITERS = {"csv": write_csv, "libsvm": write_libsvm, "txt": write_libsvm, "parquet": write_parquet}


# Several workers --------------------------------------------------------------------------------------------


def free_port():
    """Return an unused port of the loopback address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def worker_environment(**variables):
    """Return the environment of a worker that computes with one thread."""
    one_thread = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    return environment(SM_NETWORK_INTERFACE_NAME="lo", **one_thread, **variables)


class Workers:
    """The workers of a training: one process each, in the folders `1` (the main process), `2` and so on.

    They have loopback addresses and the environment that SageMaker gives to hosts.
    """

    def __init__(self, framework, size, *flags, folder, **variables):
        self.framework = framework
        self.folder = folder
        self.hosts = [f"127.0.0.{number}" for number in range(1, size + 1)]
        self.flags = [*flags, "--port", free_port()]
        self.processes = [self.start(host, **variables) for host in self.hosts]

    def start(self, host, flags=(), **variables):
        """Start the worker on a host as SageMaker does; `flags` are added."""
        folder = self.folder / host.rpartition(".")[2]
        folder.mkdir(parents=True, exist_ok=True)
        env = worker_environment(SM_HOSTS=json.dumps(self.hosts), SM_CURRENT_HOST=host, **variables)
        return start(self.framework, *self.flags, *flags, cwd=folder, env=env)

    def wait_for(self, line):
        """Return when the main process has printed a line that starts with `line`."""
        for printed in self.processes[0].stdout:
            if printed.startswith(line):
                return
        raise AssertionError(f"no line {line}: {self.processes[0].stderr.read()}")

    def finish(self, *codes, seconds=240):
        """Return the Results of all workers; fail if one runs too long or its exit code is not in `codes`."""
        deadline = time.monotonic() + seconds
        results = []
        try:
            for process in self.processes:
                outputs = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                results.append(Result(process, *outputs))
        finally:
            for process in self.processes:
                process.kill()
        outputs = "\n".join(f"{result.code}\n{result.output}\n{result.errors}" for result in results)
        assert all(result.code in (codes or (0,)) for result in results), outputs
        return results


def train_together(framework, size, *flags, folder):
    """Train on `size` workers to the end; return the Result of the main process."""
    results = Workers(framework, size, *flags, folder=folder).finish()
    for rank, result in enumerate(results[1:], start=1):  # they print one line, XGBoost two
        own = re.sub(r"^\[.*\] Task \d+ got rank \d+\n", "", result.output, flags=re.MULTILINE)
        assert own == f"Worker {rank + 1} of {size} started; see the log of 127.0.0.1\n"
    return results[0]
