"""Object discovery on a network: boxes as computed by hand from captured keys, padding, sweeps, meshes, refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from regvit_jax.data.sources import Source
from regvit_jax.evals import discovery, discovery_images
from regvit_jax.evals.box_metrics import iou
from regvit_jax.evals.discovery import ObjectDiscovery
from regvit_jax.ops.dino_seg import dino_seg
from regvit_jax.ops.lost import discover, pixels

SIZES = ((37, 52), (40, 56), (37, 52), (40, 50), (33, 50))


class Photos(Source):
    """Noise of several sizes with a bright rectangle; the fourth image has no box, the last cannot be read."""

    fingerprint = "photos"

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 5:
            return {"image": b"no image", "boxes": np.zeros((1, 4))}
        rng = np.random.default_rng(index)
        height, width = SIZES[index]
        pixels = rng.integers(0, 90, (height, width, 3)).astype(np.uint8)
        pixels[8:24, 16:40] = 255 - pixels[8:24, 16:40] // 3
        boxes = np.zeros((0, 4)) if index == 3 else np.array([[16, 8, 40, 24]], np.float32)
        return {"image": pixels, "boxes": boxes}

    def name(self, index):
        return f"{index}.jpg"


@pytest.fixture
def photos(monkeypatch):
    monkeypatch.setattr(discovery, "source_of", lambda spec: Photos())
    return Photos()


def by_hand(model, image, names):
    """{name: (h, w, D)} of one image, normalised, then padded with zeros below and to the right."""
    spec = model.preprocessing
    x = (image / 255 - np.array(spec.mean)) / np.array(spec.std)
    p = model.config.patch_size
    x = np.pad(x, [(0, -x.shape[0] % p), (0, -x.shape[1] % p), (0, 0)])[None]
    tokens, found = model(jnp.asarray(x, jnp.float32), capture=names)
    return {name: np.asarray(found[name])[0, 1 + model.config.registers :].reshape(*tokens.grid, -1) for name in names}


def test_boxes_are_those_of_each_image_alone(model, mesh, mesh8, photos, tmp_path):
    options = dict(eval_data="x", feature=("k", "v"), block=(0, -1), bias=(0.0, -0.05), k_patches=9, max_bad=0.5)
    found = ObjectDiscovery(**options, n=2, batch_size=2).run(model, mesh=mesh, out_dir=tmp_path)
    assert found["images"] == 4 and found["settings"] == 8
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    boxes = json.loads((tmp_path / "boxes.json").read_text())
    assert list(boxes) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert [row["corloc"] for row in sweep].index(found["corloc"]) == np.argmax([row["corloc"] for row in sweep])
    best = max(sweep, key=lambda row: row["corloc"])
    names = tuple(f"block{block}/{feature}" for block in (0, -1) for feature in "kv")
    features = [by_hand(model, photos[i]["image"], names) for i in range(5)]
    for row in sweep:
        hits = []
        for i in range(5):
            sample = photos[i]
            own, size = features[i][f"block{row['block']}/{row['feature']}"], sample["image"].shape[:2]
            box = discover(own, patch_size=8, image_size=size, k_patches=9, bias=row["bias"]).box
            if len(sample["boxes"]):
                hits.append(iou(box, sample["boxes"]).max() >= 0.5)
            if row == best:
                np.testing.assert_array_equal(boxes[f"{i}.jpg"], box)
        assert row["corloc"] == np.mean(hits)
    eight = ObjectDiscovery(**options, batch_size=8).run(model, mesh=mesh8, out_dir=tmp_path / "eight")
    assert eight == found
    width, height = Image.open(tmp_path / "boxes.png").size
    assert width > height  # two rows of four


def test_dino_seg(model, mesh, photos, tmp_path):
    options = ObjectDiscovery(eval_data="x", method="dino_seg", head=1, max_bad=0.5)
    found = options.run(model, mesh=mesh, out_dir=tmp_path)
    boxes = json.loads((tmp_path / "boxes.json").read_text())
    image = photos[1]["image"]
    spec = model.preprocessing
    x = (image / 255 - np.array(spec.mean)) / np.array(spec.std)  # 40 x 56: whole patches
    _, rows = model(jnp.asarray(x[None], jnp.float32), capture=("block-1/attn[cls]",))
    attention = np.asarray(rows["block-1/attn[cls]"])[0, 1, 0, 3:].reshape(5, 7)
    np.testing.assert_array_equal(boxes["1.jpg"], pixels(dino_seg(attention), 8, (40, 56)))
    assert found["settings"] == 1
    with pytest.raises(ValueError, match="this network has 2 heads"):
        ObjectDiscovery(eval_data="x", method="dino_seg", head=2).run(model, mesh=mesh, out_dir=tmp_path)


def test_long_images_are_shrunk_and_boxes_grow_back(model, mesh, photos, tmp_path):
    ObjectDiscovery(eval_data="x", max_side=28, max_bad=0.5).run(model, mesh=mesh, out_dir=tmp_path)
    box = np.array(json.loads((tmp_path / "boxes.json").read_text())["1.jpg"])
    # 40 x 56 became 20 x 28; corners are patches of 8 times two, or the border.
    assert set(box) <= {0, 16, 32, 48, 40, 56} and box[2] <= 56 and box[3] <= 40


def test_refusals(model, mesh, photos, make_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(discovery_images, "MOST_PATCHES", 20)
    with pytest.raises(ValueError, match=r"0.jpg: 52 x 37 pixels are 5 x 7 patches, .* set max_side"):
        ObjectDiscovery(eval_data="x").run(model, mesh=mesh, out_dir=tmp_path)
    monkeypatch.undo()
    plain = make_npz("data.npz", train=[0, 1])
    with pytest.raises(ValueError, match="has no boxes: object discovery is measured on voc:"):
        ObjectDiscovery(eval_data=f"npz:{plain}").run(model, mesh=mesh, out_dir=tmp_path)
    with pytest.raises(ValueError, match="feature must be one or more of q, k and v"):
        ObjectDiscovery(eval_data="x", feature=("keys",))
