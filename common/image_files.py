"""Images that are read and decoded when a batch first asks for them."""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import decoder, machine
from common.errors import DataError, first_line
from common.report import log


class Source(NamedTuple):
    """Encoded images.

    Attributes:
        folder: the folder that contains them, for messages.
        names: of the images in it.
        sizes: of the encoded images in bytes.
        read: a function that returns the bytes of the image with an index.
    """

    folder: Path
    names: list
    sizes: list
    read: Callable

    def place(self, index: int) -> str:
        """Return the place of an image, for messages."""
        return f"{self.folder}/{self.names[index]}"


class ImageFiles:
    """Encoded images as an array of uint8 (n, height, width, 3), read when they are first asked for.

    Decoded images stay in memory up to a limit. The rest are decoded each time.

    Args:
        source: the Source of the images.
        size: (width, height) of all images, to which others are resized; None: that of the first image.
        memory: bytes for decoded images.
        is_resizing: whether other sizes are expected and not logged.

    Reading raises DataError for an image that cannot be read.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self, source: Source, size: tuple[int, int] | None, memory: float, is_resizing: bool = False
    ) -> None:
        self.source = source
        self.size = size or self._read_first_size()
        width, height = self.size
        self.shape = (len(source.names), height, width, 3)
        self.num_kept = int(min(len(self), memory // (width * height * 3)))
        # Shared with processes that load batches. The system provides each page when it is first used.
        self._kept = _shared((self.num_kept, *self.shape[1:]))
        self._is_kept = _shared((len(self),))
        self._logged = {decoder.RESIZED} if is_resizing else set()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """The bytes of all images when decoded."""
        return math.prod(self.shape)

    @property
    def kept_bytes(self) -> int:
        """The bytes of the decoded images that stay in memory."""
        return self._kept.nbytes

    @property
    def is_in_memory(self) -> bool:
        """Whether all images are decoded."""
        return bool(self._is_kept.all())

    def __getitem__(self, indices: Any) -> np.ndarray:
        """Return the images of an array of indices (n, height, width, 3), or of one index."""
        indices = np.asarray(indices)
        if indices.ndim == 0:
            return self[indices[np.newaxis]][0]
        is_kept = self._is_kept[indices].astype(bool)
        if is_kept.all():
            return self._kept[indices]
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        images[is_kept] = self._kept[indices[is_kept]]
        positions = np.flatnonzero(~is_kept)
        self._decode(indices[positions].tolist(), positions.tolist(), images)
        return images

    def _decode(self, indices, positions, images):
        """Decode the images of the indices into the array `images` at the positions, on all cores."""
        waiting = deque(zip(indices, positions))

        def work():
            while waiting:
                try:
                    index, position = waiting.popleft()
                except IndexError:  # another thread was faster
                    return
                images[position] = self._decode_one(index)
                if index < self.num_kept:
                    self._kept[index] = images[position]
                    self._is_kept[index] = True

        # Opening a file takes as long as decoding 1,000 pixels, and only one thread at a time does it.

        num_useful = self.size[0] * self.size[1] // 1000
        count = min(machine.num_cores(), num_useful, len(indices))
        if count < 2:
            work()
            return
        with ThreadPoolExecutor(count) as pool:
            try:
                for thread in [pool.submit(work) for _ in range(count)]:
                    thread.result()
            finally:
                waiting.clear()  # not needed after an error or a signal

    def _decode_one(self, index):
        with self._explain_errors(index):
            pixels, notes = decoder.decode(self.source.read(index), self.size)
        for note in notes:
            if note not in self._logged:
                self._logged.add(note)
                log(f"Image {self.source.place(index)} is {note}; others like it are not logged")
        return pixels

    def _read_first_size(self):
        with self._explain_errors(0):
            return decoder.open_image(io.BytesIO(self.source.read(0))).size

    @contextlib.contextmanager
    def _explain_errors(self, index):
        try:
            yield
        except Exception as error:  # each format has its own errors
            raise DataError(
                f"cannot read the image {self.source.place(index)}: {first_line(error)}. "
                "Replace it, and run the same command again to resume"
            ) from error

    def fingerprint(self) -> int:
        """Return the checksum of names and sizes."""
        lines = [f"{name} {size}\n" for name, size in zip(self.source.names, self.source.sizes)]
        return zlib.crc32("".join(lines).encode("utf-8", "surrogateescape"))


def _shared(shape):
    """Return an array of zeros of type uint8 in memory that this process shares with its children."""
    count = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(1, count)), np.uint8, count).reshape(shape)
