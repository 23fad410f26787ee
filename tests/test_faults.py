"""A disk error or a signal at each file operation of a run never loses a saved checkpoint.

strace makes one system call of a training fail, or sends a signal when the call starts. The training is new,
in an empty folder, or resumes from checkpoints. Four words describe a fault, as in "fsync EIO 1
checkpoints/xgboost-checkpoint.3.sagemaker-ignore": the call, what happens, at which one of the calls with
this path, and the path below --output.

    make integration                                    (all for XGBoost, a sample for the other scripts)
    FAULTS=all make integration                         (all: hours)
    FAULTS="fsync EIO" .venv/bin/python -m pytest -m integration -n 0 -s tests/test_faults.py -k xgboost
                                                        (those whose description contains this text)
"""

import collections
import contextlib
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest

from common import atomic_io, checkpoints
from helpers import (
    CHECKPOINTS,
    FRAMEWORKS,
    LATER,
    Result,
    assert_same_bits,
    checkpoint_folder,
    choose,
    environment,
    script_of,
    start_command,
)

DISK = ("EIO", "ENOSPC", "EDQUOT")
ERRORS = {  # possible errors of each call
    "openat": ("EIO", "ENOSPC", "EMFILE", "ENOMEM"),
    "newfstatat": ("EIO",),
    "getdents64": ("EIO", "ENOMEM"),
    "flock": ("EIO", "ENOLCK"),
    "read": ("EIO", "ENOMEM"),
    "pread64": ("EIO", "ENOMEM"),
    "write": DISK,
    "writev": DISK,
    "pwrite64": DISK,
    "sendfile": DISK,
    "fsync": DISK,
    "close": ("EIO", "ENOSPC"),
    "rename": DISK,
    "mkdir": DISK,
    "unlink": ("EIO",),
    "unlinkat": ("EIO",),
    "rmdir": ("EIO",),
}
SIGNALS = ("SIGTERM", "SIGKILL")
ENDING = set(ERRORS) - {"newfstatat", "close", "flock"}  # without signals: these calls change no file
CODES = {"SIGTERM": (0, 143), "SIGKILL": (-9,)}  # 0: the training had finished
SECONDS = 120  # limit for a run, which takes two to ten

BEGINNINGS = ("new", "resumed")
# The fault is in the first run, or in the second one, which continues the first.
FIRST = {"xgboost": ("--num-round", 3)}
SECOND = {"xgboost": ("--num-round", 6)}
ALWAYS = {"xgboost": ("--checkpoint-steps", 1, "--keep-checkpoints", 2)}
FIRST_EPOCH, SECOND_EPOCH = ("--epochs", 1), ("--epochs", 2)
IN_EPOCH = ("--checkpoint-steps", 10, "--keep-checkpoints", 2)

FOUND = [  # faults that once made a good checkpoint count as damaged
    "newfstatat EIO 2 checkpoints/xgboost-checkpoint.2",
    "close EIO 1 checkpoints/xgboost-checkpoint.2",
]
SAMPLES = {"pytorch": 20, "tensorflow": 8, "mxnet": 20}  # in `make integration`; all for XGBoost
SEED = 1
MXNET_CHECKSUM = "CRC-32: {:08x}"  # at the end of its checkpoints


@pytest.fixture(scope="session")
def strace():
    """Skip a test if strace is missing or not permitted."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    probe = subprocess.run(["strace", "-f", "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"strace cannot trace: {probe.stderr.strip().splitlines()[-1]}")


def check_file(path):
    """Fail if a checkpoint is damaged; each format has its own checksums."""
    content = path.read_bytes()
    if path.suffix in (".pt", ".keras"):
        atomic_io.check_zip(io.BytesIO(content))
    elif path.suffix == ".params":
        end = len(content) - len(MXNET_CHECKSUM.format(0))
        assert content[end:] == MXNET_CHECKSUM.format(zlib.crc32(content[:end])).encode(), f"half of {path}"
    else:
        atomic_io.check_seal(content)


# Runs each training in a forked process with the framework already imported, which saves seconds. A line of
# the input is a job; a second line starts it, after strace has been attached to the process.
SERVER = """
import json, os, sys
path = sys.argv[1]
sys.path.insert(0, os.path.dirname(path))
import train
from common.run import execute, start
requests = open(0, "rb", buffering=0)
while line := requests.readline():
    folder, flags = json.loads(line)
    child = os.fork()
    if child == 0:
        requests.readline()
        os.chdir(folder)
        os.dup2(os.open("stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = [path, *flags]
        execute(train.main, start(train.parse_args))
        sys.exit()
    print(child, flush=True)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Faults:
    """Prepares a folder for one script, and trains there with each fault.

    Args:
        framework: the script.
        folder: for the trainings.
        begin: "new" for an empty folder, or "resumed" for that of a half-finished training.
    """

    def __init__(self, framework, folder, begin):
        self.framework = choose(framework)
        self.first = folder / "first"
        self.undisturbed = folder / "undisturbed"
        self.folder = folder / "faulty"
        self.trace = folder / "trace"
        first, second = FIRST.get(framework, FIRST_EPOCH), SECOND.get(framework, SECOND_EPOCH)
        always = ALWAYS.get(framework, IN_EPOCH)
        self.flags = [*(second if begin == "resumed" else first), *always]
        command = [sys.executable, "-c", SERVER, str(script_of(framework))]
        env = environment(OMP_NUM_THREADS="1")
        self.server = start_command(command, folder, env, stdin=subprocess.PIPE, text=False, bufsize=0)
        self.first.mkdir()
        if begin == "resumed":
            assert self.train(self.first, first, always).code == 0
        self.before = self.good_checkpoints(self.first)
        self.calls = self.record()

    def close(self):
        """End the process that starts the trainings."""
        self.server.stdin.close()
        self.server.wait(SECONDS)

    @property
    def output(self):
        """The value of --output."""
        return self.folder / "output" / self.framework

    def train(self, folder, *flags, options=()):
        """Run a training in a folder, with the `options` of strace if there are any; return the Result."""
        flags = ["--output", str(folder / "output" / self.framework), *map(str, itertools.chain(*flags))]
        request = json.dumps([str(folder), flags])
        self.server.stdin.write(f"{request}\n".encode())
        child = int(self.server.stdout.readline())
        command = ["strace", "--follow-forks", "--output", self.trace, *options, "--attach", child]
        with contextlib.ExitStack() as exits:
            if options:
                tracer = exits.enter_context(start_command(list(map(str, command)), folder))
                assert "attached" in tracer.stderr.readline()
            self.server.stdin.write(b"\n")
            if not select.select([self.server.stdout], [], [], SECONDS)[0]:
                os.kill(child, signal.SIGKILL)
            code = int(self.server.stdout.readline())
        outputs = [(folder / name).read_text() for name in ("stdout", "stderr")]
        return Result(SimpleNamespace(returncode=code), *outputs)

    def train_again(self, *options):
        """Train in a new copy of the prepared folder; return the Result."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.first, self.folder)
        return self.train(self.folder, self.flags, options=options)

    def record(self):
        """Return the calls of an undisturbed run, in order: (thread, call, path below --output)."""
        result = self.train_again("--decode-fds=path", "--trace", ",".join(ERRORS))
        assert result.code == 0, result.errors
        shutil.copytree(self.folder, self.undisturbed)
        path = re.compile(rf'(\d+) +(\w+)\(.*?[<"]{re.escape(str(self.output))}(?:/([^">]+))?[">]')
        calls = [found.groups(".") for found in map(path.match, self.trace.read_text().splitlines()) if found]
        return calls

    def find(self):
        """Return the descriptions of all faults."""
        counts = collections.Counter(self.calls)
        numbers = {}
        for (_, call, path), count in counts.items():  # strace counts the calls of each thread
            numbers[call, path] = max(count, numbers.get((call, path), 0))
        return [
            f"{call} {effect} {number} {path}"
            for (call, path), count in numbers.items()
            for number in range(1, count + 1)
            for effect in (*ERRORS[call], *(SIGNALS if call in ENDING else ()))
        ]

    def good_checkpoints(self, folder):
        """Return the checkpoints in the run's folder; fail if a file is incomplete or damaged."""
        folder = checkpoint_folder(folder, self.framework)
        if not folder.is_dir():  # nothing has been saved
            return []
        assert not list(folder.glob("*" + checkpoints.DAMAGED))
        found = checkpoints.find_checkpoints(folder, CHECKPOINTS[self.framework])
        for _, name in found:
            check_file(folder / name)
        return found

    def options_of(self, fault):
        """Return the options of strace for a fault."""
        call, effect, number, path = fault.split(" ", 3)
        kind = "signal" if effect in SIGNALS else "error"
        inject = f"--inject={call}:{kind}={effect}:when={number}"
        return [f"--trace={call}", f"--trace-path={self.output / path}", inject]

    def inject(self, fault):
        """Train with a fault and check the rules; return the outcome in a word."""
        effect = fault.split()[1]
        result = self.train_again(*self.options_of(fault))
        assert result.code in CODES.get(effect, (0, 1)), f"exit code {result.code}"
        if result.code == 1:
            assert result.error_line
        assert "Traceback" not in result.errors, "a traceback"
        found = self.good_checkpoints(self.folder)
        assert found[:1] >= self.before[:1], "the newest checkpoint is lost"
        assert len(found) >= len(self.before), "too many checkpoints are deleted"
        if result.code:
            again = self.train(self.folder, self.flags)
            assert again.code == 0, again.errors
            assert "Cannot read" not in again.output
        assert self.good_checkpoints(self.folder)[0] == self.good_checkpoints(self.undisturbed)[0]
        assert_same_bits(self.folder, self.undisturbed, self.framework)
        if not re.search(r"INJECTED|--- SIG(TERM|KILL)|killed by", self.trace.read_text()):
            return "not reached"
        return {0: "continued", 1: "error"}.get(result.code, "ended")

    def inject_all(self, faults):
        """Try all these faults, print the outcome of each, and fail if one broke a rule."""
        counts, broken = collections.Counter(), []
        for fault in faults:
            try:
                outcome = self.inject(fault)
            except (AssertionError, ValueError) as error:
                broken.append(f"{fault}\n{error}")
                outcome = "BROKEN"
            counts[fault.split()[1], outcome] += 1
            print(f"{self.framework} {fault}: {outcome}", flush=True)
        print(f"{self.framework}: {dict(counts)}")
        assert not broken, "\n\n".join([*broken, f"{len(broken)} of {len(faults)} faults broke a rule"])


def without_copies(faults):
    """Leave out repeated faults: keep one file of the model's common/."""
    kept = [fault for fault in faults if "/code/common/" not in fault or fault.endswith("/run.py")]
    return [fault for fault in kept if not fault.endswith("/code/common") or int(fault.split()[2]) <= 2]


def sample(faults, number):
    """Return a fixed sample of the faults."""
    return random.Random(SEED).sample(faults, min(number, len(faults)))  # noqa: S311 - not for secrets


def choose_faults(framework, found):
    """Return the faults that `make integration` tries: those of the environment variable FAULTS, or some."""
    wanted = os.environ.get("FAULTS")
    if wanted == "all":
        return found
    if wanted:
        return [fault for fault in found if wanted in fault]
    different = without_copies(found)
    return sample(different, SAMPLES.get(framework, len(different)))


@pytest.mark.parametrize("begin", BEGINNINGS)
def test_a_sample_of_faults_loses_nothing(begin, tmp_path, strace):
    with contextlib.closing(Faults("xgboost", tmp_path, begin)) as faults:
        found = faults.find()
        chosen = sample(without_copies(found), 10)
        faults.inject_all([*chosen, *(fault for fault in FOUND if fault in found)])


@LATER
@pytest.mark.parametrize("begin", BEGINNINGS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_fault_loses_anything(framework, begin, tmp_path, strace):
    with contextlib.closing(Faults(framework, tmp_path, begin)) as faults:
        faults.inject_all(choose_faults(framework, faults.find()))


def test_a_checkpoint_reaches_the_disk_before_its_name(tmp_path, strace):
    with contextlib.closing(Faults("xgboost", tmp_path, "resumed")) as faults:
        recorded = faults.calls
    name = "checkpoints/xgboost-checkpoint.3" + atomic_io.TEMPORARY
    saver = next(thread for thread, call, path in recorded if (call, path) == ("rename", name))
    calls = [(call, path) for thread, call, path in recorded if thread == saver]
    calls = [found for found in calls if found[0] in ("write", "fsync", "rename")]
    begin = calls.index(("write", name))
    in_order = [("write", name), ("fsync", name), ("rename", name), ("fsync", "checkpoints")]
    assert calls[begin : begin + 4] == in_order
