"""Several workers train one model, as processes on loopback addresses instead of hosts."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest

from common import checkpoints
from helpers import (
    CHECKPOINTS,
    LATER,
    PLAIN_NETWORKS,
    ROOT,
    SAMPLING,
    Workers,
    assert_same_bits,
    checkpoint_folder,
    checkpoint_name,
    copy_script,
    files,
    free_port,
    history,
    in_make_test,
    metrics,
    model_bytes,
    names,
    once,
    replace_body,
    start_command,
    train_together,
    worker_environment,
)
from verify import compare

IMAGES = ["--epochs", 4, "--batch-size", 128, "--augment"]
TREES = ["--epochs", 40, *SAMPLING]
STEPS = 13  # per epoch: 1,618 digits in batches of 128
MARK = "TEST_WORKERS"  # marks all processes that a test starts


def flags_of(framework):
    return TREES if framework == "xgboost" else IMAGES


def started_processes():
    """Return the processes that this test has started, and their descendants."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == os.environ[MARK] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


def assert_only_this_machine_can_connect(framework, size):
    """Except for the port that each worker of two engines opens at all addresses."""
    addresses = [
        connection.laddr.ip
        for process in started_processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    elsewhere = [address for address in addresses if not address.startswith("127.")]
    assert len(addresses) >= 2
    assert len(elsewhere) == (size if framework in ("tensorflow", "xgboost") else 0), addresses


@pytest.fixture(autouse=True)
def _no_process_stays(monkeypatch):
    """Fail if a test leaves a process running."""
    monkeypatch.setenv(MARK, uuid.uuid4().hex)
    yield

    deadline = time.monotonic() + 10
    while started_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    left = started_processes()
    for process in left:
        process.kill()
    assert not left


@pytest.fixture(scope="session")
def whole(shared_folder):
    """Return the folder of an uninterrupted training on several workers."""

    def folder_of(framework, size):
        def train(folder):
            result = train_together(framework, size, *flags_of(framework), folder=folder)
            if framework != "xgboost":
                assert f", {size} workers: 127.0.0.1, 127.0.0.2" in result.output
                assert f"each gets {128 // size} of the 128 samples of a batch\n" in result.output
            assert result.epochs == list(range(1, flags_of(framework)[1] + 1))

        return once(shared_folder / f"whole-{framework}-{size}", train)

    return folder_of


def assert_same(folder, other, framework):
    assert_same_bits(folder / "1", other / "1", framework)


def assert_one_set_of_files(folder, framework, *epochs):
    """Check that only the main process has written checkpoints, the model and metrics."""
    for worker in sorted(folder.iterdir())[1:]:
        assert not [path for path in worker.rglob("*") if path.is_file() and path.name != "indices"], worker
    assert files(folder / "1", framework) == names(framework, *epochs)
    assert metrics(folder / "1", framework)["epochs"] == epochs[-1]


# The same model for any number of workers -------------------------------------------------------------------

RECORDING = """
    import os
    import signal

    from common.datasets import STATISTICS_PART, ArrayDataset

    class Recorded(ArrayDataset):
        reads = 0

        def __getitems__(self, indices):
            if len(indices) not in (1, STATISTICS_PART):  # otherwise the script describes the data
                Recorded.reads += 1
                with open("indices", "a") as file:
                    file.write(" ".join(map(str, indices)) + "\\n")
                is_main_process = args.current_host == sorted(args.hosts)[0]
                if Recorded.reads == int(os.environ.get("INTERRUPT_AT", 0)) and not is_main_process:
                    os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitems__(indices)

    data_sets = list(load_images(args))
    source = data_sets[NUMBER]
    data_sets[NUMBER] = Recorded(source.images, source.labels, source.classes, source.indices)
    return data_sets
"""


def own_copy(framework, folder, recorded=None):
    """Copy a script with another model that records the samples read from data set 0 (training) or 1."""
    script = copy_script(framework, folder)
    replace_body(script, build_model=PLAIN_NETWORKS[framework])
    if recorded is not None:
        replace_body(script, load_data=RECORDING.replace("NUMBER", str(recorded)))
    return script


@in_make_test("xgboost")
def test_the_loss_curves_of_one_two_and_four_workers_agree(framework, tmp_path):
    script = framework if framework == "xgboost" else own_copy(framework, tmp_path)
    # Without augmentation, which draws different random numbers on each worker.
    flags = ["--epochs", 15] if framework == "xgboost" else [*IMAGES, "--no-augment"]
    curves = []
    for size in (1, 2, 4):
        folder = tmp_path / str(size)
        folder.mkdir()
        train_together(script, size, *flags, folder=folder)
        rows = history(folder / "1", framework)
        curves.append([[float(value) for value in row.values()] for row in rows])
        assert_one_set_of_files(folder, framework, *range(1, flags[1] + 1))
    assert curves[0][-1] != curves[0][0]
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=2e-3, atol=2e-3)


# Interruptions ----------------------------------------------------------------------------------------------

OFTEN = [["--checkpoint-steps", 5], ["--checkpoint-seconds", 0.02]]


@pytest.mark.parametrize(
    ("size", "victim", "receivers"), [(2, 1, [1]), pytest.param(4, 0, [0, 1, 2, 3], marks=LATER)]
)
def test_after_a_kill_and_after_sigterm_a_restart_is_bit_identical(
    framework, tmp_path, whole, size, victim, receivers
):
    """When one worker is killed all stop, and after SIGTERM to some all save at the same step."""
    if size == 4 and framework in ("tensorflow", "mxnet"):
        pytest.skip("tested with two workers: these scripts take minutes with more")
    flags = [*flags_of(framework), *([] if framework == "xgboost" else OFTEN[victim])]
    workers = Workers(framework, size, *flags, folder=tmp_path)
    workers.wait_for("epoch=2 ")  # the first has been saved
    assert_only_this_machine_can_connect(framework, size)
    workers.processes[victim].kill()
    killed = time.monotonic()
    results = workers.finish(-signal.SIGKILL, 1, seconds=60)
    assert time.monotonic() - killed < 60
    assert results.pop(victim).code == -signal.SIGKILL
    for other in results:
        assert other.code == 1
        assert f"error: {workers.hosts[victim]} closed the connection without a reason" in other.error_line

    workers = Workers(framework, size, *flags, folder=tmp_path)
    workers.wait_for("Resuming training from ")
    workers.wait_for("epoch=")
    for number in receivers:
        workers.processes[number].send_signal(signal.SIGTERM)
    results = workers.finish(143)
    (last_line,) = {result.last_line for result in results}
    saved = re.fullmatch(r"Interrupted: saved (\S+), run the same command to resume", last_line)[1]
    for worker in sorted(tmp_path.iterdir())[1:]:
        assert not [path for path in worker.rglob("*") if path.is_file()]

    result = train_together(framework, size, *flags, folder=tmp_path)
    assert f"Resuming training from {saved}\n" in result.output
    assert "Warning" not in result.output
    assert_same(tmp_path, whole(framework, size), framework)
    assert_one_set_of_files(tmp_path, framework, *range(1, flags[1] + 1))


@in_make_test("pytorch")
def test_a_signal_during_the_validation_and_a_run_with_nothing_left(image_framework, tmp_path):
    script = own_copy(image_framework, tmp_path, recorded=1)
    flags = ["--epochs", 2, "--batch-size", 128, "--loaders", 0]
    parts, unbroken = tmp_path / "run", tmp_path / "unbroken"
    results = Workers(script, 2, *flags, folder=parts, INTERRUPT_AT="1").finish(143)
    assert f"Interrupted: saved checkpoint-0-{STEPS}." in results[0].output
    assert train_together(script, 2, *flags, folder=parts).epochs == [1, 2]
    assert "Nothing left to train" in train_together(script, 2, *flags, folder=parts).output
    train_together(script, 2, *flags, folder=unbroken)
    assert_same(parts, unbroken, image_framework)


@in_make_test("pytorch")
def test_another_number_of_workers_continues_the_same_sequence_of_batches(image_framework, tmp_path):
    """Start on two, interrupt in the second epoch, continue on three: each sample is read once."""
    script = own_copy(image_framework, tmp_path, recorded=0)
    flags = ["--epochs", 3, "--batch-size", 128, "--loaders", 0]
    folder = tmp_path / "run"
    Workers(script, 2, *flags, folder=folder, INTERRUPT_AT=str(STEPS + 6)).finish(143)
    pattern = CHECKPOINTS[image_framework]
    (position, _), *_ = checkpoints.find_checkpoints(
        checkpoint_folder(folder / "1", image_framework), pattern
    )
    assert position[0] == 1
    trained = [read_batches(folder / worker)[: STEPS + position[1]] for worker in ("1", "2")]
    assert {len(batches) for batches in trained} == {STEPS + position[1]}
    for worker in ("1", "2"):
        (folder / worker / "indices").unlink()
    result = train_together(script, 3, *flags, folder=folder)
    assert "Warning: number of workers was 2 and is now 3: " in result.output
    num_left = 2 * STEPS - position[1]
    rest = [read_batches(folder / worker) for worker in ("1", "2", "3")]
    # After the first batch MXNet reads earlier ones again, to repeat their random draws.
    rest = [[*steps[:1], *steps[1 - num_left :]] for steps in rest]
    together = [np.concatenate(parts) for parts in [*zip(*trained), *zip(*rest)]]
    alone = tmp_path / "alone"
    train_together(script, 1, *flags, folder=alone)
    for ours, theirs in zip(together, read_batches(alone / "1")):
        assert np.array_equal(ours, theirs)
    assert len(together) == 3 * STEPS
    curves = []
    for path in (folder, alone):
        curves.append([float(row["train_loss"]) for row in history(path / "1", image_framework)])
    np.testing.assert_allclose(*curves, rtol=2e-3)
    for number in range(3):
        epoch = np.concatenate(together[number * STEPS : (number + 1) * STEPS])
        assert len(np.unique(epoch)) == len(epoch) == 1618


def read_batches(folder):
    """Return the indices that a worker has read in each training step.

    Keras reads the first batch a second time, to build the model.
    """
    lines = [line for line, _ in itertools.groupby((folder / "indices").read_text().splitlines())]
    return [np.array(line.split(), int) for line in lines]


def test_xgboost_continues_with_another_number_of_workers(tmp_path, whole):
    workers = Workers("xgboost", 2, *TREES, folder=tmp_path)
    workers.wait_for("epoch=3 ")
    workers.processes[0].send_signal(signal.SIGINT)
    workers.finish(130)
    folder = checkpoint_folder(tmp_path / "1", "xgboost")
    (epoch, _), _ = checkpoints.find_checkpoints(folder, CHECKPOINTS["xgboost"])[0]
    result = train_together("xgboost", 3, *TREES, folder=tmp_path)
    assert result.epochs == list(range(epoch + 2, 41))
    assert "Warning: number of workers was 2 and is now 3: " in result.output
    accuracies = []
    for path in (tmp_path, whole("xgboost", 2)):
        accuracies.append(metrics(path / "1", "xgboost")["validation_accuracy"])
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.03)


# Checkpoints ------------------------------------------------------------------------------------------------


@in_make_test("xgboost")
def test_if_the_folders_disagree_the_main_process_decides_for_all(framework, tmp_path, whole):
    """Its newest checkpoint is damaged; the other worker has a newer one, and a missing one."""
    for worker in ("1", "2"):
        shutil.copytree(whole(framework, 2) / "1", tmp_path / worker)
    epochs = flags_of(framework)[1]
    folders = [checkpoint_folder(tmp_path / worker, framework) for worker in ("1", "2")]
    for epoch in range(3, epochs + 1):
        for folder in folders:
            (folder / checkpoint_name(framework, epoch)).unlink()
    (folders[0] / checkpoint_name(framework, 2)).write_bytes(b"damaged")
    newer = folders[1] / checkpoint_name(framework, epochs)
    newer.write_bytes((folders[1] / checkpoint_name(framework, 1)).read_bytes())
    shutil.rmtree(tmp_path / "1/output" / framework / "model")
    result = train_together(framework, 2, *flags_of(framework), folder=tmp_path)
    warning = f"Warning: 127.0.0.2 has {newer.name}, but the main process, 127.0.0.1, has "
    assert f"{warning}{checkpoint_name(framework, 2)} and decides\n" in result.output
    assert f"Kept for inspection: {checkpoint_name(framework, 2)}.damaged\n" in result.output
    assert f"Resuming training from {checkpoint_name(framework, 1)}\n" in result.output
    assert_same(tmp_path, whole(framework, 2), framework)
    assert files(tmp_path / "2", framework) == names(framework, 1, 2, epochs)

    if framework in ("pytorch", "xgboost"):
        shutil.rmtree(folders[0])
        result = train_together(framework, 2, *flags_of(framework), folder=tmp_path)
        assert f"{warning}no checkpoint and decides\n" in result.output
        assert "Starting training from epoch: 1\n" in result.output
        assert_same(tmp_path, whole(framework, 2), framework)


# Starting and failing ---------------------------------------------------------------------------------------


def test_missing_workers_are_named(tmp_path):
    workers = Workers("xgboost", 0, folder=tmp_path)
    workers.hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]
    present = (workers.hosts[0], workers.hosts[2])
    workers.processes = [workers.start(host, ["--join-seconds", 12]) for host in present]
    results = workers.finish(1, seconds=60)
    reason = "waited 12 seconds for 127.0.0.2, 127.0.0.4: only 2 of 4 workers have joined"
    assert results[0].error_line.startswith(f"error: {reason}")
    assert results[1].error_line.startswith(f"error: 127.0.0.1 has failed: {reason}")
    workers.processes = [workers.start("127.0.0.2", ["--join-seconds", 1])]
    line = workers.finish(1, seconds=30)[0].error_line
    assert "waited 1 seconds for 127.0.0.1, the main process of 4 workers, at 127.0.0.1 port " in line


REASONS = {
    ("--train", "nowhere"): "--train nowhere is not a folder",
    ("--epochs", 3): "--epochs is 3 on this worker, but ",
    (
        "--seed",
        3,
    ): "--seed is 3 on this worker, but 42 on 127.0.0.1, the main process: all workers need the same",
}


@in_make_test("pytorch", "xgboost")
@pytest.mark.parametrize("flags", REASONS, ids=lambda flags: flags[0])
def test_when_one_worker_fails_all_end_with_its_reason(framework, tmp_path, flags):
    if flags[0] != "--train" and framework != "xgboost":
        pytest.skip("the workers compare their flags before a framework does anything")
    outputs = [tmp_path / "first", tmp_path / "second"]
    for folder in outputs:
        folder.mkdir()
    workers = Workers(framework, 0, "--join-seconds", 60, folder=tmp_path)
    workers.hosts = ["127.0.0.1", "127.0.0.2"]
    for host, more, folder in zip(workers.hosts, ((), flags), outputs):
        workers.processes.append(workers.start(host, more, SM_OUTPUT_DIR=str(folder)))
    results = workers.finish(1, seconds=60)
    reason = REASONS[flags]
    assert results[1].error_line.startswith(f"error: {reason}")
    assert results[0].error_line.startswith(f"error: 127.0.0.2 has failed: {reason}")
    for folder in outputs:
        assert reason in (folder / "failure").read_text()


def test_a_host_must_be_one_of_the_hosts(tmp_path):
    workers = Workers("xgboost", 0, folder=tmp_path)
    workers.hosts = ["127.0.0.1", "127.0.0.2"]
    workers.processes = [workers.start("127.0.0.9")]
    line = workers.finish(1)[0].error_line
    assert (
        "--current-host 127.0.0.9: expected one of --hosts, which are 127.0.0.1, 127.0.0.2, each once" in line
    )


@pytest.mark.parametrize("framework", [pytest.param("pytorch", marks=LATER), "xgboost"])
def test_all_workers_need_all_data(framework, tmp_path):
    """Each has a part of the same size, as with SageMaker's ShardedByS3Key."""
    generator = np.random.default_rng(0)
    for part in ("1", "2"):
        folder = tmp_path / part / "data"
        folder.mkdir(parents=True)
        labels = generator.integers(0, 3, 60)
        if framework == "xgboost":
            rows = np.column_stack([labels, generator.normal(size=(60, 4))])
            np.savetxt(folder / "part.csv", rows, delimiter=",")
        else:
            images = generator.integers(0, 256, (60, 8, 8, 1)).astype(np.uint8)
            np.savez(folder / "part.npz", x=images, y=labels)
    results = Workers(framework, 2, "--train", "data", folder=tmp_path).finish(1)
    assert "labels" in results[1].error_line
    expected = "all workers need the same flags, the same kind of device, and all of the data"
    assert expected in results[0].error_line


@in_make_test("xgboost")
def test_a_signal_before_the_training_ends_all_with_nothing_to_save(framework, tmp_path):
    workers = Workers(framework, 2, folder=tmp_path)
    workers.wait_for("Data: ")
    workers.processes[1].send_signal(signal.SIGTERM)
    for result in workers.finish(143, seconds=60):
        assert "Interrupted: " in result.output + result.errors
        assert "error: " not in result.errors
    assert not list((tmp_path / "2").iterdir())


def test_other_programs_that_connect_to_the_port_are_ignored(tmp_path):
    workers = Workers("xgboost", 0, "--epochs", 2, folder=tmp_path)
    workers.hosts = ["127.0.0.1", "127.0.0.2"]
    main_process = workers.start("127.0.0.1")
    port = int(workers.flags[-1])
    too_deep = b"V" + (60000).to_bytes(8, "big") + b"[" * 60000
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"V" + bytes(8), too_deep, b""):
        deadline = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(sent)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    workers.processes = [main_process, workers.start("127.0.0.2")]
    assert workers.finish()[0].epochs == [1, 2]


# Runs the main process or the other worker, and prints the result of joining.
JOIN = """
import os, sys
from common.distributed import Workers
from common.errors import UserError
workers = Workers(int(sys.argv[1]), ["main", "other"])
try:
    workers.connect("127.0.0.1", int(sys.argv[2]), float(sys.argv[3]), True)
    workers.check_same({})
    print("joined", flush=True)
except UserError as error:
    print(error, flush=True)
os._exit(0)
"""
HEADER = struct.Struct(">cQ")  # of a message


def join(rank, port, seconds):
    """Start a process that joins the other one; return it."""
    return start_command([sys.executable, "-c", JOIN, *map(str, (rank, port, seconds))], ROOT)


def drip(connection):
    """Send single bytes slowly."""
    with contextlib.suppress(OSError):
        for byte in HEADER.pack(b"V", 40) + b"[" * 40:
            connection.sendall(bytes([byte]))
            time.sleep(0.3)


def reset(connection):
    """Send some bytes, and reset the connection, as a crash does."""
    connection.sendall(b"V")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def say_hello(connection):
    hello = json.dumps({"rank": 1, "names": ["main", "other"]}).encode()
    connection.sendall(HEADER.pack(b"V", len(hello)) + hello)


STRANGERS = {  # a number of strangers and their behaviour, and the error of the main process
    "drip": (1, drip, "waited 3 seconds for other: only 1 of 2 workers have joined"),
    "idle": (30, lambda connection: None, "waited 3 seconds for other: only 1 of 2 workers have joined"),
    "reset": (3, reset, "waited 3 seconds for other: only 1 of 2 workers have joined"),
    "hello": (1, say_hello, "other joined, but then sent nothing"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_other_programs_do_not_make_the_main_process_wait_longer(stranger):
    count, behave, reason = STRANGERS[stranger]
    port = free_port()
    main_process = join(0, port, 3)
    connections = []
    while len(connections) < count:
        with contextlib.suppress(ConnectionRefusedError):
            connections.append(socket.create_connection(("127.0.0.1", port)))
            begun = time.monotonic()
    threads = [threading.Thread(target=behave, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
    output, errors = main_process.communicate(timeout=30)
    assert output.startswith(reason), errors
    assert time.monotonic() - begun < 5
    for thread in threads:
        thread.join()


def test_a_worker_that_reaches_another_program_tries_again():
    answers = [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"E" + bytes(8), HEADER.pack(b"E", 2) + b"{}"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        worker = join(1, server.getsockname()[1], 60)
        for answer in [*answers, HEADER.pack(b"V", 0)]:
            connection, _ = server.accept()
            with connection:
                length = HEADER.unpack(connection.recv(HEADER.size))[1]
                assert json.loads(connection.recv(length))["rank"] == 1
                connection.sendall(answer)
                if answer == HEADER.pack(b"V", 0):  # that is the main process
                    assert HEADER.unpack(connection.recv(HEADER.size)) == (b"V", 2)
                    assert connection.recv(2) == b"{}"
                    connection.sendall(HEADER.pack(b"V", 8) + b"[{}, {}]")
                    assert worker.communicate(timeout=30)[0] == "joined\n"


def test_a_worker_reports_another_program_at_the_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        worker = join(1, server.getsockname()[1], 2)
        while worker.poll() is None:
            server.settimeout(5)
            with contextlib.suppress(TimeoutError), server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                time.sleep(0.1)
        assert "at 127.0.0.1 port " in (line := worker.communicate()[0])
        assert ": another program answers. " in line


@in_make_test("pytorch")
def test_there_must_be_a_sample_for_each_worker(image_framework, tmp_path):
    for result in Workers(image_framework, 2, "--batch-size", 1, folder=tmp_path).finish(1):
        assert "2 workers" in result.error_line
        assert "expected a sample for each" in result.error_line


# A worker that receives a signal while it sends a long message, which the main process does not read yet.
STOPPED = """
import sys, threading
from common.distributed import Workers
workers = Workers(1, ["main", "other"])
workers.connect("127.0.0.1", int(sys.argv[1]), 30, True)
def stop():
    sys.stdin.readline()
    workers.stop(143, "Interrupted")
    print("stopping", flush=True)
threading.Thread(target=stop).start()
workers.all_gather("x" * 20_000_000)
"""


def test_a_signal_in_the_middle_of_a_message_does_not_truncate_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", STOPPED, str(server.getsockname()[1])]
        process = start_command(command, ROOT, stdin=subprocess.PIPE)
        connection, _ = server.accept()
        connection.settimeout(30)
        kind, length = HEADER.unpack(connection.recv(HEADER.size))
        hello = json.loads(connection.recv(length))
        assert (kind, hello) == (b"V", {"rank": 1, "names": ["main", "other"]})
        connection.sendall(HEADER.pack(b"V", 0))
        received = connection.recv(1)  # the message has started
        print(file=process.stdin, flush=True)
        assert process.stdout.readline().startswith("stopping")
        received += b"".join(iter(lambda: connection.recv(2**20), b""))
    message, end = json.dumps("x" * 20_000_000).encode(), json.dumps([143, "Interrupted"]).encode()
    expected = HEADER.pack(b"V", len(message)) + message + HEADER.pack(b"E", len(end)) + end
    assert received == expected
    assert process.wait(timeout=30) == 143


# Launchers and networks -------------------------------------------------------------------------------------


def test_torchrun_starts_the_same_training(tmp_path, whole):
    """Interrupted by SIGTERM, as a scheduler sends it to torchrun, and started again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += [str(ROOT / "pytorch/train.py"), *map(str, IMAGES)]
    folder = tmp_path / "1"
    folder.mkdir()
    with start_command(command, folder, worker_environment(), stderr=subprocess.DEVNULL) as process:
        for line in process.stdout:
            if line.startswith("epoch=2 "):
                process.send_signal(signal.SIGTERM)
                break
        output = process.stdout.read()
    assert process.returncode != 0
    saved = set(re.findall(r"Interrupted: saved (\S+), run the same command to resume", output))
    assert len(saved) == 1
    process = start_command(command, folder, worker_environment())
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert ", 2 workers: rank 0, rank 1; each gets 64 of the 128 samples of a batch\n" in output
    assert f"Resuming training from {saved.pop()}\n" in output
    assert_same(tmp_path, whole("pytorch", 2), "pytorch")


def test_sagemakers_toolkit_starts_the_same_training(tmp_path, whole):
    """Two containers of one job, laid out for `train` of sagemaker-training as the service does."""
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
        processes.append(start_command(["train"], base, env, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    expected = model_bytes(whole("pytorch", 2) / "1", "pytorch")
    model = compare.read_model(tmp_path / hosts[0] / "model")
    assert {**model, "model.json": b""} == {
        **expected,
        "model.json": b"",
    }  # it names the folder of checkpoints
    assert len(os.listdir(tmp_path / hosts[0] / "checkpoints")) == 4
    for folder in ("checkpoints", "model", "output/data"):
        assert not os.listdir(tmp_path / hosts[1] / folder)


@pytest.fixture
def two_networks():
    """Return two connected network namespaces as (name, address) pairs; both have an `eth0`."""
    suffix = uuid.uuid4().hex[:6]
    networks = [(f"host{number}-{suffix}", f"10.77.0.{number}") for number in (1, 2)]
    commands = [["ip", "netns", "add", name] for name, _ in networks]
    veth = ["ip", "link", "add", "eth0", "netns", networks[0][0], "type", "veth", "peer", "name", "eth0"]
    commands += [[*veth, "netns", networks[1][0]]]
    for name, address in networks:
        inside = ["ip", "-netns", name]
        commands += [[*inside, "addr", "add", f"{address}/24", "dev", "eth0"]]
        commands += [[*inside, "link", "set", "eth0", "up"], [*inside, "link", "set", "lo", "up"]]
    try:
        for command in commands:
            try:
                finished = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                pytest.skip(f"this machine has no `ip`: {error}")
            if finished.returncode != 0:
                pytest.skip(f"this user may not create a network: {finished.stderr}")
        yield networks
    finally:
        for name, _ in networks:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start_in_networks(networks, framework, *flags, folder):
    """Start a worker in each of the networks, as on two hosts; return the processes."""
    processes = []
    for number, (name, address) in enumerate(networks, start=1):
        variables = {"SM_HOSTS": json.dumps([address for _, address in networks]), "SM_CURRENT_HOST": address}
        cwd = folder / str(number)
        cwd.mkdir()
        script = [sys.executable, str(ROOT / framework / "train.py"), *map(str, flags)]
        env = {**worker_environment(**variables), "SM_NETWORK_INTERFACE_NAME": "eth0"}
        command = ["ip", "netns", "exec", name, *script]
        processes.append(start_command(command, cwd, env, stderr=subprocess.STDOUT))
    return processes


@in_make_test("xgboost")
def test_two_hosts_with_separate_networks(framework, tmp_path, whole, two_networks):
    processes = start_in_networks(two_networks, framework, *flags_of(framework), folder=tmp_path)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert_same(tmp_path, whole(framework, 2), framework)


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
        # The kernel's error depends on the data in flight.
        reason = r"\((Connection timed out|No route to host)\)"
        pattern = rf"error: {re.escape(other)} closed the connection without a reason {reason}"
        assert re.search(pattern, output)
