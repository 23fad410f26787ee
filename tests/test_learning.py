"""Common behaviour of the image scripts: initial weights, optimizers, learning rates, devices."""

import json
import shutil
import textwrap

import numpy as np
import pytest

from helpers import (
    HAS_MXNET,
    NO_MXNET,
    PLAIN_NETWORKS,
    ROOT,
    copy_script,
    history,
    in_make_test,
    model_bytes,
    replace_body,
    run,
    run_many,
    run_python,
    run_with,
)

# Weights ----------------------------------------------------------------------------------------------------

# Each writes the weights of a trained network, or only of its first layers.
SAVE_WEIGHTS = {
    "pytorch": """
import torch
weights = torch.load(model / "model.pth", weights_only=True)
torch.save(weights, "all.pth")
torch.save({"state_dict": list(weights)}, "wrong.pth")
from safetensors.torch import save_file
save_file(weights, "all.safetensors")
""",
    "tensorflow": """
import keras
from common import flags
import train
from common.run import Run
args = train.parse_args(["--epochs", "2"])
with Run(args, train.engine) as run:
    state = train.TrainingState(args, run, run.load_data(train.load_data(args)))
    run.restore(state)
    state.model.save("all.keras")
""",
    "mxnet": """
import shutil
import textwrap
shutil.copy(model / "model-0000.params", "all.params")
""",
}
SUFFIXES = {"pytorch": [".pth", ".safetensors"], "tensorflow": [".keras"], "mxnet": [".params"]}


@pytest.fixture
def weights(image_framework, tmp_path, uninterrupted):
    """Return the weights files of a trained network; copy its checkpoints to `tmp_path`."""
    source = uninterrupted(image_framework)
    shutil.copytree(source / "output", tmp_path / "output")
    code = f"import sys\nsys.path.insert(0, {str(ROOT / image_framework)!r})\nfrom pathlib import Path\n"
    code += f"model = Path('output/{image_framework}/model')\n"
    code = code.replace('"--epochs", "2"', '"--epochs", "12"')
    run_python(code + SAVE_WEIGHTS[image_framework], cwd=tmp_path)
    shutil.rmtree(tmp_path / "output")
    return [tmp_path / f"all{suffix}" for suffix in SUFFIXES[image_framework]]


@in_make_test("pytorch", "mxnet")
def test_a_training_starts_from_the_given_weights(image_framework, tmp_path, weights, digits):
    """Layers of another shape keep their initial values and are logged; a checkpoint takes precedence."""
    (tmp_path / "three").mkdir()
    np.savez(tmp_path / "three/few.npz", x=digits[0], y=digits[1] % 3)
    channel = tmp_path / "channel"
    channel.mkdir()
    shutil.copy(weights[0], channel)
    broken = tmp_path / f"broken{weights[0].suffix}"
    broken.write_bytes(weights[0].read_bytes()[:1000])
    slow = ["--learning-rate", 0.00001, "--epochs", 1]
    jobs = [(tmp_path, [*slow, "--output", f"start-{path.suffix}", "--weights", path]) for path in weights]
    jobs += [
        (tmp_path, [*slow, "--output", "channel-run", "--weights", channel]),
        (
            tmp_path,
            ["--epochs", 2, "--output", "channel-run", "--weights", "nowhere", "--learning-rate", 0.001],
        ),
        (tmp_path, [*slow, "--output", "other", "--weights", weights[0], "--train", "three"]),
        (tmp_path, ["--output", "broken", "--weights", broken]),
    ]
    *started, from_channel, resumed, other, damaged = run_many(image_framework, jobs, cwd=tmp_path)
    for result in (*started, from_channel):
        line = next(line for line in result.output.splitlines() if line.startswith("Weights: "))
        assert "not in it" not in line
        assert result.metric("validation_accuracy") > 0.95  # the accuracy of the weights after twelve epochs
    assert "Weights: " not in resumed.output
    assert resumed.epochs == [2]
    line = next(line for line in other.output.splitlines() if line.startswith("Weights: "))
    left_out = line.split("; ")[1]
    assert "not in it: " in left_out
    assert 1 <= left_out.count(",") + 1 <= 2  # weight and bias of the last layer
    assert f"--weights {broken} cannot be read" in damaged.error_line


def test_weights_that_fit_no_layer_are_rejected(tmp_path, uninterrupted):
    model = uninterrupted("pytorch") / "output/pytorch/model/model.pth"
    flags = ["--weights", model, "--model", "resnet18", "--image-size", 32]
    line = run("pytorch", *flags, cwd=tmp_path, code=1).error_line
    assert "no layer fits the model, whose layers are conv1.weight, " in line


# Networks and optimizers ------------------------------------------------------------------------------------

# Each returns the standard deviation of the initial weights of each layer, multiplied by sqrt(inputs).
INITIAL_WEIGHTS = """
from types import SimpleNamespace
import numpy as np
data = SimpleNamespace(sample_shape=(32, 32, 3), dtype=np.dtype("uint8"), num_classes=1000, mean=None)
model = train.build_model(args, data)
def scaled(weights, num_outputs):
    return float(weights.std() * (weights.size / num_outputs) ** 0.5)
"""
SCALED_WEIGHTS = {
    "pytorch": """
weights = [parameter.detach().numpy() for parameter in model.parameters() if parameter.ndim > 1]
return [scaled(array, array.shape[0]) for array in weights]
""",
    "tensorflow": """
weights = [variable.numpy() for variable in model.trainable_variables if len(variable.shape) > 1]
return [scaled(array, array.shape[-1]) for array in weights]
""",
    "mxnet": """
import mxnet as mx
model(mx.nd.zeros((1, 3, 32, 32)))
weights = [parameter.data().asnumpy() for parameter in model.collect_params().values()]
return [scaled(array, array.shape[0]) for array in weights if array.ndim > 1]
""",
}

# Each returns a weight with the initial value 1 and no gradient, after 1,000 steps.
DECAY = {
    "pytorch": """
import torch
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.ones_(model.weight)
optimizer = train.build_optimizer(args, model)
for _ in range(1000):
    model.weight.grad = torch.zeros(1, 1)
    optimizer.step()
return model.weight.item()
""",
    "tensorflow": """
import keras
import tensorflow as tf
layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
model = keras.Sequential([keras.Input((1,)), layer])
train.compile_model(args, model, 100)
for _ in range(1000):
    model.optimizer.apply([tf.zeros((1, 1))], model.trainable_variables)
return float(model.trainable_variables[0][0, 0])
""",
    "mxnet": """
import mxnet as mx
model = mx.gluon.nn.HybridSequential()
model.add(mx.gluon.nn.Dense(1, use_bias=False, in_units=1))
model.initialize(mx.init.One())
optimizer = train.build_optimizer(args, model)
for _ in range(1000):
    with mx.autograd.record():
        loss = (model(mx.nd.zeros((1, 1)))).sum()
    loss.backward()
    optimizer.step(1)
return model[0].weight.data().asnumpy().item()
""",
}


# Runs a piece of code with the flags `args`, several times in one process, and prints the results.
EACH = """
import json, sys
sys.path.insert(0, {folder!r})
import train
def value(args):
{code}
print(json.dumps([value(train.parse_args(flags)) for flags in {flags!r}]))
"""


def values(framework, code, cases, cwd):
    """Run the code, the body of a function of `args`, with each list of flags; return the results."""
    folder = str(ROOT / framework)
    code = textwrap.indent(code, "    ")
    script = EACH.format(folder=folder, code=code, flags=[list(map(str, flags)) for flags in cases])
    return json.loads(run_python(script, cwd=cwd).last_line)


def test_the_initial_weights_have_the_same_range_in_all_image_scripts(image_framework, tmp_path):
    """The weights are uniform within 1 / sqrt(inputs), whose standard deviation is 1 / sqrt(3 * inputs)."""
    code = INITIAL_WEIGHTS + SCALED_WEIGHTS[image_framework]
    [found] = values(image_framework, code, [[]], tmp_path)
    assert found == pytest.approx([3**-0.5] * 4, rel=0.1)


@pytest.mark.skipif(not HAS_MXNET, reason=NO_MXNET)
def test_the_initial_weights_of_a_network_of_mxnet_stay(tmp_path):
    """`build_model` initializes layers whose shapes are known only with the first batch."""
    run("mxnet", "--epochs", 1, "--learning-rate", 1e-9, cwd=tmp_path)
    code = """
import numpy
numpy.bool = bool
import mxnet as mx
weights = mx.nd.load("output/mxnet/model/model-0000.params")
found = [array.asnumpy() for array in weights.values() if array.ndim == 4 and array.shape[0] > 1]
print([float(abs(array).max() * array[0].size ** 0.5) for array in found])
"""
    largest = json.loads(run_python(code, cwd=tmp_path).last_line)
    assert largest == pytest.approx([1] * 3, abs=0.05)


def test_weight_decay_is_the_same_in_all_image_scripts(image_framework, tmp_path):
    """SGD multiplies it by 1 / (1 - momentum), AdamW does not; both multiply it by the learning rate."""
    decay = ["--learning-rate", 0.05, "--weight-decay", 0.0005]
    cases = [["--optimizer", "sgd", *decay], ["--optimizer", "adamw", *decay]]
    weights = values(image_framework, DECAY[image_framework], cases, tmp_path)
    assert weights == pytest.approx([0.7795, 0.9753], abs=0.001)


# Each returns the learning rates of a hundred steps, ten per epoch.
RATES = {
    "pytorch": """
return [args.learning_rate * train.learning_rate_factor(args, step, 10) for step in range(100)]
""",
    "tensorflow": """
schedule = train.learning_rate_schedule(args, 10)
return [float(schedule(step)) if callable(schedule) else schedule for step in range(100)]
""",
}


@pytest.mark.parametrize("framework", RATES)
def test_learning_rates_rise_in_the_warm_up_and_then_stay_constant_or_fall(framework, tmp_path):
    """MXNet uses the same function as PyTorch, see test_layout.py."""
    warm_up = np.arange(1, 21) / 21 * 0.5
    half_cosine = (1 + np.cos(np.pi * np.arange(80) / 80)) / 2 * 0.5
    whole_cosine = (1 + np.cos(np.pi * np.arange(100) / 100)) / 2 * 0.5
    cases = {
        (): np.full(100, 0.5),
        ("--warmup-epochs", 2): np.concatenate([warm_up, np.full(80, 0.5)]),
        ("--schedule", "cosine"): whole_cosine,
        ("--schedule", "cosine", "--warmup-epochs", 2): np.concatenate([warm_up, half_cosine]),
    }
    flags = [["--learning-rate", 0.5, "--epochs", 10, *more] for more in cases]
    for rates, (more, expected) in zip(values(framework, RATES[framework], flags, tmp_path), cases.items()):
        np.testing.assert_allclose(rates, expected, rtol=1e-4, err_msg=str(more))


# Several devices of one machine, without a GPU --------------------------------------------------------------

TWO_DEVICES = {
    "tensorflow": """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
""",
    "mxnet": 'os.environ["MXNET_CPU_CONTEXTS"] = "2"',
}


@pytest.mark.parametrize("framework", TWO_DEVICES)
def test_two_devices_of_one_machine_match_one_and_resume_exactly(framework, tmp_path):
    """Batches of 45 samples, and the last ones of 44, do not divide evenly."""
    if framework == "mxnet" and not HAS_MXNET:
        pytest.skip(NO_MXNET)
    script = copy_script(framework, tmp_path)
    replace_body(script, build_model=PLAIN_NETWORKS[framework])
    flags = ["--epochs", 3, "--batch-size", 45, "--augment"]
    devices = TWO_DEVICES[framework]
    folders = {name: tmp_path / name for name in ("one", "two", "parts")}
    for folder in folders.values():
        folder.mkdir()
    run(script, *flags, cwd=folders["one"])
    result = run_with(devices, script, *flags, cwd=folders["two"], code=0)
    event = f'{devices}\nat_call(Run, "finish_step", 50, lambda: send(signal.SIGTERM))'
    run_with(event, script, *flags, cwd=folders["parts"], code=143)
    resumed = run_with(devices, script, *flags, cwd=folders["parts"], code=0)
    assert "Device: 2 cpu (fp32)\n" in result.output
    assert "Starting training from epoch: 2, step: " in resumed.output
    assert history(folders["parts"], framework) == history(folders["two"], framework)
    assert model_bytes(folders["parts"], framework) == model_bytes(folders["two"], framework)
    rows, others = history(folders["two"], framework), history(folders["one"], framework)
    assert len(rows) == len(others) == 3
    for row, other in zip(rows, others):
        for name in row:
            # Rounding may change the predicted class of one of the 179 validation images, not of two.
            tolerance = 1.5 / 179 if name == "validation_accuracy" else 2e-3
            assert float(row[name]) == pytest.approx(float(other[name]), rel=2e-3, abs=tolerance), name
