"""The run in time: restore, then step, log, evaluate and save until the last step or a signal.

It knows no recipe by name.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from regvit_jax import config as configs
from regvit_jax import evaluate, flops, hub, metrics
from regvit_jax.checkpoint import Checkpoints
from regvit_jax.data.feed import Feed, feed
from regvit_jax.data.sources import Source
from regvit_jax.optim import Optimizer
from regvit_jax.recipes.base import Recipe
from regvit_jax.stopping import Stop, Stopped
from regvit_jax.trees import Array, Tree, map_named
from regvit_jax.workdir import WorkdirError


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled update and what belongs to it; made by `train.build_step`.

    Attributes:
      update: jitted (state, batch) -> (state, metrics); `state` is donated, metrics are replicated float32 scalars.
      abstract: the state as ShapeDtypeStructs with shardings, what a checkpoint is restored into.
      init: () -> the state at step 0, created in its shards.
      recipe, optimizer, mesh: what it was built from.
    """

    update: Callable[[Tree, dict[str, Array]], tuple[Tree, dict[str, Array]]]
    abstract: Tree
    init: Callable[[], Tree]
    recipe: Recipe
    optimizer: Optimizer
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: finished updates, metrics of the last one, evaluations, and whether a signal stopped it
    early."""

    step: int
    metrics: dict[str, float]
    evals: dict[str, float]
    stopped: bool


class Loop:
    """What happens between two updates of one run.

    Args:
      config: with model.num_classes filled in.
      step: from `train.build_step`.
      source, trained_on: the training images and their source string.
      evals: {name: Scheduled}.
      workdir: folder of the run.
      writer: of metrics.
      saved: its checkpoints; None for a run that neither reads nor writes any.
    """

    def __init__(
        self,
        config: ConfigDict,
        step: Step,
        source: Source,
        trained_on: str,
        evals: Mapping[str, evaluate.Scheduled],
        workdir: pathlib.Path,
        writer: metrics.Writer,
        saved: Checkpoints | None,
    ):
        self.config, self.step, self.source, self.trained_on = config, step, source, trained_on
        self.evals, self.workdir, self.writer, self.saved = evals, workdir, writer, saved
        self.delayed, self.alarms = metrics.Delayed(), metrics.Alarms()
        self.last_saved: int | None = None
        self.last: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.scored_at: int | None = None
        self.clock: metrics.Clock | None = None
        self._tracing = False

    def run(self, stop: Stop) -> Result:
        """Trains to the end, or to the step at which `stop` asks for one."""
        total = self.config.total_steps
        train_state, start, hours = self._start()
        done, stopping = start, False
        # What a stop cut short, or a config added since, is measured now; so is the untrained network.
        unfinished = not self._evaluate(self._not_yet_evaluated(start), start, train_state, stop)
        if unfinished or start == total:
            if not unfinished:
                self._summarise()
            return Result(done, self.last, self.scores, stopped=unfinished)
        batches = self.batches = self._batches(start)
        self.clock = self._clock(start, hours)
        try:
            for done in range(start + 1, total + 1):
                with self.clock.waiting():
                    batch = next(batches)
                self._profile(done, start)
                with self.clock.compiling() if done == start + 1 else contextlib.nullcontext():
                    train_state, scalars = self.step.update(train_state, batch)
                self._observe(self.delayed.push(done, scalars))
                stopping = stop.requested(done)
                if self._pauses(done, stopping):
                    # Evaluated and saved is only what was checked, and before its time counts as a pause.
                    self._observe(self.delayed.flush())
                    # Whoever stops a run waits seconds: it is saved, and the next start evaluates.
                    unfinished = (
                        bool(self._due(done))
                        if stopping
                        else not self._evaluate(self._due(done), done, train_state, stop)
                    )
                    stopping = stopping or unfinished
                    self._save(done, train_state, last=stopping or done == total)
                if stopping:
                    logging.info(
                        "stopped at step %d%s", done, "" if done == self.last_saved else ", which is not saved"
                    )
                    break
        finally:
            batches.close()
            self._end_profile()
        stopped = done < total or unfinished
        if not stopped:
            self._summarise()
        return Result(done, self.last, self.scores, stopped=stopped)

    def _start(self) -> tuple[Tree, int, float]:
        """The state to go on from, its step, and the device hours spent on it."""
        if self.saved is None or self.saved.latest() is None:
            train_state = self.step.init()
            self.writer.truncate_after(-1)
            return train_state, 0, 0.0
        train_state, data, meta = self.saved.restore(self.step.abstract)
        changed, _ = configs.differences(meta["config"], self.config)
        if changed:  # config.json was lost, or belongs to another run
            lines = "; ".join(f"{name}: {was!r} there, {now!r} now" for name, (was, now) in changed.items())
            raise WorkdirError(f"{self.workdir} holds checkpoints of another config ({lines}): use another --workdir")
        if data["fingerprint"] != self.source.fingerprint:
            raise WorkdirError(
                f"{self.workdir} was trained on {data['source']} as it was then; its files have changed "
                f"(fingerprint {data['fingerprint'][:8]}, now {self.source.fingerprint[:8]}). Restore them, or start "
                f"another workdir with --config.init_from={self.workdir}"
            )
        self.last_saved = data["step"]
        logging.info("resumed at step %d of %d", data["step"], self.config.total_steps)
        self.writer.truncate_after(data["step"])
        return train_state, data["step"], meta["device_hours"]

    def _batches(self, start: int) -> Feed:
        c, d, recipe = self.config, self.config.data, self.step.recipe
        return feed(
            self.source,
            recipe.transform,
            self.step.mesh,
            fields=tuple(recipe.input_spec),
            seed=c.seed,
            batch_size=c.batch_size,
            start_step=start,
            stop_step=c.total_steps,
            workers=d.workers,
            cache=d.cache,
            max_bad=d.max_bad,
        )

    def _clock(self, start: int, hours: float) -> metrics.Clock:
        c, recipe, device = self.config, self.step.recipe, jax.devices()[0]
        peak = flops.peak_flops(device, recipe.run.dtype)
        if peak is None and device.platform == "cpu":
            # Fake devices share one processor: its peak is theirs together.
            peak = flops.measured_peak(device, recipe.run.dtype) / jax.local_device_count()
        per_image = recipe.train_flops()
        count = sum(leaf.size for leaf in jax.tree.leaves(self.step.abstract["params"]))
        logging.info(
            "model: %s, %.2f M parameters, %d registers, %s, %.2f GFLOP per training image",
            *(c.model.name, count / 1e6, recipe.vit.registers, recipe.run.dtype, per_image / 1e9),
        )
        return metrics.Clock(
            c.batch_size, c.total_steps, start, per_image, peak, jax.device_count(), device_hours=hours
        )

    def _observe(self, measured: tuple[int, dict[str, float]] | None) -> None:
        """Checks, and logs when it is time, the metrics of a step that the device has finished."""
        if self.saved is not None:
            self.saved.check()
        if measured is None:
            return
        step, values = measured
        saved = None if self.last_saved is None else self.workdir / "checkpoints" / str(self.last_saved)
        try:
            metrics.check_finite(step, values, saved, self.delayed.recent, self.step.recipe.WHEN_NOT_FINITE)
        except metrics.NonFiniteError:
            self.writer.write(step, values)
            raise
        total = self.config.total_steps
        first = len(self.delayed.recent) == 1
        if first or step == total or step % self.config.log_every == 0:
            replaced = self.batches.replaced()
            # Only where there are any: a column of zeros in every run says nothing.
            self.last = values | self.clock.tick(step) | ({"replaced": replaced} if replaced else {})
            self.writer.write(step, self.last)
            logging.info(metrics.progress_line(step, total, self.last))
            for warning in self.alarms.hear(self.step.recipe.alarms(step, values)):
                if jax.process_index() == 0:  # all of them have the same metrics
                    logging.warning("step %d: %s", step, warning)

    def _pauses(self, step: int, stopping: bool) -> bool:
        """Whether something is to be done after this step besides going on."""
        c = self.config
        saves = c.save_every and step % c.save_every == 0
        return bool(stopping or step == c.total_steps or saves or self._due(step))

    def _due(self, step: int) -> dict[str, evaluate.Scheduled]:
        c = self.config
        when = {"total_steps": c.total_steps, "eval_every": c.eval_every}
        return {name: scheduled for name, scheduled in self.evals.items() if scheduled.due(step, **when)}

    def _not_yet_evaluated(self, step: int) -> dict[str, evaluate.Scheduled]:
        """Of what is due at the step where this process starts: what metrics.jsonl does not have."""
        due = self._due(step)
        known = self.writer.names_at(step)
        missing = np.array([not any(metric.startswith(f"{name}/") for metric in known) for name in due], bool)
        if due and jax.process_count() > 1:  # the first process alone has the file
            missing = multihost_utils.broadcast_one_to_all(missing)
        return {
            name: scheduled for (name, scheduled), is_missing in zip(due.items(), missing, strict=True) if is_missing
        }

    def _evaluate(self, due: Mapping[str, evaluate.Scheduled], step: int, train_state: Tree, stop: Stop) -> bool:
        """False if a stop cut it short: nothing is recorded then, and the next start does it all."""
        if not due:
            return True
        if step == 0:
            logging.info("evaluating the untrained network")
        try:
            with self.clock.paused() if self.clock else contextlib.nullcontext(), stop.breaking():
                model = self.step.recipe.eval_model(train_state["params"], train_state["extras"])
                scores = evaluate.run(due, model, mesh=self.step.mesh, workdir=self.workdir, step=step)
        except Stopped:
            logging.warning("the evaluation at step %d is left to the next start", step)
            return False
        self.scores, self.scored_at = scores, step
        self.writer.write(step, scores)
        if step and step == self.last_saved and self.config.save_every:
            self.saved.note(step, scores)
        return True

    def _save(self, step: int, train_state: Tree, last: bool) -> None:
        c = self.config
        if not c.save_every or not (last or step % c.save_every == 0):
            return
        data = {"step": step, "seed": c.seed, "source": self.trained_on, "fingerprint": self.source.fingerprint}
        meta = {
            "config": json.loads(configs.to_json(c)),
            "model": self._where_the_model_lies(),
            "device_hours": self.last["device_hours"],
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        scores = self.scores if self.scored_at == step else {}
        with self.clock.paused():
            self.saved.save(step, train_state, data=data, meta=meta, metrics=scores, wait=last)
        self.last_saved = step

    def _where_the_model_lies(self) -> dict:
        """What `rv.load_model` needs to find it in a checkpoint."""
        names = {
            item: map_named(lambda path, _, item=item: f"{item}/{path}", self.step.abstract[item])
            for item in ("params", "extras")
        }
        return hub.locate(self.step.recipe.eval_model(names["params"], names["extras"]))

    def _profile(self, step: int, start: int) -> None:
        p = self.config.profile
        first = max(p.start, start + 2)  # the first step of a process compiles
        if p.steps and step == first:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self._tracing = True
        if step == first + p.steps:
            self._end_profile()

    def _end_profile(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            logging.info("profile: wrote %s", self.workdir / "profile")

    def _summarise(self) -> None:
        """What a reader wants at the end: the numbers before and after, and where everything lies."""
        if jax.process_index() == 0:
            if runs := evaluate.history(self.workdir / "metrics.jsonl"):
                print("\n" + evaluate.table(runs) + "\n", flush=True)
            logging.info("done: %s", self.workdir)
