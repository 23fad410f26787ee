"""Trainings under SageMaker's own toolkit, interrupted as in Managed Spot Training; S3 is a moto server."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import boto3
import pytest

from common import checkpoints, distributed, report
from common.s3 import download, list_objects, split_uri
from helpers import CHECKPOINTS, LATER, ROOT, checkpoint_name, choose, environment, in_make_test
from launch.job import forwarding_sigterm
from spot import container, service, sync
from spot import report as spot_report
from spot.__main__ import environment as container_environment
from spot.__main__ import parse_args, plan
from verify import compare


@pytest.fixture(scope="module")
def s3():
    """A client of an S3 server on the loopback address, with a bucket in it."""
    with service.s3_server() as client:
        client.create_bucket(Bucket="bucket")
        yield client


def request_for(s3, framework, name, hyperparameters, channels=(), entry_point=None):
    script = ROOT / framework / "train.py"
    variables = container_environment(script)
    uri = f"s3://bucket/{name}/checkpoints/"
    channels = dict(channels)
    return service.make_request(s3, name, script, hyperparameters, channels, uri, entry_point, variables)


def log_of(job):
    return [event["line"] for event in job.events if event["event"] == "log"]


# The real toolkit -------------------------------------------------------------------------------------------


@in_make_test("pytorch", "xgboost")
def test_five_epochs_and_later_ten_as_in_sagemaker(s3, framework, tmp_path):
    """S3 has five checkpoints after the first job, and ten after the second, which starts with epoch 6."""
    name = f"walkthrough-{framework}"
    # As the SDKs pass them: a switch is a word, and names have hyphens or underscores.
    values = {"keep_checkpoints": "0", "resume-anyway": "true", "best_metric": "accuracy", "seed": "7"}

    def run(epochs, folder):
        request = request_for(s3, framework, name, {**values, "epochs": epochs})
        job = service.Job(s3, request, folder)
        base = job.run()
        assert (base / "output/data/metrics.json").exists()
        assert list((base / "model").iterdir())
        assert not (base / "output/failure").exists()
        names = [key.rpartition("/")[2] for key in list_objects(s3, f"s3://bucket/{name}/checkpoints/")]
        return log_of(job), names

    log, names = run(5, tmp_path / "first")
    assert "Starting training from epoch: 1" in log
    assert sorted(names) == sorted(checkpoint_name(framework, epoch) for epoch in range(1, 6))
    log, names = run(10, tmp_path / "second")
    assert f"Resuming training from {checkpoint_name(framework, 5)}" in log
    assert "Starting training from epoch: 6" in log
    assert sorted(names) == sorted(checkpoint_name(framework, epoch) for epoch in range(1, 11))
    assert_each_metric_is_extracted([line for line in log if line.startswith("epoch=")])
    # The command that the launchers print, which copies the checkpoints from S3 one by one.
    command = [
        sys.executable,
        "-m",
        "common.list_checkpoints",
        f"{framework}/train.py",
        f"s3://bucket/{name}/checkpoints",
    ]
    listed = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert lines[-1] == f"A restart resumes from {checkpoint_name(framework, 10)}"
    assert len([line for line in lines if re.search(r" yes +intact", line)]) == 10


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"S3": "s3://bucket/empty/"},
            "A restart would start at the first epoch: no checkpoints in s3://bucket/em",
        ),
        (
            {"S3": "s3://not-there/1/"},
            "error: cannot read s3://not-there/1/: An error occurred (NoSuchBucket)",
        ),
        (
            {"S3": "s3://bucket/1/", "PYTHONPATH": "no-boto3"},
            "error: this script needs boto3 for addresses in S3, ",
        ),
    ],
)
def test_an_error_of_s3_is_one_line(s3, tmp_path, variables, message):
    (tmp_path / "no-boto3").mkdir()
    (tmp_path / "no-boto3/boto3.py").write_text("raise ImportError('not here')")
    paths = f"{ROOT}:{tmp_path / variables.get('PYTHONPATH', '')}"
    code = (
        "import sys; sys.path[:0] = sys.argv[3].split(':')[::-1]; from common.list_checkpoints import main; "
    )
    code += "sys.exit(main(sys.argv[1:3]))"
    command = [sys.executable, "-c", code, ROOT / "xgboost/train.py", variables["S3"], paths]
    listed = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (listed.stdout + listed.stderr).startswith(message)
    assert (listed.stdout + listed.stderr).count("\n") == 1


def test_the_trials_of_a_tuner_share_an_address_but_no_checkpoints(s3, tmp_path):
    def run(trial, attempt):
        values = {"num-round": "3", "_tuning_objective_metric": "validation:loss"}
        request = request_for(s3, "xgboost", "tuner", values)
        job = service.Job(s3, {**request, "TrainingJobName": trial}, tmp_path / f"{trial}-{attempt}")
        job.run()
        return log_of(job)

    for trial in ("trial-1", "trial-2"):
        assert "Starting training from epoch: 1" in run(trial, 1)
    assert "Resuming training from xgboost-checkpoint.2" in run("trial-2", 2)
    files = {
        key.removeprefix("tuner/checkpoints/") for key in list_objects(s3, "s3://bucket/tuner/checkpoints/")
    }
    trials = ("trial-1", "trial-2")
    assert files == {f"{trial}/xgboost-checkpoint.{number}" for trial in trials for number in range(3)}


def assert_each_metric_is_extracted(lines):
    assert len(lines) == 5
    for line in lines:
        written = dict(pair.split("=") for pair in line.split())
        del written["epoch"]
        found = {}
        for definition in report.metric_definitions():
            match = re.search(definition["Regex"], line)
            if match:
                found[definition["Name"].replace(":", "_")] = match[1]
        assert found == written


def test_sagemaker_accepts_the_metric_definitions():
    definitions = report.metric_definitions(("loss", "ndcg@10"))
    names = [definition["Name"] for definition in definitions]
    assert names[:4] == ["train:loss", "train:ndcg@10", "validation:loss", "validation:ndcg@10"]
    assert len(set(names)) == len(names) <= 40
    line = "epoch=2 train_loss=nan train_ndcg@10=-1.5000 validation_loss=1e-05 "
    line += "validation_ndcg@10=inf seconds=1.00"
    found = [re.search(definition["Regex"], line) for definition in definitions]
    assert [match and match[1] for match in found] == ["nan", "-1.5000", "1e-05", "inf", "1.00", None]
    assert all(re.compile(definition["Regex"]).groups == 1 for definition in definitions)
    assert not re.search(definitions[0]["Regex"], "step=9/26 epoch=1")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"epochs": "none"},
            "error: argument --num-round/--epochs: expected a whole number of at least 1, got 'none'",
        ),
        ({"max_dept": "3"}, "error: unknown flag --max-dept: did you mean --max-depth?"),
        ({"train": "/nowhere"}, "error: --train /nowhere"),
    ],
)
@pytest.mark.parametrize("forwarding", [False, True])
def test_a_mistake_is_the_failure_reason_of_the_job(s3, tmp_path, values, reason, forwarding):
    entry_point = forwarding_sigterm("train") if forwarding else None
    request = request_for(s3, "xgboost", "mistake", values, entry_point=entry_point)
    job = service.Job(s3, request, tmp_path)
    with pytest.raises(Exception, match="the training job failed") as failed:
        job.run()
    failure = container.failure(tmp_path / "attempt-1")
    assert failure.startswith(reason)
    assert "\n" not in failure
    assert failure in str(failed.value)
    assert job.events[-1]["code"] == 1


def test_channels_are_the_data(s3, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.csv").write_text("".join(f"{n % 3},{n % 3 + n / 100},{n}\n" for n in range(60)))
    s3.upload_file(str(data / "rows.csv"), "bucket", "channel/rows.csv")
    request = request_for(s3, "xgboost", "channels", {"num-round": "2"}, {"training": data})
    s3_channel = {"S3DataSource": {"S3Uri": "s3://bucket/channel/"}}
    request["InputDataConfig"].append({"ChannelName": "validation", "DataSource": s3_channel})
    job = service.Job(s3, request, tmp_path / "job")
    job.run()
    assert any("60 training and 60 validation rows of 2 columns" in line for line in log_of(job))


def test_under_the_drivers_of_sdk_v3(s3, tmp_path):
    """SDK v3 does not use the toolkit: scripts uploaded as a channel set SM_* and start ours."""
    python = ROOT / ".venv-sdk3/bin/python"
    if not python.exists():
        pytest.fail(f"{python} is missing: run make test")
    role = "arn:aws:iam::123456789012:role/SageMaker"
    variables = environment(
        SAGEMAKER_VALIDATE_ROLE="false", SAGEMAKER_USER_CONFIG_OVERRIDE=str(tmp_path / "config.yaml")
    )
    (tmp_path / "config.yaml").write_text(
        "SchemaVersion: '1.0'\nSageMaker: {PythonSDK: {Modules: {TelemetryOptOut: true}}}\n"
    )
    command = [python, ROOT / "launch/model_trainer.py", "xgboost", "--role", role, "--bucket", "bucket"]
    command += ["--no-wait", "--job-name", "drivers", "--", "--num-round", "3", "--best-metric", "accuracy"]
    sent = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert sent.returncode == 0, sent.stderr
    sagemaker = boto3.client("sagemaker")
    (found,) = sagemaker.list_training_jobs(NameContains="drivers-")["TrainingJobSummaries"]
    request = sagemaker.describe_training_job(TrainingJobName=found["TrainingJobName"])

    def run(name, values):
        base = tmp_path / name
        container.lay_out(base, {**request, "HyperParameters": {**request["HyperParameters"], **values}}, s3)
        drivers = base / "input/data/sm_drivers"
        for path in [*drivers.rglob("*.py"), *drivers.rglob("*.sh")]:  # their base folder is fixed
            path.write_text(path.read_text().replace("/opt/ml", str(base)))
        path = base / "input/config/resourceconfig.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "current_instance_type": "ml.m5.xlarge"}))
        specification = json.loads(
            json.dumps(request["AlgorithmSpecification"]).replace("/opt/ml", str(base))
        )
        lines = []
        box = container.Container(base, {**request, "AlgorithmSpecification": specification}, lines.append)
        return base, box.wait(300), lines

    base, code, lines = run("good", {})
    assert code == 0, "\n".join(lines)
    assert "Starting training from epoch: 1" in lines
    assert (base / "model/xgboost-model").exists()
    assert json.loads((base / "output/data/metrics.json").read_text())["epochs"] == 3
    names = [checkpoint_name("xgboost", epoch) for epoch in (1, 2, 3)]
    assert sorted(os.listdir(base / "checkpoints")) == names
    assert not (base / "output/failure").exists()

    base, code, lines = run("bad", {"max-depth": "none"})
    assert code != 0
    assert container.failure(base).startswith("error: argument --max-depth: expected a whole number")


# The simulator ----------------------------------------------------------------------------------------------

JOBS = {  # when to interrupt, and flags for a training that is long enough
    "pytorch": ("6s,upload,upload", ["--epochs", "20", "--batch-size", "16", "--augment"]),
    "tensorflow": ("9s,upload,upload", ["--epochs", "16", "--batch-size", "16", "--augment"]),
    "mxnet": ("5s,upload,upload", ["--epochs", "28", "--batch-size", "16", "--augment"]),
    "xgboost": ("3s,upload,upload", ["--num-round=1000", "--subsample=0.7", "--checkpoint-steps=25"]),
}


def simulate(*words, code=0, cwd, **more):
    """Run the simulator as a user does, with `more` variables; return its output."""
    command = [sys.executable, "-m", "spot", *map(str, words)]
    variables = environment(PYTHONPATH=str(ROOT), **more)
    finished = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600)
    assert finished.returncode == code, finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr, finished.stderr
    return finished.stdout if code == 0 else finished.stderr


@in_make_test("xgboost")
def test_three_interruptions_end_with_the_same_bits(framework, tmp_path):
    moments, flags = JOBS[framework]
    script = ROOT / framework / "train.py"

    def run(*words):
        output = simulate(script, "--interrupt-after", moments, *words, "--", *flags, cwd=tmp_path)
        report = json.loads((tmp_path / "output/spot/report.json").read_text())
        return output, report["figures"], report["attempts"]

    # SageMaker's own images: the script receives no signal and trains until it is killed.
    output, numbers, attempts = run("--grace", "1s", "--verify")
    assert "SIGTERM received" not in output
    assert output.count("SIGTERM is sent to process 1") == 3
    assert output.count("the machine is gone") == 3
    assert output.count(" stops half way\n") == 2
    assert (numbers["attempts"], numbers["interruptions"]) == (4, 3)
    assert numbers["steps_lost"] > 0
    assert numbers["seconds_lost"] > 0
    total = max(step for attempt in attempts for _, step in attempt["steps"])
    assert numbers["steps_trained"] == total + numbers["steps_lost"]
    assert numbers["bit-identical"] is True
    assert f"Training seconds: {numbers['training_seconds']}\nBillable seconds: " in output
    assert "Managed Spot Training savings: 70.0%\n" in output
    assert (tmp_path / "output/spot/timeline.png").read_bytes().startswith(b"\x89PNG")
    whole = (tmp_path / "output/spot/uninterrupted").rename(tmp_path / "whole")

    # Our launchers' entry point forwards the signal: no step and no upload is lost.
    output, numbers, attempts = run("--forward-sigterm")
    assert (numbers["attempts"], numbers["interruptions"]) == (4, 3)
    assert "the machine is gone" not in output
    assert output.count("] SIGTERM received: finishing the running step and saving\n") >= 1
    assert numbers["steps_lost"] == 0
    assert numbers["seconds_lost"] == 0
    assert numbers["steps_trained"] == total
    assert compare.differences(tmp_path / "output/spot/job/attempt-4", whole / "attempt-1") == []
    for attempt in range(1, 4):
        failure = container.failure(tmp_path / f"output/spot/job/attempt-{attempt}")
        while_starting = "ExecuteUserScriptError:\nExitCode 143\n"
        assert failure.startswith(("Interrupted: saved ", while_starting))
    assert not processes_below(tmp_path)


@pytest.mark.parametrize("framework", ["xgboost", pytest.param("pytorch", marks=LATER)])
def test_two_instances_that_are_interrupted_end_with_the_same_bits(framework, tmp_path):
    choose(framework)
    flags = ["--num-round=300", "--checkpoint-steps=25"] if framework == "xgboost" else JOBS[framework][1]
    words = [
        ROOT / framework / "train.py",
        "--instance-count",
        2,
        "--interrupt-after",
        "upload,upload",
        "--verify",
    ]
    output = simulate(*words, "--forward-sigterm", "--", *flags, cwd=tmp_path)
    numbers = json.loads((tmp_path / "output/spot/report.json").read_text())["figures"]
    assert (numbers["attempts"], numbers["steps_lost"], numbers["bit-identical"]) == (3, 0, True)
    hosts = "algo-1, algo-2" if container.namespace() else "127.0.0.1, 127.0.0.2"
    assert f"2 workers: {hosts}; each gets " in output
    first, second = (tmp_path / f"output/spot/job/attempt-3{host}/checkpoints" for host in ("", "-algo-2"))
    if container.namespace():
        # The content of S3 at the start; the main process has deleted its checkpoint inside an epoch since.
        at_start = {name for name in os.listdir(second) if not re.search(r"-\d+-\d+\.", name)}
        assert at_start < set(os.listdir(first))
    assert not processes_below(tmp_path)


def test_the_script_notices_that_uploads_to_s3_have_stopped(tmp_path):
    """The sync of the first attempt stops after two uploads."""
    folder = shutil.copytree(ROOT / "xgboost", tmp_path / "my-job")
    module = folder / "common/checkpoints.py"
    module.write_text(module.read_text().replace("UPLOAD_SECONDS = 900", "UPLOAD_SECONDS = 4"))
    flags = ("--num-round", 2000, "--checkpoint-steps", 25, "--max-depth", 3)
    output = simulate(folder / "train.py", "--stop-sync-after", 2, "--", *flags, cwd=tmp_path)
    assert output.count(" is in S3\n") == 2
    assert output.count("] Warning: for 0 minutes SageMaker has copied no checkpoint to S3, where ") == 1


def processes_below(folder):
    """Return the command lines of processes that use a folder."""
    found = subprocess.run(["pgrep", "-af", str(folder)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if "pgrep" not in line]


@pytest.mark.parametrize("namespaces", [True, False])
def test_signals_reach_the_script_and_its_exit_code_is_returned(s3, tmp_path, monkeypatch, namespaces):
    """Stock `train` as process 1 keeps SIGTERM from the script; our entry point forwards it."""
    if not namespaces:
        monkeypatch.setattr(container, "namespace", lambda: [])
    elif not container.namespace():
        pytest.skip("this machine does not permit PID namespaces")
    values = {"num-round": "3000", "checkpoint-steps": "1000"}
    (tmp_path / "start.sh").write_text("train")  # as the entry point of most of SageMaker's images
    entry_points = {"stock": None, "forwarding": forwarding_sigterm("train")}
    if namespaces:
        entry_points.update(python=None, bash=["bash", "-m", str(tmp_path / "start.sh"), "train"])
    for name, entry_point in entry_points.items():
        request = request_for(s3, "xgboost", f"{name}-{namespaces}", values, entry_point=entry_point)
        if name in ("python", "bash"):  # as in a trial of a tuner
            files = ROOT / "launch/forward_sigterm"
            request["Environment"]["PYTHONPATH"] += f":{files}"
            request["Environment"]["BASH_ENV"] = f"{files}/bash_env.sh"
        folder = tmp_path / name
        container.lay_out(folder, request, s3)
        lines, training = [], threading.Event()

        def record(line, lines=lines, training=training):
            lines.append(line)
            if line.startswith("epoch=3 "):
                training.set()

        box = container.Container(folder, request, record)
        assert training.wait(120), lines
        box.terminate()
        code = box.wait(1 if name == "stock" else 60)
        box.kill()
        box.wait()
        saved = os.listdir(folder / "checkpoints")
        if name == "stock":
            assert code is None if namespaces else code == -signal.SIGTERM
            assert saved == []
            assert not container.failure(folder)
        else:
            assert code == 1  # the toolkit's exit code if the script has not finished
            assert len(saved) == 1
            reason = f"Interrupted: saved {saved[0]}, run the same command to resume"
            assert container.failure(folder) == reason
            assert reason in lines
        time.sleep(0.2)
        assert not processes_below(folder)


def test_a_signal_before_the_handler_is_set_is_not_lost(tmp_path):
    """If the signal arrives while the container starts, the script ends as soon as it handles signals."""
    script = "import signal, sys, time; time.sleep(2); signal.signal(15, lambda *_: sys.exit(7))"
    command = forwarding_sigterm(sys.executable, "-c", f"{script}; time.sleep(60)")
    with subprocess.Popen(command, start_new_session=True) as process:
        time.sleep(0.5)
        process.terminate()
        assert process.wait(30) == 7


def test_the_entry_point_does_not_change_exit_codes(tmp_path):
    for code in (0, 3):
        command = forwarding_sigterm("sh", "-c", f"exit {code}")
        assert subprocess.run(command, start_new_session=True).returncode == code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/train.py"], "there is no script nowhere/train.py"),
        (
            ["--interrupt-after", "soon"],
            "argument --interrupt-after: expected a time such as 20s or 2m, got 'soon'",
        ),
        (
            ["--channel", "train"],
            "argument --channel: expected a name and an existing folder such as train=photos, got 'train'",
        ),
        (
            ["--checkpoint-s3-uri", "s3://bucket"],
            "expected an address such as s3://bucket/job/checkpoints/, got",
        ),
        (
            ["--endpoint-url", "localhost:9000"],
            "expected an address such as http://localhost:9000, got 'localhost:9000'",
        ),
        (
            ["--interruptions", "2"],
            "--interruptions needs --interrupt-after or --mean-time-between-interruptions",
        ),
        (["--spot-price", "2"], "argument --spot-price: expected a number from 0 to 1, got '2'"),
        (["--", "5"], "unexpected argument '5': expected --flag value"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, words, message):
    script = [] if words[0].endswith(".py") else [ROOT / "xgboost/train.py"]
    errors = simulate(*script, *words, code=1 if words[0] == "--" else 2, cwd=tmp_path)
    assert message in errors.splitlines()[-1]
    assert not (tmp_path / "output").exists()


def test_a_wrong_flag_of_the_script_ends_the_simulation(tmp_path):
    errors = simulate(
        ROOT / "xgboost/train.py", "--interruptions", 0, "--", "--eta", "7", cwd=tmp_path, code=1
    )
    assert errors.splitlines()[-1].startswith("error: the training job failed: error: argument --eta")


def test_settings_for_another_s3_are_ignored(tmp_path):
    settings = {"AWS_DEFAULT_REGION": "eu-west-1", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    settings.update(http_proxy="http://127.0.0.1:9", AWS_IGNORE_CONFIGURED_ENDPOINT_URLS="true")
    output = simulate(ROOT / "xgboost/train.py", "--", "--num-round", 3, cwd=tmp_path, **settings)
    assert "checkpoints in S3: 3\n" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_simulator_that_is_ended_leaves_no_process(tmp_path, number):
    command = [sys.executable, "-m", "spot", str(ROOT / "xgboost/train.py"), "--", "--num-round", "100000"]
    variables = environment(PYTHONPATH=str(ROOT))
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if " is in S3" in line:
                process.send_signal(number)
                break
        process.stdout.read()
        assert process.wait(30) == 128 + number
    wait_for(lambda: not processes_below(tmp_path))


def test_interruptions_after_epochs_do_not_depend_on_a_clock(tmp_path):
    words = ["--interrupt-after", "5epochs,2epochs", "--grace", "0s", "--", "--epochs", 500]
    output = simulate(ROOT / "xgboost/train.py", *words, cwd=tmp_path)
    assert "Only " not in output
    attempts = json.loads((tmp_path / "output/spot/report.json").read_text())["attempts"]
    counts = [len(attempt["epochs"]) for attempt in attempts]
    assert len(counts) == 3
    assert 5 <= counts[0] < 100
    assert 2 <= counts[1] < 100


def test_plan():
    def planned(*words):
        return plan(parse_args([str(ROOT / "pytorch/train.py"), *words]))

    assert planned() == []
    assert planned("--interrupt-after", "20s,upload,2m") == [20, "upload", 120]
    assert planned("--interrupt-after", "20s,upload", "--interruptions", "3") == [20, "upload", 20]
    assert planned("--interrupt-after", "20s", "--interruptions", "0") == []
    assert planned("--interrupt-after", "5epochs,1epoch") == [service.Epochs(5), service.Epochs(1)]
    random = planned("--mean-time-between-interruptions", "30s", "--interruptions", "1000")
    assert 25 < sum(random) / 1000 < 35
    assert random[:3] == planned("--mean-time-between-interruptions", "30s")
    assert random[:3] != planned("--mean-time-between-interruptions", "30s", "--seed", "1")


# S3 and the checkpoint folder -------------------------------------------------------------------------------


@pytest.fixture
def copies(s3, tmp_path, monkeypatch):
    """Return a running Sync of an empty folder, its address, its thread, and the list of its events."""
    monkeypatch.setattr(sync, "SCAN_SECONDS", 0.01)
    folder, uri, events = tmp_path / "checkpoints", f"s3://bucket/{tmp_path.name}/", []
    folder.mkdir()
    copies = sync.Sync(s3, folder, uri, 1e9, 0, lambda event, name: events.append((event, name)))
    thread = threading.Thread(target=copies.run)
    thread.start()
    yield folder, uri, events, copies, thread
    copies.stop()
    thread.join()


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("the condition did not become true")


def content(s3, uri):
    bucket, prefix = split_uri(uri)
    return {
        key[len(prefix) :]: s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        for key in list_objects(s3, uri)
    }


def test_new_changed_and_deleted_files_are_copied_except_those_of_the_service(s3, copies):
    folder, uri, events, *_ = copies
    (folder / "part").mkdir()
    (folder / "part/b").write_bytes(b"2")
    (folder / "a.sagemaker-ignore").write_bytes(b"half")
    (folder / "a").write_bytes(b"1")
    wait_for(lambda: ("uploaded", "a") in events and ("uploaded", "part/b") in events)
    assert content(s3, uri) == {"a": b"1", "part/b": b"2"}
    marks = {"a", "a.sagemaker-uploaded", "a.sagemaker-ignore", "part"}
    assert set(os.listdir(folder)) == marks
    (folder / "a").write_bytes(b"longer")
    wait_for(lambda: events.count(("uploaded", "a")) == 2)
    (folder / "part/b").unlink()
    wait_for(lambda: ("deleted", "part/b") in events)
    assert content(s3, uri) == {"a": b"longer"}
    assert set(os.listdir(folder)) == marks
    assert os.listdir(folder / "part") == []


def test_the_remaining_files_are_copied_at_the_end(s3, copies):
    folder, uri, _, running, thread = copies
    (folder / "last").write_bytes(b"1")
    running.stop()
    thread.join()
    assert content(s3, uri) == {"last": b"1"}


def test_all_objects_under_the_prefix_are_restored_and_not_uploaded_again(s3, tmp_path):
    for key in ("job-1/a", "job-1/part/b", "job-10/c"):
        s3.put_object(Bucket="bucket", Key=f"restore/{key}", Body=key.encode())
    assert download(s3, "s3://bucket/restore/job-1/", tmp_path / "exact") == 2
    assert (tmp_path / "exact/part/b").read_text() == "job-1/part/b"
    without_slash = "s3://bucket/restore/job-1"
    assert download(s3, without_slash, tmp_path / "prefix") == 3
    events = []
    copies = sync.Sync(
        s3, tmp_path / "exact", "s3://bucket/restore/job-1/", 1e9, 0, lambda *event: events.append(event)
    )
    copies.stop()
    copies.run()
    assert events == []


def test_a_killed_upload_leaves_nothing_in_s3(s3, tmp_path):
    (tmp_path / "folder").mkdir()
    uri = "s3://bucket/half/"
    command = [sys.executable, "-m", "spot.sync", str(tmp_path / "folder"), uri]
    command += ["--rate=1e9", "--stall-upload=2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline())["event"] == "ready"
        (tmp_path / "folder/1").write_bytes(b"1" * 300_000)
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "uploaded":
                (tmp_path / "folder/2").write_bytes(b"2" * 300_000)
            if event["event"] == "stalled":
                break
        files = ["1", "1.sagemaker-uploaded", "2", "2.sagemaker-uploading"]
        assert sorted(os.listdir(tmp_path / "folder")) == files
        process.kill()
    time.sleep(0.5)  # the server may still be reading
    assert list(content(s3, uri)) == ["1"]


def test_uploads_have_a_limited_rate(s3, tmp_path):
    for number in range(10):
        (tmp_path / f"{number}").write_bytes(bytes(100_000))
    copies = sync.Sync(s3, tmp_path, "s3://bucket/slow/", 0.5e6, 0, lambda *event: None)
    copies.copied = {}
    copies.stop()
    began = time.monotonic()
    copies.run()
    assert time.monotonic() - began > 2


def test_in_sagemaker_nothing_is_deleted_before_its_successor_is_in_s3(tmp_path, monkeypatch):
    """Neither restored nor new files have marks."""
    monkeypatch.setenv("SM_MODEL_DIR", "/opt/ml/model")
    pattern = CHECKPOINTS["pytorch"]
    engine = SimpleNamespace(CHECKPOINT=pattern, FIRST_NUMBER=1)
    args = SimpleNamespace(checkpoint_path=tmp_path, keep_checkpoints=1)
    folder = checkpoints.Checkpoints(args, engine, distributed.Workers())

    def after_saving(*positions):
        for position in positions:
            (tmp_path / pattern.format(position)).touch()
        folder.remove_old()
        return sorted(path.stem[len("checkpoint-") :] for path in tmp_path.glob("*.pt"))

    (tmp_path / pattern.format("1")).touch()
    (tmp_path / pattern.format("1-103")).touch()
    folder.open()
    assert after_saving("2") == ["1", "1-103", "2"]
    assert after_saving("3", "4") == ["1", "1-103", "4"]  # 2 and 3 have never been in S3
    (tmp_path / "checkpoint-4.pt.sagemaker-uploaded").touch()
    assert after_saving("5") == ["4", "5"]
    folder.close()


# The report -------------------------------------------------------------------------------------------------


def test_the_figures_follow_from_the_events():
    def attempt(number, start, lines, *end):
        yield {"time": start, "attempt": number, "event": "started"}
        for seconds, line in lines:
            yield {"time": start + seconds, "attempt": number, "event": "log", "line": line}
        for seconds, event, more in end:
            yield {"time": start + seconds, "attempt": number, "event": event, **more}

    first = "epoch=1 train_loss=0.5000 validation_loss=0.6000 seconds=2.00 samples_per_second=50"
    events = [
        *attempt(1, 100, [(1, "Importing")], (2, "sigterm", {}), (3, "killed", {})),
        *attempt(
            2,
            110,
            [
                (2, "Starting training from epoch: 1"),
                (3, "step=1/2 epoch=1"),
                (4, "step=2/2 epoch=1"),
                (5, first),
                (7, "step=1/2 epoch=2"),
                (8, "step=2/2 epoch=2"),
            ],
            (6, "uploaded", {"name": "checkpoint-1.pt"}),
            (9, "sigterm", {}),
            (10, "killed", {}),
        ),
        *attempt(
            3,
            130,
            [(4, "Starting training from epoch: 2"), (5, "step=1/2 epoch=2")],
            (6, "sigterm", {}),
            (7, "ended", {"code": 1}),
        ),
        *attempt(
            4,
            140,
            [(3, "Starting training from epoch: 2, step: 2"), (4, "step=2/2 epoch=2")],
            (5, "ended", {"code": 0}),
        ),
    ]
    attempts = spot_report.read_attempts(events)
    assert attempts[1]["steps"] == [(12, 0), (13, 1), (14, 2), (17, 3), (18, 4)]
    assert attempts[1]["epochs"][0][2]["validation:loss"] == 0.6
    assert attempts[1]["uploaded"] == [(16, "checkpoint-1.pt")]
    assert spot_report.figures(attempts, 2, spot_price=0.4) == {
        "training_seconds": 3 + 10 + 7 + 5,
        "billable_seconds": 10,
        "savings_percent": 60.0,
        "attempts": 4,
        "interruptions": 3,
        "steps_trained": 4 + 1 + 1,
        "steps_lost": 2,  # of epoch 2 in the second attempt
        "seconds_lost": 6.0,
        "seconds_to_start": 3.0,
        "checkpoints_in_s3": 2,
    }


def test_missing_marks_are_reported_once_and_only_after_earlier_marks(tmp_path, monkeypatch):
    pattern = CHECKPOINTS["pytorch"]
    args = SimpleNamespace(checkpoint_path=tmp_path, keep_checkpoints=0)
    logged = []
    monkeypatch.setattr(checkpoints, "log", logged.append)

    def warnings(ages, from_s3=()):
        """Return the number of warnings for files of these ages in minutes; some were copied at the start."""
        for path in tmp_path.iterdir():
            path.unlink()
        engine = SimpleNamespace(CHECKPOINT=pattern, FIRST_NUMBER=1)
        folder = checkpoints.Checkpoints(args, engine, distributed.Workers())
        folder._from_s3.update(from_s3)
        for name, minutes in ages.items():
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (time.time() - 60 * minutes,) * 2)
        logged.clear()
        folder.remove_old()
        folder.remove_old()
        return len(logged)

    stopped = {"checkpoint-1.pt": 50, "checkpoint-1.pt.sagemaker-uploaded": 49, "checkpoint-2.pt": 20}
    assert warnings(stopped) == 1
    assert warnings({**stopped, "checkpoint-3.pt": 0}) == 1
    assert warnings({**stopped, "checkpoint-2.pt": 10}) == 0  # saved a short time ago
    assert warnings({**stopped, "checkpoint-2.pt.sagemaker-uploading": 5}) == 0  # being uploaded
    assert warnings({**stopped, "checkpoint-2.pt.sagemaker-uploaded": 19}) == 0
    assert warnings(stopped, from_s3=["checkpoint-2.pt"]) == 0
    assert warnings({"checkpoint-1.pt": 50, "checkpoint-2.pt": 20}) == 0  # no service copies files here


def test_differences_are_found(tmp_path):
    for name, weights in (("a", b"1"), ("b", b"2")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "output/data").mkdir(parents=True)
        (tmp_path / name / "model/model.pth").write_bytes(weights)
        (tmp_path / name / "output/data/history.csv").write_text(
            f"epoch,train_loss,seconds\n1,0.5,{weights.decode()}\n"
        )
    assert compare.differences(tmp_path / "a", tmp_path / "b") == ["model.pth"]
    assert compare.differences(tmp_path / "a", tmp_path / "a") == []
    (tmp_path / "b/output/data/history.csv").write_text("epoch,train_loss,seconds\n1,0.6,1\n")
    (tmp_path / "b/model/more").touch()
    assert compare.differences(tmp_path / "a", tmp_path / "b") == ["model.pth", "more", "history.csv"]
