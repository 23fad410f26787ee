"""Predict with a model that `train.py` has exported: photos on your machine, or requests on SageMaker.

Local:      python tensorflow/inference.py photos/ --model-dir output/tensorflow/model
SageMaker:  its TensorFlow container finds this file in `code/` of the model; see launch/deploy.py

The SavedModel contains the normalization of its images: this file needs no change if `build_model` changes.
The two handlers are those of SageMaker's container, where TensorFlow Serving predicts and TensorFlow is not
installed: https://github.com/aws/sagemaker-tensorflow-serving-container. That container answers a bad request
with the status 500 and the reason.
"""

import json
import sys
from pathlib import Path

from common import quiet, serving

if __name__ == "__main__":
    args = serving.parse_args(__file__, __doc__)  # before the slow imports

import numpy as np


def input_handler(data, context):
    """Return a request of SageMaker as one of TensorFlow Serving.

    Args:
        data: a file with the body.
        context: has `request_content_type`.
    """
    body = data.read()
    content = serving.decode(body, context.request_content_type)
    samples = serving.to_samples(content, _facts())
    return json.dumps({"instances": samples.tolist()})


def output_handler(response, context):
    """Return the body and the content type of the answer to TensorFlow Serving's answer."""
    if response.status_code != 200:
        reason = response.content.decode()
        raise serving.RequestError(reason, response.status_code)
    facts = _facts()
    kind = facts["outputs"]
    rows = response.json()["predictions"]
    if kind != "values":
        outputs = np.array([row[kind] for row in rows])
    elif isinstance(rows[0], dict):  # several outputs
        outputs = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    else:
        outputs = np.array(rows)
    predictions = serving.answers(outputs, facts)
    return serving.encode(predictions, context.accept_header)


def _facts():
    code = Path(__file__).resolve().parent
    return serving.read_facts(code.parent)


class Model:
    """A SavedModel that is ready to predict on this machine.

    Attributes:
        facts: the content of `model.json`.
    """

    def __init__(self, model_dir):
        with quiet.without_lines(quiet.TENSORFLOW):
            import tensorflow as tf

        self.facts = serving.read_facts(model_dir)
        folder = str(Path(model_dir, "1"))
        self.loaded = tf.saved_model.load(folder)

    def __call__(self, samples):
        """Return the outputs of the network for samples, images as an array (n, height, width, channels)."""
        predict = self.loaded.signatures["serving_default"]
        outputs = predict(pixels=samples.astype(np.float32))
        kind = self.facts["outputs"]
        if kind == "values":
            return {name: tensor.numpy() for name, tensor in outputs.items()}
        return outputs[kind].numpy()


def predict_fn(content, model):
    """Return a prediction for each sample of a request."""
    samples = serving.to_samples(content, model.facts)
    outputs = model(samples)
    return serving.answers(outputs, model.facts)


if __name__ == "__main__":
    sys.exit(serving.predict_files(args, Model, predict_fn))
