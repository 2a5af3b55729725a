"""What changes over a DINOv2 run, at the iterations and names where the reference's values are known."""

import jax
import numpy as np
import pytest

from regvit_jax.config import defaults
from regvit_jax.optim import PER_TENSOR
from regvit_jax.recipes.dinov2 import DINOv2
from regvit_jax.recipes.dinov2_schedules import momentum, teacher_temperature
from regvit_jax.trees import named


def config(**flat):
    """The reference's default run, with dotted keys (written with __) changed."""
    c = defaults("dinov2")
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in flat.items()})
    return c


def rates(c):
    return DINOv2(c).schedules()


def test_the_learning_rate_of_the_short_run():
    lr = rates(config())["lr"]
    np.testing.assert_allclose([lr(12_499), lr(12_500)], 5.656854e-3, rtol=1e-6)
    np.testing.assert_allclose(lr(124_999), 1.0000011e-6, rtol=2e-6)  # a cosine near -1 in float32
    assert lr(0) == 0
    np.testing.assert_allclose(lr(1), 5.656854e-3 / 12_499, rtol=1e-6)


def test_the_learning_rate_grows_with_the_batch_as_it_is_told_to():
    long = config(batch_size=3072, optim__lr=2e-4, total_steps=625_000, optim__warmup_steps=100_000)
    np.testing.assert_allclose(rates(long)["lr"](100_000), 3.4641016e-4, rtol=1e-6)
    old = config(batch_size=1024, optim__lr=5e-4, dinov2__lr_scaling="linear")
    np.testing.assert_allclose(rates(old)["lr"](12_500), 5e-4 * 4, rtol=1e-6)
    assert rates(config(dinov2__lr_scaling="none"))["lr"](12_500) == np.float32(4e-3)
    assert old.optim.lr == 5e-4, "the config is not changed"


def test_decay_and_momentum_are_cosines_without_warmup():
    wd, m = rates(config())["wd"], momentum(config())
    np.testing.assert_allclose([wd(0), wd(62_500), wd(125_000)], [0.04, 0.22, 0.4], rtol=1e-6)
    np.testing.assert_allclose([m(0), m(62_500), m(125_000)], [0.992, 0.996, 1.0], rtol=1e-6)
    i = 31_250
    np.testing.assert_allclose(m(i), 1 - 0.004 * (1 + np.cos(np.pi * i / 125_000)), rtol=1e-6)


def test_the_teachers_temperature_rises_and_stays():
    t = teacher_temperature(config())
    np.testing.assert_allclose([t(0), t(37_499), t(37_500), t(124_999)], [0.04, 0.07, 0.07, 0.07], rtol=1e-6)
    np.testing.assert_allclose(t(18_000), 0.04 + 0.03 * 18_000 / 37_499, rtol=1e-6)
    # A run that is shorter is not hurried.
    np.testing.assert_allclose(teacher_temperature(config(total_steps=100))(99), 0.04 + 0.03 * 99 / 37_499, rtol=1e-6)
    flat = teacher_temperature(config(dinov2__teacher_temp_start=0.03, dinov2__teacher_temp_warmup=0))
    assert flat(0) == np.float32(0.07)


def test_dino_changes_the_temperature_once_a_pass():
    t = teacher_temperature(config(dinov2__teacher_temp_warmup=3000, dinov2__teacher_temp_every=100))
    steps = np.linspace(0.04, 0.07, 30)
    for epoch in (0, 1, 17, 29, 30, 60):
        for step in (100 * epoch, 100 * epoch + 99):
            np.testing.assert_allclose(t(step), steps[min(epoch, 29)], rtol=1e-6)


def test_the_prototypes_do_not_move_at_first():
    plain = rates(config())
    held = plain["last_layer_lr"]
    assert held(0) == held(1249) == 0 and held(1250) == plain["lr"](1250) > 0
    groups = DINOv2(config()).param_groups
    assert {groups(f"dino_head/last_layer/{name}").lr_schedule for name in "gv"} == {"last_layer_lr"}
    assert groups("dino_head/last_layer/g").frozen == 0 and groups("dino_head/fc3/kernel").lr_schedule == "lr"
    old = DINOv2(config(dinov2__freeze_by="gradient", dinov2__train_norms=False))
    assert "last_layer_lr" not in old.schedules()
    assert old.param_groups("dino_head/last_layer/g").frozen is True
    v = old.param_groups("dino_head/last_layer/v")
    assert (v.frozen, v.lr_schedule) == (1250, "lr") and old.param_groups("dino_head/fc1/kernel").frozen == 0
    assert "last_layer_lr" not in rates(config(dinov2__freeze_last_layer=0))


def test_rates_and_decay_by_name():
    """Layer decay .9 of 24 blocks: .0718 for embeddings, .2 of that for patches, .0798 for block 0, .9 for block 23."""
    recipe = DINOv2(config(dinov2__separate_head=True))
    params, _ = jax.eval_shape(recipe.init, jax.random.key(0), {})
    groups = {path: recipe.param_groups(path) for path in named(params)}
    mult = {path: group.lr_mult for path, group in groups.items()}
    for name in ("cls_token", "register_tokens", "mask_token", "pos_embed"):
        np.testing.assert_allclose(mult[f"backbone/{name}"], 0.9**25, rtol=1e-12)
        assert groups[f"backbone/{name}"].wd_mult == 1, "DINOv2 decays its tokens"
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(mult[f"backbone/patch_embed/{name}"], 0.2 * 0.9**25, rtol=1e-12)
    assert round(0.9**25, 4) == 0.0718 and round(0.2 * 0.9**25, 5) == 0.01436
    layers = mult["backbone/blocks/mlp/fc1/kernel"]
    assert len(layers) == 24 and layers[23] == pytest.approx(0.9) and layers[0] == pytest.approx(0.0798, abs=5e-5)
    assert {mult[path] for path in groups if path.startswith(("backbone/norm", "dino_head", "ibot_head"))} == {1.0}
    exempt = {path for path, group in groups.items() if group.wd_mult == 0}
    last = {path: path.rpartition("/")[2] for path in groups}
    norms = {path for path in groups if "norm" in path}
    assert exempt == {path for path in groups if last[path] in ("bias", "gamma")} | norms
    assert groups["dino_head/last_layer/g"].wd_mult == groups["ibot_head/last_layer/v"].wd_mult == 1
    assert {path: group.clip_group for path, group in groups.items()} == {p: p.split("/")[0] for p in groups}


def test_without_layer_decay_the_patches_still_learn_slowly():
    groups = DINOv2(config(optim__layer_decay=1.0)).param_groups
    assert groups("backbone/patch_embed/kernel").lr_mult == 0.2
    assert groups("backbone/blocks/attn/qkv/kernel").lr_mult == groups("backbone/pos_embed").lr_mult == 1.0


def test_dino_clips_every_tensor_by_itself():
    groups = DINOv2(config(dinov2__clip="tensor", dinov2__patch_embed_lr=1.0)).param_groups
    assert groups("backbone/blocks/attn/qkv/kernel").clip_group == groups("dino_head/fc1/bias").clip_group == PER_TENSOR
    np.testing.assert_allclose(groups("backbone/patch_embed/kernel").lr_mult, 0.9**25)
