"""Local probes: neighbours by hand, least squares against NumPy's, a probe that always names one place, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.data.sources import open_source
from regvit_jax.evals import local_measures
from regvit_jax.evals.local_measures import collect, fit_probes, measure, neighbour_cosine
from regvit_jax.evals.local_probes import LocalProbes

LABELS = [0, 1, 2, 3, 0, 1, 2]
RIDGE = 1e-6


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seven images of patches with colours, gradients and noise of their own."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(7):
        small = Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8))
        small.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def truth(model, source):
    """(tokens (7*16, D), normalised patches (7*16, 192), norms after block 0 (7, 4, 4)), float64, without the code
    under test."""
    samples = open_source(source)
    images = model.preprocess([samples[i]["image"] for i in range(len(samples))])
    tokens, found = model(jnp.asarray(images), capture=("block0",))
    cells = [
        image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].reshape(-1) for image in images for y in range(4) for x in range(4)
    ]
    norms = np.linalg.norm(found["block0"][:, model.config.prefix :], axis=-1).reshape(-1, 4, 4)
    return np.asarray(tokens.patches, np.float64).reshape(112, -1), np.array(cells, np.float64), norms


@pytest.fixture(scope="module")
def collected(model, mesh8, source):
    """On eight devices, one image each and a row of padding: sums are over all."""
    return collect(model, open_source(source), batch_size=8, mesh=mesh8)


def test_neighbours_are_above_below_left_and_right():
    # Unit vectors at these angles, in degrees; the lengths do not matter.
    angles = np.radians([[0.0, 60.0, 0.0], [90.0, 0.0, 180.0]])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * np.array([[1.0, 5.0, 2.0], [0.1, 3.0, 1.0]])[..., None]
    # Corners have two neighbours, the others three.
    expected = [[(0.5 + 0.0) / 2, 1.5 / 3, (0.5 - 1.0) / 2], [0.0, (0.0 + 0.5 - 1.0) / 3, (-1.0 - 1.0) / 2]]
    np.testing.assert_allclose(neighbour_cosine(jnp.asarray(x)[None])[0], expected, atol=1e-6)
    assert neighbour_cosine(jnp.ones((1, 1, 1, 3)))[0, 0, 0] == 0


def test_moments_are_those_of_all_patches(collected, truth):
    tokens, moments, index = collected
    x, y, _ = truth
    np.testing.assert_array_equal(index, np.arange(7))
    np.testing.assert_allclose(tokens.reshape(112, -1), x, atol=1e-5)
    assert moments.n == 112
    np.testing.assert_allclose(moments.mean_x, x.mean(0), atol=1e-5)
    np.testing.assert_allclose(moments.mean_y, y.mean(0), atol=1e-5)
    np.testing.assert_allclose(moments.cov_xx, np.cov(x.T, bias=True), atol=1e-5)
    np.testing.assert_allclose(moments.cov_xy, (x - x.mean(0)).T @ (y - y.mean(0)) / 112, atol=1e-5)


def test_the_pixel_probe_is_least_squares(model, mesh, source, collected, truth, monkeypatch):
    tokens, moments, _ = collected
    # A position probe that always says the sixth place, the cell in row 1 and column 1.
    sixth = {"kernel": np.zeros((32, 16), np.float32), "bias": np.eye(16, dtype=np.float32)[5]}
    monkeypatch.setattr(local_measures, "fit", lambda *problem: (sixth, 7, 0.0))
    probes, steps = fit_probes(tokens, moments, l2=1e-3, ridge=RIDGE, max_iter=30, mesh=mesh)
    assert steps == 7
    x, y, norms = truth
    got, index = measure(model, probes, open_source(source), 0, batch_size=4, mesh=mesh)
    np.testing.assert_array_equal(index, np.arange(7))
    # The penalty as rows of its own: each says that a weight is zero.
    z, target = (x - x.mean(0)) / x.std(0), y - y.mean(0)
    design = np.concatenate([z, np.sqrt(112 * RIDGE) * np.eye(32)])
    weights = np.linalg.lstsq(design, np.concatenate([target, np.zeros((32, 192))]), rcond=None)[0]
    np.testing.assert_allclose(got["error"].reshape(-1), np.linalg.norm(target - z @ weights, axis=1), rtol=2e-3)
    # And hardly a penalty: leaving out the one direction that the final norm takes away, it is the plain solution.
    plain = np.linalg.lstsq(z, target, rcond=1e-4)[0]
    assert got["error"].mean() == pytest.approx(np.linalg.norm(target - z @ plain, axis=1).mean(), rel=1e-3)
    np.testing.assert_allclose(got["plain"].reshape(-1), np.linalg.norm(y - y.mean(0), axis=1), rtol=1e-4)
    np.testing.assert_allclose(got["norm"], norms, rtol=1e-4)
    assert got["cosine"].shape == (7, 4, 4) and np.abs(got["cosine"]).max() <= 1 + 1e-5
    assert got["right"].sum(axis=0).tolist() == [[0, 0, 0, 0], [0, 7, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    distances = [[np.hypot(row - 1, column - 1) for column in range(4)] for row in range(4)]
    np.testing.assert_allclose(got["distance"][3], distances, rtol=1e-6)


def test_refusals():
    for bad in ({"n": 0}, {"n_eval": -1}, {"l2": 0.0}, {"ridge": 0.0}, {"max_iter": 0}, {"rule": "absolute"}):
        name = "value" if "rule" in bad else next(iter(bad))
        with pytest.raises(ValueError, match=f"LocalProbes: {name} must be"):
            LocalProbes(**bad)
