"""The projection head: an independent float64 version, initial values, names, dtypes, where its weights travel."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from regvit_jax import sharding
from regvit_jax.models.prototype_head import HeadConfig, apply_head, init_head
from regvit_jax.optim import default_group
from regvit_jax.trees import named, unname

TINY = HeadConfig(width=8, hidden=24, bottleneck=16, prototypes=40)
apply = jax.jit(apply_head, static_argnums=0, static_argnames=("dtype", "logits_dtype"))


@pytest.fixture(scope="module")
def params():
    """Every parameter random, so that each of them matters."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_head(TINY, jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).normal(size=(2, 16, 8)).astype(np.float32)


def by_definition(params, x):
    """Straight from the formulas, in float64."""
    flat = {path: leaf.astype(np.float64) for path, leaf in named(params).items()}
    x, layers = x.astype(np.float64), sum("kernel" in path for path in flat)
    for i in range(1, layers + 1):
        x = x @ flat[f"fc{i}/kernel"] + flat[f"fc{i}/bias"]
        if i < layers:
            x = x * np.vectorize(math.erf)(x / math.sqrt(2)) / 2 + x / 2
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    rows = [g * v / np.linalg.norm(v) for g, v in zip(flat["last_layer/g"], flat["last_layer/v"].T, strict=True)]
    return x @ np.stack(rows).T


def test_agrees_with_the_definition(params, tokens):
    np.testing.assert_allclose(apply(TINY, params, tokens), by_definition(params, tokens), rtol=1e-4, atol=1e-5)


def test_several_kinds_of_tokens_in_one_call(params, tokens):
    first, rest = apply(TINY, params, (tokens[0], tokens[:, None]))
    want = apply(TINY, params, tokens)
    np.testing.assert_allclose(first, want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rest, want[:, None], rtol=1e-5, atol=1e-6)


def test_one_layer_goes_straight_to_the_bottleneck(params):
    """A bottleneck that copies its input, g = 1: the logits are cosines."""
    config = HeadConfig(width=2, bottleneck=2, prototypes=3, layers=1)
    v = np.array([[1.0, 0.0, 3.0], [0.0, 0.1, -3.0]], np.float32)
    head = unname({"fc1/kernel": np.eye(2, dtype=np.float32), "fc1/bias": np.zeros(2, np.float32)})
    head["last_layer"] = {"g": np.ones(3, np.float32), "v": v}
    got = apply(config, head, np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(got, [[0.6, 0.8, -0.2 / math.sqrt(2)], [0, 0, 0]], rtol=1e-5)


def test_only_the_direction_of_v_matters(params, tokens):
    flat = named(params)
    scaled = unname(flat | {"last_layer/v": flat["last_layer/v"] * np.linspace(0.01, 100, 40, dtype=np.float32)})
    np.testing.assert_allclose(apply(TINY, scaled, tokens), apply(TINY, params, tokens), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def fresh():
    config = HeadConfig(width=384, hidden=256, bottleneck=64, prototypes=512)
    return named(sharding.jit_once(lambda key: init_head(config, key))(jax.random.key(0)))


def test_initial_parameters_have_these_names_and_shapes(fresh):
    assert {path: leaf.shape for path, leaf in fresh.items()} == {
        "fc1/kernel": (384, 256), "fc1/bias": (256,), "fc2/kernel": (256, 256), "fc2/bias": (256,),
        "fc3/kernel": (256, 64), "fc3/bias": (64,), "last_layer/g": (512,), "last_layer/v": (64, 512),
    }  # fmt: skip
    assert all(leaf.dtype == jnp.float32 for leaf in fresh.values())


def test_initial_projections_are_normal(fresh):
    for i in (1, 2, 3):
        kernel = np.asarray(fresh[f"fc{i}/kernel"])
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.02)
        # Not cut off at two standard deviations, which would leave none of 16,000 or more beyond.
        assert np.abs(kernel).max() > 0.06
        np.testing.assert_array_equal(fresh[f"fc{i}/bias"], 0.0)


def test_initial_prototypes_are_torchs(fresh):
    v = np.asarray(fresh["last_layer/v"])
    assert 0.124 < v.max() < 0.125 and -0.125 < v.min() < -0.124  # 1 / sqrt(64)
    np.testing.assert_allclose(v.std(), 0.125 / math.sqrt(3), rtol=0.01)
    np.testing.assert_array_equal(fresh["last_layer/g"], 1.0)


def test_sizes_of_dinov2():
    shapes = jax.eval_shape(lambda: init_head(HeadConfig(width=1024), jax.random.key(0)))
    sizes = {path: leaf.shape for path, leaf in named(shapes).items() if not path.endswith("bias")}
    assert sizes == {
        "fc1/kernel": (1024, 2048), "fc2/kernel": (2048, 2048), "fc3/kernel": (2048, 256),
        "last_layer/g": (65536,), "last_layer/v": (256, 65536),
    }  # fmt: skip


def test_biases_alone_are_not_decayed(params):
    decayed = {path for path in named(params) if default_group(path, depth=2).wd_mult}
    assert decayed == {path for path in named(params) if not path.endswith("/bias")}


def test_gradients_are_finite_where_a_vector_has_no_length(params):
    flat = named(params)
    silent = unname({path: 0 * leaf if path.startswith("fc3") else leaf for path, leaf in flat.items()})
    grads = jax.jit(jax.grad(lambda p, x: apply_head(TINY, p, x).sum()))(silent, np.ones((3, 8), np.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_half_precision_multiplies_and_float32_measures_lengths(params, tokens):
    want = by_definition(params, tokens)
    got = apply(TINY, params, tokens, dtype="bfloat16")
    assert got.dtype == jnp.bfloat16
    # Three products and a unit vector, each rounded to 8 bits.
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=8 * 2**-8 * np.abs(want).max())
    wide = apply(TINY, params, tokens, dtype="bfloat16", logits_dtype="float32")
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), got)
    jaxpr = str(jax.make_jaxpr(lambda p, x: apply_head(TINY, p, x, "bfloat16"))(params, tokens))
    products = re.findall(r"(\w+)\[[\d,]*\] = dot_general", jaxpr)
    roots = re.findall(r"(\w+)\[[\d,]*\] = (?:sqrt|rsqrt|div|square|integer_pow)\b", jaxpr)
    assert products == ["bf16"] * 4
    assert len(roots) >= 4 and set(roots) == {"f32"}


def test_weights_travel_and_logits_stay(params, tokens):
    """Examples and every parameter split over 8 devices: what is gathered is weights, each once, and no array of logits
    is whole."""
    mesh = sharding.make_mesh(fsdp=8, data=1)
    x = tokens.reshape(32, 8)

    def loss(params, x):
        logits, halved = apply_head(TINY, params, (x, x / 2))
        return (logits**2).sum() + halved.sum(), logits

    program = jax.jit(jax.grad(loss, has_aux=True))
    want = program(params, x)
    with jax.set_mesh(mesh):
        where = sharding.shardings(params, mesh, min_bytes=0)
        placed = jax.device_put(params, where), jax.device_put(x, NamedSharding(mesh, P(sharding.BATCH)))
        assert where["last_layer"]["v"].spec == P(None, "fsdp") and where["last_layer"]["g"].spec == P("fsdp")
        split = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(where, NamedSharding(mesh, P(sharding.BATCH))))
        compiled = split.lower(*placed).compile()
        got, text = compiled(*placed), compiled.as_text()
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\].*? all-gather(?:-start)?\(", text)
    assert gathered.count("16,40") == 1 and not any(shape.startswith("32,") for shape in gathered)
    assert "f32[4,40]" in text and "f32[32,40]" not in text
    assert not re.search(r"all-to-all\(|collective-permute\(", text)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)


@pytest.mark.parametrize("field", ["width", "hidden", "bottleneck", "prototypes", "layers"])
def test_sizes_below_1_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be 1 or more, got 0"):
        HeadConfig(**({"width": 8} | {field: 0}))
