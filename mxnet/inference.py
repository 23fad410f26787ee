"""Predict with a model that `train.py` has exported: photos on your machine, or requests on SageMaker.

Local:      python mxnet/inference.py photos/ --model-dir output/mxnet/model
SageMaker:  its MXNet container finds this file in `code/` of the model; see launch/deploy.py

The exported network contains the normalization of its images: this file needs no change if `build_model`
changes. The four functions are those of SageMaker's inference toolkit,
https://github.com/aws/sagemaker-mxnet-inference-toolkit.
"""

import sys
from pathlib import Path

from common import serving

if __name__ == "__main__":
    args = serving.parse_args(__file__, __doc__)  # before the slow imports

import engine  # noqa: F401 - prepares NumPy for MXNet
import mxnet as mx


class Model(mx.gluon.Block):  # SageMaker's container refuses other classes
    """A network that is ready to predict.

    Attributes:
        facts: the content of `model.json`.
    """

    def __init__(self, model_dir):
        super().__init__()
        self.facts = serving.read_facts(model_dir)
        self.device = mx.gpu() if mx.context.num_gpus() else mx.cpu()
        symbol = str(Path(model_dir, "model-symbol.json"))
        weights = str(Path(model_dir, "model-0000.params"))
        self.network = mx.gluon.SymbolBlock.imports(symbol, ["data"], weights, self.device)

    def forward(self, samples):
        """Return the outputs of the network for samples, images as an array (n, height, width, channels)."""
        if samples.ndim == 4:
            samples = samples.transpose(0, 3, 1, 2)
        array = mx.nd.array(samples, self.device, samples.dtype)
        outputs = self.network(array)
        if isinstance(outputs, (list, tuple)):
            return [as_floats(output) for output in outputs]
        return as_floats(outputs)


def as_floats(output):
    """Return an NDArray as a NumPy array of float32."""
    return output.astype("float32").asnumpy()


def model_fn(model_dir):
    """Return the model in a folder."""
    return Model(model_dir)


def input_fn(body, content_type):
    """Return the content of a request."""
    return serving.decode(body, content_type)


def predict_fn(content, model):
    """Return a prediction for each sample of a request."""
    samples = serving.to_samples(content, model.facts)
    outputs = model(samples)
    return serving.answers(outputs, model.facts)


def output_fn(predictions, accept):
    """Return the body and the content type of an answer."""
    return serving.encode(predictions, accept)


if __name__ == "__main__":
    sys.exit(serving.predict_files(args, model_fn, predict_fn))
