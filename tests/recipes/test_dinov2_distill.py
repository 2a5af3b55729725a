"""Distillation: heads trained on a frozen trunk, then that network frozen as the teacher of a smaller one."""

import importlib.util
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax import hub, loop, sharding, train
from regvit_jax.checkpoint import Checkpoints
from regvit_jax.config import defaults
from regvit_jax.flops import forward_flops, head_flops
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import abstract_params
from regvit_jax.models.prototype_head import apply_head
from regvit_jax.recipes.dinov2 import DINOv2
from regvit_jax.trees import map_named, named


def read(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = read(Path(__file__).parents[1] / "tiny.py")
KEY = jax.random.key(0)
B, K, WIDE, NARROW, PATCHES = 16, 12, 24, 16, 16
LARGER = {"width": WIDE, "depth": 2, "num_heads": 2, "mlp_dim": 32, "patch_size": 4}


def config(**flat):
    """A student of width 16 under a teacher to be named; 8 groups of two images, crops from the host."""
    c = defaults("dinov2")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_ti16", 16, 4, 2
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = NARROW, 1, 2, 32
    c.model.layerscale, c.model.drop_path = 0.5, 0.0
    c.data.augment_on = "host"
    c.batch_size, c.groups, c.total_steps, c.dtype = B, 8, 3, "float32"
    o = c.dinov2
    o.local_crops, o.koleo_weight, o.prototypes, o.head_hidden, o.bottleneck = 0, 0.0, K, 20, 6
    o.mask_prob, o.distill_from, o.freeze_last_layer, o.momentum, o.momentum_end = 0.0, "runs/teacher", 0, 0.75, 0.75
    c.optim.lr, c.optim.warmup_steps = 1e-2, 0
    c.log_every, c.save_every, c.eval_every = 1, 100, 0
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in flat.items()})
    return c


def random(tree, seed):
    rng = np.random.default_rng(seed)
    return map_named(lambda path, x: jnp.asarray(path.endswith("/g") + 0.3 * rng.normal(size=x.shape), x.dtype), tree)


def saved(workdir):
    with Checkpoints(workdir, create=False) as checkpoints:
        return {item: checkpoints.restore_item(item) for item in ("params", "opt", "extras")}


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def small_machine():
    """One device: a program for eight takes twice as long to compile."""
    one = sharding.make_mesh(1, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.sharding, "make_mesh", lambda *sizes: one)
        patch.setattr(loop.flops, "measured_peak", lambda device, dtype: 1e11)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """(the larger network, a workdir of six steps in which it got heads, what was warned of meanwhile, the data)."""
    folder = tmp_path_factory.mktemp("teacher")
    vit = ViTConfig(image_size=24, layerscale=0.5, mask_token=True, registers=1, **LARGER)
    model = rv.Model(random(abstract_params(vit), 0), vit)
    rv.save_model(model, folder / "larger")
    source = tiny.write_npz(folder / "data.npz")
    larger = {f"model__{name}": value for name, value in LARGER.items()}
    c = config(**larger, model__registers=1, dinov2__distill_from="", dinov2__ibot_weight=0.0, dinov2__head_hidden=28)
    c.init_from, c.data.train = str(folder / "larger"), source
    c.total_steps = c.dinov2.freeze_backbone = 6
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DINOv2, "alarms", lambda self, step, values: {"sky": f"it falls at {values['lr']:.2f}"})
        patch.setattr(loop.logging, "warning", lambda text, *given: told.append(text % given))
        assert train.run(c, folder / "run").step == 6
    return model, folder / "run", told, source


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("student")
    assert train.run(config(dinov2__distill_from=str(teacher[1]), data__train=teacher[3]), workdir).step == 3
    return workdir


def test_heads_are_trained_on_a_trunk_that_stays_as_it_was(teacher):
    model, workdir, *_ = teacher
    state, (found, heads) = saved(workdir), hub.load_trained(workdir)
    assert state["opt"]["mu"].keys() == {"dino_head"}, "no memory for a trunk that is never updated"
    for path, leaf in named(model.params).items():
        if path != "pos_embed":  # resampled to the size of the run
            for trunk in (found.params, state["params"]["backbone"]):
                np.testing.assert_array_equal(named(trunk)[path], leaf, err_msg=path)
    assert heads.keys() == {"dino_head"} and (heads["dino_head"]["fc1"]["bias"] != 0).any()
    for path, leaf in named(heads["dino_head"]).items():
        np.testing.assert_array_equal(named(state["extras"]["teacher"]["dino_head"])[path], leaf)


def test_an_alarm_of_the_recipe_is_told_once_when_it_has_lasted(teacher):
    (told,) = [text for text in teacher[2] if "falls" in text]
    assert told.startswith("step 5: it falls at 0.")


def test_the_frozen_network_teaches_and_an_average_of_the_student_is_kept(teacher, student):
    state, (model, heads) = saved(student), hub.load_trained(teacher[1])
    kept = named(state["extras"]["teacher"])
    for path, leaf in (named({"backbone": model.params} | heads)).items():
        np.testing.assert_array_equal(kept[path], leaf, err_msg=path)
    result, own = rv.load_model(student), hub.load_trained(student)[1]
    assert (result.config.width, result.config.registers) == (NARROW, 2)
    for path, leaf in named(result.params).items():
        np.testing.assert_array_equal(leaf, named(state["extras"]["ema"]["backbone"])[path])
    assert own.keys() == {"dino_head"}, "it can teach in its turn"
    behind = {p for p, leaf in named(state["extras"]["ema"]).items() if (leaf != named(state["params"])[p]).any()}
    assert behind == named(state["params"]).keys() - {"backbone/mask_token"}
    assert {"dino_global", "ibot"} <= lines(student)[-1].keys()


def test_all_patches_of_whole_crops_are_compared(teacher):
    """The iBOT term is the mean cross-entropy over both crops, all images and all patches."""
    model, heads = hub.load_trained(teacher[1])
    c = config(dinov2__distill_from=str(teacher[1]), dinov2__dino_weight=0.0)
    of = DINOv2(c)
    of.prepare({"distill_from": model, "distill_from:heads": heads})
    params = random(jax.eval_shape(of.init, KEY, {})[0], 1)
    extras = {"teacher": {"backbone": model.params} | heads, "center": {"ibot": jnp.linspace(-0.1, 0.1, K)}}
    images = np.random.default_rng(2).integers(0, 256, (B, 2, 16, 16, 3)).astype(np.uint8)
    prepared = of.augment({"global": images}, KEY, 0)
    assert prepared.keys() == {"global", "masks", "drop"} and prepared["masks"] is prepared["drop"]["global"] is None
    loss, aux = jax.jit(of.loss)(params, extras, prepared, KEY, 0)

    normal = (images.reshape(-1, 16, 16, 3) / 255 - np.array(of.preprocessing.mean)) / np.array(of.preprocessing.std)
    normal = np.float32(normal)

    @jax.jit
    def logits():
        student = rv.Model(params["backbone"], of.vit)(normal).patches
        said = apply_head(of.teacher.heads["dino_head"], heads["dino_head"], model(normal).patches)
        return said, apply_head(of.heads["dino_head"], params["dino_head"], student)

    said, guess = map(np.float64, logits())
    guess /= 0.1
    target = np.exp((np.float64(said) - np.linspace(-0.1, 0.1, K)) / 0.04)
    target /= target.sum(-1, keepdims=True)
    log_softmax = guess - np.log(np.exp(guess).sum(-1, keepdims=True))
    np.testing.assert_allclose(loss, -(target * log_softmax).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["means"]["ibot"], np.float64(said).reshape(-1, K).mean(0), rtol=1e-4, atol=1e-6)
    assert of.views.bound * 8 == 2 * B * PATCHES


def test_the_work_of_the_teacher_is_that_of_its_own_size(teacher):
    of = DINOv2(config())
    before = of.train_flops()
    of.prepare(dict(zip(("distill_from", "distill_from:heads"), hub.load_trained(teacher[1]), strict=True)))
    trunk = 2 * (forward_flops(of.teacher.vit, 16) - forward_flops(of.vit, 16))
    rows = 2 + 2 * PATCHES
    heads = rows * (head_flops(of.teacher.heads["dino_head"]) - head_flops(of.heads["dino_head"]))
    assert trunk > 0 < heads
    assert of.train_flops() - before == pytest.approx(trunk + heads)


def test_the_size_of_all_patches_times_prototypes_is_told(caplog):
    caplog.set_level(logging.INFO)
    DINOv2(config(dinov2__prototypes=2**20)).prepare({})
    assert "all 512 patches of the global crops: 1048576 prototypes of each are 2.0 GiB" in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dinov2__prototypes": 20}, "needs config.dinov2.prototypes=12, it is 20"),
        ({"model__patch_size": 8}, "needs config.model.patch_size=4, it is 8"),
        ({"data__mean": (0.5, 0.5, 0.5)}, r"needs config.data.mean=\(0.485, 0.456, 0.406\)"),
        (
            {"dinov2__separate_head": True},
            "no ibot_head; it has dino_head: set config.dinov2.separate_head=False",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_with_the_key(teacher, change, message):
    model, heads = hub.load_trained(teacher[1])
    with pytest.raises(ValueError, match=message):
        DINOv2(config(**change)).prepare({"distill_from": model, "distill_from:heads": heads})


def test_released_weights_have_no_heads_and_the_error_says_what_to_do(teacher):
    with pytest.raises(ValueError, match="runs/teacher holds no dino_head; released weights .*freeze_backbone"):
        DINOv2(config()).prepare({"distill_from": teacher[0], "distill_from:heads": {}})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dinov2__mask_prob": 0.5}, "mask_prob=0.5 must be 0 with distill_from: its student sees whole images"),
        ({"model__drop_path": 0.1}, "config.model.drop_path must be 0 with config.dinov2.distill_from"),
        ({"dinov2__distill_from": ""}, "mask_prob=0.0 must be large enough"),
    ],
)
def test_a_distillation_has_no_masks_and_no_stochastic_depth(change, message):
    with pytest.raises(ValueError, match=message):
        DINOv2(config(**change))
