"""Calling `main` from another program, as in a notebook or a sweep; the number of functions per step."""

import json

import pytest

from helpers import EVENTS, ROOT, assert_same_bits, history, in_make_test, run_python

FLAGS = {"xgboost": ["--epochs", "30"]}

# Calls `main` three times: interrupted, resumed, and in another folder without an interruption.
TWICE = """
import sys
sys.path.insert(0, sys.argv[1])
{EVENTS}
import train
from common.preemption import Interrupted
received = []
def own(number, frame):
    received.append(number)
signal.signal(signal.SIGTERM, own)
found = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
def call(output, flags):
    train.main(train.parse_args(["--output", output, *flags]))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == found
flags = json.loads(sys.argv[2])
name = "finish_round" if "xgboost" in sys.argv[1] else "finish_step"
at_call(Run, name, 20, lambda: send(signal.SIGTERM))
try:
    call(sys.argv[3], flags)
except Interrupted as interrupted:
    print("exit code", interrupted.exit_code)
while undo:
    setattr(*undo.pop())
assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == found
assert received == []
call(sys.argv[3], flags)
call(sys.argv[4], flags)
send(signal.SIGTERM)
assert received == [signal.SIGTERM]
"""


@in_make_test("pytorch", "xgboost")
def test_main_can_be_called_again_even_after_an_interruption(framework, tmp_path, uninterrupted):
    """The signal handlers are restored, and the result is bit-identical to a run of the script."""
    flags = FLAGS.get(framework, ["--epochs", "2"])
    outputs = [f"{name}/output/{framework}" for name in ("parts", "whole")]
    script = TWICE.replace("{EVENTS}", EVENTS)
    result = run_python(script, ROOT / framework, json.dumps(flags), *outputs, cwd=tmp_path)
    assert "exit code 143\n" in result.output
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert_same_bits(parts, whole, framework)
    epochs = int(flags[1])
    assert history(whole, framework) == history(uninterrupted(framework), framework)[:epochs]


# Records which of our functions run, in all threads, during a step, a save or a resume.
JUMPS = """
import sys
sys.path.insert(0, sys.argv[1])
{EVENTS}
import threading
import train
from common.checkpoints import Checkpoints
root = sys.argv[2]
entered = {"step": set(), "save": set(), "read": set(), "resume": set()}
active = set()
def profile(frame, kind, argument):
    code = frame.f_code
    is_ours = code.co_filename.startswith(root) and ".venv" not in code.co_filename
    is_ours = is_ours and not code.co_filename.endswith("report.py")  # the log
    is_function = not code.co_name.startswith(("<gen", "<list", "<dict", "<set", "<module"))
    if kind == "call" and is_ours and is_function:
        name = f"{os.path.basename(code.co_filename)}:{code.co_name}:{code.co_firstlineno}"
        kinds = {"save"} if threading.current_thread().name.startswith("save") else set(active)
        for kind in kinds:
            entered[kind].add(name)
def during(kind, name, end=lambda run: None, owner=Run):
    original = getattr(owner, name)
    def wrapped(self, *arguments, **options):
        before = set(active)
        active.clear()
        active.add(kind)
        sys.setprofile(profile)
        try:
            result = original(self, *arguments, **options)
            active.clear()
            end(self)
            return result
        finally:
            active.clear()
            active.update(before)
    setattr(owner, name, wrapped)
during("save", "save", lambda run: run.saver.wait())
during("resume", "restore")
during("read", "read_newest", owner=Checkpoints)
step_name = "finish_round" if "xgboost" in root + sys.argv[1] else "finish_step"
original = getattr(Run, step_name)
steps = []
def finish(self, *arguments, **options):
    result = original(self, *arguments, **options)
    steps.append(1)
    active.clear()
    if len(steps) in (3, 4, 5):  # record the steps after these; the first ones compile
        active.add("step")
    return result
setattr(Run, step_name, finish)
threading.setprofile(profile)
sys.setprofile(profile)
for epochs in (8, 9) if step_name == "finish_round" else (1, 2):
    train.main(train.parse_args(["--epochs", str(epochs), *sys.argv[3:]]))
sys.setprofile(None)
threading.setprofile(None)
print(json.dumps({kind: sorted(names) for kind, names in entered.items()}))
"""
LIMITS = {"step": 8, "save": 11, "read": 19, "resume": 10}


@in_make_test("pytorch", "xgboost")
def test_a_step_a_save_and_a_resume_call_few_of_our_functions(framework, tmp_path):
    flags = ["--checkpoint-steps", 100] if framework == "xgboost" else []
    result = run_python(JUMPS.replace("{EVENTS}", EVENTS), ROOT / framework, ROOT, *flags, cwd=tmp_path)
    entered = json.loads(result.last_line)
    assert all(entered.values())
    too_many = {kind: names for kind, names in entered.items() if len(names) > LIMITS[kind]}
    assert not too_many, json.dumps(too_many, indent=2)


@pytest.mark.parametrize("pair", [("--precision", "bf16")])
def test_process_wide_settings_cannot_change(image_framework, tmp_path, pair):
    """A setting that a framework cannot change in a running process is a one-line error, or works."""
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import train
from common.errors import UserError
for number, flags in enumerate(([], sys.argv[2:])):
    try:
        train.main(train.parse_args(["--epochs", "1", "--output", str(number), *flags]))
    except UserError as error:
        print("one line:", error)
"""
    result = run_python(script, ROOT / image_framework, *pair, cwd=tmp_path)
    trained = result.epochs == [1, 1]
    refused = result.epochs == [1] and result.output.count("one line: ") == 1
    assert trained or refused, result.output
