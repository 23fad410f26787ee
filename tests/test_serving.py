"""SageMaker's own serving toolkits, installed in `.venv-serving`, load and serve the exported models.

A small server replaces the part of the model servers that passes on requests, and another one replaces
TensorFlow Serving. The processes use only the model folder, and no other code of this repository.
"""

import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import (
    ROOT,
    choose,
    environment,
    finish,
    free_port,
    run,
    run_python,
    save_images,
    start_command,
    write_parquet,
)

pytestmark = pytest.mark.integration

SERVING = ROOT / ".venv-serving"

# The model servers and handlers of the containers.
HANDLERS = {
    "pytorch": ("ts", "sagemaker_pytorch_serving_container.handler_service"),
    "mxnet": ("mms", "sagemaker_mxnet_serving_container.handler_service"),
    "xgboost": ("mms", "sagemaker_inference.default_handler_service"),  # several models on one endpoint
}

HTTP = """
import importlib, json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
port, model_dir, *arguments = sys.argv[1:]

def serve(answer):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, content_type, content = answer(self.path, self.headers, body)
            self.send_response(status)
            self.send_header("Content-Type", content_type or "text/plain")
            self.end_headers()
            self.wfile.write(content.encode() if isinstance(content, str) else content)
    check_origin()
    HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()

def check_origin():
    common = sys.modules.get("common")
    assert common is None or common.__file__.startswith(os.environ["SAGEMAKER_BASE_DIR"]), common
"""

# The Python part of TorchServe or of Multi Model Server, with the handler of a container.
MODEL_SERVER = """
model_server, handler = arguments
if "mxnet" in handler:
    import engine  # prepares NumPy for MXNet
factory = importlib.import_module(model_server + ".model_loader").ModelLoaderFactory
loader = factory.get_model_loader(*[model_dir] * (model_server == "mms"))
service = loader.load("model", model_dir, handler, None, 1)
context = service.context

def answer(path, headers, body):
    fields = [{"name": name.encode(), "value": value.encode()} for name, value in headers.items()]
    parameters = [{"name": "body", "value": body, "contentType": headers["Content-Type"]}]
    batch = [{"requestId": b"1", "parameters": parameters, "headers": fields}]
    context.request_processor, inputs, context.request_ids = service.retrieve_data_for_inference(batch)
    [content] = service._entry_point(inputs, context)
    return context.get_response_status(0)[0], context.get_response_content_type(0), content

serve(answer)
"""

# `serving.py` of the XGBoost container, with Flask's server instead of gunicorn.
FLASK = """
import collections, collections.abc
collections.Mapping = collections.abc.Mapping  # SageMaker's image patches the toolkit for newer Pythons
from sagemaker_containers.beta.framework import env, files, modules, transformer, worker
serving_env = env.ServingEnv()
files.download_and_extract(serving_env.module_dir, env.code_dir)
modules.prepare(env.code_dir, serving_env.module_name)
sys.path.insert(0, env.code_dir)
user_module = importlib.import_module(serving_env.module_name)
check_origin()
names = ("model_fn", "input_fn", "predict_fn", "output_fn")
user_transformer = transformer.Transformer(**{name: getattr(user_module, name) for name in names})
user_transformer.initialize()
app = worker.Worker(transform_fn=user_transformer.transform, module_name=serving_env.module_name)
app.run("127.0.0.1", int(port))
"""

# `python_service.py` of the TensorFlow container, where TensorFlow is not installed.
PYTHON_SERVICE = """
import collections, importlib.util, io
import requests
sys.modules["tensorflow"] = sys.modules["keras"] = None  # an import of them fails
specification = importlib.util.spec_from_file_location("inference", model_dir + "/code/inference.py")
inference = importlib.util.module_from_spec(specification)
specification.loader.exec_module(inference)
fields = "model_name model_version method rest_uri grpc_port channel custom_attributes request_content_type"
Context = collections.namedtuple("Context", fields + " accept_header content_length")

def answer(path, headers, body):
    uri = f"http://localhost:{arguments[0]}/v1/models/model:predict"
    kinds = headers["Content-Type"] or "application/json", headers["Accept"] or "application/json"
    context = Context("model", None, "predict", uri, None, None, None, *kinds, len(body))
    try:
        processed_input = inference.input_handler(io.BytesIO(body), context)
        response = requests.post(context.rest_uri, data=processed_input)
        content, content_type = inference.output_handler(response, context)
        return 200, content_type, content
    except Exception as error:
        return 500, "application/json", json.dumps({"error": str(error)})

serve(answer)
"""

# The REST API of TensorFlow Serving.
TENSORFLOW_SERVING = """
import tensorflow as tf
predict = tf.saved_model.load(model_dir + "/1").signatures["serving_default"]

def answer(path, headers, body):
    assert path == "/v1/models/model:predict", path
    try:
        outputs = predict(pixels=tf.constant(json.loads(body)["instances"], tf.float32))
    except Exception as error:
        return 400, "application/json", json.dumps({"error": str(error)})
    columns = {name: tensor.numpy().astype(str if tensor.dtype == tf.string else None).tolist()
               for name, tensor in outputs.items()}
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    if len(columns) == 1:
        [rows] = columns.values()
    return 200, "application/json", json.dumps({"predictions": rows})

serve(answer)
"""


class Server:
    """A process that serves a model folder on a loopback port."""

    def __init__(self, python, script, base, *arguments, path=()):
        self.port = free_port()
        variables = {
            "PYTHONPATH": ":".join(map(str, path)),
            "PYTHONSAFEPATH": "1",
            "SAGEMAKER_PROGRAM": "inference.py",
            "SAGEMAKER_SUBMIT_DIRECTORY": f"{base}/model/code",
            "SAGEMAKER_BASE_DIR": str(base),  # instead of /opt/ml
            "SM_MODEL_DIR": f"{base}/model",
        }
        command = [python, "-c", HTTP + script, self.port, base / "model", *arguments]
        self.log = base / f"log-{self.port}"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=base,
                env=environment(**variables),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 120
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def answers(self):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
            return True

    def ask(self, body, content_type, accept="application/json"):
        """Send a request; return the status, content type and text of the response."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": content_type, "Accept": accept}
        connection.request("POST", "/invocations", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type"), answer.read().decode()

    def predict(self, body, content_type):
        """Return the predictions for a request."""
        status, kind, text = self.ask(body, content_type)
        assert (status, kind) == (200, "application/json"), (text, self.log.read_text())
        return json.loads(text)["predictions"]


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def csv(rows):
    return "".join(",".join(map(str, np.ravel(row).tolist())) + "\n" for row in rows)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """Return the folder of a framework that replaces /opt/ml, with the exported `model` and the data."""
    bases = {}

    def find(framework):
        if framework not in bases:
            base = bases[framework] = tmp_path_factory.mktemp(f"ml-{framework}").resolve()
            train(framework, base)
            shutil.move(base / "output" / framework / "model", base / "model")
        return bases[framework]

    def train(framework, base):
        generator = np.random.default_rng(0)
        if framework == "xgboost":
            rows = generator.random((300, 5))
            rows[:, 0] = np.floor(3 * rows[:, 1])
            write_parquet(base / "data/table.parquet", rows)
            run(framework, "--train", "data", "--epochs", 5, cwd=base)
            return
        labels = np.arange(60) % 3
        pixels = generator.integers(0, 60, (60, 16, 16, 3)) + 90 * labels[:, None, None, None]
        save_images(base / "data", pixels.astype(np.uint8), labels, (".jpg",))
        flags = ["--train", "data", "--epochs", 2, "--batch-size", 8, "--learning-rate", 0.05]
        run(framework, *flags, cwd=base)

    return find


@pytest.fixture(scope="module")
def server_of(base_of):
    """Return the Server of a framework, which responds like its container."""
    servers = {}
    with contextlib.ExitStack() as stack:

        def start(*arguments, **options):
            server = Server(*arguments, **options)
            stack.callback(server.process.kill)
            return server

        def find(name):
            if name not in servers:
                servers[name] = make(name)
            return servers[name]

        def make(name):
            framework = name.partition("-")[0]
            base = base_of(framework)
            python, code = SERVING / "bin/python", base / "model/code"
            if framework == "tensorflow":
                tensorflow_serving = start(sys.executable, TENSORFLOW_SERVING, base)
                return start(python, PYTHON_SERVICE, base, tensorflow_serving.port, path=[code])
            if name == "xgboost":
                return start(python, FLASK, base)
            own = [SERVING / "pytorch"] if framework == "pytorch" else []
            return start(python, MODEL_SERVER, base, *HANDLERS[framework], path=[code, *own])

        yield find


@pytest.fixture(params=["pytorch", "mxnet", "tensorflow"])
def image_server(request, server_of):
    return server_of(choose(request.param))


@pytest.fixture(params=["xgboost", "xgboost-with-several-models"])
def row_server(request, server_of):
    return server_of(request.param)


@pytest.fixture
def photo(base_of):
    """The path of a JPEG image of class-1."""
    return base_of("pytorch") / "data/class-1/1.jpg"


@pytest.fixture
def pixels(photo):
    return np.asarray(Image.open(photo))


# Images -----------------------------------------------------------------------------------------------------


def test_an_image_as_jpeg_json_csv_and_npy_gets_the_same_response_with_names(image_server, photo, pixels):
    [prediction] = image_server.predict(photo.read_bytes(), "application/x-image")
    assert (prediction["class"], prediction["class_name"]) == (1, "class-1")
    assert prediction["probability"] == prediction["probabilities"][1] > 0.5
    assert sum(prediction["probabilities"]) == pytest.approx(1)
    for body, kind in [
        (json.dumps(pixels.tolist()), "application/json"),
        (json.dumps({"instances": [pixels.tolist()]}), "application/json"),
        (csv([pixels]), "text/csv"),
        (npy(pixels), "application/x-npy"),
        (photo.read_bytes(), "image/jpeg"),
    ]:
        assert image_server.predict(body, kind) == [prediction]


def test_each_image_in_a_request_gets_a_prediction(image_server, photo):
    paths = [photo.parents[1] / f"class-{label}" / f"{label}.jpg" for label in (2, 0, 1)]
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    predictions = image_server.predict(npy(images), "application/x-npy")
    assert len(predictions) == 3
    for path, prediction in zip(paths, predictions):
        [alone] = image_server.predict(path.read_bytes(), "application/x-image")
        assert prediction["class"] == alone["class"]
        np.testing.assert_allclose(prediction["probabilities"], alone["probabilities"], atol=1e-5)


def test_an_image_is_answered_with_csv_if_accepted(image_server, photo):
    [prediction] = image_server.predict(photo.read_bytes(), "application/x-image")
    status, kind, text = image_server.ask(photo.read_bytes(), "application/x-image", "text/csv")
    assert (status, kind) == (200, "text/csv")
    assert text == f"class-1,1,{prediction['probability']}\n"


@pytest.mark.parametrize("framework", ["pytorch", "mxnet", "tensorflow"])
def test_a_bad_image_gets_a_status_and_a_reason_and_the_next_request_works(framework, server_of, photo):
    server = server_of(choose(framework))
    image = photo.read_bytes()
    for body, kind, accept, expected, reason in [
        (b"no image", "application/x-image", "*/*", 400, "cannot be read as application/x-image"),
        (image[:200], "application/x-image", "*/*", 400, "cannot be read as application/x-image"),
        (b"{", "application/json", "*/*", 400, "cannot be read as application/json"),
        (b"[[1, 2]]", "application/json", "*/*", 400, "expected samples of shape (16, 16, 3)"),
        (image, "application/pdf", "*/*", 415, "the content type is application/pdf"),
        (image, "application/x-image", "application/pdf", 406, "the accepted type is application/pdf"),
    ]:
        status, _, text = server.ask(body, kind, accept)
        # TensorFlow's container has no other status for an exception in a handler.
        assert status == (500 if framework == "tensorflow" else expected), text
        assert reason in text
    assert server.predict(image, "application/x-image")[0]["class_name"] == "class-1"


# Rows -------------------------------------------------------------------------------------------------------

ROWS = np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.5, 0.5]])
NAMED_ROWS = [{f"column-{index}": value for index, value in enumerate(row, start=1)} for row in ROWS.tolist()]


def test_rows_by_name_and_as_json_csv_and_npy_get_the_same_response(row_server):
    predictions = row_server.predict(csv(ROWS), "text/csv")
    assert [prediction["class_name"] for prediction in predictions] == ["0", "2"]
    for prediction in predictions:
        assert prediction["probability"] == max(prediction["probabilities"]) > 0.5
    for body, kind in [
        (json.dumps(ROWS.tolist()), "application/json"),
        (json.dumps({"instances": NAMED_ROWS}), "application/json"),
        (npy(ROWS), "application/x-npy"),
    ]:
        assert row_server.predict(body, kind) == predictions
    status, kind, text = row_server.ask(csv(ROWS[:1]), "text/csv", "text/csv")
    assert (status, kind.split(";")[0]) == (200, "text/csv")
    assert text == f"0,0,{predictions[0]['probability']}\n"


def test_bad_rows_get_a_status_and_a_reason_and_the_next_request_works(row_server):
    without_one = [{name: row[name] for name in list(row)[:3]} for row in NAMED_ROWS]
    for body, kind, accept, expected, reason in [
        ("1,2,3\n", "text/csv", "*/*", 400, "expected 4 columns (column-1, column-2"),
        ("1,2,3,four\n", "text/csv", "*/*", 400, "the column column-4 contains 'four': expected a number"),
        (json.dumps(without_one), "application/json", "*/*", 400, "have no column column-4"),
        (b"{", "application/json", "*/*", 400, "cannot be read as application/json"),
        (csv(ROWS), "application/pdf", "*/*", 415, "the content type is application/pdf"),
        (csv(ROWS), "text/csv", "application/pdf", 406, "the accepted type is application/pdf"),
    ]:
        status, _, text = row_server.ask(body, kind, accept)
        assert status == expected, text
        assert reason in text
    assert len(row_server.predict(csv(ROWS), "text/csv")) == 2


# TensorFlow's own tools -------------------------------------------------------------------------------------


def saved_model_cli(*arguments, cwd):
    command = [Path(sys.executable).with_name("saved_model_cli"), *arguments]
    return finish(start_command(list(map(str, command)), cwd)).output


def test_saved_model_cli_shows_named_inputs_and_outputs_and_runs_the_model(base_of, pixels, tmp_path):
    saved_model = base_of("tensorflow") / "model/1"
    shown = saved_model_cli("show", "--dir", saved_model, "--all", cwd=tmp_path)
    signature = shown.partition("signature_def['serving_default']")[2].partition("signature_def[")[0]
    for name in ("inputs['pixels']", "outputs['logits']", "outputs['class']", "outputs['class_name']"):
        assert name in signature, shown
    np.save(tmp_path / "pixels.npy", pixels[np.newaxis].astype(np.float32))
    flags = ["--tag_set", "serve", "--signature_def", "serving_default", "--inputs", "pixels=pixels.npy"]
    saved_model_cli("run", "--dir", saved_model, *flags, "--outdir", "outputs", cwd=tmp_path)
    outputs = {path.stem: np.load(path, allow_pickle=True) for path in (tmp_path / "outputs").iterdir()}
    assert outputs["logits"].shape == (1, 3)
    assert (outputs["class"].tolist(), outputs["class_name"].tolist()) == ([1], [b"class-1"])


LOAD = """
import sys
import numpy as np
import tensorflow as tf
assert not [name for name in ("common", "engine", "train") if name in sys.modules]
predict = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
outputs = predict(pixels=tf.constant(np.load(sys.argv[2]), tf.float32))
print(outputs["class_name"].numpy()[0].decode())
"""


def test_the_saved_model_needs_only_tensorflow(base_of, pixels, tmp_path):
    np.save(tmp_path / "pixels.npy", pixels[np.newaxis])
    env = environment(PYTHONSAFEPATH="1")
    result = run_python(LOAD, base_of("tensorflow") / "model/1", "pixels.npy", cwd=tmp_path, env=env)
    assert result.last_line == "class-1"
