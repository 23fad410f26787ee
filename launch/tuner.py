"""Tune the hyperparameters of one of the scripts or a copy with SDK v3; see docs/sagemaker.md.

SageMaker's API has one checkpoint address for all trials, so each script keeps those of a trial in a folder
with the name of its job. The API accepts no entry point for trials, so two variables restart process 1 under
forward_sigterm.sh: PYTHONPATH for Python, and BASH_ENV for the bash of most images.
"""

import shutil
import tempfile
from pathlib import Path

import job
import model_trainer
from common import errors, train_state

with errors.importing("version 3 of SageMaker's Python SDK", 'Install it with: pip install "sagemaker>=3"'):
    from sagemaker.train.tuner import HyperparameterTuner

CHANNEL = "sm_forward_sigterm"  # contains no data
FILES = f"/opt/ml/input/data/{CHANNEL}"  # their path in the container


def make_tuner(args, objective, ranges, session=None, **options):
    """Return a HyperparameterTuner for the flags of `model_trainer.parse_args`.

    Args:
        objective: a validation metric by the script's own name, such as "accuracy" or "f1:max".
        ranges: by flag without leading hyphens, such as {"learning-rate": ContinuousParameter(0.001, 0.1)}.
        session: the SDK's, such as that of a pipeline.
        options: of HyperparameterTuner, such as `max_jobs`.
    """
    if args.resume_from:
        raise errors.UserError("--resume-from: the trials of a tuner start without checkpoints; leave it out")
    name, sign = train_state.parse_metric(objective, "objective")
    trainer = model_trainer.make_trainer(args, session)
    copy = Path(tempfile.mkdtemp(), "code")  # the SDK's tuner does not follow the link to common/
    shutil.copytree(args.source_dir, copy, ignore=shutil.ignore_patterns("__pycache__", "output"))
    trainer.source_code.source_dir = str(copy)
    sources = {**args.channels, CHANNEL: str(Path(job.__file__).with_name("forward_sigterm"))}
    trainer.input_data_config = [
        trainer.create_input_data_channel(channel, source, f"{args.job_name}/input")
        for channel, source in sources.items()
    ]
    variables = {"PYTHONPATH": FILES, "BASH_ENV": f"{FILES}/bash_env.sh"}
    trainer.environment = {**(trainer.environment or {}), **variables}
    if args.torchrun:  # here SageMaker's toolkit starts the script, not the SDK's driver
        trainer.hyperparameters["sagemaker_torch_distributed_enabled"] = True
    return HyperparameterTuner(
        trainer,
        f"validation:{name}",
        ranges,
        args.metric_definitions,
        objective_type="Maximize" if sign > 0 else "Minimize",
        **options,
    )
