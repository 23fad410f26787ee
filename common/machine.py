"""Free memory, cores and threads of the machine, container or process; macOS reports less than Linux."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from pathlib import Path

from common.errors import fail

# Limit and use of the memory of a container, for both versions of Linux's control groups.
CONTAINER = [
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


def available_memory() -> float:
    """Return the free memory in bytes; all of the machine's memory if the system does not report it."""
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


def check_threads() -> None:
    """Exit with one line if only few threads can be started: libraries would crash or hang.

    A separate process tries it, as memory that threads have reserved is never returned.
    """
    if threading.active_count() > 1 or "numpy" in sys.modules:  # a process with threads must not be forked
        return
    num_needed = 8 + 2 * num_cores()
    try:
        child = os.fork()
        if child == 0:
            _start_threads(num_needed)
        _, status = os.waitpid(child, 0)
    except BlockingIOError:
        status = 1
    if status:
        fail(
            f"{num_needed} threads cannot be started: raise the limit of processes (ulimit -u, or that of "
            "the container), or end other processes"
        )


def _start_threads(number):
    """End this process; the exit code is 0 if it could start that number of threads."""
    threading.stack_size(1 << 16)
    try:
        for _ in range(number):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        os._exit(0)
    finally:
        os._exit(1)


def _read_number(path):
    """Return the first number in a file."""
    text = Path(path).read_text()
    return int(text.split()[0])
