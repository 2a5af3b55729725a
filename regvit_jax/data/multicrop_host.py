"""Multi-crop augmentation on the host with Pillow, and the squashed square that the accelerator makes crops of.

What torchvision does to PIL images in the reference's code. Data workers import this, so it imports no JAX.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from regvit_jax.data.decode import decode
from regvit_jax.data.multicrop_spec import BRIGHTNESS, CONTRAST, HUE, SATURATION, CropKind, MultiCrop, View
from regvit_jax.data.transforms import INTERPOLATION, random_crop_box, resize

_ENHANCE = {
    BRIGHTNESS: ImageEnhance.Brightness,
    CONTRAST: ImageEnhance.Contrast,
    SATURATION: ImageEnhance.Color,
}


@dataclasses.dataclass(frozen=True)
class MultiCropTransform:
    """Sample -> {"global": uint8 (2, Sg, Sg, 3), "local": uint8 (local_crops, Sl, Sl, 3), "label": int32}."""

    spec: MultiCrop

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, spec = decode(sample["image"]), self.spec
        views = [draw_view(rng, *image.shape[:2], spec, kind) for kind in spec.kinds]
        crops = [render(image, view, spec, kind) for view, kind in zip(views, spec.kinds, strict=True)]
        none = np.zeros((0, spec.local_size, spec.local_size, 3), np.uint8)
        return {
            "global": np.stack(crops[:2]),
            "local": np.stack(crops[2:]) if spec.local_crops else none,
            "label": np.int32(sample.get("label", -1)),
        }


@dataclasses.dataclass(frozen=True)
class SquareTransform:
    """Sample -> {"image": uint8 (size, size, 3), "size": int32 (2,), "label": int32}: the whole image, squashed to a
    square, and the height and width that it had; what `multicrop.multi_crop` takes.

    What `size` loses no crop has again: of photos of 480 pixels, 256 leaves the crops of 224 about 85 % of the
    sharpness that they have on the host, 320 91 % and 448 96 %; memory and the time of the crops grow with it.
    """

    size: int
    interpolation: str = "bicubic"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.interpolation not in INTERPOLATION:
            raise ValueError(f"interpolation is one of {', '.join(INTERPOLATION)}, not {self.interpolation!r}")

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        image = decode(sample["image"])
        return {
            "image": resize(image, self.size, self.size, self.interpolation),
            "size": np.array(image.shape[:2], np.int32),
            "label": np.int32(sample.get("label", -1)),
        }


def draw_view(rng: np.random.Generator, height: int, width: int, spec: MultiCrop, kind: CropKind) -> View:
    """The random choices of one crop of an image of height x width pixels."""
    box = random_crop_box(height, width, rng, kind.scale, spec.ratio)
    jittered = rng.random() < spec.jitter
    factors = [rng.uniform(low, high) if jittered else neutral for (low, high), neutral in _with_neutral(spec)]
    return View(
        box=np.array(box, np.float32),
        flip=rng.random() < spec.flip,
        factors=np.array(factors, np.float32),
        order=rng.permutation(4),
        gray=rng.random() < spec.gray,
        sigma=np.float32(rng.uniform(*spec.sigma) if rng.random() < kind.blur else 0.0),
        solarize=rng.random() < kind.solarize,
    )


def render(image: np.ndarray, view: View, spec: MultiCrop, kind: CropKind) -> np.ndarray:
    """uint8 (S, S, 3): the crop of `image`, uint8 (H, W, 3), that `view` describes."""
    top, left, height, width = (int(edge) for edge in view.box)
    part = image[top : top + height, left : left + width]
    crop = Image.fromarray(resize(part, kind.size, kind.size, spec.interpolation))
    if view.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    crop = color_jitter(crop, view.factors, view.order)
    if view.gray:
        crop = ImageOps.grayscale(crop).convert("RGB")
    if view.sigma > 0:
        pillow = spec.blur_kind == "pillow"
        crop = crop.filter(ImageFilter.GaussianBlur(float(view.sigma))) if pillow else gaussian_blur(crop, view.sigma)
    if view.solarize:
        crop = ImageOps.solarize(crop, spec.threshold)
    return np.asarray(crop)


def color_jitter(image: Image.Image, factors: np.ndarray, order: np.ndarray) -> Image.Image:
    """Brightness, contrast, saturation and hue changed by `factors` (4,), in the `order` (4,) of their places there."""
    for what in map(int, order):
        factor = float(factors[what])
        if what == HUE:
            image = turn_hue(image, factor)
        elif factor != 1:
            image = _ENHANCE[what](image).enhance(factor)
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Hue moved by `turn` in [-0.5, 0.5] of the circle, in the 8 bits of Pillow's HSV; 0 leaves all as it is."""
    if turn == 0:
        return image
    hue, saturation, value = image.convert("HSV").split()
    # Cut off toward 0, then around the circle, as torchvision does it.
    turned = (np.asarray(hue, np.int32) + int(turn * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


def gaussian_blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blurred with a 9 x 9 Gaussian, the mirror image beyond the border."""
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2).astype(np.float32)
    taps /= taps.sum()
    pixels = np.asarray(image, np.float32)
    for axis in (0, 1):
        length = pixels.shape[axis]
        padded = np.pad(pixels, [(4, 4) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        parts = (padded[k : k + length] if axis == 0 else padded[:, k : k + length] for k in range(9))
        pixels = sum(tap * part for tap, part in zip(taps, parts, strict=True))
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _with_neutral(spec):
    return zip(spec.factor_ranges, (1.0, 1.0, 1.0, 0.0), strict=True)
