"""LOST and DINO-seg against recorded runs of the original code: exact, ties included."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import regvit_jax as rv
from regvit_jax.ops.dino_seg import dino_seg, mass_mask
from regvit_jax.ops.lost import box_of, discover, flood, lost, pixels

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "lost.npz")


def numbered(prefix):
    return sorted({"/".join(name.split("/")[:2]) for name in GOLDEN.files if name.startswith(prefix)})


CASES = sorted({name.split("/")[0] for name in GOLDEN.files if name.startswith("c") and name[1:3].isdigit()})


def features(case):
    """(h, w, D) float32; most cases are stored as eighths."""
    flat = GOLDEN[f"{case}/feats"] if f"{case}/feats" in GOLDEN.files else GOLDEN[f"{case}/feats_q"] / np.float32(8)
    return flat.astype(np.float32).reshape(*GOLDEN[f"{case}/dims"], -1)


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_the_original(case):
    found = discover(
        features(case),
        patch_size=tuple(GOLDEN[f"{case}/scales"]),
        image_size=tuple(GOLDEN[f"{case}/init_image_size"][1:]),
        k_patches=int(GOLDEN[f"{case}/k_patches"]),
    )
    np.testing.assert_array_equal(found.degree.reshape(-1), GOLDEN[f"{case}/degree"])
    assert found.seed == GOLDEN[f"{case}/seed"]
    np.testing.assert_array_equal(found.similarity.reshape(-1), GOLDEN[f"{case}/A_seed_row"])
    np.testing.assert_array_equal(found.expansion.reshape(-1), GOLDEN[f"{case}/M"])
    np.testing.assert_array_equal(found.mask, GOLDEN[f"{case}/component"])
    np.testing.assert_array_equal(found.box, GOLDEN[f"{case}/pred"])
    assert found.box.dtype == GOLDEN[f"{case}/pred"].dtype


@pytest.mark.parametrize("case", numbered("bias/"))
def test_bias_and_normalisation(case):
    of = str(GOLDEN[f"{case}/case"])
    found = discover(
        features(of),
        patch_size=tuple(GOLDEN[f"{of}/scales"]),
        image_size=tuple(GOLDEN[f"{of}/init_image_size"][1:]),
        bias=float(GOLDEN[f"{case}/bias"]),
        normalize=bool(GOLDEN[f"{case}/l2_normalised"]),
    )
    np.testing.assert_array_equal(found.degree.reshape(-1), GOLDEN[f"{case}/degree"])
    assert found.seed == GOLDEN[f"{case}/seed"]
    if not GOLDEN[f"{case}/raises"]:
        np.testing.assert_array_equal(found.expansion > 0, GOLDEN[f"{case}/mask"])
        np.testing.assert_array_equal(found.box, GOLDEN[f"{case}/pred"])


@pytest.mark.parametrize("case", numbered("box/"))
def test_boxes_of_components(case):
    mask, seed = GOLDEN[f"{case}/score"] > 0, int(GOLDEN[f"{case}/seed"])
    size = tuple(GOLDEN[f"{case}/init_hw"]) if GOLDEN[f"{case}/init_hw"][0] > 0 else None
    part = flood(jnp.zeros(mask.size, bool).at[seed].set(True).reshape(mask.shape), jnp.asarray(mask))
    box = np.asarray(box_of(part))
    np.testing.assert_array_equal(pixels(box, int(GOLDEN[f"{case}/patch"]), size), GOLDEN[f"{case}/pred"])


def test_a_batch_is_its_images_one_by_one():
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(3, 9, 7, 16)).astype(np.float32)
    together = lost(batch, k_patches=20)
    for i, image in enumerate(batch):
        alone = discover(image, patch_size=1, k_patches=20)
        np.testing.assert_array_equal(together.mask[i], alone.mask)
        np.testing.assert_array_equal(pixels(together.box[i], 1), alone.box)


def test_flood_is_the_component_of_scipy():
    rng = np.random.default_rng(1)
    for density in (0.3, 0.6, 0.9):
        mask = rng.random((23, 17)) < density
        labels, count = ndimage.label(mask)
        start = labels == rng.integers(1, count + 1)
        first = np.zeros_like(mask)
        first[tuple(np.argwhere(start)[-1])] = True
        np.testing.assert_array_equal(flood(jnp.asarray(first), jnp.asarray(mask)), start)
    # A snake: the longest way through a grid.
    snake = np.ones((9, 9), bool)
    snake[1::4, :-1] = snake[3::4, 1:] = False
    start = np.zeros_like(snake)
    start[0, 0] = True
    np.testing.assert_array_equal(flood(jnp.asarray(start), jnp.asarray(snake)), snake)


@pytest.mark.parametrize("bias", [0.0, -1e6])
def test_a_seed_without_support_is_its_own_box(bias):
    found = discover(np.zeros((4, 5, 3), np.float32), patch_size=8, bias=bias)
    np.testing.assert_array_equal(found.box, [0, 0, 8, 8])
    assert found.mask.sum() == 1


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"features are \(h, w, D\), got \(2, 3, 4, 5\)"):
        discover(np.zeros((2, 3, 4, 5)), patch_size=8)
    with pytest.raises(ValueError, match="not finite"):
        discover(np.full((2, 3, 4), np.nan), patch_size=8)
    assert rv.discover is discover


@pytest.mark.parametrize("case", numbered("dinoseg/"))
def test_dino_seg_is_that_of_the_original(case):
    attention = GOLDEN[f"{case}/cls_attention"][:, 1:]
    for head, row in enumerate(attention):
        for mass in (60, 90):
            mask = mass_mask(row, mass / 100).reshape(GOLDEN[f"{case}/dims"])
            np.testing.assert_array_equal(mask, GOLDEN[f"{case}/mask_mass{mass}"][head])
        box = pixels(dino_seg(row.reshape(GOLDEN[f"{case}/dims"])), 16)
        np.testing.assert_array_equal(box, GOLDEN[f"{case}/pred_per_head_patch16"][head])


def test_dino_seg_without_its_peculiarities_takes_the_largest_part():
    attention = np.full((6, 6), 1e-6)
    attention[0, 0] = 1.0
    attention[3:6, 2:5] = 1.0
    np.testing.assert_array_equal(dino_seg(attention, mass=0.99, published=False), [3, 2, 6, 5])
    np.testing.assert_array_equal(dino_seg(attention, mass=0.99), [0, 0, 1, 1])  # the last part is never chosen
    attention[0, 0] = 1e-6
    np.testing.assert_array_equal(dino_seg(attention, mass=0.99, published=False), [3, 2, 6, 5])
    np.testing.assert_array_equal(dino_seg(attention, mass=0.99), [0, 0, 6, 6])  # one part: all around it
