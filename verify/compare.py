"""Whether two trainings have ended with the same bits."""

import csv
import subprocess
import sys
from pathlib import Path

# Keras writes the variables a second time, in another order each time, and a fingerprint of that: here are
# the first.
SAVED_MODEL = """
import sys
import tensorflow as tf
reader = tf.train.load_checkpoint(sys.argv[1])
for name in sorted(reader.get_variable_to_shape_map()):
    if name.startswith("variables/"):
        print(name, reader.get_tensor(name).tobytes().hex())
"""
TIMES = ("seconds", "samples_per_second")


def differences(folder, other, history="output/data/history.csv"):
    """Return what differs in `model/` and in the history of two folders, as a list of names."""
    models, others = read_model(folder / "model"), read_model(other / "model")
    if not models:
        return ["no model was written"]
    found = [name for name in sorted({*models, *others}) if models.get(name) != others.get(name)]
    rows, other_rows = read_history(folder / history), read_history(other / history)
    return found + (["history.csv"] if rows != other_rows else [])


def read_model(folder):
    """Return the content of an exported model: bytes by names of files, or of variables of a SavedModel."""
    files = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}
    saved_models = {str(Path(name).parent) for name in files if Path(name).name == "saved_model.pb"}
    content = {
        name: path.read_bytes() for name, path in files.items() if Path(name).parts[0] not in saved_models
    }
    for name in saved_models:
        command = [sys.executable, "-c", SAVED_MODEL, str(folder / name / "variables/variables")]
        lines = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout
        content.update((f"{name}/{line.split()[0]}", line) for line in lines.splitlines())
    return content


def read_history(path):
    """Return the rows of `history.csv` without its times."""
    with open(path) as file:
        return [{key: row[key] for key in row if key not in TIMES} for row in csv.DictReader(file)]
