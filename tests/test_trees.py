"""Trees by name: paths and their inverse, what counts as stacked, stacking and its inverse."""

import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.models.vit import Tokens
from regvit_jax.trees import is_stacked, layer_axes, map_named, named, stack_blocks, unname, unstack_blocks

TREE = {"cls_token": 1, "blocks": {"attn": {"qkv": {"kernel": 2, "bias": 3}}, "norm1": {"scale": 4}}}
FLAT = {"blocks/attn/qkv/bias": 3, "blocks/attn/qkv/kernel": 2, "blocks/norm1/scale": 4, "cls_token": 1}


def test_names_are_paths_joined_by_slashes():
    assert named(TREE) == FLAT


def test_named_walks_in_the_order_of_jax():
    assert list(named(TREE)) == list(FLAT), "sorted by key, level by level: zipping with jax.tree.leaves must be safe"


def test_unname_is_the_inverse():
    assert unname(named(TREE)) == TREE
    assert unname(FLAT) == TREE
    assert named({}) == {} and unname({}) == {}


def test_lists_and_attributes_have_names_too():
    assert named({"a": [5, 6]}) == {"a/0": 5, "a/1": 6}
    assert named(Tokens(None, 1, 2, (1, 1))) == {"registers": 1, "patches": 2}


@pytest.mark.parametrize(
    "flat",
    [{"norm": 1, "norm/scale": 2}, {"norm/scale": 2, "norm": 1}, {"a": 1, "a/b/c": 2}],
    ids=["leaf then branch", "branch then leaf", "two levels"],
)
def test_a_path_that_is_leaf_and_branch_is_refused_by_name(flat):
    with pytest.raises(ValueError, match=r"'(norm|norm/scale|a/b/c)'.*(already)"):
        unname(flat)


def test_map_named_hands_out_paths_and_the_leaves_of_further_trees():
    other = unname({name: 10 * leaf for name, leaf in FLAT.items()})
    got = map_named(lambda path, leaf, more: f"{path}={leaf}+{more}", TREE, other)
    assert named(got) == {name: f"{name}={leaf}+{10 * leaf}" for name, leaf in FLAT.items()}


def test_map_named_refuses_trees_of_another_structure():
    with pytest.raises(ValueError):
        map_named(lambda path, a, b: a, TREE, {"cls_token": 1})


@pytest.mark.parametrize(
    ("path", "stacked"),
    [
        ("blocks/norm1/scale", True),
        ("backbone/blocks/norm1/scale", True),
        ("opt/mu/student/blocks/mlp/fc1/kernel", True),
        ("norm/scale", False),
        ("my_blocks/norm1/scale", False),
        ("blocks_norm/scale", False),
    ],
)
def test_stacked_is_what_lies_below_a_component_called_blocks(path, stacked):
    assert is_stacked(path) is stacked


def test_reductions_of_one_tensor_spare_the_depth():
    assert layer_axes("teacher/blocks/mlp/fc1/kernel", 3) == (1, 2)
    assert layer_axes("head/kernel", 2) == (0, 1)
    assert layer_axes("blocks/rate", 1) == ()


def test_stacking_puts_depth_first_and_unstacking_undoes_it():
    blocks = [{"w": np.full((2, 3), i), "n": {"b": np.full(4, -i)}} for i in range(5)]
    stacked = stack_blocks(blocks)
    assert stacked["w"].shape == (5, 2, 3) and stacked["n"]["b"].shape == (5, 4)
    np.testing.assert_array_equal(stacked["w"][:, 0, 0], np.arange(5))
    back = unstack_blocks(stacked)
    assert len(back) == 5
    for i, block in enumerate(back):
        np.testing.assert_array_equal(block["w"], blocks[i]["w"])
        np.testing.assert_array_equal(block["n"]["b"], blocks[i]["n"]["b"])


def test_stacking_keeps_half_precision():
    assert stack_blocks([{"w": jnp.ones(2, jnp.bfloat16)}] * 2)["w"].dtype == jnp.bfloat16
