"""The flags: spelling, defaults from SageMaker's environment, and mistakes."""

import pytest

from common import flags

SAGEMAKER = {
    "SM_MODEL_DIR": "/opt/ml/model",
    "SM_OUTPUT_DATA_DIR": "/opt/ml/output/data",
    "SM_CHANNEL_TRAINING": "/opt/ml/input/data/training",
    "SM_CHANNEL_TEST": "/opt/ml/input/data/test",
    "SM_HOSTS": '["algo-1"]',
    "SM_CURRENT_HOST": "algo-1",
    "SM_NUM_GPUS": "0",
}


@pytest.fixture(autouse=True)
def _no_sagemaker(monkeypatch):
    for name in (*SAGEMAKER, "SM_CHANNEL_TRAIN", "SM_CHANNEL_VALIDATION", "SAGEMAKER_BASE_DIR"):
        monkeypatch.delenv(name, raising=False)


def parse(*argv):
    return flags.image_flags("pytorch").parse_args(list(argv))


def complain(capsys, parser, *argv):
    """Return the one line that a usage error prints."""
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(list(argv))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_outside_sagemaker_everything_goes_below_the_current_folder():
    args = parse()
    assert (args.train, args.validation, args.num_gpus) == (None, None, None)
    assert str(args.checkpoint_path) == "output/pytorch/checkpoints"
    assert str(args.model_dir) == "output/pytorch/model"
    assert str(args.output_data_dir) == "output/pytorch/data"
    assert (args.epochs, args.keep_checkpoints, args.schedule) == (5, 0, "constant")


def test_inside_sagemaker_its_folders_are_the_defaults(monkeypatch):
    for name, value in SAGEMAKER.items():
        monkeypatch.setenv(name, value)
    args = parse()
    assert str(args.checkpoint_path) == "/opt/ml/checkpoints"
    assert str(args.model_dir) == "/opt/ml/model"
    assert str(args.output_data_dir) == "/opt/ml/output/data"
    assert str(args.train) == "/opt/ml/input/data/training"
    assert str(args.validation) == "/opt/ml/input/data/test"
    assert (args.hosts, args.current_host, args.num_gpus) == (["algo-1"], "algo-1", 0)
    monkeypatch.setenv("SM_CHANNEL_TRAIN", "/train")
    monkeypatch.setenv("SM_CHANNEL_VALIDATION", "/validation")
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", "/base")
    args = parse()
    assert (str(args.train), str(args.validation)) == ("/train", "/validation")
    assert str(args.checkpoint_path) == "/base/checkpoints"


@pytest.mark.parametrize("spelling", [["--batch-size", "8"], ["--batch_size", "8"], ["--batch_size=8"]])
def test_hyphens_and_underscores(spelling):
    assert parse(*spelling).batch_size == 8


def test_every_flag_with_a_hyphen_is_taken_with_underscores_and_values_keep_theirs():
    for parser in (flags.image_flags("pytorch"), flags.xgboost_flags()):
        for action in parser._actions:
            for option in action.option_strings:
                if "-" in option[2:] and not option.startswith("--no-"):
                    values = {
                        "grow_policy": "lossguide",
                        "tree_method": "hist",
                        "max_bin": "2",
                        "resume_anyway": "True",
                        "keep_best": "True",
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
def test_switches_are_taken_as_people_and_as_sagemaker_write_them(argv, expected):
    assert parse(*argv).augment is expected


def test_an_empty_word_for_a_channel_is_no_channel():
    assert parse("--train", "").train is None


def test_epochs_is_another_name_of_num_round():
    parser = flags.xgboost_flags()
    assert parser.parse_args([]).epochs == 50
    assert parser.parse_args(["--epochs", "7"]).epochs == parser.parse_args(["--num_round", "7"]).epochs == 7


def test_an_s3_address_as_model_dir_is_logged_and_not_used(monkeypatch, capsys):
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
        (["--momentum", "2"], ["--momentum", "from 0 to 1", "'2'"]),
        (["--batch-sise", "8"], ["--batch-sise", "did you mean --batch-size?"]),
        (["--batch", "8"], ["unknown flag --batch:", "did you mean"]),  # no abbreviations
        (["--lr=0.1"], ["unknown flag --lr:"]),
        (["5"], ["unexpected argument '5'"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cuda"]),
        (["--augment", "maybe"], ["--augment", "True or False", "'maybe'"]),
        (["--checkpoint-path", "s3://bucket/job"], ["--checkpoint-path", "a local folder", "s3://bucket/job"]),
        (["--port", "65536"], ["--port", "from 0 to 65535", "'65536'"]),
        (["--hosts", "algo-1"], ["--hosts", "a JSON list", "'algo-1'"]),
        (["--hosts", "5"], ["--hosts", "a JSON list", "'5'"]),
        (["--seed", "4294967296"], ["--seed", "from 0 to 4294967295", "'4294967296'"]),
    ],
)
def test_a_mistake_is_one_line_with_the_flag_and_the_value(capsys, argv, parts):
    line = complain(capsys, flags.image_flags("pytorch"), *argv)
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line


def test_shares_of_rows_and_columns_are_above_zero(capsys):
    assert "above 0" in complain(capsys, flags.xgboost_flags(), "--subsample", "0")
    assert "from 0 to 1" in complain(capsys, flags.xgboost_flags(), "--colsample-bytree", "1.1")


def test_each_flag_has_a_help_text():
    for parser in (flags.image_flags("pytorch"), flags.xgboost_flags()):
        assert all(action.help for action in parser._actions)
        parser.format_help()
