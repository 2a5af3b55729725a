"""Single tokens: what one token of an image knows of its class. Table 1 of the paper (and tables 4 and 6).

Logistic regression (`logreg`, the same protocol) on the class token, on one normal patch, on one outlier and on each
register alone. Which patch of an image stands for it is drawn at random, anew for every draw: the mean over draws is
told, and the standard deviation. Images without an outlier take no part in its probe: coverage says how many do.
"""

import dataclasses
import json
import logging
import pathlib

import jax
import numpy as np

from regvit_jax import stopping
from regvit_jax.data.sources import Source
from regvit_jax.evals import option
from regvit_jax.evals.by_norm import ByNorm
from regvit_jax.evals.features import source_of
from regvit_jax.evals.logreg import C_GRID, CHOICES, logistic_regression
from regvit_jax.evals.token_features import DRAWN, KINDS, TokenFeatures, extract_tokens, names_of

FILE = "tokens.json"
METRICS = ("top1", "mean_per_class", "map11")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleToken(ByNorm):
    """Accuracy of logistic regression on one token an image. See the top of the file.

    Metrics: "cls", "register0", …; "normal" and "outlier", means over the draws, and with "_std" their standard
    deviation (of a sample: one less than the draws in the denominator); "coverage_train" and "coverage_test" (share of
    images with an outlier), "images_train", "images_test", "cutoff". What has too few images, or is not in the model,
    is left out. Writes tokens.json: every probe with its C and its numbers of images.
    """

    TRUTH = "label"

    tokens: tuple[str, ...] = option(KINDS, "which to probe: cls | normal | outlier | registers")
    draws: int = option(5, "how often a normal patch and an outlier are drawn from every image")
    seed: int = option(0, "of the draws")
    metric: str = option("top1", "top1 | mean_per_class | map11 (VOC2007: several classes an image, by its boxes)")
    C: tuple[float, ...] = option(C_GRID, "weights of the data against the penalty, to choose from")
    choose_on: str = option("held_out", "where C is chosen: held_out (a tenth of `data`) | eval (on the numbers told)")
    val_data: str = option("", "source on which C is chosen, and which the last fit learns from too; empty: none")
    crop_ratio: float = option(1.0, "of the preparation of images, see Preprocess; 0: as the model's own says")
    max_iter: int = option(1000, "most L-BFGS steps of one fit")

    def __post_init__(self):
        super().__post_init__()
        self.check("tokens", bool(self.tokens) and set(self.tokens) <= set(KINDS), f"one or more of {', '.join(KINDS)}")
        self.check("draws", self.draws >= 1, "at least 1")
        self.check("metric", self.metric in METRICS, f"one of {', '.join(METRICS)}")
        if self.metric == "map11":
            object.__setattr__(self, "TRUTH", "boxes")
        self.check("C", bool(self.C) and min(self.C, default=0.0) > 0, "one or more positive numbers")
        self.check("choose_on", self.choose_on in CHOICES, f"one of {', '.join(CHOICES)}")
        self.check("val_data", not self.val_data or self.choose_on == "held_out", "empty with choose_on='eval'")
        self.check("crop_ratio", 0 <= self.crop_ratio <= 1, "in (0, 1], or 0")
        self.check("max_iter", self.max_iter >= 1, "at least 1")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        self.check_block(model)
        if self.crop_ratio:
            spec = dataclasses.replace(model.preprocessing, crop_ratio=self.crop_ratio)
            model = dataclasses.replace(model, preprocessing=spec)
        specs = {"train": self.data, "test": self.eval_data} | ({"val": self.val_data} if self.val_data else {})
        classes = self._classes(specs)
        limit = self.limit(model, mesh)
        parts = {part: self._part(model, spec, limit, mesh) for part, spec in specs.items()}
        arrays, probes, metrics = parts["train"][0].arrays, [], {}
        for kind in self._enough(parts):
            for name in names_of(kind, draws=self.draws, registers=model.config.registers):
                if name in arrays:
                    stopping.poll()
                    probes.append(self._probe(kind, name, parts, len(classes), mesh))
        for kind in KINDS:
            values = {probe["token"]: probe[self.metric] for probe in probes if probe["kind"] == kind}
            if kind not in DRAWN:
                metrics |= values
            elif values:
                metrics[kind] = float(np.mean(list(values.values())))
                if len(values) > 1:
                    metrics[f"{kind}_std"] = float(np.std(list(values.values()), ddof=1))
        for part in ("train", "test"):
            found, truth = parts[part]
            counts = found.readable & known(truth)
            metrics[f"coverage_{part}"] = float(found.rows("outlier")[counts].mean())
            metrics[f"images_{part}"] = float(counts.sum())
        if jax.process_index() == 0:
            path = pathlib.Path(out_dir) / FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(probes, indent=1) + "\n", encoding="utf-8")
            _log.info("wrote %s", path)
        return metrics | {"cutoff": limit}

    def _classes(self, specs) -> tuple[str, ...]:
        """The classes, the same ones in all sources."""
        several = self.metric == "map11"
        found = {spec: source_of(spec).box_names if several else source_of(spec).class_names for spec in specs.values()}
        classes = found[self.data]
        if not classes:
            what = "classes of boxes, which metric='map11'" if several else "labels, which this evaluator"
            raise ValueError(f"{self.data!r} has no {what} needs: name another source, or another metric")
        for spec, names in found.items():
            if names != classes:
                raise ValueError(
                    f"{self.data!r} has {len(classes)} classes and {spec!r} {len(names)}, which are not the same: a "
                    f"label would mean another thing in each; name splits of one source"
                )
        return classes

    def _part(self, model, spec, limit, mesh) -> tuple[TokenFeatures, np.ndarray]:
        """The tokens of a source, and (N,) labels or (N, C) rows of 1, 0 and -1."""
        found = extract_tokens(
            model,
            spec,
            limit=limit,
            block=self.block,
            draws=self.draws,
            seed=self.seed,
            kinds=self.tokens,
            batch_size=self.batch_size,
            mesh=mesh,
            cache_dir=self.cache_dir,
            workers=self.workers,
            max_bad=self.max_bad,
        )
        if self.metric == "map11":
            return found, presence(source_of(spec), found.readable)
        if not (found.labels >= 0).any():
            raise ValueError(f"{spec!r} has no labelled sample: put the images into one folder a class")
        return found, found.labels

    def _enough(self, parts) -> list[str]:
        """The kinds of tokens that a probe can learn from and be measured on."""
        enough = []
        for kind in KINDS:
            if kind in self.tokens:
                train, test = (
                    int((found.rows(kind) & known(truth)).sum()) for found, truth in (parts["train"], parts["test"])
                )
                if train >= 2 and test >= 1:
                    enough.append(kind)
                else:
                    _log.warning("no probe of %s: %d training and %d test images have one", kind, train, test)
        return enough

    def _probe(self, kind, name, parts, num_classes, mesh) -> dict:
        """The record of one probe."""
        picked = {}
        for part, (found, truth) in parts.items():
            rows = found.rows(kind) & known(truth)
            array = found.arrays[name]
            # A copy only where rows are missing: the array may be larger than the memory.
            picked[part] = (array, truth) if rows.all() else (array[rows], truth[rows])
        (x, y), test = picked["train"], picked["test"]
        validation = picked["val"] if "val" in picked and len(picked["val"][0]) else None
        values = logistic_regression(
            x,
            y,
            *test,
            num_classes=num_classes,
            C=self.C,
            metric=self.metric,
            validation=validation,
            choose_on=self.choose_on,
            max_iter=self.max_iter,
            mesh=mesh,
        )
        _log.info("%s: %s %.4f with C=%.3g, %d images", name, self.metric, values[self.metric], values["C"], len(x))
        return {"kind": kind, "token": name, "train": len(x), "test": len(test[0])} | values


def presence(source: Source, readable_n: np.ndarray) -> np.ndarray:
    """(N, C) int8: which classes an image shows, by its boxes: 1 shown, 0 not, -1 shown by difficult objects only,
    which count for nothing. Rows of images that are not readable are -1.

    Raises:
      ValueError: for a sample whose boxes have no classes.
    """
    out = np.full((len(source), len(source.box_names)), -1, np.int8)
    for index in np.flatnonzero(readable_n).tolist():
        sample = source[index]
        if "box_labels" not in sample:
            raise ValueError(f"the boxes of {source.name(index)} have no classes, which metric='map11' needs")
        labels = sample["box_labels"]
        hard = np.asarray(sample.get("difficult", np.zeros(len(labels), bool)))
        out[index] = 0
        out[index, labels[hard]] = -1
        out[index, labels[~hard]] = 1
    return out


def known(truth: np.ndarray) -> np.ndarray:
    """(N,) bool: the rows that have a label, or a class that counts."""
    return truth >= 0 if truth.ndim == 1 else (truth >= 0).any(axis=1)


EVALUATOR = SingleToken
