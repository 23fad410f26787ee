"""The code that the `inference.py` of all frameworks share: requests, answers, prediction of files.

A request is JSON, CSV, an `.npy` file, or a JPEG or PNG image. The answer has a prediction for each sample:

    {"predictions": [{"class": 3, "class_name": "cat", "probability": 0.9, "probabilities": [...]}]}

Nothing in this module knows a framework, and nothing in a request is executed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np

from common import decoder, errors, images, model_folder, table_csv
from common.errors import UserError

IMAGE_TYPES = ("application/x-image", "image/jpeg", "image/png")
SUFFIXES = {".csv": "text/csv", ".tsv": "text/csv", ".json": "application/json", ".npy": "application/x-npy"}
SUFFIXES.update(dict.fromkeys(images.EXTENSIONS, "application/x-image"))


try:  # SageMaker's servers answer this exception with its status
    from sagemaker_inference.errors import BaseInferenceToolkitError as ServingError
except ImportError:
    ServingError = Exception


class RequestError(ServingError):
    """A request that cannot be answered: what it contains and what was expected.

    Attributes:
        message, phrase: the text.
        status_code: 400; 415 for an unknown content type, 406 for an unknown accepted type.
    """

    def __init__(self, message: str, status_code: int = 400) -> None:
        Exception.__init__(self, message)
        self.message = self.phrase = message
        self.status_code = status_code

    def __str__(self) -> str:
        return self.message


def with_status(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of `inference.py` answer with the status of a RequestError on a Flask server.

    SageMaker's XGBoost container wraps each exception in another one, which Flask answers with 500.
    """

    @functools.wraps(function)
    def call(*args):
        try:
            return function(*args)
        except RequestError as error:
            flask = sys.modules.get("flask")
            if flask and flask.has_request_context():
                answer = flask.Response(error.message, error.status_code, mimetype="text/plain")
                flask.after_this_request(lambda _: answer)
            raise

    return call


# A model folder ---------------------------------------------------------------------------------------------


def read_facts(model_dir: Path | str) -> dict[str, Any]:
    """Return the content of the `model.json` of an exported model."""
    places = (
        Path(model_dir, model_folder.FILE_NAME),
        Path(model_dir, model_folder.CODE, model_folder.FILE_NAME),
    )
    for path in places:
        if path.is_file():
            return json.loads(path.read_text())
    raise UserError(f"{model_dir} has no {model_folder.FILE_NAME}: expected the folder of an exported model")


def restore(
    facts: dict[str, Any], parse_args: Callable[[list[str]], argparse.Namespace]
) -> tuple[argparse.Namespace, Any]:
    """Return the flags of the training and its data, whose samples are zeros, for `build_model`."""
    args = model_folder.restore_flags(facts, parse_args)
    return args, model_folder.restore_data(facts)


# Requests ---------------------------------------------------------------------------------------------------


def decode(body: bytes | str, content_type: str | None) -> Any:
    """Return the content of a request: an array, a list (of rows), or a Pillow image.

    Args:
        body: bytes or text.
        content_type: such as "application/json".

    Raises RequestError.
    """
    kind = (content_type or "").split(";")[0].strip().lower()
    readers = {"application/json": _read_json, "text/csv": _read_csv, "application/x-npy": _read_npy}
    readers.update(dict.fromkeys(IMAGE_TYPES, _read_image))
    if kind not in readers:
        raise RequestError(f"the content type is {content_type}: expected one of {', '.join(readers)}", 415)
    if isinstance(body, str):
        body = body.encode()
    try:
        return readers[kind](bytes(body))
    except Exception as error:  # each reader has its own errors
        raise RequestError(f"the content cannot be read as {kind}: {errors.first_line(error)}") from error


def _read_json(body):
    content = json.loads(body)
    if isinstance(content, dict):
        content = content["instances"]  # the format of TensorFlow Serving
    return content if isinstance(content, list) else [content]


def _read_csv(body):
    text = body.decode("utf-8-sig")
    delimiter = table_csv.find_delimiter(text)
    return [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]


def _read_npy(body):
    return np.load(io.BytesIO(body), allow_pickle=False)


def _read_image(body):
    try:
        return decoder.open_image(io.BytesIO(body))
    except OSError as error:  # Pillow's message has the address of the buffer
        raise ValueError("it is not an image, or damaged") from error


def to_samples(content: Any, facts: dict[str, Any]) -> np.ndarray:
    """Return the result of `decode` as samples for the network.

    Returns:
        float32 array (n, height, width, channels) of pixels from 0 to 255 for a network that was trained with
        images of uint8; otherwise an array (n, *shape) of the training samples' type.

    Raises RequestError if that is impossible.
    """
    shape = tuple(facts["sample_shape"])
    is_image = facts["sample_type"] == "uint8"
    if hasattr(content, "convert"):
        content = _fit_image(content, shape, is_image)
    expected = f"expected samples of shape {shape} ({facts['sample_type']})"
    if isinstance(content, list):
        content = _to_array(content, expected)
    if content.dtype.kind not in "uifb":
        raise RequestError(f"the request contains no numbers: {expected}")
    samples = content
    if samples.shape == shape:
        samples = samples[np.newaxis]
    if samples.ndim == 2 and samples.shape[1] == math.prod(shape):  # the rows of a CSV file
        samples = samples.reshape(-1, *shape)
    if samples.shape[1:] != shape or len(samples) == 0:
        raise RequestError(f"the request contains an array of shape {content.shape}: {expected}")
    if not np.isfinite(samples).all():
        raise RequestError(f"the request contains values that are infinite or not a number: {expected}")
    if not is_image:
        return samples.astype(facts["sample_type"])
    if samples.min() < 0 or samples.max() > 255:
        raise RequestError(
            f"the request contains pixels from {samples.min():g} to {samples.max():g}: expected 0 to 255"
        )
    return samples.astype(np.float32)


def _to_array(content, expected):
    try:
        return np.array(content, np.float64)  # null becomes NaN
    except (TypeError, ValueError) as error:
        raise RequestError(f"the request contains no array of numbers: {expected}") from error


def _fit_image(image, shape, is_image):
    """Return the pixels of an image in the size of the training images, resized as they were."""
    if not is_image or len(shape) != 3 or shape[2] not in (1, 3):
        raise RequestError(
            f"the model was trained with samples that are no images of uint8, of shape {shape}: pass such "
            "samples as JSON or .npy, or convert images as load_data does, in `input_fn` of inference.py"
        )
    if shape[2] == 1:
        image = image.convert("L")
    if image.size != shape[1::-1]:
        image = decoder.fit(image, shape[1::-1])
    return np.asarray(image).reshape(shape)


# Answers ----------------------------------------------------------------------------------------------------


def answers(outputs: Any, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a prediction for each sample: a dictionary of plain values.

    Args:
        outputs: those of the model: an array (n, ...), for a classifier logits or probabilities (n, classes);
            or several arrays, as a dictionary, a tuple or a list.
        facts: the content of `model.json`.
    """
    if facts["outputs"] == "values":
        named = outputs
        if isinstance(outputs, np.ndarray):
            named = {"outputs": outputs}
        elif isinstance(outputs, (tuple, list)):
            named = {f"output_{index}": array for index, array in enumerate(outputs)}
        rows = zip(*(array.tolist() for array in named.values()))
        return [dict(zip(named, row)) for row in rows]
    found = []
    for best, row in zip(outputs.argmax(1), to_probabilities(outputs, facts)):
        found.append(
            {
                "class": int(best),
                "class_name": facts["class_names"][best],
                "probability": float(row[best]),
                "probabilities": row.tolist(),
            }
        )
    return found


def to_probabilities(outputs: np.ndarray, facts: dict[str, Any]) -> np.ndarray:
    """Return the outputs of a classifier, an array (n, classes), as probabilities in float64."""
    probabilities = outputs.astype(np.float64)
    if facts["outputs"] == "logits":
        exponentials = np.exp(probabilities - probabilities.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
    return probabilities


def encode(predictions: list[dict[str, Any]], accept: str | None) -> tuple[str, str]:
    """Return the body and the content type of an answer, as JSON or as CSV.

    Raises RequestError for another `accept`.
    """
    wanted = [kind.split(";")[0].strip().lower() for kind in (accept or "*/*").split(",")]
    if "text/csv" in wanted:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(map(_columns, predictions))
        return text.getvalue(), "text/csv"
    if not {"application/json", "*/*", "application/*"} & set(wanted):
        raise RequestError(f"the accepted type is {accept}: expected application/json or text/csv", 406)
    return json.dumps({"predictions": predictions}), "application/json"


def _columns(prediction):
    """Return a prediction as the columns of a row."""
    if "class_name" in prediction:
        return [prediction["class_name"], prediction["class"], prediction["probability"]]
    return np.concatenate([np.ravel(values) for values in prediction.values()]).tolist()


def other_network(path: Path) -> UserError:
    """Return the UserError for weights that do not fit the network of `build_model`."""
    return UserError(
        f"{path} does not fit the network of `build_model` in train.py: pass the --model-dir of a model that "
        "this train.py has trained"
    )


# The local tool ---------------------------------------------------------------------------------------------


def parse_args(code: str, description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags of `inference.py`.

    Args:
        code: the path of `inference.py`, which may be in the folder of an exported model.
        description: for --help.
    """
    exported = Path(code).resolve().parent.parent
    is_exported = (exported / model_folder.CODE / "inference.py").is_file()
    trained = Path("output", Path(code).absolute().parent.name, "model")  # by the train.py beside it
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="a file, or a folder with such files below it")
    add(
        "--model-dir",
        type=Path,
        default=exported if is_exported else trained,
        help="folder of the exported model (default: %(default)s)",
    )
    add("--output", type=Path, default=Path("predictions.csv"), help="table to write (default: %(default)s)")
    return parser.parse_args(argv)


def predict_files(
    args: argparse.Namespace, model_fn: Callable[..., Any], predict_fn: Callable[..., Any]
) -> int:
    """Predict files with a model, print a line for each sample, and write the table; return the exit code.

    A file that cannot be predicted is reported and left out, and the exit code is 1.

    Args:
        args: the flags of `parse_args`.
        model_fn: returns the model in a folder.
        predict_fn: returns the predictions for (content of a request, model).
    """
    failures = 0
    rows = []
    try:
        model = model_fn(args.model_dir)
        files = _find_files(args.paths, model.facts)
        for path in files:
            try:
                predictions = predict_fn(decode(path.read_bytes(), SUFFIXES[path.suffix.lower()]), model)
            except (RequestError, OSError) as error:
                failures += 1
                print(f"error: {path}: {error}", file=sys.stderr)
                continue
            for number, prediction in enumerate(predictions):
                name = str(path) if len(predictions) == 1 else f"{path}:{number + 1}"
                rows.append([name, *_columns(prediction)])
                print(_line(name, prediction))
        if rows:
            _write_table(args.output, rows, model)
    except (UserError, OSError) as error:
        errors.fail(error)
    place = f" in {args.output}" if rows else ""
    print(f"{len(rows)} predictions{place}" + (f"; files left out: {failures}" if failures else ""))
    return 1 if failures else 0


def _line(name, prediction):
    if "class_name" in prediction:
        return f"{name}  {prediction['class_name']}  {prediction['probability']:.4f}"
    return f"{name}  {_columns(prediction)}"


def _write_table(path, rows, model):
    width = max([len(row) for row in rows], default=1) - 1
    columns = ["class_name", "class", "probability"]
    if model.facts["outputs"] == "values":
        columns = [f"output_{index}" for index in range(width)]
    try:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", *columns])
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from error


def _find_files(paths, facts):
    """Return the files to predict, in order; from folders the images, or for trees the tables."""
    wanted = (".csv", ".tsv") if "column_names" in facts else images.EXTENSIONS
    found = []
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders.sort()
                found += [Path(folder, name) for name in sorted(names) if name.lower().endswith(wanted)]
        elif not path.exists():
            raise UserError(f"{path} does not exist")
        elif path.suffix.lower() in SUFFIXES:
            found.append(path)
        else:
            raise UserError(f"{path} is not a folder or a file with one of {', '.join(SUFFIXES)}")
    if not found:
        raise UserError(f"no files in {', '.join(map(str, paths))}: expected {', '.join(wanted)}")
    return found
