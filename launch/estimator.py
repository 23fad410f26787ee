r"""Train one of the scripts on SageMaker with SDK v2: pip install "sagemaker<3"

Look:    python launch/estimator.py pytorch --role arn:aws:iam::123456789012:role/SageMaker \
             --region us-east-1 --dry-run
Train:   python launch/estimator.py pytorch --role ... --spot --train s3://bucket/train/ \
             -- --epochs 20 --augment
Resume:  python launch/estimator.py pytorch --role ... --spot --train s3://bucket/train/ \
             --resume-from s3://bucket/pytorch-20261123-091500/checkpoints/ -- --epochs 40 --augment
A copy:  python launch/estimator.py pytorch --source-dir my-job --role ... --train s3://bucket/train/

The flags after `--` are those of the script. `--help` lists those of the launcher. In Python, such as for a
step of a pipeline: make_estimator(parse_args([...]), PipelineSession()).
"""

import job
from common import errors


def parse_args(words=None):
    """Return the flags."""
    parser = job.make_script_parser("Train one of the scripts on SageMaker (SDK v2).")
    parser.add_argument("--output", type=job.folder, help="address of model and metrics; default: the bucket")
    return job.parse_script_args(parser, words)


if __name__ == "__main__":
    args = parse_args()  # before the slow imports

with errors.importing("version 2 of SageMaker's Python SDK", 'Install it with: pip install "sagemaker<3"'):
    from sagemaker import Session
    from sagemaker.local import LocalSession
    from sagemaker.mxnet import MXNet
    from sagemaker.pytorch import PyTorch
    from sagemaker.tensorflow import TensorFlow
    from sagemaker.xgboost import XGBoost

ESTIMATORS = {
    "pytorch": (PyTorch, {"framework_version": "2.8.0", "py_version": "py312"}),
    # Otherwise the SDK adds the hyperparameter model_dir, an address in S3 that the script cannot write to.
    "tensorflow": (TensorFlow, {"framework_version": "2.19.0", "py_version": "py312", "model_dir": False}),
    "mxnet": (MXNet, {"framework_version": "1.9.0", "py_version": "py38"}),
    "xgboost": (XGBoost, {"framework_version": "3.0-5"}),
}


def make_estimator(args, session=None):
    """Return the estimator for a training job; `session` is the SDK's, such as that of a pipeline."""
    is_local = args.instance_type in job.LOCAL
    if session is None:
        session = (LocalSession if is_local else Session)(job.boto_session(args), default_bucket=args.bucket)
    job.prepare(args, session)

    estimator_class, options = ESTIMATORS[args.what]
    if args.torchrun:
        options = {**options, "distribution": {"torch_distributed": {"enabled": True}}}
    if not is_local:
        options = {
            **options,
            "checkpoint_s3_uri": args.checkpoints,
            "checkpoint_local_path": job.CHECKPOINT_PATH,
        }
    return estimator_class(
        entry_point=args.entry_point,
        source_dir=str(args.source_dir),  # a link to common/ in it is uploaded as real files
        image_uri=args.image_uri,  # any image with SageMaker's training toolkit
        hyperparameters=args.hyperparameters,
        metric_definitions=args.metric_definitions,
        role=args.role,
        instance_type=args.instance_type,
        instance_count=args.instance_count,
        use_spot_instances=args.spot,
        max_run=args.max_run,
        max_wait=args.max_wait,
        container_entry_point=job.forwarding_sigterm("train"),
        output_path=args.output,
        sagemaker_session=session,
        debugger_hook_config=False,  # otherwise the SDK adds debugger and profiler
        disable_profiler=True,
        **options,
    )


def main(args):
    """Start the training job and show its log until it ends."""
    estimator = make_estimator(args)
    # At the end the SDK prints the billed seconds and the savings.
    estimator.fit(args.channels or None, job_name=args.job_name, wait=args.wait)


if __name__ == "__main__":
    job.run(main, args)
