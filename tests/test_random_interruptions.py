"""Many interruptions at random moments, many of them during a save; each test takes minutes."""

import pytest

from helpers import FRAMEWORKS, SAMPLING, choose, run_verify, script_of

pytestmark = pytest.mark.integration

JOBS = {  # trainings of 20 to 60 seconds
    "pytorch": ["--epochs", 8, "--batch-size", 4, "--augment", "--checkpoint-steps", 9],
    "tensorflow": ["--epochs", 8, "--batch-size", 4, "--augment", "--checkpoint-steps", 40],
    "mxnet": ["--epochs", 8, "--batch-size", 4, "--augment", "--checkpoint-steps", 9],
    "xgboost": ["--epochs", 800, *SAMPLING, "--checkpoint-steps", 5],
}


@pytest.mark.parametrize("signal", ["TERM", "KILL"])
@pytest.mark.parametrize(("framework", "loaders"), [(name, 0) for name in FRAMEWORKS] + [("pytorch", 2)])
def test_twenty_interruptions_do_not_change_a_bit(framework, loaders, signal, tmp_path):
    flags = JOBS[choose(framework)]
    if loaders:
        flags = [*flags, "--loaders", loaders]
    options = ["--interruptions", 20, "--signal", signal]
    result = run_verify(script_of(framework), *flags, folder=tmp_path, options=options, seconds=3600)
    print(result.output)  # the moments and their seed
    assert result.last_line.startswith("Exact: "), result.output
    logs = [path.read_text() for path in (tmp_path / "interrupted").glob("log-*.txt")]
    assert len(logs) > 15
    assert not [log for log in logs if "Cannot read" in log or "Traceback" in log]
