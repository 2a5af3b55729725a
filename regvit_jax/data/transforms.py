"""Transforms on the host: resize and crop with Pillow, as torchvision does with PIL images, pixel for pixel.

Images are uint8 (H, W, 3) RGB arrays between the functions. Geometry follows torchvision's rules, because released
weights were trained and evaluated with them: a resize that rounds otherwise moves every patch by a fraction of a pixel.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from regvit_jax.data.decode import MAX_PIXELS, DecodeError, decode, decode_map

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Fields of a sample with a row an object: no batch can hold them, since images have more or fewer.
OBJECTS = ("boxes", "box_labels", "difficult", "truncated")

INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How images become a model's input: resize the short side to size / crop_ratio, crop the centre, normalise."""

    size: int = 224
    crop_ratio: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        # A spec that was read from JSON comes with lists; the spec is hashed as a static field of the model.
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        _check_interpolation(self.interpolation)
        if self.size < 1 or not 0 < self.crop_ratio <= 1:
            raise ValueError(f"size must be at least 1 and crop_ratio in (0, 1], got {self.size} and {self.crop_ratio}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std have 3 values, std above 0; got {self.mean} and {self.std}")

    @property
    def resize_size(self) -> int:
        """Length of the short side before the crop; rounded down, as timm and DeiT do."""
        # 14 / 0.14 is 99.99… in floating point: a ratio that was meant to give a whole number must give it.
        return math.floor(self.size / self.crop_ratio + 1e-6)


def resize(image: np.ndarray, height: int, width: int, interpolation: str = "bicubic") -> np.ndarray:
    """uint8 (height, width, 3), antialiased when it shrinks; `image` itself if it has that size."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), _check_interpolation(interpolation)))


def resize_short(image: np.ndarray, size: int, interpolation: str = "bicubic") -> np.ndarray:
    """The short side becomes `size`, the long side int(size * long / short).

    Raises:
      DecodeError: for a strip so narrow that this is more than MAX_PIXELS.
    """
    height, width = _short_size(*image.shape[:2], size)
    return resize(image, height, width, interpolation)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """(size, size, …) around the centre, of an image or a map; what is smaller is padded with zeros first."""
    missing = [max(size - length, 0) for length in image.shape[:2]]
    if any(missing):
        widths = [(gap // 2, (gap + 1) // 2) for gap in missing] + [(0, 0)] * (image.ndim - 2)
        image = np.pad(image, widths)
    # Python rounds halves to even, so an odd margin may go either way: so does torchvision.
    top, left = (round((length - size) / 2.0) for length in image.shape[:2])
    return image[top : top + size, left : left + size]


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
) -> np.ndarray:
    """A random part, `scale` of the area with aspect ratio (width / height) in `ratio`, as uint8 (size, size, 3)."""
    top, left, height, width = random_crop_box(*image.shape[:2], rng, scale, ratio)
    return resize(image[top : top + height, left : left + width], size, size, interpolation)


def random_crop_box(
    height: int, width: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop: area uniform, aspect ratio log-uniform, 10 tries, then the largest
    centre crop.

    Source: Szegedy et al. 2015, with the rounding and the fallback of torchvision.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            return int(top), int(left), crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        crop_width = min(width, max(1, round(height * ratio[1])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def normalize(images: np.ndarray, spec: Preprocess) -> np.ndarray:
    """float32 (…, 3): (images / 255 - mean) / std."""
    return (images.astype(np.float32) / 255.0 - np.float32(spec.mean)) / np.float32(spec.std)


def preprocess(images: Any, spec: Preprocess) -> np.ndarray:
    """(B, S, S, 3) float32, normalised, of a list of paths, PIL images, encoded bytes or uint8 arrays (or one (B,H,W,3)
    array).

    Raises:
      ValueError: for an empty list, or an input that is no readable image; the message names it.
    """
    if isinstance(images, str | os.PathLike | bytes | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim < 4
    ):
        raise ValueError(f"preprocess takes a list of images, got one {type(images).__name__}: write [image]")
    pixels = [_eval_pixels(decode(image), spec) for image in images]
    if not pixels:
        raise ValueError("preprocess got an empty list of images")
    return normalize(np.stack(pixels), spec)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Sample -> {"image": uint8 (S,S,3), "label": int32, …}: resize the short side, crop the centre.

    "mask" and "depth" become (S,S), moved with the image by nearest neighbour; other numbers and fixed-shape arrays are
    kept; objects (OBJECTS) and text are dropped: what needs them reads the source. `fields` names the ones wanted;
    empty: all.
    """

    spec: Preprocess
    fields: tuple[str, ...] = ()

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        sample, image = _only(sample, self.fields), decode(sample["image"])
        height, width = _short_size(*image.shape[:2], self.spec.resize_size)

        def move(values):
            return center_crop(_nearest(values, height, width), self.spec.size)

        return _fixed_shape(sample, image, _eval_pixels(image, self.spec), move)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Sample -> {"image": uint8 (size,size,3), "label": int32, …}; the other fields as in EvalTransform.

    crop: "rrc" (random resized crop), "center" (resize the short side, crop the centre) or "none" (resized to the
    square, if it is not that already; aspect ratio not kept). fields: the ones wanted; empty: all. flip: share that is
    mirrored left to right.
    """

    size: int
    crop: str = "rrc"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    fields: tuple[str, ...] = ()
    flip: float = 0.0

    def __post_init__(self):
        _check_interpolation(self.interpolation)
        if self.crop not in ("rrc", "center", "none"):
            raise ValueError(f"crop is 'rrc', 'center' or 'none', not {self.crop!r}")
        if self.size < 1 or not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"need size >= 1, 0 < scale <= 1 and 0 < ratio, low before high; got {self}")

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        sample, image = _only(sample, self.fields), decode(sample["image"])
        top, left, (height, width) = 0, 0, image.shape[:2]
        if self.crop == "rrc":
            top, left, height, width = random_crop_box(height, width, rng, self.scale, self.ratio)
        resized = _short_size(height, width, self.size) if self.crop == "center" else (self.size, self.size)
        part = np.s_[top : top + height, left : left + width]
        columns = slice(None, None, -1 if self.flip and rng.random() < self.flip else 1)

        def move(values):
            return center_crop(_nearest(values[part], *resized), self.size)[:, columns]

        pixels = center_crop(resize(image[part], *resized, self.interpolation), self.size)[:, columns]
        return _fixed_shape(sample, image, pixels, move)


def _only(sample, fields):
    return {key: value for key, value in sample.items() if not fields or key in fields}


def _eval_pixels(image, spec):
    return center_crop(resize_short(image, spec.resize_size, spec.interpolation), spec.size)


def _fixed_shape(sample, original, image, move):
    """The fields of `sample` that a batch can hold, with the new `image`; `move` does to maps what was done to it."""
    fields = {"image": image, "label": np.int32(sample.get("label", -1))}
    for key, value in sample.items():
        if key in ("mask", "depth"):
            values = decode_map(value)
            if values.shape != original.shape[:2]:
                raise ValueError(
                    f"the {key} has shape {values.shape}, its image {original.shape[:2]}: they must agree (an image is "
                    f"turned upright as its EXIF orientation says, a {key} is taken as stored: make it for the upright "
                    f"image, or remove the orientation)"
                )
            fields[key] = move(values)
        elif key not in ("image", "label", *OBJECTS) and np.asarray(value).dtype.kind in "biuf":
            fields[key] = np.asarray(value)
    return fields


def _short_size(height, width, size):
    short, long = sorted((height, width))
    other = int(size * long / short)
    if size * other > MAX_PIXELS:
        raise DecodeError(
            f"an image of {width} x {height} pixels, its short side resized to {size}, would have {size} x {other}: "
            f"more than {MAX_PIXELS}"
        )
    return (size, other) if height <= width else (other, size)


def _nearest(values, height, width):
    """(height, width) of (H, W): the value under the centre of each new pixel, of any dtype."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * (old / new)).astype(int), old - 1)
        for new, old in zip((height, width), values.shape, strict=True)
    )
    return values[rows[:, None], columns]


def _check_interpolation(name):
    if name not in INTERPOLATION:
        raise ValueError(f"interpolation is one of {', '.join(INTERPOLATION)}, not {name!r}")
    return INTERPOLATION[name]
