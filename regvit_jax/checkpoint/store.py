"""The class of checkpoints; see the top of the folder."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from regvit_jax.checkpoint.faults import (
    CheckpointDamaged,
    CheckpointMismatch,
    CheckpointNotSaved,
    anywhere,
    in_one_line,
    is_damage,
    sealed,
    space,
)
from regvit_jax.ops.checksum import checksum
from regvit_jax.trees import Tree, named

ARRAYS = ("params", "opt", "extras")
_SHARED_WRITING = 2**20  # bytes of an array's part on one device
_META_KEYS = ("step", "metrics", "checksums")

_T = TypeVar("_T")


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
        _write_small_arrays_whole()
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
        self._begun: int | None = None  # the step of the newest save
        if keep_best:
            for step in self._manager.all_steps():
                with contextlib.suppress(CheckpointDamaged):  # told when it is the newest and is to be restored
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
          data, meta: JSON values (a tuple comes back as a list). `meta` gains "step" and "metrics" and, on disk,
            "checksums".
          metrics: what is known of this state; `keep_best` is looked up here. Must be equal on every process.
          wait: return only when the checkpoint is complete on disk.

        Returns:
          False if this step is already saved (nothing is written), True otherwise.

        Raises:
          ValueError: if the state is of another step, a newer checkpoint exists, a leaf has no elements, or meta uses a
            reserved key.
          TypeError: if data or meta is not JSON.
          CheckpointNotSaved: if this save or the one before it failed: the disk is full, or gone.
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
        # Here, where the caller sees the TypeError, and not in the writing thread.
        data, meta = json.loads(json.dumps([dict(data), {**meta, "step": step, "metrics": _json_numbers(metrics)}]))
        items, checksums = {}, {}
        for name in ARRAYS:
            _refuse_empty_leaves(name, state[name])
            if jax.tree.leaves(state[name]):  # Orbax refuses an item without leaves: left out, it is read back as {}.
                items[name] = ocp.args.StandardSave(state[name])
                checksums[name] = checksum(state[name])
        items["data"] = ocp.args.JsonSave(data)
        items["meta"] = ocp.args.JsonSave(sealed(data, meta, checksums))
        self._note_score(step, metrics)
        self.wait()  # What the save before failed with is not this one's fault.
        self._begun = step
        with self._writing():
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
          step: default the newest that is whole, see `newest`.

        Returns:
          (state, data, meta); bitwise what was saved.

        Raises:
          FileNotFoundError: if there is no such checkpoint.
          CheckpointMismatch: naming the first leaves that differ, before any array is read.
          CheckpointDamaged: if this step, or without one every step, is damaged.
        """
        if step is None:
            return self.newest(lambda step: self.restore(abstract_state, step))
        wanted = {name: abstract_state[name] for name in ARRAYS if name in abstract_state}
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items() if jax.tree.leaves(tree)}
        with self._reading(step):
            data, meta, checksums = self._texts(step)
            self._check_fits(step, wanted, checksums)
            restored = self._manager.restore(step, args=ocp.args.Composite(**items)) if items else {}
        state = {name: restored[name] if name in items else tree for name, tree in wanted.items()}
        self._verify(step, {name: state[name] for name in items}, checksums)
        if "step" in abstract_state:
            leaf = abstract_state["step"]
            value = np.asarray(step, leaf.dtype)
            state["step"] = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])
        logging.info("restored step %d from %s", step, self.directory)
        return state, data, meta

    def restore_item(self, name: str, step: int | None = None) -> Tree:
        """One item ("params", "opt" or "extras") whole, as NumPy arrays, with the structure it was saved with."""
        if name not in ARRAYS:
            raise ValueError(f"{name!r} is not one of the items {ARRAYS}")
        if step is None:
            return self.newest(lambda step: self.restore_item(name, step))
        with self._reading(step):
            _, _, checksums = self._texts(step)
            saved = self._saved(step, name, checksums)
            if jax.tree.leaves(saved):
                target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
                args = ocp.args.Composite(**{name: ocp.args.StandardRestore(target)})
                saved = self._manager.restore(step, args=args)[name]
        if jax.tree.leaves(saved):
            self._verify(step, {name: saved}, checksums)
        return saved

    def data(self, step: int | None = None) -> dict:
        """The `data` that was saved with a step (default the newest that is whole). No array is read."""
        if step is None:
            return self.newest(self.data)
        with self._reading(step):
            return self._texts(step)[0]

    def meta(self, step: int | None = None) -> dict:
        """The `meta` that was saved with a step, with "step" and "metrics". No array is read."""
        if step is None:
            return self.newest(self.meta)
        with self._reading(step):
            return self._texts(step)[1]

    def newest(self, read: Callable[[int], _T]) -> _T:
        """What `read(step)` gives for the newest checkpoint that is whole as far as `read` looks.

        Damaged ones are named in a warning. Where this run may write, they are moved aside once a whole one is found.

        Raises:
          FileNotFoundError: if there is no checkpoint.
          CheckpointDamaged: if all are damaged; nothing was moved then.
        """
        damaged: dict[int, CheckpointDamaged] = {}
        for step in reversed(self.steps()):
            try:
                found = read(step)
            except CheckpointDamaged as error:
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                logging.warning("%s: going back to step %d%s", error, step, self._set_aside(bad))
            return found
        if not damaged:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        raise CheckpointDamaged(
            "\n  ".join([f"no checkpoint in {self.directory} can be read:", *map(str, damaged.values())])
            + "\nNothing was changed. Put the folder back from a copy; or, to start again from step 0, use another "
            "workdir, or delete this one's checkpoints"
        ) from next(iter(damaged.values()))

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to a checkpoint that was saved before they were known; `keep_best` then knows them as well.

        Must be called by every process, with equal metrics.
        """
        data, meta, checksums = self._texts(step)
        meta["metrics"] |= _json_numbers(metrics)
        if jax.process_index() == 0:
            file = self.directory / str(step) / "meta" / "metadata"
            fresh = self.directory / str(step) / "meta" / "metadata.new"
            fresh.write_text(json.dumps(sealed(data, meta, checksums)))
            fresh.replace(file)
        self._note_score(step, metrics)

    def check(self) -> None:
        """Raises CheckpointNotSaved if a save that was begun has failed since. Costs nothing; waits for nothing."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when nothing is being written; raises CheckpointNotSaved if the last save failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the writing threads."""
        with self._writing():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            self.close()
        elif not issubclass(kind, KeyboardInterrupt):  # Whoever interrupts does not want to wait for a save.
            with contextlib.suppress(CheckpointNotSaved):  # The error that ends the run came first.
                self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """An error of a save tells what it means for the run."""
        try:
            yield
        except Exception as error:
            whole = [name for name in _names(self.directory) if name.isdigit()]
            newest = max(map(int, whole), default=None)
            raise CheckpointNotSaved(
                f"checkpoint {self._begun} could not be written to {self.directory}: "
                f"{in_one_line(error)}; {space(self.directory)}. Make room (config.keep, config.save_every, old runs); "
                + (
                    "no checkpoint was saved before it: the same command starts again"
                    if newest is None
                    else f"checkpoint {newest} is whole, and the same command goes on from there"
                )
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns what damaged files make of Orbax into CheckpointDamaged, on every process if it happens on one."""
        steps = self.steps()
        if step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; there are {steps}")
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        damaged = failure is not None and is_damage(failure)
        if anywhere(damaged):
            reason = in_one_line(failure) if damaged else "another process cannot read it"
            raise CheckpointDamaged(f"checkpoint {step} in {self.directory} is damaged ({reason})") from failure
        if failure is not None:
            raise failure

    def _texts(self, step: int) -> tuple[dict, dict, dict[str, int] | None]:
        """data, meta and the checksums, None in a checkpoint that was saved without."""
        args = {name: ocp.args.JsonRestore() for name in ("data", "meta")}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        data, meta = restored["data"], dict(restored["meta"])
        checksums = meta.pop("checksums", None)
        if checksums is not None and sealed(data, meta, checksums)["checksums"] != checksums:
            raise CheckpointDamaged("data or meta is not what was saved")
        return data, meta, checksums

    def _verify(self, step: int, items: Mapping[str, Tree], checksums: Mapping[str, int] | None) -> None:
        wrong = [name for name, tree in items.items() if checksums and checksum(tree) != checksums[name]]
        if wrong:
            raise CheckpointDamaged(
                f"checkpoint {step} in {self.directory} is damaged (the bits of {', '.join(wrong)} are not those that "
                "were saved)"
            )

    def _set_aside(self, step: int) -> str:
        """Moves a damaged checkpoint to <step>.corrupt, where Orbax does not see it; says so."""
        if not self._writable:
            return ""
        taken = _names(self.directory)
        name = next(n for n in (f"{step}.corrupt{i or ''}" for i in range(10**6)) if n not in taken)
        # Everyone has looked before one of them moves it, and nobody looks again before it is moved.
        anywhere(False)
        if jax.process_index() == 0:
            shutil.move(os.fspath(self.directory / str(step)), os.fspath(self.directory / name))
        anywhere(False)
        self._scores.pop(step, None)
        self._manager.reload()
        return f"; the damaged one is now {name}, delete it when nobody wants to look at it"

    def _saved(self, step: int, name: str, checksums: Mapping[str, int] | None) -> Tree:
        """Tree of what an item holds, with .shape and .dtype; {} if it was saved empty."""
        items = dict(self._manager.item_metadata(step).items())
        if name in items:
            return items[name].tree
        if checksums and name in checksums:
            raise CheckpointDamaged(f"the folder {name} is missing")
        return {}

    def _check_fits(self, step: int, wanted: Mapping[str, Tree], checksums: Mapping[str, int] | None) -> None:
        there = _described({name: self._saved(step, name, checksums) for name in wanted})
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


@functools.cache
def _write_small_arrays_whole() -> None:
    """Devices that hold equal copies share the writing of an array; below this size that only costs a compilation for
    every shape: 5 of 6 s of the first save of a small model on 8 devices."""
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_WRITING)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def _absolute(workdir) -> epath.Path:
    text = os.fspath(workdir)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _described(tree: Tree) -> dict[str, str]:
    return {path: f"{tuple(leaf.shape)} {np.dtype(leaf.dtype).name}" for path, leaf in named(tree).items()}


def _refuse_empty_leaves(name: str, tree: Tree) -> None:
    for path, leaf in named(tree).items():
        if 0 in leaf.shape:
            raise ValueError(f"{name}/{path} has no elements {tuple(leaf.shape)} to store: leave it out of the tree")


def _json_numbers(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinity: None."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _names(directory: epath.Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.exists() else set()
