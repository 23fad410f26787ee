"""Save in the background: the training waits for a copy of its state in memory, not for the disk."""

import time
from concurrent.futures import ThreadPoolExecutor

FREE_SAVES = 100  # at the start of a training, without a limit on their time
MAX_SHARE = 0.03  # the share of its time that a training may wait for later saves


class AsyncSaver:
    """Writes one checkpoint at a time in a thread; the next save waits for it.

    `wait` raises an error of the thread in the training: at the next step or save, or at the end.

    Attributes:
        memory: the copies of the training state by name, reused by each save: filling new memory takes twice
            as long.
        thread: the executor of the saves.
        in_flight: the Future of the running save, or None.
    """

    def __init__(self):
        self.memory = {}
        self.in_flight = None
        self.thread = ThreadPoolExecutor(1, "save")
        self._num_saves = 0
        self._seconds_waited = 0.0
        self._rationed_since = time.monotonic()

    def count(self, seconds):
        """Count a save for which the training has waited this long."""
        self._num_saves += 1
        self._seconds_waited += seconds
        if self._num_saves <= FREE_SAVES:
            self._rationed_since = time.monotonic()
            self._seconds_waited = 0.0

    def wait(self):
        """Wait for the save in flight and raise its error."""
        save, self.in_flight = self.in_flight, None
        if save:
            save.result()

    def is_affordable(self):
        """Return whether the training has waited for saves for at most 3 % of its time.

        For a state that grows: saving each of 2,000 boosting rounds would take a time that grows with their
        square.
        """
        if self._num_saves < FREE_SAVES:
            return True
        return self._seconds_waited <= MAX_SHARE * (time.monotonic() - self._rationed_since)

    def close(self):
        """End the thread, after the save in flight."""
        self.thread.shutdown()
