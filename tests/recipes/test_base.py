"""What recipes share: gradients over micro-batches, the config's architecture, weights from another model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.config import defaults
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model, abstract_params
from regvit_jax.recipes import get
from regvit_jax.recipes.base import Recipe, execution, graft, vit_config
from regvit_jax.trees import map_named, named

VIT = ViTConfig(width=8, depth=1, num_heads=2, mlp_dim=8, patch_size=8, image_size=(16, 16), registers=1, num_classes=3)


def small():
    """A config of 4 patches, 2 blocks and 4 classes."""
    c = defaults("supervised")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_ti16", 16, 8, 2
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim, c.model.num_classes = 32, 2, 2, 64, 4
    c.batch_size = 8
    return c


def filled(config, value):
    return map_named(lambda path, leaf: jnp.full(leaf.shape, value, leaf.dtype), abstract_params(config))


class Line(Recipe):
    """Fits y = a x by least squares, on keys that it reports: small enough to check by hand."""

    def __init__(self, accum_steps):
        self.config = small()
        self.config.accum_steps = accum_steps

    def init(self, key, loaded): ...

    def augment(self, batch, key, step): ...

    def eval_model(self, params, extras): ...

    def loss(self, params, extras, batch, key, step):
        error = params["a"] * batch["x"] - batch["y"]
        metrics = {"first": batch["x"][0], "draw": jax.random.uniform(key)}
        return jnp.mean(error**2), {"metrics": metrics}


BATCH = {"x": jnp.arange(8.0), "y": jnp.ones(8)}


@pytest.mark.parametrize("count", [1, 2, 8])
def test_gradients_are_means_over_the_batch_in_any_number_of_portions(count):
    """With a = 2: d/da mean((2 x - 1)^2) = mean(2 x (2 x - 1)) for x = 0 ... 7."""
    x = np.arange(8.0)
    loss, aux, grads = Line(count).grads({"a": jnp.float32(2.0)}, {}, BATCH, jax.random.key(0), 0)
    np.testing.assert_allclose(loss, np.mean((2 * x - 1) ** 2), rtol=1e-6)
    np.testing.assert_allclose(grads["a"], np.mean(2 * x * (2 * x - 1)), rtol=1e-6)


def test_a_micro_batch_takes_every_nth_row_and_has_a_key_of_its_own():
    key = jax.random.key(3)
    _, aux, _ = Line(4).grads({"a": jnp.float32(1.0)}, {}, BATCH, key, 0)
    assert aux["metrics"]["first"] == np.mean([0, 1, 2, 3])
    draws = [jax.random.uniform(k) for k in jax.random.split(key, 4)]
    np.testing.assert_allclose(aux["metrics"]["draw"], np.mean(draws), rtol=1e-6)


def test_with_every_random_draw_micro_batches_are_those_of_the_big_batch():
    """Crops, flips, mixup, cutmix and stochastic depth: an example gets what it would get in the whole batch."""
    config = small()
    config.model.layerscale, config.model.drop_path, config.groups = 0.1, 0.5, 2
    config.supervised.mixup, config.supervised.cutmix, config.supervised.crop_pad = 0.8, 1.0, 2
    rng = np.random.default_rng(0)
    params = map_named(
        lambda _, x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), abstract_params(vit_config(config))
    )
    batch = {
        "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
        "label": np.arange(8, dtype=np.int32) % 4,
    }

    def losses_and_grads(count):
        config.accum_steps = count
        recipe = get("supervised")(config)

        def fn(params):
            return recipe.grads(params, {}, recipe.augment(batch, jax.random.key(1), 0), jax.random.key(2), 0)

        return jax.jit(fn)(params)

    (loss, aux, grads), (loss4, aux4, grads4) = losses_and_grads(1), losses_and_grads(4)
    np.testing.assert_allclose(loss4, loss, rtol=1e-6)
    np.testing.assert_allclose(aux4["metrics"]["accuracy"], aux["metrics"]["accuracy"], rtol=1e-6)
    for path, grad in named(grads).items():
        # Eight terms in another order: a few roundings of the largest.
        np.testing.assert_allclose(named(grads4)[path], grad, rtol=0, atol=1e-6 * np.abs(grad).max(), err_msg=path)


class Contrast(Recipe):
    """As CLIP: what an example costs depends on the others."""

    couples_examples = "every image is told from the captions of the whole batch"

    def init(self, key, loaded): ...

    def augment(self, batch, key, step): ...

    def loss(self, params, extras, batch, key, step): ...

    def eval_model(self, params, extras): ...


def test_accumulation_is_refused_with_the_reason_where_examples_are_coupled(monkeypatch):
    config = small()
    assert Contrast(config).config.accum_steps == 1
    config.accum_steps = 4
    monkeypatch.setattr(jax, "jit", None)
    with pytest.raises(ValueError, match="accum_steps=4 is not possible.*captions of the whole batch; set it to 1"):
        Contrast(config)
    get("supervised")(config)


def test_the_architecture_is_the_name_with_the_keys_that_are_set():
    config = small()
    config.model.name = "vit_s16_reg4"
    for name in ("width", "depth", "num_heads", "mlp_dim", "registers"):
        config.model[name] = None
    config.model.drop_path = 0.1
    vit = vit_config(config)
    assert (vit.width, vit.depth, vit.num_heads, vit.registers) == (384, 12, 6, 4)
    assert (vit.patch_size, vit.image_size, vit.drop_path) == (8, (16, 16), 0.1)
    config.model.num_heads = 7
    with pytest.raises(ValueError, match="config.model: width 384 is not a multiple of num_heads 7"):
        vit_config(config)


def test_execution_is_what_the_config_says_and_auto_is_float32_on_a_cpu():
    config = small()
    config.dtype, config.remat, config.unroll, config.attention = "bfloat16", "dots", True, "xla"
    assert dataclasses.astuple(execution(config)) == ("bfloat16", "dots", True, "xla")
    config.dtype = "auto"
    assert execution(config).dtype == "float32"


def test_loaded_weights_take_the_place_of_fresh_ones():
    other = dataclasses.replace(VIT, drop_path=0.3, position_init="sincos")
    grafted = graft(filled(VIT, 0.0), Model(filled(other, 1.0), other), VIT)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(grafted))


def test_a_head_of_other_classes_is_left_fresh():
    for classes in (0, 7):
        other = dataclasses.replace(VIT, num_classes=classes)
        grafted = graft(filled(VIT, 0.0), Model(filled(other, 1.0), other), VIT)
        assert {path for path, leaf in named(grafted).items() if (leaf == 0).all()} == {"head/bias", "head/kernel"}
        assert grafted["head"]["kernel"].shape[-1] == 3


def test_weights_in_half_precision_are_taken_as_float32():
    model = Model(filled(VIT, 1.5), VIT).astype("bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(graft(filled(VIT, 0.0), model, VIT))} == {jnp.dtype("float32")}


def test_another_architecture_is_refused_naming_what_differs():
    other = dataclasses.replace(VIT, registers=4, width=16)
    with pytest.raises(ValueError, match=r"width: 16 there, 8 here, registers: 4 there, 1 here\); set config.model"):
        graft(filled(VIT, 0.0), Model(filled(other, 1.0), other), VIT)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="unknown recipe 'dreams'; known: supervised"):
        get("dreams")
