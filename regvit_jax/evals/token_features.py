"""Token features: of every image its class token, its registers, and patches drawn at random among normal ones and
among outliers, all after the final norm.

    found = extract_tokens(model, "npz:cifar10.npz", limit=150.0, draws=5, batch_size=256, mesh=mesh)
    found.arrays["outlier/2"]               # (N, D) float32: the third draw; rows of images without outlier are zeros
    found.rows("outlier")                   # (N,) bool: the images that have one

One forward pass serves all draws. Ten vectors of 1,536 for a million images are 60 GB: with `cache_dir` they lie in
files that are mapped into memory, and are found again there by what they depend on.
"""

import dataclasses
import functools
import logging
import math
import os
import pathlib
import shutil
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from regvit_jax import sharding
from regvit_jax.data.augment import normalize
from regvit_jax.evals import Evaluator
from regvit_jax.evals.by_norm import check_finite
from regvit_jax.evals.feature_cache import keys_of
from regvit_jax.evals.features import batches, leave_out, place, source_of
from regvit_jax.models.model import Model
from regvit_jax.ops.outliers import token_norms
from regvit_jax.trees import Array

DRAWN = ("normal", "outlier")  # kinds of patches; their order is part of the random numbers
KINDS = ("cls", *DRAWN, "registers")

_ABOUT = "about.npz"
_SECONDS_BETWEEN_LINES = 30.0

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenFeatures:
    """What `extract_tokens` returns: a row a sample of the source, in its order.

    Attributes:
      arrays: {"cls", "register0", …, "normal/0", …, "outlier/0", …: (N, D) float32}, maybe mapped from files: do not
        write into them. Rows of what is not there are zeros.
      outliers: (N,) int32, patches that are outliers; -1 for a sample that cannot be read.
      patches: patches of an image.
      labels: (N,) int32, -1 where a sample has none or cannot be read.
    """

    arrays: dict[str, np.ndarray]
    outliers: np.ndarray
    patches: int
    labels: np.ndarray

    @property
    def readable(self) -> np.ndarray:
        """(N,) bool."""
        return self.outliers >= 0

    def rows(self, kind: str) -> np.ndarray:
        """(N,) bool: the images that have a token of a kind: "normal", "outlier", or another, which all have."""
        if kind == "outlier":
            return self.outliers > 0
        return self.readable & (self.outliers < self.patches) if kind == "normal" else self.readable


def extract_tokens(
    model: Model,
    source_spec: str,
    *,
    limit: float,
    block: int = -1,
    draws: int = 5,
    seed: int = 0,
    kinds: tuple[str, ...] = KINDS,
    batch_size: int,
    mesh: Mesh,
    cache_dir: str = "",
    workers: int = 0,
    max_bad: float = Evaluator.max_bad,
) -> TokenFeatures:
    """Single tokens of every image of a source, after the final norm.

    Which patch is drawn depends on (seed, draw, place of the sample in the source) and on which patches are outliers;
    neither batch size nor mesh matters.

    Args:
      limit: patches with a norm above it, in the residual stream after `block`, are outliers.
      draws: how often a normal patch and an outlier are drawn from each image, anew each time.
      kinds: of KINDS, those wanted; "cls" and "registers" are left out where the model has none.
      batch_size: over all devices; rounded up to a multiple of what the mesh splits a batch into.
      cache_dir: folder of the files; empty: the vectors are held in memory.
      max_bad: share of the images that may be unreadable; they are left out.

    Raises:
      ValueError: for vectors that fit neither memory nor disk, more unreadable images than that, or tokens that are not
        finite.
    """
    source, c = source_of(source_spec), model.config
    kinds = tuple(kind for kind in KINDS if kind in kinds and _has(c, kind))
    names = [name for kind in kinds for name in names_of(kind, draws=draws, registers=c.registers)]
    shape, folder = (len(source), c.width), None
    if cache_dir:
        asked = f"tokens {block % c.depth} {limit!r} {draws} {seed} {','.join(kinds)}"
        part = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        key = keys_of(model, source, (asked,), True)[asked]
        folder = pathlib.Path(cache_dir).expanduser() / f"tokens-{key}{part}"
        found = _everywhere(_read(folder, names, shape))
        if found is not None:
            _log.info("tokens read from %s", folder)
            leave_out(source, source_spec, np.flatnonzero(found.readable), max_bad)
            return found
    options = dict(limit=limit, block=block, draws=draws, seed=seed, kinds=kinds)
    found = _compute(model, source, source_spec, options, _Room(names, shape, folder), batch_size, mesh, workers)
    leave_out(source, source_spec, np.flatnonzero(found.readable), max_bad)
    return found


def names_of(kind: str, *, draws: int, registers: int) -> list[str]:
    """The names of the arrays of a kind of token: one a draw, one a register, or one."""
    if kind == "registers":
        return [f"register{i}" for i in range(registers)]
    return [f"{kind}/{draw}" for draw in range(draws)] if kind in DRAWN else [kind]


def _has(config, kind):
    return {"cls": config.class_token, "registers": config.registers > 0}.get(kind, True)


class _Room:
    """Zeros for all arrays: in memory, or in files of a folder that has its name only when all is written.

    Raises:
      ValueError: if there is not enough of it.
    """

    def __init__(self, names, shape, folder):
        self.names, self.folder = names, folder
        need = 4 * math.prod(shape) * len(names)
        if folder is None:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if need > 0.8 * memory:
                raise ValueError(
                    f"{len(names)} tokens of {shape[1]} for {shape[0]} images take {need / 1e9:.1f} GB, and this "
                    f"machine has {memory / 1e9:.1f} GB: set cache_dir to a folder on a disk with room for them, or "
                    f"ask for fewer draws or tokens"
                )
            self.arrays = {name: np.zeros(shape, np.float32) for name in names}
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if need > free:
            raise ValueError(
                f"{len(names)} tokens of {shape[1]} for {shape[0]} images take {need / 1e9:.1f} GB, and cache_dir "
                f"{folder.parent} has {free / 1e9:.1f} GB free: make room, or ask for fewer draws or tokens"
            )
        self.unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished.mkdir()
        self.arrays = {
            name: np.lib.format.open_memmap(_file(self.unfinished, name), "w+", np.float32, shape) for name in names
        }

    def finish(self, whole, **about):
        """Keeps the files, if no sample is missing: what cannot be read today may be there tomorrow."""
        if self.folder is None:
            return
        if whole and not self.folder.exists():
            for array in self.arrays.values():
                array.flush()
            np.savez(self.unfinished / _ABOUT, **about)
            os.replace(self.unfinished, self.folder)
        else:
            self.drop()

    def drop(self):
        """Removes the files; what is mapped stays readable until it is let go."""
        if self.folder is not None:
            shutil.rmtree(self.unfinished, ignore_errors=True)


def _file(folder, name):
    return folder / f"{name.replace('/', '-')}.npy"


def _read(folder, names, shape):
    """The TokenFeatures in a folder, None where it is not there, or damaged."""
    if not folder.is_dir():
        return None
    try:
        arrays = {name: np.load(_file(folder, name), mmap_mode="r") for name in names}
        with np.load(folder / _ABOUT, allow_pickle=False) as about:
            found = TokenFeatures(arrays, about["outliers"], int(about["patches"]), about["labels"])
        wrong = [name for name, array in arrays.items() if array.shape != shape]
        if wrong or len(found.outliers) != shape[0]:
            raise ValueError(f"arrays of another shape than {shape}: {', '.join(wrong)}")
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        _log.warning("%s cannot be used (%s): the tokens are computed again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return found


def _everywhere(found):
    """`found` if every process has found it: a disk need not be one that all see."""
    if jax.process_count() == 1:
        return found
    there = multihost_utils.process_allgather(np.array(found is not None))
    return found if there.all() else None


def _compute(model, source, source_spec, options, room, batch_size, mesh, workers):
    start = line = time.monotonic()
    model, n, done, patches = place(model, mesh), len(source), 0, 0
    labels, outliers = np.full(n, -1, np.int32), np.full(n, -1, np.int32)

    def collect(batch, computed):
        index, label, tokens, count = sharding.gather((batch["index"], batch["label"], *computed))
        rows, good = index[index >= 0], index >= 0
        labels[rows], outliers[rows] = label[good], count[good]
        check_finite(tokens[good], model)
        there = {"outlier": count[good] > 0, "normal": count[good] < patches}
        for name, values in zip(room.names, np.moveaxis(tokens[good], 1, 0), strict=True):
            has = there.get(name.partition("/")[0], slice(None))
            room.arrays[name][rows[has]] = values[has]
        return len(rows)

    pending = None
    try:
        with jax.set_mesh(mesh):
            for batch in batches(source, model.preprocessing, batch_size=batch_size, mesh=mesh, workers=workers):
                patches = math.prod(model.config.grid_of(batch["image"].shape[1:3]))
                limit = np.float32(options["limit"])
                static = options["block"], options["draws"], options["kinds"]
                computing = batch, _tokens(model, batch["image"], batch["index"], limit, options["seed"], *static)
                # The devices work on this batch while the one before is fetched.
                if pending is not None:
                    done += collect(*pending)
                pending = computing
                if time.monotonic() - line > _SECONDS_BETWEEN_LINES:
                    line = time.monotonic()
                    _log.info("tokens of %s: %d of %d images", source_spec, done, n)
            done += collect(*pending)
    except BaseException:
        room.drop()
        raise
    seconds = time.monotonic() - start
    _log.info("tokens of %s: %d images in %.1f s (%.0f img/s)", source_spec, n, seconds, n / max(seconds, 1e-9))
    room.finish((outliers >= 0).all(), labels=labels, outliers=outliers, patches=patches)
    return TokenFeatures(room.arrays, outliers, patches, labels)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _tokens(model: Model, images_u8, index_b, limit, seed, block, draws, kinds) -> tuple[Array, Array]:
    """(B, tokens, D) float32 in the order of the names, (B,) int32 outliers. Where there is none to draw: any patch."""
    spec, stream = model.preprocessing, f"block{block}"
    tokens, found = model.module()(normalize(images_u8, spec.mean, spec.std), capture=(stream,))
    outlier_bp = token_norms(found[stream][:, model.config.prefix :]) > limit
    parts = []
    for kind in kinds:
        if kind in DRAWN:
            key = jax.random.fold_in(jax.random.key(seed), DRAWN.index(kind))
            place_bt = draw_patches(key, index_b, outlier_bp if kind == "outlier" else ~outlier_bp, draws)
            parts.append(jnp.take_along_axis(tokens.patches, place_bt[..., None], axis=1))
        else:
            parts.append(tokens.cls[:, None] if kind == "cls" else tokens.registers)
    together = jnp.concatenate(parts, axis=1).astype(jnp.float32)
    counts = jnp.sum(outlier_bp, axis=1, dtype=jnp.int32)
    return sharding.constrain(together, sharding.BATCH), sharding.constrain(counts, sharding.BATCH)


def draw_patches(key: Array, index_b: Array, member_bp: Array, draws: int) -> Array:
    """(B, draws) int32: places of patches drawn uniformly, with replacement, among the members of each image.

    Row b is a function of key, index_b[b] and member_bp[b] alone. An image without members gets place 0.
    """

    def one(draw, index, member):
        own = jax.random.fold_in(jax.random.fold_in(key, draw), index)
        count = jnp.sum(member)
        rank = jnp.minimum((jax.random.uniform(own) * count).astype(jnp.int32), count - 1)
        return jnp.argmax(jnp.cumsum(member) > rank)

    over_draws = jax.vmap(one, in_axes=(0, None, None))
    return jax.vmap(over_draws, in_axes=(None, 0, 0))(jnp.arange(draws), index_b, member_bp).astype(jnp.int32)
