"""The flags of the training scripts: one spelling, one default and one help text each.

Defaults come from SageMaker's environment variables if they are set
(https://github.com/aws/sagemaker-training-toolkit/blob/master/ENVIRONMENT_VARIABLES.md).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import sys
from pathlib import Path

from common import __version__, errors, machine, xgboost_params
from common.flag_types import duration, integer, real, share

machine.check_threads()  # a script imports this module before NumPy, which needs threads too
with errors.importing("NumPy", "Activate its environment, such as: source .venv/bin/activate"):
    import numpy  # noqa: F401 - the next import of a script needs it

FRAMEWORKS = ("torch", "torchvision", "tensorflow", "keras", "mxnet", "xgboost")
CHANNEL = "SM_CHANNEL_"  # the prefix of the variables with the folders of SageMaker's channels
NAMES_ELSEWHERE = {  # names of flags in other scripts
    "--bs": "--batch-size",
    "--data": "--train",
    "--data-dir": "--train",
    "--early-stop": "--patience",
    "--early-stopping": "--patience",
    "--gpus": "--num-gpus",
    "--lr": "--learning-rate",
    "--lr-scheduler": "--schedule",
    "--max-epochs": "--epochs",
    "--n-estimators": "--num-round",
    "--num-epochs": "--epochs",
    "--num-workers": "--loaders",
    "--output-dir": "--output",
    "--pretrained": "--weights",
    "--save-every": "--checkpoint-steps",
    "--val": "--validation",
    "--wd": "--weight-decay",
    "--workers": "--loaders",
}
GROUPS = ("data", "model", "training", "checkpoints", "output", "several workers")  # of flags, in --help
NO_DATA = {"model", "code"}  # channels without data; those of version 3 of the SDK begin with sm_


def image_flags(framework: str) -> argparse.ArgumentParser:
    """Return the parser of an image script; `framework` names its folder below `output/`."""
    parser = _Parser(description="Train an image classifier; run the same command again to resume.")
    _data_flags(parser)
    add = parser.adder("data")
    add("--image-size", type=integer(1), help="resize all images to this height and width, in pixels")
    add(
        "--augment",
        action=_Switch,
        default=False,
        help="random crops and horizontal flips of the training images",
    )
    add(
        "--loaders",
        type=integer(0),
        default=0,
        help="threads that load batches ahead (PyTorch: processes for your own data set); 0: no threads",
    )
    add = parser.adder("model")
    add(
        "--model",
        default="cnn",
        help="cnn (a small network) or a name from the framework's own model zoo, untrained",
    )
    add(
        "--weights",
        type=_path,
        default=os.environ.get("SM_CHANNEL_MODEL"),
        help="file of weights to start from (.pth, .safetensors, .keras, .params) without a checkpoint",
    )
    add = parser.adder("training")
    add("--epochs", type=integer(1), default=5, help="epochs to train in total, over all restarts")
    add("--batch-size", type=integer(1), default=64, help="samples per training step, of all hosts together")
    add(
        "--optimizer",
        choices=("sgd", "adamw"),
        default="sgd",
        help="SGD with momentum 0.9, or AdamW (decoupled weight decay)",
    )
    add("--learning-rate", type=real(0), default=0.01, help="step size of the optimizer")
    add("--weight-decay", type=real(0), default=5e-4, help="weight decay of the optimizer")
    add(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="learning rate after the warm-up",
    )
    add("--warmup-epochs", type=real(0), default=0, help="epochs in which the learning rate rises from zero")
    _training_flags(parser)
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="arithmetic of the network; weights stay fp32; TensorFlow and MXNet have fp16 on GPUs only",
    )
    add(
        "--deterministic",
        action=_Switch,
        default=True,
        help="make all runs bit-identical, even if that needs slower kernels",
    )
    add(
        "--compile",
        action=_Switch,
        default=False,
        help="torch.compile, or XLA in TensorFlow (with --no-deterministic); MXNet always compiles",
    )
    _checkpoint_flags(parser)
    _output_flags(parser, framework)
    add = parser.adder("output")
    add(
        "--log-steps",
        type=integer(0),
        default=100,
        help="log a line after this many steps if no progress bar is shown; 0: never",
    )
    _worker_flags(parser)
    return parser


def xgboost_flags() -> argparse.ArgumentParser:
    """Return the parser of the XGBoost script; learning flags carry XGBoost's own names and defaults."""
    parser = _XgboostParser(description="Train boosted trees; run the same command again to resume.")
    _data_flags(parser)
    add = parser.adder("data")
    add("--label-column", help="name of the label's column, or its number from 0; default: the first one")
    add("--weight-column", help="name of the column with the weights of the rows, or its number from 0")
    add(
        "--external-memory",
        action=_Switch,
        default=False,
        help="keep the training data on disk and read it in parts: for data larger than memory",
    )
    add = parser.adder("model")
    add("--objective", help="learning objective; default: chosen from the labels")
    add("--num-class", type=integer(1), help="number of classes; default: counted in the labels")
    add("--booster", choices=("gbtree", "dart"), default="gbtree", help="kind of booster")
    add(
        "--tree-method",
        choices=("auto", "exact", "approx", "hist"),
        default="hist",
        help="tree construction algorithm",
    )
    add(
        "--eta",
        "--learning-rate",
        type=real(0, 1),
        default=0.3,
        help="shrinkage of each round's contribution",
    )
    add("--gamma", type=real(0), default=0.0, help="minimum loss reduction for a split")
    add("--max-depth", type=integer(0), default=6, help="maximum depth of a tree; 0: no limit")
    add("--max-leaves", type=integer(0), default=0, help="maximum number of leaves of a tree; 0: no limit")
    add("--max-bin", type=integer(2), default=256, help="maximum number of bins of a feature")
    add("--min-child-weight", type=real(0), default=1.0, help="minimum sum of instance weights in a child")
    add("--subsample", type=share, default=1.0, help="share of the rows drawn for each tree")
    add("--colsample-bytree", type=share, default=1.0, help="share of the columns drawn for each tree")
    add("--lambda", type=real(0), default=1.0, help="L2 regularization of the weights")
    add("--alpha", type=real(0), default=0.0, help="L1 regularization of the weights")
    add("--scale-pos-weight", type=real(0), default=1.0, help="weight of the positive class")
    add("--params", help="other parameters of XGBoost, as JSON or name=value,name=value")
    add = parser.adder("training")
    add(
        "--num-round",
        "--epochs",
        dest="epochs",
        type=integer(1),
        default=50,
        help="boosting rounds to train in total, over all restarts; an epoch is one round",
    )
    add("--eval-metric", help="metrics to report, separated by commas; default: chosen from the objective")
    _training_flags(parser)
    add("--nthread", type=integer(0), default=0, help="CPU threads; 0: all")
    _checkpoint_flags(parser)
    _output_flags(parser, "xgboost")
    _worker_flags(parser)
    return parser


def hyperparameters(words: list[str]) -> dict[str, str]:
    """Return flags as SageMaker's hyperparameters: `--epochs 5 --augment` as epochs "5", augment "True".

    Raises UserError for a word that belongs to no flag.
    """
    values, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, equals, value = _hyphenated(word)[2:].partition("=")
            values[name] = value if equals else "True"
            name = None if equals else name
        elif name is None:
            raise errors.UserError(f"unexpected argument {word!r}: expected --flag value")
        else:
            values[name], name = word, None
    return values


def _data_flags(parser):
    env, add = os.environ.get, parser.adder("data")
    add(
        "--train",
        type=_data_path,
        default=env("SM_CHANNEL_TRAIN") or env("SM_CHANNEL_TRAINING"),
        help="folder with the training data, or one table (XGBoost); default: scikit-learn's digits",
    )
    add(
        "--validation",
        type=_data_path,
        default=env("SM_CHANNEL_VALIDATION") or env("SM_CHANNEL_TEST"),
        help="folder with the validation data; default: a tenth of the training data, held out",
    )


def _training_flags(parser):
    add = parser.adder("training")
    add(
        "--best-metric",
        metavar="NAME[:min|:max]",
        help="export the epoch that is best by this validation metric, not the last, and keep its checkpoint",
    )
    add(
        "--patience",
        type=integer(0),
        default=0,
        help="stop after this many epochs without a better --best-metric (default: loss); 0: never",
    )
    add(
        "--stop-after",
        type=duration,
        default=0,
        metavar="TIME",
        help="save and exit with code 75 after this time, such as 3h50m, counted from the start; 0: never",
    )
    add("--seed", type=integer(0, 2**32 - 1), default=42, help="seed of all random numbers")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device to train on; auto: a GPU if available",
    )
    add(
        "--num-gpus",
        type=integer(0),
        default=os.environ.get("SM_NUM_GPUS") or None,
        help="maximum number of GPUs; default: all (PyTorch and XGBoost use one)",
    )


def _checkpoint_flags(parser):
    add = parser.adder("checkpoints")
    add("--checkpoint-path", type=_local_path, help="folder of the checkpoints; default: OUTPUT/checkpoints")
    add(
        "--checkpoint-seconds",
        type=real(0),
        help="also save inside an epoch after this time; 0: never; default: 20 (XGBoost: 1) to 300 by cost",
    )
    add(
        "--checkpoint-steps",
        type=integer(0),
        default=0,
        help="also save inside an epoch after this many steps; 0: never (XGBoost: rounds)",
    )
    add(
        "--keep-checkpoints",
        type=integer(0),
        default=0,
        help="number of epochs whose checkpoints are kept; 0: all",
    )
    add(
        "--resume-anyway",
        action=_Switch,
        default=False,
        help="resume even if the flags or the data have changed",
    )


def _folder_name(framework):
    """Return the name of the script's folder: a copy must not write into the output of its original."""
    folder = Path(__file__).absolute().parents[1]
    return folder.name if (folder / "train.py").is_file() else framework


def _output_flags(parser, framework):
    add = parser.adder("output")
    add(
        "--output",
        type=_local_path,
        default=Path("output", _folder_name(framework)),
        help="folder of everything that a training writes; the folders below have their own flags",
    )
    add("--model-dir", metavar="PATH", help="folder of the trained model; default: OUTPUT/model")
    add(
        "--output-data-dir",
        type=_local_path,
        help="folder of metrics.json, history.csv and pictures; default: OUTPUT/data",
    )
    add(
        "--tensorboard",
        action=_Switch,
        default=False,
        help="write TensorBoard's event files to OUTPUT/tensorboard (SageMaker: /opt/ml/output/tensorboard)",
    )
    add(
        "--dry-run",
        action=_Switch,
        default=False,
        help="read all data, take a few steps, report time, memory and checkpoint size, and write nothing",
    )


def _worker_flags(parser):
    env, add = os.environ.get, parser.adder("several workers")
    add(
        "--hosts",
        type=_hosts,
        metavar="LIST",
        default=env("SM_HOSTS", '["localhost"]'),
        help="names of all hosts that train together, as a JSON list; the first by name is the main process",
    )
    add("--current-host", default=env("SM_CURRENT_HOST", "localhost"), help="name of this host")
    add(
        "--port",
        type=integer(0, 65535),
        default=0,
        help="port of the main process, where the hosts meet; 0: 29400, or the one after torchrun's",
    )
    add("--join-seconds", type=real(0), default=600, help="seconds to wait for the other hosts to start")


def _default_folders(framework_output):
    """Return the folders of checkpoints, model and results: SageMaker's, or else inside the output."""
    env = os.environ.get
    checkpoints = framework_output / "checkpoints"
    if "SM_MODEL_DIR" in os.environ:
        checkpoints = Path(env("SAGEMAKER_BASE_DIR", "/opt/ml"), "checkpoints")
    model = Path(env("SM_MODEL_DIR") or framework_output / "model")
    results = Path(env("SM_OUTPUT_DATA_DIR") or framework_output / "data")
    return checkpoints, model, results


def _is_trial():
    """Return whether this is a job of SageMaker's tuner, whose trials share one checkpoint address."""
    path = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"), "input/config/hyperparameters.json")
    try:
        return "_tuning_objective_metric" in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


class _Parser(argparse.ArgumentParser):
    """An argument parser that accepts `--batch_size` and names the nearest flag to a misspelt one."""

    def __init__(self, **options):
        usage = "%(prog)s [--flag value ...]"
        super().__init__(usage=usage, allow_abbrev=False, formatter_class=_HelpFormatter, **options)
        self.add_argument("--version", action=_Version, help="show the versions and exit")
        self._groups = {title: self.add_argument_group(title) for title in GROUPS}

    def adder(self, group):
        """Return the function `add_argument` of a group of flags."""
        return self._groups[group].add_argument

    def parse_args(self, argv=None):
        """Return the flags' values; a mistake exits with code 2 and one line."""
        argv = [_hyphenated(word) for word in (sys.argv[1:] if argv is None else argv)]
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._explain(unknown[0]))
        self._check_channels(args)
        args.output = args.output or self.get_default("output")
        checkpoints, model, results = _default_folders(args.output)
        if not args.checkpoint_path and "SM_MODEL_DIR" in os.environ and _is_trial():
            if not os.environ.get("TRAINING_JOB_NAME"):
                self.error("a trial of a tuning job needs TRAINING_JOB_NAME, or a separate --checkpoint-path")
            checkpoints /= os.environ["TRAINING_JOB_NAME"]
        if str(args.model_dir).startswith("s3://"):
            # SageMaker's TensorFlow estimator adds this hyperparameter by itself.
            errors.say(f"Not used: --model-dir {args.model_dir}; the model is written to {model}")
            args.model_dir = None
        args.checkpoint_path = args.checkpoint_path or checkpoints
        args.model_dir = Path(args.model_dir or model)
        args.output_data_dir = args.output_data_dir or results
        return args

    def _check_channels(self, args):
        """Exit with code 2 if the names of SageMaker's channels are unknown."""
        names = [name[len(CHANNEL) :].lower() for name in os.environ if name.startswith(CHANNEL)]
        others = [name for name in sorted(names) if name not in NO_DATA and not name.startswith("sm_")]
        if others and args.train is None:
            self.error(
                f"the job has the channels {', '.join(others)}: expected train (or training), and optionally "
                "validation (or test); rename them, or pass --train"
            )

    def error(self, message):
        """Exit with code 2 and one line."""
        errors.fail(f"{message} (--help lists all flags)", code=2)

    def _explain(self, word):
        if not word.startswith("--"):
            return f"unexpected argument {word!r}: expected --flag value"
        name = word.split("=")[0]
        if NAMES_ELSEWHERE.get(name) in self._names():
            return f"unknown flag {name}: did you mean {NAMES_ELSEWHERE[name]}?"
        nearest = difflib.get_close_matches(name, self._names(), n=1, cutoff=0.0)
        return f"unknown flag {name}: did you mean {nearest[0]}?"

    def _names(self):
        return list(self._option_string_actions)


class _XgboostParser(_Parser):
    """A parser that also takes XGBoost's other parameters and returns them as `params`."""

    def parse_args(self, argv=None):
        """Return the flags' values; a mistake exits with code 2 and one line."""
        words = [_hyphenated(word) for word in (sys.argv[1:] if argv is None else argv)]
        try:
            rest, params = xgboost_params.take(words, self._option_string_actions)
            args = super().parse_args(rest)
            xgboost_params.check(params, args.booster)
        except errors.UserError as error:
            self.error(str(error))
        args.params = dict(sorted(params.items()))
        return args

    def _names(self):
        others = [f"--{name.replace('_', '-')}" for name in xgboost_params.PARAMETERS]
        return [*super()._names(), *others]


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to each help text, and says briefly which kind of value a flag takes."""

    def __init__(self, *args, **options):
        super().__init__(*args, max_help_position=30, **options)

    def _get_help_string(self, action):
        is_hidden = action.default in (None, argparse.SUPPRESS) or isinstance(action, _Switch)
        return action.help if is_hidden else f"{action.help} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action):
        if action.type in (_path, _data_path, _local_path):
            return "PATH"
        return "NUMBER" if action.type else "NAME"

    def _format_action_invocation(self, action):
        if isinstance(action, _Switch):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


class _Switch(argparse.Action):
    """`--flag` and `--no-flag`, optionally with True or False, as SageMaker passes hyperparameters."""

    def __init__(self, option_strings, dest, **options):
        negative = [name.replace("--", "--no-", 1) for name in option_strings]
        super().__init__([*option_strings, *negative], dest, nargs="?", **options)

    def __call__(self, parser, namespace, value, option_string=None):
        words = {None: True, "true": True, "false": False}
        word = value if value is None else value.lower()
        if word not in words:
            parser.error(f"argument {option_string}: expected True or False, got {value!r}")
        setattr(namespace, self.dest, words[word] != option_string.startswith("--no-"))


class _Version(argparse.Action):
    """Prints the versions of this repository, Python and the frameworks that are installed, and exits."""

    def __init__(self, *args, **options):
        super().__init__(*args, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser, namespace, value, option_string=None):
        from importlib import metadata  # slow

        print(f"{parser.prog} {__version__}")
        print(f"python {sys.version.split()[0]}")
        for name in FRAMEWORKS:
            with contextlib.suppress(metadata.PackageNotFoundError):
                print(f"{name} {metadata.version(name)}")
        parser.exit()


def _hyphenated(word):
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _hosts(text):
    try:
        hosts = json.loads(text)
    except ValueError:
        hosts = None
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise argparse.ArgumentTypeError(
            f"expected a JSON list of names such as '[\"algo-1\"]', got {text!r}"
        )
    return hosts


def _path(text):
    return Path(text) if text else None  # SageMaker passes an empty word for a hyperparameter that is null


def _data_path(text):
    if str(text).startswith("s3://"):
        raise argparse.ArgumentTypeError(
            f"expected a local folder, got {text!r}: copy it with `aws s3 sync`, or let SageMaker copy it"
        )
    return _path(text)


def _local_path(text):
    if str(text).startswith("s3://"):
        raise argparse.ArgumentTypeError(
            f"expected a local folder, got {text!r}; SageMaker copies it to S3 by itself"
        )
    return _path(text)
