"""Segmentation of images of any size by windows of one size.

Windows of all images fill batches of one static shape, which run on the whole mesh and give logits at each token. What
then becomes of an image is separable: its windows form a grid, and so do the counts of windows that cover a pixel. So
its logits at every pixel are A @ L @ B.T of the logits L (I h, J w, C) of its I x J windows, with A (H, I h) and
B (W, J w) from the resize to the window, the places of windows, 1 / count, and the resize to the size of the mask. Few
rows at a time are computed and reduced to classes, so that (H, W, C) of a large photo never exists.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from regvit_jax import sharding, stopping
from regvit_jax.data.dense_transforms import SegmentationEvalTransform
from regvit_jax.data.loader import eval_batches
from regvit_jax.data.sources import Source
from regvit_jax.evals.dense import dense_features, resize_matrix, token_matrix
from regvit_jax.evals.features import multiple_of, place
from regvit_jax.evals.segmentation_head import token_logits
from regvit_jax.models.model import Model
from regvit_jax.trees import Array, Tree

_CHUNK = 2**24  # pixels x classes that exist at once
_HELD = 8  # batches of windows of rare shapes that may wait for others of theirs
_COLUMNS = 64  # widths are padded to a multiple of it: fewer shapes to compile


@dataclasses.dataclass(frozen=True)
class View:
    """How an image is looked at.

    Attributes:
      blocks: whose outputs are the features, after the final norm.
      short_sides: to which the image is resized; of several, probabilities are averaged.
      flip: also mirrored, as one more.
      window, stride: of the sliding window, pixels; window 0: the whole image at once.
      padding: see `dense.token_matrix`.
    """

    blocks: tuple[int, ...]
    short_sides: tuple[int, ...]
    flip: bool
    window: int
    stride: int
    padding: str


class Segmented(NamedTuple):
    """index: place in the source. image: uint8 (h, w, 3), resized as it was looked at first. truth, predicted: uint8
    (H, W)."""

    index: int
    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray


def segment(
    model: Model,
    head: Tree,
    source: Source,
    view: View,
    *,
    num_classes: int,
    batch_size: int,
    mesh: Mesh,
    workers: int = 0,
) -> Iterator[Segmented]:
    """Classes of every pixel of every image that can be read, at the size of its mask, in no promised order.

    All processes make this call and take all that it gives; each gets images of its own, every image is one process's.

    Args:
      batch_size: windows of one forward pass, over all devices.
    """
    model, runner = place(model, mesh), _Runner(mesh, batch_size)
    head = sharding.replicate(sharding.gather(head), mesh)
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    transform = SegmentationEvalTransform(view.short_sides, num_classes)
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    patch = model.config.patch_size

    def finished(images):
        for image in images:
            yield Segmented(image.index, image.sizes[0], image.truth, _classes(image, view, patch, device))

    # One image for every process at a time: images have different sizes.
    for batch in eval_batches(source, transform, batch_size=jax.process_count(), workers=workers, **processes):
        stopping.poll()
        index = int(batch["index"][0])
        if index >= 0:
            sizes = [batch[f"image{i}"][0] for i in range(len(view.short_sides))]
            windows = runner.add(_Image(index, sizes, batch["mask"][0], view))
        else:
            windows = runner.add(None)
        for shape in windows:
            yield from finished(runner.run(shape, lambda images: _logits(model, head, images, view.blocks)))
    for shape in runner.rest():
        yield from finished(runner.run(shape, lambda images: _logits(model, head, images, view.blocks)))
    yield from finished(runner.flush())


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where the windows over an axis begin. They are `stride` apart; the last one is moved back inside."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [min(i * stride, max(length - window, 0)) for i in range(count)]


@functools.lru_cache(maxsize=32)
def merge_matrix(out: int, length: int, window: int, stride: int, patch: int, padding: str) -> np.ndarray:
    """(out, I h) float32: logits of h tokens of each of I windows over an axis of `length` pixels -> `out` pixels.

    A pixel under several windows gets their mean.
    """
    starts = window_starts(length, window, stride)
    tokens = token_matrix(window, patch, padding)
    placed = np.zeros((length, len(starts), tokens.shape[1]))
    count = np.zeros(length)
    for i, start in enumerate(starts):
        placed[start : start + window, i] = tokens
        count[start : start + window] += 1
    placed = (placed / count[:, None, None]).reshape(length, -1)
    return (placed if out == length else resize_matrix(out, length) @ placed).astype(np.float32)


class _Image:
    """One image on its way: its sizes, and what has come back of their windows."""

    def __init__(self, index, sizes, truth, view):
        self.index, self.sizes, self.truth = index, sizes, truth
        self.looks = [_Look(pixels, view) for pixels in sizes]
        if view.flip:
            self.looks += [_Look(pixels[:, ::-1], view, mirrored=True) for pixels in sizes]

    def windows(self):
        for look in self.looks:
            for at in np.ndindex(look.logits.shape):
                yield look.window, (self, look, at)

    @property
    def whole(self):
        return all(look.missing == 0 for look in self.looks)


class _Look:
    """One size of an image: where its windows lie, and their logits."""

    def __init__(self, pixels, view, mirrored=False):
        self.pixels, self.mirrored = pixels, mirrored
        size = pixels.shape[:2]
        self.window = tuple(min(view.window, length) if view.window else length for length in size)
        self.stride = view.stride or max(size)
        self.starts = [window_starts(n, w, self.stride) for n, w in zip(size, self.window, strict=True)]
        self.logits = np.empty([len(starts) for starts in self.starts], object)
        self.missing = self.logits.size

    def crop(self, at):
        top, left = (starts[i] for starts, i in zip(self.starts, at, strict=True))
        return self.pixels[top : top + self.window[0], left : left + self.window[1]]

    def put(self, at, logits):
        self.logits[at] = logits
        self.missing -= 1

    def grid(self):
        """(I h, J w, C) of the logits of all windows."""
        return np.concatenate([np.concatenate(list(row), axis=1) for row in self.logits])


class _Runner:
    """Fills batches with windows. All processes run the same batches, with windows of their own or without any."""

    def __init__(self, mesh, batch_size):
        self.mesh = mesh
        self.rows = multiple_of(mesh, batch_size) // jax.process_count()
        self.queues = collections.defaultdict(collections.deque)
        self.waiting = collections.defaultdict(lambda: np.zeros(jax.process_count(), int))
        self.pending = None

    def add(self, image):
        """The shapes to run now: those of which some process has a full batch, and the most frequent one when too many
        windows wait."""
        counts = collections.Counter()
        for shape, window in image.windows() if image else ():
            self.queues[shape].append(window)
            counts[shape] += 1
        for process, told in enumerate(_told_by_everyone(counts)):
            for shape, count in told.items():
                self.waiting[shape][process] += count
        for shape in sorted(self.waiting):
            while self.waiting[shape].max() >= self.rows:
                yield shape
        while sum(self.waiting.values()).max() > _HELD * self.rows:
            yield max(sorted(self.waiting), key=lambda shape: self.waiting[shape].max())

    def rest(self):
        for shape in sorted(self.waiting):
            while self.waiting[shape].max() > 0:
                yield shape

    def run(self, shape, logits_of):
        """Images that are whole now: those of the batch before, for the devices are to work while it is fetched."""
        taken = [self.queues[shape].popleft() for _ in range(min(self.rows, len(self.queues[shape])))]
        self.waiting[shape] = np.maximum(self.waiting[shape] - self.rows, 0)
        images = np.zeros((self.rows, *shape, 3), np.uint8)
        for row, (_, look, at) in enumerate(taken):
            images[row] = look.crop(at)
        slots = np.arange(self.rows, dtype=np.int32) + jax.process_index() * self.rows
        batch = sharding.put({"image": images, "slot": slots}, self.mesh)
        with jax.set_mesh(self.mesh):
            computing = taken, batch["slot"], logits_of(batch["image"])
        done = self.flush()
        self.pending = computing
        return done

    def flush(self):
        if self.pending is None:
            return []
        (taken, slots, logits), self.pending = self.pending, None
        slots, logits = sharding.gather((slots, logits))
        mine = np.argsort(slots)[jax.process_index() * self.rows :]
        for (_, look, at), row in zip(taken, mine[: len(taken)], strict=True):
            look.put(at, logits[row])
        images = {id(image): image for image, _, _ in taken}
        return [image for image in images.values() if image.whole]


def _told_by_everyone(counts):
    """[{shape: count}] of all processes, of the windows of one image each."""
    if jax.process_count() == 1:
        return [counts]
    told = [(*shape, count) for shape, count in counts.items()]
    most = int(multihost_utils.process_allgather(np.array(len(told))).max())
    table = np.array(told + [(0, 0, 0)] * (most - len(told)), np.int32).reshape(most, 3)
    return [
        {(int(h), int(w)): int(count) for h, w, count in rows if count}
        for rows in multihost_utils.process_allgather(table)
    ]


@functools.partial(jax.jit, static_argnums=3)
def _logits(model: Model, head: Tree, images_u8: Array, blocks: tuple[int, ...]) -> Array:
    """(B, h, w, C) at the tokens of windows."""
    features = sharding.constrain(dense_features(model, images_u8, blocks=blocks, norm=True, cls=False), sharding.BATCH)
    return sharding.constrain(token_logits(head, features), sharding.BATCH)


def _classes(image, view, patch, device):
    """uint8 (H, W) of an image whose windows are all there."""
    height, width = image.truth.shape
    looks = []
    for look in image.looks:
        (rows_in, columns_in), (window_h, window_w) = look.pixels.shape[:2], look.window
        rows = merge_matrix(height, rows_in, window_h, look.stride, patch, view.padding)
        columns = merge_matrix(width, columns_in, window_w, look.stride, patch, view.padding)
        columns = np.pad(columns[::-1] if look.mirrored else columns, ((0, -width % _COLUMNS), (0, 0)))
        looks.append((rows, jax.device_put(look.grid(), device), jax.device_put(columns, device)))
    num_classes = looks[0][1].shape[-1]
    step = 2 ** max(0, int(np.log2(_CHUNK / (num_classes * (width + _COLUMNS)))))
    step = min(step, 1 << (height - 1).bit_length())
    parts = []
    for start in range(0, height, step):
        chunk = tuple(
            (np.pad(rows[start : start + step], ((0, max(0, start + step - height)), (0, 0))), logits, columns)
            for rows, logits, columns in looks
        )
        parts.append(_best(chunk))
    return np.concatenate(jax.device_get(parts))[:height, :width]


@jax.jit
def _best(looks: tuple[tuple[Array, Array, Array], ...]) -> Array:
    """uint8 (R, W): the class with the largest logit, or of several looks the largest mean probability."""
    scores = []
    for rows, logits, columns in looks:
        merged = _dot("ri,ijc->rjc", rows, logits)
        merged = _dot("rjc,xj->rxc", merged, columns)
        scores.append(merged if len(looks) == 1 else jax.nn.softmax(merged))
    return jnp.argmax(sum(scores), axis=-1).astype(jnp.uint8)


def _dot(subscripts, *operands):
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)
