"""Multi-crop on the accelerator: boxes by the host's rule, probabilities as stated, pixels of the host's crops, on any
mesh."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from regvit_jax import sharding
from regvit_jax.data import multicrop, multicrop_host
from regvit_jax.data.multicrop_spec import MultiCrop, View
from regvit_jax.data.pixel_ops import interleaved, planar
from regvit_jax.data.transforms import random_crop_box
from regvit_jax.sharding import jit_once

SPEC = MultiCrop(global_size=24, local_size=12, local_crops=3)
SIDE, BATCH = 48, 240
MEAN, STD = (0.0, 0.5, 0.5), (1.0, 1.0, 0.25)


def photo(height, width, seed=0):
    """Smooth colours over all of 0 … 255, some of them white and black."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    blurred = scipy.ndimage.gaussian_filter(noise, (height / 12, width / 12, 0))
    return np.clip(blurred / blurred.std() * 60 + 128, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def compiled():
    return jit_once(lambda key, images, sizes: multicrop.multi_crop(key, images, sizes, SPEC, MEAN, STD))


@pytest.fixture(scope="module")
def batch():
    """One image, so that crops differ by their draws alone."""
    return np.tile(photo(SIDE, SIDE), (BATCH, 1, 1, 1)), np.full((BATCH, 2), SIDE, np.int32)


@pytest.fixture(scope="module")
def crops(compiled, batch):
    """What the device makes of the batch, mean and standard deviation undone."""
    done = compiled(jax.random.key(3), *batch)
    return {name: np.asarray(values) * np.float32(STD) + np.float32(MEAN) for name, values in done.items()}


@pytest.fixture(scope="module")
def views():
    """3,000 draws of each crop of an image of 60 x 90 pixels."""
    sizes = jnp.tile(jnp.array([60, 90]), (3000, 1))
    return jax.tree.map(np.asarray, jit_once(lambda key: multicrop.draw_views(key, sizes, SPEC))(jax.random.key(0)))


def test_boxes_follow_the_rule_of_the_host():
    class Recorded:
        """Hands `random_crop_box` the numbers that the device gets."""

        def __init__(self, area, aspect, place):
            self.tries, self.place = itertools.chain(*zip(area, aspect, strict=True)), iter(place)

        def uniform(self, low, high):
            return low + float(next(self.tries)) * (high - low)

        def integers(self, high):
            return int(float(next(self.place)) * high)

    rng = np.random.default_rng(0)
    sizes, ratio = rng.integers(1, 300, (600, 2)), (3 / 4, 4 / 3)
    low = rng.uniform(0.05, 1, 600)
    scales = np.stack([low, rng.uniform(low, 1)], -1).astype(np.float32)
    area, aspect = rng.random((2, 600, multicrop.TRIES), np.float32)
    place = rng.random((600, 2), np.float32)
    ours = jit_once(jax.vmap(lambda *row: multicrop.crop_box(*row, ratio)))(area, aspect, place, sizes, scales)
    theirs, fallbacks = [], 0
    for index, (height, width) in enumerate(sizes.tolist()):
        recorded = Recorded(area[index], aspect[index], place[index])
        theirs.append(random_crop_box(height, width, recorded, tuple(scales[index].tolist()), ratio))
        fallbacks += next(recorded.place, None) == place[index, 0]
    difference = np.abs(np.asarray(ours) - np.array(theirs)).max(1)
    # float32 may round a half, or a try that just fits, otherwise than the float64 of the host.
    assert (difference > 0).mean() < 0.01
    assert 10 < fallbacks < 590


@pytest.mark.parametrize(
    ("crop", "scale", "blur", "solarize"),
    [(0, (0.32, 1.0), 0.0, 0.0), (1, (0.32, 1.0), 0.9, 0.2), (2, (0.05, 0.32), 0.5, 0.0), (4, (0.05, 0.32), 0.5, 0.0)],
)
def test_a_crop_is_drawn_as_the_recipe_says(views, crop, scale, blur, solarize):
    view = View(*(field[crop] for field in views))
    n = len(view.flip)

    def share(values, probability):
        # 5 standard deviations.
        assert abs(values.mean() - probability) <= 5 * math.sqrt(probability * (1 - probability) / n)

    share(view.flip, 0.5)
    share(view.gray, 0.2)
    share(view.sigma > 0, blur)
    share(view.solarize, solarize)
    jittered = (view.factors != [1, 1, 1, 0]).any(1)
    share(jittered, 0.8)
    for place, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        ks = scipy.stats.kstest(view.factors[jittered, place], scipy.stats.uniform(low, high - low).cdf)
        assert ks.pvalue > 1e-4
    if blur:
        assert scipy.stats.kstest(view.sigma[view.sigma > 0], scipy.stats.uniform(0.1, 1.9).cdf).pvalue > 1e-4
    # Every order of the four operations is as frequent as any other.
    _, counts = np.unique(view.order @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24 and scipy.stats.chisquare(counts).pvalue > 1e-4
    # Boxes have the area and the shape of the host's, which are whole pixels too.
    rng = np.random.default_rng(crop)
    host = np.array([random_crop_box(60, 90, rng, scale, SPEC.ratio) for _ in range(n)])
    for of in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        *(lambda b, i=i: b[:, i] for i in (0, 1)),
    ):
        assert scipy.stats.ks_2samp(of(view.box), of(host)).pvalue > 1e-4


def test_draws_of_different_crops_are_independent(views):
    flips = views.flip.reshape(5, -1).astype(float)
    # 10 pairs of 3,000 coins each: 5 standard deviations.
    assert np.abs(np.corrcoef(flips)[np.triu_indices(5, 1)]).max() < 5 / math.sqrt(3000)


def test_crops_are_those_of_the_host_for_the_same_choices():
    image, size, kind = photo(SIDE, SIDE, seed=1), jnp.array([SIDE, SIDE]), SPEC.kinds[1]
    rng = np.random.default_rng(0)
    views = [multicrop_host.draw_view(rng, SIDE, SIDE, SPEC, kind) for _ in range(120)]
    stacked = View(*(np.stack(field) for field in zip(*views, strict=True)))
    ours = jit_once(jax.vmap(lambda view: multicrop.render(planar(image), size, view, SPEC, (kind,))))(stacked)
    theirs = np.stack([multicrop_host.render(image, view, SPEC, kind) for view in views])
    difference = np.abs(np.asarray(interleaved(ours)).astype(int) - theirs)
    # Rarely a rounding before it moves a pixel to the next of the 255 hues, or over the threshold of solarize.
    assert np.median(difference.max((1, 2, 3))) <= 2 and (difference > 2).mean() < 0.003 and difference.mean() < 0.1


def test_crops_of_a_squashed_image_are_those_of_the_original():
    image = photo(72, 40, seed=2)
    square = multicrop_host.SquareTransform(SIDE)({"image": image}, None)
    kind = SPEC.kinds[2]
    plain = MultiCrop(24, 12, 1, jitter=0.0, gray=0.0, blur=(0.0, 0.0, 0.0))
    rng = np.random.default_rng(0)
    views = [multicrop_host.draw_view(rng, 72, 40, plain, plain.kinds[2]) for _ in range(40)]
    stacked = View(*(np.stack(field) for field in zip(*views, strict=True)))
    pixels = planar(square["image"])
    one = jax.vmap(lambda view: multicrop.render(pixels, jnp.asarray(square["size"]), view, plain, plain.kinds[2:]))
    ours = np.asarray(interleaved(jit_once(one)(stacked))).astype(int)
    theirs = np.stack([multicrop_host.render(image, view, plain, kind) for view in views])
    assert np.abs(ours - theirs).mean() < 1.0
    # With the sides taken for one another it would not be so.
    assert np.abs(ours.transpose(0, 2, 1, 3) - theirs).mean() > 10


def test_what_comes_out(crops):
    assert crops["global"].shape == (BATCH, 2, 24, 24, 3) and crops["local"].shape == (BATCH, 3, 12, 12, 3)
    for values in crops.values():
        # Undone, mean and standard deviation leave bytes in [0, 1].
        assert values.dtype == np.float32 and np.abs(values * 255 - np.round(values * 255)).max() < 1e-3
        assert 0 <= values.min() + 1e-5 and values.max() - 1e-5 <= 1
        # No two are alike but those of nothing but black or white.
        assert len(np.unique(values.reshape(-1, values[0, 0].size), axis=0)) > 0.99 * values.shape[0] * values.shape[1]


def test_host_and_device_agree_in_distribution(crops, batch):
    """Statistics of single crops over 240 draws from one image on either side, by Kolmogorov-Smirnov tests."""
    image, transform = batch[0][0], multicrop_host.MultiCropTransform(SPEC)
    host = [transform({"image": image}, np.random.default_rng((0, n))) for n in range(BATCH)]
    statistics = {
        "mean": lambda x: x.mean((1, 2, 3)),
        "deviation": lambda x: x.std((1, 2, 3)),
        "colourfulness": lambda x: x.std(3).mean((1, 2)),
        "sharpness": lambda x: np.abs(np.diff(x, axis=2)).mean((1, 2, 3)),
        "median": lambda x: np.median(x, (1, 2, 3)),
        "high": lambda x: np.quantile(x, 0.95, (1, 2, 3)),
        "low": lambda x: np.quantile(x, 0.05, (1, 2, 3)),
    }
    for name, place in (("global", 0), ("global", 1), ("local", 0), ("local", 2)):
        ours = np.round(crops[name][:, place] * 255) / 255
        theirs = np.stack([sample[name][place] for sample in host]) / 255
        for statistic, of in statistics.items():
            assert scipy.stats.ks_2samp(of(ours), of(theirs)).pvalue > 1e-4, (name, place, statistic)
    # The test sees a difference where there is one: the first global crop is never blurred, the second is.
    first, second = (statistics["sharpness"](crops["global"][:, place]) for place in (0, 1))
    assert scipy.stats.ks_2samp(first, second).pvalue < 1e-6


def test_the_mesh_changes_nothing_and_no_image_moves(crops, batch):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    with jax.set_mesh(mesh):
        put = sharding.put(dict(zip(("image", "size"), batch, strict=True)), mesh)
        step = jit_once(lambda key, x, s: multicrop.multi_crop(key, x, s, SPEC, MEAN, STD))
        step = step.lower(jax.random.key(3), put["image"], put["size"]).compile()
        spread = step(jax.random.key(3), put["image"], put["size"])
    for name, values in spread.items():
        assert values.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 5)
        difference = np.abs(np.asarray(values) * np.float32(STD) + np.float32(MEAN) - crops[name]) * 255
        # A product of other shape may sum in another order, and a half then rounds to the other side.
        assert difference.max() < 8 and (difference > 0.5).mean() < 1e-3
    text = step.as_text()
    assert re.findall(r"= \S+ (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)\S*\(", text) == []
    # Each device makes the crops of its own 30 images.
    assert "f32[30,24,3,24]" in text and "[240,24,3,24]" not in text


def test_without_local_crops_or_any_change_of_colour():
    spec = MultiCrop(8, 8, 0, (1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0, blur=(0, 0, 0), solarize=0)
    images = np.stack([photo(8, 8, seed) for seed in range(2)])
    crops = jax.jit(
        lambda x: multicrop.multi_crop(jax.random.key(0), x, jnp.full((2, 2), 8), spec, (0,) * 3, (1,) * 3)
    )(images)
    assert crops["local"].shape == (2, 0, 8, 8, 3)
    for crop in range(2):
        np.testing.assert_allclose(crops["global"][:, crop], images / 255.0, atol=1e-6)
