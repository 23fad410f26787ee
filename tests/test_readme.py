"""README and docs are correct: their commands run, and the tables of flags match the scripts."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_iris

from common import flags
from helpers import HAS_MXNET, ROOT, environment

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def blocks(language):
    """Return the code blocks of a language on all pages, in order."""
    text = "".join(path.read_text() for path in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def flag_tables():
    """Return the tables of flags, one per group, generated from the parsers."""
    parsers = flags.image_flags("<framework>"), flags.xgboost_flags()
    image, trees = ({action.dest: action for action in parser._actions} for parser in parsers)
    text = ""
    for title in flags.GROUPS:
        text += f"\n## {title.capitalize()}\n\n| Flag | Default | Scripts | Meaning |\n|---|---|---|---|\n"
        names = [action.dest for parser in parsers for action in parser.adder(title).__self__._group_actions]
        for name in dict.fromkeys(names):
            text += flag_row(image.get(name), trees.get(name)) + "\n"
    return text


def flag_row(image, trees):
    """Return the row of a flag of the image scripts, the XGBoost script or both."""
    action = image or trees
    scripts = "all" if image and trees else "images" if image else "XGBoost"
    default = action.default
    if isinstance(default, list):
        default = json.dumps(default)
    if isinstance(default, bool):
        default = "on" if default else "off"
    default = "" if default is None else f"`{default}`"
    if image and trees and image.default != trees.default and action.dest != "output":
        default += f" (XGBoost: `{trees.default}`)"
    options = ", ".join(f"`{option}`" for option in action.option_strings)
    if action.dest == "epochs":
        options += ", `--num-round` (XGBoost)"
    choices = f" ({', '.join(action.choices)})" if action.choices else ""
    return f"| {options} | {default} | {scripts} | {action.help}{choices} |"


def test_the_tables_of_flags_match_the_scripts(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SM_", "SAGEMAKER_")):
            monkeypatch.delenv(name)
    page = (ROOT / "docs/flags.md").read_text()
    assert page.endswith(flag_tables()), f"The tables of flags should be:\n{flag_tables()}"


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 150
    assert len(PAGES) == 7


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Return a copy of the repository with some images; its `.venv` is the environment of this test."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    ignored = shutil.ignore_patterns(".git", ".venv*", "output", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        (folder / ".venv" / path.name).symlink_to(path)
    for name in ("installed", "spot-installed"):  # not older than the copied requirements
        (folder / ".venv" / name).unlink(missing_ok=True)
        (folder / ".venv" / name).touch()
    for name in (".venv-sdk2", ".venv-sdk3"):
        (folder / name).symlink_to(ROOT / name)
    Image.new("L", (8, 8)).save(folder / "digit.png")
    generator = np.random.default_rng(0)
    (folder / "tables").mkdir()
    flowers = load_iris()
    rows = [
        f"{','.join(map(str, row))},{flowers.target_names[label]}"
        for row, label in zip(flowers.data, flowers.target)
    ]
    (folder / "tables/flowers.csv").write_text("\n".join(["a,b,c,d,species", *rows]) + "\n")
    for channel, count in (("train", 40), ("validation", 10)):
        for name, colour in (("cats", 60), ("dogs", 180)):
            (folder / "photos" / channel / name).mkdir(parents=True)
            for index in range(count):
                size = tuple(generator.integers(60, 120, 2))
                pixels = (generator.normal(colour, 30, (*size, 3)).clip(0, 255)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / channel / name / f"{index}.jpg")
    return folder


@pytest.mark.skipif(not HAS_MXNET, reason="one of the commands trains with MXNet")
def test_the_commands_of_all_pages_run_unchanged(clone):
    script = "set -e\n" + "".join(blocks("bash"))
    finished = subprocess.run(
        ["bash", "-c", script],
        cwd=clone,
        env=environment(PYTHONPATH=""),  # with matplotlib
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("\nStarting training from epoch: 1\n") == 10
    assert re.search(r"Resuming training from xgboost-checkpoint.\d+\nStarting training", finished.stdout)
    sums = re.findall(
        r"^(\w{64})  output/(?:whole|killed)/model/xgboost-model$", finished.stdout, re.MULTILINE
    )
    assert len(sums) == 2
    assert sums[0] == sums[1]
    assert finished.stdout.count('"EnableManagedSpotTraining": true') == 3
    assert finished.stdout.count("Managed Spot Training savings: 70.0%\n") == 2
    assert "\ninterruptions: 2\n" in finished.stdout
    assert "\nbit-identical: True\n" in finished.stdout
    for framework in ("pytorch", "tensorflow", "mxnet", "xgboost"):
        assert (clone / "output" / framework / "data/metrics.json").is_file()
    assert "\n20 predictions in predictions.csv\n" in finished.stdout
    assert "A restart resumes from checkpoint-" in finished.stdout
    assert (clone / "output/epoch-3/model/model.pth").is_file()
    assert not any(path.is_symlink() for path in (clone / "my-job").rglob("*"))
    assert (clone / "output/my-job/checkpoints/checkpoint-1.pt").is_file()


def test_make_train_the_second_time_trains_nothing(clone):
    for framework in ("pytorch", "xgboost"):
        subprocess.run(["make", "train", f"FRAMEWORK={framework}"], cwd=clone, env=environment(), check=True)
        again = subprocess.check_output(
            ["make", "train", f"FRAMEWORK={framework}"], cwd=clone, env=environment(), text=True
        )
        assert "Nothing left to train" in again


def test_the_python_blocks_on_the_pages_compile():
    assert len(blocks("python")) == 4
    for block in blocks("python"):
        compile(block, "README.md", "exec")


def heading_anchors(path):
    """Return the anchors that GitHub creates for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_links_of_the_pages_have_targets():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), (page, target)
            if anchor:
                assert anchor in heading_anchors(path), (page, target, anchor)


def test_the_messages_of_troubleshooting_are_in_the_code():
    """Values such as names and numbers are placeholders and are ignored."""
    code = "".join(
        path.read_text() for folder in ("common", "launch") for path in ROOT.glob(f"{folder}/*.py")
    )
    messages = []
    for page in PAGES:
        _, _, section = page.read_text().partition("\n## Troubleshooting\n")
        messages += re.findall(r"^\| `(.*?)` \|", section.partition("\n## ")[0], re.MULTILINE)
    assert len(messages) >= 12
    values = r"--lr|--learning-rate|\S*checkpoint-5\.pt\S*|200\.0|600|algo-2|--train|data: expected train.*"
    for message in messages:
        if message == "Unable to locate credentials":  # a message of boto3
            continue
        for part in re.split(values, message):
            assert part.strip() in code, message
