"""The checksum of arrays: known sums, every bit counts, the mesh does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax import sharding
from regvit_jax.ops.checksum import checksum

TREE = {
    "a": np.arange(48, dtype=np.float32).reshape(8, 6) / 7,
    "b": {"half": np.linspace(-1, 1, 16).astype(jnp.bfloat16), "count": np.int32(-3), "flags": np.array([True, False])},
}


def test_a_sum_by_hand():
    """crc32(b"x") is 0x8cdc1683, odd already."""
    assert checksum({"x": np.array([1, 2, 4], np.uint8)}) == 7 * 0x8CDC1683
    assert checksum({"x": np.array([-1], np.int32)}) == (2**32 - 1) * 0x8CDC1683 % 2**64
    assert checksum({}) == checksum({"x": np.zeros((3, 3), np.float32)}) == 0


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 4), (1, 8)])
def test_it_does_not_depend_on_where_the_arrays_lie(shape):
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    placed = jax.tree.map(jax.device_put, TREE, sharding.shardings(jax.tree.map(jnp.asarray, TREE), mesh, 0))
    assert checksum(placed) == checksum(TREE)


@pytest.mark.parametrize("path, bit", [("a", 0), ("a", 48 * 32 - 1), ("half", 77), ("count", 31), ("flags", 8)])
def test_every_bit_counts(path, bit):
    where = TREE if path in TREE else TREE["b"]
    content = bytearray(np.asarray(where[path]).tobytes())
    content[bit // 8] ^= 1 << bit % 8
    changed = np.frombuffer(bytes(content), where[path].dtype).reshape(np.shape(where[path]))
    other = {**TREE, path: changed} if path in TREE else {**TREE, "b": {**TREE["b"], path: changed}}
    assert checksum(other) != checksum(TREE)


def test_a_leaf_counts_by_its_name():
    swapped = {"x": np.float32(2), "y": np.float32(1)}
    assert checksum({"x": np.float32(1), "y": np.float32(2)}) != checksum(swapped)
