"""Single tokens: which rows a probe gets, classes by boxes as VOC counts them, VOC from its tree to mAP, refusals."""

import dataclasses
import logging

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data.sources import open_source
from regvit_jax.evals import single_token
from regvit_jax.evals.single_token import SingleToken, known, presence
from regvit_jax.evals.token_features import extract_tokens

LABELS = [0, 1, 2, 3, 0, 1, 2]


@pytest.fixture
def voc(tmp_path):
    """Seven images of VOC2007: those with a cat are red, with a dog green; one has a difficult dog beside its cat."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    objects = [["cat"], ["dog"], ["cat", "dog"], ["cat", "dog?"], ["dog?"], ["dog", "dog?"], ["cat", "cat"]]
    names = [f"{i:06}" for i in range(7)]
    for i, (name, inside) in enumerate(zip(names, objects, strict=True)):
        noise = np.random.default_rng(i).integers(0, 120, (36, 40, 3))
        noise[..., 0] += 130 * ("cat" in inside)
        noise[..., 1] += 130 * any(each.startswith("dog") for each in inside)
        Image.fromarray(noise.astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        parts = [
            f"<object><name>{each.rstrip('?')}</name><difficult>{int(each.endswith('?'))}</difficult><bndbox>"
            "<xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>"
            for each in inside
        ]
        text = f"<annotation><size><width>40</width><height>36</height></size>{''.join(parts)}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    for split in ("trainval", "test"):
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return f"voc:{root}"


@pytest.fixture
def probed(monkeypatch):
    """The arguments of every logistic regression that is asked for; the n-th has accuracy n / 10."""
    calls = []

    def regression(*arrays, metric, **options):
        calls.append((arrays, options))
        return {metric: len(calls) / 10, "C": 1.0}

    monkeypatch.setattr(single_token, "logistic_regression", regression)
    return calls


def test_every_probe_gets_the_images_that_have_its_token(model, mesh, make_npz, probed, tmp_path, caplog):
    labels = [-1, *LABELS[1:]]
    spec = f"npz:{make_npz('data.npz', train=labels, test=LABELS, val=LABELS)}"
    rule = dict(block=0, rule="percentile", value=90.0)
    options = dict(data=f"{spec}#train", eval_data=f"{spec}#test", batch_size=4, draws=2, crop_ratio=0, **rule)
    got = SingleToken(val_data=f"{spec}#val", **options).run(model, mesh=mesh, out_dir=tmp_path)
    parts = [
        extract_tokens(model, f"{spec}#{part}", limit=got["cutoff"], block=0, draws=2, batch_size=4, mesh=mesh)
        for part in ("train", "test", "val")
    ]
    names = ["cls", "normal/0", "normal/1", "outlier/0", "outlier/1", "register0", "register1"]
    for name, (arrays, passed) in zip(names, probed, strict=True):
        for part, x, y in zip(
            parts, (*arrays[::2], passed["validation"][0]), (*arrays[1::2], passed["validation"][1]), strict=True
        ):
            rows = part.rows(name.partition("/")[0]) & (part.labels >= 0)
            np.testing.assert_array_equal(x, part.arrays[name][rows])
            np.testing.assert_array_equal(y, part.labels[rows])
        assert passed["num_classes"] == 4 and passed["choose_on"] == "held_out"
    some = parts[0].outliers > 0
    assert 0 < some.sum() < 7
    assert got["coverage_train"] == pytest.approx(some[1:].mean()) and got["images_train"] == 6
    assert (got["cls"], got["register0"], got["register1"]) == pytest.approx((0.1, 0.6, 0.7))
    assert (got["normal"], got["outlier"]) == pytest.approx((0.25, 0.45))
    # Of two values that lie 0.1 apart.
    assert got["normal_std"] == pytest.approx(0.1 / np.sqrt(2))

    probed.clear()
    with caplog.at_level(logging.WARNING):
        rest = SingleToken(**options | {"rule": "absolute", "value": 1e9, "draws": 2}).run(
            model, mesh=mesh, out_dir=tmp_path
        )
    assert "outlier" not in rest and rest["coverage_test"] == 0 and rest["cutoff"] == 1e9
    assert "no probe of outlier: 0 training and 0 test images" in caplog.text and len(probed) == 5


def test_a_class_shown_by_difficult_objects_alone_does_not_count(voc):
    source = open_source(voc)
    cat, dog = source.box_names.index("cat"), source.box_names.index("dog")
    readable = np.array([True] * 6 + [False])
    truth = presence(source, readable)
    assert truth.shape == (7, 20) and truth.dtype == np.int8
    assert truth[:6, [cat, dog]].tolist() == [[1, 0], [0, 1], [1, 1], [1, -1], [0, -1], [0, 1]]
    assert (np.delete(truth[:6], [cat, dog], axis=1) == 0).all() and (truth[6] == -1).all()
    assert known(truth).tolist() == readable.tolist()
    assert known(np.array([0, -1, 3])).tolist() == [True, False, True]


def test_voc_is_measured_by_mean_average_precision(model, mesh, voc, probed, tmp_path):
    options = dict(data=f"{voc}#trainval", eval_data=f"{voc}#test", batch_size=4, rule="absolute", value=1e9)
    tokens = SingleToken(metric="map11", tokens=("cls",), **options)
    assert tokens.TRUTH == "boxes" and SingleToken().TRUTH == "label"
    got = tokens.run(model, mesh=mesh, out_dir=tmp_path)
    assert got["cls"] == pytest.approx(0.1) and got["images_test"] == 7
    ((train, truth, test, test_truth), passed) = probed[0]
    np.testing.assert_array_equal(truth, presence(open_source(voc), np.ones(7, bool)))
    np.testing.assert_array_equal(test_truth, truth)
    assert passed["num_classes"] == 20
    # The whole short side of the photos, not what the model's own preparation leaves of it.
    cropped = dataclasses.replace(model, preprocessing=dataclasses.replace(model.preprocessing, crop_ratio=1.0))
    source = open_source(voc)
    expected = cropped(cropped.preprocess([source[i]["image"] for i in range(7)])).cls
    np.testing.assert_allclose(train, expected, rtol=1e-4, atol=1e-5)


def test_refusals(model, mesh, make_npz, voc, tmp_path):
    for bad in ({"tokens": ("patch",)}, {"draws": 0}, {"metric": "map"}, {"C": (0.0,)}, {"crop_ratio": 2.0}):
        with pytest.raises(ValueError, match=f"SingleToken: {next(iter(bad))} must be"):
            SingleToken(**bad)
    with pytest.raises(ValueError, match="val_data must be empty with choose_on='eval'"):
        SingleToken(val_data="npz:a.npz", choose_on="eval")
    three, four = (f"npz:{make_npz(f'{n}.npz', train=list(range(n)))}" for n in (3, 4))
    run = dict(mesh=mesh, out_dir=tmp_path)
    with pytest.raises(ValueError, match="has 3 classes and .*4.npz' 4, which are not the same"):
        SingleToken(data=three, eval_data=four).run(model, **run)
    with pytest.raises(ValueError, match="no classes of boxes, which metric='map11' needs"):
        SingleToken(data=three, eval_data=three, metric="map11").run(model, **run)
    with pytest.raises(ValueError, match="no labels, which this evaluator needs"):
        SingleToken(data=voc, eval_data=voc).run(model, **run)
