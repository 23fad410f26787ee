"""`model.json`, which says what is in the folder of an exported model and which training it comes from."""

import json
import os

from common.errors import UserError

FILE_NAME = "model.json"


def describe(args, job, data):
    """Return what `model.json` contains, in plain values.

    Args:
        args: the flags.
        job: what makes a job, such as {"--model": "cnn"}.
        data: a `common.datasets.Data`, or None for tables.
    """
    facts = {"checkpoints": _origin(args), "job": job}
    if data:
        facts["class_names"] = data.classes
        facts["sample_shape"] = list(data.sample_shape)
        facts["mean"] = data.mean if data.mean is None else data.mean.tolist()
        facts["std"] = data.std if data.std is None else data.std.tolist()
    return facts


def write(path, facts):
    """Write `model.json`."""
    path.write_text(json.dumps(facts, indent=2) + "\n")


def check_same_job(path, facts):
    """Raise UserError if the model beside `path`, its `model.json`, is of another job and would be lost."""
    try:
        earlier = json.loads(path.read_text())
        earlier_job = {**earlier["job"], "the folder of checkpoints": earlier["checkpoints"]}
    except (OSError, ValueError, KeyError, TypeError):
        return  # no model, or not one of ours
    facts = json.loads(json.dumps(facts))
    job = {**facts["job"], "the folder of checkpoints": facts["checkpoints"]}
    for key, value in job.items():
        if key in earlier_job and earlier_job[key] != value:
            raise UserError(
                f"--model-dir {path.parent} contains the model of another job: "
                f"{key} was {earlier_job[key]} and is now {value}. "
                "Pass another --output or --model-dir, delete that folder, or add --resume-anyway"
            )


def _origin(args):
    """Return which training a model comes from; this stays true if both folders are moved together."""
    return os.path.relpath(args.checkpoint_path.resolve(), args.model_dir.resolve())
