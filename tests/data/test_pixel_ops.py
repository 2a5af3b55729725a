"""Pixels on the accelerator: every operation, on fixed parameters, against Pillow, torchvision and SciPy.

"Levels" are of the 256 of a byte. Where the original cuts off or rounds what is a whole number but for its last binary
digit, one level to either side is right.
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageFilter

from regvit_jax.data import multicrop_host, pixel_ops
from regvit_jax.data.multicrop_spec import BRIGHTNESS, CONTRAST, SATURATION
from regvit_jax.sharding import jit_once

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "torchvision_colors.npz"
OPS = {
    "brightness": lambda image, value: pixel_ops.blend(image, BRIGHTNESS, value),
    "contrast": lambda image, value: pixel_ops.blend(image, CONTRAST, value),
    "saturation": lambda image, value: pixel_ops.blend(image, SATURATION, value),
    "hue": pixel_ops.turn_hue,
    "gray": lambda image, _: pixel_ops.grayscale(image),
    "blur": pixel_ops.gaussian_blur,
    "solarize": pixel_ops.solarize,
}


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height, width, seed=0):
    """Like a photo, where neighbours are similar."""
    blurred = scipy.ndimage.gaussian_filter(noise(height, width, seed).astype(float), (3, 3, 0))
    low, high = blurred.min(), blurred.max()
    return ((blurred - low) / (high - low) * 255).astype(np.uint8)


def over_all(op, image, *parameters, jit=jit_once):
    """The op on one image for every row of the parameters: uint8 (n, H, W, 3)."""

    def rows(image, *parameters):
        planes = pixel_ops.planar(image)
        return pixel_ops.interleaved(jax.vmap(lambda *row: op(planes, *row))(*parameters))

    return np.asarray(jit(rows)(image, *parameters))


def levels(ours, theirs):
    return np.abs(np.asarray(ours, int) - np.asarray(theirs, int))


@pytest.mark.parametrize("name", OPS)
def test_colours_blur_and_solarize_are_those_of_torchvision(name):
    golden = np.load(GOLDEN)
    keys = [key for key in golden.files if key.startswith(f"{name}/")]
    values = np.array([float(key.partition("/")[2]) for key in keys], np.float32)
    difference = levels(over_all(OPS[name], golden["image"], values), np.stack([golden[key] for key in keys]))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01, name
    assert len(keys) >= 1 and any((golden[key] != golden["image"]).any() for key in keys)


def test_hue_of_any_colour_is_that_of_pillow():
    colours = noise(300, 300)
    turns = np.float32([-0.5, -0.031, 0.1])
    theirs = [multicrop_host.turn_hue(Image.fromarray(colours), turn) for turn in turns]
    difference = levels(over_all(pixel_ops.turn_hue, colours, turns), np.stack(theirs))
    # Where the hue is a whole number of 255ths, Pillow's floating point may have it one lower: 6 levels.
    assert difference.max() <= 6 and (difference > 0).mean() < 0.002


def test_neutral_parameters_change_nothing():
    image = noise(9, 7)
    neutral = (np.float32([[1, 1, 1, 0]]), np.array([[2, 3, 0, 1]]))
    np.testing.assert_array_equal(over_all(pixel_ops.color_jitter, image, *neutral)[0], image)
    np.testing.assert_array_equal(over_all(pixel_ops.gaussian_blur, image, np.zeros(1, np.float32))[0], image)
    pillow = over_all(lambda planes, sigma: pixel_ops.pillow_blur(planes, sigma, 2.0), image, np.zeros(1, np.float32))
    np.testing.assert_array_equal(pillow[0], image)
    np.testing.assert_array_equal(pixel_ops.solarize(np.float32([0, 127, 128, 255]), 128), [0, 127, 127, 0])
    np.testing.assert_array_equal(pixel_ops.interleaved(pixel_ops.planar(jnp.asarray(image))), image)


def test_every_order_of_colour_jitter_is_that_of_pillow():
    image = smooth(24, 20)
    orders = np.array(list(itertools.permutations(range(4))))
    factors = np.float32([1.4, 1.4, 0.8, 0.1])  # the strongest, so that much is cut off at white
    # As in a training step, which is optimised: fused, operations may round otherwise.
    ours = over_all(pixel_ops.color_jitter, image, np.tile(factors, (24, 1)), orders, jit=jax.jit)
    theirs = np.stack([multicrop_host.color_jitter(Image.fromarray(image), factors, order) for order in orders])
    difference = levels(ours, theirs)
    # What is one level off before hue can be a step of hue off after it.
    assert (difference > 1).mean() < 0.01 and difference.max() <= 12
    # It matters which one is taken: a wrong order is further away than that.
    far = [levels(ours[a], theirs[b]).mean() for a, b in itertools.combinations(range(24), 2)]
    assert np.median(far) > 2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_box_is_resized_as_pillow_resizes_what_is_cut_out(interpolation):
    image = smooth(40, 56)
    image[10:20, 10:20] = noise(10, 10)
    boxes = np.float32([[0, 0, 40, 56], [3, 5, 30, 21], [20, 40, 7, 5], [9, 9, 12, 40], [0, 31, 40, 25], [5, 5, 1, 1]])
    flips = np.array([False, True, False, True, False, True])
    for size in (13, 24) if interpolation == "bicubic" else (13,):
        ours = over_all(
            lambda planes, box, flip, size=size: pixel_ops.crop_resize(planes, box, size, flip, interpolation),
            image, boxes, flips,
        )  # fmt: skip
        for crop, (top, left, height, width), flip in zip(ours, boxes.astype(int), flips, strict=True):
            part = Image.fromarray(image[top : top + height, left : left + width])
            theirs = np.asarray(part.resize((size, size), getattr(Image.Resampling, interpolation.upper())))
            # Which way is resized, and rounded, first is Pillow's choice from version 13 on: before it and here it is
            # the width.
            difference = levels(crop[:, ::-1] if flip else crop, theirs)
            assert difference.max() <= 2 and (difference > 1).mean() < 0.01


def test_a_box_between_pixels_is_where_pillow_has_it():
    image = smooth(40, 40)
    top, left, height, width = 6.3, 8.8, 20.5, 17.25
    box = (left, top, left + width, top + height)
    ours = over_all(lambda planes, box: pixel_ops.crop_resize(planes, box, 16, False), image,
                    np.float32([[top, left, height, width]]))[0]  # fmt: skip
    theirs = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC, box=box))
    # At its edge Pillow looks at pixels outside of the box, which are not part of a crop.
    assert levels(ours, theirs)[3:-3, 3:-3].max() <= 1


def test_resize_weights_add_up_and_stay_inside():
    weights = np.asarray(jit_once(lambda start, extent: pixel_ops.resize_weights(7, 20, start, extent))(4.25, 9.5))
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert (weights[:, :4] == 0).all() and (weights[:, 14:] == 0).all() and (weights[:, 4:14] != 0).any(0).all()
    # No product in 8-bit precision, which TPUs take where nothing is said.
    text = str(jax.make_jaxpr(lambda x: pixel_ops.crop_resize(x, jnp.ones(4), 2, True))(jnp.ones((4, 3, 4))))
    assert text.count("dot_general") == 2 == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")


def test_blur_is_a_gaussian_over_mirrored_borders():
    image, sigmas = noise(17, 12), np.float32([0.1, 0.7, 2.0])
    for ours, sigma in zip(over_all(pixel_ops.gaussian_blur, image, sigmas), sigmas, strict=True):
        truth = scipy.ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0), mode="mirror", radius=4)
        assert np.abs(ours - truth).max() <= 0.501


def test_pillow_blur_is_that_of_pillow():
    # At 1.4142 the box becomes wider by two pixels; the reach of 2.0 serves smaller ones too. Round sigmas such as 1.0
    # have weights such as 1/6, and many halves, which Pillow's cut off weights round otherwise.
    image, sigmas = noise(15, 22), np.float32([0.1, 0.3, 0.77, 1.4, 1.43, 1.7, 1.99])
    ours = over_all(lambda planes, sigma: pixel_ops.pillow_blur(planes, sigma, 2.0), image, sigmas)
    for crop, sigma in zip(ours, sigmas, strict=True):
        theirs = Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(sigma)))
        difference = levels(crop, theirs)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.03
