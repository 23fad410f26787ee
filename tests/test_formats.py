"""Checkpoints can be loaded by the frameworks themselves, without code of this repository."""

import json

import numpy as np
import pytest

from common import flags, images, tables
from helpers import EPOCHS, HAS_MXNET, NO_MXNET, ROOT, checkpoint_folder, checkpoint_name, history, run_python

KERAS = """
import json, sys
import keras
import numpy as np
path, data = sys.argv[1:]
data = np.load(data)
model = keras.models.load_model(path)
iterations = int(model.optimizer.iterations.numpy())
accuracy = model.evaluate(data["x"], data["y"], return_dict=True, verbose=0)["accuracy"]
model.fit(data["x"], data["y"], verbose=0)  # with the optimizer of the checkpoint
print(json.dumps({"accuracy": accuracy, "iterations": iterations}))
"""
MXNET = """
import json, sys
import numpy as np
np.bool = bool
import mxnet as mx
from mxnet.gluon import nn
path, data = sys.argv[1:]
data = np.load(data)
net = nn.HybridSequential()
for filters in (32, 64, 128):
    net.add(nn.Conv2D(filters, 3, padding=1, use_bias=False), nn.BatchNorm(), nn.Activation("relu"))
    net.add(nn.MaxPool2D(2))
net.add(nn.GlobalAvgPool2D(), nn.Flatten(), nn.Dropout(0.25), nn.Dense(10))
net.load_parameters(path, ignore_extra=True)
logits = net(mx.nd.array(((data["x"] - data["mean"]) / data["std"]).transpose(0, 3, 1, 2)))
arrays = mx.nd.load(path)
mx.nd.save("again.params", arrays)
with open(path, "rb") as ours, open("again.params", "rb") as theirs:
    content = theirs.read()
    is_same = ours.read(len(content)) == content
facts = json.loads(arrays["json"].asnumpy().tobytes())
accuracy = float((logits.asnumpy().argmax(1) == data["y"]).mean())
print(json.dumps({"accuracy": accuracy, "is_same": is_same, "epoch": facts["progress"]["epoch"]}))
"""
PYTORCH = """
import json, sys
import torch
path, _ = sys.argv[1:]
content = torch.load(path, weights_only=True)
print(json.dumps({"epoch": content["progress"]["epoch"], "keys": list(content)}))
"""
XGBOOST = """
import json, sys
import numpy as np
import xgboost
path, data = sys.argv[1:]
data = np.load(data)
booster = xgboost.Booster(model_file=path)
predictions = booster.predict(xgboost.DMatrix(data["x"]))
accuracy = float((predictions.argmax(1) == data["y"]).mean())
print(json.dumps({"accuracy": accuracy, "rounds": booster.num_boosted_rounds()}))
"""


def open_checkpoint(code, framework, folder, cwd):
    """Run `code` with the paths of the last checkpoint and of the validation data; return its output."""
    data = cwd / "data.npz"
    if framework == "xgboost":
        validation = tables.load_tables(flags.xgboost_flags().parse_args([]))[1]
        np.savez(data, x=validation.features, y=validation.labels)
    else:
        _, validation = images.load_images(flags.image_flags(framework).parse_args([]))
        pixels, labels = validation[:]
        facts = json.loads((folder / "output" / framework / "model/model.json").read_text())
        np.savez(data, x=pixels, y=labels, mean=facts["mean"], std=facts["std"])
    path = checkpoint_folder(folder, framework) / checkpoint_name(framework, EPOCHS[framework])
    return json.loads(run_python(code, path, data, cwd=cwd).last_line)


def logged_accuracy(folder, framework):
    return pytest.approx(float(history(folder, framework)[-1]["validation_accuracy"]), abs=1e-6)


def test_keras_loads_a_checkpoint_with_its_optimizer(tmp_path, uninterrupted):
    folder = uninterrupted("tensorflow")
    seen = open_checkpoint(KERAS, "tensorflow", folder, tmp_path)
    assert seen["accuracy"] == logged_accuracy(folder, "tensorflow")
    assert seen["iterations"] == EPOCHS["tensorflow"] * 26


@pytest.mark.skipif(not HAS_MXNET, reason=NO_MXNET)
def test_mxnet_loads_a_checkpoint_and_would_save_the_same_bytes(tmp_path, uninterrupted):
    folder = uninterrupted("mxnet")
    seen = open_checkpoint(MXNET, "mxnet", folder, tmp_path)
    assert seen["accuracy"] == logged_accuracy(folder, "mxnet")
    assert seen["is_same"]
    assert seen["epoch"] == EPOCHS["mxnet"]


def test_torch_loads_a_checkpoint_without_executing_it(tmp_path, uninterrupted):
    seen = open_checkpoint(PYTORCH, "pytorch", uninterrupted("pytorch"), tmp_path)
    assert seen["epoch"] == EPOCHS["pytorch"]
    assert {"model", "optimizer", "scaler"} < set(seen["keys"])


def test_xgboost_loads_a_checkpoint(tmp_path, uninterrupted):
    folder = uninterrupted("xgboost")
    seen = open_checkpoint(XGBOOST, "xgboost", folder, tmp_path)
    assert seen["accuracy"] == logged_accuracy(folder, "xgboost")
    assert seen["rounds"] == EPOCHS["xgboost"]


FLIPPED_BITS = """
import io, sys
import numpy as np
import engine
with open(sys.argv[1], "rb") as file:
    content = file.read()
generator = np.random.default_rng()
for position in [*generator.integers(0, len(content), 100), 8, 16, 30, len(content) - 1]:
    damaged = bytearray(content)
    damaged[position] ^= 1 << int(generator.integers(0, 8))
    try:
        engine.read_checkpoint(io.BytesIO(damaged))
    except ValueError:
        continue
    raise SystemExit(f"a flipped bit in byte {position} was not noticed")
"""


@pytest.mark.skipif(not HAS_MXNET, reason=NO_MXNET)
def test_every_flipped_bit_is_detected_before_mxnet_reads_the_file(uninterrupted):
    """MXNet's reader accepts many damaged files and crashes on others."""
    path = checkpoint_folder(uninterrupted("mxnet"), "mxnet") / checkpoint_name("mxnet", 1)
    run_python(FLIPPED_BITS, path, cwd=ROOT / "mxnet")
