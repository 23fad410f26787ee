"""Device, workers, matrices and checkpoint files for `train.py`. No need to edit this file.

`common/run.py` calls the functions; the training state in `train.py` inherits from `State`.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from common import atomic_io, errors, machine, tables, train_state
from common.errors import UserError
from common.preemption import Interrupted
from common.report import log
from common.xgboost_params import LOG_NAMES

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads spin briefly before they sleep

with contextlib.suppress(ImportError):
    # XGBoost imports it too, but from nested calls, which takes 0.2 seconds longer in Python 3.12.
    import sklearn  # noqa: F401
with errors.importing(
    "XGBoost", "Activate its environment (source .venv/bin/activate), or install it: pip install xgboost"
):
    import xgboost as xgb
    from xgboost.tracker import RabitTracker

CHECKPOINT = "xgboost-checkpoint.{}"  # the last round, counted from 0, as in SageMaker's own container
TABLE = "table"  # the booster's attribute that maps numbers to categories
FIRST_NUMBER = 0  # in the name of the checkpoint after the first round
MIN_SAVE_SECONDS = 1  # between the saves of two boosting rounds
FRAMEWORK = "xgboost"
VERSION = str(xgb.__version__)
MODEL_FACTS = "code/model.json"  # SageMaker's own container loads every file beside the model as a model
WEEK = 7 * 24 * 3600  # seconds

QUANTILE_METHODS = ("auto", "hist")  # these build trees from quantiles of the columns, made in advance
DEFAULT_METRICS = {"multi": "mlogloss,merror", "binary": "logloss,error", "reg": "rmse"}
PROBABILITIES = "multi:softprob", "binary:logistic"  # objectives whose predictions are probabilities


def start(args, workers):
    """Return the device to compute on, "cpu" or "cuda".

    The device changes only the speed, not the data or the number of rounds.
    """
    device = "cpu"
    if args.device != "cpu" and args.num_gpus != 0:
        device = _find_device()
    if args.device == "cuda" and device != "cuda":
        raise UserError("--device cuda: XGBoost finds no GPU; use --device auto or cpu")
    log(f"Device: {device}")
    workers.check_same({"device": device})
    return device


def _find_device():
    with xgb.config_context(verbosity=0):  # without a GPU XGBoost warns and uses the CPU
        probe = xgb.train({"device": "cuda"}, xgb.DMatrix(np.zeros((2, 1)), np.arange(2)), 1)
    device = json.loads(probe.save_config())["learner"]["generic_param"]["device"]
    return device.split(":")[0]


def objective_params(args, data):
    """Return the parameters that follow from the labels, unless their flags are given.

    Raises UserError for labels that do not fit the objective.
    """
    labels = np.unique(data.train.labels)
    if len(labels) < 2:
        label = data.train.classes[int(labels[0])] if data.train.classes else f"{labels[0]:g}"
        raise UserError(f"--train {args.train} has one label only ({label}): expected two or more")
    num_named = len(data.train.classes or ())
    objective = args.objective or _choose_objective(labels, args.num_class or num_named)
    objective = objective.replace("reg:linear", "reg:squarederror")  # its earlier name
    kind, _, _ = objective.partition(":")
    if kind == "rank":
        raise UserError(f"--objective {objective} needs query groups, which this script does not read")
    params = {"objective": objective}
    num_classes = 2
    if kind == "multi":
        num_classes = args.num_class or num_named or int(labels[-1]) + 1
        params["num_class"] = num_classes
    if kind == "binary":
        params["scale_pos_weight"] = args.scale_pos_weight
    if kind in ("multi", "binary"):
        _check_classes(args, data, labels, params)
    metrics = args.eval_metric or DEFAULT_METRICS.get(kind, "")
    params["eval_metric"] = [metric.strip() for metric in metrics.split(",") if metric.strip()]
    classes = f" num_class={num_classes}" if kind == "multi" else ""
    log(f"Training: objective={objective}{classes} eval_metric={params['eval_metric']}")
    return params


def _check_classes(args, data, labels, params):
    """Raise UserError if the labels of a classification are not 0 to the number of classes - 1."""
    num_classes = params.get("num_class", 2)
    unknown = np.setdiff1d(data.validation.labels, labels)
    if len(unknown) and not args.num_class and not data.train.classes:
        raise UserError(
            f"the validation rows have the label {unknown[0]:g}, which no training row has: expected labels "
            f"from {labels[0]:g} to {labels[-1]:g}; if there are more classes, pass --num-class"
        )
    if not np.isin(labels, np.arange(num_classes)).all():
        raise UserError(
            f"objective {params['objective']} expects the labels 0 to {num_classes - 1}, but there are "
            f"{len(labels)} from {labels[0]:g} to {labels[-1]:g}: pass another --objective or --num-class"
        )


def _choose_objective(labels, num_classes):
    is_classification = len(labels) <= 100 and np.array_equal(labels, np.arange(len(labels)))
    if not is_classification and not num_classes:
        return "reg:squarederror"
    if (num_classes or len(labels)) == 2:
        return "binary:logistic"
    return "multi:softprob"


class State:
    """The training state shared by all parameters: device, workers, matrices.

    Attributes:
        params: XGBoost's parameters; `train` sets them.
        booster: the trees; None before the first round.
        feature_names, feature_types: the names and types of the columns, or None.
    """

    def __init__(self, args, run, data):
        self.args = args
        self.data = data
        self.device = run.device
        self.workers = run.workers
        self.params = {}
        self.booster = None
        self.feature_names = self.feature_types = None
        self._tracker = None  # the main process's, for XGBoost's tracker

    @contextlib.contextmanager
    def matrices(self):
        """Yield XGBoost's matrices of this worker's training and validation rows.

        Inside this block XGBoost computes with the rows of all workers. Raises UserError with XGBoost's own
        reason if it cannot train with these parameters and data.
        """
        defaults = {"seed": self.args.seed, "nthread": self.args.nthread, "device": self.device}
        # Makes row and column samples functions of (seed, round).
        self.params = {**defaults, **self.params, "seed_per_iteration": True}
        self._check_params()
        try:
            self._connect()
            train, validation = self._build_matrices()
            self.feature_names, self.feature_types = train.feature_names, train.feature_types
            yield train, validation
            self._disconnect()
        except Interrupted:
            self._disconnect()
            raise
        except xgb.core.XGBoostError as error:
            self.workers.end_if_another_failed()
            raise UserError(self._explain(error)) from error

    def _check_params(self):
        """Raise UserError for parameters that do not fit the flags or the workers."""
        booster = self.params.get("booster", "gbtree")
        if booster != "gbtree" and self.args.best_metric:
            raise UserError(
                f"--best-metric: with --booster {booster} later rounds change earlier trees; "
                "use one of the two"
            )
        method = self.params.get("tree_method", "hist")
        has_all_rows = not self.args.external_memory and (method == "approx" or self.workers.size == 1)
        if method not in QUANTILE_METHODS and not has_all_rows:
            raise UserError(f"--tree-method {method} needs all rows in the memory of one process: use hist")
        if method == "exact" and self.data.train.categories:
            names = ", ".join(self.data.train.categories)
            raise UserError(f"--tree-method exact has no splits for the text in {names[:300]}: use hist")
        for name in ("monotone_constraints", "interaction_constraints"):
            self._check_constraint(name)

    def _check_constraint(self, name):
        """Raise UserError if a constraint names columns that the table does not have."""
        known = self.data.train.names or []
        for item in _as_list(self.params.get(name) or []):
            for column in _as_list(item):
                if isinstance(column, str) and column not in known and not column.startswith(("(", "[")):
                    raise UserError(
                        f"{name} has the column {column}, which the table does not have: expected some of "
                        f"{', '.join(known)[:300] or 'its numbers from 0, as it has no names'}"
                    )

    def _connect(self):
        """Train on the rows of all workers with XGBoost's own collective."""
        if self.workers.size == 1:
            return
        if self.workers.is_main_process:
            self._tracker = RabitTracker(self.workers.size, self.workers.main_address, sortby="task")
            self._tracker.start()
        address = self.workers.all_gather(self._tracker and self._tracker.worker_args())[0]
        # Its ranks follow the order of the tasks. A long timeout, as common/distributed.py detects failures.
        xgb.collective.init(**address, dmlc_task_id=f"{self.workers.rank:06d}", dmlc_timeout=WEEK)

    def _disconnect(self):
        """Wait for the other workers in XGBoost's tracker."""
        if self.workers.size == 1:
            return
        xgb.collective.finalize()
        if self._tracker:
            self._tracker.wait_for()

    def _build_matrices(self):
        train, validation = self.data.shard(self.workers)
        options = {"nthread": self.params["nthread"] or None}
        if self.params.get("tree_method", "hist") not in QUANTILE_METHODS:
            return _matrix(train, options), _matrix(validation, options)
        kind = xgb.QuantileDMatrix
        if isinstance(train.features, tables.Parts):
            kind = xgb.ExtMemQuantileDMatrix
        options["max_bin"] = self.params.get("max_bin", 256)
        matrix = kind(Batches(train), **options)
        return matrix, kind(Batches(validation), ref=matrix, **options)

    def _explain(self, error):
        place = r"^\[.*?\] \S+: "  # in XGBoost's source
        reason = re.sub(place, "", errors.first_line(error))
        chosen = f"--objective {self.params.get('objective')}"
        if self.params.get("eval_metric"):
            chosen += f" --eval-metric {','.join(_as_list(self.params['eval_metric']))}"
        return f"XGBoost cannot train with {chosen} and this data: {reason}"

    @property
    def job(self):
        """What identifies the job, besides the flags and the data."""
        return {
            "--booster": self.params.get("booster", "gbtree"),
            "--objective": self.params.get("objective", "reg:squarederror"),
            "number of classes": int(self.params.get("num_class", 0)),
        }

    @property
    def settings(self):
        """The parameters by flag, as changed by `build_params`."""
        return {f"--{name.replace('_', '-')}": str(value) for name, value in self.params.items()}

    @property
    def model_facts(self):
        """What `model.json` says about the model, read from the booster."""
        learner = json.loads(self.booster.save_config())["learner"]
        objective = learner["objective"]["name"]
        num_classes = int(learner["learner_model_param"]["num_class"]) or 2
        is_classifier = objective in PROBABILITIES
        facts = json.loads(self.booster.attr(TABLE) or "{}")
        if self.data:
            facts = _table_facts(self.data.train)
        class_names = list(facts.get("class_names") or [])
        if is_classifier:
            class_names += [str(number) for number in range(len(class_names), num_classes)]
        return {
            "objective": objective,
            "num_columns": self.booster.num_features(),
            "column_names": self.booster.feature_names,
            "column_types": self.booster.feature_types,
            "categories": facts.get("categories") or {},
            "class_names": class_names or None,
            "outputs": "probabilities" if is_classifier else "values",
        }

    def load_epoch(self, epoch):
        """Go back to the trees of the first `epoch` rounds."""
        self.booster = self.booster[:epoch]

    def draws_samples(self):
        """Return whether rounds draw random numbers."""
        names = ("subsample", "colsample_bytree", "colsample_bylevel", "colsample_bynode")
        smallest = min(float(self.params.get(name, 1)) for name in names)
        return smallest < 1 or self.params.get("booster") == "dart"


def _table_facts(table):
    """Return the categories that predictions need; {} for a table without text."""
    facts = {"categories": table.categories, "class_names": table.classes}
    return {name: value for name, value in facts.items() if value}


def _matrix(table, options):
    options = {**options, "feature_names": table.names, "feature_types": table.types}
    return xgb.DMatrix(table.features, table.labels, weight=table.weights, **options)


def _as_list(value):
    if isinstance(value, (list, tuple, set, dict)):
        return list(value)
    return [value]


class Batches(xgb.DataIter):
    """Passes a table to XGBoost in parts. If the parts are on disk, XGBoost keeps its copy on disk too."""

    def __init__(self, table):
        super().__init__(cache_prefix=getattr(table.features, "cache", None))
        self.table = table

    def reset(self):
        """Start again with the first part."""
        self.parts = self.table.parts()

    def next(self, input_data):
        """Pass the next part to `input_data`; return whether there was one."""
        part = next(self.parts, None)
        if part is None:
            return False
        input_data(
            data=part.features,
            label=part.labels,
            weight=part.weights,
            feature_names=part.names,
            feature_types=part.types,
        )
        return True


class Rounds(xgb.callback.TrainingCallback):
    """Reports each boosting round to the Run, which logs and saves it and ends the training after a signal.

    Metrics have the same names in all scripts. Your own metrics are averaged over the workers.
    """

    def __init__(self, run, state):
        self.run = run
        self.state = state
        self._has_warned = False
        # SageMaker's console and tuner read the metrics of its XGBoost image from lines in that format.
        image = os.environ.get("SAGEMAKER_TRAINING_MODULE", "")  # a variable of the image
        self.is_in_container = image.startswith("sagemaker_xgboost_container")
        metrics = _as_list(state.params.get("eval_metric") or [])
        self.names = {metric: LOG_NAMES[metric] for metric in metrics if metric in LOG_NAMES}

    def before_training(self, model):
        """Set the column names of a checkpoint's booster, which may have changed."""
        self.run.start_rounds()
        facts = _table_facts(self.state.data.train)
        if facts:
            model.set_attr(**{TABLE: json.dumps(facts)})
        if model.num_boosted_rounds():
            model.feature_names = self.state.feature_names
            model.feature_types = self.state.feature_types
            version = tuple(map(int, xgb.__version__.split(".")[:2]))
            if version < (3, 4) and self.state.draws_samples():
                log(
                    "Warning: XGBoost before 3.4 draws different row and column samples, and drops different "
                    "trees, after a restart: the result will be equally good but not bit-identical"
                )
        return model

    def after_iteration(self, model, epoch, evals_log):
        """Finish the round; return whether the training ends."""
        self.state.booster = model
        if model.attr("best_score") and not self._has_warned:
            self._has_warned = True
            log(
                "Warning: no checkpoint holds the state of xgb.callback.EarlyStopping: it is lost after "
                "an interruption; use --patience and --best-metric"
            )
        if self.is_in_container and not self.run.args.dry_run:
            for split, values in evals_log.items():
                for name, history in values.items():  # one per line; CloudWatch shows a tab as #011
                    log(f"[{self.run.progress.epoch}]#011{split}-{name}:{history[-1]:.5f}")
        metrics = {name: self._rename(values) for name, values in evals_log.items()}
        if self.run.workers.size > 1:
            metrics = self._average(metrics)
        num_rows = len(self.state.data.train.labels)
        return self.run.finish_round(metrics["train"], metrics["validation"], num_rows)

    def _rename(self, metrics):
        """Return the newest value of each metric."""
        newest = {}
        for name, values in metrics.items():
            log_name = self.names.get(name, name)
            value = values[-1]
            if name in self.names and log_name == "accuracy":  # XGBoost's error
                value = 1 - value
            newest[log_name] = value
        return newest

    def _average(self, metrics):
        by_worker = self.run.workers.all_gather(metrics)
        averages = {}
        for split, values in metrics.items():
            averages[split] = {name: _mean([worker[split][name] for worker in by_worker]) for name in values}
        return averages


def _mean(values):
    if len(set(values)) == 1:  # XGBoost's own metrics are the same on all workers
        return values[0]
    return sum(values) / len(values)


# Checkpoints ---------------------------------------------------------------------------------------------


def copy_to_host(content, memory):
    """Return a checkpoint as bytes: the booster, with the rest as JSON in its attribute "checkpoint"."""
    booster = content["booster"]
    facts = {name: value for name, value in content.items() if name != "booster"}
    facts["sha256"] = atomic_io.NO_CHECKSUM  # a damaged file can crash XGBoost when it is read
    booster.set_attr(checkpoint=json.dumps(facts))
    file_content = booster.save_raw("ubj")
    booster.set_attr(checkpoint=None)
    return file_content


write_checkpoint = atomic_io.write_sealed  # a function of (content, file)


def read_checkpoint(file):
    """Return the content written by `write_checkpoint` or SageMaker's own container; executes nothing."""
    file.seek(-1, os.SEEK_END)
    if file.read() != b"}":  # before the rest is read: it may be of any size
        raise ValueError("it is truncated")
    file.seek(0)
    content = file.read()
    # Another program that continues from our checkpoint copies the attribute with our checksum. A file
    # without a name comes from the main process, which has checked it.
    saved = re.search(rb'"progress": {"epoch": (\d+),', content)
    name = getattr(file, "name", "")
    is_ours = not saved or str(int(saved[1]) - 1) == Path(name).suffix[1:]
    if b'"sha256": "' in content and is_ours:
        atomic_io.check_seal(content)
    elif name:
        _try_in_another_process(content)
    booster = xgb.Booster(model_file=bytearray(content))
    facts = json.loads(booster.attr("checkpoint") or "{}")  # the container's files have none
    booster.set_attr(checkpoint=None)
    learner = json.loads(booster.save_config())["learner"]
    facts["booster"] = booster
    started = dataclasses.asdict(train_state.Progress())
    started["sums"] = []
    facts["progress"] = {**started, **facts.get("progress", {}), "epoch": booster.num_boosted_rounds()}
    facts["job"] = {
        **facts.get("job", {}),
        "--objective": learner["objective"]["name"],
        "number of classes": int(learner["learner_model_param"]["num_class"]),
        "number of columns": booster.num_features(),
    }
    return facts


_TRIAL = """
import sys
sys.path[:] = {}
import engine
try:
    engine.try_booster(sys.stdin.buffer.read())
except Exception as error:
    sys.exit(engine.errors.first_line(error))
"""
_TRIAL_SECONDS = 300


def _try_in_another_process(content):
    """Raise ValueError if XGBoost fails or crashes on `content`, which has no checksum of ours.

    A damaged file can crash the process that reads it or trains with it, at every start.
    """
    paths = [str(Path(__file__).parent), *sys.path]
    command = [sys.executable, "-c", _TRIAL.format(paths)]
    try:
        trial = subprocess.run(  # noqa: S603
            command, input=content, capture_output=True, timeout=_TRIAL_SECONDS, start_new_session=True
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"XGBoost has not read it in {_TRIAL_SECONDS} seconds") from error
    except OSError as error:
        raise UserError(f"cannot start a process that tries the checkpoint: {error.strerror}") from error
    if trial.returncode == -signal.SIGKILL:
        raise MemoryError  # the kernel kills a process that needs too much memory
    if trial.returncode < 0:
        raise ValueError(f"XGBoost crashes while reading it, with {signal.Signals(-trial.returncode).name}")
    if trial.returncode:
        lines = trial.stderr.decode(errors="replace").strip().splitlines() or ["unknown"]
        if "bad_alloc" in lines[-1] and machine.available_memory() > 100 * len(content):
            raise ValueError("XGBoost asks for more memory than such a file can need")
        raise ValueError(f"XGBoost cannot use it: {lines[-1]}")


def try_booster(content):
    """Load a booster and predict with it. Raises an error, or crashes the process, if it is damaged."""
    booster = xgb.Booster(model_file=bytearray(content))
    num_columns = booster.num_features()
    gradient_booster = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]
    model = gradient_booster.get("gbtree", gradient_booster).get("model", {})  # dart nests it
    for tree in model.get("trees", []):
        _check_tree(tree, num_columns)
    names_and_types = {"feature_names": booster.feature_names, "feature_types": booster.feature_types}
    for value in (0, np.nan):
        row = np.full((1, num_columns), value, np.float32)
        booster.predict(xgb.DMatrix(row, enable_categorical=True, nthread=1, **names_and_types))


def _check_tree(tree, num_columns):
    """Raise ValueError if a tree has a missing node, a node that is reached twice, or an unknown column."""
    left, right = np.array(tree["left_children"]), np.array(tree["right_children"])
    columns = np.array(tree["split_indices"])
    nodes = np.zeros(1, int)
    num_reached = 1
    while len(nodes):
        nodes = nodes[left[nodes] != -1]  # without leaves
        if not (columns[nodes] < num_columns).all():
            raise ValueError("a tree has a column that does not exist")
        nodes = np.concatenate([left[nodes], right[nodes]])
        num_reached += len(nodes)
        if not ((nodes > 0) & (nodes < len(left))).all() or num_reached > len(left):
            raise ValueError("a tree has a branch that leads nowhere")


def describe_machine(args):
    """Return the facts that change the bits of the result, but not its quality."""
    num_threads = args.nthread
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if not num_threads and requested.isdigit():
        num_threads = int(requested)
    num_threads = num_threads or machine.num_cores()
    return {"CPU threads": num_threads, FRAMEWORK: VERSION}
