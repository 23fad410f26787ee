"""The promise: interrupted at any instant, the training ends with the same bits.

Here the interruptions come at chosen places, so that each run of the tests meets all of them; `make soak` interrupts at
random moments.
"""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common import checkpoints
from common import files as common_files
from conftest import CHECKPOINTS, ROOT, Result, checkpoint_name, environment, run, start
from test_scripts import LIMIT_FILE_SIZE, files, history, metrics, model_bytes, names

FLAGS = ["--epochs", 2, "--batch-size", 16, "--augment"]
STEPS = 102  # per epoch: 1,618 digits in batches of 16
TREES = ["--epochs", 30, "--subsample", 0.7, "--colsample-bytree", 0.5]

# Runs a script as its user does, but with something that happens at an exact place.
SCRIPT = """
import os, runpy, signal, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
from common import interruption
def at_call(owner, name, number, action):
    original, calls = getattr(owner, name), []
    def replacement(*args, **options):
        calls.append(args)
        if len(calls) == number:
            action()
        return original(*args, **options)
    setattr(owner, name, replacement)
def send(number):
    os.kill(os.getpid(), number)
{}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_with(happening, framework, *flags, cwd, code):
    """Run a script in which `happening`, a piece of Python, is prepared; return a Result."""
    command = [sys.executable, "-c", SCRIPT.format(happening), str(ROOT / framework / "train.py"), *map(str, flags)]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    result = Result(process, *process.communicate(timeout=300))
    assert result.code == code, f"exit code {result.code}\n{result.output}\n{result.errors}"
    assert "Traceback" not in result.errors, result.errors
    return result


def last_line(result):
    return result.output.splitlines()[-1]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Return the folder of a framework's run with these flags that nothing interrupted; each runs once."""
    folders = {}

    def folder_of(framework):
        if framework not in folders:
            folders[framework] = tmp_path_factory.mktemp(f"whole-{framework}")
            run(framework, *(TREES if framework == "xgboost" else FLAGS), cwd=folders[framework])
        return folders[framework]

    return folder_of


def assert_same_bits(folder, other, framework):
    assert history(folder, framework) == history(other, framework)
    assert model_bytes(folder, framework) == model_bytes(other, framework)


# Signals --------------------------------------------------------------------------------------------------------------


def test_sigterm_inside_an_epoch_loses_not_one_step(image_framework, tmp_path, whole):
    """Four interruptions: in the middle of an epoch, after its last step, in the validation, and while saving."""
    extension = checkpoint_name(image_framework, 1).split(".")[1]

    def interrupt(happening, *flags, code=143):
        return run_with(happening, image_framework, *FLAGS, *flags, cwd=tmp_path, code=code)

    in_step_38 = 'at_call(interruption, "check", 38, lambda: (send(signal.SIGTERM), send(signal.SIGINT)))'
    result = interrupt(in_step_38, "--workers", 0)
    saved = f"checkpoint-0-37.{extension}"
    assert "SIGTERM received: finishing the running step and saving\n" in result.output
    assert last_line(result) == f"Interrupted: saved {saved}, run the same command to resume"
    assert files(tmp_path, image_framework) == [saved]

    result = interrupt(f'at_call(interruption, "check", {STEPS - 37 + 1}, lambda: send(signal.SIGTERM))')
    assert f"Resuming training from {saved}\nStarting training from epoch: 1, step: 38\n" in result.output
    saved = f"checkpoint-0-{STEPS}.{extension}"
    assert last_line(result) == f"Interrupted: saved {saved}, run the same command to resume"

    result = interrupt('at_call(interruption, "check", 5, lambda: send(signal.SIGINT))', code=130)
    assert f"Resuming training from {saved}\n" in result.output
    assert last_line(result) == f"Interrupted: saved {saved}, run the same command to resume"
    assert result.epochs == []

    result = interrupt('at_call(os, "replace", 1, lambda: send(signal.SIGTERM))')
    assert result.epochs == [1]  # and some steps more, as the training does not wait for a save
    saved = re.fullmatch(r"Interrupted: saved (checkpoint-1(-\d+)?\.\w+), .*", last_line(result))[1]
    assert files(tmp_path, image_framework) == sorted({saved, checkpoint_name(image_framework, 1)})

    assert run(image_framework, *FLAGS, cwd=tmp_path).epochs == [2]
    assert_same_bits(tmp_path, whole(image_framework), image_framework)


def test_sigterm_ends_xgboost_after_the_running_round(tmp_path, whole):
    at_round_12 = 'at_call(interruption, "check", 12, lambda: (send(signal.SIGTERM), send(signal.SIGTERM)))'
    flags = [*TREES, "--checkpoint-steps", 5]
    result = run_with(at_round_12, "xgboost", *flags, cwd=tmp_path, code=143)
    assert last_line(result) == "Interrupted: saved xgboost-checkpoint.11, run the same command to resume"
    assert files(tmp_path, "xgboost") == names("xgboost", 5, 10, 12)
    result = run("xgboost", *flags, cwd=tmp_path)
    assert result.epochs == list(range(13, 31))
    assert files(tmp_path, "xgboost") == names("xgboost", 5, 10, 12, 15, 20, 25, 30)
    assert_same_bits(tmp_path, whole("xgboost"), "xgboost")


def test_a_signal_that_comes_again_and_again_does_not_change_the_end(framework, tmp_path):
    flags = ["--num-round" if framework == "xgboost" else "--epochs", 10**6, "--keep-checkpoints", 1]
    with start(framework, *flags, cwd=tmp_path) as process:
        try:
            while not process.stdout.readline().startswith("epoch=2 "):
                assert process.poll() is None
            while process.poll() is None:
                process.send_signal(signal.SIGTERM)
                time.sleep(0.01)
            result = Result(process, *process.communicate())
        finally:
            process.kill()
    assert process.returncode == 143
    assert last_line(result).startswith("Interrupted: saved ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_training_ends_the_script_at_once(framework, tmp_path, number, code):
    with start(framework, cwd=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("Device: "):
                process.send_signal(number)
                break
        output = process.stdout.read()
        errors = process.stderr.read()
    assert process.returncode == code
    assert output.splitlines()[-1] == "Interrupted: nothing new to save, run the same command to resume"
    assert "Traceback" not in errors
    assert files(tmp_path, framework) == []


def test_ctrl_c_on_a_pipe_whose_reader_dies_first_loses_no_step(framework, tmp_path):
    """As in `train.py | tee log`: the terminal's signal ends tee too, and the script has nobody to talk to."""
    flags = ["--epochs", 300, "--checkpoint-steps", 299] if framework == "xgboost" else [*FLAGS, "--epochs", 50]
    with start(framework, *flags, cwd=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("epoch=1 "):
                break
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130, errors
    assert "error" not in errors.lower() or framework == "tensorflow", errors
    assert files(tmp_path, framework)
    assert "Resuming training from" in run(framework, *flags, "--epochs", 2, cwd=tmp_path).output


def test_a_run_waits_for_the_end_of_another_one(tmp_path):
    with start("pytorch", "--epochs", 12, cwd=tmp_path) as first:
        assert first.stdout.readline().startswith("Device: ")
        second = run("pytorch", "--epochs", 12, cwd=tmp_path)
        assert "Waiting for the end of another run with --checkpoint-path output/pytorch/checkpoints" in second.output
        assert "Nothing left to train: 12 epochs" in second.output
        assert first.wait() == 0


def test_a_signal_during_the_export_lets_it_finish_and_still_says_interrupted(framework, tmp_path):
    in_export = 'from common import files\nat_call(files, "{}", {}, lambda: send(signal.SIGTERM))'
    exporter = "atomic_write" if framework in ("pytorch", "xgboost") else "atomic_export"
    in_export = in_export.format(exporter, 1 if exporter == "atomic_export" else 3)
    result = run_with(in_export, framework, "--epochs", 2, cwd=tmp_path, code=143)
    assert last_line(result) == "Interrupted: nothing new to save, run the same command to resume"
    assert metrics(tmp_path, framework)["epochs"] == 2
    assert "Nothing left to train" in run(framework, "--epochs", 2, cwd=tmp_path).output


# No warning -----------------------------------------------------------------------------------------------------------


def test_a_long_epoch_is_saved_by_time(image_framework, tmp_path):
    """Killed in its first epoch, which is long, the training has lost the last tenths of a second only."""
    flags = ["--epochs", 1, "--batch-size", 2, "--checkpoint-seconds", 0.2]
    with start(image_framework, *flags, cwd=tmp_path) as process:
        folder = tmp_path / "output" / image_framework / "checkpoints"
        while not folder.is_dir() or not checkpoints.find_checkpoints(folder, CHECKPOINTS[image_framework]):
            assert process.poll() is None, "the epoch is over, and nothing was saved inside it"
            time.sleep(0.01)
        process.kill()
    _, newest = checkpoints.find_checkpoints(folder, CHECKPOINTS[image_framework])[0]
    result = run(image_framework, *flags, cwd=tmp_path)
    assert f"Resuming training from {newest}\n" in result.output
    assert files(tmp_path, image_framework) == names(image_framework, 1)


def test_killed_while_saving_the_earlier_checkpoint_is_used_with_the_same_bits(framework, tmp_path, whole):
    flags = [*TREES, "--checkpoint-steps", 4] if framework == "xgboost" else [*FLAGS, "--checkpoint-steps", 30]
    kill = "lambda: send(signal.SIGKILL)"
    folder = tmp_path / "output" / framework / "checkpoints"

    def leftovers():
        return [path for path in folder.iterdir() if path.name.endswith(".sagemaker-ignore")]

    written = f'at_call(os, "replace", 3, {kill})'  # the third checkpoint is written, but does not have its name yet
    run_with(written, framework, *flags, cwd=tmp_path, code=-signal.SIGKILL)
    assert len(leftovers()) == 1
    unflushed = f'at_call(os, "fsync", 1, {kill})'
    run_with(unflushed, framework, *flags, cwd=tmp_path, code=-signal.SIGKILL)
    assert len(leftovers()) == 1
    result = run(framework, *flags, cwd=tmp_path)
    resumed = checkpoint_name(framework, 8) if framework == "xgboost" else "checkpoint-0-60."
    assert f"Resuming training from {resumed}" in result.output
    assert leftovers() == []
    assert "Cannot read" not in result.output
    assert_same_bits(tmp_path, whole(framework), framework)


SLOW_DISK = """
import time
from common import saving
original = saving._run
def write(*arguments):
    time.sleep(0.3)
    original(*arguments)
saving._run = write
"""


def test_what_is_written_is_the_state_of_the_save_however_far_the_training_has_come(image_framework, tmp_path, whole):
    """The training overwrites its state all the time: with another step's weights in it the bits would be others."""
    flags = [*FLAGS, "--checkpoint-steps", 90]
    second_is_there = 'at_call(os, "replace", 2, lambda: send(signal.SIGKILL))'
    run_with(SLOW_DISK + second_is_there, image_framework, *flags, cwd=tmp_path, code=-signal.SIGKILL)
    result = run(image_framework, *FLAGS, cwd=tmp_path)
    assert "Resuming training from checkpoint-0-90." in result.output
    assert_same_bits(tmp_path, whole(image_framework), image_framework)


def test_an_error_while_a_checkpoint_is_written_ends_the_training_at_one_of_the_next_steps(framework, tmp_path):
    flags = ["--epochs", 100000] if framework == "xgboost" else [*FLAGS, "--epochs", 1000]
    happening = 'def fail(): raise OSError(5, "Input/output error")\nat_call(os, "fsync", 1, fail)'
    line = run_with(happening, framework, *flags, "--checkpoint-steps", 1, cwd=tmp_path, code=1).error_line
    assert ": Input/output error. Earlier checkpoints are whole" in line


def test_a_write_that_is_cut_anywhere_harms_no_earlier_checkpoint(framework, tmp_path):
    """A limit of the file size cuts the write at any byte, in whatever library it happens."""
    run(framework, "--epochs", 1, cwd=tmp_path)
    earlier = tmp_path / "output" / framework / "checkpoints" / checkpoint_name(framework, 1)
    content = earlier.read_bytes()
    for limit in (1, 30, len(content) // 2, len(content) - 1):
        command = [
            sys.executable,
            "-c",
            LIMIT_FILE_SIZE,
            str(limit),
            str(ROOT / framework / "train.py"),
            "--epochs",
            "2",
        ]
        finished = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert finished.returncode == 1, finished.stdout + finished.stderr
        lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, finished.stderr
        path = f"output/{framework}/checkpoints/{checkpoint_name(framework, 2)}"
        assert f"cannot write {path}: File too large" in lines[0]
        assert "Traceback" not in finished.stderr
        assert files(tmp_path, framework) == names(framework, 1)
        assert earlier.read_bytes() == content
    for call in ("fsync", "replace"):  # after the write and before the rename
        happening = f'def fail(): raise OSError(5, "Input/output error")\nat_call(os, "{call}", 1, fail)'
        line = run_with(happening, framework, "--epochs", 2, cwd=tmp_path, code=1).error_line
        assert f"cannot write {path}: Input/output error" in line
        assert files(tmp_path, framework) == names(framework, 1)
    assert run(framework, "--epochs", 2, cwd=tmp_path).epochs == [2]


def test_a_full_disk_and_a_read_only_one(framework, tmp_path):
    run(framework, "--epochs", 1, cwd=tmp_path)
    folder = tmp_path / "output" / framework / "checkpoints"
    size = (folder / checkpoint_name(framework, 1)).stat().st_size
    small = tmp_path / "small"
    small.mkdir()
    options = f"size={size * 7 // 4}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"this machine lets nobody mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        shutil.copy(folder / checkpoint_name(framework, 1), small)
        flags = ["--epochs", 3, "--checkpoint-path", "small"]
        line = run(framework, *flags, cwd=tmp_path, code=1).error_line
        assert f"cannot write small/{checkpoint_name(framework, 2)}: No space left on device" in line
        assert os.listdir(small) == names(framework, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        line = run(framework, *flags, cwd=tmp_path, code=1).error_line
        assert "--checkpoint-path small cannot be written (Read-only file system)" in line
        subprocess.run(["mount", "-o", "remount,rw,size=100m", str(small)], check=True)
        assert run(framework, *flags, cwd=tmp_path).epochs == [2, 3]
    finally:
        subprocess.run(["umount", str(small)], check=True)


# What a checkpoint knows ----------------------------------------------------------------------------------------------


def test_another_number_of_threads_is_told_in_one_line(framework, tmp_path):
    threads = ["OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"]
    run(framework, "--epochs", 1, cwd=tmp_path, env=environment(**dict.fromkeys(threads, "2")))
    result = run(framework, "--epochs", 2, cwd=tmp_path, env=environment(**dict.fromkeys(threads, "1")))
    warnings = [line for line in result.output.splitlines() if line.startswith("Warning: ")]
    assert warnings == [
        "Warning: CPU threads was 2 and is now 1: the result will be equally good but not bit-identical"
    ]
    assert result.epochs == [2]


@pytest.mark.parametrize(
    ("flags", "warned"), [([], False), (["--subsample", 0.5], True), (["--booster", "dart", "--rate-drop", 0.1], True)]
)
def test_where_xgboost_cannot_go_on_exactly_one_line_says_so(tmp_path, flags, warned):
    run("xgboost", "--epochs", 2, *flags, cwd=tmp_path)
    older = 'import xgboost\nxgboost.__version__ = "3.2.0"'
    result = run_with(older, "xgboost", "--epochs", 3, *flags, cwd=tmp_path, code=0)
    assert ("Warning: before XGBoost 3.4 row and column samples" in result.output) is warned


def test_harmless_changes_pass_in_silence(framework, tmp_path):
    run(framework, "--epochs", 1, cwd=tmp_path)
    flags = ["--keep-checkpoints", 5, "--checkpoint-seconds", 9, "--keep-best", "--device", "cpu", "--num-gpus", 0]
    result = run(framework, "--epochs", 2, *flags, cwd=tmp_path)
    assert "Changed" not in result.output
    assert "Warning" not in result.output


def test_the_best_model_is_kept_and_exported_also_after_an_interruption(framework, tmp_path):
    """With a learning rate that is far too large, the best epoch is not the last."""
    bad = ["--eta", 1, "--max-depth", 1] if framework == "xgboost" else ["--learning-rate", 0.6, "--batch-size", 128]
    bad += ["--keep-checkpoints", 1]
    for epochs in (3, 8):
        run(framework, *bad, "--keep-best", "--epochs", epochs, cwd=tmp_path)
    rows = history(tmp_path, framework)
    accuracies = [float(row["validation_accuracy"]) for row in rows]
    best = 1 + accuracies.index(max(accuracies))
    assert metrics(tmp_path, framework)["best_epoch"] == best
    assert files(tmp_path, framework) == names(framework, *{best, 8})
    other = tmp_path / "other"
    other.mkdir()
    run(framework, *bad, "--epochs", best, cwd=other)
    assert model_bytes(tmp_path, framework) == model_bytes(other, framework)
    if best < 8:
        (tmp_path / "output" / framework / "checkpoints" / checkpoint_name(framework, best)).unlink()
        if framework != "xgboost":  # whose last checkpoint holds the trees of all rounds
            line = run(framework, *bad, "--keep-best", "--epochs", 8, cwd=tmp_path, code=1).error_line
            assert "--keep-best: the best checkpoint, " in line
            assert f"{checkpoint_name(framework, best)}, cannot be read" in line


# Hostile and damaged files --------------------------------------------------------------------------------------------


class Hostile:
    """Creates a file where its pickle is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def hostile_pytorch(path):
    """Write what `torch.save` writes of an object, but without importing PyTorch into the process of the tests."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"job": {}, "model": Hostile()}, protocol=2))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def hostile_tensorflow(path):
    code = "import sys, keras\nfrom pathlib import Path\n"
    code += "layer = keras.layers.Lambda(lambda x: Path('executed').touch() or x)\n"
    code += "keras.Sequential([keras.Input((1,)), layer]).save(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)
    Path("executed").unlink()  # Keras runs a layer once when it is made
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("checkpoint.json", pickle.dumps(Hostile()))


def hostile_mxnet(path):
    with open(path, "wb") as file:
        np.savez(file, json=np.array([Hostile()], dtype=object))


def hostile_xgboost(path):
    path.write_bytes(pickle.dumps(Hostile()) + b"}")


def test_a_flipped_bit_in_what_xgboost_says_of_itself_is_damage_too(tmp_path):
    run("xgboost", "--epochs", 3, cwd=tmp_path)
    path = tmp_path / "output/xgboost/checkpoints/xgboost-checkpoint.2"
    content = path.read_bytes()
    for old, new in ((b'"progress": {', b'"prxgress": {'), (b'"job": {', b'"job"; {'), (b'"epoch": 3', b'"epoch"; 3')):
        path.write_bytes(content.replace(old, new))
        result = run("xgboost", "--epochs", 3, cwd=tmp_path)
        assert "Cannot read xgboost-checkpoint.2, trying the one before" in result.output
        assert result.epochs == [3]


def test_keep_best_does_not_go_with_dart(tmp_path):
    line = run("xgboost", "--booster", "dart", "--keep-best", cwd=tmp_path, code=1).error_line
    assert "--keep-best: with --booster dart later rounds change earlier trees" in line


@pytest.mark.parametrize("sealed", [False, True])
def test_a_hostile_checkpoint_executes_nothing(framework, tmp_path, monkeypatch, sealed):
    monkeypatch.chdir(tmp_path)
    run(framework, "--epochs", 1, cwd=tmp_path)
    path = tmp_path / "output" / framework / "checkpoints" / checkpoint_name(framework, 7)
    if sealed:  # a plain pickle with a right checksum in it
        path.write_bytes(common_files.seal(bytearray(pickle.dumps([Hostile(), common_files.UNSEALED]))))
    else:
        globals()[f"hostile_{framework}"](path)
    result = run(framework, "--epochs", 2, cwd=tmp_path)
    assert re.search(rf"^Cannot read {re.escape(path.name)}, trying the one before", result.output, re.MULTILINE)
    assert result.epochs == [2]
    assert path.with_name(path.name + ".damaged").exists()
    assert not (tmp_path / "executed").exists()
    for other in names(framework, 1, 2):
        path.with_name(other).unlink()
    path.with_name(path.name + ".damaged").rename(path)
    assert "none of the checkpoints" in run(framework, "--epochs", 2, cwd=tmp_path, code=1).error_line
    assert not (tmp_path / "executed").exists()


FLIP_BITS = """
import sys
import numpy as np
import torch
import train
from common import checkpoints
from pathlib import Path
folder = Path(sys.argv[1])
weights = torch.arange(1000.0)
torch.save({"job": {"--model": "cnn"}, "model": {"weight": weights}}, folder / "checkpoint-1.pt")
content = (folder / "checkpoint-1.pt").read_bytes()
generator = np.random.default_rng()
for position in generator.integers(0, len(content), 300):
    damaged = bytearray(content)
    damaged[position] ^= 1 << int(generator.integers(0, 8))
    (folder / "checkpoint-2.pt").write_bytes(damaged)
    path, checkpoint = checkpoints.read_newest_checkpoint(folder, train.CHECKPOINT, train.read_checkpoint)
    assert torch.equal(checkpoint["model"]["weight"], weights), position
    print(path.name)
"""


def test_a_flipped_bit_anywhere_is_found_or_does_no_harm(tmp_path):
    """PyTorch's file, where a wrong weight would do its harm in silence; the others have checksums of the same kind."""
    command = [sys.executable, "-c", FLIP_BITS, str(tmp_path)]
    output = subprocess.check_output(command, cwd=ROOT / "pytorch", env=environment(), text=True)
    used = [line for line in output.splitlines() if line.startswith("checkpoint-")]
    assert len(used) == 300
    assert used.count("checkpoint-1.pt") > 100
