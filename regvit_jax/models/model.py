"""Model: a network and its weights as one value.

Callable, compiled once per input shape, and a pytree for jit, grad and vmap.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from regvit_jax.data.transforms import Preprocess, preprocess
from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.models.vit import Tokens, VisionTransformer
from regvit_jax.trees import Array, Tree, map_named, named


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A Vision Transformer that can be called.

    Attributes:
      params: nested dict of arrays, blocks stacked on axis 0.
      config: the architecture.
      run: how it is computed (dtype, remat, unroll, attention).
      preprocessing: size, crop ratio, interpolation, mean and std that these weights expect.
      origin: the record of a conversion (`convert.origin.Origin`); no part of the pytree, so a model that went through
        jit, grad or tree.map has none.
    """

    params: Tree
    config: ViTConfig
    run: Execution = Execution()
    preprocessing: Preprocess = Preprocess()
    origin: Any = None

    def __call__(
        self, images: Array, *, patch_mask: Array | None = None, key: Array | None = None, capture: Sequence[str] = ()
    ) -> Tokens | tuple[Tokens, dict[str, Array]]:
        """Tokens of (B, H, W, 3) normalised images; see `VisionTransformer.__call__`.

        H and W are multiples of the patch size.
        """
        return _forward(self, images, patch_mask, key, tuple(capture))

    def logits(self, images: Array, *, key: Array | None = None) -> Array:
        """(B, C) float32 class scores, for models with a head. Raises ValueError without one."""
        return _logits(self, images, key)

    def preprocess(self, images: Any) -> np.ndarray:
        """(B, S, S, 3) float32 from one or several paths, PIL images, uint8 arrays or encoded bytes, as these weights
        expect."""
        return preprocess(images, self.preprocessing)

    def module(self) -> VisionTransformer:
        """The nnx module around these params; cheap, meant for use inside jit."""
        return nnx.merge(_graphdef(self.config, self.run), self.params)

    def astype(self, dtype: str) -> "Model":
        """The same network for inference in another dtype: its matrices are stored in it; norms and positions stay
        float32."""
        run = dataclasses.replace(self.run, dtype=str(dtype))

        def cast(path, leaf):
            kept = any(
                part.endswith("norm") or part.startswith("norm") or part == "pos_embed" for part in path.split("/")
            )
            return leaf.astype(jnp.float32 if kept else run.dtype)

        return dataclasses.replace(self, params=map_named(cast, self.params), run=run)

    @property
    def num_params(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))

    def __repr__(self) -> str:
        c = self.config
        size = f"{self.num_params / 1e6:.1f} M parameters" if named(self.params) else "no parameters"
        return (
            f"Model(ViT width {c.width}, depth {c.depth}, heads {c.num_heads}, patch {c.patch_size}, "
            f"registers {c.registers}, image {c.image_size[0]}x{c.image_size[1]}, {size}, {self.run.dtype})"
        )


jax.tree_util.register_dataclass(
    Model, data_fields=["params"], meta_fields=["config", "run", "preprocessing"], drop_fields=["origin"]
)


def init_params(config: ViTConfig, key: Array) -> Tree:
    """Freshly initialised float32 parameters as a nested dict. Pure: run it inside jit to create them sharded."""
    module = VisionTransformer(config, Execution(), rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def abstract_params(config: ViTConfig) -> Tree:
    """The same tree of jax.ShapeDtypeStruct, without computing anything."""
    return jax.tree.map(lambda leaf: leaf, _abstract_params(config))  # The caller may change its dicts.


def intermediate(model: Model, images: Array, blocks: Sequence[int], norm: bool = False) -> list[Tokens]:
    """Tokens after chosen blocks, in the order asked for.

    Args:
      model: any Model.
      images: (B, H, W, 3), normalised.
      blocks: block numbers from 0; negative ones count from the end.
      norm: apply the network's final norm to each; otherwise the residual stream, where artifacts are measured.
    """
    return _intermediate(model, images, tuple(int(b) for b in blocks), norm)


@functools.lru_cache(maxsize=64)
def _abstract_params(config: ViTConfig) -> Tree:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@functools.lru_cache(maxsize=64)
def _graphdef(config: ViTConfig, run: Execution) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: VisionTransformer(config, run, rngs=nnx.Rngs(0))))


@functools.partial(jax.jit, static_argnums=4)
def _forward(model: Model, images, patch_mask, key, capture):
    return model.module()(images, patch_mask=patch_mask, key=key, capture=capture)


@jax.jit
def _logits(model: Model, images, key):
    module = model.module()
    return module.logits(module(images, key=key))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _intermediate(model: Model, images, blocks, norm):
    module = model.module()
    tokens, found = module(images, capture=tuple(f"block{b}" for b in blocks))
    streams = [found[f"block{b}"] for b in blocks]
    return [module.split(module.normalize(x) if norm else x, tokens.grid) for x in streams]
