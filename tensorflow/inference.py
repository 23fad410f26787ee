"""Predict with a model that `train.py` has exported: photos on your machine, or requests on SageMaker.

Local:      python tensorflow/inference.py photos/ --model-dir output/tensorflow/model
SageMaker:  its TensorFlow container finds this file in `code/` of the model; see launch/deploy.py

The SavedModel contains the normalization of its images: after a change of `build_model` nothing changes here.
The two handlers are those of SageMaker's container, where TensorFlow Serving computes and TensorFlow is not
installed: https://github.com/aws/sagemaker-tensorflow-serving-container. That container answers a bad request
with the status 500 and the reason.
"""

import json
import sys
from pathlib import Path

from common import serving

if __name__ == "__main__":
    args = serving.parse_args("tensorflow", __file__, __doc__)  # before the slow imports

import numpy as np


def input_handler(data, context):
    """Return a request of SageMaker as one of TensorFlow Serving.

    Args:
        data: a file with the body.
        context: has `request_content_type`.
    """
    content = serving.decode(data.read(), context.request_content_type)
    samples = serving.to_samples(content, _facts())
    return json.dumps({"instances": samples.tolist()})


def output_handler(response, context):
    """Return the body and the content type of the answer to TensorFlow Serving's answer."""
    if response.status_code != 200:
        raise serving.RequestError(response.content.decode(), response.status_code)
    facts = _facts()
    rows = response.json()["predictions"]
    names = [facts["outputs"]] if facts["outputs"] != "values" else None
    if isinstance(rows[0], dict):  # several outputs
        rows = {name: np.array([row[name] for row in rows]) for name in names or rows[0]}
    outputs = rows[names[0]] if names else rows
    predictions = serving.answers(np.array(outputs) if isinstance(outputs, list) else outputs, facts)
    return serving.encode(predictions, context.accept_header)


def _facts():
    return serving.read_facts(Path(__file__).resolve().parent.parent)


class Model:
    """A SavedModel that is ready to predict on this machine.

    Attributes:
        facts: the content of `model.json`.
    """

    def __init__(self, model_dir):
        import tensorflow as tf

        self.facts = serving.read_facts(model_dir)
        self.loaded = tf.saved_model.load(str(Path(model_dir, "1")))

    def __call__(self, samples):
        """Return the outputs of the network for samples, images as an array (n, height, width, channels)."""
        outputs = self.loaded.signatures["serving_default"](pixels=samples.astype(np.float32))
        arrays = {name: tensor.numpy() for name, tensor in outputs.items()}
        return arrays if self.facts["outputs"] == "values" else arrays[self.facts["outputs"]]


def predict_fn(content, model):
    """Return a prediction for each sample of a request."""
    samples = serving.to_samples(content, model.facts)
    return serving.answers(model(samples), model.facts)


if __name__ == "__main__":
    sys.exit(serving.predict_files(args, Model, predict_fn))
