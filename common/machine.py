"""Free memory and cores: of the machine, the container or the process; macOS says less than Linux."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

# Limit and use of the memory of a container, for both versions of Linux's control groups.
CONTAINER = [
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


def available_memory() -> float:
    """Return the free memory in bytes; all of the machine's memory where the system does not say."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":") for line in lines)
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for maximum, used in CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # no such limit
            free.append(_read_number(maximum) - _read_number(used))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):
            limit -= _read_number("/proc/self/statm") * resource.getpagesize()
        free.append(limit)
    return min(free)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_number(path):
    """Return the first number in a file."""
    text = Path(path).read_text()
    return int(text.split()[0])
