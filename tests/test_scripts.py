"""Each script as its users run it: train, stop, run again, and find everything where it belongs."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, checkpoint_name, environment, run, start
from spot import compare

MODEL_FILES = {
    "pytorch": "model.pth",
    "tensorflow": "1/variables/variables.data-00000-of-00001",
    "mxnet": "model-0000.params",
    "xgboost": "xgboost-model",
}
NUM_EPOCHS = 12


def files(folder, framework):
    return sorted(os.listdir(folder / "output" / framework / "checkpoints"))


def names(framework, *epochs):
    return sorted(checkpoint_name(framework, epoch) for epoch in epochs)


def model_bytes(folder, framework):
    """Return the bits of the exported model, by the names of its files or variables."""
    model = compare.read_model(folder / "output" / framework / "model")
    assert len(model) > 10 if framework == "tensorflow" else model
    return model


def history(folder, framework):
    """Return the rows of history.csv without the columns that hold times."""
    return compare.read_history(folder / "output" / framework / "data/history.csv")


def metrics(folder, framework):
    return json.loads((folder / "output" / framework / "data/metrics.json").read_text())


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """Return the folder of a framework's run of twelve epochs that nothing interrupted; each runs once."""
    folders = {}

    def folder_of(framework):
        if framework not in folders:
            folders[framework] = tmp_path_factory.mktemp(f"uninterrupted-{framework}")
            result = run(framework, "--epochs", NUM_EPOCHS, cwd=folders[framework])
            assert "Starting training from epoch: 1\n" in result.output
            assert result.epochs == list(range(1, NUM_EPOCHS + 1))
        return folders[framework]

    return folder_of


# Training and resuming ------------------------------------------------------------------------------------------------


def test_the_default_flags_reach_the_promised_accuracy_and_then_nothing_is_left(framework, tmp_path):
    first = run(framework, cwd=tmp_path)
    num_epochs = 50 if framework == "xgboost" else 5
    assert first.epochs == list(range(1, num_epochs + 1))
    assert first.metric("validation_accuracy") >= (0.95 if framework == "xgboost" else 0.97)
    assert files(tmp_path, framework) == names(framework, *range(1, num_epochs + 1))
    assert not re.search("warn", first.errors, re.IGNORECASE) or framework == "tensorflow", first.errors
    model, rows = model_bytes(tmp_path, framework), history(tmp_path, framework)

    second = run(framework, cwd=tmp_path)
    assert f"Resuming training from {checkpoint_name(framework, num_epochs)}\n" in second.output
    assert f"Nothing left to train: {num_epochs} epochs are finished" in second.output
    assert second.epochs == []
    assert model_bytes(tmp_path, framework) == model
    assert history(tmp_path, framework) == rows
    assert metrics(tmp_path, framework)["initial_epoch"] == num_epochs


def test_five_epochs_and_later_ten_leave_ten_files(framework, tmp_path, uninterrupted):
    run(framework, "--epochs", 5, cwd=tmp_path)
    assert files(tmp_path, framework) == names(framework, 1, 2, 3, 4, 5)
    result = run(framework, "--epochs", 10, cwd=tmp_path)
    assert f"Resuming training from {checkpoint_name(framework, 5)}\nStarting training from epoch: 6\n" in result.output
    assert result.epochs == [6, 7, 8, 9, 10]
    assert files(tmp_path, framework) == names(framework, *range(1, 11))
    assert history(tmp_path, framework) == history(uninterrupted(framework), framework)[:10]
    facts = metrics(tmp_path, framework)
    assert (facts["epochs"], facts["initial_epoch"]) == (10, 5)
    assert facts["validation_accuracy"] == pytest.approx(result.metric("validation_accuracy"), abs=1e-4)
    assert facts["wall_seconds"] > facts["seconds"] > 0


def test_twelve_starts_of_one_epoch_are_one_run_of_twelve(framework, tmp_path, uninterrupted):
    checkpoints = tmp_path / "output" / framework / "checkpoints"
    for epoch in range(1, NUM_EPOCHS + 1):
        result = run(framework, "--epochs", epoch, cwd=tmp_path)
        assert result.epochs == [epoch]
        assert f"Starting training from epoch: {epoch}\n" in result.output
        # What SageMaker, an editor or a crash may leave there must not confuse the next start.
        (checkpoints / (checkpoint_name(framework, epoch) + ".sagemaker-uploaded")).touch()
        (checkpoints / (checkpoint_name(framework, epoch + 1) + ".sagemaker-uploading")).touch()
        (checkpoints / (checkpoint_name(framework, epoch + 2) + ".sagemaker-ignore")).write_bytes(b"half a file")
        (checkpoints / f"{checkpoint_name(framework, 70)}.bak").write_bytes(b"foreign")
        (checkpoints / f"my-{checkpoint_name(framework, 80)}").write_bytes(b"foreign")
        (checkpoints / checkpoint_name(framework, 90)).mkdir(exist_ok=True)
        assert not (checkpoints / (checkpoint_name(framework, epoch + 1) + ".sagemaker-ignore")).exists()
    there = set(files(tmp_path, framework))
    assert set(names(framework, *range(1, NUM_EPOCHS + 1))) <= there
    assert checkpoint_name(framework, NUM_EPOCHS + 1) not in there
    assert history(tmp_path, framework) == history(uninterrupted(framework), framework)
    assert model_bytes(tmp_path, framework) == model_bytes(uninterrupted(framework), framework)


def test_a_killed_run_goes_on_where_it_was(framework, tmp_path, uninterrupted):
    num_epochs, whole = NUM_EPOCHS, None
    if framework == "xgboost":  # whose rounds take milliseconds: more of them, to be killed before the last
        num_epochs, whole = 100, tmp_path / "whole"
        whole.mkdir()
        run(framework, "--epochs", num_epochs, cwd=whole)
    whole = whole or uninterrupted(framework)
    with start(framework, "--epochs", num_epochs, cwd=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("epoch=3 "):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    result = run(framework, "--epochs", num_epochs, cwd=tmp_path)
    assert 3 <= result.epochs[0] < num_epochs
    assert result.epochs == list(range(result.epochs[0], num_epochs + 1))
    assert files(tmp_path, framework) == names(framework, *range(1, num_epochs + 1))
    assert history(tmp_path, framework) == history(whole, framework)
    assert model_bytes(tmp_path, framework) == model_bytes(whole, framework)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(framework, tmp_path):
    run(framework, "--epochs", 3, cwd=tmp_path)
    checkpoints = tmp_path / "output" / framework / "checkpoints"
    newest = checkpoints / checkpoint_name(framework, 3)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    (checkpoints / checkpoint_name(framework, 9)).touch()
    result = run(framework, "--epochs", 3, cwd=tmp_path)
    empty = f"Cannot read {checkpoint_name(framework, 9)}, trying the one before: ValueError: the file is empty\n"
    assert empty in result.output
    assert f"Cannot read {checkpoint_name(framework, 3)}, trying the one before" in result.output
    assert f"Resuming training from {checkpoint_name(framework, 2)}\n" in result.output
    assert result.epochs == [3]
    damaged = {f"{checkpoint_name(framework, epoch)}.damaged" for epoch in (3, 9)}
    assert set(files(tmp_path, framework)) == {*names(framework, 1, 2, 3), *damaged}
    assert "Cannot read" not in run(framework, "--epochs", 3, cwd=tmp_path).output

    for path in checkpoints.iterdir():
        path.write_bytes(b"damaged")
    line = run(framework, "--epochs", 4, cwd=tmp_path, code=1).error_line
    assert "none of the checkpoints in" in line
    assert "--checkpoint-path" in line
    assert all(path.read_bytes() == b"damaged" for path in checkpoints.iterdir())


def test_only_the_newest_checkpoints_are_kept_where_that_is_asked(framework, tmp_path):
    run(framework, "--epochs", 4, "--keep-checkpoints", 2, cwd=tmp_path)
    assert files(tmp_path, framework) == names(framework, 3, 4)


# Output ---------------------------------------------------------------------------------------------------------------


def test_the_log_line_has_the_same_keys_in_all_scripts(framework, uninterrupted):
    rows = history(uninterrupted(framework), framework)
    assert list(rows[0]) == ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
    assert [int(row["epoch"]) for row in rows] == list(range(1, NUM_EPOCHS + 1))
    result = run(framework, "--epochs", 1, cwd=uninterrupted(framework), env=environment(PYTHONUNBUFFERED=""))
    assert result.epochs == []  # nothing left: the files above stay as they are


def test_a_progress_bar_shows_on_a_terminal_only(image_framework, tmp_path):
    def read(descriptor):
        with contextlib.suppress(OSError):  # a terminal whose program has ended
            while data := os.read(descriptor, 4096):
                yield data

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, str(ROOT / image_framework / "train.py"), "--epochs", "1", "--batch-size", "8"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=theirs, stderr=theirs):
        os.close(theirs)
        shown = b"".join(read(ours)).decode()
    assert re.search(r"epoch 1: +\d+%.*/203 ", shown)
    result = run(image_framework, "--epochs", "2", "--batch-size", "8", cwd=tmp_path)
    assert "epoch 2:" not in result.output + result.errors


PREDICT = {
    "pytorch": """
import torch
import train
args = train.parse_args([])
model = train.build_model(args, data)
model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
logits = model.eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).detach().numpy()
""",
    "tensorflow": """
import tensorflow as tf
logits = tf.saved_model.load(str(folder / "1")).signatures["serving_default"](tf.constant(pixels))
logits = list(logits.values())[0].numpy()
""",
    "mxnet": """
import json
import numpy as np
np.bool = bool
import mxnet as mx
shapes = json.loads((folder / "model-shapes.json").read_text())
assert shapes == [{"name": "data", "shape": [1, 1, 8, 8]}]
model = mx.gluon.SymbolBlock.imports(str(folder / "model-symbol.json"), ["data"], str(folder / "model-0000.params"))
logits = model(mx.nd.array(pixels.transpose(0, 3, 1, 2))).asnumpy()
""",
    "xgboost": """
import xgboost
model = xgboost.Booster(model_file=folder / "xgboost-model")
logits = model.predict(xgboost.DMatrix(data.validation.features))
labels = data.validation.labels
""",
}


def test_the_exported_model_has_the_logged_accuracy_in_a_fresh_process(framework, uninterrupted):
    folder = uninterrupted(framework) / "output" / framework
    load = "from common import flags, images; data = images.load_images(flags.image_flags('pytorch').parse_args([]))"
    load += "\npixels, labels = data.validation_images[:], data.validation_labels"
    if framework == "xgboost":
        load = "from common import flags, tables; data = tables.load_tables(flags.xgboost_flags().parse_args([]))"
    code = f"from pathlib import Path\nfolder = Path({str(folder / 'model')!r})\n{load}\n{PREDICT[framework]}\n"
    code += "print((logits.argmax(1) == labels).mean())"
    output = subprocess.check_output(
        [sys.executable, "-c", code], cwd=ROOT / framework, env=environment(), text=True, stderr=subprocess.DEVNULL
    )
    logged = metrics(uninterrupted(framework), framework)["validation_accuracy"]
    assert float(output.splitlines()[-1]) == pytest.approx(logged, abs=1e-6)


# Data -----------------------------------------------------------------------------------------------------------------


def save_images(folder, pixels, labels):
    """Write one folder per class with PNG and JPEG files of 16 x 16 pixels."""
    for index, (image, label) in enumerate(zip(pixels, labels)):
        path = folder / f"digit-{label}" / f"{index}.{'png' if index % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((16, 16)).save(path)


def save_npz(folder, pixels, labels):
    folder.mkdir()
    np.savez(folder / "digits.npz", x=pixels / 255, y=labels)


def save_npy(folder, pixels, labels):
    folder.mkdir()
    stem = "eval" if folder.name == "validation" else "train"
    np.save(folder / f"{stem}_data.npy", pixels[..., np.newaxis].repeat(3, axis=3))
    np.save(folder / f"{stem}_labels.npy", labels)


@pytest.mark.parametrize("save", [save_images, save_npz, save_npy])
def test_images_in_every_form(image_framework, tmp_path, digits, save):
    pixels, labels = digits
    save(tmp_path / "train", pixels[:200], labels[:200])
    save(tmp_path / "validation", pixels[200:], labels[200:])
    flags = ["--train", "train", "--validation", "validation", "--batch-size", 16, "--epochs", 6]
    result = run(image_framework, *flags, cwd=tmp_path)
    assert "200 training and 100 validation images" in result.output
    assert result.metric("validation_accuracy") > 0.7


@pytest.mark.parametrize("suffix", ["csv", "libsvm", "parquet"])
def test_tables_in_every_form(tmp_path, suffix):
    from test_tables import WRITERS

    generator = np.random.default_rng(0)
    features = generator.normal(size=(1000, 5))
    rows = np.column_stack([(features[:, 0] * features[:, 1] > 0), features]).astype(np.float32)
    for index, part in enumerate(np.array_split(rows, 4)):
        WRITERS[suffix](tmp_path / ("validation" if index == 3 else "train") / f"part-{index}.{suffix}", part)
    result = run("xgboost", "--train", "train", "--validation", "validation", cwd=tmp_path)
    assert "objective=binary:logistic eval_metric=['logloss', 'error']" in result.output
    assert result.metric("validation_accuracy") > 0.85


def test_labels_that_are_not_classes_make_a_regression(tmp_path):
    from test_tables import write_csv

    features = np.random.default_rng(0).normal(size=(500, 3))
    write_csv(tmp_path / "train/data.csv", np.column_stack([features.sum(1), features]))
    result = run("xgboost", "--train", "train", "--num-round", 20, cwd=tmp_path)
    assert "objective=reg:squarederror eval_metric=['rmse']" in result.output
    assert list(history(tmp_path, "xgboost")[0]) == ["epoch", "train_rmse", "validation_rmse"]
    assert result.metric("validation_rmse") < 0.6


SAMPLING = ["--subsample", 0.7, "--colsample-bytree", 0.5, "--colsample-bynode", 0.7, "--nthread", 2]


@pytest.mark.parametrize("flags", [SAMPLING, ["--booster", "dart", "--rate-drop", 0.3], ["--tree-method", "approx"]])
def test_xgboost_resumes_exactly_also_with_sampling_and_dart(tmp_path, flags):
    import xgboost

    if tuple(map(int, xgboost.__version__.split(".")[:2])) < (3, 4) and flags[0] != "--tree-method":
        pytest.skip("before XGBoost 3.4 row and column samples do not depend on the round alone")
    for name, epochs in (("whole", [10]), ("parts", [3, 7, 10])):
        (tmp_path / name).mkdir()
        for number in epochs:
            run("xgboost", "--num-round", number, *flags, cwd=tmp_path / name)
    assert model_bytes(tmp_path / "whole", "xgboost") == model_bytes(tmp_path / "parts", "xgboost")
    assert history(tmp_path / "whole", "xgboost") == history(tmp_path / "parts", "xgboost")


def test_xgboost_goes_on_from_a_checkpoint_of_the_sagemaker_container(tmp_path):
    """The container saves plain boosters, without our history in them."""
    code = """
import sys
sys.path.insert(0, ".")
import xgboost
import train
args = train.parse_args([])
data = train.load_data(args)
rows = xgboost.DMatrix(*data.train)
booster = xgboost.train({"objective": "multi:softprob", "num_class": 10}, rows, 3)
booster.save_model(sys.argv[1])
"""
    folder = tmp_path / "output/xgboost/checkpoints"
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", code, str(folder / "xgboost-checkpoint.2")]
    subprocess.run(command, cwd=ROOT / "xgboost", check=True, capture_output=True)
    result = run("xgboost", "--num-round", 5, cwd=tmp_path)
    assert "Resuming training from xgboost-checkpoint.2\nStarting training from epoch: 4\n" in result.output
    assert result.epochs == [4, 5]
    assert [row["epoch"] for row in history(tmp_path, "xgboost")] == ["4", "5"]


def test_xgboost_goes_on_where_another_program_went_on_from_its_checkpoint(tmp_path):
    """That program copies our attribute, with a checksum that was true of our file only."""
    run("xgboost", "--num-round", 3, cwd=tmp_path)
    code = """
import sys
sys.path.insert(0, ".")
import xgboost
import train
args = train.parse_args([])
data = train.load_data(args)
booster = xgboost.Booster(model_file=bytearray(open(sys.argv[1] + ".2", "rb").read()))
rows = xgboost.DMatrix(*data.train)
booster = xgboost.train({"objective": "multi:softprob", "num_class": 10}, rows, 2, xgb_model=booster)
assert booster.attr("checkpoint")
open(sys.argv[1] + ".4", "wb").write(booster.save_raw("ubj"))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "output/xgboost/checkpoints/xgboost-checkpoint")]
    subprocess.run(command, cwd=ROOT / "xgboost", check=True, capture_output=True)
    result = run("xgboost", "--num-round", 6, cwd=tmp_path)
    assert "Resuming training from xgboost-checkpoint.4\n" in result.output
    assert result.epochs == [6]


def test_a_damaged_checkpoint_of_xgboost_is_found_before_xgboost_reads_it(tmp_path):
    run("xgboost", "--num-round", 2, cwd=tmp_path)
    path = tmp_path / "output/xgboost/checkpoints/xgboost-checkpoint.1"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    result = run("xgboost", "--num-round", 2, cwd=tmp_path)
    assert "Cannot read xgboost-checkpoint.1, trying the one before: ValueError: its checksum is wrong" in result.output
    assert result.epochs == [2]


# Models and precision -------------------------------------------------------------------------------------------------

ZOO = {"pytorch": "resnet18", "tensorflow": "MobileNetV2", "mxnet": "resnet18_v1"}


def test_a_model_of_the_zoo_trains_and_resumes(image_framework, tmp_path, digits):
    np.savez(tmp_path / "digits.npz", x=digits[0][:65], y=digits[1][:65])
    flags = ["--train", ".", "--model", ZOO[image_framework], "--image-size", 32, "--batch-size", 32]
    run(image_framework, *flags, "--epochs", 1, cwd=tmp_path)
    assert run(image_framework, *flags, "--epochs", 2, cwd=tmp_path).epochs == [2]


def test_a_compiled_network_trains_and_resumes(image_framework, tmp_path):
    flags = ["--compile", "--no-deterministic"] if image_framework == "tensorflow" else ["--compile"]
    made = tmp_path / "compiled"
    env = environment(TORCHINDUCTOR_CACHE_DIR=str(made), XLA_FLAGS=f"--xla_dump_to={made} --xla_dump_hlo_as_text")
    for name, epochs in (("whole", [2]), ("parts", [1, 2])):
        folder = tmp_path / name
        folder.mkdir()
        for epoch in epochs:
            result = run(image_framework, "--epochs", epoch, *flags, cwd=folder, env=env)
    assert result.epochs == [2]
    assert result.metric("validation_accuracy") > 0.9
    if image_framework == "tensorflow":
        line = run(image_framework, "--compile", cwd=tmp_path, code=1).error_line
        assert "add --no-deterministic" in line
    else:
        assert model_bytes(tmp_path / "whole", image_framework) == model_bytes(tmp_path / "parts", image_framework)
    if image_framework != "mxnet":  # which always compiles, and in memory
        assert any(path.is_file() for path in made.rglob("*"))


def test_bf16_trains_and_resumes_exactly(image_framework, tmp_path):
    # Some virtual machines announce AMX, which oneDNN then uses for bf16, but stop a process that does.
    env = environment(ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")
    for name, epochs in (("whole", [2]), ("parts", [1, 2])):
        (tmp_path / name).mkdir()
        for number in epochs:
            flags = ["--precision", "bf16", "--augment", "--epochs", number]
            result = run(image_framework, *flags, cwd=tmp_path / name, env=env)
    assert result.metric("validation_accuracy") > 0.6
    assert model_bytes(tmp_path / "whole", image_framework) == model_bytes(tmp_path / "parts", image_framework)


# Mistakes -------------------------------------------------------------------------------------------------------------


def one_class(folder, digits):
    save_images(folder, digits[0][:5], [0] * 5)


def broken_image(folder, digits):
    save_images(folder, *digits)
    (folder / "digit-3/broken.jpg").write_bytes(b"not a photo")


def wrong_lengths(folder, digits):
    np.savez(folder / "digits.npz", x=digits[0], y=digits[1][:-1])


def float_labels(folder, digits):
    np.savez(folder / "digits.npz", x=digits[0], y=digits[1] + 0.5)


def empty_folder(folder, digits):
    pass


def no_class_folders(folder, digits):
    (folder / "photo.jpg").write_bytes(b"")


IMAGE_MISTAKES = {
    one_class: "one class only (digit-0)",
    broken_image: "digit-3/broken.jpg",
    wrong_lengths: "holds 300 images, but the labels have shape (299,)",
    float_labels: "labels that are not integers",
    empty_folder: "holds nothing: expected one folder per class",
    no_class_folders: "holds photo.jpg: expected one folder per class",
}


@pytest.mark.parametrize("make", IMAGE_MISTAKES)
def test_mistakes_in_the_images(image_framework, tmp_path, digits, make):
    (tmp_path / "data").mkdir()
    make(tmp_path / "data", digits)
    line = run(image_framework, "--train", "data", cwd=tmp_path, code=1).error_line
    assert "data" in line
    assert IMAGE_MISTAKES[make] in line
    assert files(tmp_path, image_framework) == []


TABLE_MISTAKES = {
    "0,1,2\n1,2,3\n0,1\n": "a.csv, line 3: Expected 3 columns, got 2",
    "1,2\n1,3\n1,4\n": "one label only (1)",
    "label,x\n1,2\n": "a.csv",
}


@pytest.mark.parametrize("text", TABLE_MISTAKES)
def test_mistakes_in_the_tables(tmp_path, text):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.csv").write_text(text)
    assert TABLE_MISTAKES[text] in run("xgboost", "--train", "data", cwd=tmp_path, code=1).error_line


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--train", "nowhere"], "--train nowhere is not a folder"),
        (["--device", "cuda"], "--device cuda: "),
        (["--checkpoint-path", "file/checkpoints"], "--checkpoint-path file/checkpoints cannot be written"),
        (["--model-dir", "file/model"], "--model-dir file/model cannot be written"),
    ],
)
def test_what_cannot_work_is_said_before_training(framework, tmp_path, flags, part):
    (tmp_path / "file").touch()
    result = run(framework, *flags, cwd=tmp_path, code=1, env=environment(CUDA_VISIBLE_DEVICES=""))
    assert part in result.error_line
    assert result.epochs == []


@pytest.mark.parametrize("framework", ["tensorflow", "mxnet"])
def test_fp16_needs_a_gpu_where_the_framework_cannot_compute_it_elsewhere(framework, tmp_path):
    line = run(framework, "--precision", "fp16", "--device", "cpu", cwd=tmp_path, code=1).error_line
    assert "--precision fp16" in line
    assert "bf16 or fp32" in line


@pytest.mark.parametrize(
    ("flags", "part"), [(["--epochs", 0], "--epochs"), (["--epohcs", 5], "did you mean --epochs?"), (["x"], "'x'")]
)
def test_usage_errors_exit_with_2(framework, tmp_path, flags, part):
    assert part in run(framework, *flags, cwd=tmp_path, code=2).error_line
    assert os.listdir(tmp_path) == []


def test_an_unknown_model_is_told_with_the_nearest_names(image_framework, tmp_path):
    line = run(image_framework, "--model", ZOO[image_framework] + "x", cwd=tmp_path, code=1).error_line
    assert f"--model {ZOO[image_framework]}x is unknown" in line
    assert ZOO[image_framework] in line.split("nearest are")[1]


def test_images_too_small_for_the_model(image_framework, tmp_path):
    model = {"pytorch": "vgg11", "tensorflow": "VGG16", "mxnet": "vgg11"}[image_framework]
    line = run(image_framework, "--model", model, "--image-size", 4, cwd=tmp_path, code=1).error_line
    assert f"--model {model} cannot take images of 4x4x1" in line
    assert "--image-size" in line


def test_a_checkpoint_of_another_model_or_other_classes_is_refused(image_framework, tmp_path, digits):
    np.savez(tmp_path / "digits.npz", x=digits[0], y=digits[1])
    run(image_framework, "--train", ".", "--epochs", 1, cwd=tmp_path)
    line = run(
        image_framework,
        "--train",
        ".",
        "--model",
        ZOO[image_framework],
        "--image-size",
        32,
        "--epochs",
        2,
        cwd=tmp_path,
        code=1,
    ).error_line
    assert f"--model was cnn and is now {ZOO[image_framework]}" in line
    np.savez(tmp_path / "digits.npz", x=digits[0], y=digits[1] % 3)
    line = run(image_framework, "--train", ".", "--epochs", 2, cwd=tmp_path, code=1).error_line
    assert "number of classes was 10 and is now 3" in line
    assert files(tmp_path, image_framework) == names(image_framework, 1)


def test_a_checkpoint_of_other_classes_is_refused_by_xgboost(tmp_path):
    for name, modulus in (("ten", 10), ("three", 3)):
        (tmp_path / name).mkdir()
        rows = "\n".join(f"{index % modulus},{index}" for index in range(100))
        (tmp_path / name / "data.csv").write_text(rows)
    run("xgboost", "--train", "ten", "--epochs", 1, cwd=tmp_path)
    line = run("xgboost", "--train", "three", "--epochs", 2, cwd=tmp_path, code=1).error_line
    assert "number of classes was 10 and is now 3" in line


def test_another_seed_is_refused_and_other_changed_flags_are_logged(framework, tmp_path):
    run(framework, "--epochs", 1, cwd=tmp_path)
    line = run(framework, "--epochs", 2, "--seed", 7, cwd=tmp_path, code=1).error_line
    assert "--seed was 42 and is now 7" in line
    assert "--resume-anyway" in line
    rate = "eta" if framework == "xgboost" else "learning-rate"
    result = run(framework, "--epochs", 2, "--seed", 7, "--resume-anyway", f"--{rate}", 0.02, cwd=tmp_path)
    assert f"Changed since {checkpoint_name(framework, 1)}: --seed was 42 and is now 7; --{rate} was" in result.output
    assert result.epochs == [2]


def test_a_network_of_your_own_that_does_not_fit_the_checkpoint_is_one_line(image_framework, tmp_path):
    run(image_framework, "--epochs", 1, cwd=tmp_path)
    folder = tmp_path / "mine"
    shutil.copytree(ROOT / image_framework, folder)
    script = (folder / "train.py").read_text()
    changed = script.replace("(32, 64, 128)", "(32, 64, 96)")  # TensorFlow and MXNet
    changed = changed.replace("(64, 128))", "(64, 96))").replace("Linear(128", "Linear(96")  # PyTorch
    assert changed != script
    (folder / "train.py").write_text(changed)
    command = [sys.executable, str(folder / "train.py"), "--epochs", "2"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert f"{checkpoint_name(image_framework, 1)} does not fit the model that build_model returns" in finished.stderr


def test_a_foreign_file_with_the_name_of_a_checkpoint_is_unreadable(tmp_path):
    import torch

    run("pytorch", "--epochs", 1, cwd=tmp_path)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "output/pytorch/checkpoints/checkpoint-7.pt")
    result = run("pytorch", "--epochs", 2, cwd=tmp_path)
    assert "Cannot read checkpoint-7.pt, trying the one before: ValueError: it is not a checkpoint" in result.output
    assert result.epochs == [2]


XGBOOST_MISTAKES = {
    ("--objective", "nope"): ["--objective nope", "Unknown objective function"],
    ("--objective", "binary:logistic"): ["binary:logistic expects the labels 0 to 1", "10 from 0 to 9"],
    ("--num-class", "5"): ["multi:softprob expects the labels 0 to 4"],
    ("--objective", "rank:ndcg"): ["--objective rank:ndcg needs query groups"],
    ("--eval-metric", "nope"): ["--eval-metric nope"],
}


@pytest.mark.parametrize("flags", XGBOOST_MISTAKES, ids="=".join)
def test_mistakes_in_the_flags_of_xgboost(tmp_path, flags):
    line = run("xgboost", *flags, cwd=tmp_path, code=1).error_line
    assert all(part in line for part in XGBOOST_MISTAKES[flags]), line
    assert "/src/" not in line


def test_xgboost_takes_a_number_of_classes_and_another_metric_after_a_restart(tmp_path):
    result = run("xgboost", "--num-class", 12, "--epochs", 2, cwd=tmp_path)
    assert "objective=multi:softprob num_class=12" in result.output
    run("xgboost", "--num-class", 12, "--epochs", 3, "--eval-metric", "mlogloss, auc", cwd=tmp_path)
    rows = history(tmp_path, "xgboost")
    assert [bool(row["validation_auc"]) for row in rows] == [False, False, True]
    line = run("xgboost", "--num-class", 12, "--booster", "dart", "--epochs", 4, cwd=tmp_path, code=1).error_line
    assert "--booster was gbtree and is now dart" in line


LIMIT_FILE_SIZE = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
limit = int(sys.argv.pop(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_harms_no_earlier_model(framework, tmp_path):
    run(framework, "--epochs", 1, cwd=tmp_path)
    folder = tmp_path / "output" / framework / "model"
    earlier = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    limit = max(map(len, earlier.values())) * 3 // 4
    command = [sys.executable, "-c", LIMIT_FILE_SIZE, str(limit), str(ROOT / framework / "train.py"), "--epochs", "1"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "error: cannot write" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == earlier


def test_a_missing_framework_is_one_line(framework, tmp_path):
    module = {"pytorch": "torch", "tensorflow": "keras"}.get(framework, framework)
    code = f"import sys, runpy; sys.modules[{module!r}] = None; path = sys.argv.pop(1); sys.path.insert(0, path)\n"
    code += "runpy.run_path(path + '/train.py', run_name='__main__')"
    command = [sys.executable, "-c", code, str(ROOT / framework)]
    finished = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert finished.returncode == 1
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "this script needs" in lines[0]
    assert "pip install" in lines[0]
    assert "Traceback" not in finished.stderr


# SageMaker ------------------------------------------------------------------------------------------------------------


def test_in_a_container_everything_is_where_sagemaker_wants_it(framework, tmp_path):
    base = tmp_path / "opt/ml"
    env = environment(
        SAGEMAKER_BASE_DIR=str(base),
        SM_MODEL_DIR=str(base / "model"),
        SM_OUTPUT_DATA_DIR=str(base / "output/data"),
        SM_HOSTS='["algo-1"]',
        SM_CURRENT_HOST="algo-1",
        SM_NUM_GPUS="0",
    )
    result = run(framework, "--epochs", "2", "--model_dir", "s3://bucket/job/model", cwd=tmp_path, env=env)
    assert "Not used: --model-dir s3://bucket/job/model" in result.output
    assert sorted(os.listdir(base / "checkpoints")) == names(framework, 1, 2)
    assert (base / "model" / MODEL_FILES[framework]).is_file()
    assert sorted(os.listdir(base / "output/data")) == ["history.csv", "metrics.json"]
    assert sorted(os.listdir(tmp_path)) == ["opt"]
