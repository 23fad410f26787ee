"""The progress of a training: its content in a checkpoint, and the conclusions from its history."""

import json
import math

import numpy as np
import pytest

from common import train_state
from common.errors import UserError
from common.train_state import Progress

pytestmark = pytest.mark.quick


def history(**metrics):
    """Return history rows 1, 2, ... from lists of values."""
    rows = zip(*metrics.values())
    return [{"epoch": epoch, **dict(zip(metrics, values))} for epoch, values in enumerate(rows, start=1)]


def test_a_finished_epoch_is_a_row_and_the_next_one_starts_at_zero():
    progress = Progress(epoch=2, step=26, samples=1000, sums={"loss": (100.0, 1000)}, seconds=2.0)
    row = progress.finish_epoch({"loss": 0.1, "f1": 0.9}, {"loss": 0.2, "f1": 0.8})
    assert row == {
        "epoch": 3,
        "train_loss": 0.1,
        "train_f1": 0.9,
        "validation_loss": 0.2,
        "validation_f1": 0.8,
        "seconds": 2.0,
        "samples_per_second": 500.0,
    }
    assert progress == Progress(epoch=3, history=[row])


# Metrics ----------------------------------------------------------------------------------------------------


def test_metrics_are_ratios_of_the_sums_of_all_workers():
    workers = [{"loss": [1.0, 4.0]}, {"loss": [2.0, 4.0], "late": [1.0, 2.0]}]
    totals = train_state.add_up(workers)
    assert totals == {"loss": [3.0, 8.0], "late": [1.0, 2.0]}
    assert train_state.mean_metrics(totals) == {"loss": 0.375, "late": 0.5}


def test_a_vector_metric_is_the_mean_of_the_ratios_without_empty_entries():
    """Macro F1 of three classes, of which the last does not occur."""
    f1 = [[2.0, 1.0, 0.0], [4.0, 4.0, 0.0]]
    totals = train_state.add_up([{"f1": f1}, {"f1": f1}])
    assert totals == {"f1": [[4.0, 2.0, 0.0], [8.0, 8.0, 0.0]]}
    assert train_state.mean_metrics(totals) == {"f1": (0.5 + 0.25) / 2}
    assert math.isnan(train_state.mean_metrics({"f1": [[0.0], [0.0]]})["f1"])
    assert train_state.mean_metrics({"mean": [[1.0, 3.0], 2.0]}) == {"mean": 1.0}


def test_saved_sums_are_plain_values_and_bit_identical():
    class OnDevice:
        def __init__(self, value):
            self.value = value

        def asnumpy(self):
            return np.asarray(self.value)

    sums = {"loss": (0.1 + 0.2, 3), "f1": (np.array([0.1, 0.7]), OnDevice([1.0, 2.0]))}
    plain = train_state.plain_sums(sums)
    assert json.loads(json.dumps(plain)) == {"loss": [0.1 + 0.2, 3], "f1": [[0.1, 0.7], [1.0, 2.0]]}


# The best epoch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("accuracy", ("accuracy", 1)),
        ("loss", ("loss", -1)),
        ("validation_loss", ("loss", -1)),
        ("rmse", ("rmse", -1)),
        ("ndcg@10", ("ndcg@10", 1)),
        ("mine:max", ("mine", 1)),
        ("mine:min", ("mine", -1)),
        ("accuracy:min", ("accuracy", -1)),
    ],
)
def test_the_direction_of_a_metric_is_known_or_given(text, expected):
    assert train_state.parse_metric(text, "--best-metric") == expected


@pytest.mark.parametrize("text", ["mine", "mine:up", "f2", ""])
def test_a_direction_is_never_guessed(text):
    with pytest.raises(UserError, match=r"is more of .* better or less") as caught:
        train_state.parse_metric(text, "--best-metric")
    assert f"--best-metric {text.split(':')[0]}:max or" in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        (("loss", -1), [3, 1, 2], 2),
        (("accuracy", 1), [0.5, 0.7, 0.7], 2),  # the earlier one of equal epochs
        (("loss", -1), [math.nan, 2.0, math.nan], 2),
        (("loss", -1), [math.nan, math.nan, math.nan], 3),
        (("accuracy", 1), [-math.inf, -2.0, -3.0], 2),
    ],
)
def test_the_best_epoch_has_the_best_validation_metric(metric, values, best):
    rows = history(**{f"validation_{metric[0]}": values})
    tracker = train_state.BestEpoch(*metric)
    found = [tracker.find(rows[: number + 1]) for number in range(len(rows))]  # as the history grows
    assert found[-1]["epoch"] == best
    assert train_state.BestEpoch(*metric).find(rows)["epoch"] == best  # as after a restart


def test_a_metric_that_was_added_later_counts_from_then_on():
    rows = [{"epoch": 1, "validation_rmse": 0.1}, {"epoch": 2, "validation_rmse": 0.3, "validation_mae": 0.2}]
    assert train_state.BestEpoch("mae", -1).find(rows)["epoch"] == 2
    assert train_state.BestEpoch("mae", -1).find([]) is None
    with pytest.raises(UserError, match="no validation metric f1: expected one of rmse, mae"):
        train_state.BestEpoch("f1", 1).find(rows)
