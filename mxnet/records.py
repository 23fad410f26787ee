"""RecordIO files with encoded images, which MXNet's im2rec writes; `load_data` passes `RecordFile` on.

SageMaker's built-in image classification reads the same files (application/x-recordio). The format is
described at https://mxnet.apache.org/versions/1.9.1/api/architecture/note_data_loading.
"""

import contextlib
import ctypes
import os
import struct
from array import array

import numpy as np
from mxnet import base, recordio

from common.errors import UserError

MAGIC = struct.pack("<I", 0xCED7230A)  # before each part of a record
PART_HEADER = struct.Struct("<4sI")  # magic number; kind and length of the part
LENGTH_BITS = 29
WHOLE, FIRST, MIDDLE, LAST = range(4)  # kinds: a record is split at each magic number in it
HEADER = struct.Struct("<IfQQ")  # number of labels that follow, or 0; the label; two identifiers
LABEL = struct.Struct("<f")
BEGINNING = HEADER.size + LABEL.size  # bytes read of a record for its label
MAX_LABEL = 2**24  # larger integers are not all exact floats


class RecordFile:
    """The images of a RecordIO file.

    At first only the labels are read. The positions of the records stay in memory.

    Args:
        path: of the file.

    Attributes:
        labels: an integer for each record.
        sizes: of the encoded images in bytes.
        names: the class names, which these files lack.

    Raises UserError for a file that is damaged, or has other labels.
    """

    EXPECTED = "RecordIO files (.rec) with a label for each image"
    COMPANIONS = (".idx", ".lst")  # suffixes of files that may be beside them

    def __init__(self, path):
        self.path = path
        self._offsets = array("q")
        self.sizes = array("q")
        self.names = {}
        labels = array("q")
        try:
            with open(path, "rb") as file:
                for offset, length, beginning in self._find_records(file.fileno()):
                    label, header_size = self._read_label(length, beginning)
                    labels.append(label)
                    self._offsets.append(offset)
                    self.sizes.append(length - header_size)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        self.labels = np.array(labels, np.int64)

    @staticmethod
    def is_one(name):
        """Return whether a file of this name is expected to be a RecordIO file."""
        return name.lower().endswith(".rec")

    def read(self, index):
        """Return the bytes of an encoded image. Raises MXNet's errors."""
        # A reader supports neither several threads nor forked processes.
        reader = recordio.MXRecordIO(str(self.path), "r")
        with contextlib.closing(reader):
            offset = ctypes.c_size_t(self._offsets[index])
            base.check_call(base._LIB.MXRecordIOReaderSeek(reader.handle, offset))
            _, image = recordio.unpack(reader.read())
        return image

    def _find_records(self, descriptor):
        """Yield the offset, the length and the first bytes of each record; the rest is not read."""
        num_bytes = os.fstat(descriptor).st_size
        end = 0
        while end < num_bytes:
            offset = end
            kind, length, beginning, end = self._read_part(descriptor, offset, num_bytes)
            if kind not in (WHOLE, FIRST):
                raise self._error("it starts with the rest of another record; replace the file")
            while kind not in (WHOLE, LAST):
                kind, more, content, end = self._read_part(descriptor, end, num_bytes)
                if kind not in (MIDDLE, LAST):
                    raise self._error("its end is missing; replace the file")
                length += len(MAGIC) + more
                beginning = (beginning + MAGIC + content)[:BEGINNING]
            yield offset, length, beginning

    def _read_part(self, descriptor, offset, num_bytes):
        """Return the kind, the length, the first bytes and the end of a part of a record.

        A wrong length is an error before anything of that size is read.
        """
        start = offset + PART_HEADER.size
        content = os.pread(descriptor, PART_HEADER.size + BEGINNING, offset)
        if len(content) < PART_HEADER.size or not content.startswith(MAGIC):
            raise self._error(
                "it does not start like a record of MXNet's RecordIO: expected a file that im2rec has "
                "written; it is damaged, or of another format; replace it"
            )
        _, word = PART_HEADER.unpack_from(content)
        kind = word >> LENGTH_BITS
        length = word & (1 << LENGTH_BITS) - 1
        end = start + (length + 3) // 4 * 4
        if end > num_bytes:
            raise self._error("the file ends inside it: it is truncated or damaged; replace it")
        return kind, length, content[PART_HEADER.size :][:length], end

    def _read_label(self, length, beginning):
        """Return the label of a record, and the number of bytes before its image."""
        size = HEADER.size
        if length >= size:
            num_labels, label, _, _ = HEADER.unpack_from(beginning)
            if num_labels > 1:
                raise self._error(f"it has {num_labels} labels: expected one, the class of the image")
            size += num_labels * LABEL.size
        if length < size:
            raise self._error(f"it has {length} bytes: expected a label and an image")
        if num_labels == 1:
            (label,) = LABEL.unpack_from(beginning, HEADER.size)
        if not label.is_integer() or abs(label) > MAX_LABEL:
            raise self._error(f"it has the label {label:g}: expected an integer")
        return int(label), size

    def _error(self, reason):
        return UserError(f"{self.path}, record {len(self._offsets)}: {reason}")
