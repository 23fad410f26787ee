r"""Train one of the scripts on SageMaker with SDK v3: pip install "sagemaker>=3"

Look:    python launch/model_trainer.py pytorch --role arn:aws:iam::123456789012:role/SageMaker \
             --region us-east-1 --dry-run
Train:   python launch/model_trainer.py pytorch --role ... --spot --train s3://bucket/train/ \
             -- --epochs 20 --augment
Resume:  python launch/model_trainer.py pytorch --role ... --spot --train s3://bucket/train/ \
             --resume-from s3://bucket/pytorch-20261123-091500/checkpoints/ -- --epochs 40 --augment

The flags after `--` are those of the script. `--help` lists those of the launcher.
"""

import job
from common import errors

if __name__ == "__main__":
    args = job.parse_script_args("Train one of the scripts on SageMaker (SDK v3).")  # before the slow imports

with errors.importing("version 3 of SageMaker's Python SDK", 'Install it with: pip install "sagemaker>=3"'):
    from sagemaker.core import image_uris
    from sagemaker.core.helper.iam_role_resolver import RoleValidationError
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training.configs import (
        CheckpointConfig,
        Compute,
        InputData,
        MetricDefinition,
        OutputDataConfig,
        SourceCode,
        StoppingCondition,
    )
    from sagemaker.core.utils.exceptions import SageMakerCoreError
    from sagemaker.train import ModelTrainer
    from sagemaker.train.distributed import Torchrun

IMAGES = {
    "pytorch": {"version": "2.9.0", "py_version": "py312"},
    "tensorflow": {"version": "2.21.0", "py_version": "py312"},
    "mxnet": {"version": "1.9.0", "py_version": "py38"},
    "xgboost": {"version": "3.2-0"},
}


def main(args):
    """Start the training job and show its log until it ends."""
    boto_session = job.boto_session(args)
    boto_session.events.register("provide-client-params.sagemaker.CreateTrainingJob", forward_sigterm)
    session = Session(boto_session, default_bucket=args.bucket)
    job.prepare(args, session)

    image_uri = args.image_uri or image_uris.retrieve(
        args.what,
        region=boto_session.region_name,
        instance_type=args.instance_type,
        image_scope="training",
        **IMAGES[args.what],
    )
    trainer = ModelTrainer(
        training_image=image_uri,
        source_code=SourceCode(source_dir=args.source_dir, entry_script="train.py"),
        distributed=Torchrun() if args.torchrun else None,
        hyperparameters=args.hyperparameters,
        role=args.role,
        compute=Compute(
            instance_type=args.instance_type,
            instance_count=args.instance_count,
            enable_managed_spot_training=args.spot,
        ),
        stopping_condition=StoppingCondition(
            max_runtime_in_seconds=args.max_run,
            max_wait_time_in_seconds=args.max_wait,
        ),
        checkpoint_config=CheckpointConfig(s3_uri=args.checkpoints, local_path=job.CHECKPOINT_PATH),
        output_data_config=OutputDataConfig(s3_output_path=args.output),
        base_job_name=args.job_name,  # the SDK adds the time
        sagemaker_session=session,
    )
    if args.metric_definitions:
        trainer.with_metric_definitions(
            [
                MetricDefinition(name=metric["Name"], regex=metric["Regex"])
                for metric in args.metric_definitions
            ]
        )
    channels = [InputData(channel_name=name, data_source=address) for name, address in args.channels.items()]
    trainer.train(input_data_config=channels, wait=args.wait, logs=args.wait)
    if args.wait:
        finished = trainer._latest_training_job
        job.print_savings(finished.training_time_in_seconds, finished.billable_time_in_seconds, args.spot)


def forward_sigterm(params, **_):
    """Wrap the command of the SDK in the forwarding of SIGTERM; the SDK has no parameter for this."""
    image = params["AlgorithmSpecification"]
    command = image.pop("ContainerEntrypoint") + image.pop("ContainerArguments")
    image["ContainerEntrypoint"] = job.forwarding_sigterm(*command)


if __name__ == "__main__":
    job.run(main, args, RoleValidationError, SageMakerCoreError)
