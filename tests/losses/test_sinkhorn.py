"""Sinkhorn-Knopp and centred targets: by hand, the reference's arithmetic in float64, padding, range, devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from regvit_jax import sharding
from regvit_jax.losses import centered_softmax, sinkhorn_knopp, update_center

N, K = 24, 16
sinkhorn = jax.jit(sinkhorn_knopp, static_argnames="iterations")


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(N, K), scale=0.3).astype(np.float32)


def by_definition(logits_nk, temperature, iterations=3):
    """Alternating normalisation of exp(logits / temperature) itself, in float64."""
    q = np.exp(logits_nk.astype(np.float64) / temperature).T
    k, n = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * k
        q /= q.sum(axis=0, keepdims=True) * n
    return (q * n).T


def test_one_round_by_hand():
    # Q = [[4, 1], [1, 1]]. Over prototypes: [[4/5, 1/2], [1/5, 1/2]]; then the rows.
    logits = 0.5 * np.log([[4.0, 1.0], [1.0, 1.0]])
    want = [[8 / 13, 5 / 13], [2 / 7, 5 / 7]]
    np.testing.assert_allclose(sinkhorn(logits, 0.5, iterations=1), want, rtol=1e-6)


def test_logits_that_say_nothing_share_everything():
    np.testing.assert_allclose(sinkhorn(np.full((3, 5), 7.0), 0.04), 0.2, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.04, 0.07])
@pytest.mark.parametrize("iterations", [1, 3])
def test_agrees_with_the_definition(logits, temperature, iterations):
    got = sinkhorn(logits, temperature, iterations=iterations)
    want = by_definition(logits, temperature, iterations)
    # Exponents reach 1 / 0.04: float32 rounds them by 3e-6, and so every number relatively.
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-30)
    np.testing.assert_allclose(np.asarray(got).sum(axis=1), 1.0, rtol=2e-6)


def test_enough_rounds_use_every_prototype_alike(logits):
    targets = np.asarray(sinkhorn(logits, 0.5, iterations=8))
    np.testing.assert_allclose(targets.sum(axis=0), N / K, rtol=1e-5)


def test_the_batch_has_any_number_of_axes(logits):
    views = sinkhorn(logits.reshape(2, N // 2, K), 0.07)
    np.testing.assert_allclose(np.asarray(views).reshape(N, K), sinkhorn(logits, 0.07), rtol=1e-5)


@pytest.mark.parametrize("garbage", [0.0, 50.0, np.nan, np.inf])
def test_padding_changes_nothing(logits, garbage):
    rows = np.array([0, 1, 3, 8, 9, 20])
    valid = np.zeros(N, bool)
    valid[rows] = True
    padded = np.where(valid[:, None], logits, np.float32(garbage))
    got = np.asarray(sinkhorn(padded, 0.05, valid_n=valid))
    np.testing.assert_allclose(got[rows], sinkhorn(logits[rows], 0.05), rtol=1e-5)
    np.testing.assert_array_equal(got[~valid], 0.0)


def test_padding_alone_is_zero(logits):
    np.testing.assert_array_equal(sinkhorn(logits, 0.05, valid_n=np.zeros(N, bool)), 0.0)


def test_any_range_of_logits(logits):
    """exp(logits / 0.04) overflows float32 from 3.6 on, and is 0 for a sample that lies 4.2 below another."""
    want = by_definition(logits, 0.04)
    np.testing.assert_allclose(sinkhorn(logits + 8.0, 0.04), want, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(sinkhorn(logits - 8.0, 0.04), want, rtol=1e-3, atol=1e-6)
    lowered = logits.copy()
    lowered[5] -= 6.0
    got = sinkhorn(lowered, 0.04)
    np.testing.assert_allclose(got, by_definition(lowered, 0.04), rtol=1e-3, atol=1e-6)
    wild = np.asarray(sinkhorn(1e4 * logits, 0.04))
    assert np.isfinite(wild).all()
    np.testing.assert_allclose(wild.sum(axis=1), 1.0, rtol=2e-6)


def test_half_precision_loses_only_its_input_rounding(logits):
    half = logits.astype(jnp.bfloat16)
    got = sinkhorn(half, 0.07)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, sinkhorn(half.astype(np.float32), 0.07))


def test_no_gradient_reaches_the_teacher(logits):
    grad = jax.grad(lambda x: (sinkhorn_knopp(x, 0.07) ** 2).sum() + (centered_softmax(x, x[0], 0.07) ** 2).sum())
    np.testing.assert_array_equal(jax.jit(grad)(logits), 0.0)


def test_bad_arguments_are_named(logits):
    with pytest.raises(ValueError, match="at least 1 iteration, got 0"):
        sinkhorn_knopp(logits, 0.07, iterations=0)
    with pytest.raises(ValueError, match=r"valid_n of shape \(3,\)"):
        sinkhorn_knopp(logits, 0.07, valid_n=np.ones(3, bool))


class TestCentre:
    def test_targets_by_hand(self):
        # (logits - centre) / 0.5 = (ln 9, 0)
        logits, centre = jnp.array([[0.5 * np.log(9.0) + 0.25, -1.0]]), jnp.array([0.25, -1.0])
        np.testing.assert_allclose(centered_softmax(logits, centre, 0.5), [[0.9, 0.1]], rtol=1e-6)

    def test_is_one_step_behind(self):
        """Each step's targets know the means of the steps before it, not its own."""
        centre, means = jnp.zeros(2), ([10.0, 0.0], [0.0, 20.0], [1.0, 1.0])
        used = []
        for mean in means:
            used.append(np.asarray(centre))
            centre = update_center(centre, jnp.array(mean))
        np.testing.assert_allclose(used, [[0.0, 0.0], [1.0, 0.0], [0.9, 2.0]], rtol=1e-6)
        np.testing.assert_allclose(centre, [0.91, 1.9], rtol=1e-6)

    def test_stays_float32(self):
        assert update_center(jnp.zeros(2), jnp.ones(2, jnp.bfloat16), 0.5).dtype == jnp.float32
        assert centered_softmax(jnp.ones((1, 2), jnp.bfloat16), jnp.zeros(2), 0.04).dtype == jnp.float32


def test_a_batch_on_8_devices_sends_sums_over_samples_and_nothing_else(logits):
    """Three rounds, each with one largest value and one sum a prototype; no device ever holds all samples."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    valid = np.arange(N) % 5 > 0
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, P(sharding.BATCH))
        rows, flags = jax.device_put(logits, where), jax.device_put(valid, where)
        program = jax.jit(lambda x, v: sinkhorn_knopp(x, 0.05, valid_n=v)).lower(rows, flags).compile()
        got, text = program(rows, flags), program.as_text()
    sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    assert 1 <= len(sums) <= 6
    assert all(re.findall(r"\[([\d,]*)\]", shape) == [str(K)] for shape in sums)
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    assert f"f32[{N // 8},{K}]" in text and f"f32[{N},{K}]" not in text
    np.testing.assert_allclose(got, sinkhorn(logits, 0.05, valid_n=valid), rtol=1e-5)


def test_holds_nothing_of_the_size_of_the_result_beside_it():
    shape = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    memory = jax.jit(lambda x: sinkhorn_knopp(x, 0.05)).lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 1024 * 4 / 4
