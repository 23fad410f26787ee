"""The pictures of a finished training are drawn last and never make it fail."""

import json
import os
import types

import numpy as np
import pytest
from PIL import Image

from common import pictures
from helpers import (
    FRAMEWORKS,
    LATER,
    Workers,
    assert_same_bits,
    choose,
    environment,
    in_make_test,
    run,
    run_with,
    write_csv,
)

pytest.importorskip("matplotlib")

RESULTS = ["history.csv", "metrics.json"]
CURVES = ["training-curve.png", "confusion-matrix.png"]
DRAWING = {"PYTHONPATH": ""}
SHORT = {name: ["--epochs", 1, "--learning-rate", 1e-4] for name in FRAMEWORKS[:3]}  # learns little
SHORT["xgboost"] = ["--num-round", 3]


def data(folder, framework):
    return folder / "output" / framework / "data"


def names(folder, framework):
    return sorted(os.listdir(data(folder, framework)))


@in_make_test("pytorch", "xgboost")
def test_a_training_ends_with_pictures(framework, tmp_path):
    other = "feature-importance.png" if framework == "xgboost" else "worst-mistakes.png"
    result = run(framework, *SHORT[framework], cwd=tmp_path, env=environment(**DRAWING))
    found = sorted([*CURVES, other])
    assert names(tmp_path, framework) == sorted([*RESULTS, *found])
    assert "\nPictures: " in result.output
    for name in found:
        pixels = np.asarray(Image.open(data(tmp_path, framework) / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 250
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_without_matplotlib_one_line_says_so_and_earlier_pictures_are_deleted(tmp_path):
    drawing = environment(**DRAWING)
    run("xgboost", "--num-round", 2, cwd=tmp_path, env=drawing)
    result = run("xgboost", "--num-round", 3, cwd=tmp_path)
    assert "\nPictures: left out: they need matplotlib (pip install matplotlib)\n" in result.output
    assert names(tmp_path, "xgboost") == RESULTS


# Prints the epochs that the curves mark, and checks that training does not import matplotlib.
SPY = """
from common import pictures
draw_curve = pictures.draw_curve
def spy(history, metrics, resumed):
    print("resumed at", json.dumps(resumed))
    return draw_curve(history, metrics, resumed)
pictures.draw_curve = spy
def check():
    assert "matplotlib" not in sys.modules
at_call(Run, "export", 1, check)
"""


def test_the_curve_marks_where_each_run_has_resumed(tmp_path):
    """Kill the run in the second epoch, which resumes after the first one; then stop it after ten steps."""
    flags = ["--epochs", 3]
    run_with('at_call(Run, "finish_step", 40, lambda: send(9))', "pytorch", *flags, cwd=tmp_path, code=-9)
    run_with('at_call(Run, "finish_step", 10, lambda: send(15))', "pytorch", *flags, cwd=tmp_path, code=143)
    drawing = environment(**DRAWING)
    result = run_with(SPY, "pytorch", *flags, cwd=tmp_path, code=0, env=drawing)
    places = json.loads(result.output.partition("resumed at ")[2].splitlines()[0])
    steps = 26
    assert places == [pytest.approx(1), pytest.approx(1 + 10 / steps, abs=0.01)]


def test_marks_do_not_change_the_bits(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    run("xgboost", "--num-round", 5, cwd=tmp_path / "whole")
    for number in (2, 4, 5):
        run("xgboost", "--num-round", number, cwd=tmp_path / "parts")
    assert_same_bits(tmp_path / "parts", tmp_path / "whole", "xgboost")


@pytest.mark.parametrize("event", ["raise ValueError('of a library')", "send(signal.SIGTERM)"])
def test_neither_an_error_nor_a_signal_while_drawing_changes_the_exit_code(tmp_path, event):
    code = f"""
from common import pictures
def act(*arguments):
    {event}
    return draw(*arguments)
draw, pictures.draw_confusion = pictures.draw_confusion, act
"""
    drawing = environment(**DRAWING)
    result = run_with(code, "xgboost", "--num-round", 3, cwd=tmp_path, code=0, env=drawing)
    drawn = ["feature-importance.png", "training-curve.png"]
    if "raise" in event:
        assert (
            "training-curve.png, feature-importance.png; the others are left out: of a library"
            in result.output
        )
    else:
        drawn.append("confusion-matrix.png")
    assert names(tmp_path, "xgboost") == sorted([*drawn, *RESULTS])


def test_a_regression_has_no_confusion_matrix(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "train").mkdir()
    write_csv(tmp_path / "train/table.csv", generator.normal(size=(200, 3)))
    flags = ["--train", "train", "--num-round", 3]
    result = run("xgboost", *flags, cwd=tmp_path, env=environment(**DRAWING))
    assert "left out" not in result.output
    assert names(tmp_path, "xgboost") == ["feature-importance.png", *RESULTS, "training-curve.png"]


@pytest.mark.parametrize("name", ["xgboost", *[pytest.param(name, marks=LATER) for name in FRAMEWORKS[:3]]])
def test_only_the_main_process_draws(name, tmp_path):
    Workers(choose(name), 2, *SHORT[name], folder=tmp_path, **DRAWING).finish()
    assert set(CURVES) < set(names(tmp_path / "1", name))
    assert not data(tmp_path / "2", name).exists()


# The drawings themselves ------------------------------------------------------------------------------------


def texts(figure):
    """Return all texts in the first panel."""
    axes = figure.axes[0]
    labels = [*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts, axes.title]
    return [label.get_text() for label in labels]


def draw_confusion(size, counts):
    labels, classes = [], []
    for (label, predicted), count in counts.items():
        labels += [label] * count
        classes += [predicted] * count
    found = [f"class {index}" for index in range(size)]
    predictions = types.SimpleNamespace(
        names=found, labels=labels, classes=classes, title="9 validation images"
    )
    return pictures.draw_confusion(predictions)


def test_a_confusion_matrix_has_names_and_counts():
    found = texts(draw_confusion(3, {(0, 0): 5, (1, 2): 3, (2, 2): 1}))
    assert {"class 0", "class 2", "5", "3", "1"} <= set(found)
    assert "Confusion matrix, 9 validation images: 66.7% right" in found


def test_a_confusion_matrix_of_many_classes_lists_the_most_frequent_mistakes():
    found = texts(draw_confusion(100, {(0, 0): 5, (71, 98): 3, (71, 71): 1}))
    assert found.count("class 71") == 2  # on both axes
    assert any("class 71 as class 98: 3 of 4" in text for text in found)


@pytest.mark.parametrize("values", [[1.0, 0.01], [float("nan"), 0.5], [0.5, float("inf")]])
def test_curves_of_any_values_are_drawn(values, tmp_path):
    history = []
    for epoch, value in enumerate(values, start=1):
        history.append({"epoch": epoch, "train_loss": value, "validation_loss": value})
    figure = pictures.draw_curve(history, ["loss"], [1.4, 2])
    figure.savefig(tmp_path / "curve.png")
    assert len([line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]) >= 2
    assert "interrupted once" in figure.get_suptitle()
