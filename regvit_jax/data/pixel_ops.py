"""Operations on the pixels of one image on the accelerator: cut out and resize, colours, blur, solarize.

Every one is a pure function of its parameters, made for `vmap`, and gives what Pillow and torchvision give for a PIL
image, because released weights were trained on that: values are whole numbers from 0 to 255 (as float32) before and
after each operation, rounded or cut off where and as those do it.

Images here are (H, 3, W): channels between rows and columns. So resizing is two plain matrix products, and no array has
a last axis of 3, which vector units dislike. `planar` and `interleaved` lead there and back.
"""

import math

import jax.numpy as jnp
from jax import lax

from regvit_jax.data.multicrop_spec import BRIGHTNESS, CONTRAST, HUE
from regvit_jax.trees import Array

# Of red, green and blue in the lightness of a pixel (ITU-R 601: .299, .587, .114), in 65536ths: whole numbers below
# 2**24, so that float32 sums them as exactly as the integers of Pillow.
_LIGHTNESS = (19595.0, 38470.0, 7471.0)
# Reach of the filters in pixels, where nothing shrinks.
_REACH = {"bilinear": 1.0, "bicubic": 2.0}


def planar(images: Array) -> Array:
    """(…, H, 3, W) float32 of (…, H, W, 3)."""
    return jnp.swapaxes(images, -1, -2).astype(jnp.float32)


def interleaved(images: Array) -> Array:
    """(…, H, W, 3) uint8 of (…, H, 3, W)."""
    return jnp.swapaxes(images.astype(jnp.uint8), -1, -2)


def resize_weights(size: int, length: int, start: Array, extent: Array, interpolation: str = "bicubic") -> Array:
    """(size, length) float32: how much of each of `length` pixels is in each of the `size` that the part
    [start, start + extent) of them is resized to. Rows sum to 1.

    Pillow's: the filter (bicubic has a = -0.5) grows with the pixels of the result where they are larger, so shrinking
    is antialiased. Nothing outside of the part counts; a pixel that its edge cuts counts as much as lies inside.
    """
    step = extent / size
    centre = start + (jnp.arange(size) + 0.5) * step
    pixel = jnp.arange(length, dtype=jnp.float32)
    distance = jnp.abs(pixel + 0.5 - centre[:, None]) / jnp.maximum(step, 1.0)
    inside = jnp.clip(jnp.minimum(pixel + 1, start + extent) - jnp.maximum(pixel, start), 0.0, 1.0)
    weights = jnp.where(distance < _REACH[interpolation], _FILTERS[interpolation](distance), 0.0) * inside
    return weights / weights.sum(1, keepdims=True)


def crop_resize(image: Array, box: Array, size: int, flip: Array, interpolation: str = "bicubic") -> Array:
    """(size, 3, size): the part `box` (top, left, height, width; pixels of `image`, not necessarily whole) resized, and
    mirrored left to right where `flip`."""
    top, left, height, width = box
    columns = resize_weights(size, image.shape[2], left, width, interpolation)
    columns = jnp.where(flip, columns[::-1], columns)
    rows = resize_weights(size, image.shape[0], top, height, interpolation)
    # float32 products: what TPUs multiply by default has 8 bits, with which the weights would not even sum to 1.
    image = _to_bytes(jnp.einsum("hcw,ow->hco", image, columns, precision=lax.Precision.HIGHEST))
    return _to_bytes(jnp.einsum("ph,hco->pco", rows, image, precision=lax.Precision.HIGHEST))


def color_jitter(image: Array, factors: Array, order: Array) -> Array:
    """Brightness, contrast, saturation and hue changed by `factors` (4,), in the `order` (4,) of their places there.

    The first three mix the image with black, with the mean of its lightness and with its lightness; hue is turned by a
    part of the colour circle. Factors 1, 1, 1 and 0 change nothing.
    """
    for place in range(4):
        what = order[place]
        # Under vmap both are computed and one is taken.
        blended = blend(image, what, factors[what])
        image = jnp.where(what == HUE, turn_hue(image, factors[HUE]), blended)
    return image


def blend(image: Array, what: Array, factor: Array) -> Array:
    """Brightness, contrast or saturation (`what`) times `factor`."""
    light = lightness(image)
    mean = jnp.floor(light.mean() + 0.5)
    base = jnp.where(what == BRIGHTNESS, 0.0, jnp.where(what == CONTRAST, mean, light))
    return jnp.floor(jnp.clip(base + factor * (image - base), 0.0, 255.0))


def lightness(image: Array) -> Array:
    """(H, 1, W), the grey values of an image."""
    red, green, blue = (image[:, c : c + 1] * weight for c, weight in enumerate(_LIGHTNESS))
    return jnp.floor((red + green + blue + 32768.0) / 65536.0)


def grayscale(image: Array) -> Array:
    return jnp.broadcast_to(lightness(image), image.shape)


def turn_hue(image: Array, turn: Array) -> Array:
    """Hue moved by `turn` in [-0.5, 0.5] of the circle; 0 leaves every pixel as it is.

    Hue and saturation are cut off to 8 bits on the way, as in Pillow: the round trip alone moves colours by a few
    levels.
    """
    red, green, blue = image[:, 0], image[:, 1], image[:, 2]
    high = jnp.maximum(red, jnp.maximum(green, blue))
    chroma = high - jnp.minimum(red, jnp.minimum(green, blue))
    # Sixths of the circle times chroma: whole numbers.
    sixths = jnp.where(
        red == high, green - blue, jnp.where(green == high, 2 * chroma + blue - red, 4 * chroma + red - green)
    )
    sixths = jnp.where(sixths < 0, sixths + 6 * chroma, sixths)
    hue = _floor_ratio(255.0 * sixths, jnp.maximum(6 * chroma, 1.0))
    saturation = _floor_ratio(255.0 * chroma, jnp.maximum(high, 1.0))
    hue = jnp.mod(hue + jnp.trunc(turn * 255.0), 256.0)

    # Every channel falls from `high` by saturation x its distance from the sectors of the circle where it leads.
    position = (hue * (6.0 / 255.0))[:, None] + jnp.array([5.0, 3.0, 1.0])[:, None]
    position = jnp.where(position >= 6.0, position - 6.0, position)
    away = jnp.clip(jnp.minimum(position, 4.0 - position), 0.0, 1.0)
    turned = jnp.floor(high[:, None] * (1.0 - away * (saturation / 255.0)[:, None]) + 0.5)
    return jnp.where(turn == 0, image, turned)


def gaussian_blur(image: Array, sigma: Array) -> Array:
    """Blurred with a 9 x 9 Gaussian, the mirror image beyond the border; a sigma of 0 changes nothing."""
    offset = jnp.arange(-4.0, 5.0)
    taps = jnp.exp(-0.5 * (offset / jnp.maximum(sigma, 1e-6)) ** 2)
    taps = taps / taps.sum()
    return jnp.clip(jnp.round(_filter(_filter(image, taps, 2, "reflect"), taps, 0, "reflect")), 0.0, 255.0)


def pillow_blur(image: Array, sigma: Array, largest: float) -> Array:
    """Pillow's GaussianBlur(sigma) for sigma <= `largest`: three passes of a box along either axis, the last pixel
    repeated beyond the border; a sigma of 0 changes nothing.

    Source: Gwosdek et al. 2011, boxes of fractional width.
    """
    variance = sigma**2 / 3
    whole = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance) / (6.0 * (variance - (whole + 1.0) ** 2))
    radius = whole + part
    reach = math.floor((math.sqrt(4.0 * largest**2 + 1.0) - 1.0) / 2.0) + 1
    offset = jnp.abs(jnp.arange(-reach, reach + 1.0))
    taps = jnp.clip(radius - offset + 1.0, 0.0, 1.0) / (2.0 * radius + 1.0)
    for axis in (2, 0):
        for _ in range(3):
            image = _to_bytes(_filter(image, taps, axis, "edge"))
    return image


def solarize(image: Array, threshold: int) -> Array:
    """Values from `threshold` on inverted."""
    return jnp.where(image >= threshold, 255.0 - image, image)


def _filter(image, taps, axis, mode):
    """The image correlated with an odd number of taps along one axis."""
    reach, length = len(taps) // 2, image.shape[axis]
    widths = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
    # The barrier keeps the compiler from computing the border, and all that is before it, anew for every tap.
    padded = lax.optimization_barrier(jnp.pad(image, widths, mode=mode))
    return sum(taps[k] * lax.slice_in_dim(padded, k, k + length, axis=axis) for k in range(len(taps)))


def _to_bytes(image):
    """Rounded, halves up, and limited to 0 … 255."""
    return jnp.clip(jnp.floor(image + 0.5), 0.0, 255.0)


def _floor_ratio(above, below):
    """floor(above / below) of whole numbers with `below` under 2000; accelerators divide with an error in the last
    digits, which would make 16.999998 of 17."""
    return jnp.floor(above / below + 2e-4)


def _triangle(distance):
    return 1.0 - distance


def _cubic(distance):
    """Keys's with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance**2 + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return jnp.where(distance < 1.0, near, far)


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}
