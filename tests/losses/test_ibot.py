"""The iBOT loss: crop by crop in float64, what half of the crops unmasked does, padding, gradients, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from regvit_jax import sharding
from regvit_jax.losses import ibot_loss

K, CROPS = 6, 6
COUNTS = (3, 1, 4)  # masked patches of the three masked crops of six
REAL, M = sum(COUNTS), 16
ibot = jax.jit(ibot_loss, static_argnames="crops")


@pytest.fixture(scope="module")
def masked():
    """(student, targets, weights) of 8 masked patches and 8 rows of padding."""
    rng = np.random.default_rng(0)
    student = rng.normal(size=(M, K), scale=0.3).astype(np.float32)
    targets = np.exp(rng.normal(size=(M, K))).astype(np.float32)
    targets /= targets.sum(axis=-1, keepdims=True)
    weights = np.concatenate([np.repeat(1 / np.array(COUNTS), COUNTS), np.zeros(M - REAL)])
    return student, targets, weights.astype(np.float32)


def by_definition(student, targets, temperature=0.1):
    """The mean over all crops of the mean over a crop's masked patches, in float64; padding is not looked at."""
    x = student.astype(np.float64) / temperature
    losses = -(targets * (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))).sum(axis=-1)
    of_crops = [part.mean() for part in np.split(losses[:REAL], np.cumsum(COUNTS)[:-1])]
    return sum(of_crops + [0.0] * (CROPS - len(COUNTS))) / CROPS


def test_every_crop_counts_the_same_masked_or_not(masked):
    student, targets, _ = masked
    np.testing.assert_allclose(ibot(*masked, crops=CROPS), by_definition(student, targets), rtol=2e-6)


def test_a_student_that_says_nothing_pays_half_of_log_k(masked):
    """Half of the crops are masked: DINOv2 starts at half of ln K."""
    _, targets, weights = masked
    np.testing.assert_allclose(ibot(np.zeros((M, K), np.float32), targets, weights, crops=CROPS), np.log(K) / 2, 1e-6)


def test_gradient_is_that_of_the_definition_and_none_of_padding(masked):
    student, targets, weights = masked
    grad = jax.jit(jax.grad(lambda x: ibot_loss(x, targets, weights, crops=CROPS)))(student)
    step = 1e-5
    for row, k in [(0, 0), (3, 2), (7, 5)]:
        ends = []
        for sign in (1, -1):
            moved = student.astype(np.float64)
            moved[row, k] += sign * step
            ends.append(by_definition(moved, targets))
        np.testing.assert_allclose(grad[row, k], (ends[0] - ends[1]) / (2 * step), rtol=1e-4)
    np.testing.assert_array_equal(grad[REAL:], 0.0)


def test_half_precision_loses_only_its_input_rounding(masked):
    student, targets, weights = masked
    half = student.astype(jnp.bfloat16)
    loss = ibot(half, targets, weights, crops=CROPS)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, ibot(half.astype(np.float32), targets, weights, crops=CROPS), rtol=1e-6)


def test_nothing_masked_costs_nothing():
    empty = np.zeros((0, K), np.float32)
    assert ibot(empty, empty, np.zeros(0, np.float32), crops=4) == 0.0


def test_groups_on_devices_change_nothing(masked):
    """8 groups, one a device: the student's rows stay there, and one number is summed."""
    student, targets, weights = (np.stack([x * (1 + g) / 8 for g in range(8)]) for x in masked)
    mesh = sharding.make_mesh(data=2, fsdp=4)

    def loss(student, targets, weights):
        return ibot_loss(student, targets, weights, crops=8 * CROPS)

    with jax.set_mesh(mesh):
        placed = jax.device_put((student, targets, weights), NamedSharding(mesh, P(sharding.BATCH)))
        program = jax.jit(jax.value_and_grad(loss)).lower(*placed).compile()
        value, grad = program(*placed)
    text = program.as_text()
    assert not any(op in text for op in ("all-gather", "all-to-all", "collective-permute"))
    flat = (student.reshape(-1, K), targets.reshape(-1, K), weights.reshape(-1))
    want, want_grad = jax.jit(jax.value_and_grad(loss))(*flat)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad.reshape(-1, K), want_grad, rtol=1e-5, atol=1e-9)


def test_shapes_that_do_not_belong_together_are_refused(masked):
    student, targets, weights = masked
    with pytest.raises(ValueError, match=r"\(M, K\), \(M, K\) and \(M,\)"):
        ibot_loss(student, targets[1:], weights, crops=CROPS)
    with pytest.raises(ValueError, match=r"\(M, K\), \(M, K\) and \(M,\)"):
        ibot_loss(student, targets, weights[:, None], crops=CROPS)
