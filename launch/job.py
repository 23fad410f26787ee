"""Shared code of the launchers: flags, checks before anything is sent or billed, and the dry run."""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from common import errors, flags, report, train_state
from common.s3 import split_uri
from common.xgboost_params import LOG_NAMES

with errors.importing(
    "SageMaker's Python SDK", 'Install it with: pip install "sagemaker<3" or pip install "sagemaker>=3"'
):
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.awsrequest import AWSResponse
    from botocore.exceptions import BotoCoreError, ClientError

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = ("pytorch", "tensorflow", "mxnet", "xgboost")
CHECKPOINT_PATH = "/opt/ml/checkpoints"  # where the scripts keep them in a SageMaker container
SET_BY_SAGEMAKER = {"train", "validation", "weights", "output", "checkpoint-path", "model-dir"}
SET_BY_SAGEMAKER |= {"output-data-dir", "hosts", "current-host"}
GPU_INSTANCE = r"ml\.[gp]\d.*"
LOCAL = ("local", "local_gpu")  # instance types of SageMaker's local mode


def make_parser(description, choices, instance_type):
    """Return the parser of the flags of all launchers; `choices` are the values of WHAT."""
    parser = Parser(
        description=description,
        usage="%(prog)s WHAT --role ARN [flags of the launcher] [-- flags of the script or algorithm]",
        epilog="Addresses look like s3://bucket/folder/. Credentials are found as in all AWS tools.",
        allow_abbrev=False,
    )
    parser.hint += "; those of the script or algorithm go after `--`"
    add = parser.add_argument
    add("what", choices=tuple(choices), metavar="WHAT", help=f"what trains: {', '.join(choices)}")
    add("--role", required=True, type=role, help="ARN of the IAM role that the job runs with")
    add("--region", help="AWS region; default: that of your AWS settings")
    add(
        "--instance-type",
        default=instance_type,
        help="machine to train on, or local for Docker on this one; default: the smallest suitable one",
    )
    add("--instance-count", type=flags.integer(1), default=1, help="number of machines (default: 1)")
    add("--image-uri", help="training image; default: SageMaker's own")
    add("--spot", action="store_true", help="train on Spot instances, which cost less and may be interrupted")
    add("--max-run", type=flags.integer(1), default=3600, help="maximum training seconds (default: 3600)")
    add(
        "--max-wait",
        type=flags.integer(1),
        help="maximum seconds including the wait for Spot (default: twice --max-run)",
    )
    add("--train", type=address, help="address of the training data")
    add("--validation", type=address, help="address of the validation data")
    add(
        "--bucket",
        help="bucket for everything that is written; default: the SDK's own, sagemaker-<region>-<account>",
    )
    add("--job-name", type=_job_name, help="name of the job; default: WHAT and the time")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--checkpoints", type=folder, help="address of the checkpoints; default: bucket and job name"
    )
    where.add_argument("--resume-from", type=folder, help="continue from the checkpoints of an earlier job")
    add("--no-wait", dest="wait", action="store_false", help="do not wait for the end of the job")
    add(
        "--dry-run", action="store_true", help="print the request instead of sending it; needs no credentials"
    )
    return parser


def parse_args(parser, words=None):
    """Return the launcher's flags, with those after `--` as `hyperparameters`; a mistake is one line."""
    words = sys.argv[1:] if words is None else words
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    args.script_flags = words[end + 1 :]
    try:
        args.hyperparameters = flags.hyperparameters(args.script_flags)
    except errors.UserError as error:
        parser.error(str(error))
    if args.max_wait is not None and not args.spot:
        parser.error("--max-wait is for Spot instances: add --spot")
    if args.spot and args.max_wait is None:
        args.max_wait = 2 * args.max_run
    if args.spot and args.max_wait < args.max_run:
        parser.error(f"--max-wait {args.max_wait} is less than --max-run {args.max_run}, which it includes")
    if args.instance_type in LOCAL:
        _check_local(parser, args)
    args.job_name = args.job_name or f"{args.what}-{time.strftime('%Y%m%d-%H%M%S')}"
    if args.dry_run:
        prepare_dry_run(args)
    channels = {"train": args.train, "validation": args.validation}
    args.channels = {name: channel for name, channel in channels.items() if channel}
    return args


def _check_local(parser, args):
    """Exit with one line if a flag does not fit local mode, or without Docker."""
    mode = f"--instance-type {args.instance_type}"
    given = {
        "--spot": args.spot,
        "--checkpoints": args.checkpoints,
        "--resume-from": args.resume_from,
        "--dry-run": args.dry_run,
    }
    for flag in filter(given.get, given):
        parser.error(f"{flag} is for jobs on SageMaker: leave it out with {mode}")
    try:
        docker = subprocess.run(["docker", "info"], capture_output=True, text=True)  # noqa: S607
        reason = docker.returncode and errors.first_line(docker.stderr)
    except OSError:
        reason = "the command docker is missing"
    if reason:
        parser.error(f"{mode} needs Docker on this machine: {reason}")


def prepare_dry_run(args):
    """Keep the SDK, which is imported later, from looking for credentials or waiting for an answer."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ[name] = "dry-run"  # on import SDK v2 looks for credentials, even on the network
    os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"  # SDK v3 asks AWS what the role may do
    logging.getLogger("sagemaker.config").disabled = True  # SDK v2 logs to standard output
    args.wait = False


def make_script_parser(description):
    """Return the parser of a launcher of our scripts or copies."""
    parser = make_parser(description, FRAMEWORKS, instance_type="ml.m5.xlarge")
    parser.hint += "; pass a copy with --source-dir"
    add = parser.add_argument
    add("--weights", type=address, help="address of weights to start from (not for xgboost)")
    add("--source-dir", type=Path, help="folder of your copy; default: the folder named WHAT")
    add("--entry-point", default="train.py", help="script in this folder (default: train.py)")
    return parser


def parse_script_args(parser, words=None):
    """Return the flags of a launcher of our scripts; the script's own parser checks those after `--`."""
    args = parse_args(parser, words)
    if args.weights:
        if args.what == "xgboost":
            parser.error("--weights is for image classifiers: xgboost continues from --resume-from")
        args.channels["model"] = args.weights  # the scripts read --weights from this channel
    for name in args.hyperparameters:
        if name in SET_BY_SAGEMAKER:
            parser.error(f"--{name} cannot be passed after `--`: in the cloud SageMaker sets it")
    if args.source_dir is None:
        # Report a wrong flag before a job is paid for.
        script = flags.xgboost_flags() if args.what == "xgboost" else flags.image_flags(args.what)
        script.parse_args(args.script_flags)
    args.source_dir = args.source_dir or ROOT / args.what  # a copy may have its own flags
    if not (args.source_dir / args.entry_point).is_file():
        parser.error(f"there is no script {args.source_dir / args.entry_point}")
    # One process per GPU; otherwise the scripts find the other machines by themselves.
    args.torchrun = args.what == "pytorch" and bool(re.fullmatch(GPU_INSTANCE, args.instance_type))
    # SageMaker refuses metric definitions for its own XGBoost image, even when it runs a script:
    # https://github.com/aws/sagemaker-xgboost-container/issues/121. A copy in your own registry allows
    # them.
    fixed_metrics = args.what == "xgboost" and not args.image_uri
    args.metric_definitions = None if fixed_metrics else report.metric_definitions(_metrics(parser, args))
    return args


def _metrics(parser, args):
    """Return the names of the metrics that a script logs with these flags."""
    named = [name.strip() for name in args.hyperparameters.get("eval-metric", "").split(",")]
    names = [LOG_NAMES.get(name, name) for name in named if name] or ["loss", "accuracy", "rmse"]
    if args.hyperparameters.get("best-metric"):
        try:
            names.append(train_state.parse_metric(args.hyperparameters["best-metric"], "--best-metric")[0])
        except errors.UserError as error:
            parser.error(str(error))
    return tuple(dict.fromkeys(names))


def boto_session(args):
    """Return a boto3 session with the usual AWS settings; in a dry run, one that sends nothing."""
    session = boto3.Session(region_name=args.region)
    if args.dry_run:
        session.events.register("before-call", lambda model, params, **_: _answer(args, model, params))
    if not session.region_name:
        raise ValueError("no AWS region: add --region, such as --region us-east-1, or set AWS_DEFAULT_REGION")
    return session


def _answer(args, model, params):
    """Answer a request instead of AWS, so that boto3 sends nothing; print requests that change something."""
    if model.name == "CreateTrainingJob":
        print(json.dumps(json.loads(params["body"]), indent=2))
    elif model.service_model.service_name == "sagemaker" and model.name.startswith(("Create", "Delete")):
        print(json.dumps({model.name: json.loads(params["body"])}, indent=2))
    account = args.role.split(":")[4] if args.role else None  # probably yours
    answers = {
        "GetCallerIdentity": {"Account": account},
        "ListBuckets": {"Buckets": []},
        "CreateTrainingJob": {"TrainingJobArn": ""},
        "DescribeTrainingJob": {"TrainingJobName": getattr(args, "job_name", None)},
    }
    return AWSResponse("", 200, {}, None), answers.get(model.name, {})


def prepare(args, session):
    """Set and check the addresses of checkpoints and model; `session` is the SDK's."""
    if args.dry_run:  # the SDK sends its usage data without boto3
        session.sagemaker_config.setdefault("SchemaVersion", "1.0")
        modules = session.sagemaker_config.setdefault("SageMaker", {}).setdefault("PythonSDK", {})
        modules.setdefault("Modules", {})["TelemetryOptOut"] = True
    bucket = session.default_bucket()
    args.output = getattr(args, "output", None) or f"s3://{bucket}/"
    if args.instance_type in LOCAL or not getattr(args, "has_checkpoints", True):
        return
    args.checkpoints = args.checkpoints or args.resume_from or f"s3://{bucket}/{args.job_name}/checkpoints/"
    if not args.dry_run:
        _check_region(args, session)
    if args.resume_from and not args.dry_run and not has_objects(session, args.resume_from):
        raise ValueError(f"--resume-from {args.resume_from}: no objects found at this address")
    print(f"Checkpoints: {args.checkpoints}", file=sys.stderr)
    commands = [f"aws s3 ls --recursive {args.checkpoints}"]
    if hasattr(args, "entry_point"):
        script = Path(os.path.relpath(args.source_dir / args.entry_point))
        commands.append(f"python -m common.list_checkpoints {script} {args.checkpoints}")
    print(f"Browse them: {', or '.join(commands)}", file=sys.stderr)


def _check_region(args, session):
    """Raise ValueError if the bucket of the checkpoints does not exist, or is not in the job's Region."""
    bucket, _ = split_uri(args.checkpoints)
    try:
        answer = session.boto_session.client("s3").head_bucket(Bucket=bucket)
    except ClientError as error:  # the answer names the Region even without permission
        answer = error.response
    status = answer["ResponseMetadata"]
    if status["HTTPStatusCode"] == 404:
        raise ValueError(f"checkpoints at {args.checkpoints}: no such bucket: {bucket}")
    here = session.boto_region_name
    region = status["HTTPHeaders"].get("x-amz-bucket-region", here)
    if region != here:
        expected = "expected both in the same Region: pass another --checkpoints or --region"
        raise ValueError(f"the checkpoint bucket {bucket} is in {region} and the job in {here}: {expected}")


def has_objects(session, address):
    """Return whether S3 has an object whose address starts with this one; `session` is the SDK's."""
    bucket, prefix = split_uri(address)
    s3 = session.boto_session.client("s3")
    return s3.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)["KeyCount"] > 0


def forwarding_sigterm(*command):
    """Return `command` wrapped in a few lines of shell that forward SIGTERM from the container's process 1.

    Without them the signal, which SageMaker sends two minutes before it stops the container, does not reach
    the script.
    """
    lines = (ROOT / "launch/forward_sigterm/forward_sigterm.sh").read_text().splitlines()
    # SageMaker's API requires a single line. An & ends a command, like a semicolon.
    return ["bash", "-c", "; ".join(lines).replace("&;", "&"), "forward-sigterm", *command]


def print_savings(training_seconds, billable_seconds, spot):
    """Print time and cost of the job in the format of SDK v2; nothing for a job that never started."""
    if training_seconds:
        print(f"Training seconds: {training_seconds}")
    if training_seconds and billable_seconds:
        print(f"Billable seconds: {billable_seconds}")
        if spot:
            print(f"Managed Spot Training savings: {100 * (1 - billable_seconds / training_seconds):.1f}%")


def run(main, args, *sdk_errors):
    """Call `main(args)`; report a refusal by AWS or the SDK in one line, with exit code 1."""
    try:
        main(args)
    except (
        errors.UserError,
        ValueError,
        OSError,
        BotoCoreError,
        Boto3Error,
        ClientError,
        *sdk_errors,
    ) as error:
        errors.fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit("Stopped watching. The job or endpoint is still running: see SageMaker's console")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, with a hint at the end."""

    hint = "--help lists all flags"

    def error(self, message):
        """Exit with the message and the hint."""
        errors.fail(f"{message} ({self.hint})", code=2)


def address(text):
    """Return an address in S3 as it is."""
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{2,62}(/.*)?", text):
        raise argparse.ArgumentTypeError(f"expected an address such as s3://bucket/folder/, got {text!r}")
    return text


def folder(text):
    """Return the address of a folder in S3, with a slash at its end."""
    # S3 has no folders: without the slash .../job-1 also matches .../job-10.
    return address(text).rstrip("/") + "/"


def role(text):
    """Return the ARN of a role as it is."""
    if not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/.+", text):
        example = "arn:aws:iam::123456789012:role/SageMaker"
        raise argparse.ArgumentTypeError(f"expected the ARN of a role such as {example}, got {text!r}")
    return text


def name(text, limit=63):
    """Return a name as it is if SageMaker allows it."""
    if not re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*", text) or len(text) > limit:
        expected = f"expected at most {limit} letters, digits and hyphens"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return text


def _job_name(text):
    return name(text, limit=48)  # SDK v3 appends the time
