"""Where a long fit is kept between two starts, so that the same command goes on where the last one ended."""

import dataclasses
import hashlib
import logging
import os
import pathlib
import zipfile
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils

from regvit_jax import sharding
from regvit_jax.data.sources import Source
from regvit_jax.evals import Evaluator
from regvit_jax.evals.feature_cache import keys_of
from regvit_jax.models.model import Model
from regvit_jax.trees import Tree

UNFINISHED = "unfinished.npz"
# Options of every evaluator that change where and how fast heads are trained, not what comes out.
NO_MATTER = ("data", "eval_data", "batch_size", "workers", "cache_dir", "max_bad", "save_every")

_log = logging.getLogger(__name__)


def key_of(
    evaluator: Evaluator, model: Model, source: Source, *more: object, no_matter: Iterable[str] = NO_MATTER
) -> str:
    """The key of a fit: a hash of options, weights, preparation of images and samples. All processes must call it.

    Args:
      source: what the fit learns from.
      more: what it depends on besides, told by its repr.
      no_matter: options that the fit does not depend on.
    """
    options = {name: value for name, value in dataclasses.asdict(evaluator).items() if name not in no_matter}
    described = [type(evaluator).__name__, sorted(options.items()), keys_of(model, source, ("fit",), True), *more]
    return hashlib.blake2b(repr(described).encode(), digest_size=20).hexdigest()


@dataclasses.dataclass(frozen=True)
class Saved:
    """One file, written whole or not at all by process 0, with the state of a fit after a number of steps.

    Attributes:
      path: the file.
      key: hash of all that the state depends on, such as options, data and weights. A file with another key is left
        alone until the next save replaces it.
      every: steps between two saves; 0: only when the run is asked to stop, and at the end.
    """

    path: pathlib.Path
    key: str
    every: int = 0

    def due(self, step: int) -> bool:
        """Whether `step` finished steps are to be saved."""
        return self.every > 0 and step % self.every == 0

    def save(self, step: int, state: Tree) -> None:
        """Writes the state after `step` steps. All processes must call it."""
        leaves = sharding.gather(jax.tree.leaves(state))
        if jax.process_index():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with unfinished.open("wb") as file:
                arrays = {f"leaf{number}": leaf for number, leaf in enumerate(leaves)}
                np.savez(file, key=np.array(self.key), step=np.array(step, np.int64), **arrays)
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, like: Tree) -> tuple[int, Tree] | None:
        """(finished steps, state as NumPy arrays), the same on every process; None if there is none to go on with.

        Args:
          like: a state of the same structure, shapes and dtypes.
        """
        leaves, structure = jax.tree.flatten(like)
        found = self._read(leaves) if jax.process_index() == 0 else None
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.array(found[0] if found else -1)))
            if step < 0:
                return None
            # The disk need not be one that all see.
            read = found[1] if found else [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
            found = step, multihost_utils.broadcast_one_to_all(read)
        return None if found is None else (found[0], jax.tree.unflatten(structure, found[1]))

    def remove(self) -> None:
        """Deletes the file: what it was kept for is done."""
        if jax.process_index() == 0:
            self.path.unlink(missing_ok=True)

    def _read(self, leaves):
        if not self.path.is_file():
            return None
        try:
            # The archive carries checksums: reading it finds a damaged one.
            with np.load(self.path, allow_pickle=False) as archive:
                if str(archive["key"]) != self.key:
                    _log.info("%s is of other options, data or weights: the fit starts anew", self.path)
                    return None
                read = [archive[f"leaf{number}"] for number in range(len(leaves))]
                step = int(archive["step"])
            if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(read, leaves, strict=True)):
                raise ValueError("arrays of other shapes")
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            _log.warning("%s cannot be used (%s): the fit starts anew", self.path, error)
            return None
        return step, read
