"""Segmentation probe: windows against a plain NumPy implementation, any size of image, any mesh, what is written."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from regvit_jax.data.dense_transforms import bilinear, short_size
from regvit_jax.data.sources import Source
from regvit_jax.evals.dense import STATISTICS
from regvit_jax.evals.pictures import class_colours
from regvit_jax.evals.segmentation import Segmentation
from regvit_jax.evals.segmentation_windows import View, merge_matrix, segment, window_starts
from regvit_jax.models.model import intermediate

pytestmark = pytest.mark.usefixtures("quick_to_compile")

IGNORE, CLASSES = 255, 4
COLOURS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40]])


def scene(seed, height, width):
    """A noisy picture of rectangles, a colour for each class, and its mask; the last column is to be ignored."""
    rng = np.random.default_rng(seed)
    mask = np.full((height, width), rng.integers(CLASSES), np.uint8)
    for _ in range(3):
        top, left = rng.integers(height), rng.integers(width)
        mask[top : top + height // 2, left : left + width // 2] = rng.integers(CLASSES)
    image = np.clip(COLOURS[mask] + rng.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)
    mask[:, -1] = IGNORE
    return {"image": image, "mask": mask}


class Scenes(Source):
    """Scenes of given sizes in memory; those of size None cannot be read."""

    mask_names = ("red", "green", "blue", "yellow")

    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        if self.sizes[index] is None:
            raise OSError("gone")
        return scene(index, *self.sizes[index])


@pytest.fixture
def make_pairs(tmp_path):
    """make_pairs("name", sizes) -> source string of PNG files on the disk; 10 classes are named, 4 are there."""

    def make(name, sizes, ignore_all=False, classes=10):
        for folder in ("images", "masks"):
            (tmp_path / name / folder).mkdir(parents=True)
        for i, size in enumerate(sizes):
            sample = scene(100 + i, *size)
            mask = np.full_like(sample["mask"], IGNORE) if ignore_all else sample["mask"]
            Image.fromarray(sample["image"]).save(tmp_path / name / "images" / f"{i:02}.png")
            Image.fromarray(mask).save(tmp_path / name / "masks" / f"{i:02}.png")
        return f"pairs:{tmp_path / name / 'images'},{tmp_path / name / 'masks'}?classes={classes}"

    return make


@pytest.fixture(scope="module")
def head(model):
    """Random, but for statistics that fit the features: otherwise one class would be everywhere."""
    rng = np.random.default_rng(1)
    seen = [normal(model, scene(seed, 24, 24)["image"]) for seed in range(8)]
    flat = np.concatenate([last_block(model, pixels).reshape(-1, 32) for pixels in seen])
    return {
        "bn": {"scale": rng.uniform(0.5, 2, 32).astype(np.float32), "bias": np.zeros(32, np.float32)},
        "conv": {"kernel": rng.normal(size=(32, CLASSES)).astype(np.float32), "bias": np.zeros(CLASSES, np.float32)},
        STATISTICS: {"mean": flat.mean(axis=0), "var": flat.var(axis=0)},
    }


def normal(model, pixels):
    spec = model.preprocessing
    return ((pixels / 255 - np.array(spec.mean)) / np.array(spec.std)).astype(np.float32)


def last_block(model, pixels):
    """(h, w, 32) of one normalised image."""
    (tokens,) = intermediate(model, jnp.asarray(pixels[None]), blocks=(-1,), norm=True)
    return np.asarray(tokens.map()[0])


# Windows


def test_windows_stand_where_mmsegmentation_puts_them():
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(853, 512, 341) == [0, 341] and window_starts(854, 512, 341) == [0, 341, 342]
    assert window_starts(20, 32, 21) == [0]


def test_a_merge_matrix_by_hand():
    """5 pixels, windows of 4 that are 1 apart, one patch each: the ends see one window, the middle the mean of two."""
    expected = [[1, 0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0, 1]]
    np.testing.assert_allclose(merge_matrix(5, 5, 4, 1, 4, "stretch"), expected)
    np.testing.assert_allclose(merge_matrix(1, 5, 4, 1, 4, "stretch"), [[0.5, 0.5]])


def upsampled(logits, size):
    """By Pillow, which does not antialias where it enlarges."""
    resized = [
        Image.fromarray(np.float32(channel)).resize(size[::-1], Image.Resampling.BILINEAR)
        for channel in np.moveaxis(logits, -1, 0)
    ]
    return np.stack([np.asarray(channel) for channel in resized], axis=-1)


def slow_logits(model, head, pixels, window, stride, padding, out):
    """(H, W, C) by the book: each window padded, run, resized, added; divided by the counts; resized."""
    height, width = pixels.shape[:2]
    high, wide = (min(window or n, n) for n in (height, width))
    total, count = np.zeros((height, width, CLASSES)), np.zeros((height, width, 1))
    patch = model.config.patch_size
    for top in window_starts(height, high, stride or height):
        for left in window_starts(width, wide, stride or width):
            part = np.s_[top : top + high, left : left + wide]
            gaps = [(-n % patch // 2, -n % patch - -n % patch // 2) for n in (high, wide)]
            padded = np.pad(normal(model, pixels[part]), [*gaps, (0, 0)])
            bn, conv, seen = head["bn"], head["conv"], head[STATISTICS]
            flat = (last_block(model, padded) - seen["mean"]) / np.sqrt(seen["var"] + 1e-5)
            logits = (flat * bn["scale"] + bn["bias"]) @ conv["kernel"] + conv["bias"]
            if padding == "stretch":
                logits = upsampled(logits, (high, wide))
            else:
                whole = upsampled(logits, padded.shape[:2])
                logits = whole[gaps[0][0] : gaps[0][0] + high, gaps[1][0] : gaps[1][0] + wide]
            total[part] += logits
            count[part] += 1
    return upsampled((total / count).astype(np.float32), out)


@pytest.mark.parametrize(("window", "stride", "padding"), [(20, 13, "stretch"), (20, 13, "crop"), (0, 0, "stretch")])
def test_it_is_the_slow_sliding_window(window, stride, padding, model, head, mesh):
    """20 pixels are padded to 24 = 3 patches. Images of 20 x 28, 20 x 20 and 33 x 20 after resizing, masks larger; the
    first one alone where the whole image is a window, which is compiled for each size."""
    source = Scenes(*((31, 44), (40, 40), (66, 40))[: 3 if window else 1])
    view = View(blocks=(1,), short_sides=(20,), flip=False, window=window, stride=stride, padding=padding)
    found = {one.index: one for one in segment(model, head, source, view, num_classes=CLASSES, batch_size=4, mesh=mesh)}
    assert sorted(found) == list(range(len(source)))
    for index, one in found.items():
        sample = source[index]
        pixels = bilinear(sample["image"], short_size(sample["mask"].shape, 20))
        np.testing.assert_array_equal(one.image, pixels)
        np.testing.assert_array_equal(one.truth, sample["mask"])
        expected = slow_logits(model, head, pixels, window, stride, padding, sample["mask"].shape)
        best = np.sort(expected, axis=-1)
        sure = best[..., -1] - best[..., -2] > 1e-3
        assert sure.mean() > 0.99 and len(np.unique(expected.argmax(-1))) > 1
        np.testing.assert_array_equal(one.predicted[sure], expected.argmax(-1)[sure])


def test_several_scales_and_the_mirror_image_share_their_probabilities(model, head, mesh):
    source = Scenes((31, 44))
    view = View(blocks=(1,), short_sides=(20, 30), flip=True, window=20, stride=13, padding="stretch")
    (one,) = segment(model, head, source, view, num_classes=CLASSES, batch_size=8, mesh=mesh)
    sample, total = source[0], 0
    for short in view.short_sides:
        pixels = bilinear(sample["image"], short_size((31, 44), short))
        straight = slow_logits(model, head, pixels, 20, 13, "stretch", (31, 44))
        mirrored = slow_logits(model, head, pixels[:, ::-1], 20, 13, "stretch", (31, 44))[:, ::-1]
        total = total + softmax(straight, axis=-1) + softmax(mirrored, axis=-1)
    best = np.sort(total, axis=-1)
    sure = best[..., -1] - best[..., -2] > 1e-3
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(one.predicted[sure], total.argmax(-1)[sure])


@pytest.mark.parametrize("window", [20, 0])
def test_neither_batch_nor_mesh_matters(window, model, head, mesh, mesh8, monkeypatch):
    """Four images of two sizes and one that cannot be read; in small batches, and few rows at once."""
    source = Scenes((31, 44), (20, 20), None, (20, 20), (31, 44))
    view = View(blocks=(1,), short_sides=(20,), flip=False, window=window, stride=13, padding="stretch")

    def predicted(where, batch_size):
        found = segment(model, head, source, view, num_classes=CLASSES, batch_size=batch_size, mesh=where)
        return {one.index: one.predicted for one in found}

    one = predicted(mesh, 4)
    monkeypatch.setattr("regvit_jax.evals.segmentation_windows._CHUNK", 1)
    eight = predicted(mesh8, 1)
    assert sorted(one) == sorted(eight) == [0, 1, 3, 4]
    for index, classes in one.items():
        assert classes.shape == source.sizes[index] and (eight[index] == classes).mean() > 0.998


# The evaluator

QUICK = dict(crop=32, steps=60, train_batch_size=8, batch_size=8, lr=0.01, ratio=(1.0, 1.5), pictures=3)


def test_it_learns_colours_writes_what_it_saw_and_goes_on_where_it_was_killed(
    model, mesh, make_pairs, killed, tmp_path, caplog
):
    caplog.set_level("INFO")
    train, test = make_pairs("train", [(40, 36)] * 12), make_pairs("test", [(40, 36), (30, 50), (64, 32), (33, 33)])
    probe = Segmentation(data=train, eval_data=test, **QUICK, save_every=12)
    with killed(after=20):
        dataclasses.replace(probe, flip=True).run(model, mesh=mesh, out_dir=tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["unfinished.npz"]
    got = probe.run(model, mesh=mesh, out_dir=tmp_path / "out")
    assert "segmentation probe: goes on after step 12 of 60" in caplog.text, "how it is measured does not matter"
    assert set(got) == {"miou", "macc", "aacc"} and got["aacc"] > 0.6 and got["miou"] > 0.4

    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["per_class.json", "predictions.png"]
    record = json.loads((tmp_path / "out" / "per_class.json").read_text())
    assert record["images"] == 4 and record["pixels"] == 40 * 35 + 30 * 49 + 64 * 31 + 33 * 32
    assert [one["name"] for one in record["classes"]] == [str(number) for number in range(10)]
    assert sum(one["pixels"] for one in record["classes"]) == record["pixels"]
    assert all(one["acc"] is None and one["pixels"] == 0 for one in record["classes"][4:])
    known = [one["iou"] for one in record["classes"] if one["iou"] is not None]
    assert np.mean(known) == pytest.approx(got["miou"])
    picture = np.asarray(Image.open(tmp_path / "out" / "predictions.png").convert("RGB")).astype(int)
    shown = [(np.abs(picture - colour).sum(axis=-1) < 6).sum() for colour in class_colours(4)]
    assert min(shown) > 500, "each class, in truth, prediction or legend"


def test_data_that_cannot_be_measured_on_is_refused(model, mesh, make_pairs, make_npz, tmp_path):
    good, empty = make_pairs("good", [(32, 32)] * 2), make_pairs("empty", [(32, 32)] * 2, ignore_all=True)
    other = make_pairs("other", [(32, 32)] * 2, classes=11)
    labelled = f"npz:{make_npz('a.npz', train=[0, 1])}"

    def run(**sources):
        Segmentation(**sources, **QUICK).run(model, mesh=mesh, out_dir=tmp_path)

    with pytest.raises(ValueError, match="empty.*every pixel of the masks is 255"):
        run(data=good, eval_data=empty)
    with pytest.raises(ValueError, match="a.npz.*has no masks.*scenes:"):
        run(data=labelled, eval_data=good)
    with pytest.raises(
        ValueError, match=r"\(10 and 11, the first that differs: class 10 is None in one, '10' in the other"
    ):
        run(data=good, eval_data=other)


def test_a_short_fit_beats_chance_on_scenes(model, mesh, tmp_path):
    """Chance is the most frequent class everywhere: .03 of 10 classes. Untrained features tell ground from wall."""
    scenes = "scenes:?n=48&n_test=16&size=32"
    probe = Segmentation(data=scenes, eval_data=f"{scenes}#test", **QUICK)
    got = probe.run(model, mesh=mesh, out_dir=tmp_path)
    pixels = [one["pixels"] for one in json.loads((tmp_path / "per_class.json").read_text())["classes"]]
    most = max(pixels) / sum(pixels)
    assert got["miou"] > 3 * most / 10 and got["aacc"] > most


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(mode="tile"), "mode must be one of slide, whole"),
        (dict(padding="zero"), "padding must be one of stretch, crop"),
        (dict(loss_mean="some"), "loss_mean must be one of all, known"),
        (dict(blocks=()), "blocks must be one block or more"),
        (dict(ratio=(2.0, 0.5)), "ratio must be two positive numbers"),
        (dict(scales=(1.0, 0.0)), "scales must be one or more positive"),
        (dict(cat_max_ratio=0.0), "cat_max_ratio must be a share"),
        (dict(crop=10, stride=11), "stride must be at most crop"),
        (dict(steps=0), "steps must be above 0"),
        (dict(betas=(0.9,)), "betas must be two"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Segmentation(**options)
