"""The parts of a pre-norm transformer block.

They hold Params only: no RNG, no mutable state; keys come with the call.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.ops.attention import attention, attention_weights
from regvit_jax.sharding import BATCH, constrain
from regvit_jax.trees import Array

WEIGHT_STD = 0.02


def linear(inputs: int, outputs: int, *, run: Execution, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """A projection as every ViT reference initialises it: N(0, 0.02) weights, zero bias.

    The references call a truncated normal, but truncate at +-2 in absolute terms, a hundred standard deviations away.
    """
    init = nnx.initializers.normal(WEIGHT_STD)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, dtype=jnp.dtype(run.dtype), rngs=rngs)


def layer_norm(width: int, config: ViTConfig, *, run: Execution, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with float32 statistics.

    In two passes, since E[x^2] - E[x]^2 cancels on the high-norm tokens that this project is about.
    """
    return nnx.LayerNorm(width, epsilon=config.norm_eps, dtype=jnp.dtype(run.dtype), use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention. The fused kernel is (D, 3, D): q, k, v on axis 1, head-major on axis 2."""

    def __init__(self, config: ViTConfig, run: Execution, *, rngs: nnx.Rngs):
        d = config.width
        self.qkv = nnx.LinearGeneral(
            d,
            (3, d),
            use_bias=config.qkv_bias,
            kernel_init=lambda key, shape, dtype=jnp.float32: WEIGHT_STD * jax.random.normal(key, shape, dtype),
            dtype=jnp.dtype(run.dtype),
            rngs=rngs,
        )
        self.proj = linear(d, d, run=run, rngs=rngs)
        self.num_heads, self.implementation = config.num_heads, run.attention

    def __call__(self, x: Array, want: tuple = ()) -> tuple[Array, dict[str, Array]]:
        """(B, N, D) -> (B, N, D), and what `want` names of q, k, v (B, N, H, K) and attn (B, H, Q, N)."""
        q, k, v = (y.reshape(*x.shape[:2], self.num_heads, -1) for y in self._qkv(x))
        found = {name: {"q": q, "k": k, "v": v}[name] for name, _ in want if name in ("q", "k", "v")}
        for name, rows in want:
            if name == "attn":
                found[name, rows] = attention_weights(q, k, rows=rows)
        y = attention(q, k, v, implementation=self.implementation)
        return self.proj(y.reshape(x.shape)), found

    def _qkv(self, x: Array) -> list[Array]:
        """Three products with slices of one kernel: slicing weights is cheap, slicing a fused (B, N, 3D) activation is
        not."""
        kernel, bias = self.qkv.kernel[...].astype(x.dtype), self.qkv.bias
        out = [x @ kernel[:, i] for i in range(3)]
        return out if bias is None else [y + bias[...][i].astype(x.dtype) for i, y in enumerate(out)]


class Mlp(nnx.Module):
    """Two projections around an activation.

    For SwiGLU, fc1 makes [gate, value] and the hidden units are silu(gate) * value.
    """

    def __init__(self, config: ViTConfig, run: Execution, *, rngs: nnx.Rngs):
        hidden = config.mlp_dim * (2 if config.activation == "swiglu" else 1)
        self.fc1 = linear(config.width, hidden, run=run, rngs=rngs)
        self.fc2 = linear(config.mlp_dim, config.width, run=run, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """(B, N, D) -> (B, N, D) and the hidden units (B, N, mlp_dim)."""
        hidden = activate(self.fc1(x), self.activation)
        return self.fc2(hidden), hidden


def activate(x: Array, activation: str) -> Array:
    """The activation of an MLP; "swiglu" halves the last axis."""
    match activation:
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "quick_gelu":
            return x * jax.nn.sigmoid(1.702 * x)
        case "swiglu":
            gate, value = jnp.split(x, 2, axis=-1)
            return jax.nn.silu(gate) * value
    raise ValueError(f"unknown activation {activation!r}")


class LayerScale(nnx.Module):
    """A learnt gain per channel on a branch (CaiT)."""

    def __init__(self, width: int, value: float):
        self.gamma = nnx.Param(jnp.full((width,), value, jnp.float32))

    def __call__(self, x: Array) -> Array:
        # Cast at use: a float32 gain would promote the whole residual stream.
        return x * self.gamma[...].astype(x.dtype)


class Block(nnx.Module):
    """x + ls1(attn(norm1 x)), then x + ls2(mlp(norm2 x)); each branch may be dropped per sample."""

    def __init__(self, config: ViTConfig, run: Execution, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(config.width, config, run=run, rngs=rngs)
        self.attn = Attention(config, run, rngs=rngs)
        self.norm2 = layer_norm(config.width, config, run=run, rngs=rngs)
        self.mlp = Mlp(config, run, rngs=rngs)
        if config.layerscale is not None:
            self.ls1 = LayerScale(config.width, config.layerscale)
            self.ls2 = LayerScale(config.width, config.layerscale)
        self.scaled = config.layerscale is not None

    def __call__(self, x: Array, key: Array | None, rate: Any, want: tuple = ()) -> tuple[Array, dict[Any, Array]]:
        """One block.

        Args:
          x: (B, N, D).
          key: of this block's stochastic depth; None turns it off.
          rate: scalar, the chance that a branch of a sample is dropped.
          want: ((name, rows), ...) of q, k, v, attn, mlp to return beside the output.
        """
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y, found = self.attn(self.norm1(x), want)
        x = constrain(x + drop_path(self.ls1(y) if self.scaled else y, attn_key, rate), BATCH)
        y, hidden = self.mlp(self.norm2(x))
        x = constrain(x + drop_path(self.ls2(y) if self.scaled else y, mlp_key, rate), BATCH)
        if ("mlp", None) in want:
            found["mlp"] = hidden
        return x, found


def drop_path(y: Array, key: Array | None, rate: Any) -> Array:
    """Stochastic depth: each sample's branch is zeroed with chance `rate`, survivors are divided by the chance to
    survive."""
    if key is None:
        return y
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    alive = jax.random.bernoulli(key, keep, (y.shape[0],) + (1,) * (y.ndim - 1))
    return y * (alive / keep).astype(y.dtype)
