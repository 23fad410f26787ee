"""One clear line instead of a traceback for what a user, not a programmer, can mend."""

import contextlib
import difflib
import os
import sys
from pathlib import Path


class UserError(Exception):
    """A mistake in the flags or the data, or a limit of the machine: what happened, what was expected, what to do."""


@contextlib.contextmanager
def framework(name, hint):
    """Import a framework inside this block; one that is not installed ends the script with one line."""
    try:
        yield
    except ImportError as error:
        fail(f"this script needs {name}, which cannot be imported here ({error}). {hint}")


def check_device(args, name, gpus):
    """Raise UserError where the flags need a GPU and the framework, by its name, finds none, or exclude each other."""
    if args.device == "cuda" and not gpus:
        raise UserError(f"--device cuda: {name} finds no GPU here; use --device auto or cpu")
    if not gpus and name in ("TensorFlow", "MXNet") and args.precision == "fp16":
        raise UserError(f"--precision fp16: {name} has it on GPUs only; use --precision bf16 or fp32")
    if name == "TensorFlow" and args.compile and (args.deterministic or len(gpus) > 1 or len(args.hosts) > 1):
        raise UserError(
            "--compile: XLA cannot compute max pooling deterministically, nor on several devices here: "
            "add --no-deterministic, and use one host and --num-gpus 1"
        )


def unfit_images(args, data, reason):
    """Return the UserError for images that the model cannot take, mostly because they are too small."""
    height, width, channels = data.image_shape
    return UserError(
        f"--model {args.model} cannot take images of {height}x{width}x{channels} ({reason}): "
        "pass --image-size, such as 224"
    )


def check_choice(flag, value, choices):
    """Raise UserError where `value` is not one of `choices`, naming the nearest ones."""
    if value not in choices:
        nearest = ", ".join(difflib.get_close_matches(value, choices, n=3, cutoff=0.0))
        raise UserError(f"{flag} {value} is unknown: expected one of {len(choices)} names, the nearest are {nearest}")


def fail(message, code=1):
    """End with one line; in a SageMaker container it is also the FailureReason of the job."""
    tell_sagemaker(f"error: {message}")
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def tell_sagemaker(reason):
    """Write why the script ends where SageMaker reads it, which shows the first 1,024 characters.

    https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo.html
    """
    folder = os.environ.get("SM_OUTPUT_DIR")
    if folder:
        with contextlib.suppress(OSError):  # the log has it too
            Path(folder, "failure").write_text(reason)
