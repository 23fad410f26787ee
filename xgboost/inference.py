"""Predict with a model that `train.py` has exported: tables on your machine, or requests on SageMaker.

Local:      python xgboost/inference.py rows.csv --model-dir output/xgboost/model
SageMaker:  its XGBoost container finds this file in `code/` of the model; see launch/deploy.py

The rows have the columns of the training data without the label, or a header that names them. The four
functions are those of SageMaker's container, https://github.com/aws/sagemaker-xgboost-container.
"""

import sys
from pathlib import Path

from common import serving, table_requests

if __name__ == "__main__":
    args = serving.parse_args(__file__, __doc__)  # before the slow imports

import numpy as np
import xgboost as xgb


class Model:
    """Boosted trees that are ready to predict.

    Attributes:
        facts: the content of `model.json`.
    """

    def __init__(self, model_dir):
        self.facts = serving.read_facts(model_dir)
        content = Path(model_dir, "xgboost-model").read_bytes()
        self.booster = xgb.Booster(model_file=bytearray(content))

    def __call__(self, rows):
        """Return the predictions for an array (n, columns); for two classes the probabilities of both."""
        options = {"feature_names": self.booster.feature_names, "feature_types": self.booster.feature_types}
        outputs = self.booster.predict(xgb.DMatrix(rows, **options))
        if outputs.ndim == 1 and self.facts["outputs"] == "probabilities":
            return np.column_stack([1 - outputs, outputs])
        return outputs


def model_fn(model_dir):
    """Return the model in a folder."""
    return Model(model_dir)


@serving.with_status
def input_fn(body, content_type):
    """Return the content of a request."""
    return serving.decode(body, content_type)


@serving.with_status
def predict_fn(content, model):
    """Return a prediction for each row of a request."""
    rows = table_requests.to_rows(content, model.facts)
    return serving.answers(model(rows), model.facts)


@serving.with_status
def output_fn(predictions, accept):
    """Return the body and the content type of an answer."""
    return serving.encode(predictions, accept)


if __name__ == "__main__":
    sys.exit(serving.predict_files(args, model_fn, predict_fn))
