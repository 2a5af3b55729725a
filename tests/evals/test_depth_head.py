"""The depth head: the published order of its layers, bins by hand, padding, and an optimiser for several heads."""

import jax
import numpy as np
import pytest
from PIL import Image

from regvit_jax.evals import depth_head
from regvit_jax.evals.depth_head import (
    BINS,
    init_heads,
    lr_factor,
    one_cycle,
    output_matrices,
    probe_blocks,
    read_depth,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ENDS = (0.001, 10.0)


def pillow(channel, height, width):
    """Bilinear enlarging by Pillow: centres aligned, the border repeated."""
    return np.asarray(Image.fromarray(channel.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))


def published(head, features, target):
    """(H, W) of one image (h, w, C): enlarge the features, then the 1 x 1 convolution to bins, then enlarge depth."""
    h, w, c = features.shape
    enlarged = np.stack([pillow(features[..., i], 4 * h, 4 * w) for i in range(c)], -1)
    weights = np.maximum(enlarged @ head["kernel"] + head["bias"], 0) + 0.1
    weights /= weights.sum(-1, keepdims=True)
    return pillow(weights @ np.linspace(*ENDS, BINS), *target)


@pytest.fixture(scope="module")
def known():
    rng = np.random.default_rng(0)
    return {"kernel": rng.normal(size=(6, BINS)).astype(np.float32), "bias": rng.normal(size=BINS).astype(np.float32)}


def test_the_convolution_may_come_first(known):
    """40 x 56 pixels in patches of 8: nothing is padded."""
    features = np.random.default_rng(1).normal(size=(2, 5, 7, 6)).astype(np.float32)
    matrices = output_matrices((40, 56), (40, 56), 8, "stretch")
    got = jax.jit(read_depth, static_argnums=4)(known, features, *matrices, ENDS)
    want = np.stack([published(known, image, (40, 56)) for image in features])
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_one_bin_switched_on():
    """A bias of 1000 in bin 51 of 0 … 255 m: (1000.1 * 51 + 0.1 * (sum of all others)) / (1000.1 + 25.5)."""
    head = {"kernel": np.zeros((2, BINS), np.float32), "bias": np.zeros(BINS, np.float32)}
    features = np.ones((1, 1, 1, 2), np.float32)
    matrices = output_matrices((8, 8), (8, 8), 8, "stretch")
    read = jax.jit(read_depth, static_argnums=4)
    even = read(head, features, *matrices, (0.0, 255.0))
    np.testing.assert_allclose(even, np.full((1, 8, 8), 127.5), rtol=5e-6)  # all bins alike: the middle
    head["bias"][51] = 1000.0
    want = (1000.1 * 51 + 0.1 * (255 * 128 - 51)) / (1000.1 + 25.5)
    np.testing.assert_allclose(read(head, features, *matrices, (0.0, 255.0)), np.full((1, 8, 8), want), rtol=5e-6)


def test_padding_is_stretched_or_cropped():
    """480 x 640 in patches of 14: 35 x 46 patches, 5 rows above and below and 2 columns left and right are padding."""
    rows, columns = output_matrices((480, 640), (480, 640), 14, "stretch")
    assert rows.shape == (480, 140) and columns.shape == (640, 184)
    ramp = (np.arange(140) + 0.5) * 490 / 140  # pixel of the padded image that each row of the map lies at
    stretched, cropped = rows @ ramp, output_matrices((480, 640), (480, 640), 14, "crop")[0] @ ramp
    inner = slice(10, 470)
    np.testing.assert_allclose(stretched[inner], (np.arange(480)[inner] + 0.5) * 490 / 480, rtol=1e-5)
    np.testing.assert_allclose(cropped[inner], np.arange(480)[inner] + 0.5 + 5, rtol=1e-5)
    # Without padding there is nothing to choose.
    modes = (output_matrices((32, 48), (32, 48), 16, mode) for mode in depth_head.PADDINGS)
    for one, other in zip(*modes, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_truth_of_another_size_is_reached_from_the_image():
    depth = np.random.default_rng(0).normal(size=(20, 28))
    small, large = (output_matrices((40, 56), size, 8, "stretch") for size in ((40, 56), (90, 120)))
    image = small[0] @ depth @ small[1].T
    np.testing.assert_allclose(large[0] @ depth @ large[1].T, pillow(image, 90, 120), atol=1e-5)


def test_blocks():
    assert [probe_blocks(depth, 1) for depth in (1, 12)] == [(0,), (11,)]
    want = {4: (0, 1, 2, 3), 6: (0, 2, 3, 5), 12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
    assert {depth: probe_blocks(depth, 4) for depth in want} == want
    with pytest.raises(ValueError, match="layers=4 needs a network of 4 blocks or more, this one has 3"):
        probe_blocks(3, 4)


def test_heads_start_alike_and_as_a_convolution_of_torch():
    heads = init_heads(jax.random.key(0), 64, 3)
    assert heads["kernel"].shape == (3, 64, BINS) and heads["bias"].shape == (3, BINS)
    for leaf in heads.values():
        np.testing.assert_array_equal(leaf[0], leaf[2])
        assert 0.12 < np.abs(leaf).max() <= 1 / 8
        np.testing.assert_allclose(np.std(leaf), 1 / 8 / np.sqrt(3), rtol=0.1)


def test_learning_rate_as_published():
    """38,400 steps, the first third warm-up: the line times the cosine."""
    rate = [float(lr_factor(step, 38_400, 12_800)) for step in (0, 6_400, 12_800, 19_200, 38_400)]
    np.testing.assert_allclose(rate[:4], [1e-3, 0.5005 * (0.5 + 0.5 * np.cos(np.pi / 6)), 0.75, 0.5], rtol=1e-5)
    np.testing.assert_allclose(rate[4], 1e-8, atol=1e-8)
    assert float(lr_factor(0, 10, 0)) == 1.0


def test_beta1_goes_down_and_back():
    beta = [float(one_cycle(step, 1000)) for step in (0, 299, 999)]
    np.testing.assert_allclose(beta, [0.95, 0.85, 0.95], atol=1e-6)
    half = [float(one_cycle(step, 1001)) for step in (149.65, 649.65)]
    np.testing.assert_allclose(half, [0.90, 0.90], atol=1e-6)


def adamw(weights, grads, lr, *, steps, warmup, decay, clip, cycle):
    """AdamW as torch has it, in float64, with the schedules of the probe."""
    w, m, v = weights.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(grads):
        g = g.astype(np.float64) * min(1.0, clip / np.linalg.norm(g))
        b1, b2 = float(one_cycle(t, steps)) if cycle else 0.9, 0.999
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + 1e-8)
        rate = lr * float(lr_factor(t, steps, warmup))
        w = w - rate * decay * w - rate * step
    return w


@pytest.mark.parametrize("cycle", [False, True])
def test_each_head_is_trained_as_if_it_were_alone(cycle):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 5)).astype(np.float32)
    grads = 10 * rng.normal(size=(6, 2, 5)).astype(np.float32)
    grads[:, 1] *= 3  # only the second head is clipped
    options = dict(steps=8, warmup_steps=3, weight_decay=0.1, clip=40.0, beta1_cycle=cycle)
    tx = depth_head.optimizer((1e-2, 3e-1), **options)
    assert tx is depth_head.optimizer((1e-2, 3e-1), **options), "or the step would be compiled again"
    heads, state = {"w": weights}, tx.init({"w": weights})
    for g in grads:
        updates, state = jax.jit(tx.update)({"w": g}, state, heads)
        heads = jax.tree.map(np.add, heads, updates)
    assert np.linalg.norm(grads[:, 0], axis=-1).max() < 40 < np.linalg.norm(grads[:, 1], axis=-1).max()
    for i, lr in enumerate((1e-2, 3e-1)):
        want = adamw(weights[i], grads[:, i], lr, steps=8, warmup=3, decay=0.1, clip=40.0, cycle=cycle)
        np.testing.assert_allclose(heads["w"][i], want, rtol=2e-5, atol=1e-6)
