"""The train state: structure, placement, values that do not depend on the mesh, and the memory report."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from regvit_jax import sharding, state

KEY = jax.random.key(0)


class Momentum:
    """As an optimiser looks from here: something with init."""

    def init(self, params):
        return {"mu": jax.tree.map(jnp.zeros_like, params), "count": jnp.zeros((), jnp.int32)}


def init_fn(key):
    k1, k2 = jax.random.split(key)
    params = {
        "blocks": {"fc1": {"kernel": jax.random.normal(k1, (2, 16, 32))}},
        "head": {"kernel": jax.random.normal(k2, (32, 8)), "bias": jnp.zeros(3)},
    }
    return params, {"ema": jax.tree.map(jnp.copy, params)}


def mesh_of(count, fsdp):
    return sharding.make_mesh(data=-1, fsdp=fsdp, devices=jax.devices()[:count])


@pytest.fixture(scope="module")
def made():
    return state.create(init_fn, Momentum(), KEY, mesh_of(8, 8), 0)


def test_state_holds_step_params_opt_and_extras(made):
    assert set(made) == {"step", "params", "opt", "extras"}
    assert made["step"].dtype == jnp.int32 and made["step"] == 0
    np.testing.assert_array_equal(made["extras"]["ema"]["head"]["kernel"], made["params"]["head"]["kernel"])


def test_abstract_is_what_create_makes(made):
    target = state.abstract(init_fn, Momentum(), KEY, mesh_of(8, 8), 0)
    assert jax.tree.structure(target) == jax.tree.structure(made)
    for want, leaf in zip(jax.tree.leaves(target), jax.tree.leaves(made), strict=True):
        assert (want.shape, want.dtype, want.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)


def test_params_moments_and_extras_of_one_parameter_lie_alike(made):
    kernels = [tree["blocks"]["fc1"]["kernel"] for tree in (made["params"], made["opt"]["mu"], made["extras"]["ema"])]
    assert {leaf.sharding.spec for leaf in kernels} == {P(None, None, "fsdp")}, "the largest axis of a layer"
    assert kernels[0].addressable_shards[0].data.shape == (2, 16, 4)
    assert made["params"]["head"]["bias"].sharding.is_fully_replicated, "3 is not divisible by 8"


def test_values_do_not_depend_on_the_mesh(made):
    jax.tree.map(np.testing.assert_array_equal, state.create(init_fn, Momentum(), KEY, mesh_of(1, 1), 0), made)


def test_no_device_holds_a_whole_parameter_while_it_is_drawn():
    def large(key):
        return {"kernel": jax.random.normal(key, (256, 1024))}, {}

    mesh = mesh_of(8, 8)
    target = state.abstract(large, Momentum(), KEY, mesh, 0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    compiled = jax.jit(lambda key: state._init(large, Momentum(), key), out_shardings=shardings).lower(KEY).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 256 * 1024 * 4


def test_inputs_arrive_sharded_and_keep_their_values():
    loaded = {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8)}
    seen = []

    def from_loaded(key, tree):
        seen.append(tree["kernel"])
        return {"kernel": tree["kernel"] + 1}, {}

    made = state.create(from_loaded, Momentum(), KEY, mesh_of(8, 8), 0, loaded)
    assert all(isinstance(x, jax.core.Tracer) for x in seen), "a constant would be compiled into the program"
    assert made["extras"] == {}
    np.testing.assert_array_equal(made["params"]["kernel"], loaded["kernel"] + 1)
    assert made["params"]["kernel"].addressable_shards[0].data.size == 8


def test_report_counts_by_hand():
    report = state.report(state.abstract(init_fn, Momentum(), KEY, mesh_of(8, 8), 4 * 16 * 32)["params"])
    stacked, head, bias = 2 * 16 * 32 * 4, 32 * 8 * 4, 3 * 4
    assert report.total == stacked + head + bias
    assert report.sharded == stacked, "the head is below min_bytes"
    assert report.per_device == stacked // 8 + head + bias


def test_fsdp_that_shards_nothing_warns_by_the_name_of_its_key(caplog):
    with caplog.at_level(logging.INFO):
        state.create(lambda key: ({"bias": jnp.zeros(8)}, {}), Momentum(), KEY, mesh_of(8, 8), 2**22)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("mesh.fsdp_min_bytes" in text for text in warnings)


@pytest.mark.parametrize(("count", "fsdp"), [(8, 8), (8, 1)])
def test_what_is_meant_to_be_does_not_warn(caplog, count, fsdp):
    with caplog.at_level(logging.INFO):
        state.log(state.abstract(init_fn, Momentum(), KEY, mesh_of(count, fsdp), 0), mesh_of(count, fsdp))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert any("on each device" in r.getMessage() for r in caplog.records)
