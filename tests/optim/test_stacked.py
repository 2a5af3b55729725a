"""A stacked leaf is its layers: the update of a stack equals that of the same layers as separate tensors, in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax import trees
from regvit_jax.optim import PER_TENSOR, OptimConfig, Optimizer, default_group

DEPTH, STEPS = 3, 4
CONFIG = OptimConfig(
    lr=0.01, schedule="constant", warmup_steps=0, weight_decay=0.1, b1=0.9, b2=0.95, clip_norm=0.5, layer_decay=0.6
)
SHAPES = {
    "patch_embed/kernel": (4, 3),
    "blocks/attn/qkv/kernel": (DEPTH, 3, 3, 3),
    "blocks/attn/qkv/bias": (DEPTH, 3, 3),
    "blocks/ls1/gamma": (DEPTH, 3),
    "head/kernel": (3, 2),
}
# Layer 0 comes before the blocks, layer DEPTH + 1 after them; matrices alone are decayed.
LAYERS = {"patch_embed/kernel": 0, "head/kernel": DEPTH + 1}
DECAYED = {"patch_embed/kernel", "blocks/attn/qkv/kernel", "head/kernel"}


def tensors(seed, scale):
    """{(path, layer or None): float64 array}: every tensor of the network by itself. Their sizes differ from layer to
    layer, so that some are clipped and others are not."""
    rng, out = np.random.default_rng(seed), {}
    for path, shape in SHAPES.items():
        for layer in range(DEPTH) if path.startswith("blocks") else [None]:
            size = shape[1:] if layer is not None else shape
            out[path, layer] = scale * 4.0 ** -(layer or 0) * rng.standard_normal(size)
    return out


def stacked(tensors):
    """The same as the package holds them."""
    out = {}
    for path in SHAPES:
        parts = [value for (name, _), value in tensors.items() if name == path]
        out[path] = jnp.asarray(np.stack(parts) if path.startswith("blocks") else parts[0], jnp.float32)
    return trees.unname(out)


def adamw(params, grads_of, clip):
    """Loshchilov and Hutter's Algorithm 2, tensor by tensor. `clip` is "each" or "all"."""
    c, mu, nu = CONFIG, {}, {}
    for step in range(STEPS):
        grads = grads_of(step)
        whole = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, grad in grads.items():
            path, layer = name
            norm = np.sqrt((grad**2).sum()) if clip == "each" else whole
            grad = grad * min(1.0, c.clip_norm / norm)
            mu[name] = c.b1 * mu.get(name, 0.0) + (1 - c.b1) * grad
            nu[name] = c.b2 * nu.get(name, 0.0) + (1 - c.b2) * grad**2
            direction = mu[name] / (1 - c.b1 ** (step + 1))
            direction = direction / (np.sqrt(nu[name] / (1 - c.b2 ** (step + 1))) + c.eps)
            place = LAYERS[path] if layer is None else layer + 1
            rate = c.lr * c.layer_decay ** (DEPTH + 1 - place)
            decay = c.weight_decay if path in DECAYED else 0.0
            params = params | {name: params[name] - rate * (direction + decay * params[name])}
    return params, mu, nu


@pytest.mark.parametrize("clip", ["each", "all"])
def test_a_stack_is_updated_as_its_layers_would_be(clip):
    start = tensors(0, 1.0)

    def grads_of(step):
        return tensors(1 + step, 0.3)

    norms = [np.sqrt((g**2).sum()) for g in grads_of(0).values()]
    assert min(norms) < CONFIG.clip_norm < max(norms)
    groups = {path: default_group(path, depth=DEPTH, layer_decay=CONFIG.layer_decay) for path in SHAPES}
    if clip == "each":
        groups = {path: dataclasses.replace(group, clip_group=PER_TENSOR) for path, group in groups.items()}
    optimizer = Optimizer(CONFIG, groups, {"lr": lambda step: jnp.float32(CONFIG.lr)})
    params = stacked(start)
    opt = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        params, opt, _ = update(stacked(grads_of(step)), opt, params, step)
    want, mu, nu = adamw(start, grads_of, clip)
    for got, expected in ((params, want), (opt["mu"], mu), (opt["nu"], nu)):
        for path, leaf in trees.named(stacked(expected)).items():
            # Float32 against float64: a few roundings in each of a few steps.
            np.testing.assert_allclose(trees.named(got)[path], leaf, rtol=2e-5, atol=1e-7, err_msg=path)


def test_norms_of_a_stack_are_one_a_layer():
    """What a rule with a norm of its own (LAMB, clipping by tensor) reduces over."""
    assert trees.layer_axes("blocks/attn/qkv/kernel", 4) == (1, 2, 3)
    assert trees.layer_axes("teacher/blocks/ls1/gamma", 2) == (1,)
    assert trees.layer_axes("head/kernel", 2) == (0, 1)
