"""Checkpoints: the train state on disk through Orbax, one item a kind, written in the background, restored on any mesh.

    workdir/checkpoints/<step>/{params, opt, extras}    arrays, at global shape: no mesh is baked in
                              /{data, meta}             JSON: where the data order stands; whatever describes the run

A step directory appears whole or not at all: what a killed run left half written is never listed, and the next start
clears it. With several processes every one of them makes every call here, in the same order; Orbax settles who writes.
"""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from regvit_jax.trees import Tree, named

ARRAYS = ("params", "opt", "extras")
_META_KEYS = ("step", "metrics")


class CheckpointMismatch(ValueError):
    """The checkpoint holds other leaves, shapes or dtypes than the state it is to be restored into."""


@dataclasses.dataclass(frozen=True)
class _Preserve:
    """Orbax's question "which of these stay": the newest `keep` and the best one."""

    keep: int
    best: Callable[[Sequence[int]], int | None]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [info.step for info in checkpoints]
        kept = {*sorted(steps)[-self.keep :], self.best(steps)}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder, the same on every process; a relative one is resolved now: no later chdir moves it.
      keep: how many of the newest checkpoints stay.
      keep_best: name of a metric given to `save`; the checkpoint where it was best stays too, however old. Empty: none.
      best_mode: "max" or "min".
      create: False opens for reading: nothing is created, cleared or deleted, so a run that is still going can be read.

    Raises:
      ValueError: for keep < 1 or an unknown best_mode.
    """

    def __init__(self, workdir, *, keep: int = 3, keep_best: str = "", best_mode: str = "max", create: bool = True):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint must stay; save_every=0 turns saving off")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode={best_mode!r} must be 'max' or 'min'")
        self.directory = _absolute(workdir) / "checkpoints"
        self._writable, self._keep_best, self._best_mode = create, keep_best, best_mode
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={name: ocp.StandardCheckpointHandler() for name in ARRAYS}
            | {name: ocp.JsonCheckpointHandler() for name in ("data", "meta")},
            options=ocp.CheckpointManagerOptions(
                create=create,
                cleanup_tmp_directories=create,
                preservation_policy=_Preserve(keep, self._best_of),
            ),
        )
        self._scores: dict[int, float] = {}
        if keep_best:
            for step in self._manager.all_steps():
                self._note_score(step, self.meta(step)["metrics"])

    def save(
        self,
        step: int,
        state: Tree,
        *,
        data: Mapping[str, Any],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> bool:
        """Starts writing `state`; returns once its arrays are copied to the host, so the next step may donate them.

        A save that is still running is waited for first, and an error of it is raised here.

        Args:
          step: finished updates; must be what state["step"] says.
          state: {"step", "params", "opt", "extras"}; params, opt and extras may be empty.
          data, meta: JSON values (a tuple comes back as a list). `meta` gains "step" and "metrics".
          metrics: what is known of this state; `keep_best` is looked up here. Must be equal on every process.
          wait: return only when the checkpoint is complete on disk.

        Returns:
          False if this step is already saved (nothing is written), True otherwise.

        Raises:
          ValueError: if the state is of another step, a newer checkpoint exists, a leaf has no elements, or meta uses a
            reserved key.
          TypeError: if data or meta is not JSON.
        """
        if not self._writable:
            raise ValueError(f"{self.directory} was opened for reading (create=False)")
        step = int(step)
        if int(state["step"]) != step:
            raise ValueError(f"save(step={step}) was given the state of step {int(state['step'])}")
        known = self._manager.all_steps()
        if step in known:
            if wait:
                self.wait()
            return False
        if known and step < max(known):
            raise ValueError(
                f"step {step} is older than checkpoint {max(known)} in {self.directory}: "
                "use another workdir, or delete the newer checkpoint"
            )
        if reserved := [key for key in _META_KEYS if key in meta]:
            raise ValueError(f"meta may not contain {reserved}: save() sets them")
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        json_items = {
            "data": dict(data),
            "meta": {**meta, "step": step, "metrics": {k: v if math.isfinite(v) else None for k, v in metrics.items()}},
        }
        items = {}
        for name in ARRAYS:
            _refuse_empty_leaves(name, state[name])
            if jax.tree.leaves(state[name]):  # Orbax refuses an item without leaves: left out, it is read back as {}.
                items[name] = ocp.args.StandardSave(state[name])
        for name, value in json_items.items():
            json.dumps(value)  # Here, where the caller sees the TypeError, and not in the writing thread.
            items[name] = ocp.args.JsonSave(value)
        self._note_score(step, metrics)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        if wait:
            self.wait()
        return True

    def steps(self) -> list[int]:
        """Steps that are complete on disk, oldest first. Waits for a save that is running."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self) -> int | None:
        """The step where `keep_best` was best (the newest of equals); None if no checkpoint has that metric."""
        return self._best_of(self.steps())

    def restore(self, abstract_state: Tree, step: int | None = None) -> tuple[Tree, dict, dict]:
        """The state of a step, each leaf placed as `abstract_state` asks, whatever mesh it was saved on.

        Args:
          abstract_state: ShapeDtypeStructs with shardings (state.abstract); any subset of step, params, opt, extras.
          step: default the newest.

        Returns:
          (state, data, meta); bitwise what was saved.

        Raises:
          FileNotFoundError: if there is no such checkpoint.
          CheckpointMismatch: naming the first leaves that differ, before any array is read.
        """
        step = self._resolve(step)
        wanted = {name: abstract_state[name] for name in ARRAYS if name in abstract_state}
        self._check_fits(step, wanted)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items() if jax.tree.leaves(tree)}
        json_items = {name: ocp.args.JsonRestore() for name in ("data", "meta")}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items, **json_items))
        state = {name: restored[name] if name in items else tree for name, tree in wanted.items()}
        if "step" in abstract_state:
            leaf = abstract_state["step"]
            value = np.asarray(step, leaf.dtype)
            state["step"] = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])
        logging.info("restored step %d from %s", step, self.directory)
        return state, restored["data"], restored["meta"]

    def restore_item(self, name: str, step: int | None = None) -> Tree:
        """One item ("params", "opt" or "extras") whole, as NumPy arrays, with the structure it was saved with."""
        if name not in ARRAYS:
            raise ValueError(f"{name!r} is not one of the items {ARRAYS}")
        step = self._resolve(step)
        saved = self._saved(step, name)
        if not jax.tree.leaves(saved):
            return {}
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(target)})
        return self._manager.restore(step, args=args)[name]

    def data(self, step: int | None = None) -> dict:
        """The `data` that was saved with a step (default the newest). No array is read."""
        return self._json("data", step)

    def meta(self, step: int | None = None) -> dict:
        """The `meta` that was saved with a step, with "step" and "metrics". No array is read."""
        return self._json("meta", step)

    def wait(self) -> None:
        """Returns when nothing is being written; raises what the last save failed with."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the writing threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _json(self, name: str, step: int | None) -> dict:
        args = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
        return self._manager.restore(self._resolve(step), args=args)[name]

    def _resolve(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; there are {steps}")
        return step

    def _saved(self, step: int, name: str) -> Tree:
        """Tree of what an item holds, with .shape and .dtype; {} if it was saved empty."""
        items = dict(self._manager.item_metadata(step).items())
        return items[name].tree if name in items else {}

    def _check_fits(self, step: int, wanted: Mapping[str, Tree]) -> None:
        there = _described({name: self._saved(step, name) for name in wanted})
        here = _described(wanted)
        if there == here:
            return
        differing = [path for path in {**here, **there} if here.get(path) != there.get(path)]
        first = "; ".join(f"{p}: {there.get(p, 'absent')} there, {here.get(p, 'absent')} here" for p in differing[:5])
        raise CheckpointMismatch(
            f"checkpoint {step} in {self.directory} does not fit this run. Leaves that differ ({len(differing)}): "
            f"{first}{'; ...' if len(differing) > 5 else ''}. It was saved by another model, optimiser or recipe: use "
            "the config it was saved with, use another workdir, or take over its weights alone with init_from"
        )

    def _note_score(self, step: int, metrics: Mapping[str, float | None]) -> None:
        value = metrics.get(self._keep_best)
        if value is not None and math.isfinite(value):
            self._scores[step] = value if self._best_mode == "max" else -value

    def _best_of(self, steps: Sequence[int]) -> int | None:
        return max((s for s in steps if s in self._scores), key=lambda s: (self._scores[s], s), default=None)


def _absolute(workdir) -> epath.Path:
    text = os.fspath(workdir)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _described(tree: Tree) -> dict[str, str]:
    return {path: f"{tuple(leaf.shape)} {np.dtype(leaf.dtype).name}" for path, leaf in named(tree).items()}


def _refuse_empty_leaves(name: str, tree: Tree) -> None:
    for path, leaf in named(tree).items():
        if 0 in leaf.shape:
            raise ValueError(f"{name}/{path} has no elements {tuple(leaf.shape)} to store: leave it out of the tree")
