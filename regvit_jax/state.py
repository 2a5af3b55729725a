"""The train state: a nested dict {"step", "params", "opt", "extras"}, described without memory, created in its shards.

    step    int32 scalar, finished updates
    params  what gradients reach, float32
    opt     the optimiser's moments
    extras  whatever a recipe carries along: teacher, centres, EMA; {} if nothing

One rule (sharding.shardings) places all of them, so a moment lies where its parameter lies.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from regvit_jax import sharding
from regvit_jax.trees import Array, Tree

InitFn = Callable[..., tuple[Tree, Tree]]


class Optimizer(Protocol):
    def init(self, params: Tree) -> Tree: ...


class Bytes(NamedTuple):
    """Memory of a state, in bytes."""

    total: int
    sharded: int  # of `total`, in leaves that are split over devices
    per_device: int  # what one device holds


def abstract(init_fn: InitFn, optimizer: Optimizer, key: Array, mesh: Mesh, min_bytes: int, *inputs: Any) -> Tree:
    """The state as ShapeDtypeStructs with NamedShardings: what `create` makes and a checkpoint is restored into.

    Args:
      init_fn: (key, *inputs) -> (params, extras), traceable.
      optimizer: `.init(params) -> opt`.
      key: root key of the "init" stream.
      mesh: (data, fsdp, tensor).
      min_bytes: `mesh.fsdp_min_bytes`; a smaller leaf (one layer of it, where it is stacked) stays whole.
      inputs: pytrees of arrays that init_fn starts from, such as loaded models. As arguments they are not compiled into
        the program as constants, and are sharded before they are used.
    """
    shapes = jax.eval_shape(functools.partial(_init, init_fn, optimizer), key, *inputs)
    return _with_shardings(shapes, sharding.shardings(shapes, mesh, min_bytes))


def create(init_fn: InitFn, optimizer: Optimizer, key: Array, mesh: Mesh, min_bytes: int, *inputs: Any) -> Tree:
    """The initial state, each device computing its own shards; arguments as for `abstract`.

    Draws are made at global shape, so the values do not depend on the mesh. Logs what is sharded, and warns where
    mesh.fsdp > 1 shards nothing.
    """
    target = abstract(init_fn, optimizer, key, mesh, min_bytes, *inputs)
    log(target, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    inputs = [_place(tree, sharding.shardings(tree, mesh, min_bytes)) for tree in inputs]
    return sharding.jit_once(functools.partial(_init, init_fn, optimizer), out_shardings=shardings)(key, *inputs)


def report(tree: Tree) -> Bytes:
    """Bytes of a state or a part of it: arrays or ShapeDtypeStructs, with shardings."""
    total, split = sharding.sharded_bytes(tree)
    leaves = jax.tree.leaves(tree)
    per_device = sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)
    return Bytes(total, split, per_device)


def log(state: Tree, mesh: Mesh) -> None:
    """One line on the size of the state and, on several devices, one on what of it is really sharded."""
    parts = ", ".join(f"{name} {_mib(report(state[name]).total)}" for name in ("params", "opt", "extras"))
    logging.info("state: %s; %s on each device", parts, _mib(report(state).per_device))
    sharding.log_sharding(state, mesh)


def _init(init_fn: InitFn, optimizer: Optimizer, key: Array, *inputs: Any) -> Tree:
    params, extras = init_fn(key, *inputs)
    return {"step": jnp.zeros((), jnp.int32), "params": params, "opt": optimizer.init(params), "extras": extras}


def _with_shardings(shapes: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _place(tree: Tree, shardings: Tree) -> Tree:
    """Host or one-device values, equal on every process, in their shards; the whole never reaches another device."""

    def one(leaf, where):
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    return jax.tree.map(one, tree, shardings)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
