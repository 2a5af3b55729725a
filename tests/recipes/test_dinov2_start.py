"""A DINOv2 run that starts from other weights: what is taken of them, how long the trunk waits, heads of an earlier
run."""

import jax
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax import sharding, train
from regvit_jax.config import defaults
from regvit_jax.flops import forward_flops
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import abstract_params
from regvit_jax.models.prototype_head import init_head
from regvit_jax.recipes import dinov2
from regvit_jax.recipes.dinov2 import DINOv2
from regvit_jax.recipes.dinov2_start import size_of
from regvit_jax.trees import map_named, named

FROZEN, STEPS = 2, 4


def config(**options):
    """4 x 4 patches, one local crop of 2 x 2, crops from the host."""
    c = defaults("dinov2")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_ti16", 16, 4, 3
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = 16, 2, 2, 32
    c.model.layerscale, c.model.drop_path = 0.5, 0.0
    c.data.augment_on = "host"
    c.batch_size, c.total_steps, c.dtype = 8, 10, "float32"
    o = c.dinov2
    o.local_size, o.local_crops, o.prototypes, o.head_hidden, o.bottleneck = 8, 1, 12, 24, 6
    o.freeze_last_layer, o.momentum = 0, 0.9
    c.optim.lr, c.optim.warmup_steps = 1e-2, 2
    for name, value in options.items():
        o[name] = value
    return c


def random(vit, seed=0):
    rng = np.random.default_rng(seed)
    params = map_named(lambda _, x: rng.normal(0, 0.1, x.shape).astype(np.float32), abstract_params(vit))
    return rv.Model(params, vit)


class Started:
    """A run on the weights of a smaller network, its state at the start and after each of four updates."""

    def __init__(self, folder):
        size = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "patch_size": 4}
        self.bare = random(ViTConfig(**size, image_size=24, layerscale=0.5))
        rv.save_model(self.bare, folder)
        c = config(freeze_backbone=FROZEN, ibot_weight=0.0, mask_prob=0.0, koleo_weight=0.0, local_crops=0)
        c.init_from = str(folder)
        mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
        with jax.set_mesh(mesh):
            step = train.build_step(c, mesh, train.read(DINOv2.paths(c)))
            state, self.states, self.metrics = step.init(), [], []
            self.states.append(jax.device_get(state))
            rng = np.random.default_rng(0)
            for _ in range(STEPS):
                crops = {n: rng.integers(0, 256, s.shape).astype(s.dtype) for n, s in step.recipe.input_spec.items()}
                state, metrics = step.update(state, sharding.put(crops, mesh))
                self.states.append(jax.device_get(state))
                self.metrics.append({name: float(value) for name, value in metrics.items()})

    def moved(self, since, to, *path):
        """Of a sub-tree, the names of what changed between two states."""
        before, after = self.states[since], self.states[to]
        for part in path:
            before, after = before[part], after[part]
        before, after = named(before), named(after)
        return {name for name in before if (before[name] != after[name]).any()}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    return Started(tmp_path_factory.mktemp("bare"))


def test_both_networks_start_from_the_adapted_weights_and_with_fresh_heads(started):
    params, teacher = started.states[0]["params"], named(started.states[0]["extras"]["teacher"])
    for path, leaf in named(params).items():
        np.testing.assert_array_equal(teacher[path], leaf, err_msg=path)
    trunk, given = named(params["backbone"]), named(started.bare.params)
    assert trunk.keys() - given.keys() == {"register_tokens", "mask_token"}
    assert {name for name in given if trunk[name].shape != given[name].shape} == {"pos_embed"}
    for name in given.keys() - {"pos_embed"}:
        np.testing.assert_array_equal(trunk[name], given[name], err_msg=name)
    assert trunk["register_tokens"].shape == (1, 3, 16)
    assert (params["dino_head"]["last_layer"]["g"] == 1).all() and not params["dino_head"]["fc1"]["bias"].any()


def test_the_trunk_waits_for_its_heads_and_starts_with_a_warm_up_of_its_own(started):
    assert not started.moved(0, FROZEN, "params", "backbone") and not started.moved(0, FROZEN, "opt", "mu", "backbone")
    assert not started.moved(0, FROZEN, "extras", "teacher", "backbone"), "to the last bit"
    heads = {name for name in started.moved(0, FROZEN, "extras", "teacher") if name.startswith("dino_head")}
    assert len(heads) == len(named(started.states[0]["params"]["dino_head"]))
    # Its first update has rate 0, as the run's own first; moments gather.
    assert not started.moved(0, FROZEN + 1, "params", "backbone")
    assert started.moved(FROZEN, FROZEN + 1, "opt", "mu", "backbone")
    everything = named(started.states[0]["params"]["backbone"]).keys() - {"mask_token"}
    assert started.moved(0, FROZEN + 2, "params", "backbone") == everything
    assert started.moved(0, FROZEN + 2, "extras", "teacher", "backbone") == everything
    rates = [(m["lr"], m["backbone_lr"]) for m in started.metrics[FROZEN:]]
    assert rates[0][1] == 0 and rates[1][1] == rates[1][0] > 0


def test_a_trunk_that_never_moves_has_no_moments_and_no_backward_pass():
    fixed, free = DINOv2(config(freeze_backbone=10)), DINOv2(config())
    assert fixed.param_groups("backbone/norm/scale").frozen is True
    assert fixed.param_groups("dino_head/fc1/kernel").frozen == 0
    trunk = free.train_flops() - fixed.train_flops()
    # Two of three passes over 2 global crops and a local one.
    assert trunk == pytest.approx(2 * (2 * forward_flops(free.vit, 16) + forward_flops(free.vit, 8)))


def heads(**sizes):
    of = DINOv2(config(**sizes))
    return {name: jax.device_get(init_head(size, jax.random.key(3))) for name, size in of.heads.items()}


def test_heads_of_an_earlier_run_are_taken_on_request(monkeypatch):
    c = config(init_heads=True)
    c.init_from = "runs/earlier"
    of, found = DINOv2(c), heads()
    assert size_of(found["dino_head"]) == of.heads["dino_head"]
    model = rv.Model(jax.eval_shape(of.init, jax.random.key(0), {})[0]["backbone"], of.vit)
    ready = of.prepare({"init_from": model, "init_from:heads": found | {"other": {}}})
    assert ready.keys() == {"init_from", "heads"}
    for fresh in ("init_params", "init_head"):  # they take long to compile, and are not what this is about
        monkeypatch.setattr(dinov2, fresh, lambda *given: {})
    params, extras = of.init(jax.random.key(0), {"heads": ready["heads"]})
    for path, leaf in named(found["dino_head"]).items():
        np.testing.assert_array_equal(named(params["dino_head"])[path], leaf)
        np.testing.assert_array_equal(named(extras["teacher"]["dino_head"])[path], leaf)


@pytest.mark.parametrize(
    "found, message",
    [
        ({}, "init_heads: runs/earlier holds no dino_head; they lie in the workdir of a DINOv2 run alone"),
        ({"ibot_head": {}}, "holds no dino_head; it has ibot_head: set config.dinov2.separate_head=True"),
        (
            {"prototypes": 20, "head_hidden": 16, "head_layers": 2},
            "head_hidden=16 .now 24., config.dinov2.prototypes=20 .now 12., config.dinov2.head_layers=2 .now 3.",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(found, message):
    c = config(init_heads=True)
    c.init_from = "runs/earlier"
    of = DINOv2(c)
    found = heads(**found) if "prototypes" in found else found
    model = rv.Model(jax.eval_shape(of.init, jax.random.key(0), {})[0]["backbone"], of.vit)
    with pytest.raises(ValueError, match=message):
        of.prepare({"init_from": model, "init_from:heads": found})


def test_keys_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="config.init_from must be given where config.dinov2.init_heads is True"):
        DINOv2(config(init_heads=True))
    with pytest.raises(ValueError, match="freeze_backbone=-1 must be at least 0"):
        DINOv2(config(freeze_backbone=-1))
