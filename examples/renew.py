"""Renew the examples from their templates: everything outside "Make it yours", and the links.

    python examples/renew.py

Changes nothing if the examples are up to date.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = {"finetune": "pytorch", "keras_fit": "tensorflow", "own_objective": "xgboost"}
RULE = "# " + 108 * "-"  # above and below the title of a section
FIRST_TITLE = "# Make it yours"


def split(text):
    """Return a script as three texts: what precedes "Make it yours", the section, and what follows it."""
    lines = text.splitlines(keepends=True)
    rules = [number for number, line in enumerate(lines) if line.rstrip() == RULE]
    position = next(index for index, number in enumerate(rules) if lines[number + 1].startswith(FIRST_TITLE))
    first = rules[position + 1] + 1  # after the banner
    last = rules[position + 2]  # the next banner
    return "".join(lines[:first]), "".join(lines[first:last]), "".join(lines[last:])


def renew(name):
    """Renew an example; its own part is the section "Make it yours"."""
    folder = ROOT / "examples" / name
    template = ROOT / TEMPLATES[name]
    script = folder / "train.py"
    before, _, after = split((template / "train.py").read_text())
    _, section, _ = split(script.read_text())
    text = before + section + after
    if text != script.read_text():
        script.write_text(text)
        print(f"Renewed {script.relative_to(ROOT)}")
    for path in template.iterdir():
        if path.name not in ("train.py", "train_tf1.py") and (path.suffix == ".py" or path.name == "common"):
            link(folder / path.name, path)


def link(path, target):
    """Make a relative link unless there is one; a link of the template leads to its own target."""
    relative = os.path.relpath(target.resolve(), path.parent)
    if path.is_symlink() and os.readlink(path) == relative:
        return
    path.unlink(missing_ok=True)
    path.symlink_to(relative)
    print(f"Linked {path.relative_to(ROOT)}")


if __name__ == "__main__":
    for example in TEMPLATES:
        renew(example)
