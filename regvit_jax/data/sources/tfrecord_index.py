"""Where the records of TFRecord files lie, and one of them, checked.

A file is records end to end: 8 bytes of length, little-endian, 4 of the length's check sum, the content, 4 of the
content's. Lengths are checked when the index is made, contents whenever they are read: 3 ns a byte, where decoding the
picture takes 20.

Source: the description of the format in TensorFlow's documentation (tutorials/load_data/tfrecord).
"""

import os
import struct

import numpy as np

from regvit_jax.data.sources import crc32c, kept_index
from regvit_jax.data.sources.kept_index import Index, Plan

VERSION = 1
ROW = np.dtype([("file", "<i4"), ("offset", "<i8"), ("size", "<i8")])  # of the content
_HEAD = struct.Struct("<QI")
_FOOT = 4


def indexed(root: str, files: list[str], name: str) -> Index:
    """The index of `files` in `root`, in their order; `name` tells it from others in the same folder."""
    return kept_index.indexed(root, files, Plan("tfrecord", VERSION, ROW, "file", _records, name=name))


def place(index: Index, number: int) -> tuple[int, int, int]:
    """(number of the file, offset and size of the content) of a record."""
    return kept_index.samples(index)[number].item()


def content(path: str, index: Index, offset: int, size: int) -> bytes:
    """A record.

    Raises:
      OSError: if it cannot be read, or is not what was written.
    """
    read = kept_index.read(path, index, offset, size + _FOOT)
    if crc32c.masked(crc32c.crc32c(read[:size])) != int.from_bytes(read[size:], "little"):
        raise OSError(f"{path}: the record at byte {offset - _HEAD.size} is damaged, its check sum is wrong")
    return read[:size]


def _records(root, name):
    """(rows of ROW without the file, what is wrong with it or "")."""
    path = os.path.join(root, name)
    heads, starts, reason = [], [], ""
    file = os.open(path, os.O_RDONLY)
    try:
        end, at = os.fstat(file).st_size, 0
        if hasattr(os, "posix_fadvise"):
            # Without it each head brings 128 KB along: the whole data set would be read.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        while at < end:
            head = os.pread(file, _HEAD.size, at)
            if len(head) < _HEAD.size:
                reason = f"the record at byte {at} is cut after {len(head)} bytes"
                break
            heads.append(head)
            starts.append(at)
            at += _HEAD.size + int.from_bytes(head[:8], "little") + _FOOT
        if at > end:
            reason = f"the record at byte {starts[-1]} is cut after {end - starts[-1]} of {at - starts[-1]} bytes"
    finally:
        os.close(file)
    heads = np.frombuffer(b"".join(heads), np.uint8).reshape(-1, _HEAD.size)
    sums = np.ascontiguousarray(heads[:, 8:]).view("<u4")[:, 0]
    wrong = np.flatnonzero(crc32c.masked(crc32c.of_rows(heads[:, :8])) != sums)
    good = len(heads) - (at > end)
    if wrong.size:
        # What follows a wrong length is not found again.
        good = int(wrong[0])
        reason = f"the length of the record at byte {starts[good]} is damaged" if good else "it is no TFRecord file"
        if not good and heads[0, :2].tobytes() in (b"\x1f\x8b", b"\x78\x9c", b"\x78\x01", b"\x78\xda"):
            reason = "it is compressed, and then no record can be read in place: write it anew without compression"
    rows = np.empty(good, ROW.descr[1:])
    rows["offset"] = np.array(starts[:good], np.int64) + _HEAD.size
    rows["size"] = np.ascontiguousarray(heads[:good, :8]).view("<i8")[:, 0]
    return rows, f"{reason}, after {good} records" if reason else ""
