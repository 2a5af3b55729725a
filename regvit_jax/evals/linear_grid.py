"""Linear probe by the protocol of DINOv2: a grid of linear classifiers, trained together by SGD on frozen features.

Of 2 depths (class tokens of the last block, or of the last 4), with or without the mean patch token, and 13 learning
rates: 52 heads. The training images are cropped and mirrored anew at each step; the network runs once for all heads.
The number told is that of the best head, which is chosen on the evaluation set itself, as published; `held_out=0.1`
chooses it on training images instead. `linear` is the quick probe: no augmentation, no learning rate.

    LinearGrid(data="imagenet:PATH#train", eval_data="imagenet:PATH#val")                       # as published
    LinearGrid(data=…, steps=2000, train_batch_size=256, cached=True, held_out=0.1)             # minutes, not hours

Writes heads.json, the numbers of all heads, and heads.png. What is done is kept in unfinished.npz every `save_every`
steps; the same command goes on from there.
"""

import dataclasses
import json
import logging
import os
import pathlib

import jax
import numpy as np

from regvit_jax.data.feed import feed, feed_rows
from regvit_jax.data.sources import Subset
from regvit_jax.data.transforms import TrainTransform
from regvit_jax.evals import Evaluator, option
from regvit_jax.evals.features import check_pair, extract, source_of
from regvit_jax.evals.grid_heads import FrozenFeatures, GridLoss, Inputs, KeptFeatures, init_heads, measure, sgd
from regvit_jax.evals.head_training import train_head
from regvit_jax.evals.metrics import tops
from regvit_jax.evals.pictures import save
from regvit_jax.evals.saved import UNFINISHED, Saved, key_of

TABLE, PICTURE = "heads.json", "heads.png"
LR = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)

_SCALE = (0.08, 1.0)  # area of the training crops

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearGrid(Evaluator):
    """Accuracy of the best of a grid of linear classifiers. See the top of the file.

    Metrics: "top1", "top5" (with more than 5 classes), and of the best head "blocks", "avgpool" (0 or 1) and "lr".
    """

    TRUTH = "label"

    blocks: tuple[int, ...] = option((1, 4), "last blocks whose class tokens a head sees side by side")
    avgpool: tuple[int, ...] = option((0, 1), "whether a head sees the mean patch token of the last block too: 0, 1")
    lr: tuple[float, ...] = option(LR, "learning rates for a batch of 256; they are scaled by train_batch_size / 256")
    steps: int = option(12_500, "updates of the heads; the learning rates fall to 0 along a cosine")
    train_batch_size: int = option(1024, "images of one update, over all devices")
    cached: bool = option(False, "features of the training images are computed once, without augmentation: fast")
    held_out: float = option(0.0, "share of `data` that chooses the head; 0: the evaluation set does, as published")
    seed: int = option(0, "of the heads, the order of images and their augmentation")
    save_every: int = option(1250, "steps between two saves of what is done; 0: only when the run is asked to stop")

    def __post_init__(self):
        super().__post_init__()
        self.check("blocks", bool(self.blocks) and min(self.blocks, default=0) >= 1, "one or more numbers from 1 up")
        self.check("avgpool", bool(self.avgpool) and set(self.avgpool) <= {0, 1}, "0, 1 or both")
        self.check("lr", bool(self.lr) and min(self.lr, default=0.0) > 0, "one or more positive numbers")
        for key in ("blocks", "avgpool", "lr"):
            self.check(key, len(set(getattr(self, key))) == len(getattr(self, key)), "different numbers")
        for key in ("steps", "train_batch_size"):
            self.check(key, getattr(self, key) >= 1, "at least 1")
        for key in ("seed", "save_every"):
            self.check(key, getattr(self, key) >= 0, "0 or more")
        self.check("held_out", 0 <= self.held_out < 1, "a share, from 0 to below 1")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        if not model.config.class_token:
            raise ValueError("linear_grid reads class tokens, and this model has none: use linear with mean_patch")
        inputs, source, folder = self._inputs(model), source_of(self.data), pathlib.Path(out_dir)
        used, held_out = _parts(source, self.held_out) if self.held_out else (source, None)
        # First what may be refused at once, then what takes hours.
        test = self._features(model, inputs, mesh, self.eval_data)
        check_pair(self.data, tuple(source.class_names), source.fingerprint, test)
        chosen_by = test
        if held_out is not None:
            chosen_by = self._features(model, inputs, mesh, f"{self.data} (held out)", held_out)
        saved = Saved(folder / UNFINISHED, key_of(self, model, used, inputs), self.save_every)
        heads = self._trained(model, used, inputs, test.num_classes, mesh, saved)
        found = measure(heads, inputs, test, batch_size=self.batch_size, mesh=mesh)
        judged = found["top1"]
        if held_out is not None:
            judged = measure(heads, inputs, chosen_by, batch_size=self.batch_size, mesh=mesh)["top1"]
        best = int(np.argmax(judged))  # The first of equals.
        rows = self._rows(inputs, found, judged)
        if jax.process_index() == 0:
            self._write(folder, rows, best)
        saved.remove()
        row, told = rows[best], [f"top{k}" for k in tops(test.num_classes)]
        _log.info(
            "linear grid: of %d heads, that of blocks %d, avgpool %d, lr %g is the best on %s",
            *(len(rows), row["blocks"], row["avgpool"], row["lr"], chosen_by.source),
        )
        return {key: float(row[key]) for key in (*told, "blocks", "avgpool", "lr")}

    def _inputs(self, model):
        depth = model.config.depth
        if max(self.blocks) > depth:
            _log.warning("linear grid: %d blocks of a network that has %d: all of them", max(self.blocks), depth)
        blocks = dict.fromkeys(min(number, depth) for number in self.blocks)
        return Inputs(tuple((number, pool) for number in blocks for pool in self.avgpool))

    def _features(self, model, inputs, mesh, spec, source=None):
        return extract(
            model,
            spec,
            outputs=inputs.outputs,
            batch_size=self.batch_size,
            mesh=mesh,
            cache_dir=self.cache_dir,
            workers=self.workers,
            max_bad=self.max_bad,
            source=source,
        ).labelled()

    def _trained(self, model, source, inputs, classes, mesh, saved):
        common = dict(seed=self.seed, stop_step=self.steps)
        if self.cached:
            train = self._features(model, inputs, mesh, self.data, source)
            arrays = train.arrays | {"label": train.labels}

            def open_feed(first, rows):
                return feed_rows(arrays, mesh, batch_size=rows, start_step=first, **common)

        else:
            spec, fields = model.preprocessing, ("image", "label")
            transform = TrainTransform(
                spec.size, scale=_SCALE, interpolation=spec.interpolation, fields=fields, flip=0.5
            )

            def open_feed(first, rows):
                return feed(
                    source,
                    transform,
                    mesh,
                    fields=fields,
                    batch_size=rows,
                    start_step=first,
                    workers=self.workers,
                    max_bad=self.max_bad,
                    key="max_bad of this evaluator",
                    **common,
                )

        return train_head(
            None if self.cached else model,
            open_feed,
            features=(KeptFeatures if self.cached else FrozenFeatures)(inputs.outputs),
            init_head=lambda key: init_heads(key, inputs, model.config.width, len(self.lr), classes),
            loss=GridLoss(inputs),
            tx=sgd(tuple(map(self._scaled, self.lr)), self.steps),
            steps=self.steps,
            batch_size=self.train_batch_size,
            seed=self.seed,
            mesh=mesh,
            label="linear grid",
            source_spec="" if self.cached else self.data,
            saved=saved,
        )

    def _scaled(self, lr):
        return lr * self.train_batch_size / 256

    def _rows(self, inputs, found, judged):
        """One dict a head."""
        heads = [(blocks, pool, lr) for blocks, pool in inputs.members for lr in self.lr]
        return [
            {"blocks": blocks, "avgpool": pool, "lr": lr, "scaled_lr": self._scaled(lr)}
            | {key: _number(values[place]) for key, values in found.items()}
            | ({"held_out_top1": _number(judged[place])} if self.held_out else {})
            for place, (blocks, pool, lr) in enumerate(heads)
        ]

    def _write(self, folder, rows, best):
        folder.mkdir(parents=True, exist_ok=True)
        chosen_on = f"{self.held_out:g} of {self.data}" if self.held_out else self.eval_data
        table = {"chosen_on": chosen_on, "best": best, "heads": rows}
        unfinished = folder / f".{TABLE}"
        unfinished.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / TABLE)
        _draw(folder / PICTURE, rows, rows[best], chosen_on)


def _parts(source, share):
    """(what trains, what is held out): a fixed random part."""
    held_out = max(1, round(share * len(source)))
    if held_out >= len(source):
        raise ValueError(f"held_out={share:g} of {len(source)} samples leaves none to train on")
    return Subset(source, held_out, len(source), shuffled=True), Subset(source, 0, held_out, shuffled=True)


def _number(value):
    return float(value) if np.isfinite(value) else str(float(value))


def _seen(blocks, avgpool):
    return (f"cls of {blocks} blocks" if blocks > 1 else "cls") + " + mean patch" * avgpool


def _draw(path, rows, best, chosen_on):
    """Accuracy over learning rate, a line for each group of heads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2))
    axis = figure.subplots()
    for group in dict.fromkeys((row["blocks"], row["avgpool"]) for row in rows):
        line = [row for row in rows if (row["blocks"], row["avgpool"]) == group]
        axis.plot([row["lr"] for row in line], [100 * row["top1"] for row in line], ".-", label=_seen(*group))
    axis.plot(best["lr"], 100 * best["top1"], "o", mfc="none", ms=12, color="black")
    axis.set(xscale="log", xlabel="learning rate, for a batch of 256", ylabel="top-1 [%]")
    axis.set_title(f"{100 * best['top1']:.2f} %: of {len(rows)} the best on {chosen_on}", fontsize=8, parse_math=False)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save(path, figure)


EVALUATOR = LinearGrid
