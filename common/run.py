"""Run a training, from the flags and the newest checkpoint to the model and the exit code.

`train.py` uses `start`, `Run` and `execute`. This module is independent of the framework: it calls
`engine.py`, beside the script, through `Run`.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn

import numpy as np

from common import (
    async_save,
    batches,
    checkpoints,
    datasets,
    distributed,
    dry_run,
    history,
    model_folder,
    pictures,
    preemption,
    report,
    self_check,
    tables,
    tracking,
    train_state,
)
from common.atomic_io import atomic_export, prepare_folder, remove_export, temporary_folder
from common.errors import (
    DataError,
    UserError,
    fail,
    first_line,
    is_out_of_memory,
    is_terminal,
    say,
    write_failure_reason,
)
from common.preemption import Interrupted
from common.report import log

FREE_ROUNDS = 100  # the first boosting rounds, whose checkpoints are small, are saved one by one
_notice = threading.Timer(1, say, ["Importing the framework ..."])  # seconds
_notice.daemon = True


def start(parse_args: Callable[[], Namespace]) -> Namespace:
    """Take over the signals that end a training, and return the flags; call this before slow imports."""
    preemption.take_over(preemption.exit_at_once)
    args = parse_args()
    signal.setitimer(signal.ITIMER_REAL, args.stop_after)
    if is_terminal(sys.stdout) and os.environ.get("RANK", "0") == "0":
        _notice.start()
    return args


def execute(main: Callable[[Namespace], Any], args: Namespace) -> None:
    """Call `main(args)`; exit with one line and code 1 after a user's error, 143 or 130 after a signal."""
    try:
        main(args)
    except Interrupted as interrupted:
        preemption.print_safely(str(interrupted))
        write_failure_reason(str(interrupted))
        sys.exit(interrupted.exit_code)
    except Exception as error:
        report_error(error)


def report_error(error: BaseException) -> NoReturn:
    """Exit with code 1 and one line for an error that a user can correct, or a traceback for a bug."""
    if isinstance(error, ImportError):
        fail(f"{error}. Install it with: pip install {error.name}")
    if isinstance(error, (UserError, OSError)):
        fail(error)
    if is_out_of_memory(error):
        fail(f"not enough memory: {first_line(error)}. Lower --batch-size, or use a larger machine")
    write_failure_reason(f"{type(error).__name__}: {error}")
    traceback.print_exception(type(error), error, error.__traceback__)
    sys.exit(1)


class Run:
    """A training: workers, signals, data, checkpoints, progress and log. Use it in a `with` statement.

    Args:
        args: the flags.
        engine: the module `engine` of the framework.

    Attributes:
        device: the result of `engine.start`.
        data: the result of `load_data`.
        progress: see `common/train_state.py`.
    """

    def __init__(self, args: Namespace, engine: Any) -> None:
        self.args = args
        self.engine = engine
        self.data: Any = None
        self.state: Any = None
        self.job: dict[str, Any] = {}
        self._data_facts: dict[str, Any] = {}
        self._dry_run = dry_run.DryRun(args, engine.CHECKPOINT) if args.dry_run else None
        self._export_facts = model_folder.describe_flags(args)  # also in each checkpoint
        self._description: dict[str, Any] = {}  # plain values that the next run is compared with
        self.progress = train_state.Progress()
        self.workers = distributed.Workers()
        self.signals = preemption.SignalHandlers(self._end_early)
        seconds = args.checkpoint_seconds
        if seconds is None and args.checkpoint_steps and hasattr(engine, "MIN_SAVE_SECONDS"):
            seconds = 0  # the other scripts also save after each epoch
        self.saver = async_save.AsyncSaver(seconds, getattr(engine, "MIN_SAVE_SECONDS", 20))
        self.checkpoints: Any = None
        self._newest: Any = None  # (name, content) of the newest checkpoint between `load_data` and `restore`
        self.steps_per_epoch = 0
        self.resumed: list[float] = []  # the places where runs resumed, in epochs; also in each checkpoint
        self._trackers: list[Any] = []
        self._exits = contextlib.ExitStack()
        self._started = time.monotonic()
        self._initial_epoch = 0
        self._has_stopped = False
        self._is_exported = False
        self._has_checked_augment = False
        self._has_checked_attributes = False
        self._attributes: Any = None
        self._is_validating = False
        self._validation_sums: dict[str, Any] = {}
        self._best_name: str | None = None
        self._best: Any = None  # a train_state.BestEpoch
        self._bar = report.ProgressBar(args.epochs, False)
        self._clock = self._last_save = time.monotonic()
        self._saves_by_time = False
        self._has_logged_interval = not self.saver.is_automatic

    # Start and end ------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        """Join the other workers, take over the signals, prepare the folders and start the engine."""
        args = self.args
        if args.best_metric:
            self._best_name, _ = train_state.parse_metric(args.best_metric, "--best-metric")
        self.signals.install()
        _notice.cancel()
        try:
            self.workers = distributed.join(args)
            self._exits.callback(report.start_logging(self.is_main_process))
            self.checkpoints = checkpoints.Checkpoints(args, self.engine, self.workers)
            self._bar = report.ProgressBar(args.epochs, self.is_main_process)
            is_alone = self.workers.size == 1
            self._read_newest = self.checkpoints.read_newest if is_alone else self.checkpoints.share_newest
            if self.is_main_process:
                prepare_folder(args.checkpoint_path, "--checkpoint-path")
                self._prepare_folders()
                self.checkpoints.open()
                remove_export(args.model_dir)
            self.device = self.engine.start(args, self.workers)
            self.signals.install()  # again: a framework may have taken them over
            machine = {"number of workers": self.workers.size, **self.engine.describe_machine(args)}
            flags = distributed.flag_values(args)
            self._description = {
                "job": self.job,
                "data": self._data_facts,
                "machine": machine,
                "flags": flags,
                "code": model_folder.describe_script(self.engine.__file__),
            }
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for the last save and the other workers; restore the state of this process."""
        try:
            if error is None:
                self.saver.wait()
                if not self._is_exported:  # otherwise all files are written, and a signal comes too late
                    self._check_signals()
                self.workers.leave()
                self._finish()
            elif isinstance(error, Interrupted):
                self.workers.leave()
            elif self.workers.size > 1:
                self._fail_together(error)
            elif isinstance(error, DataError) and self.progress.step:  # between two steps
                log(f"Saved {self.save()}")
                self.saver.wait()
        finally:
            self._bar.close()
            for tracker in self._trackers:
                tracker.close("KILLED" if isinstance(error, Interrupted) else "FAILED", tracking.SOON)
            self.saver.close()
            if self.checkpoints:
                self.checkpoints.close()
            self._exits.close()
            if self._dry_run:
                self._dry_run.close()
            self.signals.restore()

    def _prepare_folders(self):
        prepare_folder(self.args.model_dir, "--model-dir")
        prepare_folder(self.args.output_data_dir, "--output-data-dir")

    def _finish(self):
        """Complete the tracking and draw the pictures. Signals are ignored: the results are written."""
        self.signals.restore()
        while self._trackers:
            self._trackers.pop().close("FINISHED", tracking.LAST_SECONDS)
        if self._is_exported and self.is_main_process:
            pictures.draw(self)

    def _fail_together(self, error):
        """End this process and the other workers: the engine's threads may be waiting for them for ever."""
        is_known = isinstance(error, UserError)
        if not is_known:
            self.workers.end_if_another_failed()
        self.workers.fail(str(error) if is_known else f"{type(error).__name__}: {error}")
        try:
            report_error(error)
        finally:
            os._exit(1)

    def _end_early(self, number, frame):
        """Handle a signal before there is anything to save."""
        if self.workers.size > 1:
            interrupted = Interrupted(number)
            preemption.print_safely(str(interrupted))
            self.workers.stop(interrupted.exit_code, str(interrupted))
        else:
            self.signals.pass_on(number, frame)

    @property
    def is_main_process(self) -> bool:
        """Whether this worker writes the log, the checkpoints, the model and the metrics."""
        return self.workers.is_main_process

    # Data ---------------------------------------------------------------------------------------------------

    def load_data(self, data_sets: tuple[Any, Any]) -> datasets.Data:
        """Return the `common.datasets.Data` of the data sets (training, validation)."""
        try:
            train, validation = data_sets
        except (TypeError, ValueError) as error:
            raise UserError("load_data must return two data sets, for training and validation") from error
        if hasattr(self.engine, "wrap_data_sets"):  # the framework has data sets of batches
            train, validation = self.engine.wrap_data_sets(train, validation)
        if self._dry_run:
            for name, dataset in (("training", train), ("validation", validation)):
                self._dry_run.check(name, dataset, self._read_samples)
                log(f"Dry run: {len(dataset)} {name} {getattr(dataset, 'unit', 'samples')}")
            train, validation = self._dry_run.shorten(train, validation)
        self.data = datasets.describe(train, validation, self._read_samples, self._saved_statistics())
        for name, dataset in (("training", train), ("validation", validation)):
            if not hasattr(dataset, "batches"):
                batches.check_sizes(len(dataset), self.args, self.workers)
            if not isinstance(dataset, datasets.ArrayDataset):
                if not self._dry_run:
                    log(f"Data: {len(dataset)} {name} {getattr(dataset, 'unit', 'samples')}")
                self_check.check_data_set(name, dataset, self._read_samples)
        for flag in ("model", "batch_size", "seed"):
            self.job[f"--{flag.replace('_', '-')}"] = getattr(self.args, flag)
        self.job[f"number of training {getattr(train, 'unit', 'samples')}"] = len(train)
        self.job["sample shape"] = list(self.data.sample_shape)
        self.job["classes"] = self.data.classes
        for name, dataset in (("training", train), ("validation", validation)):
            for key, value in datasets.fingerprint(dataset, self._read_samples).items():
                self._data_facts[f"{key} ({name} data)"] = value
        self._export_facts.update(model_folder.describe_data(self.data))
        self._check_job()
        return self.data

    def _saved_statistics(self):
        """Return mean and standard deviation of the channels from the newest checkpoint, or None.

        The weights were trained with them, and computing them again would take seconds.
        """
        self._newest = self._read_newest()
        if self._newest is None:
            return None
        facts = self._newest[1].get("export", {})
        if facts.get("mean") is None:
            return None
        return np.array(facts["mean"], np.float32), np.array(facts["std"], np.float32)

    def load_tables(self, data_sets: tuple[Any, Any]) -> tables.Tables:
        """Return the tables (training, validation) as `common.tables.Tables`."""
        self._newest = self._read_newest()  # damaged ones are logged before the rows are counted
        self.data = tables.describe(*data_sets)
        for flag in ("booster", "seed"):
            self.job[f"--{flag}"] = getattr(self.args, flag)
        self.job.update(self.data.describe_job())
        self._data_facts.update(self.data.fingerprint())
        self._check_job()
        num_rows, num_columns = self.data.train.features.shape
        rows = f"{num_rows} training and {len(self.data.validation.labels)} validation rows"
        shards = self.workers.describe_shards(num_rows, "training rows")
        log(f"Data: {rows} of {num_columns} columns{shards}")
        return self.data

    def _check_job(self):
        """Raise UserError if the workers have different data, or `--model-dir` the model of another job."""
        self.workers.check_same({**self.job, **self._data_facts})
        if self.workers.is_main_process and not self.args.resume_anyway:
            origin = model_folder.describe_origin(self.args, self.job)
            folder = self.args.model_dir
            model_folder.check_same_job(folder, self._model_facts_path(folder), origin)

    def _read_samples(self, dataset, indices):
        return batches.read_samples(dataset, indices, self.engine, (self.args.seed,))

    # Checkpoints --------------------------------------------------------------------------------------------

    def restore(self, state: Any) -> int:
        """Load the newest checkpoint into the training state; return the number of finished epochs.

        If `--patience` or a callback has ended the training, nothing is left to train: return `--epochs`.

        Args:
            state: has `state_dict()`, a dictionary of everything that training changes,
                `load_state_dict(content)`, `job`, a dictionary of plain values that identify a job, and
                `load_weights(path)`. It may have `settings`, compared like the flags with the same names.
        """
        args = self.args
        self.state = state
        self.job.update(state.job)
        self._description["flags"].update(getattr(state, "settings", {}))
        found = self._newest or self._read_newest()
        self._newest = None
        if found:
            name, content = found
            self.checkpoints.check_same_job(name, content, self._description)
            log(f"Resuming training from {name}")
            try:
                state.load_state_dict(content)
            except Exception as error:  # each framework has its own errors for weights of another shape
                raise checkpoints.misfit(self.checkpoints.folder / name, error) from error
            progress = train_state.Progress(**content["progress"])
            if len(progress.sums) == self.workers.size:
                progress.sums = progress.sums[self.workers.rank]
            else:  # another number of workers: the main process takes the totals
                total = train_state.add_up(progress.sums or [{}])
                progress.sums = total if self.workers.is_main_process else {}
            for name, pair in progress.sums.items():
                progress.sums[name] = tuple(map(self.engine.to_device, pair))
            if len(progress.history) >= history.BLOCK:  # otherwise it is complete
                progress.history = self.checkpoints.merge_history(progress.history)
            self.progress = progress
            self.resumed = [*content.get("resumed", []), pictures.position(progress, self.data)]
        elif getattr(args, "weights", None):
            state.load_weights(args.weights)
        epoch, step = self.progress.epoch, self.progress.step
        self._initial_epoch = epoch
        if epoch >= args.epochs and step:
            raise UserError(
                f"{found[0]} is {step} steps into epoch {epoch + 1}, beyond --epochs {args.epochs}: "
                "raise --epochs, or export an earlier checkpoint with python -m common.export"
            )
        if epoch >= args.epochs:
            self._export_facts = found[1].get("export", self._export_facts)  # the flags of the training
            log(f"Nothing left to train: epoch {epoch} is finished, and --epochs is {args.epochs}")
        elif (args.patience or self.progress.stopped) and self.should_stop():
            epoch = args.epochs
        else:
            log(f"Starting training from epoch: {epoch + 1}" + (f", step: {step + 1}" if step else ""))
        if epoch >= args.epochs:
            self.defer_signals()  # the export is next, and a signal does not interrupt it
        if self.is_main_process and not self._dry_run:
            self._trackers = tracking.start(args, self.progress.history)
        self._last_save = self._clock = time.monotonic()
        return epoch

    def load_checkpoint(self, content: dict[str, Any], training_state: Callable[..., Any]) -> None:
        """Set the training state to the content of a checkpoint, to export its model without any data.

        Args:
            content: the checkpoint as read by the engine.
            training_state: the class in `train.py`.
        """
        self.device = self.engine.start(self.args, self.workers)
        self.job, self._data_facts = content["job"], content.get("data", {})
        if "export" in content:
            self._export_facts = content["export"]
        if "sample_shape" in self._export_facts:
            self.data = model_folder.restore_data(self._export_facts)
        self.state = training_state(self.args, self, self.data)
        self.state.load_state_dict(content)
        progress = {**content["progress"], "sums": {}}
        self.progress = train_state.Progress(**progress)

    def save(self) -> str:
        """Copy the training state and write it in the background; return the name of the checkpoint.

        This is a collective call: every worker must reach it.
        """
        began = time.monotonic()
        progress = vars(self.progress).copy()
        sums = self.progress.sums
        if self.workers.size > 1 and hasattr(self.state, "metric_sums"):  # the framework adds them up itself
            sums = self.state.metric_sums()
        if sums:
            sums = train_state.plain_sums(sums)
        progress["sums"] = self.workers.all_gather(sums) if self.workers.size > 1 else [sums]
        name = self.checkpoints.name_of(self.progress.epoch, self.progress.step)
        if self.saver.in_flight:
            self.saver.wait()
        best = self._best_row() if self.args.best_metric or self.args.patience else None
        progress["history"] = list(self.progress.history)
        if len(self.progress.history) >= history.BLOCK:  # otherwise the checkpoint contains all of it
            progress["history"] = self.checkpoints.history.split(self.progress.history, best)
        path = self.checkpoints.folder / name
        is_saved = path.is_file() and not path.is_symlink()
        if self.workers.is_main_process and not is_saved:
            content = {**self.state.state_dict(), "progress": progress, **self._description}
            content["export"], content["resumed"] = self._export_facts, self.resumed
            content = self.engine.copy_to_host(content, self.saver.memory)
            kept = best["epoch"] if best and self.args.best_metric else None
            place = f"epoch {self.progress.epoch}"
            if self.progress.step:
                place = f"epoch {self.progress.epoch + 1}, step {self.progress.step}"
            write = self.checkpoints.write
            self.saver.in_flight = self.saver.thread.submit(write, name, content, kept, (self.state, place))
            self.saver.stall = time.monotonic() - began
        self._last_save = time.monotonic()
        return name

    def _finish_save(self):
        """Raise the error of a save that has failed; log what saves cost, once."""
        self.saver.wait()
        self.checkpoints.check_room()
        if self._saves_by_time and not self._has_logged_interval:
            self._has_logged_interval = True
            stall, size = 1000 * self.saver.stall, self.saver.size / 1e6
            cost = f"a save stops the training for {stall:.1f} ms and writes {size:.1f} MB"
            log(f"Saving every {self.saver.interval:.0f} seconds: {cost}")

    def _refuse_metric(self, metrics):
        names = ", ".join(metrics)
        raise UserError(f"--best-metric {self.args.best_metric}: expected one of the metrics {names}")

    def _best_row(self):
        """Return the best epoch's row of the history; None before the first epoch."""
        if not self.progress.history:
            return None
        metric = self._metric()
        if not self._best or self._best.metric != metric:
            self._best = train_state.BestEpoch(*metric)
        return self._best.find(self.progress.history)

    def _metric(self):
        """Return (name, sign) of the metric that decides; by default the loss, or else the last one."""
        if self.args.best_metric:
            return train_state.parse_metric(self.args.best_metric, "--best-metric")
        names = [key for key in self.progress.history[-1] if key.startswith("validation_")]
        name = "validation_loss" if "validation_loss" in names else names[-1]
        return train_state.parse_metric(name, "--patience")

    # Training -----------------------------------------------------------------------------------------------

    def training_batches(
        self, epoch: int, augment: Callable[..., Any] | None = None
    ) -> Iterator[batches.Batch]:
        """Return an iterator over the remaining batches of an epoch, counted from 0, see `batches.Batch`.

        Args:
            epoch: the number of finished epochs.
            augment: a function (images, labels, rng) that returns new images and labels; used with
                `--augment`.
        """
        loader = self.training_loader(epoch, augment)
        self.start_epoch(len(loader.sizes))
        return self._load(loader, range(self.progress.step, self.steps_per_epoch))

    def validation_batches(self) -> Iterator[batches.Batch]:
        """Return an iterator over the batches of all validation samples in order, each sample once."""
        loader = batches.BatchLoader(self.args, self.data.validation, self.workers, self.engine)
        self._is_validating = True
        self._validation_sums = {}
        return self._load(loader, range(len(loader.sizes)))

    def training_loader(self, epoch: int, augment: Callable[..., Any] | None = None) -> batches.BatchLoader:
        """Return the BatchLoader of an epoch."""
        loader = batches.BatchLoader(self.args, self.data.train, self.workers, self.engine, epoch)
        if self.args.augment:
            loader.augment = augment
            self._check_augment(loader)
        self._batch_sizes = loader.sizes
        return loader

    def _check_augment(self, loader):
        if not self._has_checked_augment:
            images, labels, _ = self._read_samples(loader.dataset, loader.indices[0])
            self_check.check_augment(loader.augment, images, labels, loader.generator)
        self._has_checked_augment = True

    def _load(self, loader, steps):
        is_ours = isinstance(loader.dataset, datasets.ArrayDataset)
        if self.args.loaders and not is_ours and hasattr(self.engine, "load_with_processes"):
            if self.saver.in_flight:
                self._finish_save()  # processes forked while its thread holds a lock would wait forever
            loaded = self.engine.load_with_processes(loader, steps, self.args.loaders)
        else:
            is_waiting = is_ours and not loader.dataset.is_in_memory
            loaded = batches.load_ahead(loader, steps, self.args.loaders or int(is_waiting))
        return loaded

    def start_epoch(self, steps_per_epoch: int) -> None:
        """Start the clock and the progress bar of an epoch."""
        self.defer_signals()
        progress = self.progress
        self.steps_per_epoch = steps_per_epoch
        self._is_validating = False
        self._bar.start_epoch(progress.epoch, progress.step, steps_per_epoch)
        self._clock = time.monotonic()

    def start_rounds(self) -> None:
        """Start the clock of the first boosting round."""
        self.defer_signals()
        self._clock = time.monotonic()

    def defer_signals(self) -> None:
        """Let signals end the training between two steps only, with a checkpoint.

        This is a collective call: every worker must reach it.
        """
        if self.signals.deferred:
            return
        if self.workers.size > 1:
            self.workers.all_gather(None)  # all workers start together
        self.signals.deferred = True

    def finish_step(self, metrics: dict[str, tuple[Any, Any]], num_samples: int | None = None) -> None:
        """Count a step: add up its metrics, show progress, save if due, end after a signal.

        Args:
            metrics: pairs (numerator, denominator) of sums over this worker's samples, by name; arrays on a
                device are fine, as they are not read before the end of the epoch.
            num_samples: of all workers in this step; default: the size of the BatchLoader's batch.
        """
        if self._is_validating:
            self.finish_validation_step(metrics)
            return
        args, progress = self.args, self.progress
        if num_samples is None:
            num_samples = self._batch_sizes[progress.step]
        progress.samples += num_samples
        progress.step += 1
        for name, (numerator, denominator) in metrics.items():
            total = progress.sums.get(name, (0.0, 0.0))
            progress.sums[name] = total[0] + numerator, total[1] + denominator
        if args.best_metric and metrics and self._best_name not in metrics:
            self._refuse_metric(metrics)
        if not self._has_checked_attributes:
            self._check_attributes()
        now = time.monotonic()
        progress.seconds += now - self._clock
        self._clock = now
        if self._bar:
            self._bar.update(self._read_metrics)
        elif args.log_steps and progress.step % args.log_steps == 0:
            log(f"step={progress.step}/{self.steps_per_epoch} epoch={progress.epoch + 1}")
        due = now - self._last_save >= self.saver.interval
        if args.checkpoint_steps and progress.step % args.checkpoint_steps == 0:
            due = True
        if self.saver.in_flight and self.saver.in_flight.done():
            self._finish_save()
        if self.signals.received or self.workers.size > 1:
            due = self._check_signals(due, save=True)
        if due and progress.step < self.steps_per_epoch:
            self.save()
            self._saves_by_time = True

    def _read_metrics(self):
        """Return the metrics of this worker's part of the running epoch."""
        if hasattr(self.state, "read_metrics"):  # the framework adds them up itself
            return self.state.read_metrics()
        return train_state.mean_metrics(train_state.plain_sums(self.progress.sums))

    def _check_attributes(self):
        """Log a warning, after the second step, for changed attributes that no checkpoint contains."""
        if self._attributes is None:
            self._attributes = self_check.Attributes(self.state, self._owners_of_attributes)
        self._has_checked_attributes = self._attributes.compare()

    def _owners_of_attributes(self):
        owners = {
            "a variable of train.py": type(self.state).state_dict.__globals__,
            "an attribute of TrainingState": self_check.own_attributes(self.state),
        }
        if hasattr(self.state, "attributes"):
            owners.update(self.state.attributes())
        return owners

    def finish_validation_step(self, metrics: dict[str, tuple[Any, Any]]) -> None:
        """Add up the metrics of a validation step; end the training after a signal."""
        for name, (numerator, denominator) in metrics.items():
            total = self._validation_sums.get(name, (0.0, 0.0))
            self._validation_sums[name] = total[0] + numerator, total[1] + denominator
        if self.signals.received or self.workers.size > 1:
            self._check_signals(save=True)

    def finish_epoch(self, metrics: dict[str, float] | None = None, validation_metrics: Any = None) -> bool:
        """Finish an epoch: save its checkpoint, log its line, return whether `--patience` ends the training.

        Args:
            metrics, validation_metrics: by name; default: the means of the sums of `finish_step` and
                `finish_validation_step`.
        """
        if metrics is None:
            metrics = self._mean_metrics(self.progress.sums)
            validation_metrics = self._mean_metrics(self._validation_sums)
        self._bar.close()
        row = self.progress.finish_epoch(metrics, validation_metrics)
        self.save()
        self._log_epoch(row)
        return self.should_stop()

    def finish_round(
        self, metrics: dict[str, float], validation_metrics: dict[str, float], samples: int
    ) -> bool:
        """Finish a boosting round; return whether `--patience` ends the training. End it after a signal.

        A round is an epoch of milliseconds; a long training does not save a checkpoint in every round.

        Args:
            metrics, validation_metrics: by name.
            samples: the number of rows of all workers.
        """
        args, progress = self.args, self.progress
        now = time.monotonic()
        progress.seconds, progress.samples = now - self._clock, samples
        row = progress.finish_epoch(metrics, validation_metrics)
        self._log_epoch(row)
        if not self._has_checked_attributes:
            self._check_attributes()
        stop = self.should_stop()
        due = now - self._last_save >= self.saver.interval
        if args.checkpoint_steps and progress.epoch % args.checkpoint_steps == 0:
            due = True
        if self.saver.is_automatic and progress.epoch <= FREE_ROUNDS:
            due = True
        if self.saver.in_flight and self.saver.in_flight.done():
            self._finish_save()
        if self.workers.size > 1:
            due, stop = self.workers.all_gather([bool(due), stop])[0]
        if due or stop or progress.epoch == args.epochs:
            self.save()
            self._saves_by_time = progress.epoch > FREE_ROUNDS
        if self.signals.received or self.workers.size > 1:
            self._check_signals(save=True)
        self._clock = time.monotonic()
        return stop

    def _log_epoch(self, row):
        if not self._dry_run:  # its metrics mean nothing
            log(report.epoch_line(row))
        for tracker in self._trackers:
            tracker.add(row)
        losses = [row.get("train_loss", 0.0) for row in self.progress.history[-2:]]
        if len(losses) == 2 and not any(map(math.isfinite, losses)):
            raise UserError(
                f"the training loss of epochs {row['epoch'] - 1} and {row['epoch']} is not finite, but the "
                "weights are. Try a lower --learning-rate or --precision fp32, and look for divisions and "
                "logarithms of zero in the loss"
            )

    def should_stop(self) -> bool:
        """Return whether the training ends before `--epochs`; this depends only on saved state.

        A callback has ended it, or `--patience` epochs have brought no better metric.
        """
        if self.progress.stopped:
            if not self._has_stopped:
                log(f"Stopping early: a callback has ended the training after epoch {self.progress.epoch}")
            self._has_stopped = True
            return True
        if not self.args.patience or not self.progress.history:
            return False
        best = self._best_row()["epoch"]
        if self.progress.epoch - best < self.args.patience:
            return False
        if not self._has_stopped:
            name, _ = self._metric()
            patience = f"--patience {self.args.patience}"
            log(f"Stopping early: no better validation_{name} since epoch {best} ({patience})")
        self._has_stopped = True
        return True

    def _mean_metrics(self, sums):
        by_worker = self.workers.all_gather(train_state.plain_sums(sums))
        return train_state.mean_metrics(train_state.add_up(by_worker))

    def _check_signals(self, due=False, save=False):
        """Raise Interrupted, after saving, if a worker has received a signal; return `due` of rank 0."""
        values = self.workers.all_gather([self.signals.received, bool(due)])
        received = [number for number, _ in values if number]
        if received:
            saved = None
            if save:
                self._bar.close()
                saved = self.save()
                self.saver.wait()
            raise Interrupted(self.signals.received or received[0], saved)
        return values[0][1]

    # Results ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def export(self) -> Iterator[Path]:
        """Yield an empty folder whose content becomes that of `--model-dir`, then write the metrics.

        With `--best-metric` the training state becomes that of the best epoch. Every worker may write into
        its folder; only that of the main process is used. `model.json` and `code/` are added.
        """
        if not self.workers.is_main_process:
            yield temporary_folder("export-")
            self._is_exported = True
            return
        self.saver.wait()
        epoch = self._load_best()
        args = self.args
        self._prepare_folders()  # again: they may have been deleted since the start
        with atomic_export(args.model_dir, "--model-dir") as folder:
            yield folder
            self._describe_model(folder, epoch)
            files = ", ".join(sorted(path.name for path in folder.iterdir()))
        if self._dry_run:
            self._dry_run.report(self.progress)
            return
        step = f" and {self.progress.step} steps" if self.progress.step else ""
        log(f"Model: {args.model_dir} ({files}), of epoch {epoch}{step}")
        facts: dict[str, Any] = {"epochs": self.progress.epoch, "initial_epoch": self._initial_epoch}
        if isinstance(self.data, datasets.Data):
            facts["class_names"] = self.data.classes
        facts["wall_seconds"] = time.monotonic() - self._started
        whole_epoch = None if self.progress.step else epoch
        report.write_results(args.output_data_dir, self.progress.history, whole_epoch, facts)
        self._is_exported = True

    def _describe_model(self, folder, epoch):
        """Write `model.json` and `code/` into the folder of the model."""
        code = Path(self.engine.__file__).parent
        model_folder.copy_code(
            code, folder / model_folder.CODE, getattr(self.engine, "SERVING_REQUIREMENTS", None)
        )
        network = self.job.get("--model") or self.job.get("--booster")
        facts = {"framework": self.engine.FRAMEWORK, "version": self.engine.VERSION, "network": network}
        facts.update(self._export_facts)
        facts.update(self.state.model_facts)
        facts["epoch"], facts["step"] = epoch, self.progress.step
        facts["metrics"] = model_folder.describe_metrics(self.progress, epoch)
        facts["data"] = self._data_facts
        facts.update(model_folder.describe_origin(self.args, self.job))
        model_folder.write(self._model_facts_path(folder), facts)

    def _load_best(self):
        """Load the state of the epoch to export, unless it is the present one; return the epoch."""
        epoch = getattr(self.state, "restored_epoch", None) or self.progress.epoch
        if not self.args.best_metric:
            return epoch
        row = self._best_row()
        best = row["epoch"] if row else epoch
        if best == epoch:
            return best
        if hasattr(self.state, "load_epoch"):  # XGBoost: the last state contains those of all epochs
            self.state.load_epoch(best)
            return best
        name = self.checkpoints.name_of(best)
        path = self.checkpoints.folder / name
        try:
            content = self.checkpoints.read(name)
        except Exception as error:  # each framework has its own errors for a damaged file
            raise UserError(
                f"--best-metric: the best checkpoint, {path}, cannot be read ({error}). "
                "Run the same command without --best-metric to export the last epoch's model"
            ) from error
        try:
            self.state.load_state_dict(content)
        except Exception as error:  # as in `restore`
            raise checkpoints.misfit(path, error) from error
        return best

    def _model_facts_path(self, folder):
        return folder / getattr(self.engine, "MODEL_FACTS", model_folder.FILE_NAME)
