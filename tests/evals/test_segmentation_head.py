"""The head of the segmentation probe, its loss and its metrics: by hand, against NumPy and scikit-learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.metrics import confusion_matrix, jaccard_score

from regvit_jax.evals.dense import STATISTICS, token_matrix
from regvit_jax.evals.segmentation_head import (
    SegmentationLoss,
    cross_entropy,
    init_head,
    lr_factor,
    optimizer,
    token_logits,
    train_logits,
)
from regvit_jax.evals.segmentation_metrics import class_scores, confusion, summary

pytestmark = pytest.mark.usefixtures("quick_to_compile")

IGNORE = 255


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def head_of(rng, channels, classes):
    head = {}
    head["bn"] = {"scale": rng.normal(size=channels), "bias": rng.normal(size=channels)}
    head["conv"] = {"kernel": rng.normal(size=(channels, classes)), "bias": rng.normal(size=classes)}
    head[STATISTICS] = {"mean": rng.normal(size=channels), "var": rng.uniform(0.5, 2, channels)}
    return jax.tree.map(np.float32, head)


def test_it_starts_as_published():
    head = jax.tree.map(np.asarray, jax.jit(init_head, static_argnums=(1, 2))(jax.random.key(0), 400, 50))
    assert np.std(head["conv"]["kernel"]) == pytest.approx(0.01, rel=0.02) and not head["conv"]["bias"].any()
    assert (head["bn"]["scale"] == 1).all() and not head["bn"]["bias"].any()
    assert not head[STATISTICS]["mean"].any() and (head[STATISTICS]["var"] == 1).all()


def test_batch_normalisation_by_hand(rng):
    """Batch statistics in training, with a tenth of them (the variance unbiased) in the running ones; these later."""
    x = (3 * rng.normal(size=(2, 3, 4, 5)) + 7).astype(np.float32)
    head = head_of(rng, 5, 6)
    bn, conv, old = head["bn"], head["conv"], head[STATISTICS]
    flat = x.reshape(24, 5).astype(np.float64)

    def logits(mean, var):
        normal = (x - mean) / np.sqrt(var + 1e-5) * bn["scale"] + bn["bias"]
        return normal @ conv["kernel"] + conv["bias"]

    got, after = jax.jit(train_logits)(head, x)
    np.testing.assert_allclose(got, logits(flat.mean(0), flat.var(0)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after[STATISTICS]["mean"], 0.9 * old["mean"] + 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(after[STATISTICS]["var"], 0.9 * old["var"] + 0.1 * flat.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(token_logits)(after, x), logits(**after[STATISTICS]), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(after["conv"]["kernel"], conv["kernel"])


@pytest.mark.parametrize("chunk", [2**25, 2 * 7 * 9 * 3 * 2, 1])
def test_cross_entropy_in_groups_of_rows_is_that_of_all_pixels(chunk, rng):
    """Value and gradient: all pixels at once, 3 of 10 rows at a time (so that the last group is not full), one row."""
    tokens = rng.normal(size=(2, 3, 2, 9)).astype(np.float32)
    mask = rng.integers(0, 9, (2, 10, 7)).astype(np.uint8)
    mask[0, 2:4], mask[1, :, 0] = IGNORE, IGNORE
    rows, columns = token_matrix(10, 4, "stretch"), token_matrix(7, 4, "crop")

    pixels = np.einsum("ih,bhwc,jw->bijc", rows, tokens, columns, dtype=np.float64)
    known = mask != IGNORE
    losses = logsumexp(pixels, axis=-1) - np.take_along_axis(pixels, np.where(known, mask, 0)[..., None], -1)[..., 0]
    expected = (losses * known).sum(axis=(1, 2))
    wrong = np.exp(pixels - logsumexp(pixels, axis=-1, keepdims=True)) - np.eye(9)[np.where(known, mask, 0)]
    slope = np.einsum("ih,bijc,jw->bhwc", rows, wrong * known[..., None], columns)

    value, grad = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, mask, rows, columns, chunk).sum()))(tokens)
    assert value == pytest.approx(expected.sum(), rel=1e-5)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-4)
    if chunk == 1:
        one = jax.jit(lambda x: cross_entropy(x, mask, rows, columns, chunk))(tokens)
        np.testing.assert_allclose(one, expected, rtol=1e-5)


def test_the_loss_is_a_mean_over_all_pixels_or_over_the_known_ones(rng):
    features = rng.normal(size=(2, 2, 2, 5)).astype(np.float32)
    mask = rng.integers(0, 6, (2, 8, 8)).astype(np.uint8)
    mask[:, 4:] = IGNORE
    head = head_of(rng, 5, 6)
    loss = SegmentationLoss(patch=4, padding="stretch", mean="all")
    over_known = jax.jit(dataclasses.replace(loss, mean="known"))
    published, after = jax.jit(loss)(head, features, {"mask": mask}, 0)
    known, _ = over_known(head, features, {"mask": mask}, 0)
    assert float(known) == pytest.approx(2 * float(published))
    assert set(after) == set(head)
    nothing, _ = over_known(head, features, {"mask": np.full_like(mask, IGNORE)}, 0)
    assert float(nothing) == 0
    assert hash(loss) == hash(dataclasses.replace(loss)), "equal losses are one compilation"


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 1e-6),
        (750, (1 - 750 / 40_000) * (0.5 + 0.5e-6)),
        (1500, 38_500 / 40_000),
        (20_000, 0.5),
        (39_999, 1 / 40_000),
    ],
)
def test_the_schedule_of_the_published_probe(step, share):
    assert float(lr_factor(step, 40_000, 1500)) == pytest.approx(share, rel=1e-3)


def test_the_optimiser_is_adamw_and_found_again():
    options = dict(lr=0.1, betas=(0.9, 0.999), weight_decay=0.01, steps=10, warmup_steps=0)
    tx = optimizer(**options)
    assert tx is optimizer(**options) and tx is not optimizer(**options | {"lr": 0.2})
    kernel = {"kernel": jnp.array([2.0, -3.0])}
    updates, state = tx.update({"kernel": jnp.array([5.0, 1e-3])}, tx.init(kernel), kernel)
    # The first step of Adam is the sign of the gradient; decay is decoupled from it.
    np.testing.assert_allclose(updates["kernel"], [-0.1 * (1 + 0.02), -0.1 * (1 - 0.03)], rtol=1e-4)
    assert float(lr_factor(5, 10, 0)) == 0.5


# Metrics


def test_the_confusion_matrix_is_that_of_scikit_learn(rng):
    truth, predicted = rng.integers(0, 5, (2, 30, 20)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = IGNORE
    known = truth != IGNORE
    got = confusion(truth, predicted, 6)
    np.testing.assert_array_equal(got, confusion_matrix(truth[known], predicted[known], labels=range(6)))
    iou = jaccard_score(truth[known], predicted[known], labels=range(5), average=None)
    np.testing.assert_allclose(class_scores(got)["iou"][:5], iou)
    assert summary(got)["miou"] == pytest.approx(iou.mean()), "class 5 is nowhere: left out"
    assert summary(got)["aacc"] == pytest.approx((truth == predicted)[known].mean())


def test_absent_classes_by_hand():
    """Class 0: 2 right, 1 taken for class 2. Class 1: 1 right. Class 2 is only predicted, class 3 is nowhere."""
    truth, predicted = np.array([0, 0, 0, 1, IGNORE]), np.array([0, 0, 2, 1, 3])
    counts = confusion(truth, predicted, 4)
    scores = class_scores(counts)
    np.testing.assert_allclose(scores["iou"], [2 / 3, 1, 0, np.nan])
    np.testing.assert_allclose(scores["acc"], [2 / 3, 1, np.nan, np.nan])
    assert summary(counts) == pytest.approx({"miou": 5 / 9, "macc": 5 / 6, "aacc": 3 / 4})


def test_nothing_but_ignored_pixels_is_no_score():
    counts = confusion(np.full((3, 3), IGNORE), np.zeros((3, 3), int), 4)
    assert counts.shape == (4, 4) and not counts.any()
    with pytest.raises(ValueError, match="every pixel of the masks is 255"):
        summary(counts)
