"""XGBoost's parameters without a flag, other names for flags, and parameters that are refused, and why.

The parser of `--params` and of the XGBoost script's flags uses this table. It has every hyperparameter of
SageMaker's built-in algorithm, https://docs.aws.amazon.com/sagemaker/latest/dg/xgboost_hyperparameters.html.
"""

from __future__ import annotations

import argparse
import difflib
import json
from typing import Any, Collection, NamedTuple

from common.errors import UserError, say
from common.flag_types import choice, integer, real, share


class Flag(NamedTuple):
    """A parameter that a flag of the script sets."""

    name: str


class Fixed(NamedTuple):
    """A parameter with a fixed value, and why it has no other."""

    value: str
    reason: str


class NotUsed(NamedTuple):
    """A parameter that has no effect, and why."""

    reason: str


class Refused(NamedTuple):
    """A parameter that is not supported, and why."""

    reason: str


def constraints(value: Any) -> Any:
    """Parse constraints of columns: (1,-1) or [[0,1],[2,3]], or with column names as JSON."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        value = json.loads(value)
    if isinstance(value, dict):
        return value
    items = list(value) if isinstance(value, (list, tuple)) else []
    if any(isinstance(item, list) for item in items):
        has_names = any(isinstance(name, str) for item in items for name in item)
        return items if has_names else json.dumps(items)  # XGBoost accepts column numbers as text only
    return f"({','.join(map(str, items))})" if items else value


def _quantiles(text):
    if isinstance(text, str) and text.startswith("["):
        text = json.loads(text)
    if isinstance(text, list):
        return [real(0, 1)(value) for value in text]
    return real(0, 1)(text)


SWITCH = choice("0", "1")
DART = ("sample_type", "normalize_type", "rate_drop", "one_drop", "skip_drop")
GROUPS = Refused("it belongs to --objective rank, which needs query groups, which are not supported")
LINEAR = Refused(
    "it belongs to booster gblinear, which is not supported: it has no trees, and no rounds to resume"
)
GONE = "XGBoost has removed it"
UPDATE = "it changes existing trees, which a resumed training would do twice"

PARAMETERS = {
    # For all trees
    "max_delta_step": real(0),
    "colsample_bylevel": share,
    "colsample_bynode": share,
    "sampling_method": choice("uniform", "gradient_based"),
    "num_parallel_tree": integer(1),
    "monotone_constraints": constraints,
    "interaction_constraints": constraints,
    "max_cat_to_onehot": integer(1),
    "max_cat_threshold": integer(1),
    "max_cached_hist_node": integer(1),
    "multi_strategy": choice("one_output_per_tree", "multi_output_tree"),
    "base_score": real(float("-inf")),
    "verbosity": integer(0, 3),
    # For one booster or objective
    "sample_type": choice("uniform", "weighted"),
    "normalize_type": choice("tree", "forest"),
    "rate_drop": real(0, 1),
    "one_drop": SWITCH,
    "skip_drop": real(0, 1),
    "tweedie_variance_power": real(1, 2),
    "huber_slope": real(0),
    "grow_policy": choice("depthwise", "lossguide"),
    "quantile_alpha": _quantiles,
    # Flags, also by the names of XGBoost's scikit-learn interface
    "csv_weights": Flag("--weight-column"),
    "early_stopping_rounds": Flag("--patience"),
    "epochs": Flag("--epochs"),
    "n_estimators": Flag("--num-round"),
    "num_boost_round": Flag("--num-round"),
    "num_round": Flag("--num-round"),
    "n_jobs": Flag("--nthread"),
    "random_state": Flag("--seed"),
    "reg_alpha": Flag("--alpha"),
    "reg_lambda": Flag("--lambda"),
    "min_split_loss": Flag("--gamma"),
    # One value only
    "device": Flag("--device"),
    "deterministic_histogram": Fixed("true", "histograms are always deterministic"),
    "disable_default_eval_metric": Fixed("false", "the log needs a metric; choose it with --eval-metric"),
    "dsplit": Fixed("row", "each worker has some of the rows"),
    "process_type": Fixed("default", UPDATE),
    "seed_per_iteration": Fixed("true", "a resumed training draws the same samples"),
    "single_precision_histogram": Fixed("false", GONE),
    "use_dask_gpu_training": Fixed("false", "several GPUs train together as several workers, without Dask"),
    # Not supported
    "save_model_on_termination": NotUsed("after SIGTERM a checkpoint is always saved"),
    "_tuning_objective_metric": NotUsed("the log has all metrics"),
    "aft_loss_distribution": Refused(
        "--objective survival:aft needs two labels per row, which are not supported"
    ),
    "aft_loss_distribution_scale": Refused("--objective survival:aft needs two labels per row"),
    "feature_selector": LINEAR,
    "lambda_bias": LINEAR,
    "top_k": LINEAR,
    "lambdarank_num_pair_per_sample": GROUPS,
    "lambdarank_pair_method": GROUPS,
    "ndcg_exp_gain": GROUPS,
    "predictor": Refused(GONE),
    "prob_buffer_row": Refused(GONE),
    "refresh_leaf": Refused(f"it belongs to process_type update: {UPDATE}"),
    "silent": Refused("use verbosity"),
    "sketch_eps": Refused("XGBoost has --max-bin instead, about 1 / sketch_eps"),
    "updater": Refused("--tree-method and --grow-policy choose it"),
    "_kfold": Refused("cross-validation is not supported; run the script with each --validation folder"),
    "_num_cv_round": Refused("cross-validation is not supported"),
}
LOG_NAMES = {"logloss": "loss", "mlogloss": "loss", "error": "accuracy", "merror": "accuracy"}  # of metrics
VALUES = {  # of flags, which are refused with a reason
    ("booster", "gblinear"): LINEAR.reason,
    ("tree_method", "gpu_hist"): "it is hist on a GPU: use hist with --device cuda",
}
OWN_FLAGS = (  # the flags of the script with XGBoost's names
    "alpha",
    "booster",
    "colsample_bytree",
    "eta",
    "eval_metric",
    "gamma",
    "lambda",
    "learning_rate",
    "max_bin",
    "max_depth",
    "max_leaves",
    "min_child_weight",
    "nthread",
    "num_class",
    "objective",
    "scale_pos_weight",
    "seed",
    "subsample",
    "tree_method",
)
PARAMETERS.update({name: Flag(f"--{name.replace('_', '-')}") for name in OWN_FLAGS})


def parse(text: str) -> dict[str, Any]:
    """Return the parameters in `--params`, by name: JSON, or `a=1,b=2`, as SageMaker writes a dictionary.

    Raises UserError.
    """
    text = text.strip()
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise UserError(f"--params is not JSON ({error}): got {text!r:.100}") from error
    values = {}
    for pair in _split(text):
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(
                f"--params: expected JSON or name=value,name=value (such as max_bin=64), got {pair!r:.90}"
            )
        values[name.strip()] = value.strip()
    return values


def _split(text):
    """Return the parts between commas outside of brackets."""
    parts = [""]
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def take(words: list[str], flags: Collection[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the command line without XGBoost's parameters, and the parameters without a flag, by name.

    Parameters come from `--params` and from flags such as `--max-cat-threshold 64` in this table.

    Args:
        words: the command line.
        flags: the names of the script's flags.

    Raises UserError for an unknown or refused parameter, and for a value that is not allowed.
    """
    rest: list[str] = []
    params: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        has_value = equals or (words and not words[0].startswith("--"))
        if has_value and not equals:
            value = words[0]
        if flag != "--params" and (flag in flags or not flag.startswith("--") or name not in PARAMETERS):
            _check_value(name, value)
            rest.append(word)
            continue
        if not has_value:
            raise UserError(f"argument {flag}: expected one argument")
        if not equals:
            words.pop(0)
        if not value:  # a hyperparameter that is null
            continue
        given = parse(value) if flag == "--params" else {name: value}
        for key, item in given.items():
            params.update(_convert(key, item, rest))
    return rest, params


def _convert(name, value, words):
    """Return a parameter as {name: value}; if it is a flag, add that to the `words` and return {}."""
    rule = PARAMETERS.get(name)
    if rule is None:
        nearest = difflib.get_close_matches(name, PARAMETERS, n=1, cutoff=0.0)
        raise UserError(f"--params: unknown parameter {name}: did you mean {nearest[0]}?")
    if isinstance(rule, Refused):
        raise UserError(f"{name} is not supported: {rule.reason}")
    if isinstance(rule, NotUsed):
        say(f"Not used: {name} {value}; {rule.reason}")
    elif isinstance(rule, Fixed):
        _check_fixed(name, value, rule)
    elif name == "csv_weights":
        if _plain_word(value) not in ("true", "false"):
            raise UserError(f"csv_weights: expected 0 or 1, got {value!r}")
        if _plain_word(value) == "true":
            words.append(f"{rule.name}=1")  # the second column has the weights
    elif isinstance(rule, Flag):
        _check_value(name, value)
        value = ",".join(map(str, value)) if isinstance(value, list) else value
        words.append(f"{rule.name}={value}")
    else:
        try:
            return {name: rule(value)}
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            raise UserError(f"{name}: {error}") from error
    return {}


def _check_value(name, value):
    reason = VALUES.get((name, str(value)))
    if reason:
        raise UserError(f"{name} {value} is not supported: {reason}")


def _check_fixed(name, value, rule):
    if _plain_word(value) != rule.value:
        raise UserError(f"{name} {value} is not supported, only {rule.value}: {rule.reason}")


def _plain_word(value):
    word = str(value).lower()
    return {"1": "true", "0": "false"}.get(word, word) if word in "01" else word


def check(params: dict[str, Any], booster: str) -> None:
    """Raise UserError for parameters of the booster dart with another booster."""
    for name in DART:
        if name in params and booster != "dart":
            raise UserError(f"{name} belongs to --booster dart: add it, or remove {name}")
