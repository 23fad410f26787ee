"""The launchers: their requests to SageMaker and the uploaded code; a moto server replaces AWS."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import boto3
import pytest
from moto.sagemaker.models import FakeEndpoint, FakeTrainingJob
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemakerruntime.responses import SageMakerRuntimeResponse
from moto.server import ThreadedMotoServer

from helpers import FRAMEWORKS, LATER, ROOT, Result, environment

sys.path.append(str(ROOT / "launch"))
import job

SDK = {"estimator": 2, "model_trainer": 3, "built_in": 2}
ROLE = "arn:aws:iam::123456789012:role/SageMaker"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "my-secret",
    "AWS_SESSION_TOKEN": "my-token",
}
DATA = ("--train", "s3://data/train/", "--validation", "s3://data/validation/")
IMAGE_FLAGS = ("--num-classes", "10", "--num-training-samples", "1000")
MASKS = ("--train-annotation", "s3://data/masks/", "--validation-annotation", "s3://data/more-masks/")
BUILT_IN = {  # their required flags
    "xgboost": (*DATA, "--", "--num-round", "10"),
    "image-classification": (*DATA, "--", *IMAGE_FLAGS),
    "object-detection": (*DATA, "--", *IMAGE_FLAGS),
    "semantic-segmentation": (*DATA, *MASKS, "--", *IMAGE_FLAGS),
}
OURS = ("estimator", "model_trainer")  # launchers of our scripts
ALL = [(launcher, framework) for launcher in OURS for framework in ("pytorch", "xgboost")]
ALL += [("built_in", algorithm) for algorithm in BUILT_IN]
ALL += [
    pytest.param(launcher, framework, marks=LATER)
    for launcher in OURS
    for framework in ("tensorflow", "mxnet")
]

# Python runs this at its start: looking up or calling another machine raises an error and is recorded.
NO_NETWORK = """
import os, socket

def guarded(function, address_of):
    def call(*args, **options):
        host = address_of(args)
        if host not in (None, "localhost", "127.0.0.1", "::1"):
            with open(os.environ["CALLED_HOSTS"], "a") as file:
                file.write(f"{host}\\n")
            raise OSError(f"no network in this test, and {host} was called")
        return function(*args, **options)
    return call

def host_of(address):
    return address[0] if isinstance(address, tuple) else None

socket.getaddrinfo = guarded(socket.getaddrinfo, lambda args: args[0])
for name in ("connect", "connect_ex", "sendto"):
    method = getattr(socket.socket, name)
    setattr(socket.socket, name, guarded(method, lambda args: host_of(args[-1])))
"""


def python(sdk):
    folder = ROOT / f".venv-sdk{sdk}"
    if not (folder / "installed").exists():
        pytest.fail(f"{folder} is missing: run make test")
    return str(folder / "bin/python")


@pytest.fixture
def launch(tmp_path):
    """Return a function that runs a launcher in an empty folder, without AWS settings and network."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start/sitecustomize.py").write_text(NO_NETWORK)
    (tmp_path / "here").mkdir()
    called = tmp_path / "called"

    def run(launcher, *words, code=0, sdk=None, **variables):
        env = {name: value for name, value in environment().items() if not name.startswith("AWS_")}
        env.update(HOME=str(tmp_path / "home"), CALLED_HOSTS=str(called))
        env["PYTHONPATH"] = f"{tmp_path / 'start'}:{ROOT / 'launch'}"
        script = launcher if launcher == "-c" else str(ROOT / "launch" / f"{launcher}.py")
        command = [python(sdk or SDK[launcher]), script, *words]
        finished = subprocess.run(
            command,
            cwd=tmp_path / "here",
            env={**env, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )
        result = Result(finished, finished.stdout, finished.stderr)
        assert result.code == code, f"exit code {result.code}\n{result.output}\n{result.errors}"
        assert not called.exists(), called.read_text()
        assert {path.name for path in (tmp_path / "here").iterdir()} <= {"output"}  # the output of local mode
        return result

    return run


class AWS:
    """A moto server, and the requests for training jobs that it has received."""

    def __init__(self, address, config):
        self.requests = []
        self.variables = {
            **SECRETS,
            "AWS_ENDPOINT_URL": address,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "SAGEMAKER_USER_CONFIG_OVERRIDE": str(config),
            "SAGEMAKER_VALIDATE_ROLE": "false",  # moto does not know the permissions of a role
        }
        session = boto3.Session("testing", "testing", region_name="us-east-1")
        self.s3 = session.client("s3", endpoint_url=address)
        self.sagemaker = session.client("sagemaker", endpoint_url=address)

    def download(self, uri, folder):
        """Copy all objects below an address into a folder, as SageMaker does."""
        bucket, _, prefix = uri[len("s3://") :].partition("/")
        for item in self.s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
            path = folder / (item["Key"][len(prefix) :].lstrip("/") or "file")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.s3.download_file(bucket, item["Key"], str(path))


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    config = tmp_path_factory.mktemp("sdk") / "config.yaml"
    config.write_text("SchemaVersion: '1.0'\nSageMaker: {PythonSDK: {Modules: {TelemetryOptOut: true}}}\n")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    aws = AWS(f"http://{host}:{port}", config)
    init = FakeTrainingJob.__init__

    def recording(create):
        def record(self):
            aws.requests.append(json.loads(self.body))
            return create(self)

        return record

    def bill(self, *args, **options):
        init(self, *args, **options)
        self.training_time_in_seconds, self.billable_time_in_seconds = 100, 30

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_training_job", "create_hyper_parameter_tuning_job", "create_pipeline"):
            patch.setattr(SageMakerResponse, name, recording(getattr(SageMakerResponse, name)))
        patch.setattr(FakeTrainingJob, "__init__", bill)
        yield aws
    server.stop()


def printed_request(result):
    return json.loads(result.output)


def flags_of(launcher, what, *flags):
    """Return the words of a command line, with the required flags of a built-in algorithm."""
    needed = BUILT_IN[what] if launcher == "built_in" else ("--",)
    end = needed.index("--")
    return (what, "--role", ROLE, *flags, *needed[:end], *needed[end:])


def dry_run(launch, launcher, what, *flags, code=0, region="us-east-1"):
    return launch(launcher, *flags_of(launcher, what, "--region", region, "--dry-run", *flags), code=code)


# Requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("launcher", "what"), ALL)
def test_a_dry_run_prints_the_request_and_needs_neither_credentials_nor_a_network(launch, launcher, what):
    flags = ("--spot", "--max-run", "600", "--job-name", "my-job", "--checkpoints", "s3://my-bucket/job-1")
    request = printed_request(dry_run(launch, launcher, what, *flags))
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 1200}
    assert request["CheckpointConfig"] == {
        "S3Uri": "s3://my-bucket/job-1/",
        "LocalPath": "/opt/ml/checkpoints",
    }
    assert request["TrainingJobName"].startswith("my-job")
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://sagemaker-us-east-1-123456789012/"
    assert request["ResourceConfig"]["InstanceCount"] == 1
    specification = request["AlgorithmSpecification"]
    assert what in specification["TrainingImage"]
    assert ".us-east-1." in specification["TrainingImage"]
    if launcher == "built_in":
        assert "ContainerEntrypoint" not in specification
        assert "MetricDefinitions" not in specification
    else:
        # SageMaker refuses them for its own XGBoost image.
        expected = None if what == "xgboost" else job.report.metric_definitions()
        assert specification.get("MetricDefinitions") == expected
        assert len(expected or []) <= 40
        entry_point = specification["ContainerEntrypoint"]
        stock = ["train"] if launcher == "estimator" else ["/bin/bash", "-c"]
        assert entry_point[:2] + entry_point[3 : 4 + len(stock)] == ["bash", "-c", "forward-sigterm", *stock]
        assert "ContainerArguments" not in specification
        assert all(len(word) <= 256 and "\n" not in word for word in entry_point)


@pytest.mark.parametrize("launcher", OURS)
def test_without_spot_instances_are_on_demand(launch, launcher):
    request = printed_request(dry_run(launch, launcher, "pytorch"))
    assert not request.get("EnableManagedSpotTraining")
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600}
    checkpoints = request["CheckpointConfig"]["S3Uri"]
    assert checkpoints.startswith("s3://sagemaker-us-east-1-123456789012/pytorch-")
    assert checkpoints.endswith("/checkpoints/")


@pytest.mark.parametrize("launcher", OURS)
def test_an_image_of_your_own(launch, launcher):
    uri = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/my-xgboost:1"
    words = flags_of(launcher, "xgboost", "--image-uri", uri, "--region", "eu-west-1", "--dry-run")
    script = ("--eval-metric", "auc,logloss", "--best-metric", "f1:max")
    specification = printed_request(launch(launcher, *words, *script))["AlgorithmSpecification"]
    assert specification["TrainingImage"] == uri
    assert specification["MetricDefinitions"] == job.report.metric_definitions(("auc", "loss", "f1"))
    assert specification["ContainerEntrypoint"][3] == "forward-sigterm"


@pytest.mark.parametrize("launcher", OURS)
def test_initial_weights_are_the_channel_model(launch, launcher):
    request = printed_request(dry_run(launch, launcher, "pytorch", "--weights", "s3://data/weights/"))
    channels = {channel["ChannelName"]: channel["DataSource"] for channel in request["InputDataConfig"]}
    assert channels["model"]["S3DataSource"]["S3Uri"] == "s3://data/weights/"


def test_several_machines_share_the_files_of_xgboost(launch):
    request = printed_request(dry_run(launch, "built_in", "xgboost", "--instance-count", "2"))
    sources = [channel["DataSource"]["S3DataSource"] for channel in request["InputDataConfig"]]
    assert [source["S3DataDistributionType"] for source in sources] == ["ShardedByS3Key"] * 2
    assert request["ResourceConfig"]["InstanceCount"] == 2


@pytest.mark.parametrize("launcher", OURS)
@pytest.mark.parametrize(
    ("framework", "instance", "torchrun", "image"),
    [
        ("pytorch", "ml.g5.12xlarge", True, ()),
        ("pytorch", "ml.m5.xlarge", False, ()),
        pytest.param(
            "pytorch", "ml.p4d.24xlarge", True, ("--image-uri", "my.registry/my-pytorch:1"), marks=LATER
        ),
        pytest.param("mxnet", "ml.g5.xlarge", False, (), marks=LATER),
    ],
)
def test_several_machines_train_together(launch, launcher, framework, instance, torchrun, image):
    """On GPUs torchrun starts one process per GPU in PyTorch; otherwise the scripts need no launcher."""
    flags = ("--instance-count", "2", "--instance-type", instance, *image)
    request = printed_request(dry_run(launch, launcher, framework, *flags))
    assert request["ResourceConfig"]["InstanceCount"] == 2
    assert request["AlgorithmSpecification"]["ContainerEntrypoint"][3] == "forward-sigterm"
    if launcher == "estimator":
        assert request["HyperParameters"].get("sagemaker_torch_distributed_enabled") == (
            "true" if torchrun else None
        )


@pytest.mark.parametrize("launcher", OURS)
@pytest.mark.parametrize("framework", ["pytorch", "xgboost"])
def test_the_request_arrives_and_the_uploaded_code_runs(launch, aws, tmp_path, launcher, framework):
    """The XGBoost script is a copy, with another name and an additional flag."""
    flags, script = ("--bucket", "my-bucket", "--spot", "--no-wait", *DATA), ROOT / framework / "train.py"
    own = ()
    if framework == "xgboost":
        code = script.read_text().replace(
            "return parser.parse", 'parser.add_argument("--own")\n    return parser.parse'
        )
        script = Path(shutil.copytree(ROOT / "xgboost", tmp_path / "my-job"), "main.py")
        script.write_text(code)
        own = ("--own", "x")
        flags += ("--source-dir", str(script.parent), "--entry-point", script.name)
    result = launch(
        launcher,
        *flags_of(launcher, framework, *flags),
        "--epochs=1",
        "--resume_anyway",
        "--seed",
        "7",
        *own,
        **aws.variables,
    )
    assert not [secret for secret in SECRETS.values() if secret in result.output + result.errors]
    request = aws.requests[-1]
    assert request["RoleArn"] == ROLE
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 7200}
    checkpoints = request["CheckpointConfig"]
    assert checkpoints["LocalPath"] == "/opt/ml/checkpoints"
    assert checkpoints["S3Uri"].startswith(f"s3://my-bucket/{framework}-")
    assert checkpoints["S3Uri"].endswith("/checkpoints/")
    assert f"Checkpoints: {checkpoints['S3Uri']}\n" in result.errors
    listing = f"{os.path.relpath(script, tmp_path / 'here')} {checkpoints['S3Uri']}\n"
    assert f", or python -m common.list_checkpoints {listing}" in result.errors
    specification = request["AlgorithmSpecification"]
    assert specification.get("MetricDefinitions") == (
        None if framework == "xgboost" else job.report.metric_definitions()
    )
    assert specification["ContainerEntrypoint"][3] == "forward-sigterm"
    channels = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"]
        for channel in request["InputDataConfig"]
    }
    assert (channels["train"], channels["validation"]) == ("s3://data/train/", "s3://data/validation/")

    # The container unpacks the source and calls the script with the hyperparameters.
    source, values = tmp_path / "source", request["HyperParameters"]
    if launcher == "estimator":
        values = {name: json.loads(value) for name, value in values.items()}
        assert values["sagemaker_program"] == script.name
        aws.download(values["sagemaker_submit_directory"], tmp_path / "archive")
        with tarfile.open(tmp_path / "archive/file") as archive:
            archive.extractall(source, filter="data")
        values = {name: value for name, value in values.items() if not name.startswith("sagemaker_")}
    else:
        aws.download(channels["code"], source)
        aws.download(channels["sm_drivers"], tmp_path / "drivers")
        assert (tmp_path / "drivers/sm_train.sh").exists()
    assert values == {"epochs": "1", "resume-anyway": "True", "seed": "7", **({"own": "x"} if own else {})}
    assert not (source / "common").is_symlink()
    words = [word for name in values for word in (f"--{name}", values[name])]
    command = [sys.executable, script.name, *words, "--checkpoint-path", str(tmp_path / "checkpoints")]
    finished = subprocess.run(
        command, cwd=source, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert Result(finished, finished.stdout, finished.stderr).epochs == [1]
    assert len(os.listdir(tmp_path / "checkpoints")) == 1


@pytest.mark.parametrize(
    ("instance", "driver"), [("ml.g5.12xlarge", "torchrun_driver"), ("ml.m5.xlarge", "basic_sc")]
)
def test_the_driver_that_sdk_v3_uploads_uses_torchrun(launch, aws, tmp_path, instance, driver):
    flags = ("--bucket", "my-bucket", "--no-wait", "--instance-type", instance)
    launch("model_trainer", *flags_of("model_trainer", "pytorch", *flags), **aws.variables)
    channels = {channel["ChannelName"]: channel for channel in aws.requests[-1]["InputDataConfig"]}
    aws.download(channels["sm_drivers"]["DataSource"]["S3DataSource"]["S3Uri"], tmp_path)
    assert driver in (tmp_path / "sm_train.sh").read_text()


@pytest.mark.parametrize("launcher", SDK)
def test_a_second_job_continues_from_the_checkpoints_of_the_first(launch, aws, launcher):
    what = "xgboost"
    aws.s3.create_bucket(Bucket=f"old-{launcher.replace('_', '-')}")
    address = f"s3://old-{launcher.replace('_', '-')}/job-1/checkpoints"
    flags = flags_of(launcher, what, "--bucket", "my-bucket", "--spot", "--no-wait", "--resume-from", address)
    num_requests = len(aws.requests)

    result = launch(launcher, *flags, code=1, **aws.variables)
    assert result.error_line == f"error: --resume-from {address}/: no objects found at this address"
    assert len(aws.requests) == num_requests

    aws.s3.put_object(Bucket=address.split("/")[2], Key="job-1/checkpoints/xgboost-checkpoint.0", Body=b"")
    launch(launcher, *flags, **aws.variables)
    assert len(aws.requests) == num_requests + 1
    assert aws.requests[-1]["CheckpointConfig"]["S3Uri"] == f"{address}/"


@pytest.mark.parametrize("launcher", OURS)
def test_the_savings_are_printed_at_the_end(launch, aws, launcher):
    result = launch(
        launcher, *flags_of(launcher, "pytorch", "--bucket", "my-bucket", "--spot"), **aws.variables
    )
    expected = ["Training seconds: 100", "Billable seconds: 30", "Managed Spot Training savings: 70.0%"]
    assert result.output.rstrip().endswith("\n".join(expected))


def test_a_job_that_never_started_has_no_savings(capsys):
    job.print_savings(None, None, spot=True)
    job.print_savings(50, None, spot=True)
    job.print_savings(50, 50, spot=False)
    assert capsys.readouterr().out.splitlines() == ["Training seconds: 50"] * 2 + ["Billable seconds: 50"]


SETTINGS = ("volume_size_in_gb=200", "keep_alive_period_in_seconds=600", "enable_network_isolation=true")
SETTINGS += ("kms_key_id=0123", "environment.A=1", "environment.B=b=c", "maximum_retry_attempts=3")
SETTINGS += ("s3_output_path=s3://my-bucket/models/", "ignore_patterns=a,b")


def test_the_other_settings_arrive_too(launch, aws):
    flags = [
        "--bucket",
        "my-bucket",
        "--no-wait",
        "--tags",
        "team=vision",
        "cost=a=b",
        "--vpc",
        "sg-1",
        "subnet-2",
    ]
    for setting in SETTINGS:
        flags += ["--set", setting]
    launch("model_trainer", *flags_of("model_trainer", "mxnet", *flags), **aws.variables)
    request = aws.requests[-1]
    assert request["Tags"] == [{"Key": "team", "Value": "vision"}, {"Key": "cost", "Value": "a=b"}]
    assert request["VpcConfig"] == {"SecurityGroupIds": ["sg-1"], "Subnets": ["subnet-2"]}
    assert request["ResourceConfig"]["VolumeSizeInGB"] == 200
    assert request["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600
    assert request["EnableNetworkIsolation"] is True
    assert request["OutputDataConfig"]["KmsKeyId"] == "0123"
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://my-bucket/models/"
    assert request["Environment"] == {"A": "1", "B": "b=c"}
    assert request["RetryStrategy"] == {"MaximumRetryAttempts": 3}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "volum_size=2",
            "--set volum_size is unknown: expected one of 51 names, the nearest are volume_size_in",
        ),
        ("volume_size_in_gb=big", "--set volume_size_in_gb=big: input should be a valid integer"),
        ("instance_type=ml.m5.large", "--set instance_type: the launcher sets it; --help lists its flags"),
        ("environment=1", "--set environment=1: input should be a valid dictionary"),
    ],
)
def test_a_wrong_setting_is_one_line(launch, setting, message):
    assert message in dry_run(launch, "model_trainer", "pytorch", "--set", setting, code=1).error_line


@pytest.mark.parametrize("launcher", SDK)
def test_a_launcher_has_at_most_22_flags(launch, launcher):
    names = re.findall("^  (--[a-z-]+)", launch(launcher, "--help").output, re.MULTILINE)
    assert {"--role", "--dry-run"} < set(names)
    assert len(names) <= 22


@pytest.mark.parametrize("launcher", SDK)
def test_a_checkpoint_bucket_in_another_region_is_refused(launch, aws, launcher):
    with contextlib.suppress(aws.s3.exceptions.BucketAlreadyOwnedByYou):
        aws.s3.create_bucket(Bucket="far", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    num_requests = len(aws.requests)
    for address, reason in (
        (
            "s3://far/1/",
            "the checkpoint bucket far is in eu-west-1 and the job in us-east-1: expected both in",
        ),
        ("s3://never-made/1/", "checkpoints at s3://never-made/1/: no such bucket: never-made"),
    ):
        words = flags_of(launcher, "xgboost", "--bucket", "my-bucket", "--checkpoints", address)
        assert launch(launcher, *words, code=1, **aws.variables).error_line.startswith(f"error: {reason}")
    assert len(aws.requests) == num_requests


def test_an_algorithm_without_checkpoints_gets_no_checkpoint_address(launch):
    flags = ("--role", ROLE, "--region", "us-east-1", "--dry-run", *DATA, "--spot", "--max-wait", "3600")
    request = printed_request(launch("built_in", "kmeans", *flags, "--", "--k", "10"))
    assert "CheckpointConfig" not in request
    assert request["StoppingCondition"]["MaxWaitTimeInSeconds"] == 3600
    assert "/kmeans:1" in request["AlgorithmSpecification"]["TrainingImage"]


# In Python: local mode, a pipeline, a tuner -----------------------------------------------------------------

DOCKER = """#!{python}
import pathlib, sys
if sys.argv[1:3] == ["compose", "version"]:
    print("Docker Compose version v2.30.0")
elif sys.argv[1] == "compose":
    print(pathlib.Path(sys.argv[sys.argv.index("-f") + 1]).read_text())
"""


@pytest.mark.parametrize("launcher", OURS)
def test_local_mode_needs_docker_and_no_address(launch, aws, tmp_path, launcher):
    (tmp_path / "bin").mkdir()
    words = flags_of(launcher, "pytorch", "--bucket", "my-bucket", "--instance-type", "local")
    image = ("--image-uri", "my-image:1")
    words = (*words[:-1], *image, "--", "--epochs", "1")
    env = {**aws.variables, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    docker = tmp_path / "bin/docker"
    docker.write_text("#!/bin/sh\necho The daemon is not running >&2; exit 1\n")
    docker.chmod(0o755)
    expected = "error: --instance-type local needs Docker on this machine: The daemon is not running (--help"
    assert launch(launcher, *words, code=2, **env).error_line.startswith(expected)
    docker.write_text(DOCKER.format(python=sys.executable))
    num_requests = len(aws.requests)
    result = launch(launcher, *words, **env)
    assert "image: my-image:1" in result.output + result.errors
    assert "forward-sigterm" in result.output + result.errors
    assert len(aws.requests) == num_requests


PIPELINES = {
    "estimator": """
from sagemaker.workflow.pipeline import Pipeline
from sagemaker.workflow.pipeline_context import PipelineSession
from sagemaker.workflow.steps import TrainingStep
import estimator
args = estimator.parse_args(FLAGS)
session = PipelineSession(default_bucket="my-bucket")
step = TrainingStep("train", step_args=estimator.make_estimator(args, session).fit(args.channels))
Pipeline("PIPELINE", steps=[step], sagemaker_session=session).create(args.role)
""",
    "model_trainer": """
from sagemaker.core.workflow.pipeline_context import PipelineSession
from sagemaker.mlops.workflow.pipeline import Pipeline
from sagemaker.mlops.workflow.steps import TrainingStep
import model_trainer
args = model_trainer.parse_args(FLAGS)
session = PipelineSession(default_bucket="my-bucket")
step = TrainingStep("train", step_args=model_trainer.make_trainer(args, session).train())
Pipeline("PIPELINE", steps=[step], sagemaker_session=session).create(args.role)
""",
}


@pytest.mark.parametrize("launcher", OURS)
def test_a_step_of_a_pipeline(launch, aws, launcher):
    flags = ["pytorch", "--role", ROLE, "--spot", *DATA, "--", "--epochs", "3"]
    name = launcher.replace("_", "-")
    code = PIPELINES[launcher].replace("FLAGS", str(flags)).replace("PIPELINE", name)
    launch("-c", code, sdk=SDK[launcher], **aws.variables)
    [step] = json.loads(aws.requests[-1]["PipelineDefinition"])["Steps"]
    request = step["Arguments"]
    assert request["AlgorithmSpecification"]["ContainerEntrypoint"][3] == "forward-sigterm"
    assert request["CheckpointConfig"]["S3Uri"].startswith("s3://my-bucket/pytorch-")
    assert request["EnableManagedSpotTraining"] is True
    channels = {channel["ChannelName"] for channel in request["InputDataConfig"]}
    assert {"train", "validation"} <= channels


TUNER = """
from sagemaker.core.parameter import ContinuousParameter
import model_trainer, tuner
args = model_trainer.parse_args(FLAGS)
ranges = {"learning-rate": ContinuousParameter(0.001, 0.1)}
tuner.make_tuner(args, "OBJECTIVE", ranges, max_jobs=8, max_parallel_jobs=2).tune(wait=False)
"""


def test_a_tuner_forwards_sigterm_and_uploads_all_files(launch, aws, tmp_path):
    flags = ["pytorch", "--role", ROLE, "--spot", "--bucket", "my-bucket", *DATA]
    flags += ["--instance-type", "ml.p4d.24xlarge", "--set", "environment.A=1", "--", "--epochs", "3"]
    code = TUNER.replace("FLAGS", str(flags)).replace("OBJECTIVE", "loss")
    launch("-c", code, sdk=3, **aws.variables)
    request = aws.requests[-1]
    config, definition = request["HyperParameterTuningJobConfig"], request["TrainingJobDefinition"]
    objective = config["HyperParameterTuningJobObjective"]
    assert objective == {"Type": "Minimize", "MetricName": "validation:loss"}
    assert config["ParameterRanges"]["ContinuousParameterRanges"][0]["Name"] == "learning-rate"
    specification = definition["AlgorithmSpecification"]
    assert specification["MetricDefinitions"] == job.report.metric_definitions()
    assert definition["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert definition["EnableManagedSpotTraining"] is True
    channels = {
        each["ChannelName"]: each["DataSource"]["S3DataSource"] for each in definition["InputDataConfig"]
    }
    assert channels["train"]["S3Uri"] == "s3://data/train/"
    folder = "/opt/ml/input/data/sm_forward_sigterm"
    assert definition["Environment"] == {"A": "1", "PYTHONPATH": folder, "BASH_ENV": f"{folder}/bash_env.sh"}
    aws.download(channels["sm_forward_sigterm"]["S3Uri"], tmp_path / "files")
    uploaded = {path.name for path in (tmp_path / "files").iterdir()}
    assert uploaded >= {"sitecustomize.py", "bash_env.sh", "forward_sigterm.sh"}
    values = definition["StaticHyperParameters"]
    assert (values["epochs"], values["sagemaker_program"]) == ("3", "train.py")
    assert json.loads(values["sagemaker_torch_distributed_enabled"].lower()) is True
    aws.download(values["sagemaker_submit_directory"], tmp_path / "archive")
    with tarfile.open(tmp_path / "archive/file") as archive:
        assert {"train.py", "engine.py", "common/run.py"} <= set(archive.getnames())


# Errors before anything is sent -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--spot", "--max-run", "600", "--max-wait", "599"], "--max-wait 599 is less than --max-run 600"),
        (["--max-wait", "599"], "--max-wait is for Spot instances: add --spot"),
        (["--max-run", "0"], "argument --max-run: expected a whole number of at least 1, got '0'"),
        (["--checkpoints", "/opt/ml"], "expected an address such as s3://bucket/folder/, got '/opt/ml'"),
        (["--checkpoints", "s3://abc/1", "--resume-from", "s3://abc/2"], "not allowed with argument"),
        (["--role", "SageMaker"], "expected the ARN of a role such as arn:aws:iam::123456789012:role/"),
        (["--job-name", "my_job"], "expected at most 48 letters, digits and hyphens, got 'my_job'"),
        (["--epochs", "5"], "unrecognized arguments: --epochs 5 (--help lists all flags; those of the"),
        (["--", "--epoch", "5"], "unknown flag --epoch: did you mean --epochs?"),
        (["--", "--epochs", "none"], "argument --epochs: expected a whole number of at least 1, got 'none'"),
        (["--", "5"], "unexpected argument '5': expected --flag value"),
        (["--", "--checkpoint_path", "here"], "--checkpoint-path cannot be passed after `--`: in the cloud"),
        (
            ["--", "--weights", "here"],
            "--weights cannot be passed after `--`: in the cloud SageMaker sets it",
        ),
        (["--source-dir", "nowhere"], "there is no script nowhere/train.py"),
        (["--instance-type", "local", "--spot"], "--spot is for jobs on SageMaker: leave it out with --ins"),
        (
            ["--", "--best-metric", "f"],
            "--best-metric: is more of f better or less? Pass --best-metric f:max",
        ),
        (["--", "--output=here"], "--output cannot be passed after `--`: in the cloud SageMaker sets it"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["estimator.py", "pytorch", "--role", ROLE, *words])
    with pytest.raises(SystemExit) as exit:
        job.parse_script_args(job.make_script_parser(""))
    assert exit.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("launcher", SDK)
def test_a_wrong_flag_is_found_before_anything_is_sent(launch, aws, launcher):
    num_requests = len(aws.requests)
    words = flags_of(launcher, "xgboost", "--spot", "--max-wait", "1", "--bucket", "never-made")
    result = launch(launcher, *words, code=2, **aws.variables)
    assert result.error_line.startswith("error: --max-wait 1 is less than --max-run 3600")
    if launcher != "built_in":
        words = flags_of(launcher, "xgboost", "--bucket", "never-made")
        result = launch(launcher, *words, "--max-dept", "3", code=2, **aws.variables)
        assert result.error_line.startswith("error: unknown flag --max-dept: did you mean --max-depth?")
    assert len(aws.requests) == num_requests
    assert "never-made" not in [bucket["Name"] for bucket in aws.s3.list_buckets()["Buckets"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image-classification"], "image-classification needs --train"),
        (["image-classification", *DATA], "image-classification needs --num-classes after `--`"),
        (["semantic-segmentation", *DATA], "semantic-segmentation needs --train-annotation"),
        (
            ["kmeans", *DATA, "--spot"],
            "--max-wait 7200: kmeans saves no checkpoints, so SageMaker waits",
        ),
        (["kmeans", *DATA, "--resume-from", "s3://abc/1"], "kmeans saves no checkpoints: leave out --checkp"),
        (
            ["semantic-segmentation", "--instance-count", "2", *BUILT_IN["semantic-segmentation"]],
            "--instance-count 2: semantic-segmentation trains on one machine",
        ),
    ],
)
def test_a_built_in_algorithm_has_required_flags(launch, words, message):
    result = launch("built_in", "--role", ROLE, *words, code=2)
    assert result.error_line.startswith(f"error: {message}")


@pytest.mark.parametrize("launcher", OURS)
def test_missing_settings_and_refusals_by_aws_are_one_line(launch, aws, launcher):
    words = flags_of(launcher, "xgboost")
    result = launch(launcher, *words, code=1, AWS_EC2_METADATA_DISABLED="true")
    assert result.error_line.startswith("error: no AWS region: add --region")
    without = {name: value for name, value in aws.variables.items() if name not in SECRETS}
    assert launch(launcher, *words, code=1, **without).error_line == "error: Unable to locate credentials"
    words = flags_of(
        launcher, "xgboost", "--bucket", "my-bucket", "--no-wait", "--instance-type", "ml.nonsense"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SageMakerResponse, "create_training_job", refuse)
        result = launch(launcher, *words, code=1, **aws.variables)
    assert "quota" in result.error_line


def refuse(self):
    from moto.sagemaker.exceptions import AWSValidationException

    raise AWSValidationException("no such instance type in your quota")


@pytest.mark.parametrize(("launcher", "sdk"), [("estimator", 3), ("model_trainer", 2), ("built_in", 3)])
def test_the_other_sdk_is_one_line_with_the_command_that_installs_the_right_one(launch, launcher, sdk):
    result = launch(launcher, *flags_of(launcher, "xgboost", "--dry-run"), code=1, sdk=sdk)
    assert f"needs version {SDK[launcher]} of SageMaker's Python SDK" in result.error_line
    right = {2: '"sagemaker<3"', 3: '"sagemaker>=3"'}[SDK[launcher]]
    assert result.error_line.endswith(f"Install it with: pip install {right}")


# An endpoint ------------------------------------------------------------------------------------------------

MODELS = {
    "pytorch": ["model.pth", "model.json"],
    "tensorflow": ["1/saved_model.pb", "1/variables/variables.index", "model.json"],
    "mxnet": ["model-symbol.json", "model-0000.params", "model.json"],
    "xgboost": ["xgboost-model", "code/model.json"],
}
CODE = ["code/inference.py", "code/train.py", "code/common/__init__.py"]
SERVING_IMAGES = {
    "pytorch": "/pytorch-inference:2.6.0-cpu-py312",
    "tensorflow": "/tensorflow-inference:2.20.0-cpu-py312",
    "mxnet": "/mxnet-inference:1.9.0-cpu-py38",
    "xgboost": "/sagemaker-xgboost:3.2-0",
}


@pytest.fixture
def model(tmp_path):
    """Return a function that makes a folder with the file names of an exported model."""

    def make(framework):
        for name in [*MODELS[framework], *CODE, "code/__pycache__/train.pyc"]:
            path = tmp_path / "model" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        (tmp_path / "request.json").write_text("[[0, 1]]")
        return str(tmp_path / "model")

    return make


def deploy(launch, *words, **options):
    return launch("deploy", *words, sdk=3, **options)


def printed_requests(result):
    """Return the requests of a dry run by name, parsed from a sequence of JSON objects."""
    objects = json.loads("[" + result.output.replace("\n}\n{\n", "\n},\n{\n") + "]")
    return {name: request for item in objects for name, request in item.items()}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_dry_run_prints_the_requests_for_an_endpoint(launch, model, tmp_path, framework):
    flags = ("--role", ROLE, "--region", "us-east-1", "--endpoint", "digits", "--dry-run")
    request = ("--request", str(tmp_path / "request.json"))
    requests = printed_requests(deploy(launch, framework, *flags, "--model-dir", model(framework), *request))
    assert list(requests) == ["CreateModel", "CreateEndpointConfig", "CreateEndpoint", "InvokeEndpoint"]
    container = requests["CreateModel"]["PrimaryContainer"]
    assert container["Image"].endswith(SERVING_IMAGES[framework])
    assert container["ModelDataUrl"] == "s3://sagemaker-us-east-1-123456789012/digits/model.tar.gz"
    expected = {"SAGEMAKER_REGION": "us-east-1", "SAGEMAKER_CONTAINER_LOG_LEVEL": "20"}
    if framework != "tensorflow":
        expected["SAGEMAKER_PROGRAM"] = "inference.py"
        expected["SAGEMAKER_SUBMIT_DIRECTORY"] = "/opt/ml/model/code"
    assert container["Environment"] == expected
    [variant] = requests["CreateEndpointConfig"]["ProductionVariants"]
    assert (variant["InstanceType"], variant["InitialInstanceCount"]) == ("ml.m5.large", 1)
    assert requests["InvokeEndpoint"]["ContentType"] == "application/json"
    assert requests["InvokeEndpoint"]["Body"] == "8 bytes"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_serverless_endpoint_has_memory_instead_of_an_instance(launch, framework):
    flags = ("--role", ROLE, "--region", "us-east-1", "--job", "job-1", "--dry-run")
    requests = printed_requests(deploy(launch, framework, *flags, "--serverless", "--memory", "4096"))
    [variant] = requests["CreateEndpointConfig"]["ProductionVariants"]
    assert variant["ServerlessConfig"] == {"MemorySizeInMB": 4096, "MaxConcurrency": 5}
    assert "InstanceType" not in variant
    container = requests["CreateModel"]["PrimaryContainer"]
    assert container["Image"].endswith(SERVING_IMAGES[framework])
    assert container["ModelDataUrl"].endswith("/job-1/output/model.tar.gz")


def test_an_instance_with_gpus_gets_the_gpu_image(launch):
    flags = ("--role", ROLE, "--region", "us-east-1", "--job", "job-1", "--dry-run")
    requests = printed_requests(deploy(launch, "pytorch", *flags, "--instance-type", "ml.g5.xlarge"))
    assert "-gpu-" in requests["CreateModel"]["PrimaryContainer"]["Image"]


def test_an_endpoint_from_a_folder_until_its_deletion(launch, aws, model, tmp_path):
    """Create the endpoint, send two requests, and delete it; a second deletion finds nothing."""
    sent = []
    invoke = SageMakerRuntimeResponse.invoke_endpoint

    def record(self):
        sent.append((self.headers["Content-Type"], self.body))
        return invoke(self)

    endpoint = ("--endpoint", "digits")
    folder = ("--role", ROLE, "--bucket", "my-models", "--model-dir", model("pytorch"))
    (tmp_path / "digit.png").write_text("pixels")  # moto takes text only
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SageMakerRuntimeResponse, "invoke_endpoint", record)
        request = ("--request", str(tmp_path / "request.json"))
        result = deploy(launch, "pytorch", *endpoint, *folder, *request, **aws.variables)
        assert result.output == "body\n"  # moto's answer
        command = "python launch/deploy.py pytorch --endpoint digits --delete"
        expected = f"Created model, endpoint configuration, endpoint digits. To delete: {command}\n"
        assert expected in result.errors
        image = ("--request", str(tmp_path / "digit.png"))
        assert deploy(launch, "pytorch", *endpoint, *image, **aws.variables).output == "body\n"
    assert [kind for kind, _ in sent] == ["application/json", "application/x-image"]

    created = aws.sagemaker.describe_model(ModelName="digits")
    assert created["ExecutionRoleArn"] == ROLE
    address = created["PrimaryContainer"]["ModelDataUrl"]
    assert address == "s3://my-models/digits/model.tar.gz"
    assert aws.sagemaker.describe_endpoint(EndpointName="digits")["EndpointConfigName"] == "digits"
    aws.download(address, tmp_path / "archive")
    with tarfile.open(tmp_path / "archive/file") as archive:
        names = [entry.name for entry in archive if entry.isfile()]
        assert names == sorted([*MODELS["pytorch"], *CODE])
        assert {(entry.mtime, entry.uid, entry.uname) for entry in archive} == {(0, 0, "")}

    result = deploy(launch, "pytorch", *endpoint, "--delete", **aws.variables)
    assert result.errors == "Deleted endpoint, endpoint configuration, model digits\n"
    assert not aws.sagemaker.list_endpoints(NameContains="digits")["Endpoints"]
    assert not aws.sagemaker.list_endpoint_configs(NameContains="digits")["EndpointConfigs"]
    assert not aws.sagemaker.list_models(NameContains="digits")["Models"]
    result = deploy(launch, "pytorch", *endpoint, "--delete", code=1, **aws.variables)
    assert result.error_line.startswith("error: --endpoint digits: no endpoint, endpoint configuration or")


def test_the_model_of_a_finished_job(launch, aws):
    aws.s3.create_bucket(Bucket="my-jobs")
    aws.sagemaker.create_training_job(
        TrainingJobName="job-1",
        RoleArn=ROLE,
        AlgorithmSpecification={"TrainingImage": "image", "TrainingInputMode": "File"},
        OutputDataConfig={"S3OutputPath": "s3://my-jobs/"},
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
        StoppingCondition={"MaxRuntimeInSeconds": 60},
    )
    words = ("xgboost", "--role", ROLE, "--job", "job-1", "--endpoint", "trees", "--serverless", "--no-wait")

    def refused_as(status):
        described = FakeTrainingJob.response_object.fget
        facts = {"TrainingJobStatus": status, "FailureReason": "no data"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                FakeTrainingJob, "response_object", property(lambda self: {**described(self), **facts})
            )
            return deploy(launch, *words, code=1, **aws.variables).error_line

    expected = "expected a job that is Completed or Stopped"
    assert refused_as("Failed") == f"error: --job job-1 is Failed (no data): {expected}"
    assert refused_as("InProgress") == f"error: --job job-1 is InProgress: {expected}"
    missing = "has no model at s3://my-jobs/job-1/output/model.tar.gz"
    assert refused_as("Stopped").startswith(f"error: --job job-1 is Stopped, but {missing}")
    assert not aws.sagemaker.list_models(NameContains="trees")["Models"]

    aws.s3.put_object(Bucket="my-jobs", Key="job-1/output/model.tar.gz", Body=b"")
    deploy(launch, *words, **aws.variables)
    container = aws.sagemaker.describe_model(ModelName="trees")["PrimaryContainer"]
    assert container["ModelDataUrl"] == "s3://my-jobs/job-1/output/model.tar.gz"
    [variant] = aws.sagemaker.describe_endpoint_config(EndpointConfigName="trees")["ProductionVariants"]
    assert variant["ServerlessConfig"]["MemorySizeInMB"] == 2048
    deploy(launch, "xgboost", "--endpoint", "trees", "--delete", **aws.variables)


def test_the_rest_of_a_failed_deployment_is_named_and_can_be_deleted(launch, aws, model):
    words = ("mxnet", "--role", ROLE, "--bucket", "my-models", "--model-dir", model("mxnet"))
    words += ("--endpoint", "unlucky")
    delete = ("mxnet", "--endpoint", "unlucky", "--delete")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SageMakerResponse, "create_endpoint", refuse)
        result = deploy(launch, *words, code=1, **aws.variables)
    assert "quota" in result.error_line
    assert "Created model, endpoint configuration unlucky. To delete: python launch/dep" in result.errors
    result = deploy(launch, *delete, **aws.variables)
    assert result.errors == "Deleted endpoint configuration, model unlucky\n"

    init = FakeEndpoint.__init__

    def fail(self, *args, **options):
        init(self, *args, **options)
        self.endpoint_status, self.failure_reason = "Failed", "The ping did not succeed."

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeEndpoint, "__init__", fail)
        result = deploy(launch, *words, code=1, **aws.variables)
    assert result.error_line.startswith("error: endpoint unlucky is Failed: The ping did not succeed. (its l")
    assert "Created model, endpoint configuration, endpoint unlucky. To delete:" in result.errors
    deploy(launch, *delete, **aws.variables)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--job", "job-1"], "--role is missing"),
        ([], "nothing to do: add --job or --model-dir to deploy, --request to ask, or --delete"),
        (["--delete"], "--endpoint is missing"),
        (
            ["--role", ROLE, "--model-dir", "absent"],
            "--model-dir absent: no such folder: expected what pytorch/",
        ),
        (
            ["--role", ROLE, "--model-dir", str(ROOT / "launch")],
            "model.pth is missing: expected what pytorch/",
        ),
        (
            ["--endpoint", "a", "--request", "a.txt"],
            "expected a .csv, .tsv, .json, .npy, ",
        ),
        (["--endpoint", "a", "--request", "a.csv"], "argument --request: no such file: 'a.csv'"),
        (
            ["--role", ROLE, "--job", "a", "--memory", "2048"],
            "--memory is for serverless endpoints: add --serv",
        ),
        (["--role", ROLE, "--job", "a", "--serverless", "--memory", "2000"], "invalid choice: 2000"),
    ],
)
def test_a_mistake_in_the_flags_of_an_endpoint_is_one_line(launch, words, message):
    result = deploy(launch, "pytorch", *words, code=2)
    assert message in result.error_line
    assert result.errors.count("\n") == 1


# SIGTERM ----------------------------------------------------------------------------------------------------

TRAIN = """#!{python}
import subprocess, sys
script = '''
import signal, sys, time
def save(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # repeated every second, also while saving
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
time.sleep(100)
'''
sys.exit(subprocess.call([sys.executable, "-c", script]))
"""


@pytest.mark.parametrize("process_1", [True, False])
def test_train_forwards_sigterm_to_the_script(tmp_path, process_1):
    (tmp_path / "train").write_text(TRAIN.format(python=sys.executable))
    (tmp_path / "train").chmod(0o755)
    command = job.forwarding_sigterm("train")
    if process_1:  # in a PID namespace, as in a container
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command]
        if subprocess.run([*command[:5], "true"], capture_output=True).returncode:
            pytest.skip("this machine does not permit PID namespaces")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == "training\n"
            receiver = process.pid
            if process_1:
                with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
                    receiver = int(file.read())
            os.kill(receiver, signal.SIGTERM)
            time.sleep(0.3)
            os.kill(receiver, signal.SIGTERM)  # a second one must not interrupt the save
            assert process.communicate(timeout=30)[0] == "saved\n"
            assert process.returncode == 143
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_the_command_of_process_1_is_within_the_limits_of_the_api():
    words = job.forwarding_sigterm("train")
    shape = boto3.session.Session()._session.get_service_model("sagemaker").shape_for
    assert all(len(word) <= shape("TrainingContainerEntrypointString").metadata["max"] for word in words)
    assert len(words) <= shape("TrainingContainerEntrypoint").metadata["max"]
