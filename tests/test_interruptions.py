"""A training that is interrupted at any instant is bit-identical to an uninterrupted one.

These interruptions are at fixed places, so that each test run covers all of them; those of
`test_random_interruptions.py` are at random moments.
"""

import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from common import atomic_io, checkpoints, datasets
from common.flags import image_flags
from common.images import load_images
from helpers import (
    CHECKPOINTS,
    EPOCHS,
    INTERRUPTIBLE,
    ROOT,
    STEPS,
    Result,
    assert_same_bits,
    checkpoint_folder,
    checkpoint_name,
    copy_checkpoints,
    environment,
    files,
    finish,
    history,
    in_make_test,
    metrics,
    model_bytes,
    names,
    run,
    run_many,
    run_python,
    run_with,
    save_images,
    start,
)

# Signals ----------------------------------------------------------------------------------------------------


def test_sigterm_inside_an_epoch_loses_no_step(image_framework, tmp_path, interruptible):
    """Interrupt in the middle of an epoch, after its last step, in the validation, and during a save."""
    extension = checkpoint_name(image_framework, 1).split(".")[1]

    def interrupt(event, *flags, code=143):
        all_flags = [*INTERRUPTIBLE[image_framework], *flags]
        return run_with(event, image_framework, *all_flags, cwd=tmp_path, code=code)

    in_step_37 = 'at_call(Run, "finish_step", 37, lambda: (send(signal.SIGTERM), send(signal.SIGINT)))'
    result = interrupt(in_step_37, "--loaders", 2)
    saved = f"checkpoint-0-37.{extension}"
    assert "SIGTERM received: finishing the running step and saving\n" in result.output
    assert result.last_line == f"Interrupted: saved {saved}, run the same command to resume"
    assert files(tmp_path, image_framework) == [saved]

    result = interrupt(f'at_call(Run, "finish_step", {STEPS - 37}, lambda: send(signal.SIGTERM))')
    assert f"Resuming training from {saved}\nStarting training from epoch: 1, step: 38\n" in result.output
    saved = f"checkpoint-0-{STEPS}.{extension}"
    assert result.last_line == f"Interrupted: saved {saved}, run the same command to resume"

    result = interrupt('at_call(Run, "finish_validation_step", 5, lambda: send(signal.SIGINT))', code=130)
    assert f"Resuming training from {saved}\n" in result.output
    assert result.last_line == f"Interrupted: saved {saved}, run the same command to resume"
    assert result.epochs == []

    result = interrupt('at_call(os, "replace", 1, lambda: send(signal.SIGTERM))')
    assert result.epochs == [1]  # and a few more steps, because the training does not wait for a save
    pattern = r"Interrupted: saved (checkpoint-1(-\d+)?\.\w+), .*"
    saved = re.fullmatch(pattern, result.last_line)[1]
    assert files(tmp_path, image_framework) == sorted({saved, checkpoint_name(image_framework, 1)})

    assert run(image_framework, *INTERRUPTIBLE[image_framework], cwd=tmp_path).epochs == [2]
    assert_same_bits(tmp_path, interruptible(image_framework), image_framework)


def test_sigterm_ends_xgboost_after_the_current_round(tmp_path, interruptible):
    in_round_12 = 'at_call(Run, "finish_round", 12, lambda: (send(signal.SIGTERM), send(signal.SIGTERM)))'
    flags = [*INTERRUPTIBLE["xgboost"], "--checkpoint-steps", 5]
    result = run_with(in_round_12, "xgboost", *flags, cwd=tmp_path, code=143)
    assert result.last_line == "Interrupted: saved xgboost-checkpoint.11, run the same command to resume"
    assert files(tmp_path, "xgboost") == names("xgboost", 5, 10, 12)
    result = run("xgboost", *flags, cwd=tmp_path)
    assert result.epochs == list(range(13, 31))
    assert files(tmp_path, "xgboost") == names("xgboost", 5, 10, 12, 15, 20, 25, 30)
    assert_same_bits(tmp_path, interruptible("xgboost"), "xgboost")


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_other_signals_of_schedulers_and_terminals_also_save(name, tmp_path, interruptible):
    number = signal.Signals[name]
    event = f"signal.signal(signal.{name}, signal.SIG_DFL)\n"  # also if the tests run under nohup
    event += f'at_call(Run, "finish_round", 12, lambda: send(signal.{name}))'
    flags = INTERRUPTIBLE["xgboost"]
    result = run_with(event, "xgboost", *flags, cwd=tmp_path, code=128 + number)
    assert f"{name} received: finishing the running step and saving\n" in result.output
    assert result.last_line == "Interrupted: saved xgboost-checkpoint.11, run the same command to resume"
    assert run("xgboost", *flags, cwd=tmp_path).epochs == list(range(13, 31))
    assert_same_bits(tmp_path, interruptible("xgboost"), "xgboost")


def test_nohup_is_respected(tmp_path):
    event = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    event += 'at_call(Run, "finish_round", 3, lambda: send(signal.SIGHUP))'
    assert run_with(event, "xgboost", "--epochs", 5, cwd=tmp_path, code=0).epochs == [1, 2, 3, 4, 5]


def test_stop_after_saves_and_has_its_own_exit_code(tmp_path, interruptible):
    """The timer is set to the value of the flag; the test lets it expire after 12 rounds."""
    event = "def expire():\n"
    event += "    assert 3000 < signal.getitimer(signal.ITIMER_REAL)[0] <= 3600\n"
    event += "    signal.setitimer(signal.ITIMER_REAL, 1e-6); time.sleep(0.01)\n"
    event += 'at_call(Run, "finish_round", 12, expire)'
    flags = INTERRUPTIBLE["xgboost"]
    result = run_with(event, "xgboost", *flags, "--stop-after", "1h", cwd=tmp_path, code=75)
    assert "The time of --stop-after has passed: finishing the running step and saving\n" in result.output
    assert result.last_line == "Interrupted: saved xgboost-checkpoint.11, run the same command to resume"
    result = run("xgboost", *flags, "--stop-after", "1h", cwd=tmp_path)
    assert "Changed since" not in result.output
    assert_same_bits(tmp_path, interruptible("xgboost"), "xgboost")


@in_make_test("pytorch", "xgboost")
def test_repeated_signals_do_not_change_the_result(framework, tmp_path):
    with start(framework, "--epochs", 10**6, "--keep-checkpoints", 1, cwd=tmp_path) as process:
        try:
            while not process.stdout.readline().startswith("epoch=2 "):
                assert process.poll() is None
            while process.poll() is None:
                process.send_signal(signal.SIGTERM)
                time.sleep(0.01)
            result = Result(process, *process.communicate())
        finally:
            process.kill()
    assert result.code == 143
    assert result.last_line.startswith("Interrupted: saved ")


EARLY = {
    "pytorch": signal.SIGTERM,
    "tensorflow": signal.SIGTERM,
    "mxnet": signal.SIGINT,
    "xgboost": signal.SIGINT,
}


def test_a_signal_before_the_training_ends_the_script_immediately(framework, tmp_path):
    with start(framework, cwd=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("Device: "):
                process.send_signal(EARLY[framework])
                break
        result = finish(process, code=128 + EARLY[framework])
    assert result.last_line == "Interrupted: nothing new to save, run the same command to resume"
    assert "Traceback" not in result.errors
    assert files(tmp_path, framework) == []


@in_make_test("pytorch", "xgboost")
def test_ctrl_c_that_also_ends_the_reader_of_a_pipe_loses_no_step(framework, tmp_path):
    """As in `train.py | tee log`: the signal of the terminal also ends tee, which reads the output."""
    flags = ["--epochs", 300, "--checkpoint-steps", 299] if framework == "xgboost" else ["--epochs", 50]
    with start(framework, *flags, cwd=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("epoch=1 "):
                break
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130, errors
    assert "error" not in errors.lower() or framework == "tensorflow", errors
    folder = checkpoint_folder(tmp_path, framework)
    newest, _ = checkpoints.find_checkpoints(folder, CHECKPOINTS[framework])[0]
    epochs = newest[0] + (newest[1] > 0 or framework == "xgboost")
    assert 0 < epochs < flags[1]
    result = run(framework, *flags, "--epochs", epochs, cwd=tmp_path)
    assert "Resuming training from" in result.output


@in_make_test("pytorch")
def test_an_unreadable_image_loses_no_step(image_framework, tmp_path):
    """It ends the training in the first epoch, before all images are decoded.

    The mean and the standard deviation then come from the checkpoint.
    """
    pixels, labels = load_digits().images[:600] * 15, load_digits().target[:600]
    save_images(tmp_path / "digits", pixels.astype(np.uint8), labels)
    flags = ["--train", "../digits", "--batch-size", 32, "--epochs", 1, "--augment"]
    (tmp_path / "whole").mkdir()
    run(image_framework, *flags, cwd=tmp_path / "whole")
    images = load_images(image_flags(image_framework).parse_args(["--train", str(tmp_path / "digits")]))[0]
    for_statistics = set(datasets.spread(len(images), datasets.STATISTICS_SAMPLES))
    row = next(index for index in range(len(images)) if index not in for_statistics)
    broken = tmp_path / "digits" / images.images.source.names[images.indices[row]]
    content = broken.read_bytes()
    broken.write_bytes(content[:50])
    (tmp_path / "broken").mkdir()
    result = run(image_framework, *flags, cwd=tmp_path / "broken", code=1)
    name = f"{broken.parent.name}/{broken.name}"
    assert f"error: cannot read the image ../digits/{name}: " in result.errors
    saved = result.last_line.removeprefix("Saved ")
    assert (checkpoint_folder(tmp_path / "broken", image_framework) / saved).is_file()
    broken.write_bytes(content)
    no_statistics = "from common import datasets; replace(datasets, 'channel_statistics', None)"
    result = run_with(no_statistics, image_framework, *flags, cwd=tmp_path / "broken", code=0)
    assert f"Resuming training from {saved}" in result.output
    assert_same_bits(tmp_path / "broken", tmp_path / "whole", image_framework)


def test_a_run_waits_for_another_run_to_finish(tmp_path):
    with start("pytorch", "--epochs", 60, cwd=tmp_path) as first:
        assert first.stdout.readline().startswith("Device: ")
        second = run("pytorch", "--epochs", 60, cwd=tmp_path)
        expected = (
            "Another run is using --checkpoint-path output/pytorch/checkpoints; waiting for it to finish\n"
        )
        assert expected in second.output
        assert "Nothing left to train: epoch 60 is finished" in second.output
        assert first.wait() == 0


@in_make_test("pytorch", "xgboost")
def test_a_signal_during_or_after_the_export_does_not_stop_the_training(framework, tmp_path, uninterrupted):
    """The exit code is 0 even while Python shuts down and removes its handlers."""
    epochs = EPOCHS[framework]
    copy_checkpoints(uninterrupted(framework), tmp_path, framework, epochs)
    late = "[send(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]"
    event = 'at_call(Run, "export", 1, lambda: send(signal.SIGTERM))\n'
    event += f"import atexit; atexit.register(lambda: {late})\n"
    event += f'at_call(Run, "__exit__", 1, lambda: {late})'
    result = run_with(event, framework, "--epochs", epochs, cwd=tmp_path, code=0)
    assert "\nModel: " in result.output
    assert "Interrupted" not in result.output
    assert metrics(tmp_path, framework)["epochs"] == epochs
    assert_same_bits(tmp_path, uninterrupted(framework), framework)


# Without a signal -------------------------------------------------------------------------------------------


@in_make_test("pytorch")
def test_a_long_epoch_is_saved_at_intervals(image_framework, tmp_path):
    """A training that is killed in its long first epoch loses only the last tenths of a second."""
    flags = ["--epochs", 1, "--batch-size", 2, "--checkpoint-seconds", 0.2]
    folder = checkpoint_folder(tmp_path, image_framework)
    with start(image_framework, *flags, cwd=tmp_path) as process:
        while not folder.is_dir() or not checkpoints.find_checkpoints(folder, CHECKPOINTS[image_framework]):
            assert process.poll() is None, "the epoch is over, and nothing was saved inside it"
            time.sleep(0.01)
        process.kill()
    _, newest = checkpoints.find_checkpoints(folder, CHECKPOINTS[image_framework])[0]
    result = run(image_framework, *flags, cwd=tmp_path)
    assert f"Resuming training from {newest}\n" in result.output
    assert files(tmp_path, image_framework) == names(image_framework, 1)


def test_the_time_between_saves_is_logged_once(tmp_path):
    event = "from common import async_save; async_save.MAX_SECONDS = 0.05"
    result = run_with(event, "pytorch", "--epochs", 3, "--batch-size", 8, cwd=tmp_path, code=0)
    line = r"^Saving every 0 seconds: a save stops the training for [\d.]+ ms and writes 0\.\d MB$"
    assert len(re.findall(line, result.output, re.MULTILINE)) == 1


SLOW_DISK = """
from common.checkpoints import Checkpoints
original = Checkpoints.write
def write(*arguments):
    time.sleep(0.3)
    return original(*arguments)
Checkpoints.write = write
"""


def test_after_a_kill_during_a_save_the_earlier_checkpoint_is_used(framework, tmp_path, interruptible):
    """The checkpoint contains the state at the save, even if a slow disk delays the write."""
    flags = [*INTERRUPTIBLE[framework], "--checkpoint-steps", 4 if framework == "xgboost" else 30]
    kill = "lambda: send(signal.SIGKILL)"
    folder = checkpoint_folder(tmp_path, framework)

    def leftovers():
        return [path for path in folder.iterdir() if path.name.endswith(".sagemaker-ignore")]

    # The third checkpoint is written, but not renamed yet.
    written = SLOW_DISK + f'at_call(os, "replace", 3, {kill})'
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
    assert_same_bits(tmp_path, interruptible(framework), framework)


def test_a_write_that_takes_an_epoch_saves_only_the_epochs_before(tmp_path):
    """TensorFlow's copy of the training state shares everything but the arrays."""
    slow = "import threading; from common.checkpoints import Checkpoints; saved = threading.Event(); "
    slow += 'at_call(Checkpoints, "write", 1, lambda: saved.wait(60)); at_call(Run, "save", 2, saved.set)'
    second = checkpoint_folder(tmp_path, "tensorflow") / checkpoint_name("tensorflow", 2)
    jobs = [(tmp_path, ["--epochs", 2], slow), (tmp_path, ["--epochs", 2], f"os.unlink({str(second)!r})")]
    whole, resumed = run_many("tensorflow", jobs, cwd=tmp_path)
    assert (whole.code, whole.epochs) == (0, [1, 2])
    assert f"Resuming training from {checkpoint_name('tensorflow', 1)}" in resumed.output
    assert resumed.epochs == [2]


@in_make_test("tensorflow", "xgboost")
def test_a_write_error_ends_the_training_at_one_of_the_next_steps(framework, tmp_path):
    flags = ["--epochs", 100000] if framework == "xgboost" else [*INTERRUPTIBLE[framework], "--epochs", 1000]
    event = 'at_call(os, "fsync", 1, fail)'
    result = run_with(event, framework, *flags, "--checkpoint-steps", 1, cwd=tmp_path, code=1)
    assert ": Input/output error. Earlier checkpoints are intact" in result.error_line


@in_make_test("pytorch", "xgboost")
def test_a_failed_write_does_not_damage_earlier_checkpoints(framework, tmp_path, uninterrupted):
    """A file size limit truncates the write at any byte, in any library."""
    first = checkpoint_folder(uninterrupted(framework), framework) / checkpoint_name(framework, 1)
    content = first.read_bytes()
    reasons = {}
    for limit in (1, 30, len(content) // 2, len(content) - 1):
        reasons[f"limit_file_size({limit})"] = "File too large"
    for call in ("fsync", "replace"):  # between the write and the rename
        reasons[f'at_call(os, "{call}", 1, fail)'] = "Input/output error"
    jobs = []
    for number, event in enumerate(reasons):
        folder = copy_checkpoints(uninterrupted(framework), tmp_path / str(number), framework, 1)
        jobs.append((folder, ["--epochs", 2], event))
    results = run_many(framework, [*jobs, (jobs[0][0], ["--epochs", 2])], cwd=tmp_path)
    path = f"output/{framework}/checkpoints/{checkpoint_name(framework, 2)}"
    for (folder, _, event), result in zip(jobs, results):
        assert result.code == 1
        assert f"cannot write {path}: {reasons[event]}" in result.error_line
        expected = names(framework, 1, 2) if folder is jobs[0][0] else names(framework, 1)
        assert files(folder, framework) == expected
        assert (checkpoint_folder(folder, framework) / first.name).read_bytes() == content
    assert results[-1].epochs == [2]


@in_make_test("pytorch", "xgboost")
def test_a_full_and_a_read_only_disk(framework, tmp_path, uninterrupted):
    copy_checkpoints(uninterrupted(framework), tmp_path, framework, 1)
    first = checkpoint_folder(tmp_path, framework) / checkpoint_name(framework, 1)
    small = tmp_path / "small"
    small.mkdir()
    options = f"size={first.stat().st_size * 7 // 4}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(small)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.strip()}")
    flags = ["--epochs", 3, "--checkpoint-path", "small"]

    def remounted(options):
        return (
            f"import subprocess\nsubprocess.run(['mount', '-o', 'remount,{options}', '{small}'], check=True)"
        )

    try:
        shutil.copy(first, small)
        jobs = [
            (tmp_path, flags),
            (tmp_path, flags, remounted("ro")),
            (tmp_path, flags, remounted("rw,size=100m")),
        ]
        full, read_only, repaired = run_many(framework, jobs, cwd=tmp_path)
        reason = f"cannot write small/{checkpoint_name(framework, 2)}: No space left on device"
        assert reason in full.error_line
        assert "--checkpoint-path small cannot be written (Read-only file system)" in read_only.error_line
        assert repaired.epochs == [2, 3]
        assert sorted(os.listdir(small)) == names(framework, 1, 2, 3)
    finally:
        subprocess.run(["umount", str(small)], check=True)


# Metadata of a checkpoint -----------------------------------------------------------------------------------


@in_make_test("pytorch", "xgboost")
def test_a_changed_number_of_threads_is_reported_in_one_line(framework, tmp_path, uninterrupted):
    copy_checkpoints(uninterrupted(framework), tmp_path, framework, 1)
    threads = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
    result = run(framework, "--epochs", 2, cwd=tmp_path, env=environment(**threads))
    warnings = [line for line in result.output.splitlines() if line.startswith("Warning: ")]
    pattern = (
        r"Warning: CPU threads was \d+ and is now 1: the result will be equally good but not bit-identical"
    )
    assert len(warnings) == 1
    assert re.fullmatch(pattern, warnings[0])
    assert result.epochs == [2]


SAMPLING = [([], False), (["--subsample", 0.5], True), (["--booster", "dart", "--rate-drop", 0.1], True)]


def test_one_line_warns_if_xgboost_cannot_resume_exactly(tmp_path):
    for number, (flags, warned) in enumerate(SAMPLING):
        folder = tmp_path / str(number)
        folder.mkdir()
        run("xgboost", "--epochs", 2, *flags, cwd=folder)
        older = 'import xgboost\nxgboost.__version__ = "3.2.0"'
        result = run_with(older, "xgboost", "--epochs", 3, *flags, cwd=folder, code=0)
        assert ("Warning: XGBoost before 3.4 draws different row" in result.output) is warned


@in_make_test("pytorch", "xgboost")
def test_harmless_changes_are_not_reported(framework, tmp_path, uninterrupted):
    copy_checkpoints(uninterrupted(framework), tmp_path, framework, 1)
    flags = ["--keep-checkpoints", 5, "--checkpoint-seconds", 9, "--best-metric", "accuracy", "--patience", 3]
    flags += ["--device", "cpu", "--num-gpus", 0]
    result = run(framework, "--epochs", 2, *flags, cwd=tmp_path)
    assert "Resuming" in result.output
    assert "Changed" not in result.output
    assert "Warning" not in result.output


# The best epoch ---------------------------------------------------------------------------------------------


@in_make_test("pytorch", "xgboost")
def test_the_best_epoch_is_exported_and_patience_works_after_a_restart(framework, tmp_path):
    """With a learning rate that is far too large, the best epoch is not the last."""
    bad = ["--learning-rate", 0.6, "--batch-size", 128]
    if framework == "xgboost":
        bad = ["--eta", 1, "--max-depth", 1]
    flags = [*bad, "--best-metric", "accuracy", "--patience", 3, "--epochs", 60]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for folder in (parts, whole):
        folder.mkdir()
    name = "finish_round" if framework == "xgboost" else "finish_epoch"
    event = f'at_call(Run, "{name}", 2, lambda: send(signal.SIGTERM))'
    run_with(event, framework, *flags, "--keep-checkpoints", 1, cwd=parts, code=143)
    resumed = run(framework, *flags, "--keep-checkpoints", 1, cwd=parts)
    rows = history(parts, framework)
    accuracies = [float(row["validation_accuracy"]) for row in rows]
    best = 1 + accuracies.index(max(accuracies))
    assert len(rows) == best + 3 < 60
    stopping = f"Stopping early: no better validation_accuracy since epoch {best} (--patience 3)\n"
    assert stopping in resumed.output
    exported = metrics(parts, framework)
    assert (exported["epoch"], exported["epochs"]) == (best, best + 3)
    assert exported["validation_accuracy"] == pytest.approx(max(accuracies))
    assert re.search(rf"^Model: .*, of epoch {best}$", resumed.output, re.MULTILINE)
    assert files(parts, framework) == names(framework, best, best + 3)

    jobs = [(whole, flags), (parts, [*flags, "--keep-checkpoints", 1])]
    unbroken, again = run_many(framework, jobs, cwd=tmp_path)
    assert stopping in unbroken.output
    assert again.epochs == []
    assert stopping in again.output
    assert_same_bits(parts, whole, framework)
    only_best = tmp_path / "best"
    only_best.mkdir()
    missing = checkpoint_folder(parts, framework) / checkpoint_name(framework, best)
    missing.unlink()
    jobs = [(only_best, [*bad, "--epochs", best]), (parts, flags)]
    reference, without = run_many(framework, jobs, cwd=tmp_path)
    assert reference.epochs == list(range(1, best + 1))
    assert model_bytes(whole, framework) == model_bytes(only_best, framework)
    if framework != "xgboost":  # XGBoost's last checkpoint contains all trees
        assert "--best-metric: the best checkpoint, " in without.error_line
        assert f"{missing.name}, cannot be read" in without.error_line


# Events that change the model but keep the shapes of the checkpoint.
OTHER_STRUCTURES = {
    "pytorch": {
        "activation": "replace(train.nn, 'ReLU', train.nn.GELU)",
        "order": """
def reversed_parameters(args, model, build=train.build_optimizer):
    optimizer = build(args, model)
    optimizer.param_groups[0]["params"].reverse()
    return optimizer
replace(train, "build_optimizer", reversed_parameters)
""",
    },
    "tensorflow": {"activation": "replace(train.layers, 'ReLU', lambda: train.layers.Activation('gelu'))"},
    "mxnet": {
        "activation": "replace(train.nn, 'Activation', lambda _, kind=train.nn.Activation: kind('tanh'))"
    },
}
# Keras numbers the layer names across models.
SAME_STRUCTURE = """
def second_model(args, data, build=train.build_model):
    build(args, data)
    return build(args, data)
replace(train, "build_model", second_model)
"""


def test_a_changed_model_structure_is_rejected(image_framework, tmp_path, uninterrupted):
    """The weights would fit; in PyTorch, the momentum would be used for other weights of the same shape."""
    jobs = []
    events = {"same": SAME_STRUCTURE, **OTHER_STRUCTURES[image_framework]}
    for name, event in events.items():
        folder = copy_checkpoints(uninterrupted(image_framework), tmp_path / name, image_framework, 1)
        jobs.append((folder, ["--epochs", 2], event))
    jobs.append((jobs[1][0], ["--epochs", 2, "--resume-anyway"], events["activation"]))
    env = environment(PYTHONHASHSEED="7")
    same, *others, anyway = run_many(image_framework, jobs, cwd=tmp_path, env=env)
    assert same.epochs == [2]
    for other in others:
        assert re.search(
            r"belongs to another job: structure of the model was [0-9a-f]{8} and is now [0-9a-f]{8}\. "
            "Use the same flags, data and model again, or pass another --output, or --resume-anyway",
            other.error_line,
        )
    assert "Changed since" in anyway.output
    assert anyway.epochs == [2]


def test_a_parameter_changed_in_the_code_is_logged_like_a_flag(tmp_path, uninterrupted):
    event = """
replace(train, "build_params", lambda *a, build=train.build_params: {**build(*a), "max_depth": 3})
"""
    names_of_jobs = ("same", "other", "flag")
    folders = [
        copy_checkpoints(uninterrupted("xgboost"), tmp_path / name, "xgboost", 2) for name in names_of_jobs
    ]
    flags = ["--epochs", 3]
    jobs = [(folders[0], flags), (folders[1], flags, event), (folders[2], [*flags, "--max-depth", 3])]
    same, *others = run_many("xgboost", jobs, cwd=tmp_path)
    assert "Changed since" not in same.output
    for other in others:
        assert other.output.count("--max-depth was 6 and is now 3") == 1
        assert other.epochs == [3]


# Hostile and damaged files ----------------------------------------------------------------------------------


class Hostile:
    """Create a file if its pickle is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def hostile_pytorch(path):
    """Write an object in the format of `torch.save`, without importing PyTorch."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"job": {}, "model": Hostile()}, protocol=2))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


LAMBDA = """
import os, sys, keras
from pathlib import Path
layer = keras.layers.Lambda(lambda x: Path("executed").touch() or x)
keras.Sequential([keras.Input((1,)), layer]).save(sys.argv[1])
Path("executed").unlink()  # Keras runs a layer once when it is created
"""


def pickled_array():
    """Return the content of a .npy file with a pickled object."""
    file = io.BytesIO()
    np.save(file, np.array([Hostile()], dtype=object))
    return file.getvalue()


def hostile_tensorflow(path):
    run_python(LAMBDA, path, cwd=path.parent)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("training/state.json", '{"progress": {"epoch": 7, "step": 0}, "names": {}}')
        archive.writestr("training/model/0.npy", pickled_array())


def hostile_mxnet(path):
    """Write a pickle followed by a valid checksum."""
    content = pickle.dumps(Hostile())
    path.write_bytes(content + f"CRC-32: {zlib.crc32(content):08x}".encode())


def hostile_xgboost(path):
    path.write_bytes(pickle.dumps(Hostile()) + b"}")


def sealed(path):
    """Write a plain pickle that contains a valid checksum."""
    with open(path, "wb") as file:
        atomic_io.write_sealed(bytearray(pickle.dumps([Hostile(), atomic_io.UNSEALED])), file)


FOREIGN = """
import sys, torch
torch.save({"weights": torch.zeros(3)}, sys.argv[1])
"""


def foreign_pytorch(path):
    """Write a PyTorch file that is not a checkpoint."""
    run_python(FOREIGN, path, cwd=path.parent)


HOSTILE = {
    "pytorch": [hostile_pytorch, sealed, foreign_pytorch],
    "tensorflow": [hostile_tensorflow, sealed],
    "mxnet": [hostile_mxnet, sealed],
    "xgboost": [hostile_xgboost, sealed],
}


def test_a_hostile_checkpoint_executes_nothing(framework, tmp_path, uninterrupted):
    """It is renamed if an earlier checkpoint exists; otherwise the training does not start."""
    name = checkpoint_name(framework, 7)
    jobs = []
    for make in HOSTILE[framework]:
        beside = copy_checkpoints(uninterrupted(framework), tmp_path / make.__name__, framework, 1)
        make(checkpoint_folder(beside, framework) / name)
        alone = tmp_path / f"{make.__name__}-alone"
        checkpoint_folder(alone, framework).mkdir(parents=True)
        shutil.copy(checkpoint_folder(beside, framework) / name, checkpoint_folder(alone, framework))
        jobs += [(beside, ["--epochs", 2]), (alone, ["--epochs", 2])]
    results = iter(run_many(framework, jobs, cwd=tmp_path))
    for beside, alone in zip(results, results):
        assert re.search(
            rf"^Cannot read {re.escape(name)}, trying the one before", beside.output, re.MULTILINE
        )
        assert beside.epochs == [2]
        assert "none of the checkpoints" in alone.error_line
    for number, (folder, _) in enumerate(jobs):
        kept = f"{name}.damaged" if number % 2 == 0 else name
        assert (checkpoint_folder(folder, framework) / kept).is_file()
    assert not list(tmp_path.rglob("executed"))


def test_a_flipped_bit_in_the_xgboost_metadata_is_detected(tmp_path, uninterrupted):
    changes = [
        (b'"progress": {', b'"prxgress": {'),
        (b'"job": {', b'"job"; {'),
        (b'"epoch": 3', b'"epoch"; 3'),
    ]
    jobs = []
    for number, (old, new) in enumerate(changes):
        folder = copy_checkpoints(uninterrupted("xgboost"), tmp_path / str(number), "xgboost", 2, 3)
        path = checkpoint_folder(folder, "xgboost") / "xgboost-checkpoint.2"
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))
        jobs.append((folder, ["--epochs", 3]))
    tree = copy_checkpoints(uninterrupted("xgboost"), tmp_path / "tree", "xgboost", 2, 3)
    path = checkpoint_folder(tree, "xgboost") / "xgboost-checkpoint.2"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    jobs.append((tree, ["--epochs", 3]))
    for result in run_many("xgboost", jobs, cwd=tmp_path):
        assert "Cannot read xgboost-checkpoint.2, trying the one before" in result.output
        assert result.epochs == [3]
    assert "ValueError: its checksum is wrong" in result.output


# Writes the file of SageMaker's own container and damaged variants. XGBoost crashes when it reads "length" or
# "nested".
CONTAINER = """
import json, sys
from pathlib import Path
import xgboost
source, folder = map(Path, sys.argv[1:])
booster = xgboost.Booster(model_file=bytearray(source.read_bytes()))
booster.set_attr(checkpoint=None)
content = bytes(booster.save_raw("ubj"))
(folder / "whole").write_bytes(content)
start = content.index(b"tree_param{L") + len(b"tree_param{L")
longer = content[start + 4] | 1
(folder / "length").write_bytes(content[: start + 4] + bytes([longer]) + content[start + 5 :])
(folder / "nested").write_bytes(b'{"a":' * 300_000 + b"1" + b"}" * 300_000)
facts = json.loads(booster.save_raw("json"))
facts["learner"]["gradient_booster"]["model"]["trees"][0]["left_children"][0] = 10**6
(folder / "outside").write_text(json.dumps(facts))
"""


def test_a_damaged_file_of_sagemakers_container_is_skipped(tmp_path, uninterrupted):
    source = uninterrupted("xgboost")
    kinds = ("whole", "length", "nested", "outside")
    newest = checkpoint_name("xgboost", 3)
    run_python(CONTAINER, checkpoint_folder(source, "xgboost") / newest, tmp_path, cwd=tmp_path)
    jobs = []
    for kind in kinds:
        folder = copy_checkpoints(source, tmp_path / f"job-{kind}", "xgboost", 2)
        shutil.copy(tmp_path / kind, checkpoint_folder(folder, "xgboost") / newest)
        jobs.append((folder, ["--epochs", 4]))
    whole, *damaged = run_many("xgboost", jobs, cwd=tmp_path)
    assert f"Resuming training from {newest}" in whole.output
    assert whole.epochs == [4]
    for kind, result in zip(kinds[1:], damaged):
        lines = [line for line in result.output.splitlines() if line.startswith("Cannot read")]
        assert len(lines) == 1, kind
        assert lines[0].startswith(f"Cannot read {newest}, trying the one before: ValueError: "), kind
        assert result.epochs == [3, 4], kind
        assert (checkpoint_folder(tmp_path / f"job-{kind}", "xgboost") / f"{newest}.damaged").is_file()
    assert "XGBoost crashes while reading it, with SIGSEGV" in damaged[0].output
    assert "XGBoost crashes while reading it, with SIGSEGV" in damaged[1].output


FLIP_BITS = """
import sys
from argparse import Namespace
from pathlib import Path
import numpy as np
import torch
import engine
from common.checkpoints import Checkpoints
from common.distributed import Workers
from common.train_state import Progress
folder = Path(sys.argv[1])
weights = torch.arange(1000.0)
def save(epoch):
    progress = {**vars(Progress(epoch)), "sums": [{}]}
    content = {"progress": progress, "model": {"weight": weights}}
    path = folder / f"checkpoint-{epoch}.pt"
    torch.save(content, path)
    return path.read_bytes()
save(1)
content = save(2)
generator = np.random.default_rng()
checkpoints = Checkpoints(Namespace(checkpoint_path=folder), engine, Workers())
for position in generator.integers(0, len(content), 300):
    damaged = bytearray(content)
    damaged[position] ^= 1 << int(generator.integers(0, 8))
    (folder / "checkpoint-2.pt").write_bytes(damaged)
    name, checkpoint = checkpoints.read_newest()
    assert torch.equal(checkpoint["model"]["weight"], weights), position
    print(name)
"""


def test_a_flipped_bit_anywhere_is_detected_or_harmless(tmp_path):
    """In PyTorch's file a wrong weight would go unnoticed; the other formats have similar checksums."""
    output = run_python(FLIP_BITS, tmp_path, cwd=ROOT / "pytorch").output
    used = [line for line in output.splitlines() if line.startswith("checkpoint-")]
    assert len(used) == 300
    assert used.count("checkpoint-1.pt") > 100


def test_a_checkpoint_beyond_the_last_epoch_is_not_exported(tmp_path):
    event = "at_call(Run, 'finish_step', 40, lambda: send(15))"
    run_with(event, "pytorch", "--epochs", 2, cwd=tmp_path, code=143)
    result = run("pytorch", "--epochs", 1, cwd=tmp_path, code=1)
    assert "steps into epoch 2, beyond --epochs 1: raise --epochs" in result.error_line
    assert not (tmp_path / "output/pytorch/model/model.json").exists()
