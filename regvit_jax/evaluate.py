"""Evaluation: builds evaluators from a config and runs them: the same for the training loop and for `regvit eval`.

evaluators = build({"knn": {"type": "knn", "every": -1}}, data_train="npz:cifar10.npz", data_eval="")
run(evaluators, model, mesh=mesh, workdir="out")        # {"knn/top1": 0.71, …}, and out/eval/knn/results.json
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from regvit_jax import provenance, stopping
from regvit_jax.data.sources import eval_split, holdout
from regvit_jax.evals import EVALUATORS, Evaluator, get, suggest
from regvit_jax.evals.feature_cache import counted, hash_of
from regvit_jax.evals.features import place, shared, source_of
from regvit_jax.models.model import Model

AT_END, AS_THE_RUN = 0, -1

_SCHEDULE = {"every": AS_THE_RUN, "at_start": False}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """An evaluator and when a run calls it.

    Attributes:
      every: steps between two calls; 0: only after the last step; -1: the run's eval_every.
      at_start: also before the first step.
    """

    evaluator: Evaluator
    every: int = AS_THE_RUN
    at_start: bool = False

    def due(self, step: int, *, total_steps: int, eval_every: int) -> bool:
        """Whether it runs when `step` updates are finished. An eval_every of 0 turns off those that follow it."""
        every = eval_every if self.every == AS_THE_RUN else self.every
        if self.every == AS_THE_RUN and eval_every == 0:
            return False
        if step == 0:
            return self.at_start
        return step == total_steps or (every > 0 and step % every == 0)


def data_pair(data_train: str, data_eval: str = "") -> tuple[str, str]:
    """(train, eval) sources of a run. Without `data_eval`: the evaluation split of `data_train`, or a tenth of it.

    Where a tenth is held out, the first string changes too: train on it, not on `data_train`.
    """
    if data_eval or not data_train:
        return data_train, data_eval
    split = eval_split(data_train)
    return holdout(data_train) if split is None else (data_train, split)


def build(
    evals_config: Mapping[str, Mapping[str, Any]], *, data_train: str, data_eval: str, leave_out: bool = False
) -> dict[str, Scheduled]:
    """The evaluators of a config, in its order.

    Args:
      evals_config: {name: {"type", "every", "at_start", and fields of that evaluator}}; what is absent has its default.
      data_train, data_eval: the sources of the run, for evaluators that name none; see `data_pair`.
      leave_out: an evaluator that the run's own data cannot serve, having no labels say, is left out with a warning;
        one that names its data itself stays and says what that lacks.

    Raises:
      ValueError: for an unknown type or field (with the nearest known one), a bad value, or a missing source.
    """
    built = {name: _one(name, dict(options.items()), data_train, data_eval) for name, options in evals_config.items()}
    if not leave_out:
        return built
    own = data_pair(data_train, data_eval)
    return {name: scheduled for name, scheduled in built.items() if _served(name, scheduled.evaluator, own)}


def run(
    evaluators: Mapping[str, Scheduled],
    model: Model,
    *,
    mesh: Mesh,
    workdir: str | os.PathLike,
    step: int | None = None,
) -> dict[str, float]:
    """Runs all of `evaluators`, whatever their schedule, and writes workdir/eval/<name>/results.json.

    Features are computed once for all of them. Every process of the run makes this call; process 0 writes.

    Args:
      step: number of finished updates, recorded with the results; None where there is no run.

    Returns:
      {"<name>/<metric>": Python float}, the same on every process.
    """
    results = {}
    model = place(model, mesh)
    with shared():
        for name, scheduled in evaluators.items():
            stopping.poll()
            evaluator = scheduled.evaluator
            folder = pathlib.Path(workdir).expanduser().absolute() / "eval" / name
            start = time.monotonic()
            counted().clear()
            with _named(name):
                metrics = {
                    metric: float(value) for metric, value in evaluator.run(model, mesh=mesh, out_dir=folder).items()
                }
                seconds, weights = time.monotonic() - start, hash_of(model)
                if jax.process_index() == 0:
                    record = _record(name, evaluator, model, metrics, step) | {"seconds": round(seconds, 3)}
                    record["model"]["weights"] = weights
                    _write(folder / "results.json", record)
                    at = "" if step is None else f" at step {step}"
                    numbers = "  ".join(f"{metric} {number(value)}" for metric, value in metrics.items())
                    _log.info("eval %s%s: %s  (%.1f s)", name, at, numbers, seconds)
            results |= {f"{name}/{metric}": value for metric, value in metrics.items()}
    return results


def history(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """What a run measured first and last, from its metrics.jsonl: columns for `table`, none where nothing was
    evaluated.

    Labels are "step N", and "untrained" for step 0. A line of an evaluation is one whose every metric is named
    "<name>/<metric>"; lines of one step are joined.
    """
    steps: dict[int, dict[str, float]] = {}
    with pathlib.Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            step = record.pop("step")
            if record and all("/" in metric for metric in record):
                steps.setdefault(step, {}).update({metric: float(value) for metric, value in record.items()})
    ends = dict.fromkeys((min(steps), max(steps))) if steps else ()
    return {f"step {step}" if step else "untrained": steps[step] for step in ends}


def table(runs: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as aligned plain text: one line a metric, one column a run; "-" where a run has none.

    Args:
      runs: {label: {metric: value}}; metrics stand in the order of their first appearance.
    """
    metrics = dict.fromkeys(metric for values in runs.values() for metric in values)
    cells = [["", *runs]]
    cells += [[m, *(number(values[m]) if m in values else "-" for values in runs.values())] for m in metrics]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [
        "  ".join([label.ljust(first), *(value.rjust(width) for value, width in zip(values, others, strict=True))])
        for label, *values in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def number(value: float) -> str:
    """A metric for a person: four decimals, or three digits where these would say nothing."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e4
    return f"{value:.4f}" if plain else f"{value:.3g}"


def _one(name, options, data_train, data_eval):
    where = f"config.evals.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
        raise ValueError(f"{where}: the name of an evaluator becomes a folder: use letters, digits, '_', '-' and '.'")
    if "type" not in options:
        raise ValueError(f"{where} has no type: one of {', '.join(EVALUATORS)}")
    try:
        kind = get(options.pop("type"))
        schedule = {key: options.pop(key, default) for key, default in _SCHEDULE.items()}
        _check_schedule(schedule)
        known = {field.name for field in dataclasses.fields(kind)}
        for key in options:
            if key not in known:
                raise ValueError(f"{kind.__name__} has no option {key!r}; {suggest(key, known | {'type', *_SCHEDULE})}")
        evaluator = kind(**options)
        return Scheduled(_with_data(evaluator, data_train, data_eval), **schedule)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_schedule(schedule):
    every, at_start = schedule["every"], schedule["at_start"]
    if type(every) is not int or every < AS_THE_RUN:
        raise ValueError(f"every is a number of steps, 0 (only at the end) or -1 (as eval_every), got {every!r}")
    if type(at_start) is not bool:
        raise ValueError(f"at_start is True or False, got {at_start!r}")


def _with_data(evaluator, data_train, data_eval):
    """The evaluator with the sources it names, or what belongs to them, or those of the run."""
    data, eval_data = data_pair(evaluator.data, evaluator.eval_data)
    if not (data and eval_data):
        of_run = data_pair(data_train, data_eval)
        data, eval_data = data or of_run[0], eval_data or of_run[1]
    sources = {"data": data, "eval_data": eval_data}
    for need in evaluator.NEEDS:
        if not sources[need]:
            key = {"data": "data.train", "eval_data": "data.eval"}[need]
            raise ValueError(f"{type(evaluator).__name__} has no source: set {need} here, or {key} of the run")
    return dataclasses.replace(evaluator, **{need: sources[need] for need in evaluator.NEEDS})


def _served(name, evaluator, own):
    """Whether the sources of the run, where the evaluator uses them, have what it is measured against."""
    for source in (getattr(evaluator, need) for need in evaluator.NEEDS):
        if source in own and not _has(source_of(source), evaluator.TRUTH):
            kind, truth = type(evaluator).__name__, evaluator.TRUTH
            _log.warning("eval %s: left out, because %s needs a %s, and %s has none", name, kind, truth, source)
            return False
    return True


def _has(source, truth):
    """Whether samples of a source have what an evaluator is measured against."""
    match truth:
        case "label":
            return source.num_classes > 0
        case "mask":
            return bool(source.mask_names)
        case "depth":
            return source.depth_range is not None
        case "boxes":
            return bool(source.box_names)
    return True


def _record(name, evaluator, model, metrics, step):
    sources = {need: source_of(getattr(evaluator, need)) for need in evaluator.NEEDS}
    return {
        "name": name,
        "type": next(kind for kind in EVALUATORS if get(kind) is type(evaluator)),
        "step": step,
        "metrics": {metric: value if math.isfinite(value) else str(value) for metric, value in metrics.items()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "options": dataclasses.asdict(evaluator),
        "data": {
            need: {
                "source": getattr(evaluator, need),
                "fingerprint": source.fingerprint,
                "samples": len(source),
                "unreadable": counted().get(getattr(evaluator, need), 0),
            }
            for need, source in sources.items()
        },
        "model": {
            "config": model.config.to_json(),
            "preprocessing": dataclasses.asdict(model.preprocessing),
            "dtype": model.run.dtype,
            "parameters": model.num_params,
        },
        "code": provenance.versions() | {"commit": provenance.commit()},
        "hardware": {
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "processor": provenance.processor(),
        },
    }


def _write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


@contextlib.contextmanager
def _named(name):
    """An error that comes out of an evaluator says which one."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the evaluator {name!r} (config.evals.{name})")
        raise
