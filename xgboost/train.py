"""Train boosted trees with XGBoost, save a checkpoint after every epoch, and go on from the newest one.

Train:      python xgboost/train.py
Resume:     python xgboost/train.py                (the same command: the newest checkpoint is found)
SageMaker:  XGBoost(entry_point="train.py", source_dir="xgboost", checkpoint_s3_uri="s3://...", ...)

An epoch is one boosting round. Reads CSV, LIBSVM or Parquet files (--train, --validation); writes checkpoints
(--checkpoint-path), the trained model (--model-dir) and its metrics (--output-data-dir). `--help` lists all flags.
"""

import contextlib
import json
import os
import re
from pathlib import Path

from common import checkpoints, cluster, errors, files, flags, interruption, report, saving, script, tables
from common.progress import Progress

CHECKPOINT = "xgboost-checkpoint.{}"  # the last boosting round, counted from 0, as in SageMaker's own XGBoost container


def parse_args(argv=None):
    """Return the flags of this script."""
    return flags.xgboost_flags().parse_args(argv)


if __name__ == "__main__":
    interruption.install()
    args = parse_args()  # before the slow imports: --help and a misspelt flag answer at once

with errors.framework("XGBoost", "Install it with: pip install xgboost"):
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads give their core to others, but not at once
    import numpy as np
    import xgboost as xgb
    from xgboost.tracker import RabitTracker


def choose_device(args):
    """Return where to compute; it changes the speed, never which data or how many epochs."""
    device = "cpu"
    if args.device != "cpu" and args.num_gpus != 0:
        with xgb.config_context(verbosity=0):  # XGBoost falls back to the CPU where it finds no GPU
            probe = xgb.train({"device": "cuda"}, xgb.DMatrix(np.zeros((2, 1)), np.arange(2)), 1)
        device = json.loads(probe.save_config())["learner"]["generic_param"]["device"].split(":")[0]
    errors.check_device(args, "XGBoost", device == "cuda")
    in_memory = not args.external_memory and (args.tree_method == "approx" or cluster.size == 1)
    if args.tree_method not in ("auto", "hist") and not in_memory:
        raise errors.UserError(f"--tree-method {args.tree_method} needs all rows in one memory here: use hist")
    report.log(f"Device: {device}")
    return device


def connect_workers():
    """Let XGBoost's own engine compute with the rows of all workers until what this returns is closed."""
    stack = contextlib.ExitStack()
    if cluster.size > 1:
        tracker = RabitTracker(cluster.size, cluster.leader_address, sortby="task") if cluster.leads() else None
        if tracker:
            tracker.start()
            stack.callback(tracker.wait_for)
        address = cluster.gather(tracker and tracker.worker_args())[0]
        # Its ranks follow the order of the names. Its patience is a week: cluster.py watches over the others.
        names = {"dmlc_task_id": f"{cluster.rank:06d}", "dmlc_timeout": 7 * 24 * 3600}
        stack.enter_context(xgb.collective.CommunicatorContext(**address, **names))
    return stack


# ---------------------------------------------------------------------------------------------------------------------
# Data and model: replace the bodies of these two functions with your own. Nothing else knows what is trained.
# ---------------------------------------------------------------------------------------------------------------------


def load_data(args):
    """Return a `tables.Dataset`: float32 or sparse features (n, columns) and float32 labels (n,)."""
    return tables.load_tables(args)


def build_model(args, data):
    """Return XGBoost's parameters; objective, number of classes and metrics follow from the labels where not given."""
    names = "booster tree_method eta gamma max_depth max_leaves max_bin grow_policy min_child_weight max_delta_step"
    names += " subsample colsample_bytree colsample_bylevel colsample_bynode lambda alpha nthread seed"
    names += " rate_drop skip_drop" if args.booster == "dart" else ""
    model = {name: getattr(args, name) for name in names.split()}
    model["seed_per_iteration"] = True  # row and column samples are a function of (seed, round)

    classes = np.unique(np.concatenate([data.train.labels, data.validation.labels]))
    if len(classes) < 2:
        raise errors.UserError(f"--train {args.train} has one label only ({classes[0]:g}): expected two or more")
    is_classification = len(classes) <= 100 and np.array_equal(classes, np.arange(len(classes)))
    chosen = "reg:squarederror"
    if is_classification or args.num_class:
        chosen = "binary:logistic" if (args.num_class or len(classes)) == 2 else "multi:softprob"
    model["objective"] = (args.objective or chosen).replace("reg:linear", "reg:squarederror")  # its earlier name
    kind = model["objective"].split(":")[0]
    num_classes = (args.num_class or int(classes[-1]) + 1) if kind == "multi" else 2
    if kind in ("multi", "binary") and not np.isin(classes, np.arange(num_classes)).all():
        raise errors.UserError(
            f"objective {model['objective']} expects the labels 0 to {num_classes - 1}, but there are {len(classes)} "
            f"from {classes[0]:g} to {classes[-1]:g}: number them from 0, or pass another --objective or --num-class"
        )
    if kind == "rank":
        raise errors.UserError(f"--objective {args.objective} needs query groups, which this script does not read")
    if args.keep_best and args.booster == "dart":
        raise errors.UserError("--keep-best: with --booster dart later rounds change earlier trees; use one of the two")
    if kind == "multi":
        model["num_class"] = num_classes
    if kind == "binary":
        model["scale_pos_weight"] = args.scale_pos_weight
    wanted = args.eval_metric or {"multi": "mlogloss,merror", "binary": "logloss,error", "reg": "rmse"}.get(kind, "")
    model["eval_metric"] = [metric.strip() for metric in wanted.split(",") if metric.strip()]
    described = " ".join(f"{key}={model[key]}" for key in ("objective", "num_class", "eval_metric") if key in model)
    report.log(f"Labels: {len(classes)} values from {classes[0]:g} to {classes[-1]:g}; {described}")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one file holds the whole training state, the trees. Row and column samples are functions of
# (seed, round) and need no place in it.
# ---------------------------------------------------------------------------------------------------------------------


def describe_run(args, data, model):
    """Return what the next run compares itself with."""
    return checkpoints.describe_run(args, data.describe_job(args, model), xgb, args.nthread)


def save_checkpoint(args, data, model, booster, progress):
    """Copy the training state and write it in the background, unless its file is there; return the file's name."""
    path = args.checkpoint_path / CHECKPOINT.format(progress.epoch - 1)
    described = progress.describe()  # by all workers
    if saving.is_wanted(path):
        checkpoint = {
            "progress": described,  # beside the trees, the objective and its parameters
            **describe_run(args, data, model),
            "sha256": files.NO_CHECKSUM,  # because a damaged file can crash XGBoost while it is read
        }
        booster.set_attr(checkpoint=json.dumps(checkpoint))
        content = booster.save_raw("ubj")
        best = progress.best_epoch() - 1
        checkpoints.write(args, CHECKPOINT, path, best, lambda file: file.write(files.seal(content)))
    return path.name


def load_checkpoint(args, data, model):
    """Return the booster of the newest checkpoint and its Progress: None and that of a fresh start without one."""
    found = checkpoints.read_newest_checkpoint(args.checkpoint_path, CHECKPOINT, read_checkpoint)
    if found is None:
        return None, Progress()
    path, (booster, checkpoint) = found
    learner = json.loads(booster.save_config())["learner"]
    checkpoint["job"]["--objective"] = learner["objective"]["name"]
    checkpoint["job"]["number of classes"] = int(learner["learner_model_param"]["num_class"])
    checkpoint["job"]["number of columns"] = booster.num_features()
    run = describe_run(args, data, model)
    run["job"] = {key: value for key, value in run["job"].items() if key in checkpoint["job"]}
    checkpoints.check_same_job(args, path, checkpoint, run)
    sampling = min(args.subsample, args.colsample_bytree, args.colsample_bylevel, args.colsample_bynode) < 1
    if (sampling or args.booster == "dart") and tuple(map(int, xgb.__version__.split(".")[:2])) < (3, 4):
        report.log("Warning: before XGBoost 3.4 row and column samples and dropped trees are others after a restart")
    return booster, Progress.restore({**checkpoint["progress"], "epoch": booster.num_boosted_rounds()})


def read_checkpoint(file):
    """Return what `save_checkpoint` or SageMaker's own container has written: the booster, and the dictionary."""
    content = file.read()
    epoch = re.search(rb'"progress": {"epoch": (\d+),', content)
    continued = epoch and int(epoch[1]) != int(file.name.split(".")[-1]) + 1  # by a program that copied our attribute
    if b'"sha256": "' in content and not continued:
        files.check_seal(content)
    if not content.endswith(b"}"):
        raise ValueError("the file is cut off")
    booster = xgb.Booster(model_file=bytearray(content))
    if CHECKPOINT.format(booster.num_boosted_rounds() - 1) != Path(file.name).name:
        raise ValueError(f"it holds {booster.num_boosted_rounds()} rounds, which its name denies")
    # The container's files have only what XGBoost itself has written.
    checkpoint = json.loads(booster.attr("checkpoint") or "{}")
    return booster, {key: checkpoint.get(key, {}) for key in ("progress", "job", "machine", "flags")}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Rounds(xgb.callback.TrainingCallback):
    """Logs each boosting round, saves a checkpoint after it, and obeys a signal."""

    def __init__(self, args, data, model, progress):
        self.args, self.data, self.model, self.progress = args, data, model, progress

    def before_iteration(self, model, epoch, evals_log):
        self.progress.start_clock()

    def after_iteration(self, model, epoch, evals_log):
        args, progress = self.args, self.progress
        progress.samples = len(self.data.train.labels)
        progress.stop_clock()
        progress.finish_epoch(evaluate(evals_log["train"]), evaluate(evals_log["validation"]))
        every_round = not (args.checkpoint_steps or args.checkpoint_seconds)
        due = saving.is_affordable() if every_round else progress.save_is_due(args, progress.epoch)
        if due or progress.epoch == args.epochs:
            save_checkpoint(args, self.data, self.model, model, progress)
        try:
            interruption.check()
        except interruption.Interrupted:
            return True  # this ends the training


def train(args, data, model, device):
    """Train up to `--num-round` in total and return the booster and the Progress; a signal ends it after a round."""
    booster, progress = load_checkpoint(args, data, model)
    report.log_start(progress, args.epochs)
    if progress.epoch >= args.epochs:
        interruption.defer()
        return booster, progress
    try:
        connection = connect_workers()
        training, validation = build_matrices(args, data)
        options = {"evals": [(training, "train"), (validation, "validation")], "verbose_eval": False}
        options.update(callbacks=[Rounds(args, data, model, progress)], num_boost_round=args.epochs - progress.epoch)
        interruption.defer()
        booster = xgb.train({**model, "device": device}, training, xgb_model=booster, **options)
        connection.close()  # not after an error: it waits for all workers
        interruption.check()
    except interruption.Interrupted as interrupted:
        interrupted.saved = save_checkpoint(args, data, model, booster, progress)
        raise
    except xgb.core.XGBoostError as error:
        cluster.end_if_another_failed()
        reason = re.sub(r"^\[.*?\] \S+: ", "", str(error).splitlines()[0])  # without the place in XGBoost's source
        chosen = f"--objective {model['objective']} --eval-metric {','.join(model['eval_metric'])}"
        raise errors.UserError(f"XGBoost cannot train with {chosen} and this data: {reason}") from error
    return booster, progress


class Batches(xgb.DataIter):
    """Gives XGBoost a table part by part; what XGBoost makes of parts on the disk goes there too."""

    def __init__(self, table):
        super().__init__(cache_prefix=getattr(table.features, "cache", None))
        self.table = table

    def reset(self):
        self.parts = self.table.parts()

    def next(self, input_data):
        for features, labels in self.parts:
            input_data(data=features, label=labels)
            return True
        return False


def build_matrices(args, data):
    """Return what XGBoost makes of this worker's training and validation rows."""
    train, validation = shares = data.shares()
    options = {"nthread": args.nthread or None}
    if args.tree_method not in ("auto", "hist"):
        return [xgb.DMatrix(*table, **options) for table in shares]
    matrix = xgb.ExtMemQuantileDMatrix if args.external_memory else xgb.QuantileDMatrix
    training = matrix(Batches(train), max_bin=args.max_bin, **options)
    return training, matrix(Batches(validation), max_bin=args.max_bin, ref=training, **options)


def evaluate(metrics):
    """Return the newest value of each of XGBoost's metrics, under the names that all the scripts use."""
    names = {"logloss": "loss", "mlogloss": "loss", "error": "accuracy", "merror": "accuracy"}
    newest = {names.get(name, name): values[-1] for name, values in metrics.items()}
    return {name: 1 - value if name == "accuracy" else value for name, value in newest.items()}


def export_model(args, booster, progress):
    """Write `xgboost-model`, for SageMaker's XGBoost serving container."""
    if args.keep_best:
        booster = booster[: progress.best_epoch() or progress.epoch]
    booster.set_attr(checkpoint=None)  # times are not part of the model
    with files.atomic_write(args.model_dir / "xgboost-model") as file:
        file.write(booster.save_raw("ubj"))
    report.log(f"Model: {args.model_dir / 'xgboost-model'}")


def main(args):
    """Train and write the model and its metrics."""
    cluster.join(args)
    files.prepare_folders(args)
    checkpoints.prepare_folder(args.checkpoint_path, CHECKPOINT)
    device = choose_device(args)
    data = load_data(args)
    cluster.check_same({"device": device, **data.describe_content()})
    model = build_model(args, data)
    booster, progress = train(args, data, model, device)
    saving.wait()
    if cluster.leads():
        export_model(args, booster, progress)
        report.write_results(args, progress)


if __name__ == "__main__":
    script.run(main, args)
