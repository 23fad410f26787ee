"""Save in the background: the training waits for a copy of its state in memory, not for the disk."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MAX_SHARE = 0.01  # of its time that a training may wait for saves inside epochs
MAX_RATE = 10e6  # bytes per second of such saves, as SageMaker copies them to S3
MAX_SECONDS = 300  # between two of them


class AsyncSaver:
    """Writes one checkpoint at a time in a thread; the next save waits for it.

    `wait` raises an error of the thread in the training: at the next step or save, or at the end.

    Args:
        seconds: between two saves inside an epoch; 0: no such saves; None: as often as their cost permits.
        shortest: the shortest such time.

    Attributes:
        memory: the copies of the training state by name, reused by each save: filling new memory takes twice
            as long.
        thread: the executor of the saves.
        in_flight: the Future of the running save, or None.
        interval: the seconds between two saves inside an epoch.
        is_automatic: whether the interval follows from the cost of the latest saves.
        stall: the seconds for which the training waited in the latest save.
        size: the bytes of the latest file.
    """

    def __init__(self, seconds: float | None = None, shortest: float = 20) -> None:
        self.memory: dict = {}
        self.in_flight: Any = None
        self.thread = ThreadPoolExecutor(1, "save")
        self.is_automatic = seconds is None
        self.interval = shortest if seconds is None else seconds or math.inf
        self._shortest = shortest
        self.stall = 0.0
        # Of the latest saves, as the machine may be busy for a moment.
        self._stalls: deque[float] = deque(maxlen=3)
        self.size = 0

    def wait(self) -> None:
        """Wait for the save in flight and raise its error."""
        save, self.in_flight = self.in_flight, None
        if not save:
            return
        self.size = save.result()
        if self.is_automatic:
            self._stalls.append(self.stall)
            affordable = max(min(self._stalls) / MAX_SHARE, self.size / MAX_RATE)
            self.interval = min(max(self._shortest, affordable), MAX_SECONDS)

    def close(self) -> None:
        """End the thread, after the save in flight."""
        self.thread.shutdown()
