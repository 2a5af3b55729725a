"""Which dtype everything has, read from the jaxpr: bfloat16 products and residual stream, float32 where it matters."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from regvit_jax.models.config import Execution
from regvit_jax.trees import named

# Every option that computes something of its own.
RICH = {
    "activation": "swiglu",
    "layerscale": 0.1,
    "pre_norm": True,
    "position": "all",
    "mask_token": True,
    "pool": "map",
}
RICH |= {"fc_norm": True, "num_classes": 5, "drop_path": 0.3}
RUNS = {
    "scan": Execution("bfloat16"),
    "unroll": Execution("bfloat16", unroll=True),
    "dots": Execution("bfloat16", remat="dots"),
    "reference": Execution("bfloat16", remat="full", attention="reference"),
}


def equations(jaxpr):
    """Every equation, those inside scan, jit and remat too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def of(name, jaxpr):
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == name]


def operands(eqns):
    """The dtypes of inputs of equations."""
    return [tuple(var.aval.dtype.name for var in eqn.invars) for eqn in eqns]


def factors(eqn):
    """What a dot_general multiplies. In the backward pass of attention it gets a float32 cotangent, together with the
    algorithm that rounds it to bfloat16 first."""
    if eqn.params["precision"] == jax.lax.DotAlgorithmPreset.BF16_BF16_F32:
        return "bfloat16", "bfloat16"
    return operands([eqn])[0]


def forward(model, images, key):
    """Everything that a call can do: masks, stochastic depth, head."""
    mask = jnp.arange(images.shape[1] // 4 * (images.shape[2] // 4)) % 2 == 0
    module = model.module()
    tokens = module(images, patch_mask=jnp.broadcast_to(mask, (images.shape[0], len(mask))), key=key)
    return tokens, module.logits(tokens)


def loss(model, images, key):
    tokens, logits = forward(model, images, key)
    return logits.sum() + sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(tokens))


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    return RUNS[request.param]


@pytest.fixture(scope="module")
def jaxprs(tiny, images, run):
    model = tiny(run, **RICH)
    args = model, images, jax.random.key(0)
    return jax.make_jaxpr(forward)(*args).jaxpr, jax.make_jaxpr(jax.value_and_grad(loss))(*args).jaxpr


class TestHalfPrecision:
    def test_every_matrix_product_has_bfloat16_operands(self, jaxprs):
        for jaxpr in jaxprs:
            dots = collections.Counter(factors(eqn) for eqn in of("dot_general", jaxpr))
            assert dots.keys() == {("bfloat16", "bfloat16")} and dots.total() > 10

    def test_softmax_and_norm_statistics_are_float32(self, jaxprs):
        for jaxpr in jaxprs:
            assert {dtype for (dtype,) in operands(of("rsqrt", jaxpr))} == {"float32"}
            assert {dtype for (dtype,) in operands(of("exp", jaxpr))} == {"float32"}
        sums = operands(of("reduce_sum", jaxprs[0]))
        assert sums and set(sums) == {("float32",)}, "means, variances and softmax denominators"

    def test_the_residual_stream_is_bfloat16(self, jaxprs, run):
        scans = of("scan", jaxprs[0])
        assert len(scans) == (not run.unroll)
        for scan in scans:
            (carry,) = scan.outvars
            assert carry.aval.dtype == jnp.bfloat16 and carry.aval.ndim == 3
        *tokens, logits = (var.aval.dtype.name for var in jaxprs[0].outvars)
        assert set(tokens) == {"bfloat16"} and logits == "float32"

    def test_nothing_is_promoted_further(self, jaxprs):
        dtypes = {var.aval.dtype.name for jaxpr in jaxprs for eqn in equations(jaxpr) for var in eqn.outvars}
        assert not dtypes & {"float64", "float16", "int64"}

    def test_gradients_are_float32(self, jaxprs, tiny):
        leaves = len(jax.tree.leaves(tiny(**RICH).params))
        assert [var.aval.dtype.name for var in jaxprs[1].outvars] == ["float32"] * (1 + leaves)


def test_position_resampling_is_the_one_product_in_float32(tiny):
    """Two contractions forward, rows and columns; their transposes backward."""
    model = tiny(RUNS["scan"], **RICH)
    args = model, np.zeros((2, 16, 20, 3), np.float32), jax.random.key(0)
    for fn, most in ((forward, 2), (jax.value_and_grad(loss), 4)):
        jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
        whole = [eqn for eqn in of("dot_general", jaxpr) if factors(eqn) != ("bfloat16", "bfloat16")]
        assert 2 <= len(whole) <= most
        assert set(operands(whole)) == {("float32", "float32")}
        # Sizes of the grids (3, 2) -> (4, 5) and of the width only: no batch of 2 x 27 tokens among them.
        assert max(var.aval.size for eqn in whole for var in eqn.invars) <= 4 * 5 * 16


def test_captured_attention_is_float32_and_the_rest_is_bfloat16(tiny, images):
    names = ("embed", "block0", "block1/q", "block1/mlp", "block2/attn[cls]")
    _, found = jax.eval_shape(lambda: tiny(RUNS["scan"])(images, capture=names))
    assert [found[name].dtype.name for name in names] == ["bfloat16"] * 4 + ["float32"]


def test_a_float32_model_knows_no_half_precision(tiny, images):
    text = str(jax.make_jaxpr(jax.value_and_grad(loss))(tiny(**RICH), images, jax.random.key(0)))
    assert "f32[" in text and "bf16" not in text and "f16" not in text


class TestAstype:
    def test_only_matrices_and_tokens_are_stored_in_half(self, tiny):
        model = tiny(**RICH)
        half = jax.eval_shape(lambda m: m.astype("bfloat16"), model)
        whole = {name for name, leaf in named(half.params).items() if leaf.dtype == jnp.float32}
        assert whole == {"pos_embed"} | {name for name in named(model.params) if "norm" in name}
        assert half.run.dtype == "bfloat16" and half.config == model.config

    def test_numbers_are_those_of_casting_at_use_and_near_single_precision(self, tiny, images):
        single = tiny(**RICH, depth=1)
        at_use = dataclasses.replace(single, run=Execution("bfloat16"))
        logits = jax.jit(lambda model, x: model.logits(x), compiler_options={"xla_backend_optimization_level": 0})
        # Twice as wide as native: positions are resampled, in float32 both times.
        half, same, exact = (
            logits(m, np.tile(images, (1, 1, 2, 1))) for m in (single.astype("bfloat16"), at_use, single)
        )
        np.testing.assert_array_equal(half, same)
        assert half.dtype == jnp.float32 and (half != exact).any()
        np.testing.assert_allclose(half, exact, atol=0.05 * np.abs(exact).max())

    def test_other_settings_of_the_computation_are_kept(self, tiny):
        run = Execution(remat="full", unroll=True, attention="reference")
        assert tiny(run).astype("bfloat16").run == dataclasses.replace(run, dtype="bfloat16")

    @pytest.mark.parametrize("dtype", ["float16", "bf16", "int8"])
    def test_another_dtype_is_refused(self, tiny, dtype):
        with pytest.raises(ValueError, match=f"dtype='{dtype}' is not one of 'float32', 'bfloat16'"):
            tiny().astype(dtype)
