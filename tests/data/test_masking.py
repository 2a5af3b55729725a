"""Block masks: the spec's numbers, an independent sequential generator, lists and bounds, groups, meshes, edges."""

import functools
import math
import random

import jax
import numpy as np
import pytest

from regvit_jax import sharding
from regvit_jax.data.masking import block_masks, max_block_area, upper_bound

# The reference's batch of one GPU: image size, patch size, crops of 64 or 32 images.
SHORT = {"crops": 128, "grid": (14, 14), "max_area": 98}
LARGE = {"crops": 64, "grid": (16, 16), "max_area": 128}
TINY = {"crops": 6, "grid": (6, 6), "max_area": 18}


@functools.cache
def compiled(groups=1, **options):
    return sharding.jit_once(functools.partial(block_masks, groups=groups, **options))


def draw(seed, **options):
    return jax.tree.map(np.asarray, compiled(**options)(jax.random.key(seed)))


def sequential(rng, crops, grid, max_area, probability=0.5, ratio=(0.1, 0.5)):
    """(crops, h, w) bool, one crop, one block, one try after the other, as the reference's description goes."""
    height, width = grid
    patches, masked = height * width, int(crops * probability)
    edges = [ratio[0] + (ratio[1] - ratio[0]) * i / masked for i in range(masked + 1)]
    masks = np.zeros((crops, height, width), bool)
    for i in range(masked):
        wanted = int(patches * rng.uniform(edges[i], edges[i + 1]))
        count, progress = 0, True
        while count < wanted and progress:
            room, progress = min(wanted - count, max_area), False
            for _ in range(10):
                area = rng.uniform(4, room)
                aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h >= height or w >= width:
                    continue
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                new = h * w - masks[i, top : top + h, left : left + w].sum()
                if 0 < new <= room:
                    masks[i, top : top + h, left : left + w] = True
                    count, progress = count + new, True
                    break
    return masks


def features(masks):
    """(crops, 6) of masks (crops, h, w): masked patches, those with a masked neighbour below and to the right, those on
    the border and in the middle, and the longest masked run of a row."""
    below, right = masks[:, 1:] & masks[:, :-1], masks[:, :, 1:] & masks[:, :, :-1]
    border = masks.sum((1, 2)) - masks[:, 1:-1, 1:-1].sum((1, 2))
    h, w = masks.shape[1:]
    middle = masks[:, h // 2 - 1 : h // 2 + 1, w // 2 - 1 : w // 2 + 1].sum((1, 2))
    run = np.zeros(masks.shape[:2], int)
    longest = run.copy()
    for x in range(w):
        run = (run + 1) * masks[:, :, x]
        longest = np.maximum(longest, run)
    return np.stack([masks.sum((1, 2)), below.sum((1, 2)), right.sum((1, 2)), border, middle, longest.max(1)], axis=1)


def test_the_most_that_one_block_adds():
    assert [max_block_area(*sizes) for sizes in ((224, 16), (224, 14), (518, 14))] == [98, 128, 666]


def test_bounds_of_the_reference():
    assert upper_bound(128, 14 * 14) == 3771
    assert upper_bound(64, 16 * 16) == 2496


def test_a_bound_by_hand():
    # 6 crops, 3 masked: 36 patches times 1/10 + 4/30, 8/30 and 12/30 are 8.4, 13.2 and 18.
    assert upper_bound(6, 36) == 8 + 13 + 18


def test_statistics_of_the_reference():
    """Measured on it: 3727 of at most 3771 patches, a masked crop 0.297 on average, from 0.094 to 0.496."""
    draws = [draw(seed, **SHORT) for seed in range(30)]
    counts = np.stack([masks.mask[0].sum(axis=1) for masks in draws])
    assert ((counts > 0).sum(axis=1) == 64).all()
    totals = counts.sum(axis=1)
    np.testing.assert_allclose(totals.mean(), 3727, atol=3)
    assert totals.max() <= 3771
    shares = counts[counts > 0] / 196
    np.testing.assert_allclose(shares.mean(), 0.297, atol=1e-3)
    assert 0.085 < shares.min() < 0.105 and 0.485 < shares.max() <= 0.5


def test_masks_are_distributed_as_by_the_sequential_generator():
    """Sizes, clumping, place and extent of the masks agree within 4 standard errors of 960 masks."""
    ours = np.concatenate([draw(seed, **LARGE).mask[0].reshape(-1, 16, 16) for seed in range(30)])
    np.testing.assert_allclose(ours.sum() / 30, 2438, atol=4)  # the reference's
    rng = random.Random(0)
    theirs = np.concatenate([sequential(rng, **LARGE) for _ in range(30)])
    a, b = (features(masks[masks.any((1, 2))]) for masks in (ours, theirs))
    assert len(a) == len(b) == 960
    error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
    assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) < 4 * error).all()
    # Mirrored either way it is as likely: the mean mask is its own mirror image.
    mean = ours.mean(axis=0)
    for mirrored in (mean[::-1], mean[:, ::-1], mean.T):
        assert np.abs(mean - mirrored).max() < 5 * math.sqrt(2 * 0.15 / len(ours))


@pytest.mark.parametrize("seed", range(3))
def test_the_list_is_the_mask(seed):
    masks = draw(seed, groups=8, **TINY)
    assert masks.mask.shape == (8, 6, 36)
    assert masks.index.shape == masks.weight.shape == masks.valid.shape == (8, upper_bound(6, 36))
    assert masks.index.dtype == np.int32 and masks.weight.dtype == np.float32
    for g in range(8):
        real = masks.index[g][masks.valid[g]]
        np.testing.assert_array_equal(real, np.flatnonzero(masks.mask[g]))
        np.testing.assert_array_equal(masks.index[g][len(real) :], 6 * 36 - 1)
        np.testing.assert_array_equal(masks.weight[g][len(real) :], 0.0)
        crop = real // 36
        np.testing.assert_allclose(masks.weight[g][: len(real)], 1 / masks.mask[g].sum(axis=1)[crop], rtol=1e-6)
        np.testing.assert_allclose(masks.weight[g].sum(), 3, rtol=1e-5)  # three masked crops


def test_sizes_of_a_group_come_one_from_each_part_of_the_range():
    """Masks never exceed their part: sorted, the k-th has at most the upper edge of part k."""
    for seed in range(5):
        counts = np.sort(draw(seed, groups=8, **TINY).mask.sum(axis=-1), axis=1)
        np.testing.assert_array_equal(counts[:, :3], 0)
        assert (counts[:, 3:] <= [8, 13, 18]).all() and (counts[:, 3:] > 0).all()


def test_steps_groups_and_crops_differ():
    masks = draw(0, groups=8, **TINY).mask
    assert (masks != draw(1, groups=8, **TINY).mask).any()
    assert (masks[0] != masks[1]).any() and (masks[1] != masks[2]).any()
    # Any of the 6 crops may be among the masked.
    drawn = np.concatenate([draw(seed, groups=8, **TINY).mask.any(axis=-1) for seed in range(20)])
    np.testing.assert_allclose(drawn.mean(axis=0), 0.5, atol=5 * 0.5 / math.sqrt(160))


def test_no_mesh_changes_a_mask_and_nothing_is_sent():
    want = draw(3, groups=8, **TINY)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    with jax.set_mesh(mesh):
        where = sharding.batch_sharding(mesh)
        key = jax.device_put(jax.random.key(3), sharding.replicated(mesh))
        program = sharding.jit_once(functools.partial(block_masks, groups=8, **TINY), out_shardings=where)
        program = program.lower(key).compile()
        got, text = program(key), program.as_text()
    assert not any(op in text for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, got), want)


def test_no_crop_masked():
    masks = draw(0, groups=2, crops=4, grid=(6, 6), max_area=18, probability=0.0)
    assert not masks.mask.any() and masks.mask.shape == (2, 4, 36)
    assert masks.index.shape == masks.weight.shape == masks.valid.shape == (2, 0)


def test_all_crops_masked_by_a_range_of_no_width():
    masks = draw(0, groups=2, crops=20, grid=(10, 10), max_area=50, probability=1.0, ratio=(0.25, 0.25))
    counts = masks.mask.sum(axis=-1)
    # A mask falls short where the last blocks did not fit, which is rare, and never exceeds what is wanted.
    assert counts.max() == np.median(counts) == 25 and counts.min() >= 18
    assert masks.valid.shape == (2, 20 * 25)
    np.testing.assert_allclose(masks.weight.sum(axis=1), 20, rtol=1e-5)


def test_a_grid_that_no_block_fits_into_stays_empty():
    """A block is lower than the grid: of one row there is none."""
    masks = draw(0, crops=4, grid=(1, 8), max_area=4)
    assert not masks.mask.any() and not masks.valid.any() and not masks.weight.any()
    assert masks.index.shape == (1, 2 + 4)


@pytest.mark.parametrize("options", [{"probability": 1.5}, {"ratio": (0.5, 0.1)}, {"ratio": (0.1, 1.2)}])
def test_what_is_no_share_is_refused(options):
    with pytest.raises(ValueError, match="are shares, 0 to 1"):
        block_masks(jax.random.key(0), groups=1, **TINY, **options)
    with pytest.raises(ValueError, match="are shares, 0 to 1"):
        upper_bound(6, 36, **options)
