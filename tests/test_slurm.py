"""launch/slurm.sbatch under a real Slurm: two nodes on this machine, configured in a temporary folder.

Debian's packages slurmctld, slurmd and slurm-client have all of it.
"""

import contextlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from helpers import ROOT, assert_same_bits, copy_script, environment, free_port, train_together

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))),
        reason="needs Slurm: apt-get install slurmctld slurmd slurm-client",
    ),
]

NODES = ("127.0.0.1", "127.0.0.2")

# A requeued job waits as long as a credential is valid, by default 120 seconds; Slurm takes 5 or more.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
ReturnToService=2
SchedulerParameters=bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=4
NodeName=127.0.0.2 NodeAddr=127.0.0.2 NodeHostname={host} Port={ports[2]} CPUs=4
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""

# Rounds that take long: a job lives for half a minute at least before its time limit.
SLOW_ROUNDS = """import os
import time

import xgboost as xgb


class SlowRounds(xgb.callback.TrainingCallback):
    def after_iteration(self, model, epoch, evals_log):
        time.sleep(float(os.environ.get("ROUND_SECONDS", 0)))
"""
FLAGS = ("--epochs", 1300, "--keep-checkpoints", 2)


class Cluster:
    """A running Slurm: its configuration in the environment, the script and the logs of jobs in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self.env = environment(
            SLURM_CONF=str(folder / "slurm.conf"), OMP_NUM_THREADS="1", ROUND_SECONDS="0.05"
        )
        (folder / ".venv").symlink_to(sys.prefix)
        changes = [("import xgboost as xgb\n", SLOW_ROUNDS), ("callbacks=[", "callbacks=[SlowRounds(), ")]
        self.script = copy_script("xgboost", folder, changes)

    def call(self, *command):
        """Run a command of Slurm; return its output."""
        options = {"env": self.env, "cwd": self.folder, "text": True, "timeout": 60}
        return subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, **options).stdout

    def submit(self, output, *options):
        """Submit a job that trains into the folder `output`; return its number."""
        command = (ROOT / "launch/slurm.sbatch", self.script, *FLAGS, "--output", output)
        return self.call("sbatch", "--parsable", *options, *command).strip()

    def state(self, job):
        """Return the state of a job, such as RUNNING, and how often it was requeued."""
        shown = self.call("scontrol", "show", "job", job)
        return re.search(r"JobState=(\w+)", shown)[1], int(re.search(r"Restarts=(\d+)", shown)[1])

    def wait_for(self, job, state, restarts):
        """Wait until a job is in a state after a number of restarts."""
        wait_until(
            lambda: self.state(job) == (state, restarts), lambda: f"{self.state(job)}\n{self.log(job)}"
        )

    def wait_for_epoch(self, job, runs):
        """Wait until a job has finished epochs in a number of runs."""
        finished = re.compile(r"Starting training from.*?^epoch=", re.DOTALL | re.MULTILINE)
        wait_until(lambda: len(finished.findall(self.log(job))) == runs, lambda: self.log(job))

    def log(self, job):
        """Return the log of all runs of a job."""
        path = self.folder / f"slurm-{job}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm of two nodes, with all of its processes stopped at the end."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    names = {"host": socket.gethostname().split(".")[0], "user": pwd.getpwuid(os.getuid()).pw_name}
    text = CONFIGURATION.format(folder=folder, ports=[free_port() for _ in range(3)], **names)
    (folder / "slurm.conf").write_text(text)
    slurm = Cluster(folder)
    with contextlib.ExitStack() as stack:
        for command in (["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)):
            (folder / command[-1]).mkdir(exist_ok=True)
            with open(folder / f"{command[-1]}.out", "w") as output:
                process = subprocess.Popen(command, env=slurm.env, stdout=output, stderr=output)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        stack.callback(end_all_jobs, slurm)
        wait_until(lambda: slurm.call("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")
        yield slurm


def end_all_jobs(slurm):
    """Cancel all jobs, and wait for the end of their processes."""
    slurm.call("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name)
    wait_until(lambda: not slurm.call("squeue", "-h"))


def wait_until(condition, describe=str):
    """Return when the condition is true; fail after three minutes. Slurm does not answer while it starts."""
    deadline = time.monotonic() + 180
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if condition():
                return
        assert time.monotonic() < deadline, describe()
        time.sleep(0.5)


def test_a_job_on_two_nodes_that_is_requeued_and_reaches_its_time_limit_ends_with_the_same_bits(
    cluster, tmp_path
):
    # Slurm sends the signal 5 to 35 seconds before the time limit of a minute, the shortest there is.
    job = cluster.submit("output/xgboost", "--nodes", 2, "--time", 1, "--signal", "USR1@5")
    for runs in (1, 2):
        cluster.wait_for_epoch(job, runs)
        cluster.call("scontrol", "requeue", job)
    cluster.wait_for(job, "RUNNING", 3)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    cluster.wait_for(job, "COMPLETED", 3)

    log = cluster.log(job)
    print(re.sub(r"(?m)(^epoch=.*\n)+(^epoch=.*\n)", r"...\n\2", log))
    firsts = [int(first) for first in re.findall(r"^Starting training from epoch: (\d+)", log, re.MULTILINE)]
    assert len(firsts) == 4
    assert firsts == sorted(set(firsts))
    assert log.count("SIGUSR1 received") == 2  # a line of each worker
    assert log.count("DUE TO JOB REQUEUE") >= 2
    train_together(cluster.script, 2, *FLAGS, folder=tmp_path)
    assert_same_bits(cluster.folder, tmp_path / "1", "xgboost")


def test_a_preempted_job_is_requeued_and_a_cancelled_one_is_not(cluster):
    job = cluster.submit("output/preempted")
    cluster.wait_for_epoch(job, 1)
    urgent = cluster.call(
        "sbatch", "--parsable", "--partition", "urgent", "--nodes", 2, "--wrap", "true"
    ).strip()
    cluster.wait_for(urgent, "COMPLETED", 0)
    assert "Interrupted: saved xgboost-checkpoint" in cluster.log(job)
    cluster.wait_for_epoch(job, 2)
    cluster.call("scancel", job)
    wait_until(lambda: not cluster.call("squeue", "-h"))
    assert cluster.state(job) == ("CANCELLED", 1)
    assert "SIGTERM received" in cluster.log(job)
