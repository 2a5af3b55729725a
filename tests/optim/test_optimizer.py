"""Optimiser: AdamW against optax, rates and decay by group, clipping, freezing, EMA; on a mesh and under donation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regvit_jax import optim, trees
from regvit_jax.optim import PER_TENSOR, Group, OptimConfig, Optimizer, default_group, schedule

DEPTH = 3
CONFIG = OptimConfig(lr=0.01, schedule="constant", warmup_steps=0, weight_decay=0.1, clip_norm=0.0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_params():
    return {
        "patch_embed": {"kernel": normal(0, 4, 3), "bias": normal(1, 3)},
        "cls_token": normal(2, 1, 3),
        "blocks": {"norm1": {"scale": normal(3, DEPTH, 3)}, "mlp": {"fc1": {"kernel": normal(4, DEPTH, 3, 5)}}},
        "head": {"kernel": normal(5, 3, 2), "bias": normal(6, 2)},
    }


def make_grads(params, step):
    return jax.tree.map(lambda x: normal(100 + step, *x.shape), params)


def make_optimizer(params, config=CONFIG, schedules=None, **changes):
    """Every leaf with the default group; `changes` maps the first path component to a function Group -> Group."""
    groups = {path: default_group(path, depth=DEPTH, layer_decay=config.layer_decay) for path in trees.named(params)}
    for path, group in groups.items():
        if path.split("/")[0] in changes:
            groups[path] = changes[path.split("/")[0]](group)
    return Optimizer(config, groups, schedules or {"lr": optim.lr_schedule(config, 100)})


def run(optimizer, params, steps, grads=make_grads):
    opt = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        params, opt, metrics = update(grads(params, step), opt, params, step)
    return params, opt, metrics


def assert_close(got, want, rtol=1e-6, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def test_adamw_is_optax_adamw_with_masked_decay():
    params = make_params()
    config = dataclasses.replace(CONFIG, schedule="cosine", warmup_steps=4)
    mask = {"patch_embed": {"kernel": True, "bias": False}, "cls_token": False, "head": {"kernel": True, "bias": False}}
    mask["blocks"] = {"norm1": {"scale": False}, "mlp": {"fc1": {"kernel": True}}}
    tx = optax.adamw(optim.lr_schedule(config, 100), weight_decay=0.1, mask=mask)
    want, state = params, tx.init(params)
    for step in range(10):
        updates, state = tx.update(make_grads(params, step), state, want)
        want = optax.apply_updates(want, updates)
    got, opt, metrics = run(make_optimizer(params, config), params, 10)
    assert_close(got, want)
    assert_close(opt, {"mu": state[0].mu, "nu": state[0].nu})
    assert metrics["lr"] == optim.lr_schedule(config, 100)(9)


def test_the_first_step_moves_by_the_learning_rate():
    # Adam's first direction is the sign of the gradient, so no decay and lr 0.01 mean 0.01 everywhere.
    config = dataclasses.replace(CONFIG, weight_decay=0.0)
    params = make_params()
    got, _, metrics = run(make_optimizer(params, config), params, 1)
    want = jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, make_grads(params, 0))
    assert_close(got, want)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert float(metrics["update_norm"]) == pytest.approx(0.01 * count**0.5, rel=1e-5)
    assert float(metrics["param_norm"]) == pytest.approx(float(optax.tree.norm(got)), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(make_grads(params, 0))), rel=1e-6)


def test_layer_decay_of_a_stacked_leaf_is_one_rate_a_layer():
    config = dataclasses.replace(CONFIG, layer_decay=0.5)
    params = make_params()
    got, _, _ = run(make_optimizer(params, config), params, 3)

    def alone(leaf_of, rate, decay):
        tx = optax.adamw(0.01 * rate, weight_decay=decay)
        leaf = leaf_of(params)
        state = tx.init(leaf)
        for step in range(3):
            updates, state = tx.update(leaf_of(make_grads(params, step)), state, leaf)
            leaf = optax.apply_updates(leaf, updates)
        return leaf

    for layer, rate in enumerate((0.125, 0.25, 0.5)):
        want = alone(lambda tree, i=layer: tree["blocks"]["mlp"]["fc1"]["kernel"][i], rate, 0.1)
        np.testing.assert_allclose(got["blocks"]["mlp"]["fc1"]["kernel"][layer], want, rtol=1e-6, atol=1e-7)
        want = alone(lambda tree, i=layer: tree["blocks"]["norm1"]["scale"][i], rate, 0.0)
        np.testing.assert_allclose(got["blocks"]["norm1"]["scale"][layer], want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got["cls_token"], alone(lambda tree: tree["cls_token"], 0.0625, 0.0), rtol=1e-6)


def test_groups_follow_their_own_schedule_and_decay_follows_wd():
    params = make_params()
    schedules = {"lr": schedule("constant", 0.01, 9, 0), "held": lambda step: jnp.where(step < 2, 0.0, 0.01)}
    schedules["wd"] = lambda step: jnp.float32(0.5)
    optimizer = make_optimizer(params, schedules=schedules, head=lambda g: dataclasses.replace(g, lr_schedule="held"))
    got, _, metrics = run(optimizer, params, 2, grads=lambda params, step: jax.tree.map(jnp.zeros_like, params))
    # Without a gradient only decay moves: twice by 1 - lr * wd, on what is decayed and has a rate.
    np.testing.assert_allclose(got["patch_embed"]["kernel"], 0.995**2 * params["patch_embed"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(got["cls_token"], params["cls_token"])
    np.testing.assert_array_equal(got["head"]["kernel"], params["head"]["kernel"])
    assert {name: float(metrics[name]) for name in schedules} == pytest.approx({"lr": 0.01, "held": 0.0, "wd": 0.5})


def test_bfloat16_first_moment_is_kept_and_close():
    params = make_params()
    config = dataclasses.replace(CONFIG, mu_dtype="bfloat16")
    got, opt, _ = run(make_optimizer(params, config), params, 4)
    assert {x.dtype for x in jax.tree.leaves(opt["mu"])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves((opt["nu"], got))} == {jnp.dtype("float32")}
    want, _, _ = run(make_optimizer(params), params, 4)
    # Four steps of 0.01, each wrong by at most a few rounding errors of 8 bits.
    assert_close(got, want, rtol=0, atol=5e-4)


def test_clipping_has_one_norm_a_group():
    params = {"trunk": jnp.zeros((2, 2)), "head": jnp.zeros(4), "tail": jnp.zeros(1)}
    groups = {"trunk": Group(clip_group="trunk"), "head": Group(clip_group="head"), "tail": Group(clip_group="head")}
    optimizer = Optimizer(dataclasses.replace(CONFIG, clip_norm=3.0, b1=0.0), groups, {"lr": lambda step: 0.01})
    # The trunk's norm is 6, twice the limit; the head's and tail's together are 2, below it.
    grads = {"trunk": jnp.full((2, 2), 3.0), "head": jnp.full(4, 0.5), "tail": jnp.full(1, 3.0**0.5)}
    _, opt, metrics = run(optimizer, params, 1, grads=lambda params, step: grads)
    # With b1 = 0 the first moment is the gradient that the rule saw.
    assert_close(opt["mu"], grads | {"trunk": grads["trunk"] / 2})
    norms = {name: float(value) for name, value in metrics.items() if name.startswith("grad_norm")}
    assert norms == pytest.approx({"grad_norm": 40**0.5, "grad_norm/trunk": 6.0, "grad_norm/head": 2.0})


def test_clipping_per_tensor_takes_each_layer_by_itself():
    params = {"blocks": {"kernel": jnp.zeros((2, 2, 2))}, "head": {"bias": jnp.zeros(4)}}
    groups = {path: Group(clip_group=PER_TENSOR) for path in trees.named(params)}
    optimizer = Optimizer(dataclasses.replace(CONFIG, clip_norm=1.0, b1=0.0), groups, {"lr": lambda step: 0.01})
    grads = {
        "blocks": {"kernel": jnp.stack([jnp.full((2, 2), 4.0), jnp.full((2, 2), 0.25)])},
        "head": {"bias": jnp.full(4, 5.0)},
    }
    _, opt, _ = run(optimizer, params, 1, grads=lambda params, step: grads)
    want = {"blocks": {"kernel": jnp.stack([jnp.full((2, 2), 0.5), jnp.full((2, 2), 0.25)])}}
    assert_close(opt["mu"], want | {"head": {"bias": jnp.full(4, 0.5)}})


def test_frozen_for_good_has_no_state_and_no_say():
    params = make_params()
    config = dataclasses.replace(CONFIG, clip_norm=1.0)
    optimizer = make_optimizer(params, config, blocks=lambda g: dataclasses.replace(g, frozen=True))
    got, opt, metrics = run(optimizer, params, 2)
    assert set(opt["mu"]) == set(opt["nu"]) == {"patch_embed", "cls_token", "head"}
    jax.tree.map(np.testing.assert_array_equal, got["blocks"], params["blocks"])
    # The rest moves as if the frozen part did not exist, whatever its gradient is.
    rest = {name: tree for name, tree in params.items() if name != "blocks"}
    want, _, alone = run(make_optimizer(rest, config), rest, 2)
    assert_close({name: got[name] for name in rest}, want)
    assert_close(metrics, alone)


def test_everything_frozen_is_a_step_that_does_nothing():
    params = {"head": {"bias": jnp.ones(2)}}
    optimizer = Optimizer(CONFIG, {"head/bias": Group(frozen=True)}, {"lr": lambda step: 0.01})
    got, opt, metrics = run(optimizer, params, 1)
    np.testing.assert_array_equal(got["head"]["bias"], 1.0)
    assert opt == {"mu": {}, "nu": {}} and metrics["grad_norm"] == 0


def test_frozen_until_a_step_thaws_as_if_training_began_there():
    params = make_params()
    config = dataclasses.replace(CONFIG, clip_norm=1.0)
    optimizer = make_optimizer(params, config, head=lambda g: dataclasses.replace(g, frozen=3))
    update = jax.jit(optimizer.update)
    state = params, optimizer.init(params)

    def grads(step):
        # A gradient that is not finite must not leak out of the part that is held.
        tree = make_grads(params, step)
        return tree if step >= 3 else tree | {"head": jax.tree.map(lambda x: x * jnp.nan, tree["head"])}

    def without_head(tree):
        return {name: branch for name, branch in tree.items() if name != "head"}

    for step in range(5):
        *state, metrics = update(grads(step), state[1], state[0], jnp.int32(step))
        if step == 2:
            jax.tree.map(np.testing.assert_array_equal, state[0]["head"], params["head"])
            assert all(not x.any() for x in jax.tree.leaves((state[1]["mu"]["head"], state[1]["nu"]["head"])))
            rest = without_head(params)
            want, _, alone = run(make_optimizer(rest, config), rest, 3, grads=lambda _, step: without_head(grads(step)))
            assert_close({name: state[0][name] for name in rest}, want)
            assert float(metrics["grad_norm"]) == pytest.approx(float(alone["grad_norm"]), rel=1e-6)
    assert update._cache_size() == 1

    # Updates 3 and 4 of the head are updates 1 and 2 of a head that trains alone, with the gradients of those steps
    # clipped by the norm of the whole tree.
    def clipped_grads(_, step):
        tree = make_grads(params, step + 3)
        return {"head": jax.tree.map(lambda x: x / jnp.maximum(optax.tree.norm(tree), 1.0), tree["head"])}

    want, _, _ = run(make_optimizer({"head": params["head"]}), {"head": params["head"]}, 2, grads=clipped_grads)
    assert_close(state[0]["head"], want["head"])


def test_donated_state_keeps_its_structure_also_where_a_branch_is_empty():
    params = make_params() | {"fc_norm": {}}
    optimizer = make_optimizer(params)
    opt = optimizer.init(params)
    want = jax.tree.structure((params, opt))
    update = jax.jit(optimizer.update, donate_argnums=(1, 2))
    grads = make_grads(params, 0)
    params, opt, _ = update(grads, opt, params, 0)
    assert jax.tree.structure((params, opt)) == want


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_sharded_like_the_parameters_gives_the_same_update():
    from regvit_jax import sharding

    mesh = sharding.make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    params = {"blocks": {"kernel": normal(0, DEPTH, 4, 6)}, "head": {"kernel": normal(1, 4, 2)}}
    config = dataclasses.replace(CONFIG, clip_norm=1.0, layer_decay=0.5)
    optimizer = make_optimizer(params, config)
    want = optimizer.update(make_grads(params, 0), optimizer.init(params), params, 0)
    places = sharding.shardings((params, optimizer.init(params)), mesh, min_bytes=0)
    with jax.set_mesh(mesh):
        placed, opt = jax.device_put((params, optimizer.init(params)), places)
        update = jax.jit(optimizer.update, out_shardings=(*places, sharding.replicated(mesh)), donate_argnums=(1, 2))
        got = update(make_grads(params, 0), opt, placed, 0)
    assert "fsdp" in got[1]["mu"]["blocks"]["kernel"].sharding.spec
    assert_close(sharding.gather(got), want)


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_ema(decay):
    ema, params = {"w": jnp.array([1.0, 0.1])}, {"w": jnp.array([5.0, 0.3])}
    got = jax.jit(optim.ema_update)(ema, params, jnp.float32(decay))
    want = {0.0: params["w"], 0.75: [2.0, 0.15], 1.0: ema["w"]}[decay]
    np.testing.assert_allclose(got["w"], want, rtol=0 if decay in (0, 1) else 1e-6)


def test_ema_of_half_precision_weights_does_not_stall():
    # Steps of 1e-4 of the distance are below bfloat16's resolution: an average kept in it would never move.
    ema, params = {"w": jnp.ones(1)}, {"w": jnp.zeros(1, jnp.bfloat16)}
    for _ in range(10):
        ema = optim.ema_update(ema, params, 0.9999)
    assert ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(ema["w"], 0.9999**10, rtol=1e-6)


def test_groups_that_do_not_fit_are_refused_by_name():
    params = make_params()
    with pytest.raises(ValueError, match=r"head/bias.*no schedule 'last'"):
        make_optimizer(params, head=lambda g: dataclasses.replace(g, lr_schedule="last"))
    with pytest.raises(ValueError, match=r"head/bias.*not stacked"):
        make_optimizer(params, head=lambda g: dataclasses.replace(g, lr_mult=np.ones(2))).init(params)
    with pytest.raises(ValueError, match=r"groups without \['head/bias', 'head/kernel'\]"):
        make_optimizer(params).init({name: tree for name, tree in params.items() if name != "head"})


def test_a_bad_section_names_its_key():
    for key, value in (("name", "sgd"), ("mu_dtype", "float16"), ("b2", 1.0), ("layer_decay", 0.0)):
        with pytest.raises(ValueError, match=rf"config\.optim\.{key} must be"):
            optim.validate_optim(dataclasses.replace(CONFIG, **{key: value}))


def test_every_field_of_the_config_says_what_it_is():
    for field in dataclasses.fields(OptimConfig):
        assert len(field.metadata["doc"]) > 10, field.name
