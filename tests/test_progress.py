"""How far the training has come, and when it is time to save."""

import json
import math
from argparse import Namespace

import pytest

from common import cluster
from common.progress import Progress


def history(**metrics):
    """Return rows 1, 2, ... from lists of values."""
    rows = zip(*metrics.values())
    return [{"epoch": epoch, **dict(zip(metrics, values))} for epoch, values in enumerate(rows, start=1)]


def test_what_a_checkpoint_keeps_is_plain_and_goes_on_with_the_same_numbers():
    progress = Progress(history=history(validation_loss=[0.5]), epoch=1)
    progress.start_clock()
    progress.count_step(64, 1.25, 3)
    progress.count_step(60, 0.1, 4)
    described = json.loads(json.dumps(progress.describe()))
    resumed = Progress.restore(described)
    assert (resumed.epoch, resumed.initial_epoch, resumed.step, resumed.samples) == (1, 1, 2, 124)
    assert (resumed.loss_sum, resumed.correct, resumed.history) == (1.25 + 0.1, 7, progress.history)
    assert resumed.training_metrics() == {"loss": 1.35 / 124, "accuracy": 7 / 124}


def test_what_is_written_in_the_background_does_not_know_of_the_next_epoch():
    progress = Progress()
    progress.start_clock()
    progress.count_step(64, 1.25, 3)
    described = progress.describe()
    before = json.dumps(described)
    progress.finish_epoch(progress.training_metrics(), {"loss": 0.5, "accuracy": 0.5})
    assert json.dumps(described) == before


@pytest.mark.parametrize(("size", "expected"), [(1, [0.75]), (2, [0.25, 0.5]), (3, [0.75, 0, 0])])
def test_each_worker_goes_on_with_its_own_sums_and_none_is_lost_with_another_number(monkeypatch, size, expected):
    described = Progress(step=2, samples=100, loss_sum=0.25, correct=60).describe()
    described.update(loss_sum=[0.25, 0.5], correct=[60, 40])
    monkeypatch.setattr(cluster, "size", size)
    restored = []
    for rank in range(size):
        monkeypatch.setattr(cluster, "rank", rank)
        restored.append(Progress.restore(described))
    assert [progress.loss_sum for progress in restored] == expected
    assert sum(progress.correct for progress in restored) == 100
    assert {progress.samples for progress in restored} == {100}


def test_the_seconds_of_an_epoch_are_those_of_its_steps_also_over_a_restart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    progress = Progress()
    wait(50)  # the first batch is being made
    progress.start_clock()
    wait(3)
    resumed = Progress.restore(progress.describe())
    wait(50)
    resumed.start_clock()
    wait(4)
    resumed.training_metrics()
    wait(50)  # validation
    assert resumed.describe()["seconds"] == 7


def test_a_finished_epoch_is_logged_and_the_next_one_begins_at_zero(capsys):
    progress = Progress(epoch=2, step=26, samples=1000, correct=900, loss_sum=100.0, seconds=2.0)
    progress.finish_epoch(progress.training_metrics(), {"loss": 0.2, "accuracy": 0.8})
    line = "epoch=3 train_loss=0.1000 train_accuracy=0.9000 validation_loss=0.2000 validation_accuracy=0.8000 "
    assert capsys.readouterr().out == line + "seconds=2.00 samples_per_second=500\n"
    described = progress.describe()
    assert [row["epoch"] for row in described.pop("history")] == [3]
    empty = {"step": 0, "samples": 0, "correct": [0], "loss_sum": [0.0], "seconds": 0.0}
    assert described == {"epoch": 3, **empty}


def test_checkpoints_are_due_by_steps_and_by_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress()

    def due(checkpoint_steps, checkpoint_seconds, steps, seconds):
        now[0] = seconds
        args = Namespace(checkpoint_steps=checkpoint_steps, checkpoint_seconds=checkpoint_seconds)
        return progress.save_is_due(args, steps)

    assert not due(0, 0, steps=100, seconds=1e9)
    assert [steps for steps in range(1, 10) if due(3, 0, steps, 0)] == [3, 6, 9]
    assert [seconds for seconds in (1, 299, 300, 500) if due(0, 300, 1, seconds)] == [300, 500]
    progress.describe()  # saved
    assert [seconds for seconds in (501, 799, 800) if due(0, 300, 1, seconds)] == [800]
    assert due(5, 300, steps=5, seconds=801)


@pytest.mark.parametrize(
    ("metrics", "best"),
    [
        ({"validation_loss": [3, 1, 2], "validation_accuracy": [0.5, 0.6, 0.7]}, 3),
        ({"validation_accuracy": [0.5, 0.7, 0.7]}, 2),  # the earlier of equals
        ({"train_rmse": [1, 2, 3], "validation_rmse": [3, 1, 2]}, 2),
        ({"validation_rmse": [1, 2, 3], "validation_ndcg@10": [0.5, 0.7, 0.6]}, 2),
        ({"validation_auc": [0.7, 0.6, 0.5]}, 1),
        ({"validation_loss": [math.nan, 2.0, math.nan]}, 2),
        ({"validation_loss": [math.nan, math.nan, math.nan]}, 3),
    ],
)
def test_the_best_epoch_is_that_of_the_best_validation_metric(metrics, best):
    assert Progress(epoch=3, history=history(**metrics)).best_epoch() == best


def test_a_metric_that_was_added_later_counts_from_there():
    rows = [{"epoch": 1, "validation_rmse": 0.1}, {"epoch": 2, "validation_rmse": 0.3, "validation_mae": 0.2}]
    assert Progress(epoch=2, history=rows).best_epoch() == 2
    assert Progress().best_epoch() == 0
