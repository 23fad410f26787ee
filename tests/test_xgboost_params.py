"""XGBoost's parameters: each one of SageMaker's built-in algorithm is accepted, or rejected with a reason."""

import json

import pytest

from common import flags, xgboost_params
from common.checkpoints import HARMLESS_FLAGS
from helpers import run_many

pytestmark = pytest.mark.quick

# The parameters on https://docs.aws.amazon.com/sagemaker/latest/dg/xgboost_hyperparameters.html and others in
# the code of the container: a value, and the resulting flags or a part of the error.
BUILT_IN = {
    "alpha": ("0.5", {"alpha": 0.5}),
    "base_score": ("0.5", {"params": {"base_score": 0.5}}),
    "booster": ("dart", {"booster": "dart"}),
    "colsample_bylevel": ("0.5", {"params": {"colsample_bylevel": 0.5}}),
    "colsample_bynode": ("0.5", {"params": {"colsample_bynode": 0.5}}),
    "colsample_bytree": ("0.5", {"colsample_bytree": 0.5}),
    "csv_weights": ("1", {"weight_column": "1"}),
    "deterministic_histogram": ("true", {}),
    "dsplit": ("row", {}),
    "early_stopping_rounds": ("3", {"patience": 3}),
    "eta": ("0.2", {"eta": 0.2}),
    "eval_metric": ("auc,logloss", {"eval_metric": "auc,logloss"}),
    "gamma": ("1", {"gamma": 1.0}),
    "grow_policy": ("lossguide", {"params": {"grow_policy": "lossguide"}}),
    "interaction_constraints": (
        "[[1, 2], [3, 4]]",
        {"params": {"interaction_constraints": "[[1, 2], [3, 4]]"}},
    ),
    "lambda": ("2", {"lambda": 2.0}),
    "lambda_bias": ("0.5", "gblinear"),
    "max_bin": ("64", {"max_bin": 64}),
    "max_cat_threshold": ("64", {"params": {"max_cat_threshold": 64}}),
    "max_cat_to_onehot": ("8", {"params": {"max_cat_to_onehot": 8}}),
    "max_delta_step": ("1", {"params": {"max_delta_step": 1.0}}),
    "max_depth": ("3", {"max_depth": 3}),
    "max_leaves": ("8", {"max_leaves": 8}),
    "min_child_weight": ("2", {"min_child_weight": 2.0}),
    "monotone_constraints": ("(1, -1)", {"params": {"monotone_constraints": "(1, -1)"}}),
    "normalize_type": ("forest", {"booster": "dart", "params": {"normalize_type": "forest"}}),
    "nthread": ("2", {"nthread": 2}),
    "num_class": ("3", {"num_class": 3}),
    "num_parallel_tree": ("4", {"params": {"num_parallel_tree": 4}}),
    "num_round": ("7", {"epochs": 7}),
    "objective": ("reg:tweedie", {"objective": "reg:tweedie"}),
    "one_drop": ("1", {"booster": "dart", "params": {"one_drop": "1"}}),
    "predictor": ("cpu_predictor", "has removed it"),
    "prob_buffer_row": ("1.0", "has removed it"),
    "process_type": ("update", "a resumed training would do twice"),
    "rate_drop": ("0.1", {"booster": "dart", "params": {"rate_drop": 0.1}}),
    "refresh_leaf": ("1", "process_type update"),
    "sample_type": ("weighted", {"booster": "dart", "params": {"sample_type": "weighted"}}),
    "sampling_method": ("uniform", {"params": {"sampling_method": "uniform"}}),
    "save_model_on_termination": ("true", {}),
    "scale_pos_weight": ("2", {"scale_pos_weight": 2.0}),
    "seed": ("5", {"seed": 5}),
    "single_precision_histogram": ("true", "has removed it"),
    "sketch_eps": ("0.03", "--max-bin"),
    "skip_drop": ("0.1", {"booster": "dart", "params": {"skip_drop": 0.1}}),
    "subsample": ("0.5", {"subsample": 0.5}),
    "tree_method": ("approx", {"tree_method": "approx"}),
    "tweedie_variance_power": ("1.4", {"params": {"tweedie_variance_power": 1.4}}),
    "updater": ("grow_colmaker", "--tree-method"),
    "use_dask_gpu_training": ("true", "without Dask"),
    "verbosity": ("2", {"params": {"verbosity": 2}}),
    "aft_loss_distribution": ("normal", "two labels per row"),
    "aft_loss_distribution_scale": ("1.2", "two labels per row"),
    "_kfold": ("5", "cross-validation"),
    "_num_cv_round": ("3", "cross-validation"),
    "_tuning_objective_metric": ("validation:auc", {}),
}


def parse(*argv):
    return flags.xgboost_flags().parse_args([str(word) for word in argv])


def complain(capsys, *argv):
    """Return the line printed by a usage error."""
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", BUILT_IN)
def test_hyperparameters_of_the_built_in_algorithm_are_accepted_or_rejected(capsys, name):
    value, expected = BUILT_IN[name]
    if isinstance(expected, str):
        line = complain(capsys, f"--{name}", value)
        assert name in line
        assert expected in line
        return
    dart = ["--booster", "dart"] if expected.get("booster") else []
    plain = vars(parse(*dart))
    for words in (
        [f"--{name}", value],
        [f"--{name.replace('_', '-')}={value}"],
        ["--params", f"{name}={value}"],
    ):
        if name == "eval_metric" and words[0] == "--params":
            words = ["--params", '{"eval_metric": ["auc", "logloss"]}']
        args = vars(parse(*dart, *words))
        assert {key: args[key] for key in args if args[key] != plain[key]} == {
            key: value for key, value in expected.items() if plain[key] != value
        }


def test_the_table_has_every_hyperparameter_of_the_built_in_algorithm():
    assert set(BUILT_IN) <= set(xgboost_params.PARAMETERS)
    names = [flag[2:].replace("-", "_") for flag in flags.xgboost_flags()._option_string_actions]
    own = [
        rule.name[2:].replace("-", "_")
        for rule in xgboost_params.PARAMETERS.values()
        if hasattr(rule, "name")
    ]
    assert set(own) <= set(names)


OTHER_NAMES = {
    "--reg-alpha 1": ("alpha", 1.0),
    "--reg_lambda 3": ("lambda", 3.0),
    "--min-split-loss 2": ("gamma", 2.0),
    "--n-estimators 9": ("epochs", 9),
    "--random-state 3": ("seed", 3),
    "--learning-rate 0.1": ("eta", 0.1),
    "--csv_weights 0": ("weight_column", None),
}


@pytest.mark.parametrize("words", OTHER_NAMES)
def test_aliases_of_parameters_are_accepted(words):
    name, value = OTHER_NAMES[words]
    assert getattr(parse(*words.split()), name) == value


def test_params_is_json_or_sagemakers_form_of_a_dictionary():
    expected = {"max_cat_threshold": 8, "monotone_constraints": "(1,-1)"}
    json_text = '{"monotone_constraints": [1, -1], "max_cat_threshold": 8}'
    for text in (json_text, "monotone_constraints=(1,-1),max_cat_threshold=8"):
        args = parse("--params", text)
        assert list(args.params.items()) == list(expected.items())  # sorted: a restart compares the text
    assert parse("--params", '{"eta": 0.1, "num_parallel_tree": 2}').eta == 0.1
    assert parse("--params", "{}").params == parse("--params", "").params == parse().params == {}
    assert parse("--max_delta_step", "", "--params=").params == {}  # hyperparameters that are null
    names = parse("--params", '{"interaction_constraints": [["a", "b"]]}').params
    assert names == {"interaction_constraints": [["a", "b"]]}
    assert "--params" not in HARMLESS_FLAGS


MISTAKES = {
    "--params max_catt=3": "--params: unknown parameter max_catt: did you mean max_cat",
    "--params {max": "--params is not JSON",
    "--params max_bin": "expected JSON or name=value",
    "--params": "--params: expected one argument",
    "--params num_parallel_tree=0": "num_parallel_tree: expected a whole number of at least 1, got '0'",
    "--max-cat-threshold many": "max_cat_threshold: expected a whole number of at least 1, got 'many'",
    "--max-cat-threshold": "--max-cat-threshold: expected one argument",
    "--sampling-method some": "sampling_method: expected one of uniform, gradient_based, got 'some'",
    "--tweedie-variance-powr 1": "did you mean --tweedie-variance-power?",
    "--rate-drop 0.1": "rate_drop belongs to --booster dart",
    "--booster gblinear": "booster gblinear is not supported",
    "--booster=gblinear": "booster gblinear is not supported",
    "--params booster=gblinear": "booster gblinear is not supported",
    "--tree-method gpu_hist": "use hist",
    "--params eta=2": "--eta",
    "--csv_weights 2": "csv_weights: expected 0 or 1, got '2'",
    "--interaction-constraints [[0": "interaction_constraints: ",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_an_error_in_a_parameter_is_one_line(capsys, words):
    assert MISTAKES[words] in complain(capsys, *words.split())


def test_parameters_reach_xgboost_and_a_change_is_logged_on_resuming(tmp_path):
    params = ["--params", '{"max_delta_step": 0.1, "monotone_constraints": "(1)"}', "--verbosity", 0]
    jobs = [
        (tmp_path, ["--num-round", 2, "--output", "a", *params]),
        (tmp_path, ["--num-round", 3, "--output", "a", *params]),
        (tmp_path, ["--num-round", 4, "--output", "a", "--num-parallel-tree", 2]),
        (tmp_path, ["--num-round", 2, "--output", "output/xgboost"]),
        (tmp_path, ["--num-round", 2, "--output", "b", "--params", '{"monotone_constraints": {"x": 1}}']),
        (tmp_path, ["--num-round", 2, "--output", "c", "--params", "monotone_constraints=x"]),
    ]
    first, resumed, changed, plain, *wrong = run_many("xgboost", jobs, cwd=tmp_path)
    facts = json.loads((tmp_path / "a/model/code/model.json").read_text())
    assert facts["flags"]["params"] == {"num_parallel_tree": 2}
    assert (first.epochs, resumed.epochs) == ([1, 2], [3])
    assert "--params" not in resumed.output
    assert "Changed since xgboost-checkpoint.2: --params was {'max_delta_step': 0.1, 'mono" in changed.output
    assert plain.metric("train_loss") != first.metric("train_loss")
    for result in wrong:
        assert result.code == 1
        assert "monotone_constraints" in result.error_line
