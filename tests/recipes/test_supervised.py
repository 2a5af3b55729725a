"""The supervised recipe: known losses, targets that add up, stochastic depth in training alone, averaged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.config import defaults
from regvit_jax.models.model import abstract_params
from regvit_jax.optim import Group
from regvit_jax.recipes.supervised import Supervised
from regvit_jax.trees import map_named, named

KEY = jax.random.key(0)


def small():
    """A config of 4 patches, 2 blocks and 4 classes."""
    c = defaults("supervised")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_ti16", 16, 8, 2
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim, c.model.num_classes = 32, 2, 2, 64, 4
    c.batch_size = 8
    return c


def recipe(**options):
    """The recipe of that config; with __ (for a dot) an option is a key of the whole config."""
    config = small()
    for name, value in options.items():
        config.update_from_flattened_dict({name.replace("__", ".") if "__" in name else f"supervised.{name}": value})
    return Supervised(config)


def batch(count=8):
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 256, (count, 16, 16, 3), np.uint8), "label": np.arange(count, dtype=np.int32) % 4}


def weights(of):
    """Zero everywhere, so that all logits are equal."""
    return map_named(lambda _, x: jnp.zeros(x.shape, x.dtype), abstract_params(of.vit))


@pytest.mark.parametrize("loss, expected", [("softmax", np.log(4)), ("bce", np.log(2))])
def test_a_network_that_knows_nothing_has_the_loss_of_chance(loss, expected):
    r = recipe(loss=loss)
    value, aux = r.loss(weights(r), {}, r.augment(batch(), KEY, 0), KEY, 0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert aux["metrics"]["accuracy"] == 0.25  # Equal logits: class 0 is taken, which 2 of 8 are.


def test_the_batch_is_normalised_and_its_labels_are_distributions():
    r = recipe(flip=False, smoothing=0.2)
    out = r.augment(batch(), KEY, 0)
    mean, std = (np.array(x, np.float32) for x in (r.config.data.mean, r.config.data.std))
    np.testing.assert_allclose(out["image"], (batch()["image"] / 255 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(out["target"][1], [0.05, 0.85, 0.05, 0.05], rtol=1e-6)
    assert out["image"].dtype == out["target"].dtype == jnp.float32


def test_flip_and_crop_come_from_the_key_alone():
    r = recipe(crop_pad=2)
    out, again, other = (r.augment(batch(), key, 0)["image"] for key in (KEY, KEY, jax.random.key(1)))
    assert (out == again).all() and (out != other).any()
    plain = recipe(flip=False).augment(batch(), KEY, 0)["image"]
    mirrored = recipe().augment(batch(), KEY, 0)["image"]
    flipped = [bool((m == p[:, ::-1]).all()) for m, p in zip(mirrored, plain, strict=True)]
    same = [bool((m == p).all()) for m, p in zip(mirrored, plain, strict=True)]
    assert [a != b for a, b in zip(flipped, same, strict=True)] == [True] * 8 and any(flipped) and any(same)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_targets_are_distributions_that_change_by_group(options):
    r = recipe(**options)
    r.config.groups = 4
    out = r.augment(batch(), KEY, 0)
    np.testing.assert_allclose(out["target"].sum(-1), 1, rtol=1e-6)
    shares = np.sort(np.asarray(out["target"]).max(-1).reshape(4, 2), axis=-1)
    np.testing.assert_allclose(shares[:, 0], shares[:, 1], rtol=1e-6)  # One lambda a group, of either partner.
    assert len(np.unique(shares.round(6))) > 1


def test_mixing_with_probability_zero_leaves_the_images_alone():
    mixed = recipe(mixup=0.8, mix_prob=0.0).augment(batch(), KEY, 0)
    plain = recipe().augment(batch(), KEY, 0)
    np.testing.assert_array_equal(mixed["target"], plain["target"])


def test_bce_counts_both_classes_of_a_mixed_image():
    """Zero logits: every class costs log 2, whatever the target; the gradient on the bias tells which are positive."""
    r = recipe(loss="bce")
    targets = np.array([[0.7, 0.3, 0, 0]] * 8, np.float32)
    images = np.zeros((8, 16, 16, 3), np.float32)
    grad = jax.grad(lambda p: r.loss(p, {}, {"image": images, "target": targets}, KEY, 0)[0])(weights(r))
    np.testing.assert_allclose(grad["head"]["bias"], np.array([-0.5, -0.5, 0.5, 0.5]) / 4, rtol=1e-6)


def test_stochastic_depth_is_on_in_training_and_off_in_the_model_that_is_saved():
    r = recipe(model__drop_path=0.9, model__drop_path_uniform=True, ema=0.5, flip=False)
    rng = np.random.default_rng(0)
    params = map_named(lambda _, x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_params(r.vit))
    loss = jax.jit(lambda key: r.loss(params, {}, r.augment(batch(), key, 0), KEY, 0)[0])
    assert len({float(loss(jax.random.key(seed))) for seed in range(4)}) > 1
    images = r.augment(batch(), KEY, 0)["image"]
    certain = recipe().eval_model(params, {}).logits(images)
    np.testing.assert_array_equal(r.eval_model({}, {"ema": params}).logits(images), certain)


def test_the_branches_that_live_belong_to_the_examples():
    alive = recipe(model__drop_path=0.5).augment(batch(), KEY, 0)["alive"]
    assert alive.shape == (8, 2, 2) and alive.dtype == bool
    assert alive[:, 0].all() and not alive[:, 1].all(), "no branch of the first block is dropped"
    assert "alive" not in recipe().augment(batch(), KEY, 0)


def test_the_average_of_weights_follows_the_weights():
    r, old, new = recipe(ema=0.75), {"w": jnp.ones(2)}, {"w": jnp.full(2, 5.0)}
    np.testing.assert_allclose(r.after_update(new, {"ema": old}, {}, 0)["ema"]["w"], 0.75 * 1 + 0.25 * 5)
    assert recipe().after_update(new, {}, {}, 0) == {}


def test_which_weights_are_measured():
    now, average = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    assert recipe(ema=0.9).eval_model(now, {"ema": average}).params is average
    assert recipe(ema=0.9, eval_ema=False).eval_model(now, {"ema": average}).params is now
    assert recipe().eval_model(now, {}).params is now


def test_layer_decay_reaches_the_parameter_groups():
    r = recipe(optim__layer_decay=0.5)
    assert r.param_groups("head/kernel") == Group()
    assert r.param_groups("blocks/mlp/fc1/kernel").lr_mult == (0.25, 0.5)
    assert r.param_groups("patch_embed/kernel").lr_mult == 0.125
    assert r.param_groups("register_tokens").wd_mult == 0
    groups = {path: r.param_groups(path) for path in named(abstract_params(r.vit))}
    assert {path for path, g in groups.items() if g.frozen} == set()


def test_the_batch_is_described_as_the_loader_delivers_it():
    spec = recipe().input_spec
    assert {name: (s.shape, str(s.dtype)) for name, s in spec.items()} == {
        "image": ((8, 16, 16, 3), "uint8"),
        "label": ((8,), "int32"),
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "hinge"}, "config.supervised.loss='hinge' must be softmax or bce"),
        ({"smoothing": 1.0}, "config.supervised.smoothing=1.0"),
        ({"loss": "bce", "smoothing": 0.1}, "smoothing=0.1 must be 0 with loss='bce'"),
        ({"mixup": -0.1}, "config.supervised.mixup"),
        ({"mix_prob": 1.5}, "config.supervised.mix_prob"),
        ({"ema": 1.0}, r"config.supervised.ema=1.0 must be in \[0, 1\)"),
        ({"model__num_classes": 0}, "no classes to tell apart: supervised training needs labels.*sub-folder"),
        ({"mixup": 0.8, "model__pool": "sum"}, "config.model: pool='sum'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_mixup_needs_pairs():
    config = small()
    config.supervised.mixup, config.groups = 0.8, 8
    with pytest.raises(ValueError, match="a group of 1 has an odd one"):
        Supervised(config)
