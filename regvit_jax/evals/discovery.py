"""Object discovery: one box an image from a frozen network, no label and no training; CorLoc against the true boxes.

Images keep their size: normalised, then padded by zeros at the bottom and the right to whole patches, as LOST does.
Several values for `feature`, `block` or `bias` are a sweep: every setting is measured in one pass and the best is
reported, tuned on the very images that it is measured on, as published numbers of this kind were.
"""

import dataclasses
import functools
import itertools
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from regvit_jax import sharding
from regvit_jax.data.augment import normalize
from regvit_jax.evals import Evaluator, option
from regvit_jax.evals.box_metrics import corloc
from regvit_jax.evals.discovery_images import Photo, batches, put
from regvit_jax.evals.discovery_pictures import draw
from regvit_jax.evals.features import leave_out, place, source_of
from regvit_jax.models.model import Model
from regvit_jax.ops.dino_seg import dino_seg
from regvit_jax.ops.lost import Discovery, lost, pixels
from regvit_jax.trees import Array

BOXES, SWEEP, PICTURE = "boxes.json", "sweep.json", "boxes.png"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to make a box with LOST."""

    feature: str
    block: int
    bias: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectDiscovery(Evaluator):
    """LOST, or the baseline DINO-seg, on a source with boxes. See the top of the file.

    Metrics: "corloc" (share of images whose box meets a true one with an IoU of 0.5 or more, in the best setting),
    "images" (those with a true box), "settings" (how many were tried; above 1 the number is a tuned one). Files:
    boxes.json (the boxes of the best setting), sweep.json (the CorLoc of every setting), boxes.png.
    """

    NEEDS, TRUTH = ("eval_data",), "boxes"

    batch_size: int = option(8, "images of one grid in one pass, over all devices; changes speed and memory only")
    method: str = option("lost", "lost | dino_seg (attention of the class token)")
    feature: tuple[str, ...] = option(("k",), "of q, k and v: keys for DINO and DINOv2, values for DeiT-III and CLIP")
    block: tuple[int, ...] = option((-1,), "blocks they are taken of, from the end if negative")
    bias: tuple[float, ...] = option((0.0,), "added to every product of features; the paper tuned it by hand")
    normalize: bool = option(False, "features of length 1, so that a bias lies between -1 and 0")
    k_patches: int = option(100, "patches of lowest degree that may vote")
    head: int = option(4, "whose attention dino_seg takes")
    mass: float = option(0.6, "share of the attention that the mask of dino_seg holds")
    max_side: int = option(0, "longer images are shrunk to it; 0: never, as published")
    n: int = option(8, "images in the picture")

    def __post_init__(self):
        super().__post_init__()
        self.check("method", self.method in ("lost", "dino_seg"), "lost or dino_seg")
        self.check("feature", bool(self.feature) and set(self.feature) <= set("qkv"), "one or more of q, k and v")
        self.check("block", bool(self.block), "one or more block numbers")
        self.check("bias", bool(self.bias), "one or more numbers")
        self.check("k_patches", self.k_patches >= 1, "at least 1")
        self.check("mass", 0 < self.mass <= 1, "in (0, 1]")
        self.check("max_side", self.max_side >= 0, "0 or more")
        self.check("n", self.n >= 1, "at least 1")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        c = model.config
        if any(not -c.depth <= block < c.depth for block in self.block):
            raise ValueError(f"block={self.block}: this network has {c.depth} blocks")
        if self.method == "dino_seg" and not (c.class_token and 0 <= self.head < c.num_heads):
            raise ValueError(f"dino_seg needs a class token and head={self.head}; this network has {c.num_heads} heads")
        source, model, settings = source_of(self.eval_data), place(model, mesh), self.settings()
        found: dict[int, tuple[Photo, np.ndarray]] = {}
        with jax.set_mesh(mesh):
            for photos in batches(source, c.patch_size, self.max_side, self.batch_size):
                batch = put(photos, c.patch_size, self.batch_size, mesh)
                boxes = self._boxes(model, batch, settings)  # in patches: (settings, B, 4)
                for row, photo in enumerate(photos):
                    own = pixels(boxes[:, row], c.patch_size, photo.size) / photo.scale
                    # The pixels of those that are shown are kept, the others' are not.
                    kept = photo if photo.index < self.n else dataclasses.replace(photo, pixels=None)
                    found[photo.index] = kept, own
            index = sorted(found)
            leave_out(source, self.eval_data, np.array(index, np.int64), self.max_bad)
            truth = [found[i][0].boxes for i in index]
            scores = [corloc([found[i][1][s] for i in index], truth) for s in range(len(settings))]
            best = int(np.argmax(scores))
            shown = [(found[i][0], found[i][1][best]) for i in index if i < self.n]
            maps = [self._maps(model, photo, settings[best], mesh) for photo, _ in shown]
        if len(settings) > 1:
            _log.info("discovery: %s is the best of %d, on the images it is measured on", settings[best], len(settings))
        if jax.process_index() == 0:
            folder = pathlib.Path(out_dir)
            folder.mkdir(parents=True, exist_ok=True)
            named = {found[i][0].name: found[i][1][best].tolist() for i in index}
            (folder / BOXES).write_text(json.dumps(named, indent=1) + "\n")
            rows = [dataclasses.asdict(s) | {"corloc": v} for s, v in zip(settings, scores, strict=True)]
            (folder / SWEEP).write_text(json.dumps(rows, indent=1) + "\n")
            draw(folder / PICTURE, shown, maps)
            _log.info("wrote %s", folder / PICTURE)
        count = sum(len(boxes) > 0 for boxes in truth)
        return {"corloc": scores[best], "images": float(count), "settings": float(len(settings))}

    def settings(self) -> list[Setting]:
        """All combinations, in the order of `_boxes`."""
        if self.method == "dino_seg":
            return [Setting("attention", block, 0.0) for block in self.block]
        return [Setting(*combination) for combination in itertools.product(self.feature, self.block, self.bias)]

    def _boxes(self, model, batch, settings) -> np.ndarray:
        """(settings, B, 4) y0 x0 y1 x1 in patches."""
        if self.method == "dino_seg":
            attention = sharding.gather(_attention(model, batch, self.block, self.head))
            return np.array([[dino_seg(hw, mass=self.mass) for hw in images] for images in attention])
        biases = np.array(self.bias, np.float32)
        found = _lost_boxes(model, batch, biases, self.feature, self.block, self.k_patches, self.normalize)
        return sharding.gather(found).reshape(len(settings), -1, 4)

    def _maps(self, model, photo, setting, mesh) -> dict[str, np.ndarray]:
        """{heading: (h, w)} of one photo."""
        batch = put([photo], model.config.patch_size, 1, mesh)
        if self.method == "dino_seg":
            attention = sharding.gather(_attention(model, batch, (setting.block,), self.head))
            return {f"attention, head {self.head}": attention[0, 0]}
        found = _lost_maps(model, batch, setting, self.k_patches, self.normalize)
        degree, similarity, expansion = (x[0] for x in sharding.gather(found))
        return {"1 / degree": 1 / (1 + degree), "similarity to the seed": similarity, "votes": expansion}


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _lost_boxes(model: Model, batch, biases: Array, features, blocks, k_patches: int, normalise: bool) -> Array:
    """(features x blocks x biases, B, 4) int32."""
    maps = _features(model, batch, features, blocks)
    boxes = [
        jax.lax.map(lambda bias, x=x: lost(x, k_patches=k_patches, bias=bias, normalize=normalise).box, biases)
        for x in maps
    ]
    return jnp.concatenate(boxes)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _lost_maps(model: Model, batch, setting: Setting, k_patches: int, normalise: bool) -> tuple[Array, ...]:
    """(degree, similarity to the seed, expansion), each (B, h, w)."""
    (x,) = _features(model, batch, (setting.feature,), (setting.block,))
    found: Discovery = lost(x, k_patches=k_patches, bias=setting.bias, normalize=normalise)
    return found.degree, found.similarity, found.expansion


@functools.partial(jax.jit, static_argnums=(2, 3))
def _attention(model: Model, batch, blocks: tuple[int, ...], head: int) -> Array:
    """(blocks, B, h, w): attention of the class token to the patches."""
    names = tuple(f"block{block}/attn[cls]" for block in blocks)
    tokens, found = model.module()(_images(model, batch), capture=names)
    rows = [found[name][:, head, 0, model.config.prefix :] for name in names]
    return jnp.stack(rows).reshape(len(blocks), -1, *tokens.grid)


def _features(model: Model, batch, features, blocks) -> list[Array]:
    """(B, h, w, D) for every feature and block: heads side by side, patches only."""
    names = tuple(f"block{block}/{feature}" for feature in features for block in blocks)
    tokens, found = model.module()(_images(model, batch), capture=names)
    rows = len(batch["image"])
    return [found[name][:, model.config.prefix :].reshape(rows, *tokens.grid, -1) for name in names]


def _images(model: Model, batch) -> Array:
    """Normalised, and zero outside of the photo: the padding comes after normalisation."""
    spec = model.preprocessing
    x = normalize(batch["image"], spec.mean, spec.std)
    rows, columns = (jnp.arange(length) for length in x.shape[1:3])
    height, width = batch["size"][:, :1], batch["size"][:, 1:]
    inside = (rows < height)[:, :, None] & (columns < width)[:, None, :]
    return jnp.where(inside[..., None], x, 0.0)


EVALUATOR = ObjectDiscovery
