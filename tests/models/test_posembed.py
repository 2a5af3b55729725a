"""Position rows at other grids: the three resamplers against torch, their invariants, gradients; sines and cosines."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.models.posembed import resample, sincos

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pos_embed_interp.npz"
METHODS = {"antialias": "off0.0_aa1", "bicubic": "off0.0_aa0", "bicubic_offset": "off0.1_aa0"}
SIZES = [(7, 9), (3, 4), (16, 16), (32, 24), (5, 7)]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as f:
        return dict(f)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("native", [5, 16, 37])
def test_every_grid_equals_torch(golden, native, method):
    rows = golden[f"g{native}/pos"].reshape(native, native, -1)
    for h, w in SIZES:
        got = resample(rows, (h, w), method)
        assert got.shape == (h, w, rows.shape[-1]) and got.dtype == jnp.float32
        # The file holds bare calls of interpolate; the models that use it leave their native grid alone, offset or not.
        want = rows if h == w == native else golden[f"g{native}/{h}x{w}/{METHODS[method]}"].reshape(h, w, -1)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5, err_msg=f"{native} -> {h}x{w}")


def test_the_golden_file_holds_nothing_that_was_not_compared(golden):
    wanted = {f"g{n}/{h}x{w}/{mode}" for n in (5, 16, 37) for h, w in SIZES for mode in METHODS.values()}
    assert golden.keys() - {"g5/pos", "g16/pos", "g37/pos"} == wanted


def test_the_three_are_not_the_same(golden):
    rows = golden["g16/pos"].reshape(16, 16, -1)
    aa, plain, offset = (np.asarray(resample(rows, (7, 9), method)) for method in METHODS)
    assert min(np.abs(aa - plain).max(), np.abs(plain - offset).max(), np.abs(aa - offset).max()) > 0.1


@pytest.mark.parametrize("size", [(7, 9), (3, 4), (16, 11)])
def test_antialias_equals_jax_image_resize(size):
    rows = jax.random.normal(jax.random.key(0), (10, 13, 3))
    want = jax.image.resize(rows, (*size, 3), "bicubic", antialias=True)
    np.testing.assert_allclose(resample(rows, size, "antialias"), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_the_native_grid_is_untouched(self, method):
        rows = jax.random.normal(jax.random.key(1), (3, 5, 2))
        np.testing.assert_array_equal(resample(rows, (3, 5), method), rows)

    def test_a_turned_grid_of_as_many_rows_is_resampled(self, method):
        rows = jax.random.normal(jax.random.key(1), (3, 5, 2))
        got = resample(rows, (5, 3), method)
        assert got.shape == (5, 3, 2)
        assert np.abs(got - np.asarray(rows).reshape(5, 3, 2)).max() > 0.1

    def test_equal_rows_stay_equal(self, method):
        rows = jnp.broadcast_to(jnp.array([1.5, -2.0]), (6, 6, 2))
        for size in ((4, 9), (13, 2), (1, 1)):
            np.testing.assert_allclose(
                resample(rows, size, method), np.broadcast_to([1.5, -2.0], (*size, 2)), atol=1e-6
            )

    def test_height_and_width_are_not_mixed_up(self, method):
        ramp = np.broadcast_to(np.arange(8.0)[:, None, None], (8, 6, 1))
        got = np.asarray(resample(ramp, (5, 12), method))
        assert np.ptp(got, axis=1).max() < 1e-6 and (np.diff(got[:, 0, 0]) > 0).all()

    def test_gradient_is_the_transpose(self, method):
        """The map is linear: <R x, y> = <x, R^T y>, and R^T y is what the gradient must be."""
        rng = np.random.default_rng(2)
        x, y = rng.normal(size=(5, 4, 3)).astype(np.float32), rng.normal(size=(2, 7, 3)).astype(np.float32)
        out, pull = jax.vjp(lambda rows: resample(rows, (2, 7), method), x)
        np.testing.assert_allclose(np.vdot(pull(y)[0], x), np.vdot(out, y), rtol=1e-4)

    def test_an_enlarged_grid_sends_a_gradient_to_every_row(self, method):
        _, pull = jax.vjp(lambda rows: resample(rows, (9, 8), method), jnp.zeros((5, 4, 1)))
        grad = pull(jnp.ones((9, 8, 1)))[0]
        assert (grad > 0.5).all()
        np.testing.assert_allclose(grad.sum(), 72, rtol=1e-5)

    def test_half_precision_rows_are_resampled_in_float32(self, method):
        rows = jax.random.normal(jax.random.key(4), (4, 4, 2), jnp.bfloat16)
        got = resample(rows, (6, 3), method)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, resample(rows.astype(jnp.float32), (6, 3), method))


class TestSincos:
    def test_quarters_are_sin_x_cos_x_sin_y_cos_y(self):
        rows = sincos((2, 3), 8).reshape(2, 3, 8)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows[0, 0], [0, 0, 1, 1, 0, 0, 1, 1])
        # Frequencies of a quarter of two channels: 1 and 1/10000. Row 1, column 2: x = 2, y = 1.
        angles = {"x": (2.0, 2e-4), "y": (1.0, 1e-4)}
        want = [f(a) for axis in "xy" for f in (np.sin, np.cos) for a in angles[axis]]
        np.testing.assert_allclose(rows[1, 2], want, atol=1e-7)

    def test_no_two_positions_are_alike(self):
        rows = sincos((14, 14), 64).astype(np.float64)
        distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1) + 10 * np.eye(196)
        assert distance.min() > 0.5

    def test_the_narrowest_width_works(self):
        assert sincos((2, 2), 4).shape == (4, 4)
