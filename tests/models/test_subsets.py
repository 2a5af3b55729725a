"""Stochastic depth with a fixed number of rows a group: which rows, the same numbers as the form by chance where both
drop the same, less work, and no activation that leaves its device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax import sharding
from regvit_jax.models.config import Execution
from regvit_jax.models.layers import kept, subsets
from regvit_jax.models.vit import drop_rates
from regvit_jax.trees import named

ROWS = 4  # of each of two groups; half of them, or three quarters, are whole numbers, so that both forms scale alike


@pytest.fixture(scope="module")
def outputs_and_gradients(compiling_fast):
    """Jitted (model, images, drops) -> (tokens, gradients)."""

    def both(model, images, drops):
        def loss(model):
            tokens = model(images, key=drops)
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(tokens)), tokens

        grads, tokens = jax.grad(loss, has_aux=True)(model)
        return tokens, grads.params

    with compiling_fast():
        yield jax.jit(both)


def alive(drops, groups):
    """(B, depth, 2) bool of the same rows, as `layers.branches` draws them."""
    out = np.zeros((groups, ROWS, len(drops), 2), bool)
    for block, branch, group in np.ndindex(len(drops), 2, groups):
        out[group, np.asarray(drops[block])[branch, group], block, branch] = True
    return out.reshape(groups * ROWS, len(drops), 2)


CASES = {
    "scan, no gains": (Execution(), True, None),
    "scan, named": (Execution(remat="named"), True, 0.5),
    "rates that differ, full": (Execution(remat="full"), False, 0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_and_gradients_as_by_chance_where_the_same_rows_live(case, tiny, outputs_and_gradients):
    run, uniform, gain = CASES[case]
    model = tiny(run, layerscale=gain, drop_path=0.5, drop_path_uniform=uniform)
    images = np.random.default_rng(0).normal(size=(2 * ROWS, 12, 8, 3)).astype(np.float32)
    drops = subsets(jax.random.key(3), 2, ROWS, drop_rates(model.config))
    assert isinstance(drops, tuple) != uniform
    assert [d.shape[-1] for d in drops] == ([2, 2, 2] if uniform else [4, 3, 2])
    ours = outputs_and_gradients(model, images, drops)
    theirs = outputs_and_gradients(model, images, jnp.asarray(alive(drops, 2)))
    for (name, a), b in zip(named(ours).items(), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, np.abs(b).max()), err_msg=name)


def test_how_many_rows_are_kept():
    assert [kept(128, 0.3), kept(512, 0.3), kept(64, 0.4), kept(256, 0.4)] == [89, 358, 38, 153]
    assert kept(64, np.float32(0.4)) == 38 and kept(8, 0.0) == 8 and kept(2, 0.9) == 1


def test_every_group_block_and_branch_draws_its_own_rows_all_equally_often():
    drops = np.asarray(subsets(jax.random.key(0), 64, 6, [0.5] * 8))
    assert drops.shape == (8, 2, 64, 3) and drops.dtype == np.int32
    assert (np.diff(drops) > 0).all() and drops.min() == 0 and drops.max() == 5
    sets = drops.reshape(-1, 3)
    share = np.bincount(sets.ravel(), minlength=6) / len(sets)
    assert np.abs(share - 0.5).max() < 5 * np.sqrt(0.25 / len(sets))
    # All 20 sets of 3 of 6 rows, each in one of 20 cases; and no two blocks, branches or groups go together.
    _, counts = np.unique(sets, axis=0, return_counts=True)
    assert len(counts) == 20 and np.abs(counts / len(sets) - 0.05).max() < 5 * np.sqrt(0.05 / len(sets))
    for first, second in ((drops[:-1], drops[1:]), (drops[:, :1], drops[:, 1:]), (drops[:, :, :-1], drops[:, :, 1:])):
        same = (first == second).all(-1).mean()
        assert same == pytest.approx(0.05, abs=5 * np.sqrt(0.05 / first[..., 0].size))


def test_dropped_rows_are_not_computed(tiny):
    """Products of the blocks see k rows; those of the patch embedding see all."""
    model = tiny(drop_path=0.5, drop_path_uniform=True)
    drops = subsets(jax.random.key(0), 2, ROWS, drop_rates(model.config))
    text = str(jax.make_jaxpr(model)(jnp.zeros((2 * ROWS, 12, 8, 3)), key=drops))
    products = re.findall(r":f32\[(\d+),[\d,]+\] = dot_general", text)
    assert sorted(products) == ["4"] * 8 + ["8"]


def collectives(text):
    """[(op, shapes)] that carry anything of the size of an activation: an axis of 9 tokens."""
    found = re.findall(
        r"= (\S+) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(", text
    )
    return [(op, shapes) for shapes, op in found if re.search(r"[\[,]9[,\]]", shapes)]


def test_no_activation_leaves_its_device(tiny, outputs_and_gradients):
    """Eight groups on 8 devices, forward and backward; a single group, which has no device of its own, for contrast."""
    model = tiny(depth=1, drop_path=0.5, drop_path_uniform=True)
    mesh = sharding.make_mesh(2, 4)

    def lowered(groups):
        drops = subsets(jax.random.key(0), groups, 32 // groups, drop_rates(model.config))
        images = jax.device_put(jnp.zeros((32, 12, 8, 3)), sharding.batch_sharding(mesh))
        return outputs_and_gradients.lower(model, images, drops).compile()

    with jax.set_mesh(mesh):
        assert collectives(lowered(8).as_text()) == []
        assert collectives(lowered(1).as_text()) != []
