"""The description of multi-crop, its host transform, and the squashed square."""

import dataclasses
import json
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import PIL
import pytest
import scipy.stats
from PIL import Image, ImageFilter

from regvit_jax.data import multicrop_host
from regvit_jax.data.loader import train_batches
from regvit_jax.data.multicrop_host import MultiCropTransform, SquareTransform
from regvit_jax.data.multicrop_spec import MultiCrop, View
from regvit_jax.data.sources import open_source
from regvit_jax.data.transforms import resize

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "torchvision_colors.npz"
SPEC = MultiCrop(global_size=16, local_size=8, local_crops=2)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def view(**changed):
    """Everything of a 20 x 30 image, unchanged."""
    neutral = View(np.float32([0, 0, 20, 30]), False, np.float32([1, 1, 1, 0]), np.arange(4), False, 0.0, False)
    return neutral._replace(**changed)


def test_the_defaults_are_those_of_dinov2():
    spec = MultiCrop()
    assert [kind.size for kind in spec.kinds] == [224] * 2 + [98] * 8
    assert [kind.blur for kind in spec.kinds] == [0.0, 0.9] + [0.5] * 8
    assert [kind.solarize for kind in spec.kinds] == [0.0, 0.2] + [0.0] * 8
    assert {kind.scale for kind in spec.kinds} == {(0.32, 1.0), (0.05, 0.32)}
    np.testing.assert_allclose(spec.factor_ranges, [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)])
    # Brightness cannot be negative.
    assert MultiCrop(brightness=1.5).factor_ranges[0] == (0.0, 2.5)


def test_a_spec_survives_json_and_is_hashable():
    spec = MultiCrop(local_scale=[0.1, 0.3], blur=(1, 0, 0))
    restored = MultiCrop(**json.loads(json.dumps(dataclasses.asdict(spec))))
    assert restored == spec and hash(restored) == hash(spec) and spec.local_scale == (0.1, 0.3)
    assert all(field.metadata["doc"] for field in dataclasses.fields(MultiCrop))


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_size": 4},  # less than the mirror image of a 9 x 9 blur needs
        {"local_size": 0},
        {"local_crops": -1},
        {"global_scale": (0.5, 1.1)},
        {"local_scale": (0.3, 0.1)},
        {"local_scale": (0.0, 0.3)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (1.0,)},
        {"interpolation": "lanczos"},
        {"flip": 1.5},
        {"solarize": -0.1},
        {"contrast": -0.4},
        {"hue": 0.6},
        {"blur": (0.5, 0.5)},
        {"blur": (0.0, 0.9, 5.0)},
        {"blur_kind": "box"},
        {"sigma": (0.0, 2.0)},
        {"threshold": 300},
    ],
)
def test_what_no_crop_can_have_is_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"multi-crop: {name}=.* must be "):
        MultiCrop(**wrong)


def test_tiny_crops_without_blur_are_none_too_small():
    assert MultiCrop(local_size=4, global_size=4, blur=(0, 0, 0)).kinds[2].size == 4
    assert MultiCrop(local_size=4, global_size=4, blur_kind="pillow").kinds[2].size == 4


def test_colours_and_blur_are_those_of_torchvision():
    """Recorded by tests/golden/torchvision_colors.py. Exactly, where Pillow is the one that it was recorded with."""
    golden = np.load(GOLDEN)
    image, one_level = Image.fromarray(golden["image"]), str(golden["pillow"]) != PIL.__version__
    for key in golden.files:
        name, _, value = key.partition("/")
        if name in ("brightness", "contrast", "saturation", "hue"):
            place = ("brightness", "contrast", "saturation", "hue").index(name)
            factors = np.float32([1, 1, 1, 0])
            factors[place] = value
            ours = multicrop_host.color_jitter(image, factors, np.arange(4))
        elif name == "blur":
            ours = multicrop_host.gaussian_blur(image, float(value))
        else:
            continue
        difference = np.abs(np.asarray(ours, int) - golden[key])
        assert difference.max() <= one_level, key


def test_every_choice_of_a_view_is_made():
    image, kind = noise(20, 30), SPEC.kinds[0]
    plain = multicrop_host.render(image, view(), SPEC, kind)
    np.testing.assert_array_equal(plain, resize(image, 16, 16))
    part = multicrop_host.render(image, view(box=np.float32([2, 5, 16, 16])), SPEC, kind)
    np.testing.assert_array_equal(part, image[2:18, 5:21])
    flipped = multicrop_host.render(image, view(flip=True), SPEC, kind)
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
    gray = multicrop_host.render(image, view(gray=True), SPEC, kind)
    np.testing.assert_allclose(gray, np.repeat(plain @ [[0.299], [0.587], [0.114]], 3, -1), atol=0.51)
    solarized = multicrop_host.render(image, view(solarize=True), SPEC, kind)
    np.testing.assert_array_equal(solarized, np.where(plain < 128, plain, 255 - plain))
    # Blurred first, solarized then; by either kind of blur.
    for blur_kind, blur in (
        ("gaussian9", multicrop_host.gaussian_blur),
        ("pillow", lambda pixels, sigma: pixels.filter(ImageFilter.GaussianBlur(sigma))),
    ):
        spec = dataclasses.replace(SPEC, blur_kind=blur_kind)
        blurred = np.asarray(blur(Image.fromarray(plain), 1.5))
        ours = multicrop_host.render(image, view(sigma=1.5, solarize=True), spec, kind)
        np.testing.assert_array_equal(ours, np.where(blurred < 128, blurred, 255 - blurred))
        assert np.abs(blurred.astype(int) - plain).mean() > 10
    # The order decides: to the mean and then half as bright, or half as bright and then to that mean.
    for order in ([0, 1, 2, 3], [1, 0, 2, 3]):
        changed = multicrop_host.render(image, view(factors=np.float32([0.5, 0, 1, 0]), order=order), SPEC, kind)
        assert np.ptp(changed) == 0


def test_draws_have_the_stated_probabilities():
    rng, n = np.random.default_rng(0), 2000
    for kind, blur, solarize in ((SPEC.kinds[0], 0.0, 0.0), (SPEC.kinds[1], 0.9, 0.2), (SPEC.kinds[2], 0.5, 0.0)):
        views = [multicrop_host.draw_view(rng, 60, 90, SPEC, kind) for _ in range(n)]
        drawn = View(*(np.stack(field) for field in zip(*views, strict=True)))
        jittered = drawn.factors[:, 0] != 1
        for values, probability in (
            (drawn.flip, 0.5), (drawn.gray, 0.2), (jittered, 0.8), (drawn.sigma > 0, blur), (drawn.solarize, solarize)
        ):  # fmt: skip
            # 5 standard deviations.
            assert abs(values.mean() - probability) <= 5 * (probability * (1 - probability) / n) ** 0.5
        for place, (low, high) in enumerate(SPEC.factor_ranges):
            uniform = scipy.stats.uniform(low, high - low)
            assert scipy.stats.kstest(drawn.factors[jittered, place], uniform.cdf).pvalue > 1e-4
        _, counts = np.unique(drawn.order @ [64, 16, 4, 1], return_counts=True)
        assert len(counts) == 24 and scipy.stats.chisquare(counts).pvalue > 1e-4


def test_the_transform_gives_fixed_shapes_and_depends_on_its_generator_alone():
    transform = pickle.loads(pickle.dumps(MultiCropTransform(SPEC)))
    for height, width in ((40, 30), (7, 50), (16, 16), (1, 1)):
        sample = {"image": noise(height, width), "label": 3, "caption": "x"}
        first, again, other = (transform(sample, np.random.default_rng(seed)) for seed in (0, 0, 1))
        assert first.keys() == {"global", "local", "label"} and first["label"] == 3
        assert first["global"].shape == (2, 16, 16, 3) and first["local"].shape == (2, 8, 8, 3)
        assert first["global"].dtype == first["local"].dtype == np.uint8 and first["label"].dtype == np.int32
        np.testing.assert_array_equal(first["global"], again["global"])
        assert height == 1 or (first["global"] != other["global"]).any()
    none = MultiCropTransform(dataclasses.replace(SPEC, local_crops=0))(
        {"image": noise(9, 9)}, np.random.default_rng(0)
    )
    assert none["local"].shape == (0, 8, 8, 3) and none["label"] == -1


def test_the_square_keeps_the_size_that_the_image_had():
    image = noise(20, 30)
    sample = SquareTransform(16)({"image": image, "label": 2, "caption": "x"}, None)
    assert sample.keys() == {"image", "size", "label"} and sample["label"] == 2
    np.testing.assert_array_equal(sample["image"], Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(sample["size"], [20, 30])
    assert sample["size"].dtype == np.int32 and sample["image"].dtype == np.uint8
    np.testing.assert_array_equal(SquareTransform(20)({"image": image[:, :20]}, None)["image"], image[:, :20])
    with pytest.raises(ValueError, match="size must be at least 1"):
        SquareTransform(0)
    with pytest.raises(ValueError, match="interpolation is one of"):
        SquareTransform(8, "cubic")


def test_batches_of_both_come_from_the_loader(tmp_path):
    for number in range(5):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(noise(12 + number, 18, number)).save(tmp_path / "a" / f"{number}.png")
    source = open_source(f"folder:{tmp_path}")
    for transform, shapes in (
        (MultiCropTransform(SPEC), {"global": (4, 2, 16, 16, 3), "local": (4, 2, 8, 8, 3), "label": (4,)}),
        (SquareTransform(10), {"image": (4, 10, 10, 3), "size": (4, 2), "label": (4,)}),
    ):
        batch = next(train_batches(source, transform, seed=0, batch_size=4, start_step=0))
        assert {name: batch[name].shape for name in shapes} == shapes


def test_workers_need_no_jax():
    code = "import sys, regvit_jax.data.multicrop_host; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
