"""Transforms on the host for depth probes: image and depth map are cut, turned and mirrored together.

Depth is never blended: a value between two surfaces is the depth of neither. It is 0 where unknown, and so is what a
rotation or a crop brings in from outside.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from regvit_jax.data.decode import decode, decode_map
from regvit_jax.data.transforms import resize_short

# Frames of a sensor whose margin shows nothing: (height, width) of the whole frame, and what is kept of it.
BORDERS = {"none": None, "nyu": ((480, 640), np.s_[45:472, 43:608])}


@dataclasses.dataclass(frozen=True)
class DepthTrainTransform:
    """Sample -> {"image": uint8 (H,W,3), "depth": float32 (H,W)} of one size, drawn anew every time.

    In this order, as the probes of DINOv2 are trained on NYU Depth v2: the border is cut off, the short side resized,
    the pair turned (pixels by bilinear interpolation, depth by the nearest value), mirrored, cropped; then the colours
    of the raw values 0 to 255 change: x ** gamma, times a brightness, times a factor of each channel, clipped. They are
    rounded to whole numbers here, which the original does not do.

    Attributes:
      crop: (height, width) of the result; what is smaller is surrounded by zeros, and unknown there.
      border: none, or nyu: rows 45 to 471 and columns 43 to 607 of frames of 480 x 640.
      short_side: pixels of the short side after resizing; 0: as it is.
      rotate, rotate_prob: largest angle in degrees, either way, and how often the pair is turned.
      flip: how often it is mirrored left to right.
      color_prob, gamma, brightness, channels: how often colours change, and the ranges.
    """

    crop: tuple[int, int]
    border: str = "none"
    short_side: int = 0
    rotate: float = 2.5
    rotate_prob: float = 0.5
    flip: float = 0.5
    color_prob: float = 0.5
    gamma: tuple[float, float] = (0.9, 1.1)
    brightness: tuple[float, float] = (0.75, 1.25)
    channels: tuple[float, float] = (0.9, 1.1)

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, depth = _pair(sample)
        image, depth = _without_border(image, depth, self.border)
        if self.short_side:
            image = resize_short(image, self.short_side, "bilinear")
            depth = _nearest(depth, image.shape[:2])
        if rng.random() < self.rotate_prob and self.rotate:
            image, depth = rotated(image, depth, rng.uniform(-self.rotate, self.rotate))
        if rng.random() < self.flip:
            image, depth = image[:, ::-1], depth[:, ::-1]
        image, depth = _random_crop(image, depth, self.crop, rng)
        if rng.random() < self.color_prob:
            image = recolored(
                image, rng.uniform(*self.gamma), rng.uniform(*self.brightness), rng.uniform(*self.channels, size=3)
            )
        return {"image": image, "depth": depth}

    def whole(self, size: tuple[int, int]) -> tuple[int, int]:
        """The crop that holds all that is left of an image of this height and width."""
        image, _ = _without_border(np.zeros((*size, 3), np.uint8), np.zeros(size, np.float32), self.border)
        return (resize_short(image, self.short_side, "bilinear") if self.short_side else image).shape[:2]


@dataclasses.dataclass(frozen=True)
class DepthEvalTransform:
    """Sample -> {"image": uint8 (h,w,3), "depth": float32 (H,W)}: both whole, the depth as it was measured, the image
    with its short side resized to `short_side` (0: as it is)."""

    short_side: int = 0

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, depth = _pair(sample)
        return {"image": resize_short(image, self.short_side, "bilinear") if self.short_side else image, "depth": depth}


@dataclasses.dataclass(frozen=True)
class DepthSize:
    """Sample -> {"size": int32 (2,): height and width, "range": float32 (2,)}: the least and the largest known depth in
    metres (infinity and 0 where there is none)."""

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        _, depth = _pair(sample)
        known = depth[depth > 0]
        ends = (known.min(), known.max()) if known.size else (np.inf, 0.0)
        return {"size": np.array(depth.shape, np.int32), "range": np.array(ends, np.float32)}


def rotated(image: np.ndarray, depth: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Both turned counter-clockwise about their centre; what comes in from outside is black, and of unknown depth."""
    turned = Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(0, 0, 0))
    return np.asarray(turned), np.asarray(Image.fromarray(depth).rotate(degrees, Image.Resampling.NEAREST, fillcolor=0))


def recolored(image: np.ndarray, gamma: float, brightness: float, channels_3: np.ndarray) -> np.ndarray:
    """uint8: clip(image ** gamma * brightness * channel), of values from 0 to 255."""
    # A value has 256 cases: a table of them is exact, and saves a power of every pixel.
    table_v = np.arange(256.0) ** gamma * brightness
    table_v3 = np.rint(np.clip(table_v[:, None] * np.asarray(channels_3), 0, 255)).astype(np.uint8)
    return table_v3[image, np.arange(3)]


def _pair(sample):
    """uint8 (H, W, 3) and float32 (H, W), in which all that is no positive finite number is 0."""
    if "depth" not in sample:
        raise ValueError(
            "this sample has no depth, which the depth probe learns and is measured on: use a source that has it, such "
            "as scenes:, nyud:PATH, or pairs:IMAGES,DEPTHS?depth=0.001 for 16-bit maps in millimetres"
        )
    image, depth = decode(sample["image"]), decode_map(sample["depth"]).astype(np.float32)
    if depth.shape != image.shape[:2]:
        raise ValueError(
            f"the depth map has {depth.shape[0]} x {depth.shape[1]} values and its image {image.shape[0]} x "
            f"{image.shape[1]} pixels (height x width): they must agree (an image is turned upright as its EXIF "
            f"orientation says, a depth map is taken as stored)"
        )
    return image, np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def _without_border(image, depth, border):
    if border not in BORDERS:
        raise ValueError(f"border is one of {', '.join(BORDERS)}, not {border!r}")
    if BORDERS[border] is None:
        return image, depth
    size, inside = BORDERS[border]
    if depth.shape != size:
        raise ValueError(
            f"border={border!r} is a part of frames of {size[0]} x {size[1]} (height x width), this one has "
            f"{depth.shape[0]} x {depth.shape[1]}: use border='none'"
        )
    return image[inside], depth[inside]


def _random_crop(image, depth, crop, rng):
    missing = [max(wanted - length, 0) for wanted, length in zip(crop, depth.shape, strict=True)]
    if any(missing):
        widths = [(gap // 2, gap - gap // 2) for gap in missing]
        image, depth = np.pad(image, [*widths, (0, 0)]), np.pad(depth, widths)
    top, left = (int(rng.integers(length - wanted + 1)) for length, wanted in zip(depth.shape, crop, strict=True))
    part = np.s_[top : top + crop[0], left : left + crop[1]]
    return image[part], depth[part]


def _nearest(depth, size):
    """(H, W) at another size: the value under the centre of each new pixel."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * (old / new)).astype(int), old - 1)
        for new, old in zip(size, depth.shape, strict=True)
    )
    return depth[rows[:, None], columns]
