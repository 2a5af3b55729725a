"""Depth metrics: by hand, against NumPy in float64, masks, images in which nothing can be measured."""

import numpy as np
import pytest

from regvit_jax.evals.depth_metrics import METRICS, averaged, crop_mask, depth_errors, valid_mask


def reference(depth, target):
    """The metrics of pixels (n,) of one image, written from the definitions of Eigen et al. 2014."""
    depth, target = depth.astype(np.float64), target.astype(np.float64)
    worse, error = np.maximum(depth / target, target / depth), np.log(depth) - np.log(target)
    return {
        "a1": np.mean(worse < 1.25),
        "a2": np.mean(worse < 1.5625),
        "a3": np.mean(worse < 1.953125),
        "abs_rel": np.mean(np.abs(depth - target) / target),
        "sq_rel": np.mean((depth - target) ** 2 / target),
        "rmse": np.sqrt(np.mean((depth - target) ** 2)),
        "rmse_log": np.sqrt(np.mean(error**2)),
        "silog": 100 * np.sqrt(np.mean(error**2) - np.mean(error) ** 2),
        "log10": np.mean(np.abs(np.log10(depth) - np.log10(target))),
    }


def test_two_pixels_by_hand():
    """Depth 2 for 1, and 4 for 4."""
    errors = depth_errors(np.array([[[2.0, 4.0]]]), np.array([[[1.0, 4.0]]]), np.ones((1, 1, 2), bool))
    half_ln2 = np.log(2) / 2
    want = dict(rmse=0.5**0.5, abs_rel=0.5, sq_rel=0.5, a1=0.5, a2=0.5, a3=0.5, log10=np.log10(2) / 2)
    want |= dict(rmse_log=np.sqrt(2) * half_ln2, silog=100 * half_ln2, images=1.0)
    assert set(want) == {*METRICS, "images"}
    for name, value in want.items():
        np.testing.assert_allclose(errors[name], [value], rtol=1e-6, err_msg=name)


def test_every_metric_is_that_of_numpy_on_the_valid_pixels_of_each_image():
    rng = np.random.default_rng(0)
    target = rng.uniform(0.0, 12.0, (4, 9, 7)).astype(np.float32)
    depth = np.clip(target * rng.lognormal(0, 0.3, target.shape), 0.001, 10).astype(np.float32)
    valid = np.asarray(valid_mask(target, 0.5, 10.0))
    np.testing.assert_array_equal(valid, (target > 0.5) & (target < 10))
    errors = depth_errors(depth, np.where(valid, target, np.nan), valid)
    for i in range(4):
        for name, value in reference(depth[i][valid[i]], target[i][valid[i]]).items():
            np.testing.assert_allclose(errors[name][i], value, rtol=2e-5, err_msg=name)
    # The RMSE is a mean over images, not the root of the mean over all pixels.
    rmse = [reference(depth[i][valid[i]], target[i][valid[i]])["rmse"] for i in range(4)]
    assert averaged(errors)["rmse"] == pytest.approx(np.mean(rmse), rel=1e-5)
    assert averaged(errors)["rmse"] < reference(depth[valid], target[valid])["rmse"] - 1e-3


def test_a_common_factor_is_no_silog():
    """In float32 the difference of mean squares would leave noise of about .1 here."""
    target = np.random.default_rng(0).uniform(1, 9, (1, 50, 50)).astype(np.float32)
    errors = depth_errors(7.0 * target, target, np.ones(target.shape, bool))
    assert errors["silog"][0] < 1e-3 and errors["rmse_log"][0] == pytest.approx(np.log(7), rel=1e-5)


def test_the_ends_of_the_range_do_not_count():
    target = np.array([[[0.5, 0.50001, 9.9999, 10.0, 0.0, np.nan, np.inf]]], np.float32)
    np.testing.assert_array_equal(valid_mask(target, 0.5, 10.0)[0, 0], [False, True, True, False, False, False, False])


def test_an_image_without_a_valid_pixel_is_left_out():
    target = np.full((3, 2, 2), 2.0, np.float32)
    target[1] = 0
    depth = np.full((3, 2, 2), 3.0, np.float32)
    depth[2] = 5.0
    errors = depth_errors(depth, target, valid_mask(target, 0.001, 10.0))
    np.testing.assert_array_equal(errors["images"], [1, 0, 1])
    assert all(np.isfinite(values).all() for values in errors.values())
    assert averaged(errors)["rmse"] == 2.0 and averaged(errors)["abs_rel"] == 1.0
    with pytest.raises(ValueError, match="no image has a pixel of known depth"):
        averaged({name: np.asarray(values)[1:2] for name, values in errors.items()})


def test_crops():
    assert crop_mask("none", 3, 4).all()
    eigen = crop_mask("eigen", 480, 640)
    rows, columns = np.flatnonzero(eigen.any(1)), np.flatnonzero(eigen.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (45, 470, 41, 600) and eigen.sum() == 426 * 560
    # Garg et al. 2016 give the box of their frames of 375 x 1242 in whole pixels: rows 153 to 370, columns 44 to 1196.
    garg = crop_mask("garg", 375, 1242)
    rows, columns = np.flatnonzero(garg.any(1)), np.flatnonzero(garg.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (153, 370, 44, 1196)
    with pytest.raises(ValueError, match="480 x 640.*these have 64 x 64"):
        crop_mask("eigen", 64, 64)
    with pytest.raises(ValueError, match="none, eigen, garg, not 'nyu'"):
        crop_mask("nyu", 480, 640)


def test_only_the_crop_counts():
    target = np.full((1, 375, 1242), 2.0, np.float32)
    np.testing.assert_array_equal(valid_mask(target, 0.001, 80.0, "garg")[0], crop_mask("garg", 375, 1242))
