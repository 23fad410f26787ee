r"""Train one of the scripts on SageMaker with SDK v3: pip install "sagemaker>=3"

Look:    python launch/model_trainer.py pytorch --role arn:aws:iam::123456789012:role/SageMaker \
             --region us-east-1 --dry-run
Train:   python launch/model_trainer.py pytorch --role ... --spot --train s3://bucket/train/ \
             -- --epochs 20 --augment
Resume:  python launch/model_trainer.py pytorch --role ... --spot --train s3://bucket/train/ \
             --resume-from s3://bucket/pytorch-20261123-091500/checkpoints/ -- --epochs 40 --augment
A copy:  python launch/model_trainer.py pytorch --source-dir my-job --role ... --train s3://bucket/train/ \
             --tags team=vision --set volume_size_in_gb=200 --set environment.NCCL_DEBUG=INFO

The flags after `--` are those of the script. `--help` lists those of the launcher. In Python, such as for a
step of a pipeline: make_trainer(parse_args([...]), PipelineSession()).
"""

import argparse
import contextlib
import json
import re
from pathlib import Path

import job
from common import errors


def parse_args(words=None):
    """Return the flags."""
    parser = job.make_script_parser("Train one of the scripts on SageMaker (SDK v3).")
    add = parser.add_argument
    add("--tags", type=_pair, nargs="+", default=[], metavar="KEY=VALUE", help="tags of the job")
    add("--vpc", nargs="+", default=[], metavar="ID", help="subnets and security groups: subnet-1 sg-1")
    add(
        "--set",
        type=_pair,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the SDK's ModelTrainer or of its configuration classes, such as "
        "volume_size_in_gb=200, keep_alive_period_in_seconds=1800, enable_network_isolation=true, "
        "kms_key_id=KEY, volume_kms_key_id=KEY, environment.NAME=VALUE; repeatable",
    )
    args = job.parse_script_args(parser, words)
    for identifier in args.vpc:
        if not re.fullmatch("(subnet|sg)-[0-9a-zA-Z]+", identifier):
            parser.error(f"--vpc: expected subnet-... and sg-..., got {identifier!r}")
    if len({identifier.partition("-")[0] for identifier in args.vpc}) == 1:
        parser.error("--vpc needs both: at least one subnet-... and one sg-...")
    return args


def _pair(text):
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, value


if __name__ == "__main__":
    args = parse_args()  # before the slow imports

with errors.importing("version 3 of SageMaker's Python SDK", 'Install it with: pip install "sagemaker>=3"'):
    from pydantic import TypeAdapter, ValidationError
    from sagemaker.core import image_uris
    from sagemaker.core.helper.iam_role_resolver import RoleValidationError
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training import configs
    from sagemaker.core.utils.exceptions import SageMakerCoreError
    from sagemaker.train import ModelTrainer, model_trainer
    from sagemaker.train.distributed import Torchrun

IMAGES = {
    "pytorch": {"version": "2.9.0", "py_version": "py312"},
    "tensorflow": {"version": "2.21.0", "py_version": "py312"},
    "mxnet": {"version": "1.9.0", "py_version": "py38"},
    "xgboost": {"version": "3.2-0"},
}
# The SDK has no parameter for the command of process 1.
model_trainer.DEFAULT_CONTAINER_ENTRYPOINT = job.forwarding_sigterm(
    *model_trainer.DEFAULT_CONTAINER_ENTRYPOINT, *model_trainer.DEFAULT_CONTAINER_ARGUMENTS
)
model_trainer.DEFAULT_CONTAINER_ARGUMENTS = None

KINDS = {  # by the parameter of ModelTrainer or of its with_... method that takes the class
    "": ModelTrainer,
    "compute": configs.Compute,
    "networking": configs.Networking,
    "stopping_condition": configs.StoppingCondition,
    "output_data_config": configs.OutputDataConfig,
    "checkpoint_config": configs.CheckpointConfig,
    "source_code": configs.SourceCode,
    "retry_strategy": configs.RetryStrategy,
    "remote_debug_config": configs.RemoteDebugConfig,
    "infra_check_config": configs.InfraCheckConfig,
    "session_chaining_config": configs.SessionChainingConfig,
}
NOT_SET = ("training_image", "training_mode", "sagemaker_session", "config_mgr")  # with --set


def make_trainer(args, session=None):
    """Return the trainer of a training job; `session` is the SDK's, such as that of a pipeline."""
    settings = flag_settings(args)
    chosen = {group: {} for group in KINDS}
    for key, text in args.set:
        change(settings, chosen, key, text)
    session = session or Session(job.boto_session(args), default_bucket=args.bucket)
    job.prepare(args, session)

    options = {"sagemaker_session": session, **settings.pop(""), **chosen.pop("")}
    options["training_image"] = args.image_uri or image_uris.retrieve(
        args.what,
        region=session.boto_region_name,
        instance_type=args.instance_type,
        image_scope="training",
        **IMAGES[args.what],
    )
    chosen["output_data_config"].setdefault("s3_output_path", args.output)
    settings["checkpoint_config"]["s3_uri"] = args.checkpoints
    if args.instance_type in job.LOCAL:
        del settings["checkpoint_config"]
        folder = Path("output", args.job_name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        options.update(training_mode=model_trainer.Mode.LOCAL_CONTAINER, local_container_root=str(folder))
    later = {}
    for group, values in chosen.items():
        values = {**settings.get(group, {}), **values}
        if any(value is not None for value in values.values()):
            place = options if group in ModelTrainer.model_fields else later
            place[group] = KINDS[group](**values)
    trainer = ModelTrainer(**options)
    for group, value in later.items():
        getattr(trainer, f"with_{group}")(value)
    if args.metric_definitions:
        trainer.with_metric_definitions(
            [
                configs.MetricDefinition(name=each["Name"], regex=each["Regex"])
                for each in args.metric_definitions
            ]
        )
    return trainer


def flag_settings(args):
    """Return the SDK's parameters that flags set, by the names in KINDS."""
    channels = args.channels.items()
    return {
        "": {
            "role": args.role,
            "base_job_name": args.job_name,  # the SDK adds the time
            "hyperparameters": args.hyperparameters,
            "distributed": Torchrun() if args.torchrun else None,
            "tags": [configs.Tag(key=key, value=value) for key, value in args.tags] or None,
            "input_data_config": [
                configs.InputData(channel_name=name, data_source=address) for name, address in channels
            ],
        },
        "source_code": {"source_dir": str(args.source_dir), "entry_script": args.entry_point},
        "compute": {
            "instance_type": args.instance_type,
            "instance_count": args.instance_count,
            "enable_managed_spot_training": args.spot,
        },
        "stopping_condition": {
            "max_runtime_in_seconds": args.max_run,
            "max_wait_time_in_seconds": args.max_wait,
        },
        "networking": {
            "subnets": [name for name in args.vpc if name.startswith("subnet")] or None,
            "security_group_ids": [name for name in args.vpc if name.startswith("sg")] or None,
        },
        "checkpoint_config": {"s3_uri": args.checkpoints, "local_path": job.CHECKPOINT_PATH},
    }


def change(settings, chosen, key, text):
    """Enter a `--set KEY=VALUE` into `chosen`, unless a flag has set it in `settings`.

    The value is JSON, text, or a list with commas, whichever the SDK takes first.
    """
    name, _, item = key.partition(".")
    names = {name: group for group, kind in KINDS.items() for name in kind.model_fields if name not in KINDS}
    errors.check_choice("--set", name, names)
    group = names[name]
    if name in settings.get(group, {}) or name in NOT_SET:
        raise errors.UserError(f"--set {key}: the launcher sets it; --help lists its flags")
    candidates = [text, text.split(",")]
    with contextlib.suppress(ValueError):
        candidates.insert(0, json.loads(text))
    if item:
        candidates = [{**dict(chosen[group].get(name, {})), item: text}]
    adapter = TypeAdapter(KINDS[group].model_fields[name].annotation)
    reason = None
    for candidate in candidates:
        try:
            chosen[group][name] = adapter.validate_python(candidate)
            return
        except ValidationError as error:
            reason = reason or error.errors()[0]["msg"]
    raise errors.UserError(f"--set {key}={text}: {reason[0].lower()}{reason[1:]}")


def main(args):
    """Start the training job and show its log until it ends."""
    trainer = make_trainer(args)
    trainer.train(wait=args.wait, logs=args.wait)
    finished = trainer._latest_training_job
    if args.wait and finished:
        job.print_savings(finished.training_time_in_seconds, finished.billable_time_in_seconds, args.spot)


if __name__ == "__main__":
    job.run(main, args, RoleValidationError, SageMakerCoreError)
