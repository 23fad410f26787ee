"""TFRecord files with encoded images, such as those of ImageNet; `load_data` passes `RecordFile` on.

The format is described at https://www.tensorflow.org/tutorials/load_data/tfrecord.
"""

import os
import re
from array import array

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.python.lib.io import _pywrap_record_io

from common.errors import UserError

IMAGE = "image/encoded"
LABEL = "image/class/label"
NAME = "image/class/text"
FILE_NAME = r".+\.tfrec(ords?)?(\.gz)?|.+-\d{5}-of-\d{5}"
COMPRESSED = (b"\x1f\x8b", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")  # first bytes of gzip and zlib
LENGTH_SIZE = 12  # the length of a record and the checksum of the length
CHECKSUM_SIZE = 4  # after the record


class RecordFile:
    """The images of a TFRecord file.

    All records are read once, for their labels and checksums. Only their positions stay in memory.

    Args:
        path: of the file.

    Attributes:
        labels: an integer for each record.
        sizes: of the encoded images in bytes.
        names: the class name of each label; empty if a record has none, or if the names of a label differ.

    Raises UserError for a file that is damaged, or has records of other features.
    """

    EXPECTED = f"TFRecord files with the features {IMAGE} and {LABEL}"
    COMPANIONS = ()  # suffixes of files that may be beside them

    def __init__(self, path):
        self.path = path
        self._offsets = array("q")
        self._lengths = array("q")
        self.sizes = array("q")
        try:
            self._find_records()
            self._read_labels()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error

    @staticmethod
    def is_one(name):
        """Return whether a file of this name is expected to be a TFRecord file."""
        return re.fullmatch(FILE_NAME, name, re.IGNORECASE) is not None

    def read(self, index):
        """Return the bytes of an encoded image. Raises OSError and ValueError."""
        with open(self.path, "rb") as file:
            file.seek(self._offsets[index] + LENGTH_SIZE)
            content = file.read(self._lengths[index])
        try:
            return _only_value(_parse(content), IMAGE, "bytes_list")
        except DecodeError as error:
            raise ValueError("the file has changed since the training started") from error

    def _find_records(self):
        """Find the positions of all records. Reject a wrong length before anything of that size is read."""
        with open(self.path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            offset = 0
            while offset < num_bytes:
                header = os.pread(file.fileno(), LENGTH_SIZE, offset)
                length = int.from_bytes(header[:8], "little")
                end = offset + LENGTH_SIZE + length + CHECKSUM_SIZE
                if end > num_bytes:
                    self._refuse(offset, header)
                self._offsets.append(offset)
                self._lengths.append(length)
                offset = end

    def _refuse(self, offset, header):
        """Raise UserError for a record that cannot be as long as its header says."""
        if offset == 0 and header.startswith(COMPRESSED):
            raise UserError(
                f"{self.path} is compressed: expected a TFRecord file without compression, which can be read "
                "in random order; decompress it, or write it again without compression"
            )
        raise UserError(
            f"{self.path}, record {len(self._offsets)}: the file ends inside it: expected a TFRecord file; "
            "this one is truncated, damaged, or of another format; replace it"
        )

    def _read_labels(self):
        """Read all records with TensorFlow's own reader, which compares the checksums."""
        labels = array("q")
        names = set()
        try:
            for content in _pywrap_record_io.RecordIterator(os.fsencode(self.path), ""):
                features = _parse(content)
                self.sizes.append(len(_only_value(features, IMAGE, "bytes_list")))
                labels.append(_only_value(features, LABEL, "int64_list"))
                names.add((labels[-1], _class_name(features)))
        except tf.errors.DataLossError as error:
            raise self._error(len(labels), "its checksum is wrong; replace the file") from error
        except DecodeError as error:
            raise self._error(len(labels), "expected a tf.train.Example") from error
        except ValueError as error:
            raise self._error(len(labels), error) from error
        if len(labels) != len(self._offsets):
            raise UserError(f"{self.path} has changed while it was read: run the same command again")
        self.labels = np.array(labels, np.int64)
        self.names = dict(names)
        if len(self.names) < len(names) or None in self.names.values():
            self.names = {}

    def _error(self, index, reason):
        return UserError(f"{self.path}, record {index}: {reason}")


def _parse(content):
    """Return the features of a record by name."""
    return tf.train.Example.FromString(content).features.feature


def _only_value(features, name, kind):
    """Return the value of a feature that has one. Raises ValueError for another feature, or none."""
    if name not in features:  # reading a missing feature would add it
        names = [each if each.isprintable() else repr(each) for each in sorted(features)[:20]]
        found = ", ".join(names) or "nothing"
        raise ValueError(f"it has the features {found}: expected {IMAGE} and {LABEL}")
    values = getattr(features[name], kind).value
    if len(values) != 1:
        expected = {"bytes_list": "one text of bytes", "int64_list": "one integer"}[kind]
        raise ValueError(f"its feature {name} is not {expected}")
    return values[0]


def _class_name(features):
    """Return the name of the class of a record, or None, also if the text is not printable."""
    try:
        text = _only_value(features, NAME, "bytes_list").decode()
    except ValueError:  # also for a text that is not UTF-8
        return None
    return text if text.isprintable() and text else None
