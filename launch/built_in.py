r"""Train one of SageMaker's built-in algorithms with SDK v2: pip install "sagemaker<3"

Look:    python launch/built_in.py xgboost --role arn:aws:iam::123456789012:role/SageMaker \
             --region us-east-1 --train s3://bucket/train/ --dry-run \
             -- --num-round 100 --objective reg:squarederror
Train:   python launch/built_in.py image-classification --role ... --spot --train s3://bucket/train/ \
             --validation s3://bucket/validation/ -- --num-classes 10 --num-training-samples 60000 --epochs 20
Resume:  the same with --resume-from s3://bucket/image-classification-20261123-091500/checkpoints/

The flags after `--` are the hyperparameters of the algorithm. `--help` lists the flags of the launcher.
"""

import job
from common import errors

# The algorithms that save checkpoints: image, data, and required hyperparameters.
ALGORITHMS = {
    "xgboost": {
        "version": "3.0-5",
        "content_type": "text/csv",
        "channels": ["train"],
        "required": ["num_round"],
    },
    "image-classification": {
        "version": "1",
        "content_type": "application/x-recordio",
        "channels": ["train", "validation"],
        "required": ["num_classes", "num_training_samples"],
    },
    "object-detection": {
        "version": "1",
        "content_type": "application/x-recordio",
        "channels": ["train", "validation"],
        "required": ["num_classes", "num_training_samples"],
    },
    "semantic-segmentation": {
        "version": "1",
        "content_type": "image/jpeg",
        "channels": ["train", "validation", "train_annotation", "validation_annotation"],
        "required": ["num_classes", "num_training_samples"],
    },
}
# Those without: https://docs.aws.amazon.com/sagemaker/latest/dg/model-managed-spot-training.html
OTHERS = ("blazingtext", "factorization-machines", "forecasting-deepar", "ipinsights", "kmeans", "knn", "lda")
OTHERS += ("linear-learner", "ntm", "object2vec", "pca", "randomcutforest", "seq2seq")
NO_CHECKPOINTS_MAX_WAIT = 3600
ALGORITHMS.update(
    {name: {"version": "1", "content_type": None, "channels": ["train"], "required": []} for name in OTHERS}
)


def parse_args():
    """Return the flags; exit with an error before anything is sent if one is missing."""
    parser = job.make_parser(
        "Train a built-in algorithm on SageMaker (SDK v2).", ALGORITHMS, instance_type=None
    )
    parser.add_argument("--output", type=job.folder, help="address of the model; default: the bucket")
    parser.add_argument(
        "--train-annotation", type=job.address, help="address of the masks (semantic-segmentation)"
    )
    parser.add_argument("--validation-annotation", type=job.address, help="the same for validation")
    parser.add_argument(
        "--content-type", help="type of the data, such as text/libsvm; default: csv, RecordIO, jpeg or none"
    )
    args = job.parse_args(parser)
    algorithm = ALGORITHMS[args.what]
    for channel in algorithm["channels"]:
        if not getattr(args, channel):
            parser.error(f"{args.what} needs --{channel.replace('_', '-')}")
        args.channels[channel] = getattr(args, channel)
    args.hyperparameters = {name.replace("-", "_"): value for name, value in args.hyperparameters.items()}
    for name in algorithm["required"]:
        if name not in args.hyperparameters:
            parser.error(f"{args.what} needs --{name.replace('_', '-')} after `--`")
    args.has_checkpoints = args.what not in OTHERS
    if not args.has_checkpoints:
        if args.checkpoints or args.resume_from:
            parser.error(f"{args.what} saves no checkpoints: leave out --checkpoints and --resume-from")
        if (args.max_wait or 0) > NO_CHECKPOINTS_MAX_WAIT:
            parser.error(
                f"--max-wait {args.max_wait}: {args.what} saves no checkpoints, so SageMaker waits for "
                f"{NO_CHECKPOINTS_MAX_WAIT} seconds at most: pass --max-wait {NO_CHECKPOINTS_MAX_WAIT}"
            )
    if args.what == "semantic-segmentation" and args.instance_count != 1:
        parser.error(f"--instance-count {args.instance_count}: semantic-segmentation trains on one machine")
    on_gpus = args.what in ("image-classification", "object-detection", "semantic-segmentation", "seq2seq")
    args.instance_type = args.instance_type or ("ml.g4dn.xlarge" if on_gpus else "ml.m5.xlarge")
    args.content_type = args.content_type or algorithm["content_type"]
    return args


if __name__ == "__main__":
    args = parse_args()  # before the slow imports

with errors.importing("version 2 of SageMaker's Python SDK", 'Install it with: pip install "sagemaker<3"'):
    from sagemaker import Session, image_uris
    from sagemaker.estimator import Estimator
    from sagemaker.inputs import TrainingInput


def training_input(args, channel):
    """Return a channel with its type and its distribution over machines."""
    content_type = "image/png" if channel.endswith("_annotation") else args.content_type
    # On several machines XGBoost expects a part of the files on each, the image algorithms all files.
    sharded = args.what == "xgboost" and args.instance_count > 1
    distribution = "ShardedByS3Key" if sharded else "FullyReplicated"
    return TrainingInput(args.channels[channel], content_type=content_type, distribution=distribution)


def main(args):
    """Start the training job and show its log until it ends."""
    session = Session(job.boto_session(args), default_bucket=args.bucket)
    job.prepare(args, session)

    version = ALGORITHMS[args.what]["version"]
    region = session.boto_region_name
    estimator = Estimator(
        image_uri=args.image_uri or image_uris.retrieve(args.what, region=region, version=version),
        hyperparameters=args.hyperparameters,
        role=args.role,
        instance_type=args.instance_type,
        instance_count=args.instance_count,
        use_spot_instances=args.spot,
        max_run=args.max_run,
        max_wait=args.max_wait,
        checkpoint_s3_uri=args.checkpoints,
        checkpoint_local_path=job.CHECKPOINT_PATH,
        output_path=args.output,
        sagemaker_session=session,
        debugger_hook_config=False,
        disable_profiler=True,
    )
    # A built-in algorithm has its own metric definitions and entry point, and refuses others.
    channels = {channel: training_input(args, channel) for channel in args.channels}
    # At the end the SDK prints the billed seconds and the savings.
    estimator.fit(channels, job_name=args.job_name, wait=args.wait)


if __name__ == "__main__":
    job.run(main, args)
