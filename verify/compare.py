"""Compare the results of two trainings bit by bit."""

import csv
import json
from pathlib import Path

# TensorFlow numbers their functions by the number created so far, which an interruption changes.
NUMBERED = ("saved_model.pb", "fingerprint.pb")
TIMES = ("seconds", "samples_per_second")


def differences(folder, other, history="output/data/history.csv"):
    """Return the names of the files that differ in `model/` and in the history of two folders."""
    models, others = read_model(folder / "model"), read_model(other / "model")
    if not models:
        return ["no model was written"]
    found = [name for name in sorted({*models, *others}) if models.get(name) != others.get(name)]
    rows, other_rows = read_history(folder / history), read_history(other / history)
    return found + (["history.csv"] if rows != other_rows else [])


def read_model(folder):
    """Return the content of an exported model, as bytes by file name.

    The flags in `model.json`, which may differ, are left out. A SavedModel is reduced to its variables.
    """
    files = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}
    content = {}
    for name, path in files.items():
        if path.name == "model.json":
            facts = json.loads(path.read_text())
            facts["flags"] = facts["paths"] = None
            content[name] = json.dumps(facts).encode()
        elif path.name not in NUMBERED and "__pycache__" not in path.parts:
            content[name] = path.read_bytes()
    return content


def read_history(path):
    """Return the rows of `history.csv` without its times."""
    with open(path) as file:
        return [{key: row[key] for key in row if key not in TIMES} for row in csv.DictReader(file)]
