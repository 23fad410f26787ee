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


def load_data(args):
    """Return the training and the validation table, such as two `common.tables.Table` or plain tuples.

    A table is (features, labels), or with weights of the rows and names of the columns (features, labels,
    weights, names). Features (n, columns) are an array, a scipy CSR matrix or a pandas DataFrame; labels and
    weights are (n,).
    """
    return load_tables(args)


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
        **args.params,  # all others, from --params and from flags such as --max-cat-threshold
    }
    params.update(engine.objective_params(args, data))  # objective, eval_metric, num_class
    return params


def build_objective(args):
    """Return your own objective, or None for that of --objective.

    An objective is a function (predictions, matrix) that returns gradient and Hessian, both of the shape of
    the predictions, which are raw scores. `matrix.get_label()` and `matrix.get_weight()` have the labels and
    the weights of the rows; multiply both results by the weights.
    """
    return None


def build_metric(args):
    """Return your own metric, or None for those of --eval-metric alone.

    A metric is a function (predictions, matrix) that returns a name and a value. The predictions are raw
    scores if the objective is your own. With several workers, the mean of their values is logged. For
    --best-metric and --patience say what is better: NAME:max.
    """
    return None


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
