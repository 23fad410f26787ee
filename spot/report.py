"""The cost of a simulated job as figures, a picture and JSON, computed from its events."""

import json
import re

from common.report import metric_definitions

START = re.compile(r"Starting training from epoch: (\d+)(?:, step: (\d+))?$")
STEP = re.compile(r"step=(\d+)/(\d+) epoch=(\d+)$")
EPOCH = re.compile(r"epoch=(\d+) ")


def read_attempts(events):
    """Return a list with a dictionary for each attempt.

    `start`, `end`: times in seconds since the start of the first attempt. `steps`: a list of (time, step),
    the step counted from the start of the training; the first entry is the start of the attempt. `epochs`: a
    list of (time, epoch, metrics). `uploaded`: a list of (time, name). `interruption`: stalled (an upload),
    sigterm or None. `code`: the exit code or None.
    """
    lines = (STEP.match(event.get("line", "")) for event in events)
    steps_per_epoch = next((int(match[2]) for match in lines if match), 1)
    origin = events[0]["time"]
    attempts = []
    for event in events:
        moment, kind = event["time"] - origin, event["event"]
        if kind == "started":
            attempts.append(
                {
                    "start": moment,
                    "steps": [],
                    "epochs": [],
                    "uploaded": [],
                    "interruption": None,
                    "code": None,
                }
            )
        attempt = attempts[-1]
        attempt["end"] = moment
        if kind == "log":
            _read_line(attempt, moment, event["line"], steps_per_epoch)
        elif kind == "uploaded":
            attempt["uploaded"].append((moment, event["name"]))
        elif kind == "ended":
            attempt["code"] = event["code"]
        elif kind == "stalled":
            attempt["stalled"] = True
        elif kind == "sigterm":
            attempt["interruption"] = "stalled" if "stalled" in attempt else "sigterm"
            attempt["interrupted_at"] = moment
    return attempts


def _read_line(attempt, moment, line, steps_per_epoch):
    step = None
    if match := START.match(line):
        step = (int(match[1]) - 1) * steps_per_epoch + max(int(match[2] or 0) - 1, 0)
    elif match := STEP.match(line):
        step = (int(match[3]) - 1) * steps_per_epoch + int(match[1])
    elif match := EPOCH.match(line):
        step = int(match[1]) * steps_per_epoch
        found = ((definition, re.search(definition["Regex"], line)) for definition in metric_definitions())
        metrics = {definition["Name"]: float(value[1]) for definition, value in found if value}
        attempt["epochs"].append((moment, int(match[1]), metrics))
    if step is not None and (not attempt["steps"] or step > attempt["steps"][-1][1]):
        attempt["steps"].append((moment, step))


def figures(attempts, num_checkpoints, spot_price):
    """Return the cost of the job as a dictionary; times are in seconds.

    Args:
        num_checkpoints: the number of checkpoints in S3.
        spot_price: the price of a Spot instance as a share of the on-demand price.
    """
    trained = [attempt for attempt in attempts if attempt["steps"]]
    seconds = sum(attempt["end"] - attempt["start"] for attempt in attempts)
    steps_lost, seconds_lost = 0, 0.0
    for attempt, following in zip(trained, trained[1:]):
        resumed = following["steps"][0][1]
        lost = max(attempt["steps"][-1][1] - resumed, 0)
        if lost:
            steps_lost += lost
            attempt["lost_since"] = next(moment for moment, step in attempt["steps"] if step >= resumed)
            seconds_lost += attempt["end"] - attempt["lost_since"]
    starts = [attempt["steps"][0][0] - attempt["start"] for attempt in trained]
    return {
        "training_seconds": round(seconds),
        "billable_seconds": round(seconds * spot_price),
        "savings_percent": round(100 * (1 - spot_price), 1),
        "attempts": len(attempts),
        "interruptions": sum(attempt["code"] != 0 for attempt in attempts),
        "steps_trained": sum(attempt["steps"][-1][1] - attempt["steps"][0][1] for attempt in trained),
        "steps_lost": steps_lost,
        "seconds_lost": round(seconds_lost, 2),
        "seconds_to_start": round(sum(starts) / max(len(starts), 1), 2),
        "checkpoints_in_s3": num_checkpoints,
    }


def show(numbers):
    """Print the figures, SageMaker's own lines first."""
    print(f"Training seconds: {numbers['training_seconds']}")
    print(f"Billable seconds: {numbers['billable_seconds']}")
    print(f"Managed Spot Training savings: {numbers['savings_percent']}%")
    for name in list(numbers)[3:]:
        print(f"{name.replace('_', ' ').replace('s3', 'S3')}: {numbers[name]}")


def write(folder, numbers, attempts, request):
    """Write `report.json` and the picture `timeline.png`."""
    report = {"figures": numbers, "request": request, "attempts": attempts}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(folder / "timeline.png", attempts, numbers, request["TrainingJobName"])


def draw(path, attempts, numbers, title):
    """Draw the loss, the attempts, the interruptions and the checkpoints over the time."""
    import matplotlib

    matplotlib.use("Agg")  # no screen
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(
        2, 1, sharex=True, figsize=(10, 6), height_ratios=(2, 1), layout="constrained"
    )
    names = list(
        dict.fromkeys(name for attempt in attempts for *_, metrics in attempt["epochs"] for name in metrics)
    )
    metric = next((name.split(":")[1] for name in names if ":" in name), "loss")
    for number, attempt in enumerate(attempts, 1):
        start, end = attempt["start"], attempt["end"]
        begin = attempt["steps"][0][0] if attempt["steps"] else end
        bars.barh(number, begin - start, left=start, color="lightgrey", label="starting")
        bars.barh(number, end - begin, left=begin, color="tab:green", label="training")
        if "lost_since" in attempt:
            since = attempt["lost_since"]
            bars.barh(
                number, end - since, left=since, color="none", edgecolor="crimson", hatch="////", label="lost"
            )
        uploads = [moment for moment, _ in attempt["uploaded"]]
        bars.plot(uploads, [number] * len(uploads), "k|", markersize=12, label="checkpoint in S3")
        for split, style in (("train", "o-C0"), ("validation", "s--C1")):
            points = [(moment, metrics.get(f"{split}:{metric}")) for moment, _, metrics in attempt["epochs"]]
            curves.plot(
                *(zip(*points) if points else ((), ())), style, markersize=4, label=f"{split}_{metric}"
            )
        if attempt["interruption"]:
            moment = attempt["interrupted_at"]
            for axes in (curves, bars):
                axes.axvline(moment, color="crimson", linewidth=1)
            label = {"sigterm": "SIGTERM", "stalled": "mid-upload"}[attempt["interruption"]]
            curves.annotate(
                f" {label}", (moment, 0.98), xycoords=("data", "axes fraction"), color="crimson", va="top"
            )
    for axes in (curves, bars):
        handles = dict(zip(*reversed(axes.get_legend_handles_labels())))  # each label once
        axes.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    lost = f"{numbers['steps_lost']} of {numbers['steps_trained']} steps lost"
    curves.set(ylabel=metric, title=f"{title}: {numbers['interruptions']} interruptions, {lost}")
    bars.set(
        xlabel="seconds",
        ylabel="attempt",
        ylim=(len(attempts) + 0.6, 0.4),
        yticks=range(1, len(attempts) + 1),
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
