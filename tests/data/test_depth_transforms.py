"""Depth transforms: image and depth stay together, nothing is blended, colours as published, and what is refused."""

import pickle

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data.depth_transforms import DepthEvalTransform, DepthSize, DepthTrainTransform, recolored, rotated

STILL = dict(rotate_prob=0.0, flip=0.0, color_prob=0.0)


def paired(height, width):
    """A sample whose depth is a function of the red and green values of its pixels: 1 + 256 * red + green."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows % 256, columns % 256, np.zeros_like(rows)], -1).astype(np.uint8)
    return {"image": image, "depth": depth_of(image), "label": 3}


def depth_of(image):
    return (1 + 256.0 * image[..., 0] + image[..., 1]).astype(np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_crop_and_mirror_move_both():
    t, seen = DepthTrainTransform((12, 20), rotate_prob=0.0, color_prob=0.0), set()
    for seed in range(20):
        got = t(paired(40, 50), rng(seed))
        assert got.keys() == {"image", "depth"} and got["image"].dtype == np.uint8 and got["depth"].dtype == np.float32
        np.testing.assert_array_equal(got["depth"], depth_of(got["image"]))
        first, second = got["image"][0, :2, 1].tolist()
        seen.add(second > first)
        same = t(paired(40, 50), rng(seed))
        np.testing.assert_array_equal(got["image"], same["image"])
    assert seen == {True, False}, "some are mirrored and some are not"


def test_every_place_of_a_crop_occurs():
    t = DepthTrainTransform((4, 5), **STILL)
    corners = {tuple(t(paired(6, 6), rng(seed))["image"][0, 0, :2].tolist()) for seed in range(60)}
    assert corners == {(row, column) for row in range(3) for column in range(2)}


def test_what_is_smaller_than_the_crop_is_surrounded_by_unknown_depth():
    got = DepthTrainTransform((7, 4), **STILL)(paired(4, 4), rng())
    np.testing.assert_array_equal(got["depth"][1:5], paired(4, 4)["depth"])
    assert got["image"].shape == (7, 4, 3)
    assert not got["depth"][[0, 5, 6]].any() and not got["image"][[0, 5, 6]].any()


def test_the_border_of_nyu_frames():
    t = DepthTrainTransform((427, 565), border="nyu", **STILL)
    got, whole = t(paired(480, 640), rng()), paired(480, 640)
    np.testing.assert_array_equal(got["depth"], whole["depth"][45:472, 43:608])
    np.testing.assert_array_equal(got["image"], whole["image"][45:472, 43:608])
    assert t.whole((480, 640)) == (427, 565)
    with pytest.raises(ValueError, match="480 x 640.*this one has 64 x 64"):
        t(paired(64, 64), rng())


def test_published_nyu_training_gives_its_crop():
    got = DepthTrainTransform((416, 544), border="nyu")(paired(480, 640), rng(1))
    assert got["image"].shape == (416, 544, 3) and got["depth"].shape == (416, 544)


def test_a_quarter_turn_is_exact_and_counter_clockwise():
    sample = paired(8, 8)
    image, depth = rotated(sample["image"], sample["depth"], 90.0)
    np.testing.assert_array_equal(image, np.rot90(sample["image"]))
    np.testing.assert_array_equal(depth, np.rot90(sample["depth"]))


def test_a_small_turn_keeps_depth_unblended_beside_its_pixels():
    """A wall at 2 m and one at 6 m: no pixel may say 4, and the edge must turn as it does in the image."""
    depth = np.full((60, 80), 2.0, np.float32)
    depth[:, 40:] = 6.0
    image = np.repeat((depth * 40).astype(np.uint8)[..., None], 3, -1)
    image, turned = rotated(image, depth, 10.0)
    assert set(np.unique(turned)) == {0.0, 2.0, 6.0}
    assert turned[0, 0] == 0 and not image[0, 0].any() and turned[30, 20] == 2.0
    inside = np.abs(image[..., 0] / 40.0 - turned) < 1.01
    known = turned > 0
    assert inside[known].mean() > 0.98
    # Counter-clockwise: the upper end of the edge goes to the left, by the tangent of the angle.
    upper, lower = (int(np.argmax(turned[row] == 6.0)) for row in (10, 50))
    assert lower - upper == pytest.approx(40 * np.tan(np.radians(10)), abs=1)


def test_angles_stay_within_the_range_and_half_are_turned():
    sample, turned = paired(64, 64), 0
    t = DepthTrainTransform((64, 64), flip=0.0, color_prob=0.0)
    for seed in range(60):
        got = t(sample, rng(seed))
        # A corner is at most 45 px from the centre: 2.5 degrees move it by less than 2 px.
        assert (got["depth"][2:-2, 2:-2] > 0).all()
        turned += not np.array_equal(got["image"], sample["image"])
    assert 20 < turned < 40


def test_colours_by_hand():
    image = np.array([[[0, 100, 200]]], np.uint8)
    got = recolored(image, 1.1, 0.8, np.array([1.1, 0.9, 1.1]))
    want = [0.0, 100**1.1 * 0.8 * 0.9, min(255.0, 200**1.1 * 0.8 * 1.1)]
    np.testing.assert_array_equal(got[0, 0], np.rint(want))
    assert got[0, 0].tolist() == [0, 114, 255]
    np.testing.assert_array_equal(recolored(image, 1.0, 1.0, np.ones(3)), image)


def test_colours_leave_depth_alone_and_change_half():
    t = DepthTrainTransform((30, 30), rotate_prob=0.0, flip=0.0)
    sample, changed = paired(30, 30), 0
    for seed in range(60):
        got = t(sample, rng(seed))
        np.testing.assert_array_equal(got["depth"], sample["depth"])
        changed += not np.array_equal(got["image"], sample["image"])
    assert 20 < changed < 40


def test_resizing_takes_the_nearest_depth():
    sample = paired(40, 60)
    got = DepthTrainTransform((20, 30), short_side=20, **STILL)(sample, rng())
    np.testing.assert_array_equal(got["depth"], sample["depth"][1::2, 1::2])
    want = np.asarray(Image.fromarray(sample["image"]).resize((30, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(got["image"], want)
    assert DepthTrainTransform((1, 1), short_side=20).whole((40, 61)) == (20, 30)


def test_evaluation_keeps_the_truth_as_it_was_measured():
    sample = paired(40, 60)
    got = DepthEvalTransform()(sample, rng())
    np.testing.assert_array_equal(got["image"], sample["image"])
    np.testing.assert_array_equal(got["depth"], sample["depth"])
    small = DepthEvalTransform(short_side=20)(sample, rng())
    assert small["image"].shape == (20, 30, 3) and small["depth"].shape == (40, 60)


def test_whatever_is_no_depth_is_unknown():
    sample = paired(2, 3)
    sample["depth"] = np.array([[1.5, -1.0, np.nan], [np.inf, 0.0, 2.5]])
    got = DepthEvalTransform()(sample, rng())["depth"]
    np.testing.assert_array_equal(got, np.array([[1.5, 0, 0], [0, 0, 2.5]], np.float32))
    size = DepthSize()(sample, rng())
    assert size["size"].tolist() == [2, 3] and size["range"].tolist() == [1.5, 2.5]
    sample["depth"] = np.zeros((2, 3))
    assert DepthSize()(sample, rng())["range"].tolist() == [np.inf, 0.0]


def test_what_cannot_be_used_is_refused():
    for t in (DepthTrainTransform((2, 2)), DepthEvalTransform(), DepthSize()):
        assert pickle.loads(pickle.dumps(t)) == t
        with pytest.raises(ValueError, match="no depth.*pairs:IMAGES,DEPTHS"):
            t({"image": np.zeros((4, 4, 3), np.uint8)}, rng())
        with pytest.raises(ValueError, match="4 x 5 values and its image 4 x 4"):
            t({"image": np.zeros((4, 4, 3), np.uint8), "depth": np.ones((4, 5))}, rng())
    with pytest.raises(ValueError, match="border is one of none, nyu"):
        DepthTrainTransform((2, 2), border="kitti")(paired(4, 4), rng())
