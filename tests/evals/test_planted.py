"""Artifacts planted into a network on purpose: evaluators must see them, and nothing in the network without them.

One block. Its attention writes the mean colour of the image into every token, where the final norm hides it. Some
hidden units wake up in dark patches only: they write that colour into the stream, large, and remove what the patch had
of its own, its place among it. The class of an image is a tint that drowns in the noise of one patch.
"""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from regvit_jax.data.transforms import Preprocess
from regvit_jax.evals.local_probes import LocalProbes
from regvit_jax.evals.logreg import logistic_regression
from regvit_jax.evals.single_token import SingleToken
from regvit_jax.evals.token_features import extract_tokens
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model, abstract_params

GRID, PATCH, WIDTH = 6, 8, 32
# Channels: colour of the patch, mean colour, the image as outliers hold it, what tells them, place, other pixels, and
# two constants so large that the norms of the block only scale.
OWN, MEAN, FLAG, PLACE, LOCAL = slice(0, 3), slice(3, 6), 9, slice(10, 18), slice(18, 30)
CONSTANT, OWN_CONTENT = 20.0, (*range(3), *range(10, 30))
TRAIN, TEST = 48, 24


@pytest.fixture(scope="module")
def planted():
    return planted_model(amplitude=200.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    arrays = {}
    for seed, (split, count) in enumerate((("train", TRAIN), ("test", TEST))):
        labels = np.arange(count) % 3
        encoded = [png(image) for image in pictures(labels, seed)]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"{split}_labels"] = labels
    path = tmp_path_factory.mktemp("planted") / "images.npz"
    np.savez(path, **arrays)
    return f"npz:{path}"


def test_one_outlier_knows_the_class_and_one_normal_patch_hardly(planted, mesh, source, tmp_path):
    options = dict(batch_size=24, draws=3, C=(0.01, 1.0), tokens=("normal", "outlier"))
    pair = dict(data=f"{source}#train", eval_data=f"{source}#test")
    got = SingleToken(**pair, **options).run(planted, mesh=mesh, out_dir=tmp_path)
    assert got["outlier"] > 0.9 and got["normal"] < 0.75
    assert got["outlier_std"] < 0.1
    assert (got["coverage_train"], got["coverage_test"]) == (1, 1) and "cls" not in got
    probes = json.loads((tmp_path / "tokens.json").read_text())
    assert [(p["token"], p["train"], p["test"]) for p in probes if p["kind"] == "outlier"] == [
        (f"outlier/{draw}", TRAIN, TEST) for draw in range(3)
    ]
    values = [p["top1"] for p in probes if p["kind"] == "normal"]
    assert got["normal"] == pytest.approx(np.mean(values)) and got["normal_std"] == pytest.approx(
        np.std(values, ddof=1)
    )
    # The second of the draws, by hand.
    train, test = (
        extract_tokens(planted, s, limit=got["cutoff"], draws=3, kinds=("normal", "outlier"), batch_size=24, mesh=mesh)
        for s in pair.values()
    )
    arrays = train.arrays["normal/1"], train.labels, test.arrays["normal/1"], test.labels
    assert values[1] == logistic_regression(*arrays, num_classes=3, C=options["C"], mesh=mesh)["top1"]


def test_outliers_know_neither_their_place_nor_their_pixels(planted, mesh, source, tmp_path):
    options = dict(data=f"{source}#train", eval_data=f"{source}#test", batch_size=24, max_iter=60)
    got = LocalProbes(**options).run(planted, mesh=mesh, out_dir=tmp_path)
    assert got["position_normal"] > 0.98 and got["position_outlier"] < 0.3
    assert got["distance_normal"] < 0.05 and got["distance_outlier"] > 1.5
    assert got["pixels_outlier"] > 2 * got["pixels_normal"] and got["pixels_plain"] > 5 * got["pixels_normal"]
    # Dark among bright ones.
    assert got["cosine_outlier"] < 0 < got["cosine_normal"]
    assert got["outliers"] == pytest.approx(2 / GRID**2) and got["images"] == 24
    assert got["top_cell"] < 0.35
    assert (tmp_path / "local.png").stat().st_size > 1000

    clean = LocalProbes(**options).run(planted_model(0.0), mesh=mesh, out_dir=tmp_path / "clean")
    assert clean["outliers"] == 0 and not [name for name in clean if name.endswith("_outlier")]
    assert clean["position_normal"] > 0.98
    # The same patches, told apart by a cut-off that means nothing here: dark ones are as well known as others.
    assert clean["pixels_normal"] == pytest.approx(got["pixels_normal"], rel=0.1)


def planted_model(amplitude):
    """The network of the top of the file; amplitude 0 plants nothing."""
    size = GRID * PATCH
    config = ViTConfig(
        width=WIDTH, depth=1, num_heads=2, mlp_dim=64, patch_size=PATCH, image_size=(size, size), registers=1
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(config))

    colour = np.tile(np.eye(3), (PATCH**2, 1)) / PATCH**2
    kernel = np.zeros((3 * PATCH**2, WIDTH))
    kernel[:, OWN] = colour
    kernel[:, LOCAL] = rng.normal(0, 0.1, (3 * PATCH**2, 12))
    params["patch_embed"] |= {"kernel": kernel}
    params["pos_embed"][:, :, -2:] = params["register_tokens"][..., -2:] = CONSTANT, -CONSTANT
    params["pos_embed"][:, 1:, PLACE] = rng.normal(0, 1, (GRID**2, 8))
    params["norm"]["scale"][:] = 1.0
    params["norm"]["scale"][MEAN] = 0.0

    block = params["blocks"]
    block["norm1"]["scale"][:] = block["norm2"]["scale"][:] = CONSTANT * np.sqrt(2 / WIDTH)
    tokens = 2 + GRID**2
    for channel in range(3):
        block["attn"]["qkv"]["kernel"][0, channel, 2, channel] = 1.0
        block["attn"]["proj"]["kernel"][0, channel, 3 + channel] = tokens / GRID**2
    # (channel read, channel written, gain): the image's mean colour, large, and all that is the patch's own, removed.
    gated = [(3 + i, 6 + i, amplitude) for i in range(3)] + [(i, i, -1.0) for i in OWN_CONTENT if amplitude]
    fc1, fc2 = block["mlp"]["fc1"], block["mlp"]["fc2"]
    for number, (read, written, gain) in enumerate(gated):
        for sign, unit in ((1.0, 2 * number), (-1.0, 2 * number + 1)):
            # The three colours of a dark patch sum to less than -2.8, those of others to more than -1.8.
            fc1["kernel"][0, OWN, unit] = -20.0
            fc1["bias"][0, unit] = -20.0 * 2.3
            fc1["kernel"][0, read, unit] += sign
            fc2["kernel"][0, unit, written] = sign * gain / 2
            fc2["kernel"][0, unit, FLAG] = amplitude / 20 if number == 0 else 0.0
    return Model(jax.tree.map(jnp.asarray, params), config, preprocessing=Preprocess(size, crop_ratio=1.0))


def pictures(labels, seed):
    """uint8 (n, 48, 48, 3): patches of random colours, tinted by the class; two of them dark, at random places."""
    rng = np.random.default_rng(seed)
    tint = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])[labels] * 30.0
    n = len(labels)
    own = rng.uniform(80, 200, (n, GRID, GRID, 1, 1, 3)) + tint[:, None, None, None, None]
    for image in own:
        cells = rng.choice(GRID**2, 2, replace=False)
        image[cells // GRID, cells % GRID] = rng.uniform(0, 60, (2, 1, 1, 3))
    pixels = np.clip(own + rng.normal(0, 5, (n, GRID, GRID, PATCH, PATCH, 3)), 0, 255)
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(n, GRID * PATCH, GRID * PATCH, 3).astype(np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()
