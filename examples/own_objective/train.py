"""Train boosted trees with XGBoost; run the same command again to resume.

Train:      python xgboost/train.py
Resume:     python xgboost/train.py                (the newest checkpoint is found and continued)
SageMaker:  XGBoost(entry_point="train.py", source_dir="xgboost", checkpoint_s3_uri="s3://...", ...)

An epoch is one boosting round. Writes below --output: a checkpoint after every round, the trained model, and
its metrics. `--help` lists all flags.
"""

from common import flags
from common.run import Run, execute, start
from common.tables import load_tables


def parse_args(argv=None):
    """Return the flags of this script. Add your own to the parser."""
    parser = flags.xgboost_flags()
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = start(parse_args)  # before the slow imports: --help and a misspelt flag answer at once

import engine
import xgboost as xgb

# ------------------------------------------------------------------------------------------------------------
# Make it yours: replace the bodies of these functions. Nothing below this section knows what is trained.
# ------------------------------------------------------------------------------------------------------------

import numpy as np
from common.tables import Table
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

COST_OF_TOO_LOW = 3.0  # cost of a prediction below the label, relative to one above it
MONOTONE_CONSTRAINTS = {"bmi": 1, "bp": 1}  # a higher body mass index or blood pressure is never better


def load_data(args):
    """Return the training and the validation table, by default the progression of diabetes in patients.

    The rows with the highest tenth of the training labels weigh twice as much as the others.
    """
    args.objective = "reg:squarederror"  # labels are numbers, even if they could be classes
    train, validation = load_tables(args) if args.train else load_patients(args)
    threshold = np.quantile(train.labels, 0.9)
    tables = []
    for table in (train, validation):
        weights = np.where(table.labels > threshold, 2.0, 1.0)
        tables.append(table._replace(weights=weights))
    return tables


def load_patients(args):
    """Return scikit-learn's diabetes data as a training and a validation table, with names of the columns."""
    patients = load_diabetes()
    split = train_test_split(patients.data, patients.target, test_size=0.2, random_state=args.seed)
    train_features, validation_features, train_labels, validation_labels = split
    train = Table(train_features, train_labels, names=patients.feature_names)
    validation = Table(validation_features, validation_labels, names=patients.feature_names)
    return train, validation


def build_params(args, data):
    """Return XGBoost's parameters, https://xgboost.readthedocs.io/en/stable/parameter.html."""
    params = {
        "booster": args.booster,
        "tree_method": args.tree_method,
        "eta": args.eta,
        "gamma": args.gamma,
        "max_depth": args.max_depth,
        "max_leaves": args.max_leaves,
        "max_bin": args.max_bin,
        "min_child_weight": args.min_child_weight,
        "subsample": args.subsample,
        "colsample_bytree": args.colsample_bytree,
        "lambda": getattr(args, "lambda"),
        "alpha": args.alpha,
        **args.params,  # other parameters, from --params and from flags such as --max-cat-threshold
    }
    params["eval_metric"] = ["rmse"]
    # With a custom objective, XGBoost does not start with the mean of the labels by default.
    params["base_score"] = float(np.average(data.train.labels, weights=data.train.weights))
    names = data.train.names or []
    constraints = {name: sign for name, sign in MONOTONE_CONSTRAINTS.items() if name in names}
    if constraints:
        params["monotone_constraints"] = constraints
    return params


def build_objective(args):
    """Return the asymmetric squared error: the mean of a patient's possible labels becomes an expectile."""

    def asymmetric_error(predictions, matrix):
        errors = predictions - matrix.get_label()
        costs = cost_factors(errors) * row_weights(matrix)
        return 2 * costs * errors, 2 * costs

    return asymmetric_error


def build_metric(args):
    """Return the metric of the objective; --best-metric cost:min selects the best round by it."""

    def cost(predictions, matrix):
        errors = predictions - matrix.get_label()
        costs = cost_factors(errors) * errors**2
        return "cost", float(np.average(costs, weights=row_weights(matrix)))

    return cost


def cost_factors(errors):
    """Return the factor of the squared error of each row."""
    return np.where(errors < 0, COST_OF_TOO_LOW, 1.0)


def row_weights(matrix):
    """Return the weights of the rows; XGBoost has an empty array for rows without weights."""
    weights = matrix.get_weight()
    return weights if weights.size else np.ones(matrix.num_row())


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def train(args, run, state):
    """Train from the newest checkpoint to --num-round, with a checkpoint after each round."""
    state.params = build_params(args, run.data)
    initial_epoch = run.restore(state)  # the number of finished rounds, 0 without a checkpoint
    if initial_epoch >= args.epochs:  # nothing left to train
        return
    with state.matrices() as (train_matrix, validation_matrix):
        state.booster = xgb.train(
            state.params,
            train_matrix,
            num_boost_round=args.epochs - initial_epoch,
            evals=[(train_matrix, "train"), (validation_matrix, "validation")],
            obj=build_objective(args),
            custom_metric=build_metric(args),
            xgb_model=state.booster,
            verbose_eval=False,
            # Saves xgboost-checkpoint.{epoch - 1}, logs the metrics, and ends the training after a signal or
            # for --patience. In callbacks of your own, add initial_epoch to the number of the round.
            callbacks=[engine.Rounds(run, state)],
        )


# ------------------------------------------------------------------------------------------------------------
# The training state: everything that a checkpoint contains. Row and column samples follow from (seed, round).
# ------------------------------------------------------------------------------------------------------------


class TrainingState(engine.State):
    """Everything that training changes."""

    def state_dict(self):
        """Return the content of a checkpoint."""
        return {"booster": self.booster}

    def load_state_dict(self, checkpoint):
        """Load the content of a checkpoint."""
        self.booster = checkpoint["booster"]


def export_model(run, state):
    """Write `xgboost-model`, for SageMaker's XGBoost serving container."""
    with run.export() as folder:
        content = state.booster.save_raw("ubj")
        (folder / "xgboost-model").write_bytes(content)


# ------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------


def main(args):
    """Train and write the model and its metrics."""
    with Run(args, engine) as run:
        data = run.load_tables(load_data(args))
        state = TrainingState(args, run, data)
        train(args, run, state)
        export_model(run, state)


if __name__ == "__main__":
    execute(main, args)
