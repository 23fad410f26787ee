"""Copies of the scripts with typical changes still resume exactly.

Each test replaces functions of "Make it yours" in a copy, trains once without and once with random
interruptions, and compares batches, weights, optimizer state and metrics bit by bit. More changes are in
`examples/`: parameter groups, label smoothing, tf.data, a custom objective.
"""

from types import SimpleNamespace

import pytest

from helpers import HAS_MXNET, LATER, NO_MXNET, ROOT, Result, choose, copy_with, in_make_test, run, run_verify
from verify import compare


def check_exact(tmp_path, script, *flags):
    """Train without and with two interruptions; fail if `python -m verify` finds a difference.

    Return the Result of the uninterrupted training, which is in the folder `whole`.
    """
    verified = run_verify(script, *flags, folder=tmp_path)
    assert verified.last_line.startswith("Exact: "), verified.output
    again = run(script, *flags, "--output", tmp_path / "interrupted", cwd=tmp_path)
    assert again.epochs == []
    return Result(SimpleNamespace(returncode=0), (tmp_path / "whole/log-1.txt").read_text(), "")


# PyTorch --------------------------------------------------------------------------------------------------

SEGMENTATION = """
def load_data(args):
    train, validation = load_images(args)
    return Masks(train), Masks(validation)

class Masks:
    def __init__(self, images):
        self.images = images
        self.classes = ["ground", "ink"]

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        images, _ = self.images.__getitems__(np.array(indices))
        return images, (images[..., 0] > 128).astype(np.int64)

    def __getitem__(self, index):
        images, masks = self.__getitems__([index])
        return images[0], masks[0]

def augment(images, labels, rng):
    both = np.concatenate([images, labels[..., None].astype(np.uint8)], axis=3)
    both = random_crop_and_flip(both, rng)
    return both[..., :1].copy(), both[..., 1].astype(np.int64)

def build_model(args, data):
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 2, 1))

def compute_loss(outputs, labels, weights):
    losses = F.cross_entropy(outputs, labels, reduction="none").mean((1, 2))
    return (losses * weights).sum()

def compute_metrics(outputs, labels, weights):
    losses = F.cross_entropy(outputs, labels, reduction="none")
    is_correct = outputs.argmax(1) == labels
    per_class = [(is_correct & (labels == k)).sum() for k in range(2)]
    sizes = [(labels == k).sum() for k in range(2)]
    return {
        "loss": (losses.sum(), labels.numel()),
        "accuracy": (is_correct.sum(), labels.numel()),
        "recall": (torch.stack(per_class), torch.stack(sizes)),
    }
"""


def test_segmentation_has_metrics_per_pixel_and_masks_are_augmented(tmp_path):
    script = copy_with(tmp_path / "job", "pytorch", SEGMENTATION, "import numpy as np")
    flags = ["--epochs", 4, "--augment", "--learning-rate", 0.1]
    result = check_exact(tmp_path, script, *flags)
    assert 0.8 < result.metric("validation_accuracy") <= 1
    assert 0.8 < result.metric("train_accuracy") <= 1  # below 0.75 if the masks are not augmented
    assert 0.5 < result.metric("validation_recall") <= 1


F1 = """
def compute_metrics(outputs, labels, weights):
    losses = F.cross_entropy(outputs, labels, reduction="none")
    predicted = F.one_hot(outputs.argmax(1), 10)
    actual = F.one_hot(labels, 10)
    hits = 2 * (predicted * actual).sum(0)
    return {"loss": (losses.sum(), len(labels)), "f1": (hits, (predicted + actual).sum(0))}
"""


@LATER
def test_a_custom_metric_selects_the_exported_epoch(tmp_path):
    """The learning rate is far too high, so that the best epoch is not the last one."""
    script = copy_with(tmp_path / "job", "pytorch", F1)
    flags = ["--epochs", 6, "--learning-rate", 0.6, "--batch-size", 128, "--best-metric", "f1"]
    check_exact(tmp_path, script, *flags)
    output = tmp_path / "whole"
    scores = [float(row["validation_f1"]) for row in compare.read_history(output / "data/history.csv")]
    best = scores.index(max(scores)) + 1
    (tmp_path / "best").mkdir()
    run(script, *flags, "--epochs", best, cwd=tmp_path / "best")
    model = compare.read_model(tmp_path / "best/output/job/model")
    assert model == compare.read_model(output / "model")


TORCH_DATASET = """
def load_data(args):
    digits = load_digits()
    images = digits.images[:500].astype(np.float32) / 16
    train = Digits(images[:400], digits.target[:400], transforms.Compose([
        transforms.ToTensor(),
        transforms.RandomRotation(10),
        transforms.RandomApply([transforms.RandomCrop(8, padding=1)]),
    ]))
    return train, Digits(images[400:], digits.target[400:500], transforms.ToTensor())

class Digits(torch.utils.data.Dataset):
    classes = list("0123456789")

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.transform(self.images[index]) + 0.01 * np.random.rand() + 0.01 * random.random()
        return image.float(), int(self.labels[index])
"""
TORCH_IMPORTS = """
import random
import numpy as np
from sklearn.datasets import load_digits
from torchvision import transforms
"""


@pytest.mark.parametrize("loaders", [pytest.param(0, marks=LATER), 2])
def test_a_torch_dataset_with_random_transforms_resumes_exactly(tmp_path, loaders):
    script = copy_with(tmp_path / "job", "pytorch", TORCH_DATASET, TORCH_IMPORTS)
    flags = ["--epochs", 3, "--batch-size", 16, "--loaders", loaders]
    result = check_exact(tmp_path, script, *flags)
    assert result.metric("train_loss") < 2.3


CHECKED_FORK = """
import time

write, load = engine.write_checkpoint, engine.load_with_processes
writing = []

def write_slowly(*args):
    writing.append(True)
    time.sleep(1)
    write(*args)
    writing.clear()

def load_checked(*args):
    assert not writing, "a process is forked while a checkpoint is written"
    return load(*args)

engine.write_checkpoint, engine.load_with_processes = write_slowly, load_checked
"""


def test_no_process_is_forked_while_a_checkpoint_is_written(tmp_path):
    """It would inherit the locks that the thread of the save holds, and wait for them forever."""
    script = copy_with(tmp_path / "job", "pytorch", TORCH_DATASET, TORCH_IMPORTS + CHECKED_FORK)
    run(script, "--epochs", 3, "--batch-size", 16, "--loaders", 2, cwd=tmp_path)


VOLUMES = """
class Volumes(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.volumes = nn.Conv3d(1, 4, (1, 3, 3))
        self.images = nn.Conv2d(4, num_classes, 3)

    def forward(self, images):
        return self.images(self.volumes(images.unsqueeze(2)).squeeze(2)).mean((2, 3))


def build_model(args, data):
    return Volumes(data.num_classes)
"""


def test_layers_of_other_dimensions_keep_their_layout(tmp_path):
    """The layout of the images exists for two dimensions only."""
    script = copy_with(tmp_path / "job", "pytorch", VOLUMES)
    run(script, "--epochs", 1, cwd=tmp_path)


RANDOM_FORWARD = """
class Noise(nn.Module):
    def forward(self, images):
        return images + 0.1 * torch.randn_like(images) if self.training else images

def build_model(args, data):
    return nn.Sequential(Noise(), nn.Flatten(), nn.Linear(64, data.num_classes))
"""


@LATER
def test_random_numbers_in_forward_resume_exactly(tmp_path):
    script = copy_with(tmp_path / "job", "pytorch", RANDOM_FORWARD)
    check_exact(tmp_path, script, "--epochs", 3)


WEIGHTS = """
def load_data(args):
    train, validation = load_images(args)
    return Weighted(train), validation

class Weighted:
    def __init__(self, images):
        self.images = images
        self.classes = images.classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return image, label, 0.0 if label == 3 else 2.0
"""


@in_make_test("pytorch")
def test_sample_weights_reach_the_loss(tmp_path, image_framework):
    """With a weight of zero for all threes, the network never predicts a three."""
    script = copy_with(tmp_path / "job", image_framework, WEIGHTS)
    result = check_exact(tmp_path, script, "--epochs", 3)
    assert 0.75 < result.metric("validation_accuracy") < 0.95


MEAN_LOSS = {
    "pytorch": """
def compute_loss(outputs, labels, weights):
    return F.cross_entropy(outputs, labels)
""",
    "mxnet": """
def compute_loss(outputs, labels, weights):
    return -outputs.log_softmax().pick(labels).mean()
""",
}


@pytest.mark.parametrize("framework", ["pytorch", pytest.param("mxnet", marks=LATER)])
def test_a_loss_that_is_a_mean_is_named(framework, tmp_path, uninterrupted):
    line = "Warning: compute_loss is not the sum over the samples: for one sample it is 2."
    script = copy_with(tmp_path / "job", choose(framework), MEAN_LOSS[framework])
    result = run(script, "--epochs", 1, cwd=tmp_path)
    assert result.output.count(line) == 1
    assert line not in (uninterrupted(framework) / "log").read_text()
    assert sorted(path.name for path in (tmp_path / "output/job").iterdir()) == [
        "checkpoints",
        "data",
        "model",
    ]


VECTOR_LOSS = """
def compute_loss(outputs, labels, weights):
    return F.cross_entropy(outputs, labels, reduction="none")
"""


def test_a_loss_that_is_a_vector_is_one_line(tmp_path):
    script = copy_with(tmp_path / "job", "pytorch", VECTOR_LOSS)
    line = run(script, "--epochs", 1, cwd=tmp_path, code=1).error_line
    assert "compute_loss returns a tensor of shape (2,): return the sum over the samples" in line


def test_a_second_training_does_not_overwrite_the_model_of_the_first(tmp_path):
    script = ROOT / "pytorch/train.py"
    run(script, "--epochs", 1, cwd=tmp_path)
    earlier = compare.read_model(tmp_path / "output/pytorch/model")
    line = run(script, "--epochs", 1, "--checkpoint-path", "other", cwd=tmp_path, code=1).error_line
    assert "--model-dir output/pytorch/model contains the model of another job" in line
    assert "../checkpoints" in line
    assert "../../../other" in line
    assert compare.read_model(tmp_path / "output/pytorch/model") == earlier
    run(script, "--epochs", 1, "--output", "elsewhere", cwd=tmp_path)


# TensorFlow -----------------------------------------------------------------------------------------------

OWN_CALLBACKS = """
def callbacks(args):
    return [
        keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=1, min_delta=0.02),
        keras.callbacks.EarlyStopping(patience=3, min_delta=0.02, restore_best_weights=False),
        Counter(),
    ]

class Counter(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.num_batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.num_batches += 1
"""
SMOOTHED = """
def compile_model(args, model, steps_per_epoch):
    model.compile(
        keras.optimizers.Adam(args.learning_rate),
        loss=Smoothed(),
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy("loss", from_logits=True),
            keras.metrics.SparseCategoricalAccuracy("accuracy"),
        ],
    )

class Smoothed(keras.losses.Loss):
    def call(self, labels, outputs):
        targets = keras.ops.one_hot(labels, 10) * 0.9 + 0.01
        return keras.losses.categorical_crossentropy(targets, outputs, from_logits=True)
"""


def test_keras_callbacks_keep_their_state_and_a_stateful_custom_one_is_logged(tmp_path):
    script = copy_with(tmp_path / "job", "tensorflow", OWN_CALLBACKS + SMOOTHED)
    result = check_exact(tmp_path, script, "--epochs", 30)
    assert len(result.epochs) < 30  # stopped early; the same command trains nothing more
    assert "Counter" in result.output
    assert result.metric("validation_loss") < 0.3  # would be above 0.5 with label smoothing


def test_a_schedule_with_reduce_lr_on_plateau_is_a_one_line_error(tmp_path):
    script = copy_with(tmp_path / "job", "tensorflow", OWN_CALLBACKS)
    line = run(script, "--schedule", "cosine", cwd=tmp_path, code=1).error_line
    assert "ReduceLROnPlateau" in line
    assert "--schedule" in line


# MXNet ----------------------------------------------------------------------------------------------------

GLUON_DATASET = """
def load_data(args):
    train, validation = load_images(args)
    transform = transforms.Compose([transforms.RandomFlipLeftRight(), transforms.ToTensor()])
    pairs = [gluon.data.ArrayDataset(nd.array(s[:][0], dtype="uint8"), s[:][1]) for s in (train, validation)]
    train = pairs[0].transform_first(transform)
    validation = pairs[1].transform_first(transforms.ToTensor())
    return Named(train), Named(validation)

class Named:
    classes = list("0123456789")

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return 320

    def __getitem__(self, index):
        return self.dataset[index % len(self.dataset)]
"""
GLUON_IMPORTS = """
from mxnet import nd
from mxnet.gluon.data.vision import transforms
"""


@LATER
@pytest.mark.skipif(not HAS_MXNET, reason=NO_MXNET)
def test_a_gluon_dataset_with_random_transforms_resumes_exactly(tmp_path):
    script = copy_with(tmp_path / "job", "mxnet", GLUON_DATASET, GLUON_IMPORTS)
    result = check_exact(tmp_path, script, "--epochs", 3, "--optimizer", "adamw")
    assert result.metric("train_loss") < 2.3
