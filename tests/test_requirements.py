"""The scripts need only the packages in their requirements, and no Linux-only features."""

import json
import re

import numpy as np
import pytest

from helpers import (
    FRAMEWORKS,
    IMAGE_FRAMEWORKS,
    LATER,
    ROOT,
    assert_same_bits,
    choose,
    copy_with,
    environment,
    run,
    run_with,
    save_images,
    script_of,
)

FOLDER = ROOT / "requirements"


def names_in(path):
    """Return the lines of a requirements file without comments and markers."""
    lines = (re.split(r"[#;]", line)[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


@pytest.mark.quick
def test_each_version_is_stated_once():
    versions = names_in(FOLDER / "versions.txt")
    pinned = {re.split("[=>]=", line)[0] for line in versions}
    assert len(pinned) > 20
    twice = {"numpy", "xgboost"}  # for different versions of Python
    assert sorted(versions) == sorted(set(versions))
    assert len(versions) == len(pinned) + len(twice)
    named = set()
    for path in (ROOT / "requirements.txt", *FOLDER.glob("*.txt")):
        if path.name != "versions.txt":
            lines = names_in(path)
            assert ("-c versions.txt" in lines) == (path.parent == FOLDER), path
            names = [re.sub(r"\[.*\]", "", line) for line in lines if not line.startswith("-")]
            assert names == sorted(names), path
            assert not [name for name in names if re.search("[=<>~]", name)], path
            named.update(names)
    assert named - {"setuptools"} == pinned
    included = names_in(ROOT / "requirements.txt")
    assert {f"-r requirements/{framework}.txt" for framework in FRAMEWORKS} <= set(included)


def test_sagemaker_finds_no_requirements_beside_a_script():
    """The toolkit would install them before each training."""
    assert not [*ROOT.glob("*/requirements.txt")]


# Restricts our imports to the packages of a requirements file, and lists the packages not imported.
ONLY = """
import atexit, builtins, re
from importlib import metadata
def key(name):
    return re.sub(r"[-_.]+", "-", name).lower()
allowed = set()
def allow(name):
    if key(name) not in allowed:
        allowed.add(key(name))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            lines = []
        for line in lines:
            if "extra ==" not in line:
                allow(re.match(r"[\\w.-]+", line)[0])
named = NAMED
for name in named:
    allow(name)
owners = metadata.packages_distributions()
original = builtins.__import__
def import_ours(name, globals=None, *more, **options):
    found = {key(owner) for owner in owners.get(name.split(".")[0], ())}
    ours = "site-packages" not in ((globals or {}).get("__file__") or "site-packages")
    if ours and found and not found & allowed:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return original(name, globals, *more, **options)
builtins.__import__ = import_ours
def report():
    imported = {key(owner) for name in sys.modules for owner in owners.get(name, ())}
    print(json.dumps([name for name in named if key(name) not in imported]))
atexit.register(report)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the flags of each framework for a small data set: images of two classes, or a table."""
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    save_images(folder / "images", pixels, [0, 1] * 20, (".jpg",))
    (folder / "table").mkdir()
    rows = "".join(f"{index % 2},{index},x{index % 3}\n" for index in range(100))
    (folder / "table/train.csv").write_text("label,number,text\n" + rows)
    images = ["--train", folder / "images", "--batch-size", 4, "--loaders", 1]
    table = ["--train", folder / "table", "--label-column", "label"]
    return {**dict.fromkeys(IMAGE_FRAMEWORKS, images), "xgboost": table}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_script_imports_exactly_the_packages_in_its_requirements(framework, data, tmp_path):
    choose(framework)
    named = names_in(FOLDER / f"{framework}.txt")[1:]
    needless = set(named)
    for flags in (data[framework], []):  # without flags, it trains on digits
        event = ONLY.replace("NAMED", str(named))
        flags = ["--epochs", 2, *flags, "--output", str(len(flags))]
        drawing = environment(PYTHONPATH="")  # with matplotlib
        result = run_with(event, framework, *flags, cwd=tmp_path, code=0, env=drawing)
        assert result.epochs == [1, 2]
        needless &= set(json.loads(result.last_line))
    assert needless <= {"setuptools", "tqdm"}  # the first is for MXNet, the second for a terminal


# Removes everything that macOS lacks.
MAC = """
import fcntl, mmap, multiprocessing, select, socket
LINUX = {
    os: "sched_ memfd_ MFD_ posix_fa POSIX_FADV_ copy_file_range pidfd_ eventfd EFD_ splice SPLICE_ "
        "getrandom GRND_ getresuid getresgid setresuid setresgid "
        "fdatasync pipe2 waitid O_DIRECT O_NOATIME O_PATH O_RSYNC O_LARGEFILE RWF_ unshare setns "
        "CLONE_ timerfd TFD_",
    socket: "TCP_USER_TIMEOUT TCP_KEEPIDLE TCP_QUICKACK TCP_DEFER TCP_CORK TCP_LINGER2 TCP_SYNCNT TCP_WINDOW "
        "TCP_INFO TCP_CONGESTION SO_BINDTODEVICE SO_PEER SO_PASS SO_PRIORITY SO_MARK SO_DOMAIN SO_PROTOCOL "
        "SOCK_CLOEXEC SOCK_NONBLOCK AF_NETLINK AF_ALG AF_VSOCK AF_CAN",
    signal: "SIGPWR SIGSTKFLT SIGRT SIGPOLL SIGCLD sigwaitinfo sigtimedwait",
    resource: "prlimit RLIMIT_RT RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_SIGPENDING RLIMIT_OFILE",
    fcntl: "F_ADD_SEALS F_GET_SEALS F_SEAL F_OFD F_NOTIFY F_GETPIPE F_SETPIPE F_SETLEASE F_GETLEASE F_SETSIG",
    mmap: "MAP_POPULATE MAP_DENYWRITE MAP_EXECUTABLE MADV_HUGE MADV_NOHUGE MADV_DONTFORK MADV_REMOVE",
    select: "epoll EPOLL",
}
removed = []
for module, beginnings in LINUX.items():
    for name in [name for name in dir(module) if name.startswith(tuple(beginnings.split()))]:
        delattr(module, name)
        removed.append(name)
assert len(removed) > 50, removed
def hide(event, arguments):
    path = arguments[0] if event in ("open", "os.listdir", "os.scandir") else None
    if isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(("/proc", "/sys", "/dev/shm")):
        frame = sys._getframe()
        while frame and "site-packages" not in frame.f_code.co_filename:
            frame = frame.f_back
        if not frame:  # libraries for Linux may read it
            raise FileNotFoundError(2, "No such file or directory", path)
sys.addaudithook(hide)
multiprocessing.set_start_method("spawn")
"""

OWN_DATA = """
def load_data(args):
    images = load_images(args)
    return Digits(images[0]), Digits(images[1])

class Digits(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images, self.classes = images, images.classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        images, labels = self.images.__getitems__(np.array([index]))
        return images[0], int(labels[0])
"""


@pytest.mark.parametrize(
    "framework",
    ["pytorch", "xgboost", pytest.param("tensorflow", marks=LATER), pytest.param("mxnet", marks=LATER)],
)
def test_a_training_resumes_and_exports_without_linux_features(framework, data, tmp_path):
    script = script_of(choose(framework))
    if framework == "pytorch":  # processes load custom data sets
        script = copy_with(tmp_path / "copy" / framework, framework, OWN_DATA, "import numpy as np")
    flags = ["--epochs", 3, *data[framework]]
    for name in ("linux", "mac"):
        (tmp_path / name).mkdir()
    run(script, *flags, cwd=tmp_path / "linux")
    finish = "finish_round" if framework == "xgboost" else "finish_step"
    interrupted = f'{MAC}\nat_call(Run, "{finish}", 2, lambda: send(signal.SIGTERM))'
    run_with(interrupted, script, *flags, cwd=tmp_path / "mac", code=143)
    result = run_with(MAC, script, *flags, cwd=tmp_path / "mac", code=0)
    assert "Resuming training from " in result.output
    assert_same_bits(tmp_path / "mac", tmp_path / "linux", framework)
