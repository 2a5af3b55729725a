"""Transforms on the host for segmentation probes: image and mask are resized, cut and mirrored together; colours are
distorted.

They do what the probes of DINOv2 are trained with (mmsegmentation 0.x with OpenCV), so that published numbers can be
met: bilinear without antialiasing, masks by the nearest value, 8-bit HSV with hues from 0 to 179.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from regvit_jax.data.decode import MAX_PIXELS, DecodeError, decode, decode_map
from regvit_jax.data.sources import IGNORE

_TRIES = 10  # crops that are drawn for one without a dominating class
_DELTA = 32.0  # brightness, of 255
_FACTOR = (0.5, 1.5)  # contrast and saturation
_HUE = 18  # half degrees

# OpenCV divides by a table of 12-bit fixed point.
_BITS = 12


def _reciprocals(numerator):
    values = np.arange(256.0)
    values[0] = np.inf
    return np.rint(numerator * 2**_BITS / values).astype(np.int32)


_PER_VALUE, _PER_CHROMA = _reciprocals(255), _reciprocals(30)


@dataclasses.dataclass(frozen=True)
class SegmentationTrainTransform:
    """Sample -> {"image": uint8 (crop, crop, 3), "mask": uint8 (crop, crop)}, drawn anew every time.

    In this order: resized, a random crop, mirrored, colours distorted, surrounded by `fill` and IGNORE below and to the
    right where the image is smaller than the crop.

    Attributes:
      crop: side of the result, pixels.
      short_side: of the whole image, before it is multiplied by a factor drawn from `ratio`.
      cat_max_ratio: a crop is drawn again, up to 10 times, while one class has this share of its known pixels or more;
        1: the first is taken.
      flip: how often the pair is mirrored left to right.
      distort: whether colours are, see `distorted`.
      fill: the colour of padding; the nearest to the mean of the model's normalisation stands for zeros after it.
      num_classes: C; a mask with other values than 0 … C - 1 and IGNORE is an error.
    """

    crop: int
    short_side: int
    num_classes: int
    ratio: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    distort: bool = True
    fill: tuple[int, int, int] = (124, 116, 104)

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, mask = pair(sample, self.num_classes)
        size = short_size(mask.shape, max(1, int(self.short_side * rng.uniform(*self.ratio))))
        mask = nearest(mask, size)
        window = self._window(mask, rng)
        image, mask = bilinear(image, size, window), mask[window]
        if rng.random() < self.flip:
            image, mask = image[:, ::-1], mask[:, ::-1]
        if self.distort:
            image = distorted(image, rng)
        height, width = mask.shape
        whole = np.empty((self.crop, self.crop, 3), np.uint8)
        whole[...] = self.fill
        whole[:height, :width] = image
        labels = np.full((self.crop, self.crop), IGNORE, np.uint8)
        labels[:height, :width] = mask
        return {"image": whole, "mask": labels}

    def _window(self, mask, rng):
        """The part of the resized image that is kept, a pair of slices."""
        for attempt in range(_TRIES + 1):
            corner = [int(rng.integers(max(length - self.crop, 0) + 1)) for length in mask.shape]
            window = tuple(
                slice(start, min(start + self.crop, length)) for start, length in zip(corner, mask.shape, strict=True)
            )
            if self.cat_max_ratio >= 1 or attempt == _TRIES:
                break
            count = np.bincount(mask[window].reshape(-1), minlength=IGNORE + 1)[:IGNORE]
            if (count > 0).sum() > 1 and count.max() < self.cat_max_ratio * count.sum():
                break
        return window


@dataclasses.dataclass(frozen=True)
class SegmentationEvalTransform:
    """Sample -> {"image0", "image1", …: uint8 (h, w, 3), "mask": uint8 (H, W)}: the whole image, its short side resized
    to each of `short_sides`, and the mask as it is stored."""

    short_sides: tuple[int, ...]
    num_classes: int

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, mask = pair(sample, self.num_classes)
        sizes = [short_size(mask.shape, short) for short in self.short_sides]
        return {f"image{i}": bilinear(image, size) for i, size in enumerate(sizes)} | {"mask": mask}


def pair(sample: Mapping[str, Any], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W, 3) image and (H, W) mask of a sample.

    Raises:
      ValueError: without a mask, for one of another size than the image, or with a value that is no class.
    """
    if "mask" not in sample:
        raise ValueError(
            "this sample has no mask, which segmentation learns and is measured on: use a source that has them, such "
            "as scenes:, ade20k:PATH, voc:PATH or pairs:IMAGES,MASKS"
        )
    image, mask = decode(sample["image"]), decode_map(sample["mask"])
    if mask.shape != image.shape[:2]:
        raise ValueError(
            f"the mask has {mask.shape[0]} x {mask.shape[1]} values and its image {image.shape[0]} x {image.shape[1]} "
            f"pixels (height x width): they must agree (an image is turned upright as its EXIF orientation says, a "
            f"mask is taken as stored)"
        )
    if mask.dtype != np.uint8:
        mask = np.where((mask >= 0) & (mask < IGNORE), mask, IGNORE).astype(np.uint8)
    known = np.bincount(mask.reshape(-1), minlength=IGNORE + 1)[:IGNORE]
    if known[num_classes:].any():
        value = num_classes + int(known[num_classes:].argmax())
        raise ValueError(
            f"the mask has the value {value} in {known[value]} pixels; its source names {num_classes} classes, 0 to "
            f"{num_classes - 1} (and {IGNORE} where nothing counts)"
        )
    return image, mask


def short_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(height, width) with the short side `short` and the other side in proportion, rounded.

    Raises:
      DecodeError: for a strip so narrow that this is more than MAX_PIXELS.
    """
    factor = short / min(size)
    height, width = (max(1, int(length * factor + 0.5)) for length in size)
    if height * width > MAX_PIXELS:
        raise DecodeError(
            f"an image of {size[1]} x {size[0]} pixels, its short side resized to {short}, would have {width} x "
            f"{height}: more than {MAX_PIXELS}"
        )
    return height, width


def bilinear(image: np.ndarray, size: tuple[int, int], window: tuple[slice, slice] | None = None) -> np.ndarray:
    """uint8 (H, W, 3) resized without antialiasing, rounded: pixel centres aligned, the border repeated, as OpenCV
    does (but for the last bit of its fixed-point weights).

    Args:
      window: the part of the result that is wanted; nothing else is computed.
    """
    if size == image.shape[:2]:
        return image if window is None else image[window]
    window = window or (slice(0, size[0]), slice(0, size[1]))
    (rows, below_rows, row_weights), (columns, below_columns, column_weights) = (
        _taps(old, new, part) for old, new, part in zip(image.shape, size, window, strict=False)
    )
    # Rows are blended over the columns that the window needs, no others.
    first, last = columns[0], below_columns[-1] + 1
    image = image[:, first:last]
    result = _blend(image[rows], image[below_rows], row_weights[:, None, None])
    result = _blend(result[:, columns - first], result[:, below_columns - first], column_weights[:, None])
    return np.rint(result).astype(np.uint8)


def nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) resized as OpenCV does: pixel i is pixel floor(i * old / new), of any dtype."""
    rows, columns = (
        np.minimum((np.arange(new) * (old / new)).astype(int), old - 1)
        for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def distorted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each with probability 1/2: brightness -32 … 32 added, contrast times 0.5 … 1.5, saturation times 0.5 … 1.5, the
    hue turned by -36 … 34 degrees. Contrast comes second or last. Every one of them clips and drops fractions."""
    if rng.random() < 0.5:
        image = _table(image, 1.0, rng.uniform(-_DELTA, _DELTA))
    contrast_first = rng.random() < 0.5
    if contrast_first:
        image = _contrast(image, rng)
    if rng.random() < 0.5:
        hue, saturation, value = to_hsv(image)
        image = to_rgb(hue, _line(rng.uniform(*_FACTOR), 0.0)[saturation], value)
    if rng.random() < 0.5:
        hue, saturation, value = to_hsv(image)
        image = to_rgb((hue + int(rng.integers(-_HUE, _HUE))) % 180, saturation, value)
    return image if contrast_first else _contrast(image, rng)


def to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue 0 … 179 (half degrees), saturation and value 0 … 255 of uint8 (…, 3), each int32 (…), rounded as OpenCV
    does."""
    red, green, blue = (image[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    half = 1 << (_BITS - 1)
    saturation = (chroma * _PER_VALUE[value] + half) >> _BITS
    sixths = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    hue = (sixths * _PER_CHROMA[chroma] + half) >> _BITS
    return np.where(hue < 0, hue + 180, hue), saturation, value


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """uint8 (…, 3) of what `to_hsv` gives, rounded."""
    top = value.astype(np.float32)
    fall = top * saturation.astype(np.float32) * np.float32(1 / 255)
    sector = hue.astype(np.float32) * np.float32(1 / 30)
    image = np.empty((*hue.shape, 3), np.uint8)
    for channel, start in enumerate((5, 3, 1)):
        place = (sector + start) % 6
        # A channel lies below the top by its distance from the two sectors of the circle that it leads.
        away = np.clip(np.minimum(place, 4 - place), 0, 1)
        image[..., channel] = np.rint(top - fall * away)
    return image


def _taps(old, new, part):
    """The two old pixels that each new pixel of `part` lies between, and the weight of the second."""
    place = np.clip((np.arange(part.start, part.stop) + 0.5) * (old / new) - 0.5, 0, old - 1)
    low = place.astype(int)
    return low, np.minimum(low + 1, old - 1), (place - low).astype(np.float32)


def _blend(first, second, weight):
    first = first.astype(np.float32)
    return first + weight * (second - first)


def _contrast(image, rng):
    return _table(image, rng.uniform(*_FACTOR), 0.0) if rng.random() < 0.5 else image


def _table(image, factor, offset):
    return _line(factor, offset).astype(np.uint8)[image]


def _line(factor, offset):
    """(256,) int: what becomes of each value."""
    return np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.int32)
