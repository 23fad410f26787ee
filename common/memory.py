"""How much memory is free: of the machine, the container or the process."""

import contextlib
import resource
from pathlib import Path

# Limit and use of the memory of a container, for both versions of Linux's control groups.
CONTAINER = [
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


def available():
    """Return the free memory in bytes; inf without a limit."""
    free = [float("inf")]
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":") for line in lines)
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for limit, used in CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # no such limit
            free.append(_read_number(limit) - _read_number(used))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        num_pages = _read_number("/proc/self/statm")
        free.append(limit - num_pages * resource.getpagesize())
    return min(free)


def _read_number(path):
    """Return the first number in a file."""
    text = Path(path).read_text()
    return int(text.split()[0])
