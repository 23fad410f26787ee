"""Export the model of any checkpoint, during a training or after it.

    python -m common.export pytorch/train.py output/pytorch/checkpoints/checkpoint-3.pt output/epoch-3

The script must be the one that wrote the checkpoint; its data are not needed. The folder gets `model/` and
`data/`, as --output does at the end of a training. Nothing else changes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from common import checkpoint_schema, checkpoints, errors, model_folder, report, run
from common.atomic_io import prepare_folder
from common.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Export the model that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m common.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, help="train.py")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that the script has written")
    parser.add_argument("output", type=Path, help="folder for the model and its metrics")
    args = parser.parse_args(argv)
    stop_logging = report.start_logging(is_main_process=True)
    try:
        export(import_script(args.script), args.checkpoint, args.output)
    except Exception as error:
        run.report_error(error)
    finally:
        stop_logging()


def import_script(path: Path) -> ModuleType:
    """Return a training script as the module `train`."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a training script, such as pytorch/train.py")
    sys.path.insert(0, str(path.resolve().parent))  # `engine.py` is beside it
    specification: Any = importlib.util.spec_from_file_location("train", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["train"] = module
    specification.loader.exec_module(module)
    return module


def export(train: ModuleType, checkpoint: Path, output: Path) -> None:
    """Write the model of a checkpoint, and its metrics.

    Args:
        train: the training script as a module.
        checkpoint: the path of the checkpoint.
        output: the folder for `model/` and `data/`.
    """
    content = read_checkpoint(train.engine, checkpoint)
    facts = content.get("export") or {
        "flags": {},
        "paths": [],
    }  # SageMaker's XGBoost container writes none
    args = model_folder.restore_flags(facts, train.parse_args)
    args.device = "cpu"
    args.hosts, args.current_host = ["localhost"], "localhost"
    args.compile = False
    args.best_metric = None  # the model is that of the checkpoint
    args.checkpoint_path = checkpoint.resolve().parent
    args.model_dir, args.output_data_dir = output / "model", output / "data"
    for folder in (args.model_dir, args.output_data_dir):
        prepare_folder(folder, "the folder")
    training = run.Run(args, train.engine)
    try:
        training.load_checkpoint(content, train.TrainingState)
        train.export_model(training, training.state)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise checkpoints.misfit(checkpoint, error) from error
    finally:
        training.saver.close()


def read_checkpoint(engine: ModuleType, path: Path) -> dict:
    """Return the content of a checkpoint. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = engine.read_checkpoint(file)
        checkpoint_schema.check(content)
    except Exception as error:  # each framework has its own errors for a damaged file
        raise UserError(f"cannot read {path} as a checkpoint: {errors.first_line(error)}") from error
    return content


if __name__ == "__main__":
    main()
