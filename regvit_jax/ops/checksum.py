"""Checksum of a tree of arrays: 64 bits that tell whether any other bit has changed, the same on every mesh.

The elements of a leaf, read as unsigned integers, are added up modulo 2**64 and count crc32(path) | 1 times. No single
changed bit goes unseen; other damage does with a chance of about 2**-32. Sums of integers do not depend on their order,
so every shard is read where it lies, on the host, and nothing is compiled. One core reads 5 to 7 GB/s (measured): a
state of 300 M parameters with two moments and an average takes 0.7 to 1 s.
"""

import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from regvit_jax.trees import Tree, named


def checksum(tree: Tree) -> int:
    """Of jax or NumPy arrays of any dtype and placement, the same on every process; every process makes the call."""
    total = 0
    for path, leaf in named(tree).items():
        # Of equal copies on several devices one is read; NumPy arrays are whole on every process, so the first reads.
        if isinstance(leaf, jax.Array):
            parts = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        else:
            parts = [np.asarray(leaf)] if jax.process_index() == 0 else []
        total += sum(map(_sum, parts)) * (zlib.crc32(path.encode()) | 1)
    total %= 2**64
    if jax.process_count() == 1:
        return total
    halves = np.array([total >> 32, total % 2**32], np.uint32)
    every = multihost_utils.process_allgather(halves).reshape(-1, 2).tolist()
    return sum((high << 32) + low for high, low in every) % 2**64


def _sum(array: np.ndarray) -> int:
    words = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.dtype.itemsize}")
    return int(np.sum(words, dtype=np.uint64))
