"""Pictures of a finished training, in `--output-data-dir`: curves, mistakes, importance of features.

They are drawn with matplotlib after all else is written. Without it, or if drawing fails, one line of the log
says so; nothing else changes.
"""

import importlib
import sys
import time
import warnings

import numpy as np

from common import batches, datasets
from common.atomic_io import atomic_write
from common.errors import first_line
from common.report import log

CURVE, CONFUSION = "training-curve.png", "confusion-matrix.png"
MISTAKES, IMPORTANCE = "worst-mistakes.png", "feature-importance.png"
MAX_SAMPLES = 2000  # that are predicted
MAX_SECONDS = 5
PART = 64  # samples that are predicted at once
NUM_MISTAKES = 15
NUM_FEATURES = 20
MAX_COUNTED = 20  # classes; the cells of a matrix of more have no numbers
MAX_NAMED = 100  # classes; the axes of a matrix of more have no names
BLUE, ORANGE, GREY, LIGHT = "#0072b2", "#d55e00", "#666666", "#dddddd"  # also for colour-blind readers
COLOURS = {"train": ORANGE, "validation": BLUE}
LABEL_PIXELS = 18  # from line to line
TITLE = 13
STYLE = {
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


def position(progress, data):
    """Return how far a training has come, in epochs."""
    if not progress.step:
        return progress.epoch
    done = progress.step if getattr(data.train, "unit", "samples") == "batches" else progress.samples
    return progress.epoch + min(1, done / len(data.train))


def draw(run):
    """Draw what can be drawn of a Run that has ended."""
    folder = run.args.output_data_dir
    drawn = []
    try:
        for name in (CURVE, CONFUSION, MISTAKES, IMPORTANCE):
            (folder / name).unlink(missing_ok=True)  # of an earlier model
        import matplotlib

        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those of names that the font lacks
            for name, figure in _figures(run):
                with atomic_write(folder / name) as file:
                    figure.savefig(file, format="png")
                drawn.append(name)
    except Exception as error:  # of matplotlib, of a user's model, of the disk
        reason = "they need matplotlib" if isinstance(error, ImportError) else first_line(error)
        log(f"Pictures: {', '.join(drawn) or 'none'}; the others are left out: {reason}")
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
    """Return the names of one or two validation metrics: the loss, and what decides or comes first."""
    names = [key[len("validation_") :] for key in run.progress.history[-1] if key.startswith("validation_")]
    if run.args.best_metric:
        names.sort(key=lambda name: name != run.args.best_metric.split(":")[0])
    names.sort(key=lambda name: name != "loss")
    return names[:2]


# The training curve -----------------------------------------------------------------------------------------


def draw_curve(history, metrics, resumed):
    """Return a figure of metrics over epochs, with marks where the training was interrupted.

    Args:
        history: a dictionary of metrics for each epoch.
        metrics: the names of those to show.
        resumed: numbers of epochs.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    marks = sorted({place for place in resumed if place < epochs[-1]})
    title = "1 epoch" if epochs[-1] == 1 else f"{epochs[-1]:,} epochs"
    if marks:
        times = {1: "once", 2: "twice"}.get(len(marks), f"{len(marks)} times")
        title += f", interrupted {times}"
    figure = Figure(figsize=(6 * len(metrics), 4))
    figure.suptitle(title, x=0.125, ha="left", y=1.03)
    grid = figure.subplots(1, len(metrics), squeeze=False, gridspec_kw={"wspace": 0.55})
    for axes, metric in zip(grid[0], metrics):
        curves = {}
        for split in ("train", "validation"):
            curves[split] = [row.get(f"{split}_{metric}", np.nan) for row in history]
        axes.set(title=metric, xlabel="epoch")
        axes.set_xlim(min(epochs[0], *marks, epochs[-1] - 1), epochs[-1])
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axes.grid(axis="y", color=LIGHT, linewidth=0.6)
        style = {"linewidth": 1.8, "marker": "o" if len(epochs) <= 30 else "", "markersize": 4}
        for split, values in curves.items():
            axes.plot(epochs, values, color=COLOURS[split], clip_on=False, **style)
        if metric == "loss":
            _choose_scale(axes, curves)
        for mark in marks:
            axes.axvline(mark, color=GREY, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        if marks and axes.get_subplotspec().is_first_col():
            place = {"xytext": (3, -2), "textcoords": "offset points", "va": "top"}
            axes.annotate("interrupted", (marks[0], 1), xycoords=_MARK, color=GREY, fontsize=9, **place)
        _label_ends(axes, curves)
    return figure


_MARK = ("data", "axes fraction")


def _choose_scale(axes, curves):
    """Use a logarithmic scale for a loss that falls so far that its end could not be seen otherwise."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = np.concatenate(list(curves.values()))
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(axes, curves):
    """Write name and last value behind each curve, the labels apart from each other."""
    points = {}
    for split, values in curves.items():
        if np.isfinite(values[-1]):
            points[split] = axes.transData.transform((0, values[-1]))[1]
    order = sorted(points, key=points.get)
    shift = 0
    if len(order) == 2:
        shift = max(0, LABEL_PIXELS - (points[order[1]] - points[order[0]])) / 2
    for split, change in zip(order, (-shift, shift)):
        name = "training" if split == "train" else split
        axes.annotate(
            f"{name} {curves[split][-1]:.3g}",
            (axes.get_xlim()[1], curves[split][-1]),
            xytext=(7, change * 72 / axes.figure.dpi),
            textcoords="offset points",
            color=COLOURS[split],
            va="center",
            annotation_clip=False,
        )


# Predictions ------------------------------------------------------------------------------------------------


class _Predictions:
    """What the exported model predicts for validation samples; nothing for a model that is no classifier.

    Attributes:
        names: of the classes.
        labels, classes: of each sample, the right and the predicted class.
        mistakes: the worst ones as (probability of the right class, that of the predicted one, label, class,
            image).
        title: what they are of.
    """

    def __init__(self, run):
        from common import serving  # which needs Pillow

        self.labels, self.classes, self.mistakes = [], [], []
        sys.modules.setdefault("train", sys.modules[type(run.state).__module__])  # inference.py imports it
        facts = serving.read_facts(run.args.model_dir)
        self.names = facts["class_names"]
        if facts["outputs"] == "values" or not self.names:
            return
        model = importlib.import_module("inference").Model(run.args.model_dir)
        is_table = not isinstance(run.data, datasets.Data)
        deadline = time.monotonic() + MAX_SECONDS
        for samples, labels in _read_table(run.data) if is_table else _read_images(run):
            if labels.ndim > 1 or not np.isin(labels, np.arange(len(self.names))).all():
                self.labels = []
                return
            images = samples.astype(np.float32) if samples.dtype == np.uint8 else samples
            probabilities = serving.to_probabilities(model(images), facts)
            self._add(None if is_table else samples, labels.astype(int), probabilities)
            if time.monotonic() > deadline:
                break
        size = len(run.data.validation.labels if is_table else run.data.validation)
        kind = "rows" if is_table else "images"
        some = f"{len(self.labels):,} of {size:,} validation {kind}"
        self.title = f"{size:,} validation {kind}" if size <= len(self.labels) else some

    def _add(self, images, labels, probabilities):
        classes = probabilities.argmax(1)
        self.labels += labels.tolist()
        self.classes += classes.tolist()
        if images is None or images.ndim != 4 or images.shape[3] not in (1, 3):
            return
        for index in np.flatnonzero(classes != labels):
            row, label, predicted = probabilities[index], labels[index], classes[index]
            self.mistakes.append((row[label], row[predicted], label, predicted, images[index]))
        self.mistakes.sort(key=lambda mistake: mistake[:1])
        del self.mistakes[NUM_MISTAKES:]


def _read_images(run):
    """Yield (images, labels), evenly spread over the validation data and in random order."""
    dataset = run.data.validation
    indices = np.random.default_rng(0).permutation(datasets.spread(len(dataset), MAX_SAMPLES))
    if hasattr(dataset, "batches"):
        indices = np.arange(2)  # it returns its first samples for them
    for part in np.array_split(indices, -(-len(indices) // PART)):
        yield batches.read_samples(dataset, part, run.engine, (run.args.seed,))[:2]


def _read_table(tables):
    """Yield (features, labels)."""
    table = tables.validation.rows(datasets.spread(len(tables.validation.labels), MAX_SAMPLES))
    for part in table.parts():
        yield part.features, part.labels


def draw_confusion(predictions):
    """Return a figure of how many samples of each class were predicted as which class."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    names = [_shorten(name) for name in predictions.names]
    size = len(names)
    counts = np.zeros((size, size), int)
    np.add.at(counts, (predictions.labels, predictions.classes), 1)
    shares = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))[..., np.newaxis]
    is_right = np.eye(size, dtype=bool)[..., np.newaxis]
    pixels = 1 - shares * (1 - np.where(is_right, to_rgb(BLUE), to_rgb(ORANGE)))
    is_small = size <= MAX_COUNTED
    inches = np.clip(0.45 * size, 3.6, 8) if is_small else np.clip(0.12 * size, 6, 12)
    figure = Figure(figsize=(inches + 1, inches + 1))
    accuracy = np.trace(counts) / counts.sum()
    axes = figure.subplots()
    axes.set_title(f"Confusion matrix, {predictions.title}: {accuracy:.1%} right", fontsize=TITLE, pad=12)
    axes.imshow(pixels, interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class")
    if size <= MAX_NAMED:
        letters = 10 if is_small else 6
        rotation = 90 if max(map(len, names)) > 2 else 0
        axes.set_xticks(range(size), names, rotation=rotation, fontsize=letters)
        axes.set_yticks(range(size), names, fontsize=letters)
    for line in np.arange(0, size + 1, 1 if is_small else 10) - 0.5:
        axes.axvline(line, color=LIGHT, linewidth=0.8)
        axes.axhline(line, color=LIGHT, linewidth=0.8)
    axes.tick_params(length=0)
    axes.spines[:].set_color(LIGHT)
    axes.spines[:].set_visible(True)
    if not is_small:
        text = _list_confusions(counts, names)
        axes.text(1.02, 1, text, transform=axes.transAxes, va="top", fontsize=9, linespacing=1.5)
        return figure
    for row, column in zip(*counts.nonzero()):
        colour = "white" if shares[row, column] > 0.7 else "black"
        axes.text(column, row, counts[row, column], color=colour, ha="center", va="center")
    return figure


def _list_confusions(counts, names):
    """Return a line for each of the most frequent mistakes."""
    mistakes = counts * (1 - np.eye(len(names), dtype=int))
    lines = ["Most frequent mistakes"]
    for place in np.argsort(-mistakes, axis=None, kind="stable")[:NUM_MISTAKES]:
        label, predicted = np.unravel_index(place, counts.shape)
        if mistakes[label, predicted]:
            some = f"{counts[label, predicted]} of {counts[label].sum()}"
            lines.append(f"{names[label]} as {names[predicted]}: {some}")
    return "\n".join(lines)


def draw_mistakes(predictions):
    """Return a contact sheet of the worst mistakes."""
    from matplotlib.figure import Figure

    mistakes = predictions.mistakes
    num_columns = min(5, len(mistakes))
    num_rows = -(-len(mistakes) // num_columns)
    figure = Figure(figsize=(max(2 * num_columns, 5), 2.5 * num_rows), layout="constrained")
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
    """Return an image of any range as matplotlib shows it."""
    image = image[..., 0] if image.shape[2] == 1 else image
    if image.dtype == np.uint8:
        return image
    low, high = np.nanmin(image), np.nanmax(image)
    return (image - low) / (high - low or 1)


# Boosted trees ----------------------------------------------------------------------------------------------


def draw_importance(gains):
    """Return a figure of the mean gain of the splits by each feature, the largest ones."""
    from matplotlib.figure import Figure

    names = sorted(gains, key=gains.get, reverse=True)[:NUM_FEATURES]
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(names)))
    some = f"{len(names)} of {len(gains)} features" if len(names) < len(gains) else f"{len(names)} features"
    axes = figure.subplots()
    axes.set_title(f"Feature importance, {some}: mean gain of a split", fontsize=TITLE, pad=12)
    bars = axes.barh(names, [gains[name] for name in names], color=BLUE, height=0.7)
    axes.bar_label(bars, [f"{gains[name]:.3g}" for name in names], padding=4)
    axes.set_yticks(range(len(names)), [_shorten(name, 30) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    return figure
