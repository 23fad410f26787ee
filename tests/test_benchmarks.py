"""Arithmetic and report of the benchmarks; the measurements depend on the machine and are not tested."""

import importlib
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import first_step, gpu, gpu_parts, gpu_training, harness
from benchmarks.input import write_jpegs
from helpers import ROOT, environment


@pytest.mark.parametrize(
    ("value", "limit", "reached"),
    [(1.1, "<= 1.1", True), (1.11, "<= 1.1", False), (0.94, ">= 0.95", False), (3, "", None)],
)
def test_a_limit_is_an_upper_or_lower_bound(value, limit, reached):
    assert harness.Figure("what", value, limit).reached is reached


def test_variants_alternate_and_adjacent_runs_are_compared():
    calls = []
    turns = harness.take_turns(
        3,
        ours=lambda: calls.append("ours") or 2 * len(calls),
        lean=lambda: calls.append("lean") or len(calls),
    )
    assert calls == ["ours", "lean", "lean", "ours", "ours", "lean"]
    assert turns == {"ours": [2, 8, 10], "lean": [2, 3, 6]}
    assert harness.ratio(turns["ours"], turns["lean"]) == 10 / 6


def test_a_repetition_that_would_end_too_late_is_not_started():
    turns = harness.take_turns(9, 0.5, slow=lambda: time.sleep(0.2))
    assert len(turns["slow"]) == 2
    assert len(harness.take_turns(3, 0.0, slow=lambda: 1)["slow"]) == 1


def test_the_report_contains_all_saved_benchmarks(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write_results("one", "First.\n\nMore of\nit.\n", [harness.Figure("a", 1.05, "<= 1.1", "10 s")], 5)
    harness.write_results(
        "two", "Second.\n", [harness.Figure("b", 0.5, ">= 0.95"), harness.Figure("c", 7)], 5
    )
    harness.write_report(["one", "two", "three"])
    report = (tmp_path / "README.md").read_text()
    assert "## one\n\nFirst.\n\nMore of it.\n" in report
    assert "| a | 1.05 | <= 1.1 | yes | 10 s |\n" in report
    assert "| b | 0.5 | >= 0.95 | **no** |  |\n| c | 7 |  |  |  |\n" in report
    assert (tmp_path / "figures.png").stat().st_size > 1000


def test_each_benchmark_has_a_docstring_and_measures():
    for name in benchmarks.NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        assert module.__doc__
        assert callable(module.measure)


# The parts that replace functions of the scripts.
REPLACING = [
    "account mxnet",
    "checkpoint pytorch cnn 1",
    "growth before xgboost 1",
    "growth state pytorch 64 1",
    "input train tensorflow tiny 1",
    "memory mxnet tiny saved",
    "predecessor ours",
    "step steps tensorflow --epochs 2",
    "step steps xgboost --epochs 2",
]


@pytest.mark.integration
@pytest.mark.parametrize("words", REPLACING)
def test_a_part_of_a_benchmark_measures(words):
    seen = harness.run_json(*words.split())
    values = list(seen.values()) if isinstance(seen, dict) else [seen]
    assert np.all(np.isfinite(np.concatenate([np.ravel(value) for value in values])))


@pytest.mark.integration
def test_the_benchmark_of_the_first_step_limits_the_memory(tmp_path, monkeypatch):
    write_jpegs(tmp_path, 200, 32)
    outputs = []
    run = harness.run
    monkeypatch.setattr(harness, "run", lambda *words: outputs.append(run(*words)) or outputs[-1])
    assert len(first_step._epoch_rates(tmp_path, 200 * 32 * 32 * 3)) == 3
    assert "stay in memory, and the rest are decoded in each epoch" in outputs[0]


def test_missing_packages_are_left_out_of_the_machine(monkeypatch):
    monkeypatch.setattr(harness, "PACKAGES", ("numpy", "no-such-package"))
    facts = harness.machine()
    assert "numpy" in facts
    assert "no-such-package" not in facts


def test_a_gpu_is_reported_with_its_driver(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA H100 80GB HBM3, 580.159.04\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness.machine()["GPU"] == "NVIDIA H100 80GB HBM3 (driver 580.159.04)"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert harness.machine()["GPU"] == "none"


def test_the_report_contains_gpu_figures_or_their_absence(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write_report([], draw=False)
    assert "## On a GPU\n\nNot measured yet." in (tmp_path / "README.md").read_text()
    figures = [harness.Figure("a", 0.987, detail="9 of 10")]
    content = harness.result("First.\n\nMore of\nit.\n", figures, 3, "abc1234")
    gpu.keep(tmp_path / "gpu.json", "step", {**content, "failures": [["b", "no | compiler"]]})
    gpu.keep(tmp_path / "gpu.json", "xgboost", {**content, "failures": []})
    harness.write_report([], draw=False)
    report = (tmp_path / "README.md").read_text()
    assert "Not measured yet" not in report
    assert "### step\n\nFirst.\n\nMore of it.\n" in report
    assert ", commit abc1234. CPU " in report
    assert "| a | 0.987 | 9 of 10 |\n| b | not measured | no / compiler |\n\n### xgboost" in report


# ------------------------------------------------------------------------------------------------------------
# The benchmark for GPUs, on CPUs
# ------------------------------------------------------------------------------------------------------------

TRIAL = {  # plausible values, with wide limits for a busy machine
    "step": {
        "cnn 8 x 8 fp32: script / lean loop": (0.01, 100),
        "cnn 8 x 8 fp32: script --no-deterministic / lean loop": (0.01, 100),
        "cnn 8 x 8 fp32: script --loaders 2 / lean loop": (0.01, 100),
        "cnn 8 x 8 fp32: untuned lean loop / lean loop": (0.01, 100),
        "cnn 8 x 8 fp32: lean loop with input / lean loop": (0.01, 100),
        "cnn 8 x 8 fp32: script --compile / compiled lean loop": (0.01, 100),
        "cnn 8 x 8 fp32: compiled lean loop with input / compiled lean loop": (0.01, 100),
    },
    "checkpoint": {
        "cnn, 0.8 MB: stall / bare copy": (-math.inf, math.inf),  # a copy takes microseconds
        "cnn, 0.8 MB: overhead of a save every 10 s": (-1, 1),
        "cnn, 0.8 MB: resumed / fresh start": (0.1, 10),
    },
    "exactness": {
        "cnn fp16: tensors that differ": (0, 0),
        "cnn fp32 --compile: tensors that differ": (0, 0),
    },
    "xgboost": {
        "script / xgb.train": (0.001, 100),
        "script with one checkpoint / xgb.train": (0.001, 100),
        "start with --device auto / --device cpu": (0.1, 10),
        "resumed after 20 rounds / fresh start": (0.1, 10),
    },
}


def run_gpu(*flags, **variables):
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", *map(str, flags)]
    options = {"capture_output": True, "text": True, "timeout": 1200}
    return subprocess.run(command, cwd=ROOT, env=environment(**variables), **options)


@pytest.mark.integration
def test_a_trial_run_of_the_gpu_benchmark_measures_every_figure(tmp_path):
    results = {path: path.read_bytes() for path in harness.RESULTS.iterdir()}
    finished = run_gpu("--output", tmp_path / "gpu.json", "--seed", 7, "--commit", "abc1234")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert results == {path: path.read_bytes() for path in harness.RESULTS.iterdir()}
    parts = json.loads((tmp_path / "gpu.json").read_text())
    assert list(parts) == list(TRIAL) == list(gpu.PARTS)
    for part, content in parts.items():
        assert content["failures"] == []
        assert content["commit"] == "abc1234"
        assert content["machine"]["torch"]
        figures = {figure.what: figure for figure in map(harness.Figure._make, content["figures"])}
        assert list(figures) == list(TRIAL[part])
        for what, figure in figures.items():
            low, high = TRIAL[part][what]
            assert math.isfinite(figure.value), figure
            assert low <= figure.value <= high, figure
            assert figure.detail
    details = [figure[-1] for figure in parts["exactness"]["figures"]]
    assert all("SIGTERM after step" in detail and "seed 7" in detail for detail in details)
    assert [int(detail.split()[1].rstrip(";")) for detail in details] == [31, 31]  # tensors


def test_a_failed_figure_does_not_affect_the_others(tmp_path, monkeypatch, capsys):
    def broken(run):
        """A part that fails at the start."""
        raise RuntimeError("Traceback\n\nno compiler")
        yield

    def half(run):
        """A part with one failing figure of two."""
        yield "first", lambda: 1 / 0
        yield "second", lambda: [harness.Figure("kept", 2.0, detail="2 of 1")]

    monkeypatch.setattr(gpu, "PARTS", {"broken": broken, "half": half})
    output = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--device", "cpu", "--output", str(output)]) == 1
    printed = capsys.readouterr().out
    assert "  broken: not measured: no compiler\n" in printed
    assert "  first: not measured: division by zero\n  kept: 2 (2 of 1)\n" in printed
    parts = json.loads(output.read_text())
    assert parts["broken"]["failures"] == [["broken", "no compiler"]]
    assert parts["half"]["figures"] == [["kept", 2.0, "", "2 of 1"]]
    assert gpu.main(["half", "--tiny", "--device", "cpu", "--output", str(output)]) == 1
    assert set(json.loads(output.read_text())) == {"broken", "half"}


def test_the_last_line_of_a_failed_script_is_the_reason(tmp_path):
    (tmp_path / "xgboost").mkdir()
    (tmp_path / "xgboost" / "__init__.py").write_text("raise ImportError('a broken library')")
    finished = run_gpu("xgboost", PYTHONPATH=str(tmp_path))
    assert finished.returncode == 1
    for what in ("rounds", "search for a GPU", "restart"):
        (line,) = [line for line in finished.stdout.splitlines() if line.startswith(f"  {what}: ")]
        assert line.startswith(f"  {what}: not measured: xgboost/train.py")
        assert "a broken library" in line
    assert not finished.stderr


def test_a_script_folder_is_not_mistaken_for_a_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "xgboost", raising=False)
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    with pytest.raises(RuntimeError, match="xgboost is not installed"):
        gpu_parts.require("xgboost")


def test_without_a_gpu_only_a_trial_run_is_possible(monkeypatch, capsys):
    monkeypatch.setattr(harness, "machine", lambda: {"GPU": "none"})
    mistakes = {"no GPU found": [], "unknown: speed": ["speed"], "1 or more": ["--repetitions", "0"]}
    for message, flags in mistakes.items():
        with pytest.raises(SystemExit) as ended:
            gpu.main(flags)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_checkpoints_are_compared_bit_by_bit_per_tensor(tmp_path):
    torch = pytest.importorskip("torch")
    one, other = paths = tmp_path / "one.pt", tmp_path / "other.pt"
    weights = torch.tensor([1.0, math.nan])
    state = {"model": {"w": weights, "n": torch.tensor(3)}, "optimizer": [{"m": torch.zeros(2)}]}
    torch.save(state, one)
    torch.save({**state, "epoch": 3}, other)
    assert gpu_training.compare_checkpoints(*paths) == (3, [])
    torch.save({"model": {"w": weights}, "optimizer": [{"m": -torch.zeros(2)}]}, other)
    assert gpu_training.compare_checkpoints(*paths) == (3, ["model.n", "optimizer.0.m"])
    torch.save({"epoch": 3}, one)
    with pytest.raises(RuntimeError, match="contains no tensors"):
        gpu_training.compare_checkpoints(one, one)
