"""Run a training script as SageMaker's Managed Spot Training does, on this machine, and interrupt it.

    python -m spot pytorch/train.py --interrupt-after 20s,upload,20s --verify -- --epochs 10
    python -m spot xgboost/train.py --mean-time-between-interruptions 15s --forward-sigterm -- --num-round 500

The flags after `--` are passed to the script as hyperparameters. The script runs under SageMaker's own
toolkit. Its checkpoints are copied to a local S3 server, and back before each attempt. At the end the command
prints the cost of the interruptions and writes a report and a picture.
"""

import argparse
import itertools
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import errors
from common.flags import hyperparameters, integer, real
from common.s3 import list_objects

with errors.importing("the packages in requirements/spot.txt", "pip install -r requirements/spot.txt"):
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    from launch.job import forwarding_sigterm
    from spot import report, service
    from spot.container import namespace
    from verify import compare


def seconds(text):
    """Parse `20`, `20s` or `2m`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([sm]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a time such as 20s or 2m, got {text!r}")
    return float(match[1]) * (60 if match[2] == "m" else 1)


def moments(text):
    """Parse `20s,5epochs,upload`."""
    return [moment(word) for word in text.split(",")]


def moment(word):
    """Parse `20s`, `5epochs` or `upload`."""
    if match := re.fullmatch("([1-9][0-9]*)epochs?", word):
        return service.Epochs(int(match[1]))
    return word if word == service.UPLOAD else seconds(word)


def channel(text):
    """Parse `train=folder`."""
    name, _, folder = text.partition("=")
    if not name or not folder or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(
            f"expected a name and an existing folder such as train=photos, got {text!r}"
        )
    return name, Path(folder)


def s3_folder(text):
    """Parse `s3://bucket/folder/`; add the slash, without which `job-1` also matches `job-10`."""
    if not re.fullmatch("s3://[^/]+/.*[^/]/*", text):
        raise argparse.ArgumentTypeError(
            f"expected an address such as s3://bucket/job/checkpoints/, got {text!r}"
        )
    return text.rstrip("/") + "/"


def endpoint(text):
    """Parse `http://localhost:9000`."""
    if not re.match("https?://[^/]", text):
        raise argparse.ArgumentTypeError(f"expected an address such as http://localhost:9000, got {text!r}")
    return text


def parse_args(argv=None):
    """Return the flags, and as `script_flags` those of the script."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m spot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("script", type=Path, help="such as pytorch/train.py; its folder is the source_dir")
    when = parser.add_mutually_exclusive_group()
    when.add_argument(
        "--interrupt-after",
        type=moments,
        default=[],
        metavar="20s,5epochs,upload,...",
        help="when to interrupt each attempt: a time after its start, after a number of epochs, or "
        "in the middle of its second upload",
    )
    when.add_argument(
        "--mean-time-between-interruptions", type=seconds, metavar="60s", help="at random moments"
    )
    add(
        "--interruptions",
        type=integer(0),
        help="number of interruptions; default: one for each entry of --interrupt-after, or 3 random ones",
    )
    add("--seed", type=int, default=0, help="seed of the random moments")
    add(
        "--forward-sigterm",
        action="store_true",
        help="start with the entry point of the launchers, which forwards SIGTERM to the script",
    )
    add("--grace", type=seconds, default=120, metavar="120s", help="time from SIGTERM to SIGKILL")
    add(
        "--channel",
        type=channel,
        action="append",
        default=[],
        metavar="train=FOLDER",
        help="a folder with data",
    )
    add(
        "--checkpoint-s3-uri",
        type=s3_folder,
        default="s3://simulator/job/checkpoints/",
        help="address of the checkpoints in S3",
    )
    add(
        "--endpoint-url",
        type=endpoint,
        help="S3 server; default: a new one on the loopback address",
    )
    add("--instance-count", type=integer(1), default=1, help="machines that train together")
    add(
        "--stop-sync-after",
        type=integer(1),
        help="number of uploads in an attempt after which S3 receives no more, a known fault of the service",
    )
    add("--upload-rate", type=real(0.001), default=50, help="megabytes per second to S3")
    add(
        "--spot-price",
        type=real(0, 1),
        default=0.3,
        help="price of a Spot instance, as a share of the on-demand price",
    )
    add(
        "--verify",
        action="store_true",
        help="train once more without interruption and compare the models' bits",
    )
    add(
        "--output",
        type=Path,
        default=Path("output/spot"),
        help="folder of the logs, the report and the picture",
    )
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    if args.interruptions and not (args.interrupt_after or args.mean_time_between_interruptions):
        parser.error("--interruptions needs --interrupt-after or --mean-time-between-interruptions")
    if args.mean_time_between_interruptions == 0:
        parser.error("--mean-time-between-interruptions must be more than 0")
    if not args.script.is_file():
        parser.error(f"there is no script {args.script}")
    args.script_flags = argv[split + 1 :]
    return args


def plan(args):
    """Return for each attempt when it is interrupted."""
    if args.mean_time_between_interruptions:
        generator = random.Random(args.seed)  # noqa: S311 - not for secrets
        count = 3 if args.interruptions is None else args.interruptions
        return [generator.expovariate(1 / args.mean_time_between_interruptions) for _ in range(count)]
    count = len(args.interrupt_after) if args.interruptions is None else args.interruptions
    return list(itertools.islice(itertools.cycle(args.interrupt_after), count))


def script_hyperparameters(script, words):
    """Return the script's flags as hyperparameters, with a log line after each step, which the report counts.

    Raises UserError if the script does not start.
    """
    values = hyperparameters(words)
    asked = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    if asked.returncode != 0:
        raise errors.UserError(f"{script} --help fails: {asked.stderr.strip()}")
    if "--log-steps" in asked.stdout:
        values["log-steps"] = "1"
    return values


def environment(script):
    """Return the variables of the container. In SageMaker only TensorFlow's image contains TensorFlow."""
    if re.search(r"^\s*(import|from)\s+(tensorflow|keras)\b", script.read_text(), re.MULTILINE):
        return {}
    return {"PYTHONPATH": str(Path(__file__).with_name("without_tensorflow"))}


def show(event):
    """Print an event of the job, except for log lines that count steps."""
    text = {
        "started": "a container starts",
        "log": event.get("line"),
        "uploaded": f"{event.get('name')} is in S3",
        "deleted": f"{event.get('name')} is deleted in S3",
        "stalled": f"the upload of {event.get('name')} stops half way",
        "sigterm": "SIGTERM is sent to process 1",
        "killed": "the machine is gone",
        "ended": f"process 1 has ended with exit code {event.get('code')}",
    }.get(event["event"])
    if text and not text.startswith("step="):
        print(f"[attempt {event['attempt']}] {text}", flush=True)


def main(args):
    """Run the job, print its cost, and compare its model with that of an uninterrupted job."""
    values = script_hyperparameters(args.script, args.script_flags)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("job", "uninterrupted"):  # of an earlier run
        if (args.output / name / "attempt-1").exists():
            shutil.rmtree(args.output / name)
    place = "a plain process group (no PID namespaces here)"
    if namespace():
        place = "process 1 of a separate PID namespace"
    print(f"The training runs as {place}", flush=True)
    with service.s3_server(args.endpoint_url) as s3:
        uri = args.checkpoint_s3_uri
        moments = plan(args)
        job, model = run(args, s3, "job", uri, values, moments, show)
        attempts = report.read_attempts(job.events)
        numbers = report.figures(attempts, len(list_objects(s3, uri)), args.spot_price)
        differences = []
        if args.verify:
            print("Training once more, without interruption", flush=True)
            untouched = f"{uri[:-1]}-uninterrupted-{time.time():.0f}/"  # a new address
            _, whole = run(args, s3, "uninterrupted", untouched, values, [], lambda event: None)
            differences = compare.differences(model, whole)
            numbers["bit-identical"] = not differences
    report.write(args.output, numbers, attempts, job.request)
    report.show(numbers)
    if numbers["interruptions"] < len(moments):
        happened = f"{numbers['interruptions']} of {len(moments)} interruptions"
        print(f"Only {happened}: the training ended first; let it train longer")
    print(f"Report: {args.output / 'report.json'}, {args.output / 'timeline.png'}")
    if differences:
        raise errors.UserError(f"the models differ: {', '.join(differences)}")


def run(args, s3, name, uri, values, interruptions, watch):
    """Run a job whose checkpoints go to `uri`; return it and the base folder of its last container."""
    channels, folder = dict(args.channel), args.output.resolve() / name
    entry_point = forwarding_sigterm("train") if args.forward_sigterm else None
    variables = environment(args.script)
    request = service.make_request(
        s3, name, args.script, values, channels, uri, entry_point, variables, args.instance_count
    )
    sync = [f"--rate={args.upload_rate * 1e6}"]
    if args.stop_sync_after:
        sync.append(f"--stop-after={args.stop_sync_after}")
    job = service.Job(s3, request, folder, interruptions, args.grace, sync, watch)
    return job, job.run()


ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end(number, frame):
    """End after a signal, and end the container too."""
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    for ending in ENDINGS:
        signal.signal(ending, end)
    args = parse_args()
    try:
        main(args)
    except (errors.UserError, OSError) as error:
        errors.fail(error)
    except (Boto3Error, BotoCoreError, ClientError) as error:
        errors.fail(f"S3 request failed: {error}")
