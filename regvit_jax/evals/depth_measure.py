"""Depth of whole images at their own size: batches of images of one size, predicted, mirrored, measured.

Within one size all shapes are static. A set of several sizes is measured size by size, one compilation for each.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from regvit_jax import sharding, stopping
from regvit_jax.data.depth_transforms import DepthEvalTransform, DepthSize
from regvit_jax.data.loader import Transform, eval_batches
from regvit_jax.data.sources import Source
from regvit_jax.evals.dense import dense_features
from regvit_jax.evals.depth_head import output_matrices, read_depth
from regvit_jax.evals.depth_metrics import depth_errors, valid_mask
from regvit_jax.evals.features import multiple_of, place
from regvit_jax.evals.progress import Progress
from regvit_jax.models.model import Model
from regvit_jax.trees import Array, Tree

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Readout:
    """How features become depth, and which pixels count. Static in compiled functions.

    Attributes:
      blocks, cls: what the head reads, see `dense_features`.
      ends: (nearest, farthest) metres, of the bins, of what is predicted and of what is measured.
      padding: stretch or crop, see `output_matrices`.
      flip: average with the prediction for the mirrored image, mirrored back.
      crop: see `crop_mask`.
    """

    blocks: tuple[int, ...]
    cls: bool
    ends: tuple[float, float]
    padding: str = "stretch"
    flip: bool = True
    crop: str = "none"

    @property
    def features(self) -> dict:
        """The arguments of `dense_features`: the residual stream, as published."""
        return {"blocks": self.blocks, "norm": False, "cls": self.cls}


def predict(model: Model, heads: Tree, images_u8: Array, target: tuple[int, int], readout: Readout) -> Array:
    """(heads, B, *target) float32 metres, inside `readout.ends`; for use inside jit."""
    rows, columns = output_matrices(images_u8.shape[1:3], target, model.config.patch_size, readout.padding)

    def once(images):
        features = sharding.constrain(dense_features(model, images, **readout.features), sharding.BATCH)
        return jax.vmap(lambda head: read_depth(head, features, rows, columns, readout.ends))(heads)

    depth = once(images_u8)
    if readout.flip:
        depth = 0.5 * (depth + once(images_u8[:, :, ::-1])[..., ::-1])
    return jnp.clip(depth, *readout.ends)


def measure(
    model: Model,
    heads: Tree,
    source: Source,
    readout: Readout,
    *,
    batch_size: int,
    mesh: Mesh,
    short_side: int = 0,
    workers: int = 0,
    show: tuple[int, ...] = (),
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[int, np.ndarray]]:
    """The errors of stacked heads on every image of a source, each at its own size. All processes make this call.

    Args:
      short_side: pixels to which the short side of the images is resized, not that of the depth maps; 0: as it is.
      show: samples whose depth maps are wanted, too.

    Returns:
      {metric: (heads, M)}, index (M,) of what could be read, {sample: (heads, H, W) metres} of `show`.
    """
    model = place(model, mesh)
    parts, places, shown, progress = [], [], {}, Progress("depth probe: measured", len(source))

    def collect(picked, batch, errors, depth):
        index, errors = sharding.gather((batch["index"], errors))
        rows = np.flatnonzero(index >= 0)
        found = picked.places[index[rows]]
        places.append(found)
        parts.append({name: values[:, rows] for name, values in errors.items()})
        progress(sum(map(len, places)))
        wanted = [(row, place) for row, place in zip(rows, found.tolist(), strict=True) if place in show]
        if wanted:
            depth = sharding.gather(depth)
            shown.update({place: depth[:, row] for row, place in wanted})

    sizes, _ = survey(source, batch_size=batch_size, mesh=mesh, workers=workers)
    groups = [tuple(size) for size in np.unique(sizes[sizes.min(axis=1) > 0], axis=0).tolist()]
    if len(groups) > 1:
        _log.info("depth probe: images of %d sizes, compiled for each", len(groups))
    transform, pending = DepthEvalTransform(short_side), None
    with jax.set_mesh(mesh):
        heads = sharding.replicate(heads, mesh)
        for size in groups:
            picked = Picked(source, np.flatnonzero((sizes == size).all(axis=1)))
            for batch in _batches(picked, transform, batch_size, mesh, workers):
                computing = picked, batch, *_measure(model, heads, batch, readout)
                # The devices work on this batch while the one before is fetched.
                if pending is not None:
                    collect(*pending)
                pending = computing
        if pending is not None:
            collect(*pending)
    errors = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    return errors, np.concatenate(places), shown


def survey(source: Source, *, batch_size: int, mesh: Mesh, workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One look at all samples: int (N, 2) height and width, float (N, 2) least and largest known depth in metres.

    A sample that cannot be read has size 0; one without any known depth has the range (inf, 0).
    """
    sizes, ranges = np.zeros((len(source), 2), int), np.tile([np.inf, 0.0], (len(source), 1))
    for batch in _batches(source, DepthSize(), batch_size, mesh, workers):
        host = sharding.gather(batch)
        rows = host["index"] >= 0
        sizes[host["index"][rows]] = host["size"][rows]
        ranges[host["index"][rows]] = host["range"][rows]
    return sizes, ranges


class Picked(Source):
    """The samples `places` (n,) of a source, in that order."""

    def __init__(self, source: Source, places: np.ndarray):
        self.source, self.places = source, np.asarray(places)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        return self.source[int(self.places[index])]

    def name(self, index):
        return self.source.name(int(self.places[index]))


@functools.partial(jax.jit, static_argnums=3)
def _measure(model: Model, heads: Tree, batch: dict[str, Array], readout: Readout) -> tuple[dict[str, Array], Array]:
    """{metric: (heads, B)} and depth (heads, B, H, W)."""
    target = batch["depth"]
    depth = predict(model, heads, batch["image"], target.shape[1:], readout)
    valid = valid_mask(target, *readout.ends, readout.crop)
    errors = jax.vmap(lambda one: depth_errors(one, target, valid))(depth)
    return jax.tree.map(lambda x: sharding.constrain(x, None, sharding.BATCH), (errors, depth))


def _batches(
    source: Source, transform: Transform, batch_size: int, mesh: Mesh, workers: int
) -> Iterator[dict[str, Array]]:
    """Global batches on the mesh with "index" int32, the place in the source, -1 for rows that count for nothing."""
    local = eval_batches(
        source,
        transform,
        batch_size=multiple_of(mesh, min(batch_size, len(source))),
        workers=workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for batch in local:
        stopping.poll()
        del batch["valid_b"]
        yield sharding.put(batch | {"index": batch["index"].astype(np.int32)}, mesh)
