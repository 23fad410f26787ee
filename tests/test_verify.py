"""Common mistakes in a copy: the log reports them at the start, and `python -m verify` finds them."""

import re
import signal
import sys
import time
from typing import NamedTuple

import psutil
import pytest

from helpers import ROOT, choose, copy_with, finish, run, run_verify, start_command


class Mistake(NamedTuple):
    """A change that breaks exactness.

    Attributes:
        framework: the framework of the template.
        changes, imports: see `copy_with`.
        flags: the flags of the script.
        warning: the expected warning in the script's log; empty for none.
        verdict: the expected first difference and likely cause.
        at: the step after which the training is interrupted; an epoch has 26.
    """

    framework: str
    changes: str
    imports: str
    flags: tuple
    warning: str
    verdict: str
    at: int = 5


OWN_GENERATOR = """
def load_data(args):
    train, validation = load_images(args)
    return Mislabeled(train), validation

class Mislabeled:
    def __init__(self, images):
        self.images = images
        self.classes = images.classes
        self.rng = np.random.default_rng(0)

    def __len__(self):
        return 200

    def __getitem__(self, index):
        image, label = self.images[index]
        return image, self.rng.integers(10) if self.rng.random() < 0.1 else label
"""
OWN_AUGMENT = """
def augment(images, labels, rng):
    return np.roll(images, np.random.randint(-1, 2), axis=1), labels
"""
UNREGISTERED_BUFFER = """
class Center(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(64)

    def forward(self, inputs):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        return inputs - self.mean

def build_model(args, data):
    return nn.Sequential(nn.Flatten(), Center(), nn.Linear(64, data.num_classes))
"""
OPTIMIZER = """
class SlowlyStarting(torch.optim.SGD):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        for group in self.param_groups:
            group["lr"] *= min(1.0, self.num_steps / 40)
        return super().step(closure)

def build_optimizer(args, model):
    return SlowlyStarting(model.parameters(), args.learning_rate)
"""
GLOBAL_VARIABLE = """
def compute_loss(outputs, labels, weights):
    global num_calls
    num_calls += 1
    smoothing = 0.2 / num_calls
    return F.cross_entropy(outputs, labels, reduction="none", label_smoothing=smoothing).sum()
"""
METRIC = """
def compute_metrics(outputs, labels, weights):
    is_correct = outputs.argmax(1) == labels
    recent.append(float(is_correct.sum()))
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return {"loss": (losses.sum(), len(labels)), "recent": (sum(recent[-5:]), 5)}
"""
NUMPY_IN_FORWARD = """
class Noise(nn.Module):
    def forward(self, images):
        noise = np.random.normal(size=images.shape) if self.training else 0.0
        return images + torch.as_tensor(noise, dtype=images.dtype)

def build_model(args, data):
    return nn.Sequential(Noise(), nn.Flatten(), nn.Linear(64, data.num_classes))
"""
CHANGING_DATA = """
def load_data(args):
    train, validation = load_images(args)
    folder = args.output.parent
    count = len(list(folder.glob("read-*")))
    (folder / f"read-{count}").touch()
    train.images = train.images + np.uint8(count)
    return train, validation
"""
SHUFFLE = """
def load_data(args):
    train, validation = load_images(args)
    samples = tf.data.Dataset.from_tensor_slices(train[:]).shuffle(2000, seed=args.seed)

    def training_set(epoch, first_step):
        return samples.batch(args.batch_size).skip(first_step)

    training_set.classes = train.classes
    return training_set, validation
"""
CALLBACK = """
def callbacks(args):
    return [Decay()]

class Decay(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.num_batches = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.num_batches += 1
        self.model.optimizer.learning_rate = 0.01 / self.num_batches
"""
EARLY_STOPPING = """
def train(args, run, state):
    initial_epoch = run.restore(state)
    if initial_epoch >= args.epochs:
        return
    with state.matrices() as (train_matrix, validation_matrix):
        state.booster = xgb.train(
            state.params,
            train_matrix,
            num_boost_round=args.epochs - initial_epoch,
            evals=[(train_matrix, "train"), (validation_matrix, "validation")],
            xgb_model=state.booster,
            verbose_eval=False,
            callbacks=[engine.Rounds(run, state), xgb.callback.EarlyStopping(5)],
        )
"""

NOT_SKIPPED = SHUFFLE.replace(".skip(first_step)", "").replace(".shuffle(2000, seed=args.seed)", "")

# Also changes the momentum of the optimizer.
SCHEDULER = """
class TrainingState(engine.State):
    def __init__(self, args, run, data):
        super().__init__(args, run, data)
        self.model = self.place(build_model(args, data))
        self.optimizer = build_optimizer(args, self.model)
        self.prepare()
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, 60)

    def state_dict(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        self.load_optimizer(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])

def train_step(args, state, batch):
    images, labels, weights = state.load_batch(batch)
    state.optimizer.zero_grad()
    outputs = state.network(images)
    loss = compute_loss(outputs, labels, weights) / batch.samples_per_worker
    loss.backward()
    state.optimizer.step()
    state.scheduler.step()
    return compute_metrics(outputs.detach(), labels, weights)
"""
UNSAVED_SCHEDULER = SCHEDULER.replace('"scheduler": self.scheduler.state_dict(),', "")
UNSAVED_SCHEDULER = UNSAVED_SCHEDULER.replace('self.scheduler.load_state_dict(checkpoint["scheduler"])', "")

NP = "import numpy as np"
OTHER_GENERATOR = "the batch.*Likely cause: random numbers from another generator"
OUTSIDE = "Likely cause: state outside the checkpoint"
TWO_EPOCHS = ("--epochs", 2)
MISTAKES = {
    "a data set with its own generator": Mistake(
        "pytorch",
        OWN_GENERATOR,
        NP,
        TWO_EPOCHS,
        "the training data set returns different samples when read again",
        f"after SIGTERM sent after epoch 2, step 1: {OTHER_GENERATOR}",
    ),
    "augment that ignores rng": Mistake(
        "mxnet",
        OWN_AUGMENT,
        NP,
        ("--epochs", 2, "--augment"),
        "augment returns different samples for the same `rng`",
        OTHER_GENERATOR,
    ),
    "a tensor that is not a buffer": Mistake(
        "pytorch",
        UNREGISTERED_BUFFER,
        "",
        TWO_EPOCHS,
        r"training changes mean \(an attribute of the layer 1\), which no checkpoint contains",
        f"since epoch 1, step [6-9], after SIGTERM sent after epoch 1, step 5: model, optimizer.*{OUTSIDE}",
    ),
    "an optimizer with additional state": Mistake(
        "pytorch",
        OPTIMIZER,
        "",
        TWO_EPOCHS,
        r"training changes num_steps \(an attribute of the optimizer\), which no checkpoint contains",
        f"since epoch 1, step [6-9], .*: model, optimizer.*{OUTSIDE}",
    ),
    "a scheduler that is not saved": Mistake(
        "pytorch",
        UNSAVED_SCHEDULER,
        "",
        TWO_EPOCHS,
        r"training changes scheduler \(an attribute of TrainingState\), which no checkpoint contains",
        f"since epoch 1, step [6-9], .*: optimizer.*{OUTSIDE}",
    ),
    "a global variable": Mistake(
        "pytorch",
        GLOBAL_VARIABLE,
        "num_calls = 0",
        TWO_EPOCHS,
        r"training changes num_calls \(a variable of train.py\), which no checkpoint contains",
        f"since epoch 1, step [6-9], .*: model, optimizer.*{OUTSIDE}",
    ),
    "a metric with a memory": Mistake(
        "pytorch",
        METRIC,
        "recent = []",
        TWO_EPOCHS,
        r"training changes recent \(a variable of train.py\), which no checkpoint contains",
        f"since epoch 1: .*train_recent.*; the weights are the same.*in a metric, {OUTSIDE[14:]}",
    ),
    "numpy.random in a step": Mistake(
        "pytorch",
        NUMPY_IN_FORWARD,
        NP,
        TWO_EPOCHS,
        "",
        "model, optimizer.*Likely cause: the step draws random numbers from numpy.random",
    ),
    "data that changes": Mistake(
        "pytorch",
        CHANGING_DATA,
        NP,
        TWO_EPOCHS,
        "the data has changed since",
        f"since epoch 1, step 1, before any interruption: {OTHER_GENERATOR}, or data that changes",
    ),
    "a shuffled tf.data.Dataset": Mistake(
        "tensorflow",
        SHUFFLE,
        "import tensorflow as tf",
        TWO_EPOCHS,
        "the training data set returns different samples when read again",
        OTHER_GENERATOR,
        at=30,
    ),
    "a tf.data.Dataset that ignores the first step": Mistake(
        "tensorflow",
        NOT_SKIPPED,
        "import tensorflow as tf",
        TWO_EPOCHS,
        "does not begin with the second batch",
        OTHER_GENERATOR,
    ),
    "a Keras callback with a state": Mistake(
        "tensorflow",
        CALLBACK,
        "",
        TWO_EPOCHS,
        r"no checkpoint holds the state of Decay \(num_batches\)",
        f"since epoch 1, step [6-9], .*: model, optimizer.*{OUTSIDE}",
    ),
    "XGBoost's EarlyStopping": Mistake(
        "xgboost",
        EARLY_STOPPING,
        "",
        ("--num-round", 60, "--eta", 1, "--max-depth", 1, "--objective", "multi:softmax"),
        "no checkpoint holds the state of xgb.callback.EarlyStopping",
        OUTSIDE,
    ),
}


# One of each kind and framework runs under `make test`, the others under `make integration`.
LATER = {
    "an optimizer with additional state",
    "a scheduler that is not saved",
    "a global variable",
    "a metric with a memory",
    "data that changes",
    "a tf.data.Dataset that ignores the first step",
}
PARAMETERS = [
    pytest.param(mistake, id=name, marks=[pytest.mark.integration] if name in LATER else [])
    for name, mistake in MISTAKES.items()
]


@pytest.mark.parametrize("mistake", PARAMETERS)
def test_a_mistake_is_reported_in_the_log_and_found(mistake, tmp_path):
    choose(mistake.framework)
    script = copy_with(tmp_path / "job", mistake.framework, mistake.changes, mistake.imports)
    options = ["--at", mistake.at, "--signal", "TERM"]
    result = run_verify(script, *mistake.flags, folder=tmp_path, options=options, code=1)
    report = " ".join(result.output.splitlines())
    assert re.search(f"Not exact: the trainings differ .*{mistake.verdict}", report), result.output
    if mistake.warning:
        assert re.search(f"The script's log: Warning: .*{mistake.warning}", report), result.output
    else:
        assert "Warning: " not in report


def test_a_scheduler_that_is_saved_is_exact(tmp_path):
    """It changes the momentum of the optimizer, which is restored from the checkpoint."""
    script = copy_with(tmp_path / "job", "pytorch", SCHEDULER)
    result = run_verify(script, *TWO_EPOCHS, folder=tmp_path, options=["--at", "5,30"])
    assert result.last_line.startswith("Exact: 52 steps, interruptions: 2, ")
    assert "Warning: " not in result.output
    assert "Changed in parameter group" not in (tmp_path / "interrupted/log-2.txt").read_text()


def test_a_state_that_could_not_be_read_is_rejected_on_saving(tmp_path):
    changes = SCHEDULER.replace("self.scheduler.state_dict(),", "[iter(())],")
    script = copy_with(tmp_path / "job", "pytorch", changes)
    line = run(script, "--epochs", 1, cwd=tmp_path, code=1).error_line
    assert "state_dict() returns a tuple_iterator as scheduler/0: expected tensors, numbers" in line


def test_an_interruption_before_the_first_step_is_never_missed(tmp_path):
    """The second start may be much faster than the first one, from which its duration is estimated."""
    slow = "import time\nif args.output.name == 'whole':\n    time.sleep(5)\n"
    script = copy_with(tmp_path / "job", "xgboost", "", "")
    script.write_text(script.read_text().replace("import engine\n", f"import engine\n{slow}", 1))
    options = ["--interruptions", 3, "--seed", 8]  # two of them are before the first step
    result = run_verify(script, folder=tmp_path, options=options)
    assert "SIGTERM before the first step" in result.output or "SIGKILL before" in result.output
    assert result.last_line.startswith("Exact: 50 steps, interruptions: 3, ")


def test_the_training_ends_with_the_command(tmp_path):
    command = [sys.executable, "-m", "verify", "pytorch/train.py", "--output", str(tmp_path)]
    process = start_command(command, ROOT)
    log = tmp_path / "whole/log-1.txt"
    while not log.exists() or "Device" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    result = finish(process, 143)
    assert "Traceback" not in result.errors
    commands = [each.info["cmdline"] or [] for each in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(tmp_path) in " ".join(command)]


def test_tf_data_without_a_seed_is_a_one_line_error(tmp_path):
    changes = SHUFFLE.replace("samples.batch", "samples.shuffle(9).batch")
    script = copy_with(tmp_path / "job", "tensorflow", changes, "import tensorflow as tf")
    line = run(script, cwd=tmp_path, code=1).error_line
    assert "the tf.data.Dataset draws random numbers without a seed" in line


def test_flags_of_the_script_before_the_dashes_are_one_line(tmp_path):
    command = [sys.executable, "-m", "verify", str(ROOT / "xgboost/train.py"), "--epochs", "2"]
    errors = finish(start_command(command, ROOT), 2).errors
    assert "error: unknown: --epochs 2; flags of the script follow --, such as: -- --epochs 2" in errors


def test_a_failing_script_is_a_one_line_error(tmp_path):
    script = copy_with(tmp_path / "job", "xgboost", "def load_data(args):\n    return load_tables(no_args)")
    line = run_verify(script, folder=tmp_path, code=1).error_line
    assert "failed with exit code 1" in line
    assert "name 'no_args' is not defined" in line
    options = ["--at", "1000"]
    line = run_verify(ROOT / "xgboost/train.py", folder=tmp_path, options=options, code=1).error_line
    assert "--at 1000: the training has 50 steps" in line
    result = run_verify(ROOT / "xgboost/train.py", "--model-dir=x", folder=tmp_path, code=2)
    assert "--model-dir=x after --" in result.errors
