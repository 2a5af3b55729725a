"""Multi-crop augmentation on the accelerator: two global and several local crops of every image, inside jit.

The host decodes an image once and squashes it to the square that all images of a batch share; boxes are drawn in the
pixels of the original, so their area and aspect ratio are those of the usual host augmentation, and then mapped.
Values are rounded to whole numbers after every operation, as they are where PIL images go from one to the next: with
the same random choices crops differ from those of `multicrop_host` by a level here and there.
"""

import math

import jax
import jax.numpy as jnp

from regvit_jax.data.augment import normalize
from regvit_jax.data.multicrop_spec import CropKind, MultiCrop, View
from regvit_jax.data.pixel_ops import (
    color_jitter,
    crop_resize,
    gaussian_blur,
    grayscale,
    interleaved,
    pillow_blur,
    planar,
    solarize,
)
from regvit_jax.sharding import BATCH, constrain
from regvit_jax.trees import Array

TRIES = 10  # boxes that are drawn for a crop before its fallback
# Uniform random numbers of one crop: area and aspect ratio of each try, the box's place, then one for each choice.
_DRAWS = {"area": TRIES, "aspect": TRIES, "place": 2, "flip": 1, "factors": 4, "jitter": 1, "order": 4, "gray": 1}
_DRAWS |= {"blur": 1, "sigma": 1, "solarize": 1}


def multi_crop(
    key: Array, images: Array, sizes: Array, spec: MultiCrop, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Array]:
    """All crops of a batch. Every example's draws depend on `key` and its place in the global batch alone.

    One crop of all images is made at a time, so what is in memory meanwhile is a few times the size of that.

    Args:
      images: (B, H, W, 3) uint8, each squashed to the same height and width.
      sizes: (B, 2) int, the (height, width) that each had before.
      mean, std: of the three channels, of values in [0, 1].

    Returns:
      {"global": (B, 2, Sg, Sg, 3), "local": (B, local_crops, Sl, Sl, 3)}, float32, normalised.
    """
    images, views = constrain(planar(images), BATCH), draw_views(key, sizes, spec)
    crops = {}
    for name, kinds in (("global", spec.kinds[:2]), ("local", spec.kinds[2:])):
        if not kinds:
            crops[name] = jnp.zeros((len(images), 0, spec.local_size, spec.local_size, 3), jnp.float32)
            continue

        def one(views, kinds=kinds):
            rendered = jax.vmap(lambda *example: render(*example, spec, kinds))(images, sizes, views)
            return constrain(interleaved(rendered), BATCH)

        part = slice(0, 2) if name == "global" else slice(2, None)
        pixels = constrain(jax.lax.map(one, jax.tree.map(lambda x, part=part: x[part], views)), None, BATCH)
        crops[name] = normalize(constrain(jnp.swapaxes(pixels, 0, 1), BATCH), mean, std)
    return crops


def draw_views(key: Array, sizes: Array, spec: MultiCrop) -> View:
    """The random choices of the crops of B images of `sizes` (B, 2): leading axes (2 + local_crops, B)."""
    kinds = spec.kinds
    uniforms = jax.random.uniform(key, (len(kinds), len(sizes), sum(_DRAWS.values())))
    scale, blur, solar = (jnp.array(v, jnp.float32) for v in zip(*(kind[1:] for kind in kinds), strict=True))

    def one(uniforms, size, scale, blur, solar):
        return view_of(uniforms, size, spec, scale, blur, solar)

    of_batch = jax.vmap(one, in_axes=(0, 0, None, None, None))
    views = jax.vmap(of_batch, in_axes=(0, None, 0, 0, 0))(constrain(uniforms, None, BATCH), sizes, scale, blur, solar)
    return jax.tree.map(lambda x: constrain(x, None, BATCH), views)


def view_of(uniforms: Array, size: Array, spec: MultiCrop, scale: Array, blur: Array, solar: Array) -> View:
    """One crop's choices, of its uniform random numbers (36,), the image's `size` (height, width), the range of its
    `scale` (2,) and its probabilities of blur and solarize."""
    u, start = {}, 0
    for name, count in _DRAWS.items():
        u[name] = uniforms[start : start + count] if count > 1 else uniforms[start]
        start += count
    low, high = (jnp.array(bounds, jnp.float32) for bounds in zip(*spec.factor_ranges, strict=True))
    neutral = jnp.array([1.0, 1.0, 1.0, 0.0])
    return View(
        box=crop_box(u["area"], u["aspect"], u["place"], size, scale, spec.ratio),
        flip=u["flip"] < spec.flip,
        factors=jnp.where(u["jitter"] < spec.jitter, low + u["factors"] * (high - low), neutral),
        order=_ranks(u["order"]),
        gray=u["gray"] < spec.gray,
        sigma=jnp.where(u["blur"] < blur, spec.sigma[0] + u["sigma"] * (spec.sigma[1] - spec.sigma[0]), 0.0),
        solarize=u["solarize"] < solar,
    )


def crop_box(area: Array, aspect: Array, place: Array, size: Array, scale: Array, ratio: tuple[float, float]) -> Array:
    """(4,) float32 top, left, height, width, whole pixels of an image of `size`: the rule of
    `transforms.random_crop_box`.

    Args:
      area, aspect: (TRIES,) in [0, 1), of the share of the area and of the logarithm of width / height of each try.
      place: (2,) in [0, 1), of the top and left edges.
    """
    full_height, full_width = size[0].astype(jnp.float32), size[1].astype(jnp.float32)
    pixels = full_height * full_width * (scale[0] + area * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = jnp.exp(low + aspect * (high - low))
    widths, heights = jnp.round(jnp.sqrt(pixels * shape)), jnp.round(jnp.sqrt(pixels / shape))
    fits = (widths > 0) & (widths <= full_width) & (heights > 0) & (heights <= full_height)
    first = jnp.argmax(fits)
    corner = [
        jnp.minimum(jnp.floor(place[axis] * (full - drawn[first] + 1)), full - drawn[first])
        for axis, full, drawn in ((0, full_height, heights), (1, full_width, widths))
    ]
    box = jnp.stack([*corner, heights[first], widths[first]])
    # None of the tries fits: the largest part in the centre whose aspect ratio is in the range.
    height = jnp.clip(jnp.round(full_width / ratio[0]), 1.0, full_height)
    width = jnp.clip(jnp.round(full_height * ratio[1]), 1.0, full_width)
    height = jnp.where(full_width / full_height < ratio[0], height, full_height)
    width = jnp.where(full_width / full_height > ratio[1], width, full_width)
    top, left = jnp.floor((full_height - height) / 2), jnp.floor((full_width - width) / 2)
    return jnp.where(fits.any(), box, jnp.stack([top, left, height, width]))


def render(image: Array, size: Array, view: View, spec: MultiCrop, kinds: tuple[CropKind, ...]) -> Array:
    """(S, 3, S): the crop of one image (H, 3, W) that was of `size` that `view` describes.

    What no crop of `kinds` ever undergoes is not computed.
    """
    scale = jnp.array([image.shape[0], image.shape[2]], jnp.float32) / size
    crop = crop_resize(image, view.box * jnp.tile(scale, 2), kinds[0].size, view.flip, spec.interpolation)
    if spec.jitter > 0:
        crop = color_jitter(crop, view.factors, view.order)
    if spec.gray > 0:
        crop = jnp.where(view.gray, grayscale(crop), crop)
    if any(kind.blur > 0 for kind in kinds):
        pillow = spec.blur_kind == "pillow"
        crop = pillow_blur(crop, view.sigma, spec.sigma[1]) if pillow else gaussian_blur(crop, view.sigma)
    if any(kind.solarize > 0 for kind in kinds):
        crop = jnp.where(view.solarize, solarize(crop, spec.threshold), crop)
    return crop


def _ranks(values):
    """The place of each of (n,) numbers in their order: a random permutation of independent ones, without a sort."""
    n = jnp.arange(len(values))
    before = (values < values[:, None]) | ((values == values[:, None]) & (n < n[:, None]))
    return before.sum(1)
