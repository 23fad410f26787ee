"""Predict with a model that `train.py` has exported: photos on your machine, or requests on SageMaker.

Local:      python pytorch/inference.py photos/ --model-dir output/pytorch/model
SageMaker:  its PyTorch container finds this file in `code/` of the model; see launch/deploy.py

The network is that of `build_model`, and images are normalized as in training: this file needs no change if
either changes. The four functions are those of SageMaker's inference toolkit,
https://github.com/aws/sagemaker-pytorch-inference-toolkit.
"""

import sys
from pathlib import Path

from common import serving

if __name__ == "__main__":
    args = serving.parse_args(__file__, __doc__)  # before the slow imports

import engine
import torch
import train
from torch.utils._pytree import tree_map


class Model:
    """A network that is ready to predict.

    Attributes:
        facts: the content of `model.json`.
    """

    def __init__(self, model_dir):
        self.facts = serving.read_facts(model_dir)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        args, data = serving.restore(self.facts, train.parse_args)
        self.network = train.build_model(args, data)
        path = Path(model_dir, "model.pth")
        weights = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise serving.other_network(path) from error
        self.network.to(self.device).eval()
        self.statistics = engine.channel_statistics(data, self.device)

    @torch.no_grad()
    def __call__(self, samples):
        """Return the outputs of the network for samples, images as an array (n, height, width, channels)."""
        tensors = torch.from_numpy(samples).to(self.device)
        if tensors.ndim == 4:
            tensors = tensors.permute(0, 3, 1, 2)
        if self.statistics:
            tensors = engine.normalize(tensors, *self.statistics, eps=0)
        outputs = self.network(tensors)
        return tree_map(lambda output: output.float().cpu().numpy(), outputs)


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
