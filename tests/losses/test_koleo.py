"""KoLeo: distances by hand, an independent float64 version, groups, duplicates, gradients, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from regvit_jax import sharding
from regvit_jax.losses import koleo_loss

G, B, D = 8, 5, 12
koleo, slope = jax.jit(koleo_loss), jax.jit(jax.value_and_grad(koleo_loss))


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).normal(size=(G, B, D)).astype(np.float32)


def by_definition(x_gbd):
    """Every pair of every group, in float64."""
    total = []
    for group in x_gbd.astype(np.float64):
        units = [x / np.linalg.norm(x) for x in group]
        for i, x in enumerate(units):
            distances = [np.linalg.norm(x - y) for j, y in enumerate(units) if j != i]
            total.append(-np.log(min(distances) + 1e-8))
    return np.mean(total)


def circle(*degrees):
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def test_by_hand():
    # A right angle is sqrt(2) across. On the circle, points at 0, 60 and 150 degrees: chords 1, 1 and sqrt(2).
    np.testing.assert_allclose(koleo(circle(0, 90)[None]), -np.log(2) / 2, rtol=1e-6)
    np.testing.assert_allclose(koleo(circle(0, 60, 150)[None]), -np.log(2) / 2 / 3, rtol=1e-5)


def test_opposite_features_are_not_taken_for_their_own_neighbours():
    """At -1 their dot product is the least there is, and rounding may put it below."""
    np.testing.assert_allclose(koleo(circle(33, 213)[None]), -np.log(2), rtol=1e-6)


def test_agrees_with_the_definition(features):
    np.testing.assert_allclose(koleo(features), by_definition(features), rtol=1e-5)


def test_length_does_not_matter(features):
    scales = np.random.default_rng(1).uniform(0.01, 100, (G, B, 1)).astype(np.float32)
    np.testing.assert_allclose(koleo(features * scales), koleo(features), rtol=1e-5)


def test_neighbours_are_sought_in_the_group_alone(features):
    """Two copies of a group are no duplicates of each other."""
    doubled = np.concatenate([features[:1], features[:1]])
    np.testing.assert_allclose(koleo(doubled), by_definition(features[:1]), rtol=1e-5)
    assert koleo(doubled.reshape(1, 2 * B, D)) > 10


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_duplicates_and_zeros_are_finite(value):
    """Rows that are all the same are 1e-8 sqrt(D) apart, by the epsilon in the difference."""
    loss, grad = slope(np.full((1, 3, 4), value, np.float32))
    np.testing.assert_allclose(loss, -np.log(3e-8), rtol=1e-4)
    assert np.isfinite(grad).all()


def test_gradient_is_that_of_the_definition(features):
    """Both ends of a distance move: central differences in float64."""
    grad = np.asarray(slope(features)[1])
    rng, step = np.random.default_rng(2), 1e-5
    for _ in range(3):
        direction = rng.normal(size=features.shape)
        ends = [by_definition(features + sign * step * direction) for sign in (1.0, -1.0)]
        np.testing.assert_allclose((grad * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-3)


def test_half_precision_loses_only_its_input_rounding(features):
    half = features.astype(jnp.bfloat16)
    loss = koleo(half)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, koleo(half.astype(np.float32)), rtol=1e-6)


def test_groups_on_devices_stay_where_they_are(features):
    """Every group is whole on its device: beside the loss nothing is sent."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(features, NamedSharding(mesh, P(sharding.BATCH)))
        program = slope.lower(placed).compile()
        loss, grad = program(placed)
    text = program.as_text()
    assert not any(op in text for op in ("all-gather", "all-to-all", "collective-permute"))
    assert "f32[1,5,12]" in text and "f32[8,5,12]" not in text
    want, want_grad = slope(features)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-7)


def test_one_group_over_all_devices_is_the_same(features):
    whole = features[:, :1].reshape(1, G, D)
    mesh = sharding.make_mesh(data=8)
    with jax.set_mesh(mesh):
        loss = koleo(jax.device_put(whole, NamedSharding(mesh, P(None, sharding.BATCH))))
    np.testing.assert_allclose(loss, koleo(whole), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 1, 8), (4, 8)])
def test_too_few_for_a_neighbour_are_refused(shape):
    with pytest.raises(ValueError, match="at least b = 2 images in a group"):
        koleo_loss(jnp.ones(shape))
