"""Features: one vector an image from a frozen model, computed over a mesh, in the order of the source.

with shared():                                      # one pass over the images for all that ask inside
    train = extract(model, "npz:cifar10.npz", outputs=("cls",), batch_size=256, mesh=mesh)
    train.arrays["cls"]                             # (N, D) float32
"""

import dataclasses
import functools
import logging
import math
import re
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from regvit_jax import sharding, stopping
from regvit_jax.data.augment import normalize
from regvit_jax.data.loader import eval_batches
from regvit_jax.data.sources import Source
from regvit_jax.data.transforms import EvalTransform, Preprocess
from regvit_jax.evals import Evaluator
from regvit_jax.evals.feature_cache import Kept, counted, find, is_shared, keep, keys_of, shared, source_of
from regvit_jax.evals.progress import Progress
from regvit_jax.models.model import Model
from regvit_jax.trees import Array

__all__ = [
    "Features",
    "batches",
    "check_pair",
    "extract",
    "labelled_pair",
    "leave_out",
    "multiple_of",
    "place",
    "pooled",
    "shared",
    "source_of",
]

POOLED = ("cls", "mean_patch")

_OUTPUT = re.compile(r"(?:block(-?\d+)/)?(cls|mean_patch)")
_NAMED = 5  # unreadable images in one message

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Features:
    """What `extract` returns: N rows in the order of the source, without samples that cannot be read.

    Attributes:
      arrays: {output: (N, D) float32}.
      labels: (N,) int32, -1 where a sample has none.
      index: (N,) int64, place of each row's sample in the source.
      class_names: of the source, in label order; empty without labels.
      source: the string of the source.
      fingerprint: of the source.
    """

    arrays: dict[str, np.ndarray]
    labels: np.ndarray
    index: np.ndarray
    class_names: tuple[str, ...]
    source: str
    fingerprint: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def joined(self, outputs: tuple[str, ...]) -> np.ndarray:
        """(N, sum of D): outputs side by side."""
        return np.concatenate([self.arrays[name] for name in outputs], axis=1)

    def labelled(self) -> "Features":
        """Only the samples that have a label.

        Raises:
          ValueError: if none has; says how to give labels.
        """
        has_label = self.labels >= 0
        if not has_label.any() or not self.class_names:
            raise ValueError(
                f"{self.source!r} has no labels, which this evaluator needs: put the images into one folder a class "
                f"(PATH/cat/1.jpg, PATH/dog/2.jpg), name a labelled source, or leave this evaluator out"
            )
        if has_label.all():
            return self
        missing = int((~has_label).sum())
        _log.warning("%s: %d of %d samples have no label and are left out", self.source, missing, len(has_label))
        arrays = {name: array[has_label] for name, array in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays, labels=self.labels[has_label], index=self.index[has_label])


def extract(
    model: Model,
    source_spec: str,
    *,
    outputs: tuple[str, ...] = ("cls",),
    norm: bool = True,
    batch_size: int,
    mesh: Mesh,
    cache_dir: str = "",
    workers: int = 0,
    max_bad: float = Evaluator.max_bad,
    source: Source | None = None,
) -> Features:
    """Features of every image of a source.

    Images are prepared as the model's `preprocessing` says. Values do not depend on batch size or mesh beyond rounding.
    Inside `shared()`, and with `cache_dir`, what was computed before for the same weights, model, source and
    preparation is used again. The arrays may be shared with others: do not write into them.

    Args:
      outputs: "cls" (class token) and "mean_patch" (mean over patches) of the last block, or of another: "block-4/cls".
      norm: after the network's final norm; otherwise of the residual stream.
      batch_size: over all devices; rounded up to a multiple of what the mesh splits a batch into.
      cache_dir: folder of feature files; a damaged one is computed anew. Empty: none.
      max_bad: share of the images that may be unreadable; they are left out.
      source: what to read where no string says it, such as a part of a source; `source_spec` is then only its name.

    Raises:
      ValueError: for an unknown output, a class token that the model has not, more unreadable images than that, or
        features that are not finite.
    """
    for output in outputs:
        _check_output(output, model)
    source = source_of(source_spec) if source is None else source
    known = is_shared() or bool(cache_dir)
    # Inside `shared` another evaluator is likely to want the other vector: a pass costs far more than its memory.
    extra = [
        name for name in POOLED if is_shared() and name not in outputs and (name != "cls" or model.config.class_token)
    ]
    keys = keys_of(model, source, (*outputs, *extra), norm) if known else {}
    kept = find({name: keys[name] for name in outputs}, cache_dir, len(source)) if known else {}
    missing = [name for name in outputs if name not in kept]
    if missing:
        arrays, *rows = _compute(model, source, source_spec, (*missing, *extra), norm, batch_size, mesh, workers)
        kept |= {name: Kept(array, *rows) for name, array in arrays.items()}
    if known:
        keep(keys, kept, cache_dir, len(source))
    kept = _same_rows({name: kept[name] for name in outputs})
    index = kept[outputs[0]].index
    leave_out(source, source_spec, index, max_bad)
    arrays = {name: kept[name].features for name in outputs}
    for name, array in arrays.items():
        bad = len(array) - int(np.isfinite(array).all(axis=1).sum())
        if bad:
            raise ValueError(
                f"the feature {name!r} is NaN or infinite for {bad} of {len(array)} images of {source_spec}: "
                f"the weights have diverged, or the dtype {model.run.dtype} is too narrow for them"
            )
    labels = kept[outputs[0]].labels
    return Features(arrays, labels, index, tuple(source.class_names), source_spec, source.fingerprint)


def labelled_pair(options: Evaluator, model: Model, outputs: tuple[str, ...], mesh: Mesh) -> tuple[Features, Features]:
    """Labelled features of `options.data` and of `options.eval_data`, which must have the same classes."""
    train, test = (
        extract(
            model,
            spec,
            outputs=outputs,
            batch_size=options.batch_size,
            mesh=mesh,
            cache_dir=options.cache_dir,
            workers=options.workers,
            max_bad=options.max_bad,
        ).labelled()
        for spec in (options.data, options.eval_data)
    )
    check_pair(train.source, train.class_names, train.fingerprint, test)
    return train, test


def check_pair(spec: str, class_names: tuple[str, ...], fingerprint: str, test: Features) -> None:
    """Warns if a training source is the evaluation set itself.

    Raises:
      ValueError: if they do not have the same classes.
    """
    if class_names != test.class_names:
        only = sorted(set(class_names) ^ set(test.class_names))
        what = f"only one has {', '.join(only[:5])}" if only else "their order differs"
        raise ValueError(
            f"{spec!r} and {test.source!r} do not have the same classes ({what}): a label would mean "
            f"another thing in each; name two splits or slices of one source"
        )
    if fingerprint == test.fingerprint:
        _log.warning("%s and %s are the same samples: the numbers say nothing of new images", spec, test.source)


def place(model: Model, mesh: Mesh) -> Model:
    """The model with every array on `mesh`: kept where it lies if it is there already, else whole on every device."""
    leaves, structure = jax.tree.flatten(model)

    def there(leaf):
        return isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh

    if all(map(there, leaves)):
        return model
    return jax.tree.unflatten(structure, [x if there(x) else sharding.replicate(x, mesh) for x in leaves])


def batches(
    source: Source, spec: Preprocess, *, batch_size: int, mesh: Mesh, workers: int = 0
) -> Iterator[dict[str, Array]]:
    """Global batches on the mesh: "image" uint8 (B,S,S,3), "label" and "index" int32 (B,); index is -1 for padding and
    for a sample that cannot be read: rows that count for nothing, see `leave_out`.

    B is `batch_size`, at most the size of the source, rounded up to what the mesh and the processes can split.
    """
    local = eval_batches(
        source,
        EvalTransform(spec, fields=("image", "label")),
        batch_size=multiple_of(mesh, min(batch_size, len(source))),
        workers=workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for batch in local:
        stopping.poll()
        index = batch["index"].astype(np.int32)
        yield sharding.put({"image": batch["image"], "label": batch["label"], "index": index}, mesh)


def leave_out(source: Source, spec: str, index: np.ndarray, max_bad: float) -> None:
    """Warns of the samples of a source that are not in `index` because they cannot be read, and records their number
    for results.json.

    Raises:
      ValueError: if they are more than a share `max_bad`: a number measured on the rest is not the one asked for.
    """
    n = len(source)
    missing = np.setdiff1d(np.arange(n), index)
    counted()[spec] = len(missing)
    if not len(missing):
        return
    names = ", ".join(source.name(int(place)) for place in missing[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
    if len(missing) / n > max_bad:
        raise ValueError(
            f"{len(missing)} of the {n} images of {spec!r} cannot be read ({names}), more than max_bad={max_bad:g} of "
            f"them: repair or remove these files, or raise max_bad of this evaluator"
        )
    _log.warning("%s: %d of %d images cannot be read and are left out: %s", spec, len(missing), n, names)


def multiple_of(mesh: Mesh, rows: int) -> int:
    """`rows`, at least 1, rounded up to what the mesh and the processes can split."""
    parts = math.lcm(mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count())
    return -(-max(rows, 1) // parts) * parts


def _check_output(output, model):
    match = _OUTPUT.fullmatch(output)
    if match is None:
        raise ValueError(f"no feature is called {output!r}: write cls or mean_patch, of an earlier block block3/cls")
    if match[2] == "cls" and not model.config.class_token:
        raise ValueError(f"the feature {output!r} needs a class token and this model has none: use 'mean_patch'")
    depth = model.config.depth
    if match[1] is not None and not -depth <= int(match[1]) < depth:
        raise ValueError(f"the feature {output!r}: the model has blocks 0 to {depth - 1}")


def _compute(model, source, source_spec, outputs, norm, batch_size, mesh, workers):
    """({output: (M, D) float32}, labels (M,) int32, index (M,)) of what can be read, by one pass over the source."""
    start = time.monotonic()
    model = place(model, mesh)
    n, done = len(source), 0
    progress = Progress(f"features of {source_spec}:", n)
    arrays, labels, seen = {}, np.full(n, -1, np.int32), np.zeros(n, bool)

    def collect(batch, pooled):
        host = sharding.gather({"label": batch["label"], "index": batch["index"], **pooled})
        index = host.pop("index")
        rows = index[index >= 0]
        labels[rows] = host.pop("label")[index >= 0]
        seen[rows] = True
        for name, values in host.items():
            if name not in arrays:
                arrays[name] = np.empty((n, values.shape[1]), np.float32)
            arrays[name][rows] = values[index >= 0]
        return len(rows)

    pending = None
    with jax.set_mesh(mesh):
        for batch in batches(source, model.preprocessing, batch_size=batch_size, mesh=mesh, workers=workers):
            computing = batch, pooled(model, batch["image"], outputs, norm)
            # The devices work on this batch while the one before is fetched.
            if pending is not None:
                done += collect(*pending)
            pending = computing
            progress(done)
        done += collect(*pending)
    seconds = time.monotonic() - start
    _log.info("features of %s: %d images in %.1f s (%.0f img/s)", source_spec, n, seconds, n / max(seconds, 1e-9))
    if seen.all():
        return arrays, labels, np.arange(n)
    return {name: array[seen] for name, array in arrays.items()}, labels[seen], np.flatnonzero(seen)


def _same_rows(kept):
    """The outputs over the samples that all of them have: a file may break between two passes."""
    index = functools.reduce(np.intersect1d, (one.index for one in kept.values()))

    def part(one):
        rows = np.isin(one.index, index)
        return Kept(one.features[rows], one.labels[rows], index)

    return {name: one if len(one.index) == len(index) else part(one) for name, one in kept.items()}


@functools.partial(jax.jit, static_argnums=(2, 3))
def pooled(model: Model, images_u8: Array, outputs: tuple[str, ...], norm: bool) -> dict[str, Array]:
    """{output: (B, D) float32} of uint8 images, for use inside jit too; `outputs` and `norm` as in `extract`."""
    depth, spec = model.config.depth, model.preprocessing
    module = model.module()
    matches = {output: _OUTPUT.fullmatch(output) for output in outputs}
    blocks = {output: int(match[1] or -1) % depth for output, match in matches.items()}
    names = tuple(f"block{block}" for block in sorted(set(blocks.values())))
    tokens, found = module(normalize(images_u8, spec.mean, spec.std), capture=names)
    pooled = {}
    for output, match in matches.items():
        stream = found[f"block{blocks[output]}"]
        parts = module.split(module.normalize(stream) if norm else stream, tokens.grid)
        vector = parts.cls if match[2] == "cls" else parts.patches.astype(jnp.float32).mean(axis=1)
        pooled[output] = sharding.constrain(vector.astype(jnp.float32), sharding.BATCH)
    return pooled
