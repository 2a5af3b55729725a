"""Depth probe: what it learns and reports, images that measure nothing, mirrors, sizes, meshes, and its choices."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

from regvit_jax import evaluate
from regvit_jax.data import sources
from regvit_jax.evals import get
from regvit_jax.evals.dense import dense_features
from regvit_jax.evals.depth import NYUD, Depth
from regvit_jax.evals.depth_head import BINS, ProbeLoss, output_matrices, read_depth
from regvit_jax.evals.depth_measure import Picked, Readout, measure, survey

pytestmark = pytest.mark.usefixtures("quick_to_compile")

QUICK = dict(lr=(2e-2,), steps=40, train_batch_size=8, batch_size=6, warmup=0.2, rotate=0.0, color=0.0)
READOUT = Readout(blocks=(0, 1), cls=False, ends=(0.001, 10.0))


class Walls(sources.Source):
    """A tilted wall, 1 to 9 m away, the brighter the farther. A fifth of the depth is unknown."""

    splits = ("train", "test")

    def __init__(self, n=24, seed=0, unknown=(), sizes=((32, 40),), mirrored=False):
        self.n, self.sizes, self.seed, self.unknown, self.mirrored = n, sizes, seed, unknown, mirrored

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        height, width = self.sizes[index % len(self.sizes)]
        rows, columns = np.mgrid[:height, :width]
        corner, down, across = rng.random(3)
        far = np.abs(corner + down * rows / height - across * columns / width) / 2
        grey = np.clip(40 + 200 * far + rng.normal(0, 4, far.shape), 0, 255).astype(np.uint8)
        depth = np.where(rng.random(far.shape) < 0.2, 0, 1 + 8 * far).astype(np.float32) * (index not in self.unknown)
        if self.mirrored:
            grey, depth = grey[:, ::-1], depth[:, ::-1]
        return {"image": np.repeat(grey[..., None], 3, -1), "depth": depth}

    @property
    def fingerprint(self):
        return f"{self.seed:x}"


@pytest.fixture
def walls(monkeypatch):
    """walls(train=source, test=source): what walls:#train and walls:#test open."""

    def register(**splits):
        kind = types.SimpleNamespace(open=lambda path, options, split: splits[split or "train"])
        monkeypatch.setitem(sources.SOURCES, "walls", "walls_of_a_test")
        monkeypatch.setitem(sys.modules, "walls_of_a_test", kind)

    return register


@pytest.fixture(scope="module")
def heads():
    rng = np.random.default_rng(1)
    kernel, bias = rng.uniform(-2.5, 2.5, (64, BINS)), rng.uniform(-2.5, 2.5, BINS)
    return {"kernel": np.stack(2 * [kernel]).astype(np.float32), "bias": np.stack(2 * [bias]).astype(np.float32)}


def known_depth(source):
    return [depth[depth > 0] for depth in (source[i]["depth"] for i in range(len(source)))]


def test_it_learns_says_what_it_saw_and_goes_on_where_it_was_killed(model, mesh, walls, killed, tmp_path, caplog):
    """11 images, 6 at a time: a row that fills the last batch counts for nothing."""
    caplog.set_level("INFO")
    train, test = Walls(), Walls(n=11, seed=1, unknown=(4,))
    walls(train=train, test=test)

    def run(**more):
        options = dict(type="depth", **QUICK, save_every=16) | more
        evaluators = evaluate.build({"walls": options}, data_train="walls:", data_eval="")
        assert type(evaluators["walls"].evaluator) is get("depth") is Depth
        return evaluate.run(evaluators, model, mesh=mesh, workdir=tmp_path)

    folder = tmp_path / "eval" / "walls"
    with killed(after=20):
        run(pictures=0)
    assert [file.name for file in folder.iterdir()] == ["unfinished.npz"]
    one = run()
    assert "depth probe: goes on after step 16 of 40" in caplog.text
    assert sorted(file.name for file in folder.iterdir()) == ["predictions.png", "results.json"]
    assert list(one)[:3] == ["walls/rmse", "walls/abs_rel", "walls/a1"] and one["walls/left_out"] == 1.0
    median = np.median(np.concatenate(known_depth(train)))
    guess = np.mean([np.sqrt(np.mean((known - median) ** 2)) for known in known_depth(test) if known.size])
    assert one["walls/rmse"] < 0.5 * guess
    assert (folder / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "results.json").read_text())["data"]["eval_data"]["samples"] == 11
    farthest = max(known.max() for known in known_depth(train))
    for line in (
        f"bins from 0.001 to {farthest:g} m (the largest in 24 training images",
        "training crops of 32 x 40 pixels, the size of the first image",
        "walls:#test: 1 images have no pixel of known depth that counts",
    ):
        assert line in caplog.text


def test_every_image_at_its_own_size(model, mesh, heads):
    """8 images of two sizes; 29 x 37 pixels are padded to 32 x 40. What is measured is what the head says of the image
    and of its mirror image, and one image has nothing to be measured on."""
    source = Walls(n=8, sizes=((32, 40), (29, 37)), unknown=(2,))
    errors, index, shown = measure(model, heads, source, READOUT, batch_size=4, mesh=mesh, show=range(8))
    assert sorted(index.tolist()) == list(range(8)) == sorted(shown)
    for row, place in enumerate(index.tolist()):
        truth = source[place]["depth"]
        assert shown[place].shape == (2, *truth.shape)
        want = np.sqrt(np.mean((shown[place] - truth)[:, truth > 0] ** 2, axis=-1)) if truth.any() else None
        assert errors["images"][:, row].tolist() == [float(truth.any())] * 2
        if truth.any():
            np.testing.assert_allclose(errors["rmse"][:, row], want, rtol=1e-5)

    image = source[3]["image"]
    both = np.stack([image, image[:, ::-1]])
    features = jax.jit(lambda images: dense_features(model, images, **READOUT.features))(both)
    head = {name: leaf[1] for name, leaf in heads.items()}
    matrices = output_matrices((29, 37), (29, 37), 8, "stretch")
    plain, mirrored = np.asarray(jax.jit(lambda f: read_depth(head, f, *matrices, READOUT.ends))(features))
    np.testing.assert_allclose(shown[3][1], (plain + mirrored[:, ::-1]) / 2, rtol=1e-4)
    assert np.abs(plain - mirrored[:, ::-1]).max() > 1e-2


def test_a_mirrored_image_has_the_same_errors_and_so_it_has_on_eight_devices(model, mesh, mesh8, heads):
    """Of the eight rows that eight devices need, four count for nothing."""
    one, other = (
        measure(model, heads, Walls(n=4, mirrored=mirrored), READOUT, batch_size=4, mesh=where, show=(2,))
        for where, mirrored in ((mesh, False), (mesh8, True))
    )
    np.testing.assert_allclose(one[2][2], other[2][2][..., ::-1], rtol=1e-4)
    for name, values in one[0].items():
        np.testing.assert_allclose(values, other[0][name], rtol=1e-4, atol=1e-5)


def test_the_head_that_is_best_on_what_none_has_seen_is_taken(model, mesh, heads, caplog):
    """Bins are read alike everywhere: one head always says 10 m, the other what is the middle of all."""
    caplog.set_level("INFO")
    heads = jax.tree.map(np.zeros_like, heads)
    heads["bias"][0, BINS - 1] = 1e6
    looking = dict(batch_size=4, mesh=mesh, workers=0)
    best = Depth(lr=(1e-3, 1e-4))._best(model, heads, Walls(n=4), READOUT, looking)
    assert best == 1
    assert "lr=0.0001 chosen by RMSE on 4 training images that no head has seen (0.001: " in caplog.text


def test_survey(mesh8):
    source = Picked(Walls(n=9, sizes=((32, 32), (29, 37)), unknown=(5,)), np.array([1, 4, 5]))
    sizes, ranges = survey(source, batch_size=2, mesh=mesh8)
    assert sizes.tolist() == [[29, 37], [32, 32], [29, 37]]
    np.testing.assert_allclose(ranges[:2], [[k.min(), k.max()] for k in known_depth(source)[:2]])
    assert ranges[2].tolist() == [np.inf, 0.0]


def test_what_is_read_of_a_network(model):
    def of(**config):
        return types.SimpleNamespace(config=dataclasses.replace(model.config, **config))

    assert Depth().readout(model, 10.0).features == dict(blocks=(1,), norm=False, cls=True)
    assert not Depth().readout(of(class_token=False, pool="avg", position="patches"), 10.0).cls
    assert Depth(layers=4).readout(of(depth=8), 10.0).blocks == (1, 3, 5, 7)
    readout = Depth(min_depth=0.5, crop="garg", flip=False, padding="crop").readout(model, 80.0)
    assert readout == Readout((1,), True, (0.5, 80.0), padding="crop", flip=False, crop="garg")


def test_heads_in_one_loss_do_not_disturb_each_other():
    """What is told is the mean; each head's gradient is that of its own loss. The first steps have no variance; a
    batch without any known depth changes nothing."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 4, 4, 8)).astype(np.float32)
    heads = {"kernel": rng.normal(size=(2, 8, BINS)), "bias": rng.normal(size=(2, BINS))}
    batch = {"depth": rng.uniform(0, 9, (2, 32, 32)).astype(np.float32)}
    loss = jax.jit(
        jax.value_and_grad(ProbeLoss((0.001, 10.0), "stretch", 8, gradient_loss=0.5, first=100), has_aux=True)
    )
    (both, _), grads = loss(heads, features, batch, 100)
    alone = [loss(jax.tree.map(lambda leaf, i=i: leaf[[i, i]], heads), features, batch, 100) for i in (0, 1)]
    np.testing.assert_allclose(both, np.mean([value for (value, _), _ in alone]), rtol=1e-6)
    for i, (_, grad) in enumerate(alone):
        np.testing.assert_allclose(grads["kernel"][i], grad["kernel"][0], rtol=1e-3, atol=1e-7)
    first, later = (loss(heads, features, batch, step)[0][0] for step in (99, 101))
    assert first < later == both
    (nothing, _), grads = loss(heads, features, {"depth": 0 * batch["depth"]}, 100)
    assert nothing == 0 and all((np.asarray(leaf) == 0).all() for leaf in grads.values())


def test_a_source_without_depth_is_refused(model, mesh, make_folder):
    photos = make_folder("photos", "a.png", "b.png")
    with pytest.raises(ValueError, match="no depth"):
        Depth(data=f"folder:{photos}", eval_data=f"folder:{photos}").run(model, mesh=mesh, out_dir="")


def test_a_wrong_unit_is_noticed(model, mesh, walls, tmp_path):
    walls(train=Walls(n=2, unknown=(0, 1)), test=Walls(n=2))
    with pytest.raises(ValueError, match="no depth above min_depth=0.001 m: is its unit metres"):
        Depth(data="walls:", eval_data="walls:#test").run(model, mesh=mesh, out_dir=tmp_path)


def test_a_crop_of_other_frames_is_refused_before_the_training(model, mesh, walls, tmp_path):
    walls(train=Walls(n=2), test=Walls(n=2, seed=1))
    probe = Depth(data="walls:", eval_data="walls:#test", **NYUD)
    with pytest.raises(ValueError, match="eigen crop is a box in depth maps of 480 x 640.*these have 32 x 40"):
        probe.run(model, mesh=mesh, out_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(layers=2), "layers must be 1 or 4"),
        (dict(min_depth=0.0), "min_depth must be above 0"),
        (dict(min_depth=2.0, max_depth=1.0), "max_depth must be above min_depth"),
        (dict(crop="nyu"), "crop must be one of none, eigen, garg"),
        (dict(border="eigen"), "border must be one of none, nyu"),
        (dict(padding="zero"), "padding must be one of stretch, crop"),
        (dict(train_crop=(416,)), "train_crop must be height and width"),
        (dict(train_crop=(416, 0)), "train_crop must be height and width"),
        (dict(lr=()), "lr must be one or more positive"),
        (dict(lr=(1e-3, 1e-3)), "lr must be different"),
        (dict(warmup=12_800), "warmup must be a share"),
        (dict(steps=0), "steps must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Depth(**options)
