"""Whole DINOv2 runs on tiny scenes: the same losses on any mesh, nothing sent but parameters and sums, interrupted and
resumed to the last bit, and a network that learns without collapse."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax import loop, sharding, stopping, train
from regvit_jax.checkpoint import Checkpoints
from regvit_jax.config import defaults
from regvit_jax.data.feed import feed
from regvit_jax.data.sources import open_source
from regvit_jax.trees import named

STEPS = 30
# Tokens, prototypes and size of the unit vector before them: no other axis of anything has these lengths.
GLOBAL, LOCAL, K, UNIT = 1 + 2 + 16, 1 + 2 + 4, 40, 24


@pytest.fixture(scope="module", autouse=True)
def kept():
    """Every mesh has one step, built and compiled once for all runs on it; all start from one state, made once."""
    build, steps, start = train.build_step, {}, []

    def init(step):
        start[:] = start or [sharding.gather(step.init())]
        return jax.device_put(start[0], jax.tree.map(lambda leaf: leaf.sharding, step.abstract))

    def built(config, mesh, loaded=None):
        if mesh.devices.shape not in steps:
            step, place = build(config, mesh), sharding.batch_sharding(mesh)
            batch = {name: s.update(sharding=place) for name, s in step.recipe.input_spec.items()}
            update = step.update.lower(step.abstract, batch).compile()
            steps[mesh.devices.shape] = dataclasses.replace(step, update=update, init=lambda: init(step))
        return steps[mesh.devices.shape]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.flops, "measured_peak", lambda device, dtype: 1e11)
        patch.setattr(train, "build_step", built)
        yield
        jax.config.update("jax_compilation_cache_dir", None)


def config():
    """Eight groups of two images, crops on the device, everything on."""
    c = defaults("dinov2")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_ti16", 16, 4, 2
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = 32, 2, 2, 64
    c.model.layerscale, c.model.position_init, c.model.drop_path = 0.3, "sincos", 0.25
    c.data.train = "scenes:?size=16&n=64&n_test=8"
    c.batch_size, c.groups, c.total_steps, c.dtype = 16, 8, STEPS, "float32"
    o = c.dinov2
    o.source_size, o.local_size, o.local_crops = 16, 8, 2
    o.prototypes, o.head_hidden, o.bottleneck = K, 32, UNIT
    # Crops and flips alone: colours take longer to compile than all of the rest, and have tests of their own.
    o.jitter, o.gray, o.blur, o.solarize = 0.0, 0.0, (0.0, 0.0, 0.0), 0.0
    o.centering, o.teacher_temp_start, o.teacher_temp_warmup = "softmax", 0.07, 0
    o.freeze_last_layer, o.momentum, o.weight_decay_end = 2, 0.9, 0.1
    o.lr_scaling = "none"
    c.optim.lr, c.optim.end_lr, c.optim.warmup_steps, c.optim.layer_decay = 3e-3, 0.0, 4, 0.9
    # A gradient that is zero but for rounding is blown up by Adam to the size of the others.
    c.optim.eps = 1e-4
    c.mesh.fsdp, c.mesh.fsdp_min_bytes = 4, 0
    c.log_every, c.save_every, c.eval_every = 1, 100, 0
    return c


class Three:
    """The step of a mesh and what three updates give."""

    def __init__(self, data, fsdp):
        mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
        source = open_source(config().data.train)
        with jax.set_mesh(mesh):
            self.step = step = train.build_step(config(), mesh)
            state = step.init()
            self.start = sharding.gather(state)
            order = {"seed": 0, "batch_size": 16, "start_step": 0, "stop_step": 3}
            batches = list(feed(source, step.recipe.transform, mesh, fields=tuple(step.recipe.input_spec), **order))
            self.metrics = []
            for batch in batches:
                state, metrics = step.update(state, batch)
                self.metrics.append({name: float(value) for name, value in metrics.items()})
            self.end = sharding.gather(state)


@pytest.fixture(scope="module")
def one():
    return Three(1, 1)


@pytest.fixture(scope="module")
def eight():
    return Three(2, 4)


def test_teacher_and_student_start_equal_and_centres_at_zero(one):
    teacher = named(one.start["extras"]["teacher"])
    for path, leaf in named(one.start["params"]).items():
        np.testing.assert_array_equal(teacher[path], leaf)
    assert {name: (x.shape, np.abs(x).max()) for name, x in one.start["extras"]["center"].items()} == {
        "dino": ((K,), 0.0),
        "ibot": ((K,), 0.0),
    }


def test_losses_and_updates_do_not_depend_on_the_mesh(one, eight):
    for ours, theirs in zip(eight.metrics, one.metrics, strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    moved = 0.0
    for path, leaf in named(eight.end).items():
        np.testing.assert_allclose(leaf, named(one.end)[path], rtol=0, atol=1e-5, err_msg=path)
        moved = max(moved, np.abs(leaf - named(one.start)[path]).max())
    assert moved > 1e-3
    teacher = eight.step.abstract["extras"]["teacher"]
    assert jax.tree.map(lambda x: x.sharding, teacher) == jax.tree.map(
        lambda x: x.sharding, eight.step.abstract["params"]
    )


def test_prototypes_wait_while_all_else_moves(one):
    """Two updates of rate 0 for the prototypes, the first of them of rate 0 for all; the third moves everything."""
    rates = [(m["lr"], m["last_layer_lr"]) for m in one.metrics]
    assert rates[0] == (0, 0) and rates[1][0] > rates[1][1] == 0 and rates[2][0] == rates[2][1] > 0
    still = {
        path for path, leaf in named(one.end["params"]).items() if (leaf == named(one.start["params"])[path]).all()
    }
    assert still == set(), "registers and the mask token move too"


def test_no_activation_leaves_its_device(eight):
    """Of the 8 groups each lies on one of the 8 devices: sums of gradients and gathered parameters are all there is."""
    ops = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
    found = re.findall(rf"= (.*?) ({ops})(?:-start)?\(", eight.step.update.as_text())
    shapes = [
        [int(n) for n in dims.split(",") if n] for results, _ in found for dims in re.findall(r"\[([\d,]*)\]", results)
    ]
    assert {op for _, op in found} == {"all-gather", "all-reduce"}
    assert not [shape for shape in shapes if {GLOBAL, LOCAL} & set(shape)], "tokens"
    assert {tuple(shape) for shape in shapes if K in shape} <= {(K,), (UNIT, K), (K, UNIT)}, "logits"
    assert max(map(len, shapes)) <= 2, "images"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    result = train.run(config(), workdir)
    assert (result.step, result.stopped) == (STEPS, False)
    return workdir


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_stopped_and_resumed_run_is_bitwise_the_same(straight, tmp_path, monkeypatch):
    def saved(workdir):
        with Checkpoints(workdir, create=False) as checkpoints:
            return named({item: checkpoints.restore_item(item) for item in ("params", "opt", "extras")})

    with monkeypatch.context() as patch:
        patch.setattr(stopping.Stop, "requested", lambda self, done: done == 11)
        assert train.run(config(), tmp_path).step == 11
    assert train.run(config(), tmp_path).step == STEPS
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(straight)]
    ours, theirs = saved(tmp_path), saved(straight)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert np.asarray(ours[path]).tobytes() == np.asarray(leaf).tobytes(), path


def test_the_student_learns_and_the_teacher_does_not_collapse(straight):
    records = lines(straight)
    terms = ("dino_global", "dino_local", "ibot", "koleo")
    for record in records:
        assert sum(record[name] for name in terms) == pytest.approx(record["loss"], rel=1e-5)
    # What the student has still to learn is the divergence, cross-entropy less entropy. The loss itself rises, since a
    # fresh teacher says nearly the same of every image, and that grows apart.
    surprise = [r["dino_global"] + r["dino_local"] - r["teacher_entropy"] for r in records]
    assert np.mean(surprise[-5:]) < 0.5 * np.mean(surprise[:3])
    assert records[-1]["prototypes_used"] > 2 * records[0]["prototypes_used"] and records[-1]["prototypes_used"] > K / 4
    assert records[-1]["teacher_entropy"] < 0.99 * np.log(K), "a teacher that says nothing"
    np.testing.assert_allclose([r["momentum"] for r in records], 1 - 0.05 * (1 + np.cos(np.pi * np.arange(30) / 30)))


def test_the_saved_model_is_the_teachers_backbone(straight):
    model = rv.load_model(straight)
    assert (model.config.registers, model.config.num_classes) == (2, 0)
    with Checkpoints(straight, create=False) as checkpoints:
        teacher = named(checkpoints.restore_item("extras"))
    for path, leaf in named(model.params).items():
        np.testing.assert_array_equal(leaf, teacher[f"teacher/backbone/{path}"])
    assert model(np.zeros((1, 16, 16, 3), np.float32)).registers.shape == (1, 2, 32)
