"""Augmentation on the accelerator: every rule worked out by hand on tiny images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from regvit_jax.data.augment import flip, mixup_cutmix, normalize, random_crop, symmetric_beta

mix = jax.jit(
    mixup_cutmix,
    static_argnames=("num_classes", "mixup_alpha", "cutmix_alpha", "switch_prob", "prob", "smoothing", "groups"),
)


def constant_images(values, size=8):
    """(B, size, size, 3) float32, image b all values[b]."""
    return jnp.broadcast_to(jnp.array(values, jnp.float32)[:, None, None, None], (len(values), size, size, 3))


def test_normalize_by_hand():
    images = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(normalize(images, (0.5, 0.2, 0.0), (0.5, 1.0, 2.0)).ravel(), [-1.0, 0.0, 0.5], atol=1e-6)


def test_flip_mirrors_about_half_of_the_images():
    images = jnp.broadcast_to(jnp.arange(5.0)[None, None, :, None], (200, 2, 5, 3))
    flipped = np.asarray(jax.jit(flip)(jax.random.key(0), images))
    is_mirrored = (flipped == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
    is_same = (flipped == np.asarray(images)).all((1, 2, 3))
    assert (is_mirrored ^ is_same).all()
    # 200 fair coins: 5 standard deviations.
    assert abs(is_mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(200)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_random_crop_is_a_window_of_the_padded_image(mode):
    images = np.random.default_rng(0).random((64, 5, 6, 3), np.float32)
    cropped = np.asarray(jax.jit(random_crop, static_argnums=(2, 3))(jax.random.key(0), images, 2, mode))
    widths = ((0, 0), (2, 2), (2, 2), (0, 0))
    padded = np.pad(images, widths, mode="reflect" if mode == "reflect" else "constant")
    shifts = set()
    for b in range(64):
        found = [(y, x) for y in range(5) for x in range(5) if (padded[b, y : y + 5, x : x + 6] == cropped[b]).all()]
        assert len(found) == 1
        shifts.add(found[0])
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(5))


def test_random_crop_edges():
    images = jnp.ones((2, 4, 4, 3), jnp.uint8)
    assert random_crop(jax.random.key(0), images, 0) is images
    assert random_crop(jax.random.key(0), images, 9).dtype == jnp.uint8
    with pytest.raises(ValueError, match="smaller than both"):
        random_crop(jax.random.key(0), images, 4, "reflect")
    with pytest.raises(ValueError, match="'zeros' or 'reflect'"):
        random_crop(jax.random.key(0), images, 1, "edge")


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8, 1.0, 3.0])
def test_lambda_has_the_beta_distribution(alpha):
    samples = np.asarray(symmetric_beta(jax.random.key(0), jnp.full(5000, alpha)))
    assert np.isfinite(samples).all() and samples.min() >= 0 and samples.max() <= 1
    for x in (0.001, 0.1, 0.3, 0.5, 0.8, 0.99):
        below = scipy.stats.beta(alpha, alpha).cdf(x)
        assert abs((samples <= x).mean() - below) < 5 * np.sqrt(below * (1 - below) / 5000) + 1e-3


def test_mixup_blends_images_and_targets_alike():
    images, targets = mix(
        jax.random.key(0),
        constant_images([0.0, 1.0, 2.0, 3.0]),
        jnp.array([0, 1, 2, 3]),
        num_classes=4,
        mixup_alpha=0.8,
        cutmix_alpha=0.0,
    )
    lam = float(targets[0, 0])
    assert 0.0 < lam < 1.0
    # The partner of 0, 1, 2, 3 is 3, 2, 1, 0, and λ is the same for all.
    expected = lam * np.arange(4.0) + (1 - lam) * np.arange(4.0)[::-1]
    np.testing.assert_allclose(images, np.broadcast_to(expected[:, None, None, None], images.shape), atol=1e-6)
    np.testing.assert_allclose(targets, lam * np.eye(4) + (1 - lam) * np.eye(4)[::-1], atol=1e-6)


def test_cutmix_pastes_one_box_and_takes_lambda_from_its_area():
    sides = set()
    for seed in range(40):
        images, targets = mix(
            jax.random.key(seed),
            constant_images([0.0, 1.0, 2.0, 3.0]),
            jnp.array([0, 1, 2, 3]),
            num_classes=4,
            mixup_alpha=0.0,
            cutmix_alpha=1.0,
        )
        images = np.asarray(images)
        pasted = images[0, :, :, 0] == 3.0
        assert set(np.unique(images[0])) <= {0.0, 3.0} and (images[0] == images[0, :, :, :1]).all()
        for image, own, partner in zip(images, (0.0, 1.0, 2.0, 3.0), (3.0, 2.0, 1.0, 0.0), strict=True):
            np.testing.assert_array_equal(image[:, :, 0], np.where(pasted, partner, own))
        rows, columns = pasted.any(1), pasted.any(0)
        np.testing.assert_array_equal(pasted, rows[:, None] & columns[None, :])
        for line in (rows, columns):
            # One run without gaps, of 2 * floor(cut / 2) pixels unless the border clips it.
            inside = np.flatnonzero(line)
            assert len(inside) == 0 or np.ptp(inside) + 1 == len(inside)
            if len(inside) and inside[0] > 0 and inside[-1] < 7:
                assert len(inside) % 2 == 0
                sides.add(len(inside))
        np.testing.assert_allclose(targets[0], [1 - pasted.mean(), 0, 0, pasted.mean()], atol=1e-6)
    assert len(sides) > 1


def test_smoothing_spreads_over_all_classes():
    _, targets = mix(
        jax.random.key(0),
        constant_images([0.0, 1.0]),
        jnp.array([2, 2]),
        num_classes=4,
        mixup_alpha=1.0,
        cutmix_alpha=1.0,
        smoothing=0.1,
    )
    # Both have the same class, so λ cancels: on = 1 - 0.1 + 0.1 / 4, off = 0.1 / 4.
    np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025]] * 2, atol=1e-6)


def test_each_group_draws_its_own_and_stays_inside_itself():
    groups, per_group = 32, 2
    n = groups * per_group
    labels = jnp.arange(n)
    images, targets = mix(
        jax.random.key(0),
        constant_images(np.arange(n)),
        labels,
        num_classes=n,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        groups=groups,
    )
    own, partner = np.diag(targets), np.diag(np.asarray(targets)[:, np.arange(n) ^ 1])
    np.testing.assert_allclose(own + partner, 1.0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(targets).sum(1), 1.0, atol=1e-6)
    np.testing.assert_allclose(own[::2], own[1::2], atol=1e-6)
    assert len(np.unique(own[::2].round(4))) > groups // 2
    # A box shows the partner's colour unblended; both methods occur, each in about half of the groups.
    cut = np.array([set(np.unique(image)) <= {i, i ^ 1} for i, image in enumerate(np.asarray(images))])[::2]
    assert 6 < cut.sum() < 26


def test_groups_are_drawn_at_global_shape():
    """A group's draw depends on the key and its number, not on how many images it has."""
    common = {"num_classes": 8, "mixup_alpha": 0.8, "cutmix_alpha": 0.0, "groups": 4}
    _, few = mix(jax.random.key(3), constant_images(np.arange(8)), jnp.arange(8), **common)
    _, many = mix(jax.random.key(3), constant_images(np.arange(16) % 8), jnp.arange(16) % 8, **common)
    # λ is the weight of the own class: that of the first image of each group.
    first_few, first_many = np.arange(0, 8, 2), np.arange(0, 16, 4)
    np.testing.assert_allclose(few[first_few, first_few], many[first_many, first_many % 8], atol=1e-6)


def test_probability_zero_and_alpha_zero_change_nothing():
    images, labels = constant_images([0.0, 1.0]), jnp.array([0, 1])
    for off in ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.0}):
        same, targets = mixup_cutmix(jax.random.key(0), images, labels, num_classes=2, **off)
        np.testing.assert_array_equal(same, images)
        np.testing.assert_array_equal(targets, np.eye(2))


def test_a_group_that_is_not_mixed_keeps_its_images_exactly():
    images = jax.random.normal(jax.random.key(1), (32, 4, 4, 3))
    mixed, targets = mix(
        jax.random.key(0),
        images,
        jnp.arange(32),
        num_classes=32,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        prob=0.5,
        groups=16,
    )
    untouched = np.diag(targets) == 1.0
    assert 6 < untouched.sum() < 26
    np.testing.assert_array_equal(np.asarray(mixed)[untouched], np.asarray(images)[untouched])


def test_half_precision_stays_half_precision():
    images, targets = mixup_cutmix(
        jax.random.key(0),
        constant_images([0.0, 1.0]).astype(jnp.bfloat16),
        jnp.array([0, -1]),
        num_classes=2,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
    )
    assert images.dtype == jnp.bfloat16 and targets.dtype == jnp.float32
    # The unlabelled image adds no class.
    np.testing.assert_allclose(targets.sum(), 1.0, atol=1e-6)


def test_groups_must_divide_the_batch():
    with pytest.raises(ValueError, match="4 images does not divide into 3 groups"):
        mixup_cutmix(
            jax.random.key(0),
            constant_images(range(4)),
            jnp.arange(4),
            num_classes=4,
            mixup_alpha=1.0,
            cutmix_alpha=0.0,
            groups=3,
        )
