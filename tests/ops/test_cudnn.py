"""cuDNN's attention without a GPU: which path is chosen and what is told about it, token counts of any parity around a
stand-in that is as picky as the kernel and returns garbage wherever it may, and the program that a GPU would get."""

import functools
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax import sharding
from regvit_jax.models.config import Execution
from regvit_jax.models.model import Model, abstract_params
from regvit_jax.models.zoo import config_of
from regvit_jax.ops import cudnn
from regvit_jax.ops.attention import CUDNN_FROM, _tell, attention, choose
from regvit_jax.sharding import jit_once
from regvit_jax.trees import named

CPU, TPU, ROCM = cudnn.Device("cpu"), cudnn.Device("tpu"), cudnn.Device("gpu")
T4, A100, H100 = (cudnn.Device("gpu", capability) for capability in ((7, 5), (8, 0), (9, 0)))
B, H, K = 2, 2, 8


def live(lengths, n):
    """(B, N) bool: the rows that count."""
    return jnp.arange(n) < (jnp.full((1,), n) if lengths is None else lengths)[:, None]


def softmax_attention(q, k, v, lengths, causal):
    """In float32, of the rows and keys that count; zero elsewhere."""
    n = q.shape[1]
    see = live(lengths, n)[:, None, None, :] & (jnp.tril(jnp.ones((n, n), bool)) if causal else True)
    logits = jnp.einsum("bqhk,bnhk->bhqn", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(see, logits, -1e30), axis=-1)
    out = jnp.einsum("bhqn,bnhk->bqhk", weights, v.astype(jnp.float32))
    return jnp.where(live(lengths, n)[..., None, None], out, 0.0)


def garbage_behind(x, lengths):
    return jnp.where(live(lengths, x.shape[1])[..., None, None], x, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def picky(q, k, v, lengths, causal):
    """Takes what cuDNN takes; what lies behind the lengths is NaN, in the output and in the gradients."""
    return forward(q, k, v, lengths, causal)[0]


def forward(q, k, v, lengths, causal):
    assert q.shape[1] % 2 == 0, "Unsupported sequence length"
    assert {x.dtype for x in (q, k, v)} <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}
    assert lengths is None or (lengths.dtype == jnp.int32 and lengths.shape == q.shape[:1])
    out = softmax_attention(q, k, v, lengths, causal).astype(q.dtype)
    return garbage_behind(out, lengths), (q, k, v, lengths)


def backward(causal, kept, grad):
    *qkv, lengths = kept
    grad = jnp.where(live(lengths, grad.shape[1])[..., None, None], grad, 0).astype(jnp.float32)
    pulled = jax.vjp(lambda q, k, v: softmax_attention(q, k, v, lengths, causal), *qkv)[1](grad)
    return *(garbage_behind(x, lengths) for x in pulled), None


picky.defvjp(forward, backward)


@pytest.fixture
def on_h100(monkeypatch):
    """Everything seems to run on an H100 whose kernel is the picky one."""
    monkeypatch.setattr(cudnn, "device_of", lambda x: H100)
    monkeypatch.setattr(cudnn, "kernel", picky)
    _tell.cache_clear()


def normal(*shape, dtype=jnp.bfloat16, count=3):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(count)]


def value_and_grads(implementation, causal=False):
    """Of a loss that weighs every number of the output differently."""

    def loss(q, k, v):
        out = attention(q, k, v, causal=causal, implementation=implementation).astype(jnp.float32)
        return jnp.sum(jnp.sin(out + jnp.arange(out.size).reshape(out.shape))), out

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


def assert_equal_but_for_rounding(ours, theirs):
    (_, out), grads = ours
    (_, want), wanted = theirs
    # Numbers below 4, rounded to 8 bits: by 2^-7 in the kernel's output, and the same again in the reference's weights.
    for x, y in zip((out, *grads), (want, *wanted), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=0.02, rtol=0.02)
    assert all(np.abs(np.asarray(g, np.float32)).max() > 0.05 for g in grads)


def reference(*qkv, causal=False):
    return jit_once(functools.partial(attention, implementation="reference", causal=causal))(*qkv)


class TestAnyTokenCount:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("n", [6, 7])
    def test_output_and_gradients_are_those_of_the_reference(self, on_h100, n, causal):
        qkv = normal(B, n, H, K)
        ours = jit_once(value_and_grads("cudnn", causal))(*qkv)
        assert_equal_but_for_rounding(ours, jit_once(value_and_grads("reference", causal))(*qkv))

    @pytest.mark.parametrize("n", [6, 7])
    def test_inside_vmap(self, on_h100, n):
        qkv = normal(3, B, n, H, K)
        ours = jit_once(jax.vmap(value_and_grads("cudnn")))(*qkv)
        assert_equal_but_for_rounding(ours, jit_once(jax.vmap(value_and_grads("reference")))(*qkv))

    @pytest.mark.parametrize("n", [6, 7])
    def test_on_a_mesh(self, on_h100, n):
        """Batch over data and fsdp, heads over tensor; the kernel stops at any other layout."""
        mesh, qkv = sharding.make_mesh(2, 2, 2), normal(4, n, H, K)
        theirs = jit_once(value_and_grads("reference"))(*qkv)
        with jax.set_mesh(mesh):
            ours = jit_once(value_and_grads("cudnn"))(
                *sharding.put({str(i): x for i, x in enumerate(qkv)}, mesh).values()
            )
            text = str(jax.make_jaxpr(functools.partial(attention, implementation="cudnn"))(*qkv))
        assert_equal_but_for_rounding(ours, theirs)
        # q, k and v, and again when they are padded.
        assert len(re.findall(r"spec=P\(\('data', 'fsdp'\), None, 'tensor', None\)", text)) == (6 if n % 2 else 3)

    def test_a_batch_and_heads_that_do_not_divide_the_mesh_still_run(self, on_h100):
        qkv = normal(3, 7, 3, K)
        with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
            ours = jit_once(functools.partial(attention, implementation="cudnn"))(*qkv)
        np.testing.assert_allclose(ours.astype(jnp.float32), reference(*qkv).astype(jnp.float32), atol=0.02)

    def test_one_token_of_the_other_half_precision(self, on_h100):
        """One key has weight 1 whatever q and k are."""
        qkv = normal(B, 1, H, K, dtype=jnp.float16)
        out = attention(*qkv, implementation="cudnn")
        assert out.dtype == jnp.float16
        np.testing.assert_array_equal(out, qkv[2])

    def test_a_network_with_an_odd_number_of_tokens(self, on_h100):
        """5 tokens: cls, 3 registers, 1 patch. The gradient of every parameter is finite and near XLA's."""
        config = config_of("vit_ti8_reg3", image_size=8, width=16, depth=2, num_heads=2, mlp_dim=32)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda s: rng.normal(size=s.shape, scale=0.2).astype("f"), abstract_params(config))
        images = normal(2, 8, 8, 3, dtype=jnp.float32, count=1)[0]

        def grads(implementation):
            run = Execution(dtype="bfloat16", remat="dots", attention=implementation)

            def loss(params):
                return jnp.square(Model(params, config, run)(images).registers.astype(jnp.float32)[..., :8]).sum()

            return named(jit_once(jax.grad(loss))(params))

        ours, xla = grads("cudnn"), grads("xla")
        for path in ours:
            assert np.isfinite(ours[path]).all(), path
            np.testing.assert_allclose(
                ours[path], xla[path], atol=0.03 * max(1.0, np.abs(xla[path]).max()), err_msg=path
            )


class TestTheProgramOfAGpu:
    """Lowered for CUDA on this machine: what JAX itself accepts and emits."""

    @pytest.fixture(autouse=True)
    def cudnn_seems_installed(self, monkeypatch):
        inside = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo", reason="JAX moved its cuDNN attention")
        if not hasattr(inside, "check_cudnn_version"):
            pytest.skip("JAX no longer asks for cuDNN's version through check_cudnn_version")
        monkeypatch.setattr(inside, "check_cudnn_version", lambda: 91300)
        monkeypatch.setattr(cudnn, "device_of", lambda x: H100)

    @staticmethod
    def program(fn, *shape):
        abstract = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
        return jax.jit(fn).trace(*abstract).lower(lowering_platforms=("cuda",)).as_text()

    @pytest.mark.parametrize("mapped", [(), (3,), (5, 3)], ids=["plain", "vmap", "vmap of vmap"])
    @pytest.mark.parametrize(
        ("n", "causal", "length", "mask"),
        [(261, False, 262, "PADDING"), (262, False, 262, "NO_MASK"), (261, True, 262, "PADDING_CAUSAL")],
    )
    def test_forward_and_backward_call_the_kernel(self, n, causal, length, mask, mapped):
        step = value_and_grads("auto", causal)
        for _ in mapped:
            step = jax.vmap(step)
        text = self.program(step, *mapped, 2, n, 4, 64)
        calls = re.findall(r"@(__cudnn\S+?)\(.*?mask_type\\22: \\22(\w+?)\\22.*?: \((.*?)\) ->", text)
        names, masks, types = zip(*calls, strict=True)
        # Neither name says Bias: no mask became one.
        assert names == ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
        assert set(masks) == {mask}
        batch = math.prod((2, *mapped))
        assert types[0].count(f"tensor<{batch}x{length}x4x64xbf16>") == 3
        assert types[0].count(f"tensor<{batch}xi32>") == (2 if n % 2 else 0)

    def test_a_whole_network_on_a_mesh(self):
        config = config_of("vit_ti8_reg3", image_size=8, width=16, depth=2, num_heads=2, mlp_dim=32)
        run, images = Execution(dtype="bfloat16", remat="dots", attention="cudnn"), jnp.zeros((4, 8, 8, 3))
        with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
            step = jax.jit(jax.grad(lambda p: jnp.square(Model(p, config, run)(images).cls.astype(jnp.float32)).sum()))
            text = step.trace(abstract_params(config)).lower(lowering_platforms=("cuda",)).as_text()
        # Forward, the same again in the backward pass (remat keeps no attention), backward: for the partitioner to cut.
        assert text.count("@CustomSPMDPartitioning") == 3


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "tokens", "head_dim", "segmented", "path"),
    [
        ("auto", H100, "bfloat16", 261, 64, False, "cudnn"),
        ("auto", A100, "float16", 261, 128, False, "cudnn"),
        ("auto", H100, "bfloat16", CUDNN_FROM, 64, False, "cudnn"),
        ("auto", H100, "bfloat16", CUDNN_FROM - 1, 64, False, "xla"),
        ("cudnn", H100, "bfloat16", CUDNN_FROM - 1, 64, False, "cudnn"),  # who asks gets it
        ("auto", H100, "float32", 261, 64, False, "xla"),
        ("cudnn", H100, "float32", 261, 64, False, "xla"),
        ("auto", H100, "bfloat16", 261, 256, False, "cudnn"),
        ("auto", A100, "bfloat16", 261, 256, False, "xla"),
        ("auto", A100, "bfloat16", 261, 136, False, "xla"),
        ("auto", H100, "bfloat16", 261, 264, False, "xla"),
        ("auto", H100, "bfloat16", 261, 36, False, "xla"),
        ("auto", H100, "bfloat16", 261, 64, True, "xla"),
        ("cudnn", H100, "bfloat16", 261, 64, True, "xla"),
        ("auto", T4, "float16", 261, 64, False, "xla"),
        ("auto", ROCM, "bfloat16", 261, 64, False, "xla"),
        ("auto", TPU, "bfloat16", 261, 64, False, "xla"),
        ("cudnn", TPU, "bfloat16", 261, 64, False, "xla"),
        ("auto", CPU, "bfloat16", 261, 64, False, "xla"),
        ("cudnn", CPU, "bfloat16", 261, 64, False, "xla"),
    ],
)
def test_choice(asked, device, dtype, tokens, head_dim, segmented, path):
    chosen, why = choose(asked, device, dtype, tokens, head_dim, segmented=segmented)
    assert chosen == path
    wanted = asked == "cudnn" or (device.platform == "gpu" and tokens >= CUDNN_FROM)
    assert (why is not None) == (wanted and path == "xla"), "told is what was wanted and could not be"


class TestFallback:
    @pytest.fixture
    def told(self, caplog):
        """[(level, message)] of what the process says."""
        _tell.cache_clear()
        caplog.set_level(logging.INFO, logger="root")
        return lambda: [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "root"]

    def test_told_once_a_reason_and_computed_by_xla(self, told):
        qkv = normal(B, 5, H, K, dtype=jnp.float32)
        for n in (5, 5, 4):
            out = jit_once(functools.partial(attention, implementation="cudnn"))(*(x[:, :n] for x in qkv))
        [(level, message)] = told()
        assert level == logging.WARNING and "needs an NVIDIA GPU, and this runs on a CPU" in message
        xla = jit_once(functools.partial(attention, implementation="xla"))(*(x[:, :4] for x in qkv))
        np.testing.assert_array_equal(out, xla)

    def test_auto_on_a_cpu_has_nothing_to_tell(self, told):
        jax.eval_shape(attention, *normal(1, 130, 1, 8))
        assert told() == []

    def test_each_reason_of_its_own(self, on_h100, told):
        half, single = normal(B, 5, H, K), normal(B, 5, H, K, dtype=jnp.float32)
        explicit = functools.partial(attention, implementation="cudnn")
        for _ in range(2):
            jax.eval_shape(explicit, *single)
            jax.eval_shape(functools.partial(explicit, segment_ids=jnp.zeros((B, 5), int)), *half)
            jax.eval_shape(attention, *normal(1, CUDNN_FROM, 1, 12))
        levels, messages = zip(*told(), strict=True)
        assert levels == (logging.WARNING, logging.WARNING, logging.INFO)
        for words, message in zip(("not float32", "segment_ids", "at most 256, not 12"), messages, strict=True):
            assert words in message

    @pytest.mark.parametrize("error", [NotImplementedError, RuntimeError])
    def test_what_only_jax_knows_cannot_run(self, on_h100, monkeypatch, told, error):
        def missing(*_):
            raise error("cuDNN is not detected.")

        monkeypatch.setattr(cudnn, "kernel", missing)
        qkv = normal(B, 7, H, K)
        out = [jit_once(lambda *x: attention(*x, implementation="cudnn"))(*qkv) for _ in range(2)][1]
        [(_, message)] = told()
        assert "cuDNN is not detected." in message
        np.testing.assert_array_equal(out, jit_once(functools.partial(attention, implementation="xla"))(*qkv))

    def test_a_bug_is_no_reason(self, on_h100, monkeypatch):
        def broken(*_):
            raise TypeError("wrong call")

        monkeypatch.setattr(cudnn, "kernel", broken)
        with pytest.raises(TypeError, match="wrong call"):
            jax.eval_shape(functools.partial(attention, implementation="cudnn"), *normal(B, 7, H, K))


class TestDevice:
    def test_of_an_array_of_a_mesh_and_of_the_process(self):
        assert cudnn.device_of(jnp.zeros(3)) == CPU == cudnn.device_of(np.zeros(3))
        seen = []
        watch = jax.jit(lambda x: seen.append(cudnn.device_of(x)) or x)
        watch(jnp.zeros(3))
        with jax.default_device(jax.devices()[1]):
            watch(jnp.zeros(4))
        with jax.set_mesh(sharding.make_mesh()):
            watch(jnp.zeros(5))
        assert seen == [CPU] * 3

    def test_a_gpu_is_known_by_its_compute_capability(self, monkeypatch):
        class Gpu:
            platform = "gpu"

        for said, known in (("9.0", (9, 0)), ("10.3", (10, 3)), ("gfx90a", None)):
            Gpu.compute_capability = said
            monkeypatch.setattr(jax, "local_devices", lambda backend: [Gpu()])
            with jax.default_device("gpu"):
                assert cudnn.device_of(np.zeros(3)) == cudnn.Device("gpu", known)
