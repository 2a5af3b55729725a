"""Sharding: the mesh, where parameters and batches live on it, and the only ways in (put) and out (gather).

Knows no model.

Axes: `data` replicates parameters, `fsdp` shards them by shape, `tensor` shards them by name; the batch runs over
data x fsdp.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from regvit_jax.trees import Array, Tree, is_stacked, map_named

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# The tensor-parallel axis of each leaf, counted from the end: heads and hidden units are split, the residual stream is
# not. Keys are the last path components; q, k and v are split by head, so the number of heads must be divisible
# (config.validate).
_TENSOR_AXIS = {
    ("qkv", "kernel"): -1,
    ("qkv", "bias"): -1,
    ("proj", "kernel"): -2,
    ("fc1", "kernel"): -1,
    ("fc1", "bias"): -1,
    ("fc2", "kernel"): -2,
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh with Auto axes over `devices` (default: all). One size may be -1: whatever is left.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be positive, and at most one of them -1; got {sizes}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // fixed if len(devices) % fixed == 0 else 0
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices: the product "
            f"must be {len(devices)} (-1 for one axis takes what is left)"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def constrain(x: Array, *spec) -> Array:
    """`x` pinned to PartitionSpec(*spec) on the mesh in use; `x` itself where there is none or one device.

    Without a spec: whole on every device. One call after every residual add keeps the partitioner from sharding
    activations by feature, which floods the step with collectives.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or "data" not in mesh.axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, P(*spec))


def constrain_examples(x: Array, axis: int = 0) -> Array:
    """`x` with this axis of examples (or groups) over data x fsdp, if it divides by them; otherwise as it is."""
    devices = math.prod(axis_size(name) for name in BATCH)
    return x if x.shape[axis] % devices else constrain(x, *[None] * axis, BATCH)


def axis_size(name: str) -> int:
    """Devices along an axis of the mesh in use; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or name not in mesh.axis_names else mesh.shape[name]


def spec_for(path: str, shape: Sequence[int], mesh: Mesh, min_bytes: int, itemsize: int = 4) -> P:
    """Where the leaf `path` of this shape lives: `tensor` by name, `fsdp` on the largest axis it divides.

    The depth axis of a stacked leaf is never sharded (the scan walks it), and a leaf whose slice of one layer is
    smaller than `min_bytes` is not worth gathering and stays whole.
    """
    spec: list = [None] * len(shape)
    first = 1 if is_stacked(path) else 0
    tensor_axis = _TENSOR_AXIS.get(tuple(path.split("/")[-2:])) if mesh.shape["tensor"] > 1 else None
    if tensor_axis is not None and first and shape[tensor_axis] % mesh.shape["tensor"] == 0:
        spec[tensor_axis] = "tensor"
    if mesh.shape["fsdp"] > 1 and math.prod(shape[first:]) * itemsize >= min_bytes:
        for axis in sorted(range(first, len(shape)), key=lambda a: -shape[a]):
            if spec[axis] is None and shape[axis] % mesh.shape["fsdp"] == 0:
                spec[axis] = "fsdp"
                break
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def shardings(tree: Tree, mesh: Mesh, min_bytes: int) -> Tree:
    """The NamedSharding of every leaf (array or ShapeDtypeStruct) by `spec_for`."""

    def one(path, leaf):
        return NamedSharding(mesh, spec_for(path, leaf.shape, mesh, min_bytes, np.dtype(leaf.dtype).itemsize))

    return map_named(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over data x fsdp."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """This process's rows of a global batch as global arrays, axis 0 over data x fsdp.

    The only way host data reaches devices.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()}


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Host values, equal on every process, as arrays that every device holds whole."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index, x=x: np.asarray(x)[index]), tree
    )


def gather(tree: Tree) -> Tree:
    """Every leaf as a whole NumPy array on every process. All processes must call it."""

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        whole = jax.jit(lambda y: y, out_shardings=replicated(x.sharding.mesh))(x)
        return np.asarray(whole.addressable_data(0))

    return jax.tree.map(one, tree)


def jit_once(fn: Callable, **kwargs) -> Callable:
    """jax.jit for what runs once, such as initialisation: compiled fast instead of running fast (a CPU takes a fifth of
    the time)."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(fn, compiler_options=options, **kwargs)


def sharded_bytes(tree: Tree) -> tuple[int, int]:
    """(bytes of all leaves, bytes of those that are split over devices) of a tree of arrays or structs with
    shardings."""
    total = split = 0
    for leaf in jax.tree.leaves(tree):
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        total += size
        if leaf.sharding is not None and not leaf.sharding.is_fully_replicated:
            split += size
    return total, split


def log_sharding(tree: Tree, mesh: Mesh) -> None:
    """Says how much of the state is really split; warns where fsdp was asked for and nothing is."""
    if mesh.size == 1:
        return
    total, split = sharded_bytes(tree)
    logging.info("mesh %s: %.1f of %.1f MiB of state are sharded", dict(mesh.shape), split / 2**20, total / 2**20)
    if mesh.shape["fsdp"] > 1 and not split:
        logging.warning(
            "mesh.fsdp=%d shards nothing: every layer is below mesh.fsdp_min_bytes; lower it, or use mesh.data",
            mesh.shape["fsdp"],
        )
