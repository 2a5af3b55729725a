"""Segmentation probe: a linear head that reads the class of every pixel from frozen patch features, as on ADE20k.

The head (batch normalisation and a linear map) sees patch tokens after the final norm; class token and registers never.
It is trained on random crops with cross-entropy, and measured on whole images by a sliding window, at the size of their
masks.

The defaults are the protocol of DINOv2 and of the registers paper in everything but its size. On ADE20k that is

    Segmentation(data="ade20k:PATH", eval_data="ade20k:PATH#val", crop=512, steps=40_000)

that is, 1500 steps of warm-up, batches of 16 and windows that are 341 pixels apart. With several `scales`, or `flip`,
the probabilities of all looks at an image are averaged. configs/protocols/ has both published protocols.

What is done is kept in unfinished.npz every `save_every` steps; the same command goes on from there.
"""

import dataclasses
import json
import logging
import os
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from regvit_jax.data.dense_transforms import SegmentationTrainTransform
from regvit_jax.data.sources import IGNORE, require_dense
from regvit_jax.evals import Evaluator, option, pictures
from regvit_jax.evals.dense import PADDINGS, block_numbers, channels, fit
from regvit_jax.evals.features import leave_out, source_of
from regvit_jax.evals.progress import Progress
from regvit_jax.evals.saved import NO_MATTER, UNFINISHED, Saved, key_of
from regvit_jax.evals.segmentation_head import MEANS, SegmentationLoss, init_head, optimizer
from regvit_jax.evals.segmentation_metrics import class_scores, confusion, summary
from regvit_jax.evals.segmentation_windows import Segmented, View, segment

FILE, CLASSES_FILE = "predictions.png", "per_class.json"
MODES = ("slide", "whole")

_NAMED = 36  # classes in the legend
# Options of the measuring alone: another choice of them goes on with the same head.
_MEASURING = ("mode", "stride", "scales", "flip", "pictures")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Evaluator):
    """Intersection over union of classes; out_dir/predictions.png and per_class.json. See the top of the file.

    Metrics, over all pixels of the dataset whose class is known: "miou", the mean over classes of intersection / union;
    "macc", of the share of a class that is found; "aacc", the share of all pixels that are right. A class that is
    neither there nor predicted is left out of the means.
    """

    TRUTH = "mask"

    batch_size: int = option(32, "windows in one forward pass, over all devices; changes speed and memory only")
    blocks: tuple[int, ...] = option((-1,), "outputs that the head reads side by side; (-4, -3, -2, -1): the last four")
    crop: int = option(0, "side of training crops and of windows, pixels; 0: the size of the model's images")
    short_side: int = option(0, "pixels to which the short side of images is resized; 0: crop")
    mode: str = option("slide", "how images are measured: slide (windows of crop x crop) | whole (all at once)")
    stride: int = option(0, "pixels from one window to the next; 0: two thirds of crop")
    scales: tuple[float, ...] = option((1.0,), "of short_side, at which images are measured; of several the mean")
    flip: bool = option(False, "average with the prediction for the mirrored image")
    padding: str = option("stretch", "of crops that are no whole patches: stretch (as published) | crop (exact)")
    ratio: tuple[float, float] = option((0.5, 2.0), "range of the factor on short_side in training")
    cat_max_ratio: float = option(0.75, "a training crop is drawn again where one class fills this share or more")
    distort: bool = option(True, "whether colours of training crops are distorted")
    loss_mean: str = option("all", "pixels that the loss is a mean over: all (ignored ones are 0; published) | known")
    lr: float = option(1e-3, "peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), "of AdamW")
    weight_decay: float = option(1e-4, "of AdamW, on all parameters")
    steps: int = option(2000, "updates of the head")
    train_batch_size: int = option(16, "crops of one update, over all devices")
    warmup: float = option(1500 / 40_000, "share of the steps over which the rate rises, while it already falls")
    seed: int = option(0, "of the head, the order of images and their augmentation")
    pictures: int = option(8, "images in predictions.png, spread over the set; 0: none is written")
    save_every: int = option(1000, "steps between two saves of what is done; 0: only when the run is asked to stop")

    def __post_init__(self):
        super().__post_init__()
        self.check("blocks", bool(self.blocks), "one block or more")
        self.check("mode", self.mode in MODES, f"one of {', '.join(MODES)}")
        self.check("padding", self.padding in PADDINGS, f"one of {', '.join(PADDINGS)}")
        self.check("loss_mean", self.loss_mean in MEANS, f"one of {', '.join(MEANS)}")
        self.check("scales", bool(self.scales) and min(self.scales, default=0) > 0, "one or more positive numbers")
        two = len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1]
        self.check("ratio", two, "two positive numbers, the smaller first")
        self.check("cat_max_ratio", 0 < self.cat_max_ratio <= 1, "a share, above 0, up to 1")
        self.check("betas", len(self.betas) == 2 and 0 <= min(self.betas) <= max(self.betas) < 1, "two, from 0 below 1")
        self.check("warmup", 0 <= self.warmup <= 1, "a share, from 0 to 1")
        for name in ("lr", "steps", "train_batch_size"):
            self.check(name, getattr(self, name) > 0, "above 0")
        for name in ("crop", "short_side", "stride", "weight_decay", "seed", "pictures", "save_every"):
            self.check(name, getattr(self, name) >= 0, "0 or more")
        self.check("stride", not (self.crop and self.stride > self.crop), "at most crop, or pixels would be left out")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        train, test = source_of(self.data), source_of(self.eval_data)
        names = self._classes(train, test)
        crop = self.crop or model.preprocessing.size
        short = self.short_side or crop
        blocks = block_numbers(self.blocks, model.config.depth)
        no_matter, folder = (*NO_MATTER, *_MEASURING), pathlib.Path(out_dir)
        key = key_of(self, model, train, names, no_matter=no_matter)
        saved = Saved(folder / UNFINISHED, key, self.save_every)
        head = self._trained(model, train, len(names), blocks, crop, short, mesh, saved)
        view = View(
            blocks=blocks,
            short_sides=tuple(max(1, int(short * scale)) for scale in self.scales),
            flip=self.flip,
            window=crop if self.mode == "slide" else 0,
            stride=self.stride or max(1, crop * 2 // 3) if self.mode == "slide" else 0,
            padding=self.padding,
        )
        counts, index, shown = np.zeros((len(names), len(names)), np.int64), [], []
        show, progress = _spread(len(test), self.pictures), Progress("segmentation probe: measured", len(test))
        for one in segment(
            model,
            head,
            test,
            view,
            num_classes=len(names),
            batch_size=self.batch_size,
            mesh=mesh,
            workers=self.workers,
        ):
            index.append(one.index)
            counts += confusion(one.truth, one.predicted, len(names))
            progress(min(len(index) * jax.process_count(), len(test)))
            if one.index in show:
                shown.append(one)
        counts, index = _of_all_processes(counts, np.array(index, np.int32), len(test))
        leave_out(test, self.eval_data, index, self.max_bad)
        try:
            metrics = summary(counts)
        except ValueError as error:
            raise ValueError(f"{self.eval_data!r}: {error}") from error
        if jax.process_index() == 0:
            _write_classes(folder / CLASSES_FILE, names, counts, len(index))
            if shown:
                _draw(folder / FILE, test, sorted(shown, key=lambda one: one.index), names)
                _log.info("wrote %s and %s", folder / FILE, CLASSES_FILE)
        saved.remove()
        return metrics

    def _classes(self, train, test):
        """The names of the classes, the same in both sources."""
        for source, spec in ((train, self.data), (test, self.eval_data)):
            require_dense(source, spec)
            if not source.mask_names:
                raise ValueError(
                    f"{spec!r} has no masks, which segmentation learns and is measured on: use a source that has them, "
                    f"such as scenes:, ade20k:PATH, voc:PATH or pairs:IMAGES,MASKS"
                )
        if train.mask_names != test.mask_names:
            raise ValueError(
                f"the masks of {self.data!r} and {self.eval_data!r} do not have the same classes "
                f"({len(train.mask_names)} and {len(test.mask_names)}, the first that differs: "
                f"{_first_difference(train.mask_names, test.mask_names)}): name two splits or slices of one source"
            )
        if len(train.mask_names) > IGNORE:
            raise ValueError(f"{self.data!r} has {len(train.mask_names)} classes; masks of 8 bits tell {IGNORE} apart")
        return tuple(train.mask_names)

    def _trained(self, model, source, num_classes, blocks, crop, short, mesh, saved):
        transform = SegmentationTrainTransform(
            crop=crop,
            short_side=short,
            num_classes=num_classes,
            ratio=self.ratio,
            cat_max_ratio=self.cat_max_ratio,
            distort=self.distort,
            fill=tuple(round(255 * value) for value in model.preprocessing.mean),
        )
        features = dict(blocks=blocks, norm=True, cls=False)
        width = channels(model, **features)
        return fit(
            model,
            source,
            transform,
            init_head=lambda key: init_head(key, width, num_classes),
            loss=SegmentationLoss(model.config.patch_size, self.padding, self.loss_mean),
            tx=optimizer(
                lr=self.lr,
                betas=self.betas,
                weight_decay=self.weight_decay,
                steps=self.steps,
                warmup_steps=round(self.warmup * self.steps),
            ),
            steps=self.steps,
            batch_size=self.train_batch_size,
            seed=self.seed,
            mesh=mesh,
            workers=self.workers,
            features=features,
            label="segmentation probe",
            max_bad=self.max_bad,
            source_spec=self.data,
            saved=saved,
        )


def _spread(n, count):
    """Up to `count` of n images, evenly, of those that process 0 gets: every so many-th."""
    places = np.linspace(0, n - 1, min(count, n)).astype(int)
    return set((places - places % jax.process_count()).tolist())


def _first_difference(names, others):
    pairs = zip([*names, None], [*others, None], strict=False)
    return next(f"class {i} is {a!r} in one, {b!r} in the other" for i, (a, b) in enumerate(pairs) if a != b)


def _of_all_processes(counts, index, n):
    """Sum of the counts and all of the indices, on every process."""
    if jax.process_count() == 1:
        return counts, index
    # JAX would make 32 bits of 64: they travel as pairs of 32.
    counts = np.ascontiguousarray(multihost_utils.process_allgather(counts.view(np.int32))).view(np.int64).sum(axis=0)
    seen = np.zeros(n, np.int32)
    seen[index] = 1
    return counts, np.flatnonzero(multihost_utils.process_allgather(seen).any(axis=0))


def _write_classes(path, names, counts, images):
    scores = {
        name: [None if np.isnan(v) else float(v) for v in values] for name, values in class_scores(counts).items()
    }
    record = {
        "pixels": int(counts.sum()),
        "images": images,
        "classes": [
            {"class": i, "name": name, "iou": scores["iou"][i], "acc": scores["acc"][i], "pixels": int(counts[i].sum())}
            for i, name in enumerate(names)
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _draw(path: pathlib.Path, source, shown: list[Segmented], names: tuple[str, ...]) -> None:
    colours = pictures.class_colours(len(names))
    sharp = {"interpolation": "nearest"}
    rows = [
        [one.image, (pictures.paint(one.truth, colours), sharp), (pictures.paint(one.predicted, colours), sharp)]
        for one in shown
    ]
    titles = [f"{pictures.short(source.name(one.index))}\n{_accuracy(one)}" for one in shown]
    pixels = np.concatenate([np.ravel(part) for one in shown for part in (one.truth, one.predicted)])
    count = np.bincount(pixels, minlength=IGNORE + 1)
    frequent = np.argsort(-count[:IGNORE], kind="stable")[:_NAMED]
    legend = [(colours[i], _cut(names[i])) for i in sorted(frequent) if count[i]]
    if (others := int((count[:IGNORE] > 0).sum()) - len(legend)) > 0:
        legend.append(("none", f"and {others} rarer classes"))
    if count[IGNORE]:
        legend.append(("0.7", "ignored"))
    pictures.grid(path, rows, ["image", "truth", "prediction"], titles, legend)


def _cut(name):
    return name if len(name) <= 20 else name[:19].rstrip() + "…"


def _accuracy(one):
    known = one.truth != IGNORE
    return f"{100 * (one.truth == one.predicted)[known].mean():.0f} % right" if known.any() else "nothing to measure on"


EVALUATOR = Segmentation
