"""From tokens to one vector an image: attention pooling."""

import jax.numpy as jnp
from flax import nnx

from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.models.layers import Mlp, layer_norm, linear
from regvit_jax.ops.attention import attention_weights
from regvit_jax.trees import Array


class AttentionPool(nnx.Module):
    """One learnt query attends over the patches; then a residual MLP.

    Source: timm's AttentionPoolLatent (the pooling of SigLIP's image tower), whose arithmetic this is.
    """

    def __init__(self, config: ViTConfig, run: Execution, *, rngs: nnx.Rngs):
        d = config.width
        self.latent = nnx.Param(d**-0.5 * rngs.params.normal((1, 1, d)))
        self.q = linear(d, d, run=run, rngs=rngs)
        self.kv = linear(d, 2 * d, run=run, rngs=rngs)
        self.proj = linear(d, d, run=run, rngs=rngs)
        self.norm = layer_norm(d, config, run=run, rngs=rngs)
        self.mlp = Mlp(config, run, rngs=rngs)
        self.num_heads = config.num_heads

    def __call__(self, patches: Array) -> Array:
        """(B, P, D) -> (B, D)."""
        b, p, d = patches.shape
        latent = jnp.broadcast_to(self.latent[...].astype(patches.dtype), (b, 1, d))
        q = self.q(latent).reshape(b, 1, self.num_heads, -1)
        k, v = (y.reshape(b, p, self.num_heads, -1) for y in jnp.split(self.kv(patches), 2, axis=-1))
        weights_bhqn = attention_weights(q, k).astype(v.dtype)
        x = self.proj(jnp.einsum("bhqn,bnhk->bqhk", weights_bhqn, v).reshape(b, 1, d))
        return (x + self.mlp(self.norm(x))[0])[:, 0]
