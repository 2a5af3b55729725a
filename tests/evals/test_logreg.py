"""Logistic regression: scikit-learn on the same features, by the same protocol; several classes at once; two."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from threadpoolctl import threadpool_limits

from regvit_jax.evals import convex_fit
from regvit_jax.evals.convex_fit import split
from regvit_jax.evals.logreg import C_GRID, LogReg, logistic_regression
from regvit_jax.evals.metrics import mean_average_precision_11

GRID = (1e-5, 1e-3, 1e-2)
N = 600


@pytest.fixture(scope="module")
def digits():
    """Training and test pixels and labels, 0 to 16, as they come."""
    images, labels = load_digits(return_X_y=True)
    images, order = images.astype(np.float32), np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order].astype(np.int32)
    return images[:N], labels[:N], images[N:], labels[N:]


def reference(x, labels, weight):
    with threadpool_limits(1):  # The threads of several BLAS calls at once wait for each other for minutes.
        return LogisticRegression(C=weight, tol=1e-5, max_iter=1000).fit(x.astype(np.float64), labels)


def test_the_grid_is_the_published_one():
    assert len(C_GRID) == 45 and C_GRID[0] == pytest.approx(1e-6) and C_GRID[-1] == pytest.approx(1e5)
    assert LogReg().C == C_GRID and C_GRID[1] / C_GRID[0] == pytest.approx(10**0.25)


def test_digits_as_by_scikit_learn(digits, mesh):
    """C on the held-out tenth, of equals the smallest, then a fit to all of it: the same C, and the same accuracy
    within 0.3 points."""
    train, labels, test, test_labels = digits
    used, held_out = split(N)
    shares = [reference(train[used], labels[used], c).score(train[held_out], labels[held_out]) for c in GRID]
    best = GRID[int(np.argmax(shares))]
    assert shares[0] < shares[1] == shares[2], "the data must tell candidates apart, and have a tie"
    found = reference(train, labels, best)
    got = logistic_regression(*digits, num_classes=10, C=GRID, mesh=mesh)
    assert got["C"] == best == 1e-3
    assert got["top1"] == pytest.approx(found.score(test, test_labels), abs=0.003) and got["top1"] > 0.9
    want = balanced_accuracy_score(test_labels, found.predict(test))
    assert got["mean_per_class"] == pytest.approx(want, abs=0.003)
    order = np.argsort(-found.decision_function(test), axis=1)[:, :5]
    assert got["top5"] == pytest.approx(np.mean((order == test_labels[:, None]).any(1)), abs=0.003)


def test_where_c_is_chosen(digits, mesh):
    """On validation rows that say the opposite of the training rows, the weakest classifier is the best; on the test
    rows themselves, the best of the grid; a single C is taken as it is."""
    train, labels, test, test_labels = digits
    options = dict(num_classes=10, mesh=mesh)
    alone = {c: logistic_regression(*digits, C=(c,), **options) for c in GRID}
    assert logistic_regression(*digits, C=GRID, choose_on="eval", **options) == max(
        alone.values(), key=lambda found: found["top1"]
    )
    lies = train[500:], (labels[500:] + 1) % 10
    got = logistic_regression(train[:500], labels[:500], test, test_labels, C=GRID, validation=lies, **options)
    assert got["C"] == 1e-5
    both = np.concatenate([labels[:500], lies[1]])
    want = reference(train, both, 1e-5).score(test, test_labels)
    assert got["top1"] == pytest.approx(want, abs=0.003), "the last fit learns from validation rows too"


def test_several_classes_at_once_are_one_against_the_rest_on_eight_devices(digits, mesh8):
    """Three questions to a digit; some of the answers do not count, in training and in testing."""
    train, labels, test, test_labels = digits

    def answers(labels, seed):
        known = np.stack([labels % 2 == 0, labels > 6, labels == 3], axis=1).astype(np.int8)
        return np.where(np.random.default_rng(seed).random(known.shape) < 0.1, -1, known).astype(np.int8)

    taught, asked = answers(labels, 0), answers(test_labels, 1)
    scores = []
    for column in taught.T:
        counts = column >= 0
        scores.append(reference(train[counts], column[counts], 1e-4).decision_function(test))
    want = mean_average_precision_11(np.stack(scores, 1), asked)
    got = logistic_regression(train, taught, test, asked, num_classes=3, C=(1e-4,), mesh=mesh8)
    assert got == {"map11": pytest.approx(want, abs=0.003), "C": 1e-4} and 0.8 < want < 0.99


def test_two_classes_are_penalised_as_one_vector_and_rows_may_come_in_parts(mesh, monkeypatch):
    """150 rows, of which 64 at a time; the odds are those of scikit-learn, which has one weight vector for two."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=150)
    x = (rng.normal(size=(150, 3)) + labels[:, None] * [1.0, -0.5, 0] + 5).astype(np.float32)
    monkeypatch.setattr(convex_fit, "_MOST_LOGITS", 100)
    monkeypatch.setattr(convex_fit, "_BLOCK", 64)
    heads = []
    fit = convex_fit.fit

    def spy(*args):
        assert args[0].shape == (192, 3)
        heads.append(fit(*args)[0])
        return heads[-1], 0, 0

    monkeypatch.setattr("regvit_jax.evals.logreg.fit", spy)
    got = logistic_regression(x, labels, x, labels, num_classes=2, C=(0.05,), mesh=mesh)
    found = reference(x, labels, 0.05)
    kernel = np.asarray(heads[-1]["kernel"])
    np.testing.assert_allclose(kernel[:, 1] - kernel[:, 0], found.coef_[0], atol=1e-3)
    assert got["top1"] == found.score(x, labels)


def test_evaluator_takes_whole_images_and_validation_data(model, mesh, make_npz, tmp_path):
    path = make_npz("colours.npz", train=[0, 1, 2, 3] * 10, val=[0, 1, 2, 3] * 3, test=[0, 1, 2, 3] * 3)
    options = dict(data=f"npz:{path}", eval_data=f"npz:{path}#test", val_data=f"npz:{path}#val", batch_size=8)
    probe = LogReg(**options, C=(0.1, 10.0), feature="mean_patch")
    got = probe.run(model, mesh=mesh, out_dir=tmp_path)
    assert got == {"top1": 1.0, "mean_per_class": 1.0, "C": got["C"]} and got["C"] in (0.1, 10.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(C=()), "C must be one or more positive"),
        (dict(C=(0.0,)), "C must be one or more positive"),
        (dict(choose_on="test"), "choose_on must be one of held_out, eval"),
        (dict(choose_on="eval", val_data="npz:a"), "val_data must be empty"),
        (dict(crop_ratio=1.5), "crop_ratio must be"),
        (dict(max_iter=0), "max_iter must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        LogReg(**options)


def test_bad_arguments_are_refused(digits, mesh):
    with pytest.raises(ValueError, match="metric='map11'"):
        logistic_regression(*digits, num_classes=10, metric="map11", mesh=mesh)
    with pytest.raises(ValueError, match="choose_on is one of"):
        logistic_regression(*digits, num_classes=10, choose_on="train", mesh=mesh)
