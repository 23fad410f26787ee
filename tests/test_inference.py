"""The exported model is self-describing, and predicts with only its own `code/`."""

import csv
import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from common import model_folder, serving
from helpers import (
    ROOT,
    checkpoint_folder,
    checkpoint_name,
    copy_with,
    environment,
    finish,
    metrics,
    once,
    run,
    run_python,
    save_images,
    start_command,
    write_parquet,
)

DIGITS = [str(digit) for digit in range(10)]
TABLE_NAMES = [f"column-{index}" for index in range(1, 65)]


@pytest.fixture(scope="session")
def trained(shared_folder, digits):
    """Return the folder of a training on real files: JPEG images of digits, or a Parquet table."""

    def folder_of(framework):
        return once(shared_folder / f"inference-{framework}", lambda folder: train(framework, folder))

    def train(framework, folder):
        pixels, labels = digits
        flags = ["--train", "data/train", "--validation", "data/validation", "--best-metric", "accuracy"]
        for name, part in (("train", slice(200)), ("validation", slice(200, 300))):
            if framework == "xgboost":
                rows = np.column_stack([labels[part], pixels[part].reshape(-1, 64)])
                write_parquet(folder / "data" / name / "table.parquet", rows)
            else:
                colors = np.stack([pixels[part]] * 3, axis=3)
                save_images(folder / "data" / name, colors, labels[part], (".jpg",), size=16)
        flags += ["--num-round", 5] if framework == "xgboost" else ["--epochs", 3, "--learning-rate", 0.05]
        run(framework, *flags, cwd=folder)

    return folder_of


def model_of(folder, framework):
    return folder / "output" / framework / "model"


def predict(code, folder, framework, tmp_path, *arguments):
    """Run Python code with the `inference` module of the exported model; return its JSON output.

    No other module of this repository can be imported.
    """
    model = tmp_path / "model"
    if not model.exists():
        shutil.copytree(model_of(folder, framework), model)
    code = f"import json, sys\nmodel_dir = {str(model)!r}\nsys.path.insert(0, model_dir + '/code')\n{code}"
    result = run_python(code, *arguments, cwd=tmp_path, env=environment(PYTHONSAFEPATH="1"))
    return json.loads(result.last_line)


# The content of the folder ----------------------------------------------------------------------------------


def test_the_model_folder_is_self_describing(framework, trained):
    folder = trained(framework)
    place = model_of(folder, framework) / ("code/model.json" if framework == "xgboost" else "model.json")
    facts = json.loads(place.read_text())
    assert re.match(r"\d+\.\d+", facts["version"])
    assert facts["flags"]["best_metric"] == "accuracy"
    written = json.loads((folder / "output" / framework / "data/metrics.json").read_text())
    assert facts["epoch"] == written["epoch"]
    for split in ("train", "validation"):
        assert facts["metrics"][f"{split}_accuracy"] == written[f"{split}_accuracy"]
    assert any(key.startswith("checksum") for key in facts["data"])
    if framework == "xgboost":
        assert facts["column_names"] == TABLE_NAMES
        assert (facts["class_names"], facts["outputs"]) == (DIGITS, "probabilities")
        assert facts["objective"] == "multi:softprob"
        return
    assert facts["network"] == "cnn"
    assert (facts["sample_shape"], facts["value_range"]) == ([16, 16, 3], [0, 255])
    assert len(facts["mean"]) == len(facts["std"]) == 3
    assert facts["outputs"] == "logits"
    assert facts["class_names"] == [f"class-{digit}" for digit in DIGITS]


def test_code_contains_only_what_prediction_needs(framework, trained):
    code = model_of(trained(framework), framework) / "code"
    names = {path.name for path in code.iterdir()} - {"__pycache__"}
    more = {
        "pytorch": set(),
        "tensorflow": {"records.py", "requirements.txt"},
        "mxnet": {"records.py"},
        "xgboost": {"model.json"},
    }[framework]
    assert names == {"common", "engine.py", "inference.py", "train.py", *more}
    assert {path.suffix for path in (code / "common").iterdir() if path.is_file()} == {".py"}


def test_the_kind_of_the_outputs_is_detected():
    logits = np.array([[0.1, 0.2, -3.0]])
    assert model_folder.describe_outputs(logits, ["a", "b", "c"]) == "logits"
    assert model_folder.describe_outputs(np.array([[0.1, 0.2, 0.7]]), ["a", "b", "c"]) == "probabilities"
    assert model_folder.describe_outputs(logits, ["a", "b"]) == "values"
    assert model_folder.describe_outputs(logits, None) == "values"
    assert model_folder.describe_outputs(None, ["a"]) == "values"


ZOO = """
import sys
import torch, torchvision
model = torchvision.models.resnet18(num_classes=10)
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
"""


def test_model_pth_has_the_keys_of_torchvision(tmp_path, digits):
    save_images(tmp_path / "data", digits[0][:40], digits[1][:40], size=32)
    run("pytorch", "--train", "data", "--model", "resnet18", "--epochs", 1, cwd=tmp_path)
    run_python(ZOO, model_of(tmp_path, "pytorch") / "model.pth", cwd=tmp_path)


SIGNATURES = """
import sys
import numpy as np
import tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3))
answers = loaded.signatures["serving_default"](pixels=tf.constant(pixels, tf.float32))
assert sorted(answers) == ["class", "class_name", "logits", "probability"], list(answers)
assert answers["logits"].shape == (3, 10)
for best, name in zip(answers["class"].numpy(), answers["class_name"].numpy()):
    assert name.decode() == f"class-{best}"
bytes_answers = loaded.signatures["serving_uint8"](pixels=tf.constant(pixels, tf.uint8))
for name, tensor in answers.items():
    assert (tensor.numpy() == bytes_answers[name].numpy()).all(), name
"""


def test_the_saved_model_has_named_inputs_and_outputs_for_floats_and_bytes(tmp_path, trained):
    run_python(SIGNATURES, model_of(trained("tensorflow"), "tensorflow") / "1", cwd=tmp_path)


def test_two_trainings_write_the_same_saved_model(tmp_path):
    contents = []
    for name in ("one", "two"):
        run("tensorflow", "--epochs", 1, "--output", name, cwd=tmp_path)
        paths = [path for path in (tmp_path / name / "model/1").rglob("*") if path.is_file()]
        contents.append({path.name: path.read_bytes() for path in paths})
    assert {"saved_model.pb", "fingerprint.pb", "variables.index"} < set(contents[0])
    assert contents[0] == contents[1]


COLUMNS = """
import json, sys
import xgboost
booster = xgboost.Booster(model_file=sys.argv[1])
print(json.dumps([booster.feature_names, booster.feature_types]))
"""


def test_xgboost_keeps_the_names_and_types_of_the_columns(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    columns = {"label": [0, 1] * 20, "size": [0.5, 1.5, 2.5, 3.5] * 10, "count": [1, 5, 9, 2] * 10}
    parquet.write_table(pyarrow.table(columns), tmp_path / "data/table.parquet")
    flags = ("--train", "data", "--checkpoint-steps", 1)
    run("xgboost", "--num-round", 2, *flags, cwd=tmp_path)
    run("xgboost", "--num-round", 3, *flags, cwd=tmp_path)  # even after a restart
    model = model_of(tmp_path, "xgboost")
    seen = json.loads(run_python(COLUMNS, model / "xgboost-model", cwd=tmp_path).last_line)
    assert seen == [["size", "count"], ["float", "int"]]
    facts = json.loads((model / "code/model.json").read_text())
    assert [facts["column_names"], facts["column_types"]] == seen


# Requests ---------------------------------------------------------------------------------------------------

SERVE = """
import io, pathlib
import numpy as np
import inference

class Context:
    accept_header = "application/json"

class Body(io.BytesIO):
    pass

class Response:
    status_code = 200
    def __init__(self, predictions):
        self.predictions = predictions
    def json(self):
        return {"predictions": self.predictions}

if hasattr(inference, "model_fn"):
    model = inference.model_fn(model_dir)

    def answer(body, kind, accept="application/json"):
        predictions = inference.predict_fn(inference.input_fn(body, kind), model)
        return inference.output_fn(predictions, accept)
else:  # a SavedModel replaces TensorFlow Serving, which is another process
    assert "tensorflow" not in sys.modules and "keras" not in sys.modules
    inference.__file__ = model_dir + "/code/inference.py"

    def answer(body, kind, accept="application/json"):
        context = Context()
        context.request_content_type, context.accept_header = kind, accept
        request = json.loads(inference.input_handler(Body(body), context))
        import tensorflow as tf
        global loaded
        loaded = globals().get("loaded") or tf.saved_model.load(model_dir + "/1")
        outputs = loaded.signatures["serving_default"](pixels=tf.constant(request["instances"], tf.float32))
        outputs = {name: tensor.numpy().tolist() for name, tensor in outputs.items() if name != "class_name"}
        rows = [dict(zip(outputs, row)) for row in zip(*outputs.values())]
        return inference.output_handler(Response(rows), context)

def status(*request):
    try:
        answer(*request)
    except Exception as error:
        assert str(error), error
        return getattr(error, "status_code", None)

def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
"""
IMAGES = """
from PIL import Image
paths = sorted(pathlib.Path(sys.argv[1]).rglob("*.jpg"))
correct = 0
for path in paths:
    body, kind = answer(path.read_bytes(), "application/x-image")
    [prediction] = json.loads(body)["predictions"]
    correct += prediction["class_name"] == path.parent.name
pixels = np.asarray(Image.open(paths[0]))
one = answer(paths[0].read_bytes(), "image/jpeg")
flat = ",".join(map(str, pixels.ravel())).encode()
same = [
    answer(npy(pixels[None]), "application/x-npy"),
    answer(json.dumps([pixels.tolist()]).encode(), "application/json; charset=utf-8"),
    answer(json.dumps({"instances": pixels.tolist()}).encode(), "application/json"),
    answer(flat + b"\\n", "text/csv"),
]
big = io.BytesIO()
Image.fromarray(pixels).resize((40, 30)).convert("L").save(big, "png")
print(json.dumps({
    "accuracy": correct / len(paths),
    "one": json.loads(one[0]),
    "kind": one[1],
    "same": [other == one for other in same],
    "csv": answer(paths[0].read_bytes(), "application/x-image", "text/csv"),
    "other size": len(json.loads(answer(big.getvalue(), "application/x-image")[0])["predictions"]),
    "bad": [
        status(b"no image", "application/x-image"),
        status(b"{", "application/json"),
        status(b"[[1, 2], [3]]", "application/json"),
        status(b'["a"]', "application/json"),
        status(npy(pixels[:3]), "application/x-npy"),
        status(npy(np.full(pixels.shape, 256)), "application/x-npy"),
        status(npy(np.array([print], object)), "application/x-npy"),
        status(b"", "text/csv"),
    ],
    "unknown": status(b"", "text/html"),
    "unwanted": status(paths[0].read_bytes(), "application/x-image", "image/gif"),
}))
"""


def test_the_served_model_has_the_training_accuracy_and_rejects_bad_requests(
    image_framework, tmp_path, trained
):
    folder = trained(image_framework)
    seen = predict(SERVE + IMAGES, folder, image_framework, tmp_path, folder / "data/validation")
    # TensorFlow's metric is a float32.
    expected = pytest.approx(metrics(folder, image_framework)["validation_accuracy"], abs=1e-7)
    assert seen["accuracy"] == expected
    [prediction] = seen["one"]["predictions"]
    assert prediction["class_name"] == f"class-{prediction['class']}"
    assert sum(prediction["probabilities"]) == pytest.approx(1)
    assert prediction["probability"] == max(prediction["probabilities"])
    assert seen["kind"] == "application/json"
    assert seen["same"] == [True] * 4
    name, number, probability = seen["csv"][0].split(",")
    assert (name, int(number)) == (prediction["class_name"], prediction["class"])
    assert float(probability) == prediction["probability"]
    assert seen["other size"] == 1
    assert seen["bad"] == [400] * 8
    assert (seen["unknown"], seen["unwanted"]) == (415, 406)


ROWS = """
from pyarrow import parquet
table = parquet.read_table(sys.argv[1])
rows = np.column_stack([column.to_numpy() for column in table.columns])
labels, rows = rows[:, 0], rows[:, 1:]
body, kind = answer(npy(rows), "application/x-npy")
predictions = json.loads(body)["predictions"]
text = "\\n".join(",".join(map(str, row)) for row in rows)
named = [dict(zip(table.column_names[1:], row)) for row in rows.tolist()]
same = [answer(text, "text/csv"), answer(json.dumps(rows.tolist()), "application/json")]
same.append(answer(json.dumps([dict(reversed(row.items())) for row in named]), "application/json"))
print(json.dumps({
    "accuracy": np.mean([each["class"] == label for each, label in zip(predictions, labels)]),
    "one": predictions[0],
    "same": [other[0] == body for other in same],
    "missing": len(json.loads(answer(json.dumps([[None] * 64]), "application/json")[0])["predictions"]),
    "bad": [
        status("1,2", "text/csv"),
        status("a" + "," * 63, "text/csv"),
        status(json.dumps([{"column-1": 3}]), "application/json"),
        status(b"", "application/x-npy"),
    ],
}))
"""


def test_served_trees_have_the_training_accuracy_and_reject_bad_requests(tmp_path, trained):
    folder = trained("xgboost")
    seen = predict(SERVE + ROWS, folder, "xgboost", tmp_path, folder / "data/validation/table.parquet")
    assert seen["accuracy"] == pytest.approx(metrics(folder, "xgboost")["validation_accuracy"], abs=1e-7)
    assert seen["one"]["class_name"] in DIGITS
    assert sum(seen["one"]["probabilities"]) == pytest.approx(1, abs=1e-6)
    assert seen["same"] == [True] * 3
    assert seen["missing"] == 1
    assert seen["bad"] == [400] * 4


# Files ------------------------------------------------------------------------------------------------------


def infer(script, *arguments, cwd, code=0):
    """Run an `inference.py` as a user does; return its Result."""
    return finish(start_command([sys.executable, str(script), *map(str, arguments)], cwd), code)


def test_images_are_predicted_from_the_command_line(image_framework, tmp_path, trained):
    folder = trained(image_framework)
    shutil.copytree(folder / "data/validation", tmp_path / "photos")
    (tmp_path / "photos/broken.png").write_bytes(b"no image")
    (tmp_path / "photos/notes.txt").write_text("not a photo")
    Image.new("RGB", (99, 20)).save(tmp_path / "photos/wide.png")
    script = ROOT / image_framework / "inference.py"
    model = model_of(folder, image_framework)
    result = infer(script, "photos", "--model-dir", model, cwd=tmp_path, code=1)
    assert "photos/broken.png" in result.error_line
    assert "101 predictions in predictions.csv; files left out: 1" in result.last_line
    with open(tmp_path / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["file", "class_name", "class", "probability"]
    known = [row for row in rows if "class-" in row["file"]]
    assert len(known) == 100
    accuracy = np.mean([row["class_name"] in row["file"] for row in known])
    assert accuracy == pytest.approx(metrics(folder, image_framework)["validation_accuracy"], abs=1e-7)


def test_rows_are_predicted_with_the_exported_code(tmp_path, trained, digits):
    model = model_of(trained("xgboost"), "xgboost")
    np.savetxt(tmp_path / "rows.csv", digits[0][200:203].reshape(3, 64), "%g", ",")
    result = infer(model / "code/inference.py", "rows.csv", "--output", "mine.csv", cwd=tmp_path)
    assert "3 predictions in mine.csv" in result.last_line
    assert len((tmp_path / "mine.csv").read_text().splitlines()) == 4


@pytest.mark.quick
def test_an_image_for_a_model_of_other_samples_names_the_function_that_converts_it():
    facts = {"sample_shape": [8, 8, 3], "sample_type": "float32"}
    with pytest.raises(serving.RequestError, match="convert images as load_data does, in `input_fn`"):
        serving.to_samples(Image.new("RGB", (8, 8)), facts)


def test_command_line_errors_are_one_line(tmp_path, trained):
    script = ROOT / "xgboost/inference.py"
    (tmp_path / "rows.csv").write_text("1,2\n")
    assert "has no model.json" in infer(script, "rows.csv", cwd=tmp_path, code=1).error_line
    flags = ("--model-dir", model_of(trained("xgboost"), "xgboost"))
    missing = infer(script, "nowhere", *flags, cwd=tmp_path, code=1)
    assert "nowhere does not exist" in missing.error_line
    assert "expected 64 columns" in infer(script, ".", *flags, cwd=tmp_path, code=1).error_line
    np.savetxt(tmp_path / "rows.csv", np.zeros((1, 64)), "%g", ",")
    unwritable = infer(script, "rows.csv", *flags, "--output", "no/mine.csv", cwd=tmp_path, code=1)
    assert "--output no/mine.csv cannot be written: No such file or directory" in unwritable.error_line


OTHER_NETWORKS = {
    "pytorch": "return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))",
    "tensorflow": """
inputs = keras.Input(data.sample_shape, dtype="uint8")
outputs = layers.Rescaling(1 / 255)(layers.Flatten()(inputs))
return keras.Model(inputs, layers.Dense(10, activation="softmax")(outputs))
""",
    "mxnet": """
model = nn.HybridSequential()
model.add(nn.Flatten(), nn.Dense(10), nn.HybridLambda("softmax"))
return model
""",
}


def test_a_copy_with_another_network_predicts_without_changes(image_framework, tmp_path, digits):
    body = OTHER_NETWORKS[image_framework].strip().replace("\n", "\n    ")
    script = copy_with(tmp_path / "mine", image_framework, f"def build_model(args, data):\n    {body}")
    run(script, "--epochs", 1, cwd=tmp_path)
    facts = json.loads((tmp_path / "output/mine/model/model.json").read_text())
    assert facts["outputs"] == "probabilities"
    save_images(tmp_path / "photos", digits[0][:5], digits[1][:5])
    infer(script.with_name("inference.py"), "photos", cwd=tmp_path)
    with open(tmp_path / "predictions.csv") as file:
        assert {row["class_name"] for row in csv.DictReader(file)} <= set(DIGITS)
    if image_framework == "pytorch":  # the others load the network from the model
        original = ROOT / "pytorch/inference.py"
        other = infer(original, "photos", "--model-dir", "output/mine/model", cwd=tmp_path, code=1)
        assert "model.pth does not fit the network of `build_model` in train.py" in other.error_line


# Checkpoints ------------------------------------------------------------------------------------------------


def tool(name, *arguments, cwd, code=0):
    """Run a command of `common/`; return its Result."""
    command = [sys.executable, "-m", f"common.{name}", *map(str, arguments)]
    return finish(start_command(command, ROOT if cwd is None else cwd), code)


def test_any_checkpoint_can_be_exported_without_its_data(framework, tmp_path, trained):
    folder = trained(framework)
    epoch = json.loads((folder / "output" / framework / "data/metrics.json").read_text())["epoch"]
    path = checkpoint_folder(folder, framework) / checkpoint_name(framework, epoch)
    script = copy_with(tmp_path / "mine", framework, "def load_data(args):\n    raise SystemExit('no data')")
    result = tool("export", "train.py", path, "exported", cwd=script.parent)
    assert f"of epoch {epoch}" in result.last_line
    model, exported = model_of(folder, framework), script.parent / "exported/model"
    for path in model.rglob("*"):
        is_weights = path.parent.name not in ("1", "code", "common", "__pycache__")
        if path.is_file() and is_weights and path.name != "model.json":
            assert path.read_bytes() == (exported / path.relative_to(model)).read_bytes(), path
    exported_metrics = json.loads((script.parent / "exported/data/metrics.json").read_text())
    assert exported_metrics["validation_accuracy"] == metrics(folder, framework)["validation_accuracy"]


def test_an_invalid_checkpoint_is_not_exported(tmp_path):
    (tmp_path / "bad").write_bytes(b"damaged")
    script = ROOT / "pytorch/train.py"
    result = tool("export", script, tmp_path / "bad", tmp_path / "exported", cwd=None, code=1)
    assert "bad as a checkpoint" in result.error_line
    assert not (tmp_path / "exported").exists()


def test_the_list_of_checkpoints_names_the_one_for_a_restart(framework, tmp_path, trained):
    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoint_folder(trained(framework), framework), folder)
    newest, second = (
        checkpoint_name(framework, epoch) for epoch in ((5, 4) if framework == "xgboost" else (3, 2))
    )
    (folder / newest).write_bytes((folder / newest).read_bytes()[:-100])
    (folder / f"{second}.sagemaker-uploaded").touch()
    misnamed = checkpoint_name(framework, 9)
    shutil.copy(folder / second, folder / misnamed)
    before = sorted(path.name for path in folder.iterdir())
    result = tool("list_checkpoints", ROOT / framework / "train.py", folder, cwd=None)
    lines = result.output.splitlines()
    assert "damaged" in next(line for line in lines if line.startswith(newest))
    if framework != "xgboost":  # XGBoost counts the trees
        assert "does not match its name" in next(line for line in lines if line.startswith(misnamed))
    assert re.search(r" yes .*intact", next(line for line in lines if line.startswith(second)))
    assert result.last_line == f"A restart resumes from {second}"
    assert "validation_accuracy" in lines[0]
    assert sorted(path.name for path in folder.iterdir()) == before
