"""Maps: what the patches of a few images look like from inside, as one picture; and how far their norms stick out.

A row an image. Columns: the image; the norm of every patch token in the residual stream after the last block, where
artifacts show; the first principal component of the patches after the final norm, over all images of the picture.
"""

import dataclasses
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from regvit_jax import sharding
from regvit_jax.data.augment import normalize
from regvit_jax.data.sources import Subset
from regvit_jax.evals import Evaluator, option
from regvit_jax.evals.features import batches, leave_out, place, source_of
from regvit_jax.evals.pictures import grid, short
from regvit_jax.models.model import Model
from regvit_jax.trees import Array

FILE = "maps.png"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maps(Evaluator):
    """Writes out_dir/maps.png for the first images of the evaluation source. See the top of the file.

    Metrics, over the images shown: "patch_norm_max_over_median" (about 1 to 2 without artifacts) and, with registers,
    "register_norm_over_patch", the ratio of median norms.
    """

    NEEDS = ("eval_data",)

    n: int = option(8, "number of images")

    def __post_init__(self):
        super().__post_init__()
        self.check("n", self.n >= 1, "at least 1")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        source = source_of(self.eval_data)
        first = Subset(source, 0, min(self.n, len(source)))
        index, images, norms, patches, registers = _look(model, first, self.workers, mesh)
        # A share of a few images is no share: what can be read is shown.
        leave_out(first, self.eval_data, index, max_bad=1.0)
        if jax.process_index() == 0:
            path = pathlib.Path(out_dir) / FILE
            _draw(path, images, norms, first_component(patches), [_title(source, int(i)) for i in index])
            _log.info("wrote %s", path)
        metrics = {"patch_norm_max_over_median": float(norms.max() / np.median(norms))}
        if registers.size:
            metrics["register_norm_over_patch"] = float(np.median(registers) / np.median(norms))
        return metrics


def first_component(patches: np.ndarray) -> np.ndarray:
    """(N, h, w): projection of (N, h, w, D) patches on the direction in which they differ most.

    A principal component has no sign of its own; here the inner half of the images is the positive side.
    """
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    component = (flat @ vectors[:, -1]).reshape(patches.shape[:3])
    _, h, w = component.shape
    inner = component[:, h // 4 : h - h // 4, w // 4 : w - w // 4].mean()
    return component if inner >= component.mean() else -component


def _look(model, source, workers, mesh):
    """Index (n,), uint8 (n,S,S,3) images, (n,h,w) norms, (n,h,w,D) normalised patches, (n,R) norms of registers."""
    model = place(model, mesh)
    parts = []
    with jax.set_mesh(mesh):
        for batch in batches(source, model.preprocessing, batch_size=len(source), mesh=mesh, workers=workers):
            columns = sharding.gather((batch["index"], batch["image"], *_maps(model, batch["image"])))
            index = columns[0]
            parts.append([values[index >= 0][np.argsort(index[index >= 0])] for values in columns])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


@jax.jit
def _maps(model: Model, images_u8: Array) -> tuple[Array, Array, Array]:
    """(B,h,w) patch norms of the residual stream, (B,h,w,D) patches after the final norm, (B,R) register norms."""
    module = model.module()
    last = f"block{model.config.depth - 1}"
    spec = model.preprocessing
    tokens, found = module(normalize(images_u8, spec.mean, spec.std), capture=(last,))
    stream = module.split(found[last], tokens.grid)
    outputs = _norm(stream.map()), tokens.map().astype(jnp.float32), _norm(stream.registers)
    return jax.tree.map(lambda x: sharding.constrain(x, sharding.BATCH), outputs)


def _norm(x: Array) -> Array:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def _title(source, index):
    """File name and class."""
    label, name = source[index].get("label", -1), short(source.name(index))
    return f"{name}\n{source.class_names[label]}" if 0 <= label < len(source.class_names) else name


def _draw(path, images, norms, components, titles):
    # One scale for all images: an artifact of one is to be seen against the others, not hidden by a scale of its own.
    bound = np.percentile(np.abs(components), 99) or 1.0
    norm_scale = {"cmap": "viridis", "vmin": norms.min(), "vmax": norms.max()}
    component_scale = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
    rows = [
        [image, (norm, norm_scale), (component, component_scale)]
        for image, norm, component in zip(images, norms, components, strict=True)
    ]
    headings = ["image", "patch norm, last block", "first component"]
    grid(path, rows, headings, titles, bars={1: "L2 norm", 2: "projection"}, side=1.6)


EVALUATOR = Maps
