"""Keep known noise of a framework out of standard error, and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from typing import Iterator

# TensorFlow prints this while it is imported, at any log level: missing GPUs, and how its kernels round.
TENSORFLOW = r"WARNING: All log messages before absl|I0000 .*(port|cudart_stub|cpu_feature_guard)\.cc"


@contextlib.contextmanager
def without_lines(pattern: str) -> Iterator[None]:
    """Drop lines that begin with `pattern` from standard error inside this block, even those of C++ code.

    The other lines appear when the block ends.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with tempfile.TemporaryFile() as written:
        if sys.stderr:
            sys.stderr.flush()
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            if sys.stderr:
                sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            kept = [line for line in written if not re.match(pattern.encode(), line)]
            with contextlib.suppress(OSError):
                os.write(2, b"".join(kept))
