"""The benchmarks' own arithmetic and report; what they measure is not tested, as this machine may be busy."""

import importlib

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import harness


@pytest.mark.parametrize(
    ("value", "limit", "reached"),
    [(1.1, "<= 1.1", True), (1.11, "<= 1.1", False), (0.94, ">= 0.95", False), (3, "", None)],
)
def test_a_limit_is_reached_from_its_good_side(value, limit, reached):
    assert harness.Figure("what", value, limit).reached is reached


def test_variants_take_turns_and_neighbours_are_compared():
    calls = []
    turns = harness.take_turns(
        3, ours=lambda: calls.append("ours") or 2 * len(calls), lean=lambda: calls.append("lean") or len(calls)
    )
    assert calls == ["ours", "lean", "lean", "ours", "ours", "lean"]
    assert turns == {"ours": [2, 8, 10], "lean": [2, 3, 6]}
    assert harness.ratio(turns["ours"], turns["lean"]) == 10 / 6


def test_a_part_that_is_measured_again_leaves_the_others_in_the_report(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write_results("one", "First.\n\nMore of\nit.\n", [harness.Figure("a", 1.05, "<= 1.1", "10 s")], 5)
    harness.write_results("two", "Second.\n", [harness.Figure("b", 0.5, ">= 0.95"), harness.Figure("c", 7)], 5)
    harness.write_report(["one", "two", "three"])
    report = (tmp_path / "README.md").read_text()
    assert "## one\n\nFirst.\n\nMore of it.\n" in report
    assert "| a | 1.05 | <= 1.1 | yes | 10 s |\n" in report
    assert "| b | 0.5 | >= 0.95 | **no** |  |\n| c | 7 |  |  |  |\n" in report
    assert (tmp_path / "figures.png").stat().st_size > 1000


def test_each_benchmark_says_what_it_measures():
    for name in benchmarks.NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        assert module.__doc__
        assert callable(module.measure)
