"""Pictures of a finished training, in `--output-data-dir`: curves, mistakes, importance of features.

They are drawn with matplotlib after all other files are written. Without it, or if drawing fails, one line of
the log says so; nothing else changes.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from typing import Any

import numpy as np

from common import batches, datasets
from common.atomic_io import atomic_write
from common.errors import first_line
from common.report import log
from common.train_state import Progress

CURVE, CONFUSION = "training-curve.png", "confusion-matrix.png"
MISTAKES, IMPORTANCE = "worst-mistakes.png", "feature-importance.png"
MAX_SAMPLES = 2000  # to predict
MAX_SECONDS = 5
PART = 64  # samples to predict at once
NUM_MISTAKES = 15
NUM_FEATURES = 20
MAX_COUNTED = 20  # classes; the cells of a larger matrix have no numbers
MAX_NAMED = 100  # classes; the axes of a larger matrix have no names
BLUE = "#0072b2"  # a pair that colour-blind readers can distinguish
ORANGE = "#d55e00"
GREY = "#666666"
LIGHT = "#dddddd"
COLOURS = {"train": ORANGE, "validation": BLUE}
LABEL_POINTS = 12  # between lines
TITLE = 13
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.titlesize": TITLE,
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.15,
}


def position(progress: Progress, data: Any) -> float:
    """Return how far a training has come, in epochs."""
    if not progress.step:
        return progress.epoch
    done = progress.samples
    if hasattr(data.train, "unit"):  # it counts batches
        done = progress.step
    share = done / len(data.train)
    return progress.epoch + min(1, share)


def draw(run: Any) -> None:
    """Draw the pictures of a Run that has ended."""
    folder = run.args.output_data_dir
    drawn = []
    try:
        for name in (CURVE, CONFUSION, MISTAKES, IMPORTANCE):
            (folder / name).unlink(missing_ok=True)  # of an earlier model
        import matplotlib

        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those about letters that the font lacks
            for name, figure in _figures(run):
                with atomic_write(folder / name) as file:
                    figure.savefig(file, format="png")
                drawn.append(name)
    except Exception as error:  # from matplotlib, a user's model or the disk
        reason = first_line(error)
        if isinstance(error, ImportError):
            reason = "they need matplotlib (pip install matplotlib)"
        done = f"{', '.join(drawn)}; the others are left out" if drawn else "left out"
        log(f"Pictures: {done}: {reason}")
        return
    if drawn:
        log(f"Pictures: {folder} ({', '.join(drawn)})")


def _figures(run):
    """Yield (name, figure)."""
    history = run.progress.history
    metrics = _metrics(run) if history else []
    if metrics:
        yield CURVE, draw_curve(history, metrics, run.resumed)
    if hasattr(run.state, "booster"):
        gains = run.state.booster.get_score(importance_type="gain")
        if gains:
            yield IMPORTANCE, draw_importance(gains)
    predictions = _Predictions(run)
    if predictions.labels:
        yield CONFUSION, draw_confusion(predictions)
        if predictions.mistakes:
            yield MISTAKES, draw_mistakes(predictions)


def _metrics(run):
    """Return the names of one or two validation metrics: the loss, and the deciding or first one."""
    names = []
    for key in run.progress.history[-1]:
        split, _, name = key.partition("_")
        if split == "validation":
            names.append(name)
    best, _, _ = (run.args.best_metric or "").partition(":")
    names.sort(key=lambda name: name != best)
    names.sort(key=lambda name: name != "loss")
    return names[:2]


# The training curve -----------------------------------------------------------------------------------------


def draw_curve(history: list[dict], metrics: list[str], resumed: list[float]) -> Any:
    """Return a figure of metrics over epochs, with marks where the training was interrupted.

    Args:
        history: a dictionary of metrics for each epoch.
        metrics: the names of the metrics to show.
        resumed: numbers of epochs.
    """
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    marks = sorted({place for place in resumed if place < epochs[-1]})
    title = "1 epoch" if len(epochs) == 1 else f"{len(epochs):,} epochs"
    if marks:
        often = {1: "once", 2: "twice"}
        times = often.get(len(marks), f"{len(marks)} times")
        title = f"{title}, interrupted {times}"
    width = 6 * len(metrics)
    figure = Figure(figsize=(width, 4))
    figure.suptitle(title, x=0.125, y=1.03, ha="left")
    panels = figure.subplots(1, len(metrics), squeeze=False)
    figure.subplots_adjust(wspace=0.55)
    for axes, metric in zip(panels[0], metrics):
        curves = {}
        for split in COLOURS:
            key = f"{split}_{metric}"
            curves[split] = [row.get(key, np.nan) for row in history]
        _draw_curves(axes, epochs, curves)
        axes.set(title=metric, xlabel="epoch")
        first = min([epochs[-1] - 1, epochs[0], *marks])
        axes.set_xlim(first, epochs[-1])
        if metric == "loss":
            _choose_scale(axes, curves)
        elif metric == "accuracy":
            axes.set_ylim(top=min(1, axes.get_ylim()[1]))
        for mark in marks:
            axes.axvline(mark, color=GREY, linewidth=1, linestyle=":", zorder=0)
        _label_ends(axes, curves)
    if marks:
        _label_mark(panels[0][0], marks[0])
    return figure


def _draw_curves(axes, epochs, curves):
    from matplotlib.ticker import MaxNLocator

    marker = "o" if len(epochs) <= 30 else ""
    for split, values in curves.items():
        axes.plot(
            epochs,
            values,
            color=COLOURS[split],
            linewidth=1.8,
            marker=marker,
            markersize=4,
            clip_on=False,
        )
    locator = MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True)
    axes.xaxis.set_major_locator(locator)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)


def _label_mark(axes, mark):
    axes.annotate(
        "interrupted",
        (mark, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -2),
        textcoords="offset points",
        va="top",
        color=GREY,
        fontsize=9,
    )


def _choose_scale(axes, curves):
    """Use a logarithmic scale for a loss that falls so far that its end would be invisible."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = np.array([*curves.values()])
    values = values[np.isfinite(values)]
    lowest = values.min(initial=np.inf)
    highest = values.max(initial=0)
    if lowest > 0 and highest > 20 * lowest:
        axes.set_yscale("log")
        locator = LogLocator(subs=(1, 2, 5))
        axes.yaxis.set_major_locator(locator)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(axes, curves):
    """Write name and last value at the end of each curve, without overlaps."""
    heights = {}  # in points
    for split, values in curves.items():
        if np.isfinite(values[-1]):
            _, pixels = axes.transData.transform((0, values[-1]))
            heights[split] = pixels * 72 / axes.figure.dpi
    order = sorted(heights, key=heights.get)
    shift = 0
    if len(order) == 2:
        distance = heights[order[1]] - heights[order[0]]
        shift = max(0, LABEL_POINTS - distance) / 2
    _, last = axes.get_xlim()
    for split, change in zip(order, (-shift, shift)):
        value = curves[split][-1]
        name = "training" if split == "train" else split
        axes.annotate(
            f"{name} {value:.3g}",
            (last, value),
            xytext=(7, change),
            textcoords="offset points",
            color=COLOURS[split],
            va="center",
            annotation_clip=False,
        )


# Predictions ------------------------------------------------------------------------------------------------


class _Predictions:
    """The predictions of the exported model for validation samples; empty unless it is a classifier.

    Attributes:
        names: of the classes.
        labels, classes: the true and the predicted class of each sample.
        mistakes: the worst ones as (probability of the true class, that of the predicted one, label, class,
            image).
        title: the number and the kind of the samples.
    """

    def __init__(self, run):
        from common import serving  # which needs Pillow

        self.labels = []
        self.classes = []
        self.mistakes = []
        facts = serving.read_facts(run.args.model_dir)
        self.names = facts["class_names"]
        if facts["outputs"] == "values":
            return
        if not self.names:
            log("Pictures: no confusion matrix, as the data set has no `classes`")
            return
        script = type(run.state).__module__
        sys.modules.setdefault("train", sys.modules[script])  # inference.py imports it
        model = importlib.import_module("inference").Model(run.args.model_dir)
        is_table = not isinstance(run.data, datasets.Data)
        read = _read_table if is_table else _read_images
        deadline = time.monotonic() + MAX_SECONDS
        for samples, labels in read(run):
            if labels.ndim > 1 or not np.isin(labels, range(len(self.names))).all():
                self.labels = []
                return
            inputs = samples
            if samples.dtype == np.uint8:
                inputs = samples.astype(np.float32)
            outputs = model(inputs)
            probabilities = serving.to_probabilities(outputs, facts)
            self._add(labels.astype(int), probabilities)
            if not is_table:
                self._add_mistakes(samples, labels.astype(int), probabilities)
            if time.monotonic() > deadline:
                break
        validation = run.data.validation
        size = len(validation.labels if is_table else validation)
        kind = "rows" if is_table else "images"
        self.title = f"{size:,} validation {kind}"
        if len(self.labels) < size:
            self.title = f"{len(self.labels):,} of {self.title}"

    def _add(self, labels, probabilities):
        self.labels += labels.tolist()
        self.classes += probabilities.argmax(1).tolist()

    def _add_mistakes(self, images, labels, probabilities):
        if images.ndim != 4 or images.shape[3] not in (1, 3):
            return
        classes = probabilities.argmax(1)
        for index in np.flatnonzero(classes != labels):
            label = labels[index]
            predicted = classes[index]
            right, wrong = probabilities[index, [label, predicted]]
            self.mistakes.append((right, wrong, label, predicted, images[index]))
        self.mistakes.sort(key=lambda mistake: mistake[0])
        del self.mistakes[NUM_MISTAKES:]


def _read_images(run):
    """Yield (images, labels), evenly spread over the validation data and in random order."""
    dataset = run.data.validation
    indices = datasets.spread(len(dataset), MAX_SAMPLES)
    indices = np.random.default_rng(0).permutation(indices)
    if hasattr(dataset, "batches"):
        indices = np.arange(2)  # it returns its first samples for any indices
    num_parts = -(-len(indices) // PART)
    for part in np.array_split(indices, num_parts):
        key = (run.args.seed,)
        samples, labels, _ = batches.read_samples(dataset, part, run.engine, key)
        yield samples, labels


def _read_table(run):
    """Yield (features, labels), evenly spread over the validation rows."""
    table = run.data.validation
    indices = datasets.spread(len(table.labels), MAX_SAMPLES)
    for part in table.rows(indices).parts():
        yield part.features, part.labels


def draw_confusion(predictions: Any) -> Any:
    """Return a figure of the confusion matrix."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    names = [_shorten(name) for name in predictions.names]
    size = len(names)
    counts = np.zeros((size, size), int)
    np.add.at(counts, (predictions.labels, predictions.classes), 1)
    of_class = counts.sum(1, keepdims=True)
    shades = np.sqrt(counts / np.maximum(of_class, 1))
    pixels = np.empty((size, size, 3))
    pixels[:] = to_rgb(ORANGE)
    pixels[np.eye(size, dtype=bool)] = to_rgb(BLUE)
    pixels = 1 - (1 - pixels) * shades[..., np.newaxis]
    is_small = size <= MAX_COUNTED
    inches = 1 + np.clip(0.45 * size, 3.6, 8)
    if not is_small:
        inches = 1 + np.clip(0.12 * size, 6, 12)
    figure = Figure(figsize=(inches, inches))
    axes = figure.subplots()
    accuracy = np.trace(counts) / counts.sum()
    title = f"Confusion matrix, {predictions.title}: {accuracy:.1%} right"
    axes.set_title(title, fontsize=TITLE, pad=12)
    axes.imshow(pixels, interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.tick_params(length=0)
    if size <= MAX_NAMED:
        _name_classes(axes, names)
    _draw_grid(axes, size)
    if is_small:
        _write_counts(axes, counts, shades)
    else:
        text = _list_confusions(counts, names)
        axes.text(1.02, 1, text, transform=axes.transAxes, va="top", fontsize=9, linespacing=1.5)
    return figure


def _name_classes(axes, names):
    letters = 10 if len(names) <= MAX_COUNTED else 6
    longest = max(map(len, names))
    places = range(len(names))
    axes.set_xticks(places, names, fontsize=letters)
    axes.set_yticks(places, names, fontsize=letters)
    if longest > 2:
        axes.tick_params(axis="x", labelrotation=90)


def _draw_grid(axes, size):
    step = 1 if size <= MAX_COUNTED else 10
    for line in range(0, size + 1, step):
        axes.axvline(line - 0.5, color=LIGHT, linewidth=0.8)
        axes.axhline(line - 0.5, color=LIGHT, linewidth=0.8)
    axes.spines[:].set_color(LIGHT)
    axes.spines[:].set_visible(True)


def _write_counts(axes, counts, shades):
    for row, column in np.argwhere(counts):
        colour = "white" if shades[row, column] > 0.7 else "black"
        count = counts[row, column]
        axes.text(column, row, count, color=colour, ha="center", va="center")


def _list_confusions(counts, names):
    """Return a line for each of the most frequent mistakes."""
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)
    lines = ["Most frequent mistakes"]
    order = np.argsort(-mistakes, axis=None, kind="stable")
    for place in order[:NUM_MISTAKES]:
        label, predicted = np.unravel_index(place, counts.shape)
        count = mistakes[label, predicted]
        if count:
            lines.append(f"{names[label]} as {names[predicted]}: {count} of {counts[label].sum()}")
    return "\n".join(lines)


def draw_mistakes(predictions: Any) -> Any:
    """Return a contact sheet of the worst mistakes."""
    from matplotlib.figure import Figure

    mistakes = predictions.mistakes
    num_columns = min(5, len(mistakes))
    num_rows = -(-len(mistakes) // num_columns)
    size = max(2 * num_columns, 5), 2.5 * num_rows
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"Worst mistakes among {predictions.title}", x=0.01, ha="left")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    names = [_shorten(name) for name in predictions.names]
    for axes, (right, wrong, label, predicted, image) in zip(grid.flat, mistakes):
        axes.imshow(_to_pixels(image), cmap="gray", interpolation="nearest")
        text = f"predicted {names[predicted]}, {wrong:.0%}\ntrue {names[label]}, {right:.0%}"
        axes.set_title(text, fontsize=9, loc="center")
    return figure


def _shorten(name, letters=18):
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _to_pixels(image):
    """Return an image of any range in the range that matplotlib shows."""
    if image.shape[2] == 1:
        image = image[..., 0]
    if image.dtype == np.uint8:
        return image
    low = np.nanmin(image)
    high = np.nanmax(image)
    return (image - low) / (high - low or 1)


# Boosted trees ----------------------------------------------------------------------------------------------


def draw_importance(gains: dict[str, float]) -> Any:
    """Return a figure of the features with the largest mean gain of their splits."""
    from matplotlib.figure import Figure

    order = sorted(gains, key=lambda name: gains[name], reverse=True)
    names = order[:NUM_FEATURES]
    some = f"{len(names)} features"
    if len(names) < len(gains):
        some = f"{len(names)} of {len(gains)} features"
    height = 1.2 + 0.28 * len(names)
    figure = Figure(figsize=(8, height))
    axes = figure.subplots()
    axes.set_title(f"Feature importance, {some}: mean gain of a split", fontsize=TITLE, pad=12)
    values = [gains[name] for name in names]
    places = range(len(names))
    bars = axes.barh(places, values, color=BLUE, height=0.7)
    axes.bar_label(bars, fmt="{:.3g}", padding=4)
    labels = [_shorten(name, 30) for name in names]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    return figure
