"""The Vision Transformer with registers: patches + positions, [cls, registers, patches], pre-norm blocks, final
norm."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from regvit_jax.models import capture as captures
from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.models.heads import AttentionPool
from regvit_jax.models.layers import SAVED, WEIGHT_STD, Block, branches, gathered, layer_norm, linear
from regvit_jax.models.posembed import resample, sincos
from regvit_jax.trees import Array

# Stochastic depth of all blocks, drawn: one array with the depth in front, or one array a block; None: none.
Drops = Array | tuple[Array, ...] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """What a Vision Transformer returns. Token order inside is [cls, registers, patches]; nobody has to slice by hand.

    Attributes:
      cls: (B, D), or None for a model without a class token.
      registers: (B, R, D); R = 0 is an empty axis.
      patches: (B, P, D), row-major over `grid`.
      grid: (h, w) with h * w == P, static.
    """

    cls: Array | None
    registers: Array
    patches: Array
    grid: tuple[int, int]

    def map(self) -> Array:
        """(B, h, w, D): the patches as an image."""
        return self.patches.reshape(self.patches.shape[0], *self.grid, -1)


jax.tree_util.register_dataclass(Tokens, data_fields=["cls", "registers", "patches"], meta_fields=["grid"])


class PatchEmbed(nnx.Module):
    """Non-overlapping patches times one (p * p * 3, D) kernel, rows ordered (py, px, channel).

    A reshape and a matrix product: the same numbers as a strided convolution. Initialised as torch initialises that
    convolution, uniform in +-1/sqrt(3 p^2), which all references keep.
    """

    def __init__(self, config: ViTConfig, run: Execution, *, rngs: nnx.Rngs):
        fan_in = 3 * config.patch_size**2
        bound = 1 / math.sqrt(fan_in)
        self.kernel = nnx.Param(rngs.params.uniform((fan_in, config.width), minval=-bound, maxval=bound))
        self.bias = (
            nnx.Param(rngs.params.uniform((config.width,), minval=-bound, maxval=bound)) if config.patch_bias else None
        )
        self.patch_size, self.dtype = config.patch_size, run.dtype

    def __call__(self, images: Array, grid: tuple[int, int]) -> Array:
        """(B, H, W, 3) -> (B, P, D)."""
        (h, w), p = grid, self.patch_size
        x = (
            images.astype(self.dtype)
            .reshape(-1, h, p, w, p, 3)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(-1, h * w, p * p * 3)
        )
        x = x @ gathered(self.kernel, x.dtype)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class VisionTransformer(nnx.Module):
    """The network as a module of Params.

    Users hold a `Model`; training code merges this from (config, params) inside jit.
    """

    def __init__(self, config: ViTConfig, run: Execution, *, rngs: nnx.Rngs):
        d = config.width
        self.config, self.run = config, run
        self.patch_embed = PatchEmbed(config, run, rngs=rngs)

        def token(count: int) -> nnx.Param:
            return nnx.Param(config.token_init_std * rngs.params.normal((1, count, d)))

        self.cls_token = token(1) if config.class_token else None
        self.register_tokens = token(config.registers) if config.registers else None
        self.mask_token = nnx.Param(jnp.zeros((1, d))) if config.mask_token else None
        self.pos_embed = None if config.position == "none" else nnx.Param(_initial_positions(config, rngs))
        self.pre_norm = layer_norm(d, config, run=run, rngs=rngs) if config.pre_norm else None
        stack = nnx.vmap(lambda r: Block(config, run, rngs=r), in_axes=0, out_axes=0)
        self.blocks = stack(rngs.split(config.depth))
        self.norm = layer_norm(d, config, run=run, rngs=rngs) if config.final_norm else None
        self.attn_pool = AttentionPool(config, run, rngs=rngs) if config.pool == "map" else None
        self.fc_norm = layer_norm(d, config, run=run, rngs=rngs) if config.fc_norm else None
        pooled = 2 * d if config.pool == "token_avg" else d
        self.head = linear(pooled, config.num_classes, run=run, rngs=rngs) if config.num_classes else None

    def __call__(
        self, images: Array, *, patch_mask: Array | None = None, key: Array | None = None, capture: tuple[str, ...] = ()
    ) -> Tokens | tuple[Tokens, dict[str, Array]]:
        """Tokens of a batch of images.

        Args:
          images: (B, H, W, 3), normalised; H and W multiples of the patch size.
          patch_mask: (B, P) bool; True patches are replaced by the mask token (they keep their position).
          key: randomness of stochastic depth, which then drops branches of each sample by chance; or what
            `layers.branches` or `layers.subsets` drew; None computes the deterministic network.
          capture: names of `models.capture` to return beside the tokens.

        Returns:
          Tokens after the final norm (the residual stream if the architecture has none); with `capture` also {name:
          array}.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be (B, H, W, 3), got {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be normalised floats, got {images.dtype}: use model.preprocess")
        grid = self.config.grid_of(images.shape[1:3])
        x = self.embed(images, grid, patch_mask)
        wanted = captures.parse(tuple(capture), self.config, x.shape[1])
        found = {c.name: x for c in wanted if c.block < 0}
        x, inner = self._run_blocks(x, key, [c for c in wanted if c.block >= 0])
        tokens = self.split(self.normalize(x), grid)
        return (tokens, {name: (found | inner)[name] for name in capture}) if capture else tokens

    def embed(self, images: Array, grid: tuple[int, int], patch_mask: Array | None = None) -> Array:
        """(B, N, D): what enters block 0."""
        c = self.config
        x = self.patch_embed(images, grid)
        if patch_mask is not None:
            x = self._mask(x, patch_mask)
        b = x.shape[0]
        prefix = [
            jnp.broadcast_to(token[...].astype(x.dtype), (b, *token.shape[1:]))
            for token in (self.cls_token, self.register_tokens)
            if token is not None
        ]
        if self.pos_embed is not None:
            # Position comes before registers are inserted: they have none, unless the weights say otherwise ("all").
            rows = self.pos_embed[...]
            first, native = c.position_prefix, rows[0, c.position_prefix :].reshape(*c.grid, -1)
            x = x + resample(native, grid, c.resampler).reshape(1, -1, c.width).astype(x.dtype)
            ends, start = [], 0
            for token in prefix:
                take = max(0, min(token.shape[1], first - start))
                ends.append(token.at[:, :take].add(rows[:, start : start + take].astype(x.dtype)) if take else token)
                start += token.shape[1]
            prefix = ends
        x = jnp.concatenate([*prefix, x], axis=1)
        return x if self.pre_norm is None else self.pre_norm(x)

    def normalize(self, x: Array) -> Array:
        """The final norm, where there is one."""
        return x if self.norm is None else self.norm(x)

    def split(self, x: Array, grid: tuple[int, int]) -> Tokens:
        """(B, N, D) by kind of token."""
        cls, prefix = int(self.config.class_token), self.config.prefix
        return Tokens(x[:, 0] if cls else None, x[:, cls:prefix], x[:, prefix:], grid)

    def pool(self, tokens: Tokens) -> Array:
        """(B, D), or (B, 2 D) for "token_avg": the vector that the head sees."""
        if self.attn_pool is not None:
            pooled = self.attn_pool(tokens.patches)
        elif self.config.pool == "token_avg":
            pooled = jnp.concatenate([tokens.cls, tokens.patches.mean(axis=1)], axis=-1)
        else:
            pooled = tokens.cls if self.config.pool == "token" else tokens.patches.mean(axis=1)
        return pooled if self.fc_norm is None else self.fc_norm(pooled)

    def logits(self, tokens: Tokens) -> Array:
        """(B, C) float32.

        Raises:
          ValueError: if the model has no head.
        """
        if self.head is None:
            raise ValueError("this model has no classification head (num_classes is 0)")
        x = self.pool(tokens)
        return (x @ gathered(self.head.kernel, x.dtype) + self.head.bias[...].astype(x.dtype)).astype(jnp.float32)

    def _mask(self, patches: Array, mask_bp: Array) -> Array:
        if self.mask_token is None:
            raise ValueError("patch_mask needs a mask token: create the model with mask_token=True")
        if mask_bp.shape != patches.shape[:2]:
            raise ValueError(f"patch_mask must be (B, P) = {patches.shape[:2]}, got {mask_bp.shape}")
        return jnp.where(mask_bp[..., None], self.mask_token[...].astype(patches.dtype), patches)

    def _run_blocks(
        self, x: Array, key: Array | None, wanted: list[captures.Capture]
    ) -> tuple[Array, dict[str, Array]]:
        """All blocks, in segments that end where something is captured: nothing else is kept, and no capture costs
        nothing."""
        depth, rates, drops = self.config.depth, drop_rates(self.config), None
        if key is not None and self.config.drop_path > 0:
            drops = _drops(key, x.shape[0], rates)
        found: dict[str, Array] = {}
        start = 0
        for stop in sorted({w.block + 1 for w in wanted} | {depth}):
            here = [w for w in wanted if w.block + 1 == stop]
            inside = tuple(sorted({w.inner for w in here if w.what != "residual"}, key=str))
            plain = stop - 1 if inside else stop
            x = self._segment(x, drops, rates, start, plain)
            if inside:
                x, values = self._block(x, drops, rates, stop - 1, inside)
                found |= {w.name: w.pick(values) for w in here if w.what != "residual"}
            found |= {w.name: x for w in here if w.what == "residual"}
            start = stop
        return x, found

    def _segment(self, x: Array, drops: Drops, rates: Array, start: int, stop: int) -> Array:
        if start >= stop:
            return x
        # A block's number of rows is a shape, so blocks that keep different numbers cannot share a scan.
        if self.run.unroll or isinstance(drops, tuple):
            body = _remat(lambda x, i: self._block(x, drops, rates, i)[0], self.run.remat, in_scan=False)
            for i in range(start, stop):
                x = body(x, i)
            return x
        body = _remat(lambda x, layer: (layer[0](x, layer[1], layer[2])[0], None), self.run.remat, in_scan=True)
        whole = (start, stop) == (0, self.config.depth)
        layers = (self.blocks, drops, rates)
        return jax.lax.scan(body, x, layers if whole else jax.tree.map(lambda leaf: leaf[start:stop], layers))[0]

    def _block(self, x: Array, drops: Drops, rates: Array, i: int, want: tuple = ()) -> tuple[Array, dict]:
        block = jax.tree.map(lambda leaf: leaf[i], self.blocks)
        return block(x, None if drops is None else drops[i], rates[i], want)


def _drops(key: Array | tuple[Array, ...], rows: int, rates: np.ndarray) -> Drops:
    """Of each block: (2, B) bool or (2, G, k) int32, as `layers.Block` takes them."""
    if isinstance(key, tuple):
        return key
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = branches(key, rows, rates)
    return jnp.moveaxis(key, 0, -1) if key.dtype == bool else key


def drop_rates(config: ViTConfig) -> np.ndarray:
    """(depth,): the chance that stochastic depth drops a branch, of every block."""
    if config.drop_path_uniform:
        return np.full(config.depth, config.drop_path, np.float32)
    return np.linspace(0.0, config.drop_path, config.depth, dtype=np.float32)


def _remat(body, policy: str, *, in_scan: bool):
    if policy == "none":
        return body
    saved = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "named": jax.checkpoint_policies.save_only_these_names(*SAVED),
        "full": None,
    }[policy]
    # Inside a scan the loop itself keeps XLA from merging the recomputation away.
    return jax.checkpoint(body, policy=saved, prevent_cse=not in_scan, static_argnums=() if in_scan else (1,))


def _initial_positions(config: ViTConfig, rngs: nnx.Rngs) -> Array:
    rows = config.position_prefix + math.prod(config.grid)
    if config.position_init == "normal":
        return WEIGHT_STD * rngs.params.normal((1, rows, config.width))
    patches = sincos(config.grid, config.width)
    return jnp.concatenate([jnp.zeros((config.position_prefix, config.width)), patches])[None]
