"""Trees of parameters by name: flatten, map and rebuild nested dicts by path; stack and unstack transformer blocks.

Parameters are plain nested dicts. A leaf's name is its path joined by "/" ("blocks/attn/qkv/kernel"). Leaves below a
component called "blocks" are stacked: their axis 0 is the depth, one slice a transformer block.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any

STACK = "blocks"


def named(tree: Tree) -> dict[str, Any]:
    """{path: leaf} of a nested dict (or any pytree), in the order in which JAX flattens it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_join(path): leaf for path, leaf in leaves}


def unname(flat: dict[str, Any]) -> dict:
    """The nested dict whose `named` is `flat`.

    Raises:
      ValueError: if one path is a leaf and also the prefix of another.
    """
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} lies below {part!r}, which is already a leaf")
        if last in node:
            raise ValueError(f"{path!r} is already taken: a leaf or a branch of that name exists")
        node[last] = leaf
    return tree


def map_named(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` whose function also gets the leaf's name: fn(path, leaf, *other_leaves)."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(_join(path), *leaves), tree, *rest)


def is_stacked(path: str) -> bool:
    """Whether axis 0 of the leaf is the depth of a stack of blocks."""
    return STACK in path.split("/")


def layer_axes(path: str, ndim: int) -> tuple[int, ...]:
    """The axes a per-tensor reduction of this leaf runs over: every one, except the depth of a stacked leaf."""
    return tuple(range(1 if is_stacked(path) else 0, ndim))


def stack_blocks(blocks: Sequence[Tree]) -> Tree:
    """One tree with depth as axis 0 of every leaf, from a list of per-block trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def unstack_blocks(stacked: Tree) -> list[Tree]:
    """The per-block trees of a stacked one."""
    depth = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)]


def _join(path: tuple) -> str:
    return "/".join(_part(key) for key in path)


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
