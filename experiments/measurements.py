"""One number of a table: an evaluator on a data set, run through regvit_jax.evaluate unless it was before, and the
column it belongs into.

OUT/NAME/eval/MEASUREMENT/ holds results.json and whatever else the evaluator wrote of the network NAME, and key.txt: a
hash of options, weights, preparation and data. Where it is the same, nothing is measured again.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Callable

from data_sets import Dataset
from results_table import Cell, Column, Table

from regvit_jax import evaluate
from regvit_jax.config import evaluator as defaults
from regvit_jax.data.sources import Source, open_source
from regvit_jax.evals import EVALUATORS, Evaluator
from regvit_jax.evals.feature_cache import keys_of, shared
from regvit_jax.models.model import Model

KEY, RESULTS = "key.txt", "results.json"
# Options that change where and how fast something is computed, and what is drawn, but no number.
NO_MATTER = ("batch_size", "workers", "cache_dir", "save_every", "pictures")

_SOURCES = ("data", "val_data", "eval_data")
_OF_A_RUN = ("type", "every", "at_start")
# What a result is measured against; of depth no classes can be counted.
_TRUTH = {
    "depth": "depth",
    "discovery": "boxes",
    "linear_grid": "label",
    "local": "label",
    "segmentation": "mask",
    "tokens": "label",
}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured, and where its metrics stand in the table.

    Attributes:
      name: its folder.
      kind: the evaluator's type.
      dataset: what it is measured on.
      columns: {metric, or a regular expression of several: column}.
      options: of the evaluator; the others keep their defaults.
      preparation: fields of Preprocess that the protocol prescribes, such as {"size": 224}; the others are the model's.
      apart: the images of the published number are not known, so that ours never stands in its column.
      rows: whether every metric is a row of its own, "NAME, metric", instead of one row for the network.
      label: of the row, behind the name of the network.
      adapt: (name of the network, Model) -> more options.
      note: (folder of the results, evaluator's options) -> footnote.
    """

    name: str
    kind: str
    dataset: Dataset
    columns: dict[str, Column]
    options: dict = dataclasses.field(default_factory=dict)
    preparation: dict = dataclasses.field(default_factory=dict)
    apart: bool = False
    rows: bool = False
    label: str = ""
    adapt: Callable[[str, Model], dict] | None = None
    note: Callable[[pathlib.Path, dict], str] | None = None


@functools.lru_cache(maxsize=64)
def opened(spec: str) -> Source:
    """The source of a string, opened once."""
    return open_source(spec)


def measure(measurement: Measurement, name: str, model: Model, out: pathlib.Path, *, settings, image_size, mesh):
    """The folder of the results, new or found there, and what differs from the protocol.

    Args:
      name: of the network, and of its folder below `out`.
      settings: KEY=VALUE and TYPE.KEY=VALUE texts that change options.
      image_size: replaces the size that a protocol prescribes; None: does not.
    """
    prescribed = dict(measurement.preparation)
    changes = []
    if image_size and "size" in prescribed:
        changes = [f"image_size={image_size}"] if prescribed["size"] != image_size else []
        prescribed["size"] = image_size
    model = dataclasses.replace(model, preprocessing=dataclasses.replace(model.preprocessing, **prescribed))
    dataset = measurement.dataset
    named = {"data": dataset.train, "val_data": dataset.val, "eval_data": dataset.test}
    options = {key: spec for key, spec in named.items() if spec}
    options |= measurement.options | (measurement.adapt(name, model) if measurement.adapt else {})
    changed = _settings(measurement.kind, settings)
    changes += [f"{key}={value}" for key, value in changed.items() if key not in NO_MATTER]
    options |= changed | {"type": measurement.kind}
    built = evaluate.build({measurement.name: options}, data_train="", data_eval="")
    key = _key(measurement.kind, built[measurement.name].evaluator, model)
    folder = out / name / "eval" / measurement.name
    if (folder / RESULTS).is_file() and (folder / KEY).is_file() and (folder / KEY).read_text() == key:
        _log.info("%s, %s: measured before", name, measurement.name)
        return folder, changes
    (folder / KEY).unlink(missing_ok=True)
    _log.info("%s, %s: %s", name, measurement.name, dataset.title)
    evaluate.run(built, model, mesh=mesh, workdir=out / name)
    (folder / KEY).write_text(key)
    return folder, changes


def fill(table: Table, measurement: Measurement, name: str, folder: pathlib.Path, changes: list[str]) -> None:
    """Puts the numbers of results.json into the table: into the column of the published data set where it is that one,
    else into one of its own."""
    record = json.loads((folder / RESULTS).read_text())
    notes = [measurement.note(folder, record["options"])] if measurement.note else []
    notes += [f"not the protocol of this table: {', '.join(changes)}"] if changes else []
    label = " ".join(filter(None, (name, measurement.label)))
    for metric, value in record["metrics"].items():
        column = next((c for pattern, c in measurement.columns.items() if re.fullmatch(pattern, metric)), None)
        if column is None:
            continue
        std = record["metrics"].get(f"{metric}_std")
        cell = Cell(
            column.scale * float(value),
            None if std is None else column.scale * float(std),
            "; ".join(notes),
            str(folder / RESULTS),
        )
        row = f"{label}, {metric}" if measurement.rows else label
        table.put(row, _column(column, measurement, record), cell)


def _settings(kind: str, texts: list[str]) -> dict:
    """{key: value} of KEY=VALUE and TYPE.KEY=VALUE texts, typed as the evaluator's defaults; those of others left out.

    Sources are none of them: only --data and the like name these, so that a column knows what stands in it.
    """
    known = {key: value for key, value in defaults(kind).items() if key not in (*_SOURCES, *_OF_A_RUN)}
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        owner, dot, rest = name.rpartition(".")
        if dot and owner in EVALUATORS and owner != kind:
            continue
        if not equals or rest not in known or (dot and owner != kind):
            raise ValueError(f"--set {text}: write KEY=VALUE or {kind}.KEY=VALUE with KEY one of {', '.join(known)}")
        default = known[rest]
        if isinstance(default, tuple):
            found[rest] = tuple(type(default[0])(part) for part in value.split(","))
        else:
            found[rest] = value.lower() in ("1", "true", "yes") if isinstance(default, bool) else type(default)(value)
    return found


def counts(dataset: Dataset) -> tuple[int, int]:
    """Images of (train and val, test)."""
    train, val, test = (len(opened(spec)) if spec else 0 for spec in (dataset.train, dataset.val, dataset.test))
    return train + val, test


def is_published(dataset: Dataset, truth: str) -> bool:
    """Whether what lies there is the published data set; `truth`: what of its samples is measured against."""
    source = opened(dataset.test)
    classes = {"label": source.class_names, "mask": source.mask_names, "boxes": source.box_names}
    return dataset.is_published(counts(dataset), len(classes[truth]) if truth in classes else None)


def _column(column, measurement, record):
    dataset = measurement.dataset
    truth = "boxes" if record["options"].get("metric") == "map11" else _TRUTH[record["type"]]
    published = is_published(dataset, truth)
    if published and not measurement.apart:
        return column
    train, test = counts(dataset)
    images = f"{train} / {test} images" if train else f"{test} images"
    what = dataset.title if published or dataset.counts is None else f"{dataset.test}, which is not {dataset.title}"
    return dataclasses.replace(column, key=f"{column.key} of {dataset.test}", title=f"{what}, {images}")


def _key(kind: str, evaluator: Evaluator, model: Model) -> str:
    """Of all that the numbers depend on."""
    options = {key: value for key, value in dataclasses.asdict(evaluator).items() if key not in NO_MATTER}
    parts = [kind, sorted(options.items())]
    with shared():  # the weights are hashed once for all sources
        for part in _SOURCES:
            if spec := options.get(part):
                parts.append(keys_of(model, opened(spec), (part,), True)[part])
    return hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()
