"""Several workers that train one model: processes on loopback addresses, each with its own folder, as SageMaker starts
them on hosts of their own."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest

from common import checkpoints, cluster
from conftest import CHECKPOINTS, ROOT, Result, checkpoint_name, environment
from spot import compare
from test_scripts import files, history, metrics, model_bytes, names

FLAGS = ["--epochs", 4, "--batch-size", 128, "--augment"]
TREES = ["--epochs", 40, "--subsample", 0.7, "--colsample-bytree", 0.5]
STEPS = 13  # per epoch: 1,618 digits in batches of 128
MARK = "TEST_CLUSTER"  # in the environment of all that a test starts


def flags_of(framework):
    return TREES if framework == "xgboost" else FLAGS


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Workers:
    """The workers of a training, each a process in its own folder below `folder`: `1`, which leads, `2` and so on."""

    def __init__(self, script, size, *flags, folder, **options):
        self.hosts = [f"127.0.0.{number}" for number in range(1, size + 1)]
        self.script, self.folder = script, folder
        self.flags = [*map(str, flags), "--port", str(free_port())]
        self.processes = [self.start(host, **options) for host in self.hosts]

    def start(self, host, flags=(), **variables):
        """Start the worker on a host as SageMaker does; `flags` are added."""
        folder = self.folder / host.rpartition(".")[2]
        folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, str(self.script), *self.flags, *map(str, flags)],
            cwd=folder,
            env=worker_environment(SM_HOSTS=json.dumps(self.hosts), SM_CURRENT_HOST=host, **variables),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def wait_for(self, line):
        """Return when the leader has printed a line that begins so."""
        for printed in self.processes[0].stdout:
            if printed.startswith(line):
                return
        pytest.fail(f"no line {line}: {self.processes[0].stderr.read()}")

    def finish(self, *codes, seconds=240):
        """Return the Results of all; fail where one does not end in time, or with another code than one of `codes`."""
        deadline = time.monotonic() + seconds
        results = []
        try:
            for process in self.processes:
                output = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                results.append(Result(process, *output))
        finally:
            for process in self.processes:
                process.kill()
        told = "\n".join(f"{result.code}\n{result.output}\n{result.errors}" for result in results)
        assert all(result.code in (codes or (0,)) for result in results), told
        return results


def worker_environment(**variables):
    one_thread = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    return environment(SM_NETWORK_INTERFACE_NAME="lo", **one_thread, **variables)


def train(framework, size, *flags, folder, script=None):
    """Train on so many workers to the end; return the leader's Result."""
    script = script or ROOT / framework / "train.py"
    results = Workers(script, size, *flags, folder=folder).finish()
    for rank, result in enumerate(results[1:], start=1):  # the others have one line to say, and XGBoost another one
        own = re.sub(r"^\[.*\] Task \d+ got rank \d+\n", "", result.output, flags=re.MULTILINE)
        assert own == f"Worker {rank + 1} of {size}, led by 127.0.0.1: the log is there\n"
    return results[0]


@pytest.fixture(autouse=True)
def _no_process_stays(monkeypatch):
    """Fail where a test leaves one of its processes behind, or of theirs."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield

    def left():
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if process.pid != os.getpid()]

    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    remaining = left()
    for process in remaining:
        process.kill()
    assert not remaining


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Return the folder of a training on so many workers that nothing interrupted; each runs once."""
    folders = {}

    def folder_of(framework, size):
        if (framework, size) not in folders:
            folders[framework, size] = folder = tmp_path_factory.mktemp(f"whole-{framework}-{size}")
            result = train(framework, size, *flags_of(framework), folder=folder)
            assert f", {size} workers: 127.0.0.1, 127.0.0.2" in result.output
            each = "1618 training rows" if framework == "xgboost" else f"{128 // size} of the 128 samples of a batch\n"
            assert each in result.output
            assert result.epochs == list(range(1, flags_of(framework)[1] + 1))
        return folders[framework, size]

    return folder_of


def assert_same_bits(folder, other, framework):
    assert history(folder / "1", framework) == history(other / "1", framework)
    assert model_bytes(folder / "1", framework) == model_bytes(other / "1", framework)


def assert_one_set_of_files(folder, framework, *positions):
    """The leader has these checkpoints, the model and the metrics; the others have written nothing at all."""
    for worker in sorted(folder.iterdir())[1:]:
        assert not [path for path in worker.rglob("*") if path.is_file() and path.name != "indices"], worker
    assert files(folder / "1", framework) == names(framework, *positions)
    assert metrics(folder / "1", framework)["epochs"] == positions[-1]


# The same model for any number of workers -----------------------------------------------------------------------------

PLAIN = {  # without dropout and batch normalisation, which see only their worker's share of a batch
    "pytorch": """
    layers = [Normalize(data), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, 10))
""",
    "tensorflow": """
    pixels = keras.Input(data.image_shape, dtype=str(data.train_images.dtype))
    mean, deviation = data.channel_statistics()
    outputs = layers.Normalization(mean=mean, variance=deviation**2, dtype="float32")(pixels)
    outputs = layers.MaxPooling2D(2)(layers.Conv2D(16, 3, padding="same", activation="relu")(outputs))
    return keras.Model(pixels, layers.Dense(10)(layers.Flatten()(outputs)))
""",
    "mxnet": """
    model = nn.HybridSequential(prefix="model_")
    with model.name_scope():
        model.add(Normalize(data), nn.Conv2D(16, 3, padding=1, activation="relu"), nn.MaxPool2D(2))
        model.add(nn.Flatten(), nn.Dense(10))
    model.initialize(mx.init.Xavier())
    model(mx.nd.zeros((1, 1, 8, 8))).wait_to_read()
    return model
""",
}
RECORDING = '''
    import signal

    import numpy as np

    class Recorded:
        """The digits; writes down which of them are read for training, and interrupts it once."""

        def __init__(self, array):
            self.array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, 0

        def __getitem__(self, key):
            if not isinstance(key, slice):
                self.reads += 1
                with open("indices", "a") as file:
                    file.write(" ".join(map(str, key)) + "\\n")
                if self.reads == int(os.environ.get("INTERRUPT_AT", 0)) and not cluster.leads():
                    os.kill(os.getpid(), signal.SIGTERM)
            return np.asarray(self.array[key])

    data = images.load_images(args)
    return data._replace(train_images=Recorded(data.train_images))
'''


def own_copy(framework, folder, load_data=None):
    """Copy a script as a user does, and put another model, and other data if wanted, into the two marked functions."""
    shutil.copytree(ROOT / framework, folder / framework, symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    script = folder / framework / "train.py"
    text = script.read_text()
    for function, body in (("build_model", PLAIN[framework]), ("load_data", load_data)):
        if body:
            head = re.search(rf'def {function}\(.*\n    """.*"""\n', text)[0]
            text = text.replace(head, head + body)
    script.write_text(text)
    return script


def test_the_loss_curves_of_one_two_and_four_workers_agree(framework, tmp_path):
    script = ROOT / framework / "train.py" if framework == "xgboost" else own_copy(framework, tmp_path)
    flags = ["--epochs", 15] if framework == "xgboost" else FLAGS
    curves = []
    for size in (1, 2, 4):
        folder = tmp_path / str(size)
        folder.mkdir()
        train(framework, size, *flags, folder=folder, script=script)
        rows = history(folder / "1", framework)
        curves.append([[float(value) for value in row.values()] for row in rows])
        assert_one_set_of_files(folder, framework, *range(1, flags[1] + 1))
    assert curves[0][-1] != curves[0][0]
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=2e-3, atol=2e-3)


# Interruptions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("victim", "often"), [(0, ["--checkpoint-steps", 5]), (1, ["--checkpoint-seconds", 0.02])])
def test_when_one_worker_is_killed_all_stop_and_a_restart_ends_with_the_same_bits(
    framework, tmp_path, whole, victim, often
):
    flags = [*flags_of(framework), *([] if framework == "xgboost" else often)]
    workers = Workers(ROOT / framework / "train.py", 2, *flags, folder=tmp_path)
    workers.wait_for("epoch=2 ")
    workers.processes[victim].kill()
    killed = time.monotonic()
    results = workers.finish(-signal.SIGKILL, 1, seconds=60)
    assert time.monotonic() - killed < 60
    assert results[victim].code == -signal.SIGKILL
    other = results[1 - victim]
    assert other.code == 1
    assert f"error: {workers.hosts[victim]} has ended without a word" in other.error_line
    result = train(framework, 2, *flags, folder=tmp_path)
    assert "Resuming training from " in result.output
    assert_same_bits(tmp_path, whole(framework, 2), framework)
    assert_one_set_of_files(tmp_path, framework, *range(1, flags[1] + 1))


@pytest.mark.parametrize(("size", "told"), [(2, [1]), (4, [0, 1, 2, 3])])
def test_after_sigterm_all_save_at_the_same_step_and_a_restart_ends_with_the_same_bits(
    framework, tmp_path, whole, size, told
):
    workers = Workers(ROOT / framework / "train.py", size, *flags_of(framework), folder=tmp_path)
    workers.wait_for("epoch=2 ")
    for number in told:
        workers.processes[number].send_signal(signal.SIGTERM)
    results = workers.finish(143)
    (last_line,) = {result.output.splitlines()[-1] for result in results}
    saved = re.fullmatch(r"Interrupted: saved (\S+), run the same command to resume", last_line)[1]
    for worker in sorted(tmp_path.iterdir())[1:]:
        assert not [path for path in worker.rglob("*") if path.is_file()]
    result = train(framework, size, *flags_of(framework), folder=tmp_path)
    assert f"Resuming training from {saved}\n" in result.output
    assert "Warning" not in result.output
    assert_same_bits(tmp_path, whole(framework, size), framework)


def test_a_signal_during_the_validation_and_a_run_with_nothing_left(image_framework, tmp_path):
    script = own_copy(image_framework, tmp_path, load_data=RECORDING.replace("train_images", "validation_images"))
    flags = ["--epochs", 2, "--batch-size", 128, "--workers", 0]
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    results = Workers(script, 2, *flags, folder=run, INTERRUPT_AT="1").finish(143)
    assert f"Interrupted: saved checkpoint-0-{STEPS}." in results[0].output
    assert train(image_framework, 2, *flags, folder=run, script=script).epochs == [1, 2]
    assert "Nothing left to train" in train(image_framework, 2, *flags, folder=run, script=script).output
    train(image_framework, 2, *flags, folder=unbroken, script=script)
    assert history(run / "1", image_framework) == history(unbroken / "1", image_framework)
    models = [compare.read_model(folder / "1/output" / image_framework / "model") for folder in (run, unbroken)]
    assert models[0] == models[1]


def test_another_number_of_workers_continues_the_same_sequence_of_batches(image_framework, tmp_path):
    """Begun on two, interrupted inside the second epoch, continued on four: no sample twice, none missing."""
    script = own_copy(image_framework, tmp_path, load_data=RECORDING)
    flags = ["--epochs", 3, "--batch-size", 128, "--workers", 0]
    folder = tmp_path / "run"
    Workers(script, 2, *flags, folder=folder, INTERRUPT_AT=str(STEPS + 6)).finish(143)
    pattern = CHECKPOINTS[image_framework]
    (position, _), *_ = checkpoints.find_checkpoints(folder / f"1/output/{image_framework}/checkpoints", pattern)
    assert position == (1, 5)
    trained = [batches(folder / worker) for worker in ("1", "2")]
    assert {len(read) for read in trained} == {STEPS + 6}  # the last one was read, but not trained on
    trained = [read[: STEPS + 5] for read in trained]
    for worker in ("1", "2"):
        (folder / worker / "indices").unlink()
    result = train(image_framework, 4, *flags, folder=folder, script=script)
    assert "Warning: number of workers was 2 and is now 4: " in result.output
    rest = [batches(folder / worker) for worker in ("1", "2", "3", "4")]
    together = [np.concatenate(parts) for parts in [*zip(*trained), *zip(*rest)]]
    alone = tmp_path / "alone"
    alone.mkdir()
    train(image_framework, 1, *flags, folder=alone, script=script)
    for ours, theirs in zip(together, batches(alone / "1")):
        assert np.array_equal(ours, theirs)
    assert len(together) == 3 * STEPS
    curves = [[float(row["train_loss"]) for row in history(path / "1", image_framework)] for path in (folder, alone)]
    np.testing.assert_allclose(*curves, rtol=2e-3)
    for number in range(3):
        assert len(np.unique(np.concatenate(together[number * STEPS : (number + 1) * STEPS]))) == 1618


def batches(folder):
    """Return what was read for each training step; channel statistics are read by slices."""
    return [np.array(line.split(), int) for line in (folder / "indices").read_text().splitlines()]


def test_xgboost_goes_on_with_another_number_of_workers(tmp_path, whole):
    workers = Workers(ROOT / "xgboost/train.py", 2, *TREES, folder=tmp_path)
    workers.wait_for("epoch=3 ")
    workers.processes[0].send_signal(signal.SIGINT)
    workers.finish(130)
    (epoch, _), _ = checkpoints.find_checkpoints(tmp_path / "1/output/xgboost/checkpoints", CHECKPOINTS["xgboost"])[0]
    result = train("xgboost", 3, *TREES, folder=tmp_path)
    assert result.epochs == list(range(epoch + 2, 41))
    assert "Warning: number of workers was 2 and is now 3: " in result.output
    accuracies = [metrics(folder / "1", "xgboost")["validation_accuracy"] for folder in (tmp_path, whole("xgboost", 2))]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.03)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_where_the_folders_disagree_the_leader_decides_for_all(framework, tmp_path, whole):
    """The leader has a damaged newest checkpoint, the other a newer one, and one that the leader lacks."""
    for worker in ("1", "2"):
        shutil.copytree(whole(framework, 2) / "1", tmp_path / worker)
    epochs = flags_of(framework)[1]
    folders = [tmp_path / worker / "output" / framework / "checkpoints" for worker in ("1", "2")]
    for epoch in range(3, epochs + 1):
        for folder in folders:
            (folder / checkpoint_name(framework, epoch)).unlink()
    (folders[0] / checkpoint_name(framework, 2)).write_bytes(b"damaged")
    newer = folders[1] / checkpoint_name(framework, epochs)
    newer.write_bytes((folders[1] / checkpoint_name(framework, 1)).read_bytes())
    shutil.rmtree(tmp_path / "1/output" / framework / "model")
    result = train(framework, 2, *flags_of(framework), folder=tmp_path)
    assert f"Warning: 127.0.0.2 has {newer.name}, but 127.0.0.1 leads and has {checkpoint_name(framework, 2)}\n" in (
        result.output
    )
    assert f"Kept for inspection: {checkpoint_name(framework, 2)}.damaged\n" in result.output
    assert f"Resuming training from {checkpoint_name(framework, 1)}\n" in result.output
    assert_same_bits(tmp_path, whole(framework, 2), framework)
    assert files(tmp_path / "2", framework) == names(framework, 1, 2, epochs)

    shutil.rmtree(folders[0])
    result = train(framework, 2, *flags_of(framework), folder=tmp_path)
    assert f"Warning: 127.0.0.2 has {newer.name}, but 127.0.0.1 leads and has nothing\n" in result.output
    assert "Starting training from epoch: 1\n" in result.output
    assert_same_bits(tmp_path, whole(framework, 2), framework)


# Starting and failing -------------------------------------------------------------------------------------------------


def test_who_is_missing_is_named(tmp_path):
    workers = Workers(ROOT / "xgboost/train.py", 1, folder=tmp_path)
    workers.finish()
    hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]
    workers.hosts = hosts
    workers.processes = [workers.start(host, ["--join-seconds", 12]) for host in (hosts[0], hosts[2])]
    results = workers.finish(1, seconds=60)
    reason = "waited 12 seconds for 127.0.0.2, 127.0.0.4: only 2 of 4 workers are here"
    assert results[0].error_line.startswith(f"error: {reason}")
    assert results[1].error_line.startswith(f"error: 127.0.0.1 has failed: {reason}")
    workers.processes = [workers.start("127.0.0.2", ["--join-seconds", 1])]
    line = workers.finish(1, seconds=30)[0].error_line
    assert "waited 1 seconds for 127.0.0.1, which leads the 4 workers, at 127.0.0.1 port " in line


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--current-host", "127.0.0.9"], "--current-host 127.0.0.9: expected one of --hosts, which are 127.0.0.1, "),
        (["--train", "nowhere"], "--train nowhere is not a folder"),
        (["--epochs", 3], "--epochs is 3 here, but "),
        (["--seed", 3], "--seed is 3 here, but 42 on 127.0.0.1, which leads: all workers need the same flags"),
    ],
)
def test_when_one_worker_fails_all_end_with_its_reason(framework, tmp_path, flags, reason):
    workers = Workers(ROOT / framework / "train.py", 1, folder=tmp_path)
    workers.finish()
    workers.hosts = ["127.0.0.1", "127.0.0.2"]
    workers.flags += ["--join-seconds", "60"]
    outputs = [tmp_path / "first", tmp_path / "second"]
    for folder in outputs:
        folder.mkdir()
    workers.processes = [
        workers.start(host, more, SM_OUTPUT_DIR=str(folder))
        for host, more, folder in zip(workers.hosts, ([], flags), outputs)
    ]
    if "--current-host" in flags:
        workers.processes[0].kill()  # it would wait for the other
        assert reason in workers.finish(1, -signal.SIGKILL)[1].error_line
        return
    results = workers.finish(1, seconds=60)
    assert results[1].error_line.startswith(f"error: {reason}")
    assert results[0].error_line.startswith(f"error: 127.0.0.2 has failed: {reason}")
    for folder in outputs:
        assert reason in (folder / "failure").read_text()


@pytest.mark.parametrize("framework", ["pytorch", "xgboost"])
def test_all_workers_need_all_of_the_data(framework, tmp_path):
    """Each has a part of the same size, as SageMaker's ShardedByS3Key would hand it out."""
    generator = np.random.default_rng(0)
    for part in ("1", "2"):
        folder = tmp_path / part / "data"
        folder.mkdir(parents=True)
        labels = generator.integers(0, 3, 60)
        if framework == "xgboost":
            np.savetxt(folder / "part.csv", np.column_stack([labels, generator.normal(size=(60, 4))]), delimiter=",")
        else:
            np.savez(folder / "part.npz", x=generator.integers(0, 256, (60, 8, 8, 1)).astype(np.uint8), y=labels)
    results = Workers(ROOT / framework / "train.py", 2, "--train", "data", folder=tmp_path).finish(1)
    assert "labels is " in results[1].error_line
    assert "all workers need the same flags, the same kind of device, and all of the data" in results[0].error_line


def test_a_signal_before_the_training_ends_all_with_nothing_to_save(framework, tmp_path):
    workers = Workers(ROOT / framework / "train.py", 2, folder=tmp_path)
    workers.wait_for("Data: ")
    workers.processes[1].send_signal(signal.SIGTERM)
    for result in workers.finish(143, seconds=60):
        assert "Interrupted: " in result.output + result.errors
        assert "error: " not in result.errors
    assert not list((tmp_path / "2").iterdir())


def test_strangers_at_the_port_do_not_matter(tmp_path):
    workers = Workers(ROOT / "xgboost/train.py", 1, folder=tmp_path)
    workers.finish()
    workers.hosts = ["127.0.0.1", "127.0.0.2"]
    leader = workers.start("127.0.0.1")
    port = int(workers.flags[-1])
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"V" + bytes(8), b"V" + (60000).to_bytes(8, "big") + b"[" * 60000, b""):
        deadline = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(sent)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    workers.processes = [leader, workers.start("127.0.0.2")]
    assert workers.finish()[0].output.count("epoch=") == 0  # it was trained above: nothing is left


def test_there_must_be_a_sample_for_each_worker(image_framework, tmp_path):
    for result in Workers(ROOT / image_framework / "train.py", 2, "--batch-size", 1, folder=tmp_path).finish(1):
        assert "there are 2 workers: expected a sample for each; raise --batch-size or use fewer workers" in (
            result.error_line
        )


# Launchers and networks -----------------------------------------------------------------------------------------------


def test_torchrun_starts_the_same_training(tmp_path, whole):
    """Interrupted by SIGTERM, as a scheduler sends it to torchrun, and started again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), str(ROOT / "pytorch/train.py"), *map(str, FLAGS)]
    folder = tmp_path / "1"
    folder.mkdir()
    options = {"cwd": folder, "env": worker_environment(), "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **options) as process:
        for line in process.stdout:
            if line.startswith("epoch=2 "):
                process.send_signal(signal.SIGTERM)
                break
        output = process.stdout.read()
    assert process.returncode != 0
    saved = set(re.findall(r"Interrupted: saved (\S+), run the same command to resume", output))
    assert len(saved) == 1
    output = subprocess.run(command, stderr=subprocess.PIPE, check=True, **options).stdout
    assert ", 2 workers: rank 0, rank 1; each gets 64 of the 128 samples of a batch\n" in output
    assert f"Resuming training from {saved.pop()}\n" in output
    assert_same_bits(tmp_path, whole("pytorch", 2), "pytorch")


def test_sagemakers_toolkit_starts_the_same_training(tmp_path, whole):
    """Two containers of one job, as `train` of sagemaker-training finds them laid out by the service."""
    hosts, port = ["127.0.0.1", "127.0.0.2"], free_port()
    flags = {"epochs": 4, "batch-size": 128, "augment": True, "port": port}
    program = {"sagemaker_program": "train.py", "sagemaker_submit_directory": str(ROOT / "pytorch")}
    documents = {
        "hyperparameters.json": {name: json.dumps(value) for name, value in {**program, **flags}.items()},
        "inputdataconfig.json": {},
    }
    processes = []
    for host in hosts:
        base = tmp_path / host
        for name in ("model", "output/data", "checkpoints", "input/config", "input/data", "code"):
            (base / name).mkdir(parents=True)
        resources = {"current_host": host, "hosts": hosts, "network_interface_name": "lo"}
        for name, document in {**documents, "resourceconfig.json": resources}.items():
            (base / "input/config" / name).write_text(json.dumps(document))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**worker_environment(), "SAGEMAKER_BASE_DIR": str(base), "PATH": path}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(["train"], cwd=base, env=env, **output))
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert compare.read_model(tmp_path / hosts[0] / "model") == model_bytes(whole("pytorch", 2) / "1", "pytorch")
    assert len(os.listdir(tmp_path / hosts[0] / "checkpoints")) == 4
    for folder in ("checkpoints", "model", "output/data"):
        assert not os.listdir(tmp_path / hosts[1] / folder)


@pytest.fixture
def two_networks():
    """Return two network namespaces that see each other, as (name, address) pairs; the interface of each is `eth0`."""
    suffix = uuid.uuid4().hex[:6]
    networks = [(f"host{number}-{suffix}", f"10.77.0.{number}") for number in (1, 2)]
    commands = [["ip", "netns", "add", name] for name, _ in networks]
    veth = ["ip", "link", "add", "eth0", "netns", networks[0][0], "type", "veth", "peer", "name", "eth0"]
    commands += [[*veth, "netns", networks[1][0]]]
    for name, address in networks:
        inside = ["ip", "-netns", name]
        commands += [[*inside, "addr", "add", f"{address}/24", "dev", "eth0"], [*inside, "link", "set", "eth0", "up"]]
        commands += [[*inside, "link", "set", "lo", "up"]]
    try:
        for command in commands:
            try:
                finished = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                pytest.skip(f"this machine has no `ip`: {error}")
            if finished.returncode != 0:
                pytest.skip(f"this machine lets nobody make a network: {finished.stderr}")
        yield networks
    finally:
        for name, _ in networks:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start_in_networks(networks, framework, *flags, folder):
    """Start a worker in each of the networks, as a host of its own; return the processes."""
    processes = []
    for number, (name, address) in enumerate(networks, start=1):
        variables = {"SM_HOSTS": json.dumps([address for _, address in networks]), "SM_CURRENT_HOST": address}
        cwd = folder / str(number)
        cwd.mkdir()
        script = [sys.executable, str(ROOT / framework / "train.py"), *map(str, flags)]
        env = {**worker_environment(**variables), "SM_NETWORK_INTERFACE_NAME": "eth0"}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(["ip", "netns", "exec", name, *script], cwd=cwd, env=env, **output))
    return processes


# A worker that connects to the test as to a leader, and gets SIGTERM in the middle of a message to it.
STOPPED = """
import socket, sys, threading, time
from common import cluster
cluster.names = ["leader", "follower"]
peer = cluster._peers[0] = cluster._Peer(0, socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
with peer.lock:
    peer.socket.sendall(cluster._HEADER.pack(cluster._VALUE, 4) + b"{1")
    cluster.stop(143, "Interrupted")
    time.sleep(0.3)
    peer.socket.sendall(b"2}")
time.sleep(60)
"""


def test_a_signal_in_the_middle_of_a_message_lets_it_be_finished():
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", STOPPED, str(server.getsockname()[1])]
        process = subprocess.Popen(command, cwd=ROOT)
        connection, _ = server.accept()
        connection.settimeout(30)
        received = b"".join(iter(lambda: connection.recv(4096), b""))
    end = json.dumps([143, "Interrupted"]).encode()
    expected = [(cluster._VALUE, b"{12}"), (cluster._END, end)]
    assert received == b"".join(cluster._HEADER.pack(kind, len(content)) + content for kind, content in expected)
    assert process.wait(timeout=30) == 143


def test_two_hosts_with_networks_of_their_own(framework, tmp_path, whole, two_networks):
    processes = start_in_networks(two_networks, framework, *flags_of(framework), folder=tmp_path)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert_same_bits(tmp_path, whole(framework, 2), framework)


def test_when_the_network_is_cut_both_end_within_a_minute(tmp_path, two_networks):
    processes = start_in_networks(two_networks, "pytorch", "--epochs", 10000, folder=tmp_path)
    for line in processes[0].stdout:
        if line.startswith("epoch=2 "):
            break
    subprocess.run(["ip", "-netns", two_networks[1][0], "link", "set", "eth0", "down"], check=True)
    cut = time.monotonic()
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert time.monotonic() - cut < 60
    assert [process.returncode for process in processes] == [1, 1], "\n".join(outputs)
    for output, (_, other) in zip(outputs, reversed(two_networks)):
        # Which error the kernel reports depends on what it was sending.
        reason = "(Connection timed out|No route to host)"
        assert re.search(rf"error: {re.escape(other)} has ended without a word \({reason}\)", output)
