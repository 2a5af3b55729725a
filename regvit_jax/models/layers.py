"""The parts of a pre-norm transformer block.

They hold Params only: no RNG, no mutable state; keys come with the call.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.ops.attention import attention, attention_weights
from regvit_jax.sharding import BATCH, axis_size, constrain, constrain_examples
from regvit_jax.trees import Array

WEIGHT_STD = 0.02

# What remat="named" keeps of a block beside its input. From these the backward pass makes all it needs with norms and
# activations alone: no matrix product is repeated, and of the attention only what its own backward pass repeats.
SAVED = ("q", "k", "v", "attn_out", "attn_residual", "fc1")


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

    def __call__(self, x: Array, gain: Array | None = None, want: tuple = ()) -> tuple[Array, dict[str, Array]]:
        """(B, N, D) -> (B, N, D), times `gain` (D,), and what `want` names of q, k, v (B, N, H, K) and attn (B, H, Q,
        N)."""
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (checkpoint_name(y.reshape(heads), name) for y, name in zip(self._qkv(x), "qkv", strict=True))
        found = {name: {"q": q, "k": k, "v": v}[name] for name, _ in want if name in ("q", "k", "v")}
        for name, rows in want:
            if name == "attn":
                found[name, rows] = attention_weights(q, k, rows=rows)
        y = checkpoint_name(attention(q, k, v, implementation=self.implementation), "attn_out")
        return project(y.reshape(x.shape), self.proj, gain), found

    def _qkv(self, x: Array) -> list[Array]:
        """Three products with slices of one kernel: slicing weights is cheap, slicing a fused (B, N, 3D) activation is
        not."""
        kernel, bias = self.qkv.kernel[...].astype(x.dtype), self.qkv.bias
        out = [x @ kernel[:, i] for i in range(3)]
        return out if bias is None else [y + bias[...][i].astype(x.dtype) for i, y in enumerate(out)]


class Mlp(nnx.Module):
    """Two projections around an activation.

    For SwiGLU, fc1 makes [gate, value] and the hidden units are silu(gate) * value. Its kernel is stored as (D, 2 M),
    as every reference has it, and split over tensor devices as it lies: some of them hold gates, some values.
    """

    def __init__(self, config: ViTConfig, run: Execution, *, rngs: nnx.Rngs):
        hidden = config.mlp_dim * (2 if config.activation == "swiglu" else 1)
        self.fc1 = linear(config.width, hidden, run=run, rngs=rngs)
        self.fc2 = linear(config.mlp_dim, config.width, run=run, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Array, gain: Array | None = None) -> tuple[Array, Array]:
        """(B, N, D) -> (B, N, D), times `gain` (D,), and the hidden units (B, N, mlp_dim)."""
        parts = self._gate_and_value(x) if self.activation == "swiglu" else [project(x, self.fc1)]
        hidden = activate(*(checkpoint_name(part, "fc1") for part in parts), activation=self.activation)
        return project(hidden, self.fc2, gain), hidden

    def _gate_and_value(self, x: Array) -> Sequence[Array]:
        if axis_size("tensor") == 1:
            return jnp.split(project(x, self.fc1), 2, axis=-1)
        return gate_and_value(x, self.fc1.kernel[...].astype(x.dtype), self.fc1.bias[...].astype(x.dtype))


# As a rematerialised part, whatever the policy around it: the kernel that a product sees is gathered, and would be kept
# for the backward pass in every block. From the stored shards it is cheap to make again.
@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False)
def gate_and_value(x: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
    """The two halves (B, N, M) of x (B, N, D) times a kernel (D, 2 M), each spread over tensor devices by hidden unit.

    A unit's gate meets its value on one device at the price of moving weights; to halve a (B, N, 2 M) activation would
    move that.
    """
    # By way of the rows: from columns of (D, 2 M) straight to columns of (D, 2, M) the partitioner knows no way but to
    # gather all of it.
    kernel = constrain(constrain(kernel, None, "tensor"), "tensor").reshape(x.shape[-1], 2, -1)
    kernel, bias = constrain(kernel, None, None, "tensor"), constrain(constrain(bias).reshape(2, -1), None, "tensor")
    return x @ kernel[:, 0] + bias[0], x @ kernel[:, 1] + bias[1]


def project(x: Array, layer: nnx.Linear, gain: Array | None = None) -> Array:
    """(..., I) -> (..., O) in the dtype of x; with `gain` (O,), every output channel is multiplied by it.

    The gain goes into the weights, which is the same product: nothing of the activation's size has to be multiplied, or
    kept for the gradient of the gain.
    """
    kernel, bias = layer.kernel[...].astype(x.dtype), layer.bias[...].astype(x.dtype)
    if gain is not None:
        kernel, bias = kernel * gain.astype(x.dtype), bias * gain.astype(x.dtype)
    return x @ kernel + bias


def gathered(param: nnx.Param, dtype: Any) -> Array:
    """A matrix outside of the blocks as a product takes it: whole on every device.

    In the blocks the residual stream tells the partitioner to gather weights. At either end of the network there is
    none, and it would cut the sum over the inputs into pieces instead, to add up activations of all devices.
    """
    return constrain(param[...].astype(dtype))


def activate(x: Array, value: Array | None = None, *, activation: str) -> Array:
    """The activation of an MLP. "swiglu" takes gate and value."""
    match activation:
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "quick_gelu":
            return x * jax.nn.sigmoid(1.702 * x)
        case "swiglu":
            return jax.nn.silu(x) * value
    raise ValueError(f"unknown activation {activation!r}")


class LayerScale(nnx.Module):
    """A learnt gain per channel on a branch (CaiT), applied by the last projection of the branch."""

    def __init__(self, width: int, value: float):
        self.gamma = nnx.Param(jnp.full((width,), value, jnp.float32))


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

    def __call__(self, x: Array, drops: Array | None, rate: Any, want: tuple = ()) -> tuple[Array, dict[Any, Array]]:
        """One block.

        Args:
          x: (B, N, D).
          drops: what stochastic depth does to the two branches: (2, B) bool, False where a sample's branch is dropped,
            or (2, G, k) int32, the rows of each group that a branch is computed for; None turns it off.
          rate: scalar, the chance that a branch of a sample is dropped; only the first form needs it.
          want: ((name, rows), ...) of q, k, v, attn, mlp to return beside the output.
        """
        found: dict[Any, Array] = {}
        gains = (self.ls1.gamma[...], self.ls2.gamma[...]) if self.scaled else (None, None)

        def attn(x, gain):
            y, inside = self.attn(self.norm1(x), gain, want)
            found.update(inside)
            return y

        def mlp(x, gain):
            y, hidden = self.mlp(self.norm2(x), gain)
            if ("mlp", None) in want:
                found["mlp"] = hidden
            return y

        first, second = (None, None) if drops is None else drops
        x = checkpoint_name(with_branch(x, attn, gains[0], first, rate), "attn_residual")
        return with_branch(x, mlp, gains[1], second, rate), found


def with_branch(x: Array, branch: Callable, gain: Array | None, drops: Array | None, rate: Any) -> Array:
    """x + branch(x, gain), under stochastic depth.

    Args:
      x: (B, N, D), rows group by group.
      branch: ((rows, N, D), gain) -> (rows, N, D).
      gain: (D,) or None.
      drops: None, (B,) bool or (G, k) int32, as `Block` takes them for one branch.
      rate: of the bool form.
    """
    if drops is None or drops.dtype == bool:
        return add_branch(x, drop_path(branch(x, gain), drops, rate))
    groups, kept = drops.shape
    rows = x.shape[0] // groups
    if kept == rows:
        return add_branch(x, branch(x, gain))
    # Both the gather and the sum stay inside a group, and a group lies on one device.
    grouped = constrain_examples(x.reshape(groups, rows, *x.shape[1:]))
    part = jax.vmap(lambda x, i: x.at[i].get(unique_indices=True, mode="promise_in_bounds"))(grouped, drops)
    gain = jnp.full(x.shape[-1:], rows / kept) if gain is None else gain * (rows / kept)
    y = branch(constrain_examples(part.reshape(-1, *x.shape[1:])), gain).reshape(part.shape)
    add = jax.vmap(lambda x, i, y: x.at[i].add(y, unique_indices=True, mode="promise_in_bounds"))
    return constrain(add(grouped, drops, constrain_examples(y)).reshape(x.shape), BATCH)


def add_branch(x: Array, y: Array) -> Array:
    """The residual add. Here, and only here, the residual stream is pinned to devices by example: without it the
    partitioner takes the layout of the parameters for the activations, and every layer shuffles them around."""
    return constrain(x + y, BATCH)


def branches(key: Array, batch: int, rates: Array) -> Array:
    """(B, depth, 2) bool: which branches of which samples live, given the rate of each block at which they do not."""

    def draw(key, rate):
        return jax.random.bernoulli(key, 1.0 - rate, (batch,))

    keys = jax.vmap(jax.random.split)(jax.random.split(key, len(rates)))
    alive = jax.vmap(jax.vmap(draw, (0, None)))(keys, jnp.asarray(rates, jnp.float32))
    return jnp.moveaxis(alive, -1, 0)


def subsets(key: Array, groups: int, rows: int, rates: Sequence[float]) -> Array | tuple[Array, ...]:
    """Which rows of each group the branches are computed for: stochastic depth with a fixed number of samples.

    Every block, branch and group draws its own `kept(rows, rate)` rows, all sets of that size being equally likely; a
    branch that is computed for k of them counts rows / k times.

    Returns:
      (depth, 2, G, k) int32, ascending along k; where blocks keep different numbers, one (2, G, k) a block.

    Source: DINOv2 (drop_add_residual_stochastic_depth), where a group is what lies on one GPU.
    """
    counts = [kept(rows, rate) for rate in rates]
    draws = jax.random.uniform(key, (len(counts), 2, groups, rows))
    order = constrain_examples(jnp.argsort(draws, axis=-1).astype(jnp.int32), axis=2)
    if len(set(counts)) == 1:
        return jnp.sort(order[..., : counts[0]], axis=-1)
    return tuple(jnp.sort(block[..., :count], axis=-1) for block, count in zip(order, counts, strict=True))


def kept(rows: int, rate: float) -> int:
    """k: of so many rows a branch is computed for this many."""
    # In Python's arithmetic, as the reference counts: 64 rows at .4 are 38. A float32 rate would round otherwise.
    return max(int(rows * (1 - round(float(rate), 6))), 1)


def drop_path(y: Array, alive_b: Array | None, rate: Any) -> Array:
    """Stochastic depth: a sample's branch is zeroed where it does not live, survivors are divided by the chance to
    survive."""
    if alive_b is None:
        return y
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    return y * (alive_b.reshape(-1, *[1] * (y.ndim - 1)) / keep).astype(y.dtype)
