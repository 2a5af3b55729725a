"""The DINO loss: pairs and weights by hand, an independent float64 version, gradients, memory, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from regvit_jax import sharding
from regvit_jax.losses import dino_loss, sinkhorn_knopp
from regvit_jax.losses.dino import cross_entropy

B, K, L = 8, 6, 8
dino = jax.jit(dino_loss)


@pytest.fixture(scope="module")
def views():
    """(student of the global views, student of the local views, targets)"""
    rng = np.random.default_rng(0)
    draws = [rng.normal(size=(n, B, K), scale=0.3).astype(np.float32) for n in (2, L, 2)]
    targets = np.exp(5 * draws[2])
    return draws[0], draws[1], targets / targets.sum(axis=-1, keepdims=True)


def by_definition(student_global, student_local, targets, temperature=0.1):
    """Pair by pair in float64: every pair of a teacher's view and another view of the student's weighs the same."""

    def pair(student, target):
        x = student.astype(np.float64) / temperature
        log_probs = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
        return -(target.astype(np.float64) * log_probs).sum(axis=-1).mean()

    around = [pair(student_global[s], targets[t]) for s in range(2) for t in range(2) if s != t]
    within = [pair(student, target) for student in student_local for target in targets]
    pairs = len(around) + max(len(within), 1)
    return sum(around) / pairs, sum(within) / pairs


def total(student_global, student_local, targets):
    loss = dino_loss(student_global, student_local, targets)
    return loss["global"] + loss["local"]


@pytest.mark.parametrize("local", [1, 2, 8])
def test_every_pair_weighs_the_same(views, local):
    student_global, student_local, targets = views
    want = by_definition(student_global, student_local[:local], targets)
    loss = dino(student_global, student_local[:local], targets)
    np.testing.assert_allclose([loss["global"], loss["local"]], want, rtol=2e-6)


def test_eight_local_views_make_18_pairs():
    """A student that says nothing pays ln K for each: 2 / 18 and 16 / 18 of it."""
    loss = dino(np.zeros((2, 3, 5)), np.zeros((8, 3, 5)), np.full((2, 3, 5), 0.2))
    np.testing.assert_allclose([loss["global"], loss["local"]], [np.log(5) / 9, np.log(5) * 8 / 9], rtol=1e-6)


def test_without_local_views_a_pair_weighs_a_third(views):
    student_global, _, targets = views
    loss = dino(student_global, None, targets)
    want, _ = by_definition(student_global, [], targets)
    np.testing.assert_allclose(loss["global"], want, rtol=2e-6)
    assert loss["local"] == 0.0 and loss["local"].dtype == jnp.float32
    uniform = dino(np.zeros((2, B, K)), None, np.full((2, B, K), 1 / K))
    np.testing.assert_allclose(uniform["global"], np.log(K) * 2 / 3, rtol=1e-6)


def test_a_view_does_not_predict_itself():
    """Both students know view 0 and only that: the one that sees it is asked about view 1, and is wrong by 1 / 0.1."""
    sure, targets = np.array([[[1.0, 0.0]], [[1.0, 0.0]]]), np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    loss = dino(sure, None, targets)
    right = np.log1p(np.exp(-10.0))
    np.testing.assert_allclose(loss["global"], (right + (10.0 + right)) / 3, rtol=1e-6)


def test_a_fresh_network_starts_where_the_reference_did():
    """DINOv2's issue 479 shows the first step of 65,536 prototypes: 10.03 local, 1.254 global.

    Cosines of random directions in the bottleneck's 256 dimensions have a standard deviation of 1/16, so a row pays
    ln K + (1/16 / 0.1)**2 / 2 as long as student and teacher agree on nothing.
    """
    cosines = np.random.default_rng(0).normal(size=(12, 2, 65536), scale=1 / 16).astype(np.float32)
    loss = dino(cosines[:2], cosines[2:10], jax.jit(sinkhorn_knopp)(cosines[10:], 0.04))
    np.testing.assert_allclose([loss["local"], loss["global"]], [10.03, 1.254], rtol=3e-3)


def test_gradient_is_that_of_the_definition(views):
    """Central differences in float64, in the logits of one image."""
    grads = jax.jit(jax.grad(total, argnums=(0, 1)))(*views)
    views, step = [v.astype(np.float64) for v in views], 1e-5
    for which, grad in enumerate(grads):
        for view in (0, len(grad) - 1):
            for k in range(K):
                ends = []
                for sign in (1, -1):
                    moved = [v.copy() for v in views]
                    moved[which][view, 3, k] += sign * step
                    ends.append(sum(by_definition(*moved)))
                slope = (ends[0] - ends[1]) / (2 * step)
                np.testing.assert_allclose(grad[view, 3, k], slope, rtol=1e-4, atol=1e-7)


def test_no_gradient_reaches_the_teacher(views):
    np.testing.assert_array_equal(jax.jit(jax.grad(total, argnums=2))(*views), 0.0)


def test_half_precision_loses_only_its_input_rounding(views):
    half = [v.astype(jnp.bfloat16) for v in views[:2]]
    full = [v.astype(np.float32) for v in half]
    loss, want = dino(*half, views[2]), dino(*full, views[2])
    assert loss["local"].dtype == loss["global"].dtype == jnp.float32
    np.testing.assert_allclose(loss["local"], want["local"], rtol=1e-6)
    slope = jax.jit(jax.grad(total))
    grad = slope(*half, views[2])
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(grad.astype(np.float32), slope(*full, views[2]), rtol=2**-8)


def test_huge_logits_are_finite_with_finite_slopes():
    logits, targets = np.array([[3e4, -3e4, 0.0]], np.float32), np.array([0.0, 1.0, 0.0], np.float32)
    loss, grad = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, targets, 0.1).sum()))(logits)
    np.testing.assert_allclose(loss, 6e5)
    np.testing.assert_allclose(grad, [[10.0, -10.0, 0.0]], rtol=1e-6)


def test_targets_of_any_sum():
    """0 for padding: no loss, no slope. 2 for two teachers at once."""
    targets = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.5, 0.0]], np.float32)

    def loss(x):
        losses = cross_entropy(x, targets, 0.5)
        return losses.sum(), losses

    grad, losses = jax.jit(jax.grad(loss, has_aux=True))(np.zeros((2, 4), np.float32))
    np.testing.assert_allclose(losses, [0.0, 2 * np.log(4)], rtol=1e-6)
    np.testing.assert_allclose(grad, [[0.0] * 4, [-1.0, 0.0, 0.0, 1.0]], atol=1e-6)


def test_the_backward_pass_keeps_nothing_of_the_size_of_the_logits():
    def loss(student, targets):
        return cross_entropy(student, targets, 0.1).sum()

    student, targets = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 16, 1024), (16, 1024)))
    memory = jax.jit(jax.grad(loss)).lower(student, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 16 * 1024 * 4 / 8


def test_devices_change_nothing_and_send_two_numbers(views):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(views, NamedSharding(mesh, P(None, sharding.BATCH)))
        program = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*placed).compile()
        loss, grads = program(*placed)
    text = program.as_text()
    assert not any(op in text for op in ("all-gather", "all-to-all", "collective-permute"))
    assert f"f32[{L},1,{K}]" in text and f"f32[{L},{B},{K}]" not in text
    want, want_grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*views)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for grad, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-8)


def test_shapes_that_do_not_belong_together_are_refused(views):
    student_global, student_local, targets = views
    with pytest.raises(ValueError, match=r"both be \(2, B, K\)"):
        dino_loss(student_global[:1], student_local, targets)
    with pytest.raises(ValueError, match=r"both be \(2, B, K\)"):
        dino_loss(student_global, student_local, targets[:, :, 1:])
    with pytest.raises(ValueError, match=r"local views must be \(L, B, K\) = \(L, 8, 6\), got \(8, 4, 6\)"):
        dino_loss(student_global, student_local[:, :4], targets)
