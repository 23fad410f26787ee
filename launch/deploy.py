r"""Deploy a trained model to a SageMaker endpoint with SDK v3: pip install "sagemaker>=3"

Look:    python launch/deploy.py pytorch --role arn:aws:iam::123456789012:role/SageMaker \
             --region us-east-1 --model-dir output/pytorch/model --dry-run
Deploy:  python launch/deploy.py pytorch --role ... --job pytorch-20261123-091500 --endpoint digits
Ask:     python launch/deploy.py pytorch --endpoint digits --request digit.png
Delete:  python launch/deploy.py pytorch --endpoint digits --delete

An endpoint is billed until you delete it, one with `--serverless` only while it answers. `--help` lists all
flags.
"""

import argparse
import gzip
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import job
from common import errors
from common.serving import SUFFIXES

MODEL_FILES = {
    "pytorch": "model.pth",
    "tensorflow": "1/saved_model.pb",
    "mxnet": "model-symbol.json",
    "xgboost": "xgboost-model",
}
INSTANCE_TYPE = "ml.m5.large"
MEMORY = 2048  # MB; the SDK's own default


def make_parser():
    """Return the parser of the flags."""
    parser = job.Parser(
        description="Deploy a trained model to a SageMaker endpoint (SDK v3).",
        usage="%(prog)s WHAT [--role ARN (--job NAME | --model-dir FOLDER)] [--endpoint NAME] [flags]",
        epilog="Credentials are found as in all AWS tools.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("what", choices=job.FRAMEWORKS, metavar="WHAT", help=f"what trained: {', '.join(job.FRAMEWORKS)}")
    add("--role", type=job.role, help="ARN of the IAM role that the endpoint runs with; needed to deploy")
    add("--region", help="AWS region; default: that of your AWS settings")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--job", type=job.name, help="deploy the model of this finished training job")
    action.add_argument("--model-dir", type=Path, help="deploy this folder, which a script has exported")
    action.add_argument(
        "--delete", action="store_true", help="delete the endpoint, its configuration and its model"
    )
    add("--endpoint", type=job.name, help="name of the endpoint; default: WHAT, and the time")
    add("--request", type=_request, help="file to send to the endpoint: JSON, CSV, .npy or an image")
    add("--instance-type", help=f"machine that serves (default: {INSTANCE_TYPE})")
    add("--serverless", action="store_true", help="without an instance: billed for each request")
    add(
        "--memory",
        type=int,
        choices=range(1024, 6145, 1024),
        metavar="MB",
        help=f"memory of a serverless endpoint: 1024, 2048, ... 6144 MB (default: {MEMORY})",
    )
    add("--image-uri", help="inference image; default: SageMaker's own")
    add("--bucket", help="bucket for --model-dir; default: the SDK's own, sagemaker-<region>-<account>")
    add("--no-wait", dest="wait", action="store_false", help="do not wait until the endpoint is in service")
    add("--dry-run", action="store_true", help="print the requests and send none; needs no credentials")
    return parser


def parse_args():
    """Return the flags; report a mistake before anything is created."""
    parser = make_parser()
    args = parser.parse_args()
    args.deploy = bool(args.job or args.model_dir)
    if args.deploy and not args.role:
        parser.error("--role is missing: expected the ARN of the IAM role that the endpoint runs with")
    if not args.deploy and not (args.delete or args.request):
        parser.error("nothing to do: add --job or --model-dir to deploy, --request to ask, or --delete")
    if not args.deploy and not args.endpoint:
        parser.error("--endpoint is missing: expected the name of an existing endpoint")
    if args.delete and args.request:
        parser.error("--request cannot be combined with --delete: send it first")
    if args.deploy and args.request and not args.wait:
        parser.error("--request needs an endpoint in service: leave out --no-wait")
    if args.serverless and args.instance_type:
        parser.error("--instance-type is not for serverless endpoints: choose their --memory")
    if args.memory and not args.serverless:
        parser.error("--memory is for serverless endpoints: add --serverless")
    problem = args.model_dir and _problem_of_folder(args.model_dir, MODEL_FILES[args.what])
    if problem:
        expected = f"expected what {args.what}/train.py has exported, such as output/{args.what}/model"
        parser.error(f"--model-dir {args.model_dir}: {problem}: {expected}")
    args.endpoint = args.endpoint or f"{args.what}-{time.strftime('%Y%m%d-%H%M%S')}"
    if args.dry_run:
        job.prepare_dry_run(args)
    return args


def _problem_of_folder(folder, model_file):
    if not folder.is_dir():
        return "no such folder"
    missing = [name for name in (model_file, "code/inference.py") if not (folder / name).is_file()]
    return f"{missing[0]} is missing" if missing else None


def _request(text):
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"expected a {', '.join(SUFFIXES)} file, got {text!r}")
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text!r}")
    return path


if __name__ == "__main__":
    args = parse_args()  # before the slow imports

with errors.importing("version 3 of SageMaker's Python SDK", 'Install it with: pip install "sagemaker>=3"'):
    from botocore.exceptions import ClientError, WaiterError
    from sagemaker.core import image_uris
    from sagemaker.core.helper.session_helper import Session

IMAGES = {  # the newest for inference; for training there are newer ones
    "pytorch": {"version": "2.6.0", "py_version": "py312"},
    "tensorflow": {"version": "2.20.0", "py_version": "py312"},
    "mxnet": {"version": "1.9.0", "py_version": "py38"},
    "xgboost": {"version": "3.2-0"},
}


def main(args):
    """Delete the endpoint, or create it if there is a model to deploy, and send the request."""
    session = Session(job.boto_session(args), default_bucket=args.bucket)
    if args.delete:
        delete(args, session)
    if args.deploy:
        deploy(args, session)
    if args.request:
        ask(args, session)


def deploy(args, session):
    """Create model, endpoint configuration and endpoint, all of the same name, and wait for the endpoint."""
    client, name = session.sagemaker_client, args.endpoint
    model_data = find_model(args, session) if args.job else upload_model(args, session)
    print(f"Model: {model_data}", file=sys.stderr)
    image_uri = args.image_uri or image_uris.retrieve(
        args.what,
        region=session.boto_region_name,
        instance_type=args.instance_type or INSTANCE_TYPE,  # a machine with GPUs gets another image
        image_scope="inference",
        **IMAGES[args.what],
    )
    environment = {"SAGEMAKER_REGION": session.boto_region_name, "SAGEMAKER_CONTAINER_LOG_LEVEL": "20"}
    if args.what != "tensorflow":  # its container finds code/inference.py by itself
        environment["SAGEMAKER_PROGRAM"] = "inference.py"
        environment["SAGEMAKER_SUBMIT_DIRECTORY"] = "/opt/ml/model/code"
    variant = {"VariantName": "AllTraffic", "ModelName": name}
    if args.serverless:
        variant["ServerlessConfig"] = {"MemorySizeInMB": args.memory or MEMORY, "MaxConcurrency": 5}
    else:
        variant.update(InstanceType=args.instance_type or INSTANCE_TYPE, InitialInstanceCount=1)

    created = []
    try:
        client.create_model(
            ModelName=name,
            PrimaryContainer={"Image": image_uri, "ModelDataUrl": model_data, "Environment": environment},
            ExecutionRoleArn=args.role,
        )
        created.append("model")
        client.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
        created.append("endpoint configuration")
        client.create_endpoint(EndpointName=name, EndpointConfigName=name)
        created.append("endpoint")
        if args.wait:
            print(f"Waiting for endpoint {name}, which takes some minutes", file=sys.stderr)
            wait(client, name)
    finally:
        if created and not args.dry_run:
            region = f" --region {args.region}" if args.region else ""
            command = f"python launch/deploy.py {args.what}{region} --endpoint {name} --delete"
            print(f"Created {', '.join(created)} {name}. To delete: {command}", file=sys.stderr)


def find_model(args, session):
    """Return the address of the model of a finished training job."""
    if args.dry_run:  # the output address of the launchers
        return f"s3://{session.default_bucket()}/{args.job}/output/model.tar.gz"
    described = session.sagemaker_client.describe_training_job(TrainingJobName=args.job)
    status = described["TrainingJobStatus"]
    if status not in ("Completed", "Stopped"):
        reason = described.get("FailureReason", "no reason is given")
        detail = f" ({reason})" if status == "Failed" else ""
        raise ValueError(f"--job {args.job} is {status}{detail}: expected a job that is Completed or Stopped")
    address = described.get("ModelArtifacts", {}).get("S3ModelArtifacts")
    if not address or not job.has_objects(session, address):
        place = f"at {address}" if address else "in S3"
        raise ValueError(f"--job {args.job} is {status}, but has no model {place}: resume it until it ends")
    return address


def upload_model(args, session):
    """Upload the model folder as an archive, and return its address."""
    bucket, key = session.default_bucket(), f"{args.endpoint}/model.tar.gz"
    if not args.dry_run:
        with tempfile.TemporaryFile() as file:
            pack(args.model_dir, file)
            file.seek(0)
            session.boto_session.client("s3").upload_fileobj(file, bucket, key)
    return f"s3://{bucket}/{key}"


def pack(folder, file):
    """Write a folder to an open file as a .tar.gz, whose bytes depend only on the content of the files."""

    def without_owner_and_time(entry):
        if Path(entry.name).name == "__pycache__":
            return None
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    # Weights hardly compress: a higher level would only take time.
    compressed = gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0)
    with compressed, tarfile.open(fileobj=compressed, mode="w", dereference=True) as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name, filter=without_owner_and_time)  # at the root of the archive


def wait(client, name):
    """Wait until the endpoint is in service; raise ValueError with SageMaker's reason if it fails."""
    try:
        client.get_waiter("endpoint_in_service").wait(EndpointName=name)
    except WaiterError as error:
        status = error.last_response.get("EndpointStatus", "not in service")
        reason = error.last_response.get("FailureReason", error)
        log = f"its log in CloudWatch is /aws/sagemaker/Endpoints/{name}"
        raise ValueError(f"endpoint {name} is {status}: {reason} ({log})") from error


def ask(args, session):
    """Send the file to the endpoint and print the answer."""
    request = {
        "EndpointName": args.endpoint,
        "ContentType": SUFFIXES[args.request.suffix.lower()],
        "Accept": "application/json",
    }
    body = args.request.read_bytes()
    if args.dry_run:
        print(json.dumps({"InvokeEndpoint": {**request, "Body": f"{len(body)} bytes"}}, indent=2))
    else:
        answer = session.sagemaker_runtime_client.invoke_endpoint(**request, Body=body)
        print(answer["Body"].read().decode())


def delete(args, session):
    """Delete endpoint, endpoint configuration and model; skip those that do not exist."""
    calls = {
        "endpoint": session.delete_endpoint,
        "endpoint configuration": session.delete_endpoint_config,
        "model": session.delete_model,
    }
    deleted = []
    for kind, call in calls.items():
        try:
            call(args.endpoint)
            deleted.append(kind)
        except ClientError as error:
            if "Could not find" not in str(error):
                raise
    if not deleted:
        raise ValueError(
            f"--endpoint {args.endpoint}: no endpoint, endpoint configuration or model of this name "
            f"in {session.boto_region_name}: check the name and --region"
        )
    if not args.dry_run:
        print(f"Deleted {', '.join(deleted)} {args.endpoint}", file=sys.stderr)


if __name__ == "__main__":
    job.run(main, args)
