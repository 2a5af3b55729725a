"""Linear probe: the optimum that scikit-learn finds, what the penalty does, hopeless and trivial features."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from regvit_jax import sharding
from regvit_jax.evals import convex_fit
from regvit_jax.evals.linear import Linear, linear_accuracy

# One shape for all tests: the optimiser is compiled once a shape, and that is most of their time.
N, D, C = 203, 12, 6
LABELS = np.random.default_rng(0).integers(C, size=N)


def clusters(spread, seed=0):
    """(N, D) correlated Gaussian clusters far from the origin, features of very different size."""
    rng = np.random.default_rng(7)
    centres, mix = rng.normal(size=(C, D)), rng.normal(size=(D, D)) * np.logspace(0, -2, D)[:, None]
    noise = np.random.default_rng(seed).normal(size=(N, D))
    return ((centres[LABELS] + spread * noise) @ mix + 3.0).astype(np.float32)


def standard(features, like=None):
    like = features if like is None else like
    return (features - like.mean(0)) / like.std(0)


def solved(x, labels, l2, mesh, used=None):
    """The head that `fit` finds on standardised features, on the host; and the number of steps."""
    layout = dict(num_classes=C, mesh=mesh)
    with jax.set_mesh(mesh):
        rows = convex_fit.prepare(x, labels, convex_fit.standard_of(x, scale=True), **layout)
        used = convex_fit.place_mask(np.ones(N, bool) if used is None else used, **layout)
        start = sharding.replicate(convex_fit.zero_head(D, C), mesh)
        head, steps, _ = convex_fit.fit(*rows, used, l2, start, 200)
    return jax.tree.map(np.asarray, head), int(steps)


def reference(x, labels, l2):
    """scikit-learn's objective is C * (sum of losses) + |W|^2 / 2: ours times 1 / l2, with C = 1 / (l2 * N)."""
    return LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000).fit(x.astype(np.float64), labels)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_optimum_is_that_of_scikit_learn(l2, mesh):
    x = standard(clusters(spread=1.5))
    want = reference(x, LABELS, l2)
    head, steps = solved(x, LABELS, l2, mesh)
    assert steps < 60
    logits = x @ head["kernel"] + head["bias"]
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(probabilities / probabilities.sum(1, keepdims=True), want.predict_proba(x), atol=2e-3)
    # At the optimum the kernel of the penalised problem has mean 0 over classes in both.
    np.testing.assert_allclose(head["kernel"], want.coef_.T, atol=2e-2)


def test_rows_of_weight_zero_do_not_count(mesh):
    x = standard(clusters(spread=1.5))
    used = np.arange(N) % 3 > 0
    lied = np.where(used, LABELS, (LABELS + 1) % C)
    head, _ = solved(x, lied, 1e-2, mesh, used)
    want = reference(x[used], LABELS[used], 1e-2)
    np.testing.assert_allclose(head["kernel"], want.coef_.T, atol=2e-2)


def test_separable_data_is_separated(mesh):
    train, test = clusters(spread=0.02), clusters(spread=0.02, seed=1)
    got = linear_accuracy(train, LABELS, test, LABELS, num_classes=C, l2=(1.0, 1e-2, 1e-4), mesh=mesh)
    assert got["top1"] == got["top5"] == 1.0 and got["l2"] in (1.0, 1e-2, 1e-4)


def test_one_compilation_for_all_penalties_and_the_same_numbers_on_any_mesh(mesh, mesh8):
    train, test = clusters(spread=1.0), clusters(spread=1.0, seed=1)
    problem = train, LABELS, test, LABELS
    options = dict(num_classes=C, l2=(1.0, 1e-1, 1e-2))
    one = linear_accuracy(*problem, mesh=mesh, **options)
    before = convex_fit.fit._cache_size()
    eight = linear_accuracy(*problem, mesh=mesh8, **options)
    assert convex_fit.fit._cache_size() == before + 1
    assert eight == one and 0.4 < one["top1"] < 0.95
    want = reference(standard(train), LABELS, one["l2"]).score(standard(test, like=train), LABELS)
    assert one["top1"] == pytest.approx(want, abs=0.006), "one of the 203 may go either way"


@pytest.mark.parametrize("signal", [0.0, 3.0])
def test_the_penalty_is_the_best_on_a_tenth_that_is_held_out(signal, mesh):
    """Eleven features are noise; the first may say all. The tenth is 20 samples: ties in top-1 go to the lower loss."""
    features = np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)
    features[:, 0] += signal * LABELS
    used, held_out = convex_fit.split(N)
    assert held_out.sum() == 20 and (used ^ held_out).all()
    x, judged = standard(features), {}
    for l2 in (1.0, 1e-1, 1e-2, 1e-4):
        probe = reference(x[used], LABELS[used], l2)
        judged[l2] = (
            probe.score(x[held_out], LABELS[held_out]),
            -log_loss(LABELS[held_out], probe.predict_proba(x[held_out])),
        )
    got = linear_accuracy(features, LABELS, features, LABELS, num_classes=C, l2=tuple(judged), mesh=mesh)
    assert got["l2"] == max(judged, key=judged.get) == {0.0: 0.1, 3.0: 1e-4}[signal]


def test_features_that_say_nothing_still_give_a_number(mesh):
    """Constant features, as of a collapsed network: the bias alone is left, and the most frequent class."""
    same, labels = np.full((N, D), 0.3, np.float32), np.array([1] * 153 + [0] * 50)
    got = linear_accuracy(same, labels, same, labels, num_classes=C, l2=(1.0, 1e-3), mesh=mesh)
    assert got["top1"] == 153 / 203


def test_evaluator_learns_colours(model, mesh, make_npz, make_folder, tmp_path):
    path = make_npz("colours.npz", train=[0, 1, 2, 3] * 10, test=[0, 1, 2, 3] * 3)
    probe = Linear(data=f"npz:{path}", eval_data=f"npz:{path}#test", batch_size=12, l2=(0.1, 0.01))
    got = probe.run(model, mesh=mesh, out_dir=tmp_path)
    assert got["top1"] == 1.0 and set(got) == {"top1", "l2"}
    assert got == probe.run(model, mesh=mesh, out_dir=tmp_path)
    photos = make_folder("photos", "a.png")
    with pytest.raises(ValueError, match="photos.*no labels"):
        Linear(data=f"folder:{photos}", eval_data=f"npz:{path}").run(model, mesh=mesh, out_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(l2=(0.0,)), "l2 must be one or more positive"),
        (dict(l2=()), "l2 must be one or more positive"),
        (dict(features=()), "features must be"),
        (dict(features="cls"), "features takes a tuple"),
        (dict(max_iter=0), "max_iter must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Linear(**options)
