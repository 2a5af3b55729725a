"""Maps: numbers against the residual stream, the component against an SVD, a picture with one row an image."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from regvit_jax.evals import maps
from regvit_jax.evals.maps import Maps, first_component
from regvit_jax.models.model import intermediate


def test_numbers_are_of_the_residual_stream(model, mesh, mesh8, make_npz, tmp_path):
    path = make_npz("data.npz", train=[0, 1, 2, 3, 0])
    # Weights of other scale in the final norm must not matter.
    scaled = model.params | {"norm": {**model.params["norm"], "scale": 7.0 * model.params["norm"]["scale"]}}
    got = Maps(eval_data=f"npz:{path}", n=3).run(dataclasses.replace(model, params=scaled), mesh=mesh, out_dir=tmp_path)
    images = jnp.asarray(model.preprocess([maps.source_of(f"npz:{path}")[i]["image"] for i in range(3)]))
    (stream,) = intermediate(model, images, blocks=(-1,))
    patch = np.linalg.norm(stream.patches, axis=-1)
    assert got["patch_norm_max_over_median"] == pytest.approx(patch.max() / np.median(patch), rel=1e-4)
    registers = np.linalg.norm(stream.registers, axis=-1)
    assert got["register_norm_over_patch"] == pytest.approx(np.median(registers) / np.median(patch), rel=1e-4)
    eight = Maps(eval_data=f"npz:{path}", n=3).run(model, mesh=mesh8, out_dir=tmp_path / "eight")
    assert eight == pytest.approx(got, rel=1e-4)


def test_without_registers_there_is_no_number_for_them(bare_model, mesh, make_folder, tmp_path):
    photos = make_folder("photos", "a$b_c$.png", "a name that is much longer than the column.png")
    got = Maps(eval_data=f"folder:{photos}").run(bare_model, mesh=mesh, out_dir=tmp_path / "out")
    assert set(got) == {"patch_norm_max_over_median"}
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["maps.png"]


def test_the_picture_shows_images_norms_and_components(tmp_path):
    """Flat test maps: their colours must be found in the file, where the scale puts them."""
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[0], images[1] = (255, 0, 255), (0, 255, 255)
    norms = np.stack([np.full((4, 4), 1.0), np.full((4, 4), 9.0)])
    components = np.stack([np.full((4, 4), -1.0), np.full((4, 4), 1.0)])
    maps._draw(tmp_path / "new" / "maps.png", images, norms, components, ["first", "second"])
    pixels = np.asarray(Image.open(tmp_path / "new" / "maps.png").convert("RGB")).reshape(-1, 3)
    counts = [int((abs(pixels - np.array(c)).sum(1) < 12).sum()) for c in ((255, 0, 255), (0, 255, 255))]
    assert min(counts) > 5000
    # Ends of viridis and of RdBu_r.
    for colour in [(68, 1, 84), (253, 231, 37), (5, 48, 97), (103, 0, 31)]:
        assert (abs(pixels.astype(int) - colour).sum(1) < 12).sum() > 5000, colour


def test_the_first_component_is_that_of_an_svd_with_the_middle_positive():
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(2, 6, 4, 10))
    patches[:, 2:4, 1:3] += 5.0 * rng.normal(size=10)
    got = first_component(patches)
    flat = patches.reshape(-1, 10) - patches.reshape(-1, 10).mean(0)
    want = (flat @ np.linalg.svd(flat, full_matrices=False)[2][0]).reshape(2, 6, 4)
    np.testing.assert_allclose(np.abs(got), np.abs(want), atol=1e-6)
    assert got[:, 2:4, 1:3].min() > 0 > got[:, 0].mean()
    np.testing.assert_allclose(first_component(-patches), got, atol=1e-6)


def test_zero_images_are_refused():
    with pytest.raises(ValueError, match="n must be at least 1"):
        Maps(n=0)
