"""Transforms of segmentation: geometry and colours by hand, against NumPy and colorsys; masks stay with their image."""

import colorsys
import pickle

import numpy as np
import pytest

from regvit_jax.data import dense_transforms as dense
from regvit_jax.data.decode import DecodeError
from regvit_jax.data.dense_transforms import (
    SegmentationEvalTransform,
    SegmentationTrainTransform,
    bilinear,
    distorted,
    nearest,
    short_size,
    to_hsv,
    to_rgb,
)

IGNORE = 255


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def halves(height, width):
    """Left half red and class 1, right half blue and class 0; the first row is to be ignored."""
    left = np.arange(width) < width // 2
    mask = np.tile(left.astype(np.uint8), (height, 1))
    mask[0] = IGNORE
    return {
        "image": np.where(np.tile(left, (height, 1))[..., None], np.uint8([255, 0, 0]), np.uint8([0, 0, 255])),
        "mask": mask,
    }


# Resizing


def test_short_sides_and_proportions():
    assert short_size((480, 360), 512) == (683, 512)  # 682.67
    assert short_size((300, 400), 150) == (150, 200)
    assert short_size((7, 7), 9) == (9, 9)
    with pytest.raises(DecodeError, match="would have 300000000 x 1000"):
        short_size((1, 300_000), 1000)


@pytest.mark.parametrize("size", [(20, 90), (74, 106), (37, 30), (3, 3)])
def test_bilinear_is_the_mean_of_four_neighbours(size):
    """Each pixel by the definition: centres aligned, indices clipped to the image."""
    image = noise(37, 53)
    expected = np.empty((*size, 3))
    for i, j in np.ndindex(size):
        y, x = (
            np.clip((k + 0.5) * old / new - 0.5, 0, old - 1) for k, old, new in zip((i, j), (37, 53), size, strict=True)
        )
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, 36), min(x0 + 1, 52)
        top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
        expected[i, j] = top * (1 - (y - y0)) + (image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)) * (y - y0)
    resized = bilinear(image, size)
    assert resized.dtype == np.uint8 and np.abs(resized - expected).max() < 0.501
    window = (slice(1, 3), slice(0, 2))
    np.testing.assert_array_equal(bilinear(image, size, window), resized[window])


def test_bilinear_sees_no_more_than_two_pixels_an_axis():
    """Eight times smaller: an antialiased resize would give grey."""
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, 3::8] = stripes[:, 4::8] = 240
    assert (bilinear(stripes, (1, 8)) == 240).all()
    assert bilinear(stripes, (8, 64)) is stripes


def test_nearest_takes_the_pixel_that_opencv_takes():
    row = np.arange(7, dtype=np.uint8)[None]
    assert nearest(row, (1, 3)).tolist() == [[0, 2, 4]]  # floor of 0, 2.33, 4.67
    assert nearest(row, (2, 14)).tolist() == [np.repeat(np.arange(7), 2).tolist()] * 2


# Colours


def test_hsv_of_known_colours():
    colours = np.uint8(
        [[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 0, 255], [255, 0, 255], [128, 128, 128], [0, 0, 0]]
    )
    hue, saturation, value = to_hsv(colours)
    assert hue.tolist() == [0, 30, 60, 120, 150, 0, 0]
    assert saturation.tolist() == [255] * 5 + [0, 0] and value.tolist() == [255] * 5 + [128, 0]
    np.testing.assert_array_equal(to_rgb(hue, saturation, value), colours)


def test_hsv_is_that_of_colorsys_in_eight_bits():
    pixels = noise(40, 50).reshape(-1, 3)
    hue, saturation, value = to_hsv(pixels)
    exact = np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels])
    away = np.abs(hue - 180 * exact[:, 0])
    assert np.minimum(away, 180 - away).max() < 0.6 and 0 <= hue.min() <= hue.max() <= 179
    assert np.abs(saturation - 255 * exact[:, 1]).max() < 0.6
    np.testing.assert_array_equal(value, pixels.max(axis=1))
    back = [colorsys.hsv_to_rgb(h / 180, s / 255, v / 255) for h, s, v in zip(hue, saturation, value, strict=True)]
    assert np.abs(to_rgb(hue, saturation, value) - 255 * np.array(back)).max() < 0.501


class Scripted:
    """A generator that says what it is told to: `uniform` and `integers` check the range they are asked for."""

    def __init__(self, coins, values):
        self.coins, self.values = list(coins), list(values)

    def random(self):
        return 0.0 if self.coins.pop(0) else 0.9

    def _next(self, *bounds):
        asked, value = self.values.pop(0)
        assert bounds == asked
        return value

    uniform = integers = _next


BRIGHT, CONTRAST, SATURATE, HUE = (-32.0, 32.0), (0.5, 1.5), (0.5, 1.5), (-18, 18)


@pytest.mark.parametrize(
    # Coins in order: brightness, contrast before the others?, contrast, saturation, hue (contrast last if not before).
    ("coins", "values", "pixel", "expected"),
    [
        ([0, 0, 0, 0, 0], [], [10, 20, 30], [10, 20, 30]),
        ([1, 0, 0, 0, 0], [(BRIGHT, 10.9)], [10, 250, 30], [20, 255, 40]),
        ([1, 0, 0, 0, 0], [(BRIGHT, -20.5)], [10, 250, 30], [0, 229, 9]),
        ([0, 1, 1, 0, 0], [(CONTRAST, 1.5)], [11, 250, 30], [16, 255, 45]),
        ([0, 0, 0, 0, 1], [(CONTRAST, 0.5)], [11, 250, 30], [5, 125, 15]),
        # Grey has no saturation to change; half of a full one leaves white in it.
        ([0, 0, 1, 0, 0], [(SATURATE, 0.5)], [255, 0, 0], [255, 128, 128]),
        ([0, 0, 1, 0, 0], [(SATURATE, 1.5)], [90, 90, 90], [90, 90, 90]),
        # -18 half degrees are -36 degrees: from red past 0 to magenta's side; 17 towards yellow.
        ([0, 0, 0, 1, 0], [(HUE, -18)], [255, 0, 0], [255, 0, 153]),
        ([0, 0, 0, 1, 0], [(HUE, 17)], [255, 0, 0], [255, 144, 0]),
        # The order matters: brightness first, then contrast, or contrast last.
        ([1, 1, 1, 0, 0], [(BRIGHT, 20.0), (CONTRAST, 0.5)], [10, 20, 30], [15, 20, 25]),
    ],
)
def test_distortions_by_hand(coins, values, pixel, expected):
    script = Scripted(coins, values)
    assert distorted(np.uint8([[pixel]]), script)[0, 0].tolist() == expected
    assert not script.values, "every value was used"


def test_distortions_come_half_of_the_time():
    image = np.uint8([[[120, 60, 30]]])
    same = [np.array_equal(distorted(image, np.random.default_rng(seed)), image) for seed in range(2000)]
    # A sixteenth does nothing, and a few factors are near 1: 125 expected, 5 standard deviations are 54.
    assert 80 < sum(same) < 260


# Training samples


def test_training_samples_have_one_shape_and_move_together():
    transform = pickle.loads(pickle.dumps(SegmentationTrainTransform(24, 24, num_classes=2, distort=False)))
    flips = set()
    for seed in range(20):
        sample = transform(halves(30, 46), np.random.default_rng(seed))
        image, mask = sample["image"], sample["mask"]
        assert image.shape == (24, 24, 3) and mask.shape == (24, 24) and image.dtype == mask.dtype == np.uint8
        certain = (mask != IGNORE) & (np.abs(image[..., 0].astype(int) - 128) > 100)
        np.testing.assert_array_equal((image[..., 0] > 128)[certain], (mask == 1)[certain])
        known = mask[(mask != IGNORE).any(axis=1)][0]
        flips.add(int(known[0]) if known[0] != known[known != IGNORE][-1] else None)
    assert {0, 1} <= flips, "some are mirrored"


def test_the_same_generator_gives_the_same_sample():
    transform = SegmentationTrainTransform(16, 20, num_classes=2)
    first, again = (transform(halves(30, 46), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first["image"], again["image"])
    np.testing.assert_array_equal(first["mask"], again["mask"])


def test_what_is_too_small_is_filled_below_and_to_the_right():
    transform = SegmentationTrainTransform(
        32, 16, num_classes=2, ratio=(1.0, 1.0), flip=0.0, distort=False, fill=(1, 2, 3)
    )
    sample = transform(halves(16, 20), np.random.default_rng(0))
    np.testing.assert_array_equal(sample["image"][:16, :20], halves(16, 20)["image"])
    np.testing.assert_array_equal(sample["mask"][:16, :20], halves(16, 20)["mask"])
    assert (sample["image"][16:] == [1, 2, 3]).all() and (sample["image"][:16, 20:] == [1, 2, 3]).all()
    assert (sample["mask"][16:] == IGNORE).all() and (sample["mask"][:, 20:] == IGNORE).all()


def test_sizes_are_drawn_from_the_ratio(monkeypatch):
    seen = []
    monkeypatch.setattr(dense, "nearest", lambda mask, size: seen.append(size) or nearest(mask, size))
    transform = SegmentationTrainTransform(8, 40, num_classes=2, ratio=(0.5, 2.0), distort=False)
    for seed in range(300):
        transform(halves(10, 20), np.random.default_rng(seed))
    shorts = np.array([size[0] for size in seen])
    assert all(width == 2 * height for height, width in seen) and 20 <= shorts.min() < 24 and 74 < shorts.max() < 80
    assert abs(shorts.mean() - 49.5) < 5 * 17.3 / np.sqrt(300)


def test_crops_of_one_class_are_drawn_again():
    """Class 1 is at the left border: few crops hold some of it."""
    mask = np.zeros((40, 40), np.uint8)
    mask[:, :3] = 1
    sample = {"image": noise(40, 40), "mask": mask}
    options = dict(crop=8, short_side=40, num_classes=2, ratio=(1.0, 1.0), distort=False)
    hits = {}
    for limit in (0.75, 1.0):
        transform = SegmentationTrainTransform(**options, cat_max_ratio=limit)
        crops = [transform(sample, np.random.default_rng(seed))["mask"] for seed in range(200)]
        hits[limit] = sum(bool((crop == 1).any()) for crop in crops)
    # Of 33 places across, 3 hold some of class 1 and one of them (3 of 8 columns) more than a quarter; 10 crops are
    # judged, the 11th is taken.
    one_try, judged = 3 / 33, 1 - (32 / 33) ** 10
    for limit, chance in ((1.0, one_try), (0.75, judged + (1 - judged) * one_try)):
        assert abs(hits[limit] - 200 * chance) < 4 * np.sqrt(200 * chance * (1 - chance)), (limit, hits)


def test_ignored_pixels_are_no_class_when_crops_are_judged():
    mask = np.full((20, 20), IGNORE, np.uint8)
    mask[:10] = 1
    draws = []

    class Counting:
        def integers(self, high):
            draws.append(high)
            return 0

    transform = SegmentationTrainTransform(20, 20, num_classes=2)
    transform._window(mask, Counting())
    assert len(draws) == 22, "one class beside what is ignored: all 11 crops are drawn"
    draws.clear()
    mask[:4] = 0
    transform._window(mask, Counting())
    assert len(draws) == 2


# Evaluation samples and refusals


def test_evaluation_keeps_the_mask_and_resizes_the_image():
    sample = halves(30, 46)
    out = SegmentationEvalTransform((15, 60), num_classes=2)(sample, np.random.default_rng(0))
    assert out.keys() == {"image0", "image1", "mask"}
    assert out["image0"].shape == (15, 23, 3) and out["image1"].shape == (60, 92, 3)
    np.testing.assert_array_equal(out["mask"], sample["mask"])


def test_masks_that_mean_something_else_are_refused():
    transform, rng = SegmentationEvalTransform((8,), num_classes=3), np.random.default_rng(0)
    with pytest.raises(ValueError, match="has no mask.*scenes:"):
        transform({"image": noise(4, 4)}, rng)
    with pytest.raises(ValueError, match="4 x 5 values and its image 4 x 4"):
        transform({"image": noise(4, 4), "mask": np.zeros((4, 5), np.uint8)}, rng)
    mask = np.zeros((4, 4), np.uint8)
    mask[1, 1:3] = 7
    with pytest.raises(ValueError, match=r"value 7 in 2 pixels; its source names 3 classes, 0 to 2 \(and 255"):
        transform({"image": noise(4, 4), "mask": mask}, rng)
    # Wider integers mean the same; what is outside of 8 bits is ignored.
    wide = np.array([[0, 2, 255, 65535], [-1, 1, 1, 1]], np.int32)
    out = transform({"image": noise(2, 4), "mask": wide}, rng)["mask"]
    assert out.tolist() == [[0, 2, 255, 255], [255, 1, 1, 1]]
