"""The flags: spelling, defaults from SageMaker's environment, and usage errors."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import pytest

from common import distributed, flags
from common.errors import UserError

pytestmark = pytest.mark.quick

SAGEMAKER = {
    "SM_MODEL_DIR": "/opt/ml/model",
    "SM_OUTPUT_DATA_DIR": "/opt/ml/output/data",
    "SM_CHANNEL_TRAINING": "/opt/ml/input/data/training",
    "SM_CHANNEL_TEST": "/opt/ml/input/data/test",
    "SM_HOSTS": '["algo-1"]',
    "SM_CURRENT_HOST": "algo-1",
    "SM_NUM_GPUS": "0",
    "SM_CHANNEL_MODEL": "/opt/ml/input/data/model",
}


@pytest.fixture(autouse=True)
def _no_sagemaker(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SM_", "SAGEMAKER_"))]:
        monkeypatch.delenv(name)


def parse(*argv):
    return flags.image_flags("pytorch").parse_args(list(argv))


def complain(capsys, parser, *argv):
    """Return the line printed by a usage error."""
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(list(argv))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_outside_sagemaker_all_output_is_below_the_current_folder():
    args = parse()
    assert (args.train, args.validation, args.num_gpus) == (None, None, None)
    assert str(args.checkpoint_path) == "output/pytorch/checkpoints"
    assert str(args.model_dir) == "output/pytorch/model"
    assert str(args.output_data_dir) == "output/pytorch/data"
    assert (args.epochs, args.keep_checkpoints, args.schedule) == (5, 0, "constant")


def folders(args):
    return str(args.checkpoint_path), str(args.model_dir), str(args.output_data_dir)


@pytest.mark.parametrize("spelling", [["--output", "runs/1"], ["--output=runs/1"]])
def test_three_folders_are_derived_from_output_and_each_has_a_flag(spelling):
    assert folders(parse(*spelling)) == ("runs/1/checkpoints", "runs/1/model", "runs/1/data")
    assert folders(parse(*spelling, "--model-dir", "m")) == ("runs/1/checkpoints", "m", "runs/1/data")
    own = ["--checkpoint-path", "c", "--output-data-dir", "d"]
    assert folders(parse(*spelling, *own)) == ("c", "runs/1/model", "d")
    assert folders(flags.xgboost_flags().parse_args(spelling))[0] == "runs/1/checkpoints"
    assert parse("--output", "").output == Path("output/pytorch")  # a hyperparameter that is null


def test_inside_sagemaker_its_folders_override_output_but_not_their_flags(monkeypatch):
    for name, value in SAGEMAKER.items():
        monkeypatch.setenv(name, value)
    sagemaker = ("/opt/ml/checkpoints", "/opt/ml/model", "/opt/ml/output/data")
    args = parse()
    assert folders(args) == folders(parse("--output", "runs/1")) == sagemaker
    assert str(args.train) == "/opt/ml/input/data/training"
    assert str(args.validation) == "/opt/ml/input/data/test"
    assert str(args.weights) == "/opt/ml/input/data/model"
    assert (args.hosts, args.current_host, args.num_gpus) == (["algo-1"], "algo-1", 0)
    own = ["--checkpoint-path", "c", "--model-dir", "m", "--output-data-dir", "d"]
    assert folders(parse("--output", "runs/1", *own)) == ("c", "m", "d")
    monkeypatch.setenv("SM_CHANNEL_TRAIN", "/train")
    monkeypatch.setenv("SM_CHANNEL_VALIDATION", "/validation")
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", "/base")
    args = parse()
    assert (str(args.train), str(args.validation)) == ("/train", "/validation")
    assert str(args.checkpoint_path) == "/base/checkpoints"


def test_unknown_channel_names_are_an_error(monkeypatch, capsys):
    for name in ("DATA", "EVAL", "MODEL", "CODE", "SM_DRIVERS"):
        monkeypatch.setenv(f"SM_CHANNEL_{name}", "/data")
    for parser in (flags.image_flags("pytorch"), flags.xgboost_flags()):
        line = complain(capsys, parser)
        assert "the job has the channels data, eval: expected train (or training)" in line
        assert parser.parse_args(["--train", "mine"]).train == Path("mine")
    monkeypatch.setenv("SM_CHANNEL_TRAIN", "/train")
    assert parse().train == Path("/train")


def test_an_s3_address_is_not_a_data_folder(capsys):
    line = complain(capsys, flags.image_flags("pytorch"), "--train", "s3://bucket/x")
    assert "--train: expected a local folder, got 's3://bucket/x'" in line


def test_an_integer_may_have_a_decimal_point(capsys):
    assert parse("--epochs", "5.0").epochs == 5
    assert "got '5.5'" in complain(capsys, flags.image_flags("pytorch"), "--epochs", "5.5")


@pytest.mark.parametrize("spelling", [["--batch-size", "8"], ["--batch_size", "8"], ["--batch_size=8"]])
def test_hyphens_and_underscores(spelling):
    assert parse(*spelling).batch_size == 8


def test_flags_may_have_underscores_and_values_keep_them():
    for parser in (flags.image_flags("pytorch"), flags.xgboost_flags()):
        for action in parser._actions:
            for option in action.option_strings:
                if "-" in option[2:] and not option.startswith("--no-"):
                    values = {
                        "tree_method": "hist",
                        "max_bin": "2",
                        "resume_anyway": "True",
                        "dry_run": "True",
                        "external_memory": "True",
                        "hosts": '["a_b"]',
                    }
                    parser.parse_args(["--" + option[2:].replace("-", "_"), values.get(action.dest, "1")])
    assert str(parse("--train", "my_data").train) == "my_data"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], False),
        (["--augment"], True),
        (["--augment", "True"], True),
        (["--augment", "true"], True),
        (["--augment", "False"], False),
        (["--no-augment"], False),
        (["--no_augment", "True"], False),
        (["--no-augment", "false"], True),
        (["--augment", "--epochs", "3"], True),
    ],
)
def test_switches_have_the_forms_of_users_and_of_sagemaker(argv, expected):
    assert parse(*argv).augment is expected


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13800), ("90m", 5400), ("45s", 45), ("1d", 86400), ("600", 600), ("0.5", 0.5), ("1m30", 90)],
)
def test_durations(text, seconds):
    assert parse("--stop-after", text).stop_after == seconds


def test_an_empty_channel_value_means_no_channel():
    assert parse("--train", "").train is None


def test_epochs_is_an_alias_of_num_round():
    parser = flags.xgboost_flags()
    assert parser.parse_args([]).epochs == 50
    assert parser.parse_args(["--epochs", "7"]).epochs == parser.parse_args(["--num_round", "7"]).epochs == 7


def test_an_s3_address_as_model_dir_is_logged_but_not_used(monkeypatch, capsys):
    monkeypatch.setenv("SM_MODEL_DIR", "/opt/ml/model")
    args = parse("--model_dir", "s3://bucket/job/model")
    assert str(args.model_dir) == "/opt/ml/model"
    logged = capsys.readouterr().out
    assert logged == "Not used: --model-dir s3://bucket/job/model; the model is written to /opt/ml/model\n"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--epochs", "0"], ["--epochs", "a whole number of at least 1", "'0'"]),
        (["--epochs", "1.5"], ["--epochs", "a whole number of at least 1", "'1.5'"]),
        (["--batch-size", "-8"], ["--batch-size", "at least 1", "'-8'"]),
        (["--learning-rate", "nan"], ["--learning-rate", "a number of at least 0", "'nan'"]),
        (["--learning-rate", "inf"], ["--learning-rate", "'inf'"]),
        (["--warmup-epochs", "-1"], ["--warmup-epochs", "a number of at least 0", "'-1'"]),
        (["--patience", "1.5"], ["--patience", "a whole number of at least 0", "'1.5'"]),
        (["--stop-after", "3 hours"], ["--stop-after", "a time such as 3h50m", "'3 hours'"]),
        (["--optimizer", "adam"], ["--optimizer", "'adam'", "adamw"]),
        (["--momentum", "0.9"], ["unknown flag --momentum:"]),
        (["--workers", "2"], ["unknown flag --workers:"]),
        (["--keep-best"], ["unknown flag --keep-best:"]),
        (["--output", "s3://bucket/job"], ["--output", "a local folder", "s3://bucket/job"]),
        (["--batch-sise", "8"], ["--batch-sise", "did you mean --batch-size?"]),
        (["--batch", "8"], ["unknown flag --batch:", "did you mean"]),  # no abbreviations
        (["--lr", "0.1"], ["unknown flag --lr: did you mean --learning-rate?"]),
        (["--early-stop", "3"], ["did you mean --patience?"]),
        (["--lr=0.1"], ["unknown flag --lr:"]),
        (["5"], ["unexpected argument '5'"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cuda"]),
        (["--augment", "maybe"], ["--augment", "True or False", "'maybe'"]),
        (
            ["--checkpoint-path", "s3://bucket/job"],
            ["--checkpoint-path", "a local folder", "s3://bucket/job"],
        ),
        (["--port", "65536"], ["--port", "from 0 to 65535", "'65536'"]),
        (["--hosts", "algo-1"], ["--hosts", "a JSON list", "'algo-1'"]),
        (["--hosts", "5"], ["--hosts", "a JSON list", "'5'"]),
        (["--seed", "4294967296"], ["--seed", "from 0 to 4294967295", "'4294967296'"]),
    ],
)
def test_a_usage_error_is_one_line_with_the_flag_and_the_value(capsys, argv, parts):
    line = complain(capsys, flags.image_flags("pytorch"), *argv)
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line


def test_fractions_of_rows_and_columns_are_positive(capsys):
    assert "above 0" in complain(capsys, flags.xgboost_flags(), "--subsample", "0")
    assert "from 0 to 1" in complain(capsys, flags.xgboost_flags(), "--colsample-bytree", "1.1")


PARSERS = {"images": flags.image_flags("pytorch"), "xgboost": flags.xgboost_flags()}


@pytest.mark.parametrize("name", PARSERS)
def test_each_flag_has_a_help_text(name):
    assert all(action.help for action in PARSERS[name]._actions)


@pytest.mark.parametrize(("name", "limit"), [("images", 40), ("xgboost", 45)])
def test_the_help_is_short(name, limit):
    shown = set(re.findall(r"^  (--[-a-z0-9]+)", PARSERS[name].format_help(), re.MULTILINE))
    assert len(shown - {"--help"}) <= limit


@pytest.mark.parametrize("name", PARSERS)
def test_the_help_has_groups_that_fit_on_a_screen(name):
    text = re.sub(r"\A.*?\n(?=data:)", "", PARSERS[name].format_help(), flags=re.DOTALL)
    groups = re.split(r"^(\w[\w ]+):\n", text, flags=re.MULTILINE)[1:]
    assert tuple(groups[::2]) == flags.GROUPS
    assert max(group.count("\n") for group in groups[1::2]) <= 44


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert lines["python"] == platform.python_version()
    assert lines["xgboost"] == metadata.version("xgboost")


def test_xgboost_shares_the_applicable_flags():
    image, trees = ({action.dest: action for action in PARSERS[name]._actions} for name in PARSERS)
    differing = {"epochs", "checkpoint_path", "learning_rate"}
    assert {"output", "best_metric", "patience", "seed", "hosts", "keep_checkpoints"} <= set(image) & set(
        trees
    )
    for dest in set(image) & set(trees) - differing:
        ours, theirs = image[dest], trees[dest]
        assert (ours.option_strings, ours.help) == (theirs.option_strings, theirs.help)


# Hyperparameters --------------------------------------------------------------------------------------------


def test_flags_become_hyperparameters_of_sagemaker():
    words = ["--epochs", "5", "--augment", "--learning_rate=0.1", "--no-compile"]
    expected = {"epochs": "5", "augment": "True", "learning-rate": "0.1", "no-compile": "True"}
    assert flags.hyperparameters(words) == expected


@pytest.mark.parametrize(
    ("rank", "expected"),
    [("one", "RANK is 'one': expected a whole number"), ("2", "RANK is 2: expected")],
)
def test_an_invalid_torchrun_variable_is_a_one_line_error(monkeypatch, rank, expected):
    variables = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        distributed.join(flags.image_flags("pytorch").parse_args([]))
