"""Each script as users run it: train, stop, run again, and find all files in their places."""

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

from helpers import (
    CHECKPOINTS,
    EPOCHS,
    HAS_EXACT_SAMPLING,
    MODEL_FILES,
    ROOT,
    SCRIPT,
    TABLE_WRITERS,
    assert_same_bits,
    checkpoint_folder,
    checkpoint_name,
    choose,
    copy_checkpoints,
    copy_script,
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
    script_of,
    start_command,
    write_csv,
)

# Training and resuming --------------------------------------------------------------------------------------


def test_the_default_flags_reach_the_promised_accuracy_and_more_epochs_continue(
    framework, tmp_path, uninterrupted
):
    first = run(framework, cwd=tmp_path)
    assert first.errors == ""
    epochs = 50 if framework == "xgboost" else 5
    assert first.epochs == list(range(1, epochs + 1))
    assert first.metric("validation_accuracy") >= (0.95 if framework == "xgboost" else 0.97)
    assert files(tmp_path, framework) == names(framework, *range(1, epochs + 1))
    assert not re.search("warn", first.errors, re.IGNORECASE) or framework == "tensorflow", first.errors
    model, rows = model_bytes(tmp_path, framework), history(tmp_path, framework)

    second = run(framework, cwd=tmp_path)
    newest = checkpoint_name(framework, epochs)
    assert f"Resuming training from {newest}\n" in second.output
    assert f"Nothing left to train: epoch {epochs} is finished" in second.output
    assert second.epochs == []
    assert model_bytes(tmp_path, framework) == model
    assert history(tmp_path, framework) == rows
    assert metrics(tmp_path, framework)["initial_epoch"] == epochs

    third = run(framework, "--epochs", 2 * epochs, cwd=tmp_path)
    resumed = f"Resuming training from {newest}\nStarting training from epoch: {epochs + 1}\n"
    assert resumed in third.output
    assert third.epochs == list(range(epochs + 1, 2 * epochs + 1))
    assert files(tmp_path, framework) == names(framework, *range(1, 2 * epochs + 1))
    assert history(tmp_path, framework) == history(uninterrupted(framework), framework)[: 2 * epochs]
    facts = metrics(tmp_path, framework)
    assert (facts["epochs"], facts["initial_epoch"]) == (2 * epochs, epochs)
    assert facts["validation_accuracy"] == pytest.approx(third.metric("validation_accuracy"), abs=1e-4)
    assert facts["wall_seconds"] > facts["seconds"] > 0


@in_make_test("pytorch", "xgboost")
def test_twelve_starts_of_one_epoch_are_one_run_of_twelve(framework, tmp_path, uninterrupted):
    """Four of them run in one process, so that a second `main` in one process is tested too."""
    folder = checkpoint_folder(tmp_path, framework)
    folder.mkdir(parents=True)
    epochs = 12
    for first in (1, 5, 9):
        for epoch in range(first, first + 4):  # possible leftovers of SageMaker, an editor or a crash
            later = checkpoint_name(framework, epoch + 1)
            (folder / (checkpoint_name(framework, epoch - 1) + ".sagemaker-uploaded")).touch()
            (folder / f"{later}.sagemaker-uploading").touch()
            (folder / f"{later}.sagemaker-ignore").write_bytes(b"half a file")
            (folder / f"{checkpoint_name(framework, 70)}.bak").write_bytes(b"foreign")
            (folder / f"my-{checkpoint_name(framework, 80)}").write_bytes(b"foreign")
            (folder / checkpoint_name(framework, 90)).mkdir(exist_ok=True)
        jobs = [(tmp_path, ["--epochs", epoch]) for epoch in range(first, first + 4)]
        for epoch, result in enumerate(run_many(framework, jobs, cwd=tmp_path), start=first):
            assert result.epochs == [epoch]
            assert f"Starting training from epoch: {epoch}\n" in result.output
        assert not [name for name in os.listdir(folder) if name.endswith(".sagemaker-ignore")]
    found = set(files(tmp_path, framework))
    assert set(names(framework, *range(1, epochs + 1))) <= found
    assert checkpoint_name(framework, epochs + 1) not in found
    if framework == "xgboost":
        assert history(tmp_path, framework) == history(uninterrupted(framework), framework)[:epochs]
    else:
        assert_same_bits(tmp_path, uninterrupted(framework), framework)


def test_a_killed_run_continues_with_the_same_bits(framework, tmp_path, uninterrupted):
    """The kill is at the end of the fourth epoch, while the third one may still be being written."""
    epochs = EPOCHS[framework]
    name = "finish_round" if framework == "xgboost" else "finish_epoch"
    event = f"at_call(Run, '{name}', 4, lambda: send(signal.SIGKILL))"
    run_with(event, framework, "--epochs", epochs, cwd=tmp_path, code=-9)
    result = run(framework, "--epochs", epochs, cwd=tmp_path)
    assert 3 <= result.epochs[0] <= 4
    assert result.epochs == list(range(result.epochs[0], epochs + 1))
    assert files(tmp_path, framework) == names(framework, *range(1, epochs + 1))
    assert_same_bits(tmp_path, uninterrupted(framework), framework)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(framework, tmp_path, uninterrupted):
    copy_checkpoints(uninterrupted(framework), tmp_path, framework, 1, 2, 3)
    damaged = tmp_path / "damaged"
    copy_checkpoints(uninterrupted(framework), damaged, framework, 1, 2, 3)
    for path in checkpoint_folder(damaged, framework).iterdir():
        path.write_bytes(b"damaged")
    folder = checkpoint_folder(tmp_path, framework)
    newest = folder / checkpoint_name(framework, 3)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    (folder / checkpoint_name(framework, 9)).touch()
    jobs = [(tmp_path, ["--epochs", 3]), (tmp_path, ["--epochs", 3]), (damaged, ["--epochs", 4])]
    first, second, third = run_many(framework, jobs, cwd=tmp_path)
    empty = checkpoint_name(framework, 9)
    assert f"Cannot read {empty}, trying the one before: ValueError: the file is empty\n" in first.output
    assert f"Cannot read {newest.name}, trying the one before" in first.output
    assert f"Resuming training from {checkpoint_name(framework, 2)}\n" in first.output
    assert first.epochs == [3]
    kept = {f"{checkpoint_name(framework, epoch)}.damaged" for epoch in (3, 9)}
    assert set(files(tmp_path, framework)) == {*names(framework, 1, 2, 3), *kept}
    assert "Cannot read" not in second.output
    assert second.epochs == []
    assert "none of the checkpoints in" in third.error_line
    assert "--checkpoint-path" in third.error_line
    assert all(path.read_bytes() == b"damaged" for path in checkpoint_folder(damaged, framework).iterdir())


# Output -----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_one_epoch_trains_and_writes_a_checkpoint_a_model_and_metrics(framework, tmp_path):
    result = run(framework, "--epochs", 1, "--output", "runs/1", cwd=tmp_path)
    assert result.epochs == [1]
    folder = tmp_path / "runs/1"
    assert os.listdir(folder / "checkpoints") == names(framework, 1)
    assert (folder / "model" / MODEL_FILES[framework]).is_file()
    assert sorted(os.listdir(folder / "data")) == ["history.csv", "metrics.json"]
    assert os.listdir(tmp_path) == ["runs"]
    # SageMaker's XGBoost container loads each file beside the model as a model.
    facts = folder / "model" / ("code/model.json" if framework == "xgboost" else "model.json")
    assert json.loads(facts.read_text())["class_names"] == [str(digit) for digit in range(10)]


def test_the_log_line_has_the_same_keys_in_all_scripts(framework, uninterrupted):
    folder = uninterrupted(framework)
    rows = history(folder, framework)
    keys = ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
    assert list(rows[0]) == keys
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS[framework] + 1))
    lines = [line for line in (folder / "log").read_text().splitlines() if line.startswith("epoch=")]
    for line in lines:
        assert re.findall(r"(\w+)=", line) == [*keys, "seconds", "samples_per_second"]


def run_on_terminal(framework, *flags, folder, event="", ctrl_c_at=None, **variables):
    """Run a script on a terminal; return (exit code, content of the terminal).

    Args:
        event: a piece of Python that is executed first.
        ctrl_c_at: a text; when it appears on the terminal, Ctrl-C is sent.
    """
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "-c", SCRIPT, event, script_of(framework), *flags]
    command = list(map(str, command))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**variables),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY),
        **streams,
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the program has ended
            while data := os.read(ours, 4096):
                shown += data
                if ctrl_c_at and ctrl_c_at.encode() in shown:
                    os.write(ours, b"\x03")
                    ctrl_c_at = None
    return process.returncode, shown.decode()


@in_make_test("pytorch")
def test_a_progress_bar_appears_only_on_a_terminal(image_framework, tmp_path, uninterrupted):
    flags = ["--epochs", 2, "--batch-size", 8]
    event = "from common import report; report.METRICS_SECONDS = 0.2"
    code, shown = run_on_terminal(image_framework, *flags, folder=tmp_path, event=event)
    assert code == 0
    assert re.search(r"epoch 1/2: +\d+%.*/406 \[\d\d:\d\d<\d\d:\d\d", shown)  # with the time left
    assert re.search(r"epoch 2/2: .*step/s, loss=[\d.]+, accuracy=[\d.]+\]", shown)
    assert re.search(r"[\r\n]epoch=1 train_loss", shown)
    assert "epoch 1/12:" not in (uninterrupted(image_framework) / "log").read_text()


def test_the_message_after_ctrl_c_is_on_a_separate_line(tmp_path):
    flags = ["--epochs", 300]
    code, shown = run_on_terminal("pytorch", *flags, folder=tmp_path, ctrl_c_at="epoch 2/300")
    assert code == 130
    assert re.search(r"\^C\r\nSIGINT received: finishing the running step and saving\r\n", shown)
    assert re.search(r"[\r\n]Interrupted: saved checkpoint-\d+(-\d+)?.pt, run the same command", shown)


def test_an_error_is_red_only_on_a_terminal(tmp_path):
    run_here = functools.partial(run_on_terminal, "pytorch", "--nope", folder=tmp_path)
    assert run_here()[1].startswith("\x1b[31merror:\x1b[0m unknown flag --nope")
    assert run_here(NO_COLOR="1")[1].startswith("error: unknown flag --nope")


PREDICT = {
    "pytorch": """
import torch
import train
args = train.parse_args([])
with Run(args, train.engine) as run:
    model = train.build_model(args, run.load_data(data))
model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
mean, std = (np.array(facts[name], np.float32) for name in ("mean", "std"))
inputs = ((pixels - mean) / std).transpose(0, 3, 1, 2)
logits = model.eval()(torch.from_numpy(inputs)).detach().numpy()
""",
    "tensorflow": """
import tensorflow as tf
logits = tf.saved_model.load(str(folder / "1")).signatures["serving_default"](
    tf.constant(pixels, tf.float32)
)["logits"].numpy()
""",
    "mxnet": """
np.bool = bool
import mxnet as mx
shapes = json.loads((folder / "model-shapes.json").read_text())
assert shapes == [{"name": "data", "shape": [1, 1, 8, 8]}]
files = folder / "model-symbol.json", folder / "model-0000.params"
model = mx.gluon.SymbolBlock.imports(str(files[0]), ["data"], str(files[1]))
logits = model(mx.nd.array(pixels.transpose(0, 3, 1, 2))).asnumpy()
""",
    "xgboost": """
import xgboost
model = xgboost.Booster(model_file=folder / "xgboost-model")
logits = model.predict(xgboost.DMatrix(data[1].features))
labels = data[1].labels
""",
}
LOAD_IMAGES = """
from common import flags, images
facts = json.loads((folder / "model.json").read_text())
data = images.load_images(flags.image_flags("pytorch").parse_args([]))
pixels, labels = data[1].__getitems__(np.arange(len(data[1])))
"""
LOAD_TABLES = """
from common import flags, tables
data = tables.load_tables(flags.xgboost_flags().parse_args([]))
"""


def test_the_exported_model_has_the_logged_accuracy_in_a_fresh_process(framework, tmp_path, uninterrupted):
    """If the model does not contain the statistics of the images, model.json does."""
    folder = uninterrupted(framework) / "output" / framework / "model"
    code = f"import json, sys\nfrom pathlib import Path\nimport numpy as np\nfolder = Path({str(folder)!r})\n"
    code += f"sys.path.insert(0, {str(ROOT / framework)!r})\nfrom common.run import Run\n"
    code += LOAD_TABLES if framework == "xgboost" else LOAD_IMAGES
    code += PREDICT[framework]
    code += "print((logits.argmax(1) == labels).mean())"
    accuracy = float(run_python(code, cwd=tmp_path).last_line)
    assert accuracy == pytest.approx(
        metrics(uninterrupted(framework), framework)["validation_accuracy"], abs=1e-6
    )


# Data -------------------------------------------------------------------------------------------------------


def save_folders(folder, pixels, labels):
    save_images(folder, pixels, labels, suffixes=(".jpg", ".png"), size=16)


def save_npz(folder, pixels, labels):
    folder.mkdir(parents=True)
    np.savez(folder / "digits.npz", x=pixels / 255, y=labels)


def save_npy(folder, pixels, labels):
    folder.mkdir(parents=True)
    stem = "eval" if folder.name == "validation" else "train"
    np.save(folder / f"{stem}_data.npy", pixels[..., np.newaxis].repeat(3, axis=3))
    np.save(folder / f"{stem}_labels.npy", labels)


def test_images_in_every_form(image_framework, tmp_path, digits):
    pixels, labels = digits
    jobs = []
    for save in (save_folders, save_npz, save_npy):
        folder = tmp_path / save.__name__
        save(folder / "train", pixels[:200], labels[:200])
        save(folder / "validation", pixels[200:], labels[200:])
        flags = ["--train", "train", "--validation", "validation", "--batch-size", 16, "--epochs", 6]
        jobs.append((folder, flags))
    for result in run_many(image_framework, jobs, cwd=tmp_path):
        assert "200 training and 100 validation images" in result.output
        assert result.metric("validation_accuracy") > 0.7


def test_tables_in_every_form_and_labels_that_are_not_classes(tmp_path):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(1000, 5))
    rows = np.column_stack([(features[:, 0] * features[:, 1] > 0), features]).astype(np.float32)
    jobs = []
    for suffix in ("csv", "libsvm", "parquet"):
        folder = tmp_path / suffix
        for index, part in enumerate(np.array_split(rows, 4)):
            channel = "validation" if index == 3 else "train"
            TABLE_WRITERS[suffix](folder / channel / f"part-{index}.{suffix}", part)
        jobs.append((folder, ["--train", "train", "--validation", "validation"]))
    regression = tmp_path / "regression"
    write_csv(regression / "train/data.csv", np.column_stack([features[:, :3].sum(1), features[:, :3]]))
    jobs.append((regression, ["--train", "train", "--num-round", 20]))
    *classifications, result = run_many("xgboost", jobs, cwd=tmp_path)
    for classification in classifications:
        assert "objective=binary:logistic eval_metric=['logloss', 'error']" in classification.output
        assert classification.metric("validation_accuracy") > 0.85
    assert "objective=reg:squarederror eval_metric=['rmse']" in result.output
    assert list(history(regression, "xgboost")[0]) == ["epoch", "train_rmse", "validation_rmse"]
    assert result.metric("validation_rmse") < 0.6


SAMPLING = ["--subsample", 0.7, "--colsample-bytree", 0.5, "--colsample-bynode", 0.7, "--nthread", 2]
DART = ["--booster", "dart", "--rate-drop", 0.3]


def test_in_sagemakers_image_xgboost_also_logs_in_the_format_of_this_image(tmp_path):
    """The console and the tuner read these lines, https://github.com/aws/sagemaker-xgboost-container."""
    env = environment(SAGEMAKER_TRAINING_MODULE="sagemaker_xgboost_container.training:main")
    first = run("xgboost", "--num-round", 2, cwd=tmp_path, env=env)
    second = run("xgboost", "--num-round", 3, cwd=tmp_path, env=env)
    for result, numbers in ((first, ["0", "1"]), (second, ["2"])):
        found = re.findall(r"^.*\[([0-9]+)\].*#011validation-mlogloss:(\S+)", result.output, re.MULTILINE)
        assert [number for number, _ in found] == numbers
        assert abs(float(found[-1][1]) - result.metric("validation_loss")) < 0.0001
    assert "#011" not in run("xgboost", "--num-round", 4, cwd=tmp_path).output


@pytest.mark.parametrize("flags", [SAMPLING, DART, ["--tree-method", "approx"]])
def test_xgboost_resumes_exactly_with_sampling_and_dart(tmp_path, flags):
    if not HAS_EXACT_SAMPLING and flags[0] != "--tree-method":
        pytest.skip("before XGBoost 3.4 row and column samples do not depend on the round alone")
    for name, epochs in (("whole", [10]), ("parts", [4, 10])):
        (tmp_path / name).mkdir()
        for number in epochs:
            run("xgboost", "--num-round", number, *flags, cwd=tmp_path / name)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts", "xgboost")


CONTAINER = """
import sys
import xgboost
from common import flags, tables
args = flags.xgboost_flags().parse_args([])
table = tables.load_tables(args)[0]
rows = xgboost.DMatrix(table.features, table.labels)
path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
booster = xgboost.Booster(model_file=f"{path}.{first - 1}") if first else None
params = {"objective": "multi:softprob", "num_class": 10}
booster = xgboost.train(params, rows, last - first, xgb_model=booster)
assert bool(booster.attr("checkpoint")) == bool(first)
open(f"{path}.{last - 1}", "wb").write(booster.save_raw("ubj"))
"""


def test_xgboost_continues_from_checkpoints_of_other_programs(tmp_path):
    """SageMaker's container saves plain boosters; others copy our attribute with its checksum."""
    folder = checkpoint_folder(tmp_path, "xgboost")
    folder.mkdir(parents=True)
    stem = folder / "xgboost-checkpoint"
    run_python(CONTAINER, stem, 0, 3, cwd=ROOT / "xgboost")
    result = run("xgboost", "--num-round", 5, cwd=tmp_path)
    assert "Resuming training from xgboost-checkpoint.2\nStarting training from epoch: 4\n" in result.output
    assert result.epochs == [4, 5]
    assert [row["epoch"] for row in history(tmp_path, "xgboost")] == ["4", "5"]
    run_python(CONTAINER, stem, 5, 7, cwd=ROOT / "xgboost")
    result = run("xgboost", "--num-round", 8, cwd=tmp_path)
    assert "Resuming training from xgboost-checkpoint.6\n" in result.output
    assert result.epochs == [8]


# Models, precision and weights ------------------------------------------------------------------------------

ZOO = {"pytorch": "resnet18", "tensorflow": "MobileNetV2", "mxnet": "resnet18_v1"}


@in_make_test("pytorch")
def test_a_model_of_the_zoo_trains_and_resumes(image_framework, tmp_path, digits):
    np.savez(tmp_path / "digits.npz", x=digits[0][:65], y=digits[1][:65])
    flags = ["--train", ".", "--model", ZOO[image_framework], "--image-size", 32, "--batch-size", 32]
    jobs = [(tmp_path, [*flags, "--epochs", 1]), (tmp_path, [*flags, "--epochs", 2])]
    first, second = run_many(image_framework, jobs, cwd=tmp_path)
    assert (first.epochs, second.epochs) == ([1], [2])


@in_make_test()
def test_a_compiled_network_trains_and_resumes(image_framework, tmp_path):
    flags = ["--compile"]
    if image_framework == "tensorflow":
        flags = ["--compile", "--no-deterministic"]
    made = tmp_path / "compiled"
    xla = f"--xla_dump_to={made} --xla_dump_hlo_as_text"
    env = environment(TORCHINDUCTOR_CACHE_DIR=str(made), XLA_FLAGS=xla)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    jobs = [(whole, [*flags, "--epochs", 2]), (parts, [*flags, "--epochs", 1])]
    if image_framework == "tensorflow":
        jobs.append((tmp_path, ["--compile"]))
    unbroken, _, *mistakes = run_many(image_framework, jobs, cwd=tmp_path, env=env)
    result = run(image_framework, "--epochs", 2, *flags, cwd=parts, env=env)
    assert result.epochs == [2]
    assert result.metric("validation_accuracy") > 0.9
    assert unbroken.metric("validation_accuracy") > 0.9
    if image_framework == "tensorflow":
        assert "add --no-deterministic" in mistakes[0].error_line
    else:
        assert model_bytes(whole, image_framework) == model_bytes(parts, image_framework)
    if image_framework != "mxnet":  # MXNet always compiles, in memory
        assert any(path.is_file() for path in made.rglob("*"))


@in_make_test("pytorch")
def test_bf16_adamw_warm_up_and_cosine_resume_exactly(image_framework, tmp_path):
    # Some virtual machines announce AMX, which oneDNN then uses for bf16, but kill a process that uses it.
    env = environment(ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")
    flags = [
        "--precision",
        "bf16",
        "--optimizer",
        "adamw",
        "--learning-rate",
        0.005,
        "--augment",
        "--epochs",
        2,
    ]
    flags += ["--schedule", "cosine", "--warmup-epochs", 0.5]
    if image_framework == "mxnet" and "avx512bw" not in Path("/proc/cpuinfo").read_text():
        result = run("mxnet", *flags, cwd=tmp_path, env=env, code=1)
        assert "AVX-512, and this one has none; use --precision fp32" in result.error_line
        pytest.skip("MXNet's bf16 needs a processor with AVX-512")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    run(image_framework, *flags, cwd=whole, env=env)
    event = 'at_call(Run, "finish_step", 9, lambda: send(signal.SIGTERM))'
    run_with(event, image_framework, *flags, cwd=parts, env=env, code=143)
    result = run(image_framework, *flags, cwd=parts, env=env)
    assert "Starting training from epoch: 1, step: 10\n" in result.output
    assert result.metric("validation_accuracy") > 0.6
    assert_same_bits(whole, parts, image_framework)


# Mistakes ---------------------------------------------------------------------------------------------------


def one_class(folder, digits):
    save_images(folder, digits[0][:5], [0] * 5)


def broken_image(folder, digits):
    save_images(folder, *digits)
    (folder / "class-3/broken.jpg").write_bytes(b"not a photo")


def wrong_lengths(folder, digits):
    np.savez(folder / "digits.npz", x=digits[0], y=digits[1][:-1])


def empty_folder(folder, digits):
    pass


IMAGE_MISTAKES = {
    one_class: "one class only (class-0)",
    broken_image: "class-3/broken.jpg",
    wrong_lengths: "contains 300 images, but the labels have shape (299,)",
    empty_folder: "contains nothing: expected one folder per class",
}
TOO_SMALL = {"pytorch": "vgg11", "tensorflow": "VGG16", "mxnet": "vgg11"}
MISTAKES = [  # of all scripts
    (["--train", "nowhere"], ["--train nowhere is not a folder"]),
    (["--device", "cuda"], ["--device cuda: "]),
    (["--checkpoint-path", "file/c"], ["--checkpoint-path file/c cannot be written"]),
    (["--model-dir", "file/model"], ["--model-dir file/model cannot be written"]),
    (["--best-metric", "mine"], ["--best-metric: is more of mine better", "mine:max or mine:min"]),
]


def test_image_scripts_report_mistakes_in_one_line_before_training(image_framework, tmp_path, digits):
    zoo, small = ZOO[image_framework], TOO_SMALL[image_framework]
    mistakes = [
        *MISTAKES,
        (["--model", f"{zoo}x"], [f"--model {zoo}x is unknown: ", "nearest are ", f" {zoo}"]),
        (
            ["--model", small, "--image-size", 4],
            [f"--model {small} cannot take images of 4x4x1", "--image-size"],
        ),
        (["--weights", "nowhere"], ["--weights nowhere"]),
    ]
    if image_framework == "tensorflow":
        mistakes.append((["--image-size", 4], ["4x4x1 (Computed output size would be zero or negative"]))
    if image_framework == "pytorch":
        flags = ["--model", "resnet18", "--image-size", 32, "--batch-size", 1]
        mistakes.append((flags, ["--batch-size 1 makes batches of one sample", "raise it"]))
    if image_framework != "pytorch":
        mistakes.append((["--precision", "fp16"], ["--precision fp16", "bf16 or fp32"]))
    for make, part in IMAGE_MISTAKES.items():
        folder = tmp_path / make.__name__
        folder.mkdir()
        make(folder, digits)
        mistakes.append((["--train", folder], [make.__name__, part]))
    expect_mistakes(image_framework, mistakes, tmp_path)


def test_infinite_weights_are_not_saved(image_framework, tmp_path):
    """Neither at the end of an epoch nor inside it; a new learning rate counts after a restart."""
    diverging = ["--learning-rate", 1e30, "--epochs", 1, "--output"]
    jobs = [(tmp_path, [*diverging, "whole"]), (tmp_path, [*diverging, "parts", "--checkpoint-steps", 3])]
    jobs.append((tmp_path, ["--epochs", 1, "--output", "restarted"]))
    jobs.append((tmp_path, [*diverging, "restarted", "--epochs", 2]))
    whole, parts, first, restarted = run_many(image_framework, jobs, tmp_path)
    assert (whole.code, parts.code, first.code, restarted.code) == (1, 1, 0, 1)
    last = f"the last finite checkpoint is {checkpoint_name(image_framework, 1)}"
    assert "Changed since" in restarted.output
    assert last in restarted.error_line
    reason = "some weights are infinite or not a number: they are not saved, "
    assert f"after epoch 1 {reason}there is no checkpoint. Try a lower --learning-rate" in whole.error_line
    saved = os.listdir(tmp_path / "parts/checkpoints")
    last = f"the last finite checkpoint is {saved[0]}" if saved else "there is no checkpoint"
    step = re.search(rf"after epoch 1, step (\d+) {reason}{re.escape(last)}\. Try", parts.error_line)[1]
    assert int(step) < 10  # it stops inside the epoch
    assert saved in ([], [CHECKPOINTS[image_framework].format("0-3")])
    assert not os.listdir(tmp_path / "whole/checkpoints")


def test_finite_weights_with_an_infinite_sum_are_saved(tmp_path):
    """PyTorch's script examines the sum first."""
    script = """
import sys, types, torch
sys.path.insert(0, sys.argv[1])
import engine
state = types.SimpleNamespace(model=torch.nn.Linear(2, 1, bias=False))
for weights in ([3e38, 3e38], [0, float("inf")], [float("-inf"), float("inf")], [float("nan"), 0]):
    print(engine.State.has_finite_weights(state, {"model": {"weight": torch.tensor(weights)}}))
"""
    result = run_python(script, ROOT / "pytorch", cwd=tmp_path)
    assert result.output.split() == ["True", "False", "False", "False"]


def test_a_model_that_is_exported_again_keeps_the_flags_of_its_training(tmp_path):
    jobs = [(tmp_path, ["--epochs", 3, "--eta", 0.2]), (tmp_path, ["--epochs", 3])]
    _, again = run_many("xgboost", jobs, cwd=tmp_path)
    assert "Nothing left to train" in again.output
    facts = json.loads((tmp_path / "output/xgboost/model/code/model.json").read_text())
    assert facts["flags"]["eta"] == 0.2


def test_a_loss_that_is_not_finite_for_a_whole_epoch_ends_the_training(tmp_path):
    change = ('{"loss": ((losses * weights).sum(), count)', '{"loss": ((losses * weights).sum() / 0, count)')
    script = copy_script("pytorch", tmp_path, [change])
    result = run(script, "--epochs", 5, cwd=tmp_path, code=1)
    assert result.epochs == [1, 2]
    assert "the training loss of epochs 1 and 2 is not finite" in result.error_line


TABLE_MISTAKES = {
    "0,1,2\n1,2,3\n0,1\n": "a.csv, line 3: Expected 3 columns, got 2",
    "1,2\n1,3\n1,4\n": "one label only (1)",
    "label,x\n1,2\n": "has one row only",
}
XGBOOST_MISTAKES = [
    (["--objective", "nope"], ["--objective nope", "Unknown objective function"]),
    (["--objective", "binary:logistic"], ["binary:logistic expects the labels 0 to 1", "10 from 0 to 9"]),
    (["--num-class", "5"], ["multi:softprob expects the labels 0 to 4"]),
    (["--train", "two", "--validation", "three"], ["the validation rows have the label 2", "--num-class"]),
    (["--objective", "rank:ndcg"], ["--objective rank:ndcg needs query groups"]),
    (["--eval-metric", "nope"], ["--eval-metric nope"]),
    (["--booster", "dart", "--best-metric", "accuracy"], ["--best-metric", "--booster dart"]),
]


def test_xgboost_reports_mistakes_in_one_line_before_training(tmp_path):
    mistakes = [*MISTAKES, *XGBOOST_MISTAKES]
    for number, (text, part) in enumerate(TABLE_MISTAKES.items()):
        path = tmp_path / f"table-{number}/a.csv"
        path.parent.mkdir()
        path.write_text(text)
        mistakes.append((["--train", path.parent], [part]))
    for name, count in (("two", 2), ("three", 3)):
        write_csv(tmp_path / name / "rows.csv", np.arange(12)[:, None] % count * [1, 1])
    expect_mistakes("xgboost", mistakes, tmp_path)


def expect_mistakes(framework, mistakes, folder):
    """Run a script with each of the flags; fail if it trains, or if its error lacks one of the parts."""
    (folder / "file").touch()
    jobs = [(folder, flags) for flags, _ in mistakes]
    env = environment(CUDA_VISIBLE_DEVICES="")
    for (flags, parts), result in zip(mistakes, run_many(framework, jobs, cwd=folder, env=env)):
        assert result.code == 1, flags
        assert all(part in result.error_line for part in parts), (flags, result.error_line)
        assert "/src/" not in result.error_line
        assert result.epochs == []
    assert not list(folder.rglob("*.json"))


@pytest.mark.quick
def test_usage_errors_exit_with_2(framework, tmp_path):
    mistakes = [(["--epochs", 0], "--epochs"), (["--epohcs", 5], "did you mean --epochs?"), (["x"], "'x'")]
    for flags, part in mistakes:
        assert part in run(framework, *flags, cwd=tmp_path, code=2).error_line
    assert os.listdir(tmp_path) == []


def test_another_job_is_refused_and_its_model_is_not_overwritten(framework, tmp_path):
    for name, modulus in (("ten", 10), ("three", 3)):
        (tmp_path / name).mkdir()
        if framework == "xgboost":
            rows = np.column_stack([np.arange(100) % modulus, np.arange(100)])
            write_csv(tmp_path / name / "data.csv", rows)
        else:
            images = np.random.default_rng(0).integers(0, 256, (100, 8, 8)).astype(np.uint8)
            np.savez(tmp_path / name / "data.npz", x=images, y=np.arange(100) % modulus)
    rate = ["--eta" if framework == "xgboost" else "--learning-rate", 0.02]
    again = ["--epochs", 2, "--train", "ten", "--seed", 7]
    kind = ["--booster", "dart"] if framework == "xgboost" else ["--batch-size", 32]
    jobs = [
        ["--train", "ten", "--epochs", 1],
        ["--train", "three", "--epochs", 2],
        ["--train", "ten", "--epochs", 2, *kind],
        ["--train", "ten", "--epochs", 2, "--checkpoint-path", "other"],
        again,
        [*again, "--resume-anyway", *rate],
    ]
    results = run_many(framework, [(tmp_path, flags) for flags in jobs], cwd=tmp_path)
    first, classes, other_kind, model, seed, resumed = results
    assert first.epochs == [1]
    digits = [str(digit) for digit in range(10)]
    changed = f"classes was {digits} and is now {digits[:3]}"
    if framework == "xgboost":
        changed = "number of classes was 10 and is now 3"
    assert changed in classes.error_line
    assert "--output" in classes.error_line
    default = "gbtree" if framework == "xgboost" else 64
    assert f"{kind[0]} was {default} and is now {kind[1]}" in other_kind.error_line
    expected = f"--model-dir output/{framework}/model contains the model of another job: "
    assert expected + "the folder of checkpoints was" in model.error_line
    assert "--output" in model.error_line
    assert os.listdir(tmp_path / "other") == []
    assert "--seed was 42 and is now 7" in seed.error_line
    assert "--resume-anyway" in seed.error_line
    changed = f"Changed since {checkpoint_name(framework, 1)}: --seed was 42 and is now 7; {rate[0]} was"
    assert changed in resumed.output
    assert resumed.epochs == [2]


def test_a_changed_network_that_does_not_fit_the_checkpoint_is_one_line(
    image_framework, tmp_path, uninterrupted
):
    copy_checkpoints(uninterrupted(image_framework), tmp_path, image_framework, 1)
    script = copy_script(image_framework, tmp_path, [("(32, 64, 128)", "(32, 64, 96)")])
    line = run(script, "--epochs", 2, "--resume-anyway", cwd=tmp_path, code=1).error_line
    assert f"{checkpoint_name(image_framework, 1)} does not fit this script" in line


def test_xgboost_accepts_a_number_of_classes_and_another_metric_after_a_restart(tmp_path):
    more = ["--num-class", 12, "--epochs", 3, "--eval-metric", "mlogloss, auc"]
    jobs = [(tmp_path, ["--num-class", 12, "--epochs", 2]), (tmp_path, more)]
    first, _ = run_many("xgboost", jobs, cwd=tmp_path)
    assert "objective=multi:softprob num_class=12" in first.output
    rows = history(tmp_path, "xgboost")
    assert [bool(row["validation_auc"]) for row in rows] == [False, False, True]


DELETED = """
at_call(Run, "export", 1, lambda: [shutil.rmtree("run/" + name) for name in ("model", "data")])
"""
BLOCKED = """
def block():
    shutil.rmtree("run/NAME")
    open("run/NAME", "w").close()
at_call(Run, "export", 1, block)
"""
LEFT_BEHIND = """
for name in ("model", "data"):
    if os.path.isfile("run/" + name):
        os.remove("run/" + name)
os.makedirs("run/model/export.sagemaker-ignore/1")
at_call(Run, "restore", 1, lambda: print("at the start:", os.listdir("run/model")))
"""


def test_a_folder_deleted_during_training_loses_no_model(framework, tmp_path):
    """The script makes the folder again or names it, and the same command exports when it is writable again.

    The next start removes the files of a killed export.
    """
    flags = ["--output", "run", "--epochs", 1]
    blocked = BLOCKED.replace("NAME", "data") if framework == "xgboost" else BLOCKED.replace("NAME", "model")
    jobs = [(tmp_path, flags, "import shutil" + event) for event in (DELETED, blocked, LEFT_BEHIND)]
    deleted, error, again = run_many(framework, jobs, tmp_path)
    assert (deleted.code, again.code) == (0, 0), deleted.errors + again.errors
    assert deleted.epochs == [1]
    flag = "--output-data-dir run/data" if framework == "xgboost" else "--model-dir run/model"
    assert f"{flag} cannot be written" in error.error_line
    assert "at the start: [" in again.output
    assert "export." not in again.output
    assert "Model: run/model (" in again.output
    assert (tmp_path / "run/data/metrics.json").is_file()


@pytest.mark.parametrize(
    "framework", ["mxnet", "xgboost"]
)  # the other formats are zip archives, which are read from the end
def test_a_checkpoint_of_a_terabyte_without_content_is_damaged(framework, tmp_path, uninterrupted):
    choose(framework)
    copy_checkpoints(uninterrupted(framework), tmp_path, framework, 1)
    name = checkpoint_name(framework, 2)
    with open(checkpoint_folder(tmp_path, framework) / name, "wb") as file:
        file.truncate(10**12)
    result = run(framework, "--epochs", 2, cwd=tmp_path)
    assert f"Cannot read {name}, trying the one before: " in result.output
    assert f"Resuming training from {checkpoint_name(framework, 1)}\n" in result.output


@pytest.mark.quick
def test_too_few_threads_are_one_line(framework, tmp_path):
    """The limit does not apply to root: the test needs another user who may read all files."""
    limit = ["prlimit", "--nproc=4"]
    if os.geteuid() == 0:
        read_all = "+dac_override,+dac_read_search"
        capabilities = ["--inh-caps", read_all, "--ambient-caps", read_all]
        limit = ["setpriv", "--reuid=60001", "--regid=60001", "--clear-groups", *capabilities, *limit]
    if not shutil.which(limit[0]):
        pytest.skip(f"this machine has no {limit[0]}")
    script = str(ROOT / framework / "train.py")
    line = finish(start_command([*limit, sys.executable, script], tmp_path), 1).error_line
    assert re.fullmatch(r"error: \d+ threads cannot be started: raise the limit of processes .*", line)


def test_a_full_disk_does_not_damage_an_earlier_model(framework, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted(framework), tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "output" / framework / "model"
    earlier = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    limit = max(map(len, earlier.values())) * 3 // 4
    flags = ["--epochs", EPOCHS[framework]]
    result = run_with(f"limit_file_size({limit})", framework, *flags, cwd=tmp_path, code=1)
    assert "cannot write" in result.error_line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == earlier


@pytest.mark.quick
def test_a_missing_framework_is_one_line(framework, tmp_path):
    module = {"pytorch": "torch", "tensorflow": "keras"}.get(framework, framework)
    line = run_with(f"sys.modules[{module!r}] = None", framework, cwd=tmp_path, code=1).error_line
    assert "this script needs" in line
    assert "pip install" in line


@pytest.mark.quick
def test_a_missing_environment_is_one_line(framework, tmp_path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")")
    line = run(framework, cwd=tmp_path, env=environment(PYTHONPATH=str(tmp_path)), code=1).error_line
    assert "this script needs NumPy" in line
    assert "source .venv/bin/activate" in line


# SageMaker --------------------------------------------------------------------------------------------------


def test_in_a_container_all_files_are_where_sagemaker_expects_them(framework, tmp_path):
    base = tmp_path / "opt/ml"
    env = environment(
        SAGEMAKER_BASE_DIR=str(base),
        SM_MODEL_DIR=str(base / "model"),
        SM_OUTPUT_DATA_DIR=str(base / "output/data"),
        SM_HOSTS='["algo-1"]',
        SM_CURRENT_HOST="algo-1",
        SM_NUM_GPUS="0",
    )
    flags = ["--epochs", "2", "--model_dir", "s3://bucket/job/model", "--output", "not-used"]
    result = run(framework, *flags, cwd=tmp_path, env=env)
    assert "Not used: --model-dir s3://bucket/job/model" in result.output
    assert sorted(os.listdir(base / "checkpoints")) == names(framework, 1, 2)
    assert (base / "model" / MODEL_FILES[framework]).is_file()
    assert sorted(os.listdir(base / "output/data")) == ["history.csv", "metrics.json"]
    assert sorted(os.listdir(tmp_path)) == ["opt"]
