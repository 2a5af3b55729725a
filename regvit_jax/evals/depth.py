"""Depth probe: a linear head that reads metric depth from frozen patch features, trained and measured as on NYUd.

The head sees patch and class tokens of one block or four, without the final norm; registers never. It is trained on
crops that change all the time, with the scale-invariant logarithmic loss, and measured on whole images at their own
size, averaged with what it says of the mirrored image.

The protocol of DINOv2 and of the registers paper on NYU Depth v2 is `Depth(data="nyud:PATH", **NYUD)`, and layers=4
for its second column (configs/protocols/ has both); the defaults are the same without what belongs to those frames,
and shorter. What is done is kept in unfinished.npz every `save_every` steps; the same command goes on from there.
"""

import dataclasses
import logging
import pathlib

import jax
import numpy as np

from regvit_jax import sharding
from regvit_jax.data.depth_transforms import BORDERS, DepthTrainTransform
from regvit_jax.data.sources import Source, Subset, require_dense
from regvit_jax.evals import Evaluator, depth_pictures, option
from regvit_jax.evals.dense import channels, fit
from regvit_jax.evals.depth_head import PADDINGS, ProbeLoss, init_heads, optimizer, probe_blocks
from regvit_jax.evals.depth_measure import Picked, Readout, measure, survey
from regvit_jax.evals.depth_metrics import CROPS, averaged, crop_mask
from regvit_jax.evals.features import leave_out, source_of
from regvit_jax.evals.saved import NO_MATTER, UNFINISHED, Saved, key_of

FILE = "predictions.png"
# What the published probe sets on NYU Depth v2. Its one learning rate is not published: the best of these is taken.
NYUD = dict(
    min_depth=0.001,
    max_depth=10.0,
    crop="eigen",
    border="nyu",
    train_crop=(416, 544),
    steps=38_400,
    train_batch_size=16,
    warmup=1 / 3,
    beta1_cycle=True,
    lr=(1e-4, 3e-4, 1e-3, 5e-3),
)
HELD_OUT = 10  # one training sample in so many chooses the learning rate
MOST_HELD_OUT = 512

_LOOKED_AT = 500  # training samples in which an unknown range of depth is looked for
_FIRST = 16  # samples among which the first that can be read gives its size
_STEPS_WITHOUT_VARIANCE = 100  # and no more than a tenth of them
# Options of the measuring alone: another choice of them goes on with the same heads.
_MEASURING = ("crop", "flip", "pictures")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth(Evaluator):
    """Errors of metric depth, and out_dir/predictions.png. See the top of the file.

    Metrics, of each image and then averaged over images: "rmse" and "sq_rel" in metres, "abs_rel", "a1", "a2", "a3",
    "rmse_log", "silog", "log10" as in `depth_errors`; with several learning rates "lr", the one that was chosen; and
    "left_out", the number of images without a valid pixel, if there are any.
    """

    TRUTH = "depth"

    batch_size: int = option(16, "images measured at once, over all devices; changes speed and memory only")
    layers: int = option(1, "blocks that the head reads: 1 (the last) or 4 (spread over the depth)")
    min_depth: float = option(0.001, "metres of the first bin; what is nearer does not count")
    max_depth: float = option(0.0, "metres of the last bin, farther does not count; 0: the source's, else the largest")
    crop: str = option("none", "part of each map that is measured: none | eigen (NYUd) | garg (KITTI)")
    flip: bool = option(True, "average with the prediction for the mirrored image")
    padding: str = option("stretch", "of images that are no whole patches: stretch (as published) | crop (exact)")
    short_side: int = option(0, "pixels to which the short side of every image is resized; 0: its own")
    border: str = option("none", "cut off the training frames: none | nyu (rows 45:472, columns 43:608)")
    train_crop: tuple[int, int] = option((0, 0), "height and width of training crops; 0, 0: the first whole image's")
    rotate: float = option(2.5, "largest angle, in degrees, by which half of the training images are turned")
    color: float = option(0.5, "share of the training images whose colours are changed")
    lr: tuple[float, ...] = option((1e-3,), "peak learning rates; of several the best on a held-out tenth is taken")
    steps: int = option(2000, "updates of the head")
    train_batch_size: int = option(16, "images of one update, over all devices")
    warmup: float = option(1 / 3, "share of the steps over which the rate rises, while the cosine already falls")
    weight_decay: float = option(0.01, "of AdamW")
    clip: float = option(35.0, "largest norm of a gradient; 0: any")
    beta1_cycle: bool = option(False, "Adam's first beta from .95 down to .85 and back, as published; else .9")
    gradient_loss: float = option(0.0, "weight of the loss on edges, beside 1; what is published amounts to 0")
    seed: int = option(0, "of the head, the order of images and their augmentation")
    pictures: int = option(8, "images in predictions.png; 0: none is written")
    save_every: int = option(1000, "steps between two saves of what is done; 0: only when the run is asked to stop")

    def __post_init__(self):
        super().__post_init__()
        self.check("layers", self.layers in (1, 4), "1 or 4")
        self.check("min_depth", self.min_depth > 0, "above 0 metres")
        self.check("max_depth", self.max_depth == 0 or self.max_depth > self.min_depth, "above min_depth, or 0")
        self.check("crop", self.crop in CROPS, f"one of {', '.join(CROPS)}")
        self.check("padding", self.padding in PADDINGS, f"one of {', '.join(PADDINGS)}")
        self.check("border", self.border in BORDERS, f"one of {', '.join(BORDERS)}")
        self.check("short_side", self.short_side >= 0, "0 or more")
        whole = tuple(self.train_crop) == (0, 0)
        self.check("train_crop", whole or (len(self.train_crop) == 2 and min(self.train_crop) > 0), "height and width")
        self.check("rotate", 0 <= self.rotate < 180, "from 0 to 180 degrees")
        self.check("color", 0 <= self.color <= 1, "a share, from 0 to 1")
        self.check("lr", bool(self.lr) and min(self.lr, default=0) > 0, "one or more positive numbers")
        self.check("lr", len(set(self.lr)) == len(self.lr), "different numbers")
        self.check("steps", self.steps >= 1, "at least 1")
        self.check("train_batch_size", self.train_batch_size >= 1, "at least 1")
        self.check("warmup", 0 <= self.warmup <= 1, "a share, from 0 to 1")
        for name in ("weight_decay", "clip", "gradient_loss", "seed", "pictures", "save_every"):
            self.check(name, getattr(self, name) >= 0, "0 or more")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        train, test = source_of(self.data), source_of(self.eval_data)
        for source, spec in ((train, self.data), (test, self.eval_data)):
            require_dense(source, spec)
        if train.fingerprint == test.fingerprint:
            _log.warning("%s and %s are the same: the numbers say nothing of new images", self.data, self.eval_data)
        looking = dict(batch_size=self.batch_size, mesh=mesh, workers=self.workers)
        crop_mask(self.crop, *_first_size(test, looking))  # what it refuses is better refused before the training
        readout = self.readout(model, self._max_depth(train, looking))
        key = key_of(self, model, train, readout.ends, no_matter=(*NO_MATTER, *_MEASURING))
        saved = Saved(pathlib.Path(out_dir) / UNFINISHED, key, self.save_every)
        heads, best = sharding.gather(self._trained(model, train, readout, looking, saved)), 0
        if len(self.lr) > 1:
            best = self._best(model, heads, _held_out(train), readout, looking)
        head = jax.tree.map(lambda leaf: leaf[best : best + 1], heads)
        show = tuple(dict.fromkeys(np.linspace(0, len(test) - 1, min(self.pictures, len(test))).astype(int).tolist()))
        errors, index, shown = measure(model, head, test, readout, short_side=self.short_side, show=show, **looking)
        leave_out(test, self.eval_data, index, self.max_bad)
        errors = {name: values[0] for name, values in errors.items()}
        metrics = averaged(errors)
        left_out = int((errors["images"] == 0).sum())
        if left_out:
            _log.warning("%s: %d images have no pixel of known depth that counts", self.eval_data, left_out)
            metrics["left_out"] = float(left_out)
        if len(self.lr) > 1:
            metrics["lr"] = self.lr[best]
        if shown and jax.process_index() == 0:
            path = pathlib.Path(out_dir) / FILE
            rmse = dict(zip(index.tolist(), np.where(errors["images"], errors["rmse"], np.nan).tolist(), strict=True))
            depth_pictures.draw(path, test, {place: shown[place][0] for place in sorted(shown)}, rmse, readout)
            _log.info("wrote %s", path)
        saved.remove()
        return metrics

    def readout(self, model, max_depth: float) -> Readout:
        """What the head of this probe reads of a model, and what of its depth is measured."""
        config = model.config
        if not config.class_token:
            _log.info("depth probe: this model has no class token, the head reads its patches alone")
        return Readout(
            blocks=probe_blocks(config.depth, self.layers),
            cls=config.class_token,
            ends=(self.min_depth, max_depth),
            padding=self.padding,
            flip=self.flip,
            crop=self.crop,
        )

    def _max_depth(self, source, looking):
        """Metres of the last bin."""
        farthest, said = self.max_depth, "as max_depth says"
        if not farthest and source.depth_range is not None:
            farthest, said = source.depth_range[1], "as the source says"
        if not farthest:
            places = np.unique(np.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source))).astype(int))
            farthest = float(survey(Picked(source, places), **looking)[1][:, 1].max())
            said = f"the largest in {len(places)} training images; max_depth sets another"
        if not farthest > self.min_depth:
            raise ValueError(
                f"{self.data!r} has no depth above min_depth={self.min_depth:g} m: is its unit metres? A 16-bit map in "
                f"millimetres is read by pairs:IMAGES,DEPTHS?depth=0.001"
            )
        _log.info("depth probe: bins from %g to %g m (%s)", self.min_depth, farthest, said)
        return farthest

    def _trained(self, model, source, readout, looking, saved):
        """The heads, one a learning rate, stacked."""
        part = _without_held_out(source) if len(self.lr) > 1 else source
        transform = DepthTrainTransform(
            crop=self._crop(part, looking),
            border=self.border,
            short_side=self.short_side,
            rotate=self.rotate,
            color_prob=self.color,
        )
        width = channels(model, **readout.features)
        return fit(
            model,
            part,
            transform,
            init_head=lambda key: init_heads(key, width, len(self.lr)),
            loss=ProbeLoss(
                ends=readout.ends,
                padding=readout.padding,
                patch=model.config.patch_size,
                gradient_loss=self.gradient_loss,
                first=min(_STEPS_WITHOUT_VARIANCE, self.steps // 10),
            ),
            tx=optimizer(
                self.lr,
                steps=self.steps,
                warmup_steps=round(self.warmup * self.steps),
                weight_decay=self.weight_decay,
                clip=self.clip,
                beta1_cycle=self.beta1_cycle,
            ),
            steps=self.steps,
            batch_size=self.train_batch_size,
            seed=self.seed,
            mesh=looking["mesh"],
            workers=self.workers,
            features=readout.features,
            label="depth probe",
            max_bad=self.max_bad,
            source_spec=self.data,
            saved=saved,
        )

    def _crop(self, source, looking):
        """Height and width of the training crops."""
        if min(self.train_crop):
            return tuple(self.train_crop)
        whole = DepthTrainTransform((1, 1), self.border, self.short_side).whole(_first_size(source, looking))
        _log.info("depth probe: training crops of %d x %d pixels, the size of the first image", *whole)
        return whole

    def _best(self, model, heads, part, readout, looking):
        """The number of the head with the smallest RMSE on `part`, which none was trained on."""
        errors, _, _ = measure(model, heads, part, readout, short_side=self.short_side, **looking)
        rmse = [averaged({name: values[i] for name, values in errors.items()})["rmse"] for i in range(len(self.lr))]
        best = int(np.argmin(rmse))
        shares = ", ".join(f"{lr:g}: {value:.4f}" for lr, value in zip(self.lr, rmse, strict=True))
        edge = ", at the edge of the choice" if self.lr[best] in (min(self.lr), max(self.lr)) else ""
        _log.info(
            "depth probe: lr=%g chosen by RMSE on %d training images that no head has seen (%s)%s",
            *(self.lr[best], len(part), shares, edge),
        )
        return best


def _first_size(source, looking):
    """Height and width of the first sample that can be read."""
    sizes, _ = survey(Picked(source, np.arange(min(_FIRST, len(source)))), **looking)
    return next(tuple(size) for size in sizes.tolist() if min(size))


def _held_out_count(source):
    return min(max(1, len(source) // HELD_OUT), MOST_HELD_OUT)


def _held_out(source: Source) -> Source:
    return Subset(source, 0, _held_out_count(source), shuffled=True)


def _without_held_out(source: Source) -> Source:
    if len(source) < 2:
        raise ValueError("one training image cannot choose among several learning rates: give one lr")
    return Subset(source, _held_out_count(source), len(source), shuffled=True)


EVALUATOR = Depth
