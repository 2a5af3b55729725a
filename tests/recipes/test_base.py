"""What recipes share: gradients over micro-batches, the config's architecture, weights from another model."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.config import defaults
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model, abstract_params
from regvit_jax.models.posembed import resample
from regvit_jax.recipes import get
from regvit_jax.recipes.base import Recipe, execution, vit_config
from regvit_jax.recipes.start import adapt, graft
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


def test_crops_on_the_host_are_refused_where_the_recipe_cuts_none():
    config = small()
    config.data.augment_on = "host"
    with pytest.raises(ValueError, match="augment_on='host' is not possible with recipe 'supervised': .* the device"):
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


@pytest.mark.parametrize(
    "theirs, message",
    [
        (
            {"width": 16, "patch_size": 4, "registers": 4},
            "width=16, config.model.patch_size=4, config.model.registers=4 .now",
        ),
        (
            {"registers": 0, "activation": "quick_gelu", "pre_norm": True},
            "activation='quick_gelu', .*pre_norm=True .now",
        ),
        ({"layerscale": 0.1}, "config.model.layerscale=0.1 .now layerscale None"),
        ({"position": "none", "depth": 2}, "depth=2, config.model.position='none' .now depth 1, position 'cls'"),
        ({"norm_eps": 1e-5}, "norm_eps=1e-05"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_keys_to_set(theirs, message):
    other = dataclasses.replace(VIT, **theirs)
    with pytest.raises(ValueError, match=f"^init_from holds another network: set .*{message}") as error:
        graft(filled(VIT, 0.0), Model(filled(other, 1.0), other), VIT)
    # Every one of them is a key: what the message says can be done.
    config = small()
    for name in re.findall(r"config\.(model\.\w+)=", str(error.value)):
        assert name.removeprefix("model.") in config.model


def random(config, seed=0):
    rng = np.random.default_rng(seed)
    params = map_named(lambda _, x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_params(config))
    return Model(params, config)


@pytest.mark.parametrize(
    "theirs",
    [
        # DINO v1 and CLIP without some parts, DeiT-III without a class position, timm with positions for registers.
        {"layerscale": None, "patch_bias": False, "qkv_bias": False, "resampler": "bicubic_offset"},
        {"position": "patches", "num_classes": 7, "pool": "avg", "fc_norm": True, "mask_token": True},
        {"position": "all", "layerscale": 0.5},
    ],
)
def test_exact_adaptations_leave_tokens_as_they_were(theirs):
    ours = dataclasses.replace(VIT, layerscale=0.1)
    model = random(dataclasses.replace(VIT, **theirs))
    grafted = graft(random(ours, 1).params, model, ours)
    images = np.random.default_rng(2).normal(size=(2, 16, 16, 3)).astype(np.float32)
    before, after = model(images), Model(grafted, ours)(images)
    for name in ("cls", "registers", "patches"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), rtol=0, atol=1e-5, err_msg=name)
    source = model if model.config.num_classes == VIT.num_classes else random(ours, 1)
    np.testing.assert_array_equal(grafted["head"]["kernel"], source.params["head"]["kernel"])


def test_registers_are_added_and_positions_resampled_by_the_rule_of_the_weights():
    bare = dataclasses.replace(VIT, registers=0, image_size=(48, 32), resampler="bicubic_offset")
    ours, model = dataclasses.replace(VIT, registers=3, mask_token=True), random(bare)
    adapted, notes = adapt(model, ours)
    assert adapted.config == ours and adapted.params["register_tokens"].shape == (1, 3, 8)
    assert 0 < np.abs(adapted.params["register_tokens"]).max() < 1e-5
    rows = model.params["pos_embed"][0, 1:].reshape(6, 4, 8)
    expected = resample(rows, (2, 2), "bicubic_offset").reshape(4, 8)
    np.testing.assert_allclose(adapted.params["pos_embed"][0, 1:], expected, atol=1e-6)
    np.testing.assert_array_equal(adapted.params["pos_embed"][0, 0], model.params["pos_embed"][0, 0])
    told = "; ".join(notes)
    for part in (
        "3 registers were added",
        "from 6 x 4 to 2 x 2 patches (bicubic_offset)",
        "by 'antialias' from now on",
    ):
        assert part in told
    assert "the mask token starts afresh" in told and "head of 3 classes" not in told
    # What is adapted stays as it is.
    again, _ = adapt(adapted, ours)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (again.params, adapted.params)), strict=True))
    fresh = random(ours, 1).params
    grafted = graft(fresh, model, ours)
    assert (grafted["mask_token"] == fresh["mask_token"]).all() and grafted.keys() == fresh.keys()
    assert (grafted["head"]["kernel"] == model.params["head"]["kernel"]).all()


def test_a_recipe_tells_once_what_it_changed_and_warns_of_other_pixels(caplog):
    config = small()
    recipe, bare = get("supervised")(config), dataclasses.replace(vit_config(config), registers=0)
    caplog.set_level(logging.INFO)
    ready = recipe.prepare({"init_from": random(bare), "init_from:heads": {}})
    assert ready["init_from"].config == recipe.vit and recipe.prepare({}) == {}
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["init_from: 2 registers were added"]
    caplog.clear()
    gray = dataclasses.replace(random(recipe.vit), preprocessing=Preprocess(mean=(0.5, 0.5, 0.5)))
    recipe.prepare({"init_from": gray})
    (warning,) = caplog.records
    assert "expects pixels with mean (0.5, 0.5, 0.5), config.data.mean=(0.485" in warning.getMessage()


def test_models_to_read_are_those_of_the_config():
    config = small()
    assert get("supervised").paths(config) == {}
    config.init_from = "dinov2_vits14"
    assert get("supervised").paths(config) == {"init_from": "dinov2_vits14"}


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="unknown recipe 'dreams'; known: .*supervised"):
        get("dreams")
