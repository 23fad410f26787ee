"""The parts of `gpu.py`. Each yields pairs of a label and a function that measures and returns figures."""

import functools
import importlib.util
import math
import os
import random
import signal
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness
from benchmarks.gpu_training import (
    Training,
    Workload,
    compare_checkpoints,
    history,
    run_to_end,
    write_table,
)

MEMORY = "/dev/shm"  # noqa: S108 - the folders in it have random names
SAVES = 3  # per epoch


class Run(NamedTuple):
    """The settings of a part."""

    device: str
    tiny: bool
    repetitions: int
    seed: int
    deadline: float
    folder: Path

    def new_folder(self):
        """Return a new empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def take_turns(self, share, **variants):
        """Call the variants in turn, within a share of the remaining time of the part."""
        if self.tiny:  # figures need not be exact: run two variants at the same time
            with ThreadPoolExecutor(2) as pool:
                pending = {name: pool.submit(variant) for name, variant in variants.items()}
            return {name: [future.result()] for name, future in pending.items()}
        seconds = share * (self.deadline - time.monotonic())
        return harness.take_turns(self.repetitions, seconds, **variants)

    def environment(self, fresh_cache=False):
        """Return environment variables for a process."""
        if self.tiny:  # on two cores, compilation takes half a minute and threads wait for each other
            return {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        if fresh_cache:
            return {"TORCHINDUCTOR_CACHE_DIR": str(self.new_folder())}
        return {}


def require(*packages):
    """Raise RuntimeError if a package is not installed."""
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a spec without origin is the folder of a script
            raise RuntimeError(f"{package} is not installed")


def compare(what, unit, values, others):
    """Return a ratio as a figure, with both medians as its detail."""
    digits = 2 if unit == "s" else 0
    medians = [f"{statistics.median(numbers):,.{digits}f}" for numbers in (values, others)]
    detail = f"{medians[0]} and {medians[1]} {unit}; repetitions: {len(values)}"
    return harness.Figure(what, harness.ratio(values, others), detail=detail)


# ------------------------------------------------------------------------------------------------------------
# Step
# ------------------------------------------------------------------------------------------------------------


def step(run):
    """Throughput of the training step, relative to a minimal hand-written loop.

    The loop trains the same network with the same batch size and precision in channels-last format, on one
    batch that stays on the GPU. It has no metrics, signals, checkpoints or deterministic kernels. The script
    reads its images from memory, as in normal use; "with input" is the loop with random batches from memory,
    pinned and copied in each step. With `--compile`, both networks are compiled. The loop lets cuDNN try its
    algorithms and use the fastest; "untuned" is the loop without that. The script never does it, because the
    choice, and so the bits, may differ after a restart. With `--loaders` threads prepare the batches, which
    otherwise takes the time between two steps. Samples per second are medians over the epochs after the
    first.
    """
    require("torch", "torchvision")
    workloads = [
        Workload("cnn", 32, 512, "fp32", steps_per_epoch=96, epochs=5),
        Workload("resnet50", 224, 256, "bf16", steps_per_epoch=16, epochs=4),
    ]
    if run.tiny:
        workloads = [Workload("cnn", 8, 16, "fp32", steps_per_epoch=30, epochs=4)]
    left = 2 * len(workloads)
    for work in workloads:
        flags = work.write(run.new_folder(), run.device)
        names = ("script", "script --no-deterministic", "script --loaders 2")
        scripts = {name: name.split()[1:] for name in names}
        yield f"{work}", functools.partial(_steps, run, work, flags, 1 / left, "lean loop", scripts)
        scripts = {"script --compile": ["--compile"]}
        compiled = functools.partial(_steps, run, work, flags, 1 / (left - 1), "compiled lean loop", scripts)
        yield f"{work} --compile", compiled
        left -= 2


def _steps(run, work, flags, share, lean, scripts):
    def train(more):
        folder = run.new_folder()
        run_to_end("pytorch", [*flags, *more], folder, run.environment())
        return statistics.median(history(folder, "samples_per_second")[1:])

    def train_lean(kind):
        words = [*work, run.device, kind]
        return harness.run_json("gpu_loop", "train", *words, env=run.environment())

    kind = lean.split()[0]
    variants = {name: functools.partial(train, more) for name, more in scripts.items()}
    if kind == "lean":
        variants["untuned lean loop"] = lambda: train_lean("untuned")["card"]
    turns = run.take_turns(share, lean=lambda: train_lean(kind), **variants)
    on_card = [rates["card"] for rates in turns["lean"]]
    from_memory = [rates["memory"] for rates in turns["lean"]]
    rates = {**{name: turns[name] for name in variants}, f"{lean} with input": from_memory}
    return [compare(f"{work}: {name} / {lean}", "samples/s", rates[name], on_card) for name in rates]


# ------------------------------------------------------------------------------------------------------------
# Checkpoint
# ------------------------------------------------------------------------------------------------------------


def checkpoint(run):
    """Cost of a checkpoint of about 1 GB, and of a restart from it.

    The stall is the extra time of an epoch per save, divided by a bare copy of the same size from the GPU to
    pinned memory. An epoch has three saves, far enough apart for each to be written before the next. The
    overhead is the stall as a share of ten seconds. Checkpoints are written to a large file system in memory,
    if one exists, to exclude the speed of a disk. A restart is the time from the start of the process to its
    first step.
    """
    require("torch", "torchvision")
    work = Workload("vgg16", 32, 64, "fp32", steps_per_epoch=40, epochs=2)
    if run.tiny:
        work = Workload("cnn", 8, 16, "fp32", steps_per_epoch=40, epochs=2)
    with tempfile.TemporaryDirectory(dir=_folder_in_memory()) as folder:
        run = run._replace(folder=Path(folder))
        flags = work.write(run.new_folder(), run.device)
        first = run.new_folder()
        run_to_end("pytorch", flags, first, run.environment())
        steps_per_second = work.steps_per_epoch / history(first, "seconds")[-1]
        path = first / "checkpoints" / "checkpoint-2.pt"
        label = f"{work.network}, {path.stat().st_size / 1e6:,.1f} MB"
        yield f"{label}: stall", functools.partial(_stall, run, label, work, path, steps_per_second)
        yield f"{label}: restart", functools.partial(_restart, run, label, flags, path)


def _folder_in_memory():
    if not os.path.isdir(MEMORY):
        return None
    memory = os.statvfs(MEMORY)
    return MEMORY if memory.f_bavail * memory.f_frsize > 8 << 30 else None


def _stall(run, label, work, path, steps_per_second):
    num_bytes = path.stat().st_size

    def bare():
        return harness.run_json("gpu_loop", "copy", num_bytes, run.device, run.folder, env=run.environment())

    spacing = max(20, math.ceil(2 * bare()["write"] * steps_per_second))
    work = work._replace(steps_per_epoch=(SAVES + 1) * spacing, epochs=3)
    flags = work.write(run.new_folder(), run.device)

    def epoch_seconds(*more):
        with tempfile.TemporaryDirectory(dir=run.folder) as folder:
            kept = ["--keep-checkpoints", 1]
            run_to_end("pytorch", [*flags, *kept, *more], Path(folder), run.environment())
            return statistics.median(history(Path(folder), "seconds")[1:])

    turns = run.take_turns(
        2 / 3,
        saved=lambda: epoch_seconds("--checkpoint-steps", spacing),
        unsaved=epoch_seconds,
        copy=lambda: bare()["copy"],
    )
    stalls = [(saved - unsaved) / SAVES for saved, unsaved in zip(turns["saved"], turns["unsaved"])]
    stall = statistics.median(stalls)
    copy = statistics.median(turns["copy"])
    seconds = statistics.median(turns["unsaved"]) / (SAVES + 1)
    detail = f"{1000 * stall:.1f} and {1000 * copy:.1f} ms; a save every {seconds:.1f} s; "
    detail += f"repetitions: {len(stalls)}"
    ratio = harness.ratio(stalls, turns["copy"])
    return [
        harness.Figure(f"{label}: stall / bare copy", ratio, detail=detail),
        harness.Figure(f"{label}: overhead of a save every 10 s", stall / 10, detail=detail),
    ]


def _restart(run, label, flags, path):
    flags = [*flags, "--epochs", 3, "--log-steps", 1]
    turns = run.take_turns(
        1,
        resumed=lambda: _start_seconds(run, "pytorch", flags, "step=", path),
        fresh=lambda: _start_seconds(run, "pytorch", flags, "step="),
    )
    return [compare(f"{label}: resumed / fresh start", "s", turns["resumed"], turns["fresh"])]


def _start_seconds(run, framework, flags, beginning, path=None):
    """Return the seconds from the start of a process that resumes from `path` to a log line."""
    folder = run.new_folder()
    if path:
        (folder / "checkpoints").mkdir()
        os.link(path, folder / "checkpoints" / path.name)
    with Training(framework, flags, folder, run.environment()) as training:
        if path:
            training.wait_for("Resuming training from")
        return training.wait_for(beginning)


# ------------------------------------------------------------------------------------------------------------
# Exactness
# ------------------------------------------------------------------------------------------------------------


def exactness(run):
    """Number of tensors in the last checkpoint that an interruption changes.

    A training is ended by SIGTERM and resumed, then killed by SIGKILL and resumed again, after random steps.
    Its last checkpoint is compared with the one of an uninterrupted training: 0 means that weights,
    statistics and momentum are bit-identical. With `--compile`, each process starts with an empty cache of
    compiled code, as on a new machine.
    """
    require("torch", "torchvision")
    cnn = Workload("cnn", 32, 128, "fp32", steps_per_epoch=100, epochs=3)
    resnet = Workload("resnet50", 224, 64, "bf16", steps_per_epoch=20, epochs=3)
    precisions = ["fp32", "bf16", "fp16"]
    if run.tiny:
        cnn = Workload("cnn", 8, 16, "fp32", steps_per_epoch=100, epochs=3)
        precisions = ["fp16"]
    flags = cnn.write(run.new_folder(), run.device)
    modes = {f"cnn {precision}": (cnn, [*flags, "--precision", precision]) for precision in precisions}
    modes["cnn fp32 --compile"] = cnn, [*flags, "--compile"]
    if not run.tiny:
        modes["resnet50 bf16"] = resnet, resnet.write(run.new_folder(), run.device)
    draw = random.Random(run.seed)  # noqa: S311
    pending = {}
    with ThreadPoolExecutor(2) as pool:  # speed is not measured
        for name, (work, mode_flags) in modes.items():
            total = work.steps_per_epoch * work.epochs
            terminate = draw.randint(total // 8, total // 2)
            kill = draw.randint(total // 2 + 1, 3 * total // 4)
            pending[name] = pool.submit(_interrupt, run, name, work, mode_flags, terminate, kill)
    for name, future in pending.items():
        yield name, future.result


def _interrupt(run, name, work, flags, terminate, kill):
    expected = run.new_folder()
    run_to_end("pytorch", flags, expected, run.environment(fresh_cache=True))
    flags = [*flags, "--log-steps", 1, "--checkpoint-steps", work.steps_per_epoch // 3]
    resumed = run.new_folder()

    def start():
        return Training("pytorch", flags, resumed, run.environment(fresh_cache=True))

    def signal_after(training, step, number):
        epoch, index = divmod(step - 1, work.steps_per_epoch)
        training.wait_for(f"step={index + 1}/{work.steps_per_epoch} epoch={epoch + 1}")
        training.process.send_signal(number)

    with start() as training:
        signal_after(training, terminate, signal.SIGTERM)
        training.finish(code=128 + signal.SIGTERM)
    with start() as training:
        training.wait_for("Resuming training from")
        signal_after(training, kill, signal.SIGKILL)
        training.finish(code=-signal.SIGKILL)
    with start() as training:
        training.wait_for("Resuming training from")
        training.finish()

    last = f"checkpoints/checkpoint-{work.epochs}.pt"
    count, different = compare_checkpoints(expected / last, resumed / last)
    detail = f"of {count}; SIGTERM after step {terminate} and SIGKILL after step {kill} "
    detail += f"of {work.steps_per_epoch * work.epochs}, seed {run.seed}"
    if different:
        detail += f"; {', '.join(different[:5])}"
    return [harness.Figure(f"{name}: tensors that differ", len(different), detail=detail)]


# ------------------------------------------------------------------------------------------------------------
# XGBoost
# ------------------------------------------------------------------------------------------------------------


def xgboost(run):
    """Boosting rounds per second, relative to `xgb.train`; cost of the search for a GPU, and of a restart.

    The script and `xgb.train` read the same Parquet tables and evaluate both after each round; the first
    round is not counted. By default the script saves after most rounds; a run with one checkpoint at the end
    shows the other costs. The time from the start of the process to the log line with the device includes the
    search for a GPU with `--device auto`, but not with `--device cpu`. A restart is the time to the first
    round.
    """
    require("xgboost", "pyarrow")
    rounds, rows, columns = 300, 1_000_000, 50
    if run.tiny:
        rounds, rows, columns = 20, 2_000, 10
    folder = run.new_folder()
    write_table(folder / "train", rows, columns)
    write_table(folder / "validation", rows // 10, columns)
    data = ["--train", folder / "train", "--validation", folder / "validation"]
    flags = [*data, "--device", run.device, "--num-round", rounds]
    yield "rounds", functools.partial(_rounds, run, flags, folder, rounds)
    yield "search for a GPU", functools.partial(_search, run, data)
    yield "restart", functools.partial(_restart_rounds, run, flags, rounds)


def _rounds(run, flags, folder, rounds):
    def script(*more):
        with Training("xgboost", [*flags, *more], run.new_folder(), run.environment()) as training:
            first = training.wait_for("epoch=1 ")
            last = training.wait_for(f"epoch={rounds} ")
            training.finish()
        return (rounds - 1) / (last - first)

    def plain():
        words = [folder / "train", folder / "validation", rounds, run.device]
        return harness.run_json("gpu_loop", "xgboost", *words, env=run.environment())

    turns = run.take_turns(
        1 / 3,
        default=script,
        saved_once=lambda: script("--checkpoint-steps", rounds),
        plain=plain,
    )
    return [
        compare("script / xgb.train", "rounds/s", turns["default"], turns["plain"]),
        compare("script with one checkpoint / xgb.train", "rounds/s", turns["saved_once"], turns["plain"]),
    ]


def _search(run, data):
    turns = run.take_turns(
        1 / 2,
        auto=lambda: _start_seconds(run, "xgboost", [*data, "--device", "auto"], "Device:"),
        cpu=lambda: _start_seconds(run, "xgboost", [*data, "--device", "cpu"], "Device:"),
    )
    return [compare("start with --device auto / --device cpu", "s", turns["auto"], turns["cpu"])]


def _restart_rounds(run, flags, rounds):
    first = run.new_folder()
    run_to_end("xgboost", flags, first, run.environment())
    path = first / "checkpoints" / f"xgboost-checkpoint.{rounds - 1}"
    flags = [*flags, "--num-round", rounds + 100]
    turns = run.take_turns(
        1,
        resumed=lambda: _start_seconds(run, "xgboost", flags, "epoch=", path),
        fresh=lambda: _start_seconds(run, "xgboost", flags, "epoch="),
    )
    return [compare(f"resumed after {rounds} rounds / fresh start", "s", turns["resumed"], turns["fresh"])]
