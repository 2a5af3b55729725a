"""The projection head of DINO and iBOT: an MLP to a unit vector, and its cosines with learnt prototypes."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from regvit_jax.models.config import Execution
from regvit_jax.models.layers import activate, gathered, linear
from regvit_jax.sharding import constrain
from regvit_jax.trees import Array, Tree

# Below this length a vector is not stretched to length 1.
EPS = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Size of one head.

    Attributes:
      width: D of the tokens that come in.
      hidden: units between the projections.
      bottleneck: size of the unit vector.
      prototypes: K, the number of logits.
      layers: projections before the prototypes, GELU between them; 1 goes from tokens to the bottleneck at once.
    """

    width: int
    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 65536
    layers: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be 1 or more, got {getattr(self, field.name)}")


class Prototypes(nnx.Module):
    """A weight-normalised projection without bias: column k of the kernel is g_k v_k / |v_k|.

    g (K,) starts at 1, where a logit of a unit vector is a cosine. DINOv2 trains it; DINO freezes it, which is up to
    the optimiser. v (bottleneck, K) starts as torch starts a Linear: uniform in +-1/sqrt(bottleneck).
    """

    def __init__(self, config: HeadConfig, *, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(config.bottleneck)
        shape = (config.bottleneck, config.prototypes)
        self.g = nnx.Param(jnp.ones((config.prototypes,), jnp.float32))
        self.v = nnx.Param(rngs.params.uniform(shape, minval=-bound, maxval=bound))

    def kernel(self) -> Array:
        """(bottleneck, K) float32."""
        v = self.v[...].astype(jnp.float32)
        return v * (self.g[...] / jnp.linalg.norm(v, axis=0))


class PrototypeHead(nnx.Module):
    """fc1, ..., then unit length, then `last_layer`: the logits of K prototypes.

    Source: DINO (Caron et al. 2021), section 3.1; DINOv2 keeps it, with g trainable and no batch norm.
    """

    def __init__(self, config: HeadConfig, run: Execution, *, rngs: nnx.Rngs):
        sizes = [config.width, *[config.hidden] * (config.layers - 1), config.bottleneck]
        for i in range(config.layers):
            setattr(self, f"fc{i + 1}", linear(sizes[i], sizes[i + 1], run=run, rngs=rngs))
        self.last_layer = Prototypes(config, rngs=rngs)
        self.layers, self.dtype = config.layers, run.dtype

    def __call__(self, x: Tree, logits_dtype: Any = None) -> Tree:
        """Logits (..., K) of tokens (..., D).

        Matrix products run in the dtype of `run`, lengths in float32.

        Args:
          x: an array of any float dtype, or a tuple (any pytree) of such: global, local and masked tokens in one call
            normalise and gather the prototypes once.
          logits_dtype: None for the dtype of `run`. float32 keeps what a bfloat16 product accumulates; meant for the
            teacher, since a backward pass would then multiply in float32, too.
        """
        # Normalised where they are stored; what is sent to every device has the dtype of the product.
        prototypes = constrain(self.last_layer.kernel().astype(self.dtype))
        return jax.tree.map(
            lambda y: jnp.matmul(unit(self.bottleneck(y)), prototypes, preferred_element_type=logits_dtype), x
        )

    def bottleneck(self, x: Array) -> Array:
        """(..., bottleneck): what the projections make of tokens (..., D), of any length."""
        x = x.astype(self.dtype)
        for i in range(self.layers):
            x = x if i == 0 else activate(x, activation="gelu")
            layer = getattr(self, f"fc{i + 1}")
            x = x @ gathered(layer.kernel, x.dtype) + gathered(layer.bias, x.dtype)
        return x


def unit(x: Array) -> Array:
    """Vectors of length 1 along the last axis, in the dtype of x, computed in float32; zero stays zero."""
    x32 = x.astype(jnp.float32)
    # The square is bounded, not the root, whose slope at 0 is infinite.
    length = jnp.sqrt(jnp.maximum(jnp.sum(x32 * x32, axis=-1, keepdims=True), EPS**2))
    return (x32 / length).astype(x.dtype)


def init_head(config: HeadConfig, key: Array) -> Tree:
    """Freshly initialised float32 parameters as a nested dict. Pure: run it inside jit to create them sharded."""
    module = PrototypeHead(config, Execution(), rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def apply_head(config: HeadConfig, params: Tree, x: Tree, dtype: str = "float32", logits_dtype: Any = None) -> Tree:
    """(..., K) logits of tokens x (..., D), or of each array of a tuple, under `params` as `init_head` makes them; see
    `PrototypeHead.__call__`."""
    return nnx.merge(_graphdef(config, dtype), params)(x, logits_dtype)


@functools.lru_cache(maxsize=16)
def _graphdef(config: HeadConfig, dtype: str) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: PrototypeHead(config, Execution(dtype=dtype), rngs=nnx.Rngs(0))))
