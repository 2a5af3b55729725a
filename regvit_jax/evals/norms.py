"""Norms: how far the tokens of a network stick out, block by block, before the final norm. The telemetry of artifacts.

Writes norms.png: the norms of patches over the blocks as percentiles, and a histogram of the block looked at, with
registers and class token.
"""

import dataclasses
import logging
import pathlib

import jax
import numpy as np

from regvit_jax import sharding
from regvit_jax.data.augment import normalize
from regvit_jax.data.sources import Subset
from regvit_jax.evals import Evaluator, option
from regvit_jax.evals.features import batches, leave_out, place, source_of
from regvit_jax.evals.pictures import save
from regvit_jax.models.model import Model
from regvit_jax.ops.outliers import RULES, cutoff, token_norms
from regvit_jax.trees import Array

FILE = "norms.png"
PERCENTILES = (1, 50, 99, 99.9, 100)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms(Evaluator):
    """Norms of the residual stream after every block, over the first images of the evaluation source.

    Metrics, of the patches after `block`: "p50", "p99", "p99.9", "max", "max_over_p50", "outliers" (the share above
    "cutoff", see `ops.outliers`), "top_cell" (the share of images with an outlier at the grid cell that has most of
    them: near 1, outliers belong to a position and not to the image); "cls_p50" and "registers_p50" of those tokens.
    """

    NEEDS = ("eval_data",)

    n: int = option(1024, "number of images")
    block: int = option(-1, "block to look at, from the end if negative; the last one of DINOv2-L shrinks outliers: -2")
    rule: str = option("mad", "what is an outlier: mad | sigma | percentile | otsu | absolute, see ops.outliers")
    value: float = option(-1.0, "parameter of the rule; negative: its usual one (absolute has none)")

    def __post_init__(self):
        super().__post_init__()
        self.check("n", self.n >= 1, "at least 1")
        self.check("rule", self.rule in RULES, f"one of {', '.join(RULES)}")
        self.check("value", self.rule != "absolute" or self.value > 0, "positive with rule='absolute'")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        depth = model.config.depth
        if not -depth <= self.block < depth:
            raise ValueError(f"block={self.block}: this network has {depth} blocks")
        source = source_of(self.eval_data)
        first = Subset(source, 0, min(self.n, len(source)))
        norms = self._norms(model, first, mesh)
        patches = norms["patches"][:, self.block]
        limit = float(cutoff(patches, self.rule, None if self.value < 0 else self.value))
        out = patches > limit
        values = {f"p{p:g}" if p < 100 else "max": float(np.percentile(patches, p)) for p in PERCENTILES[1:]}
        metrics = values | {
            "max_over_p50": values["max"] / max(values["p50"], np.finfo(np.float32).tiny),
            "cutoff": limit,
            "outliers": float(out.mean()),
            "top_cell": float(out.mean(axis=0).max()),
        }
        for kind in ("cls", "registers"):
            if norms[kind].shape[-1]:
                metrics[f"{kind}_p50"] = float(np.median(norms[kind][:, self.block]))
        if jax.process_index() == 0:
            path = pathlib.Path(out_dir) / FILE
            save(path, _figure(norms, self.block % depth, limit))
            _log.info("wrote %s", path)
        return metrics

    def _norms(self, model, source, mesh) -> dict[str, np.ndarray]:
        """{"cls" (M, depth, 0 or 1), "registers" (M, depth, R), "patches" (M, depth, P)} of the images that can be
        read."""
        model = place(model, mesh)
        parts = []
        with jax.set_mesh(mesh):
            for batch in batches(
                source, model.preprocessing, batch_size=self.batch_size, mesh=mesh, workers=self.workers
            ):
                index, found = sharding.gather((batch["index"], _block_norms(model, batch["image"])))
                order = np.argsort(index, kind="stable")[(index < 0).sum() :]
                parts.append((index[order], {kind: values[order] for kind, values in found.items()}))
        leave_out(source, self.eval_data, np.concatenate([index for index, _ in parts]), self.max_bad)
        return {kind: np.concatenate([found[kind] for _, found in parts]) for kind in parts[0][1]}


@jax.jit
def _block_norms(model: Model, images_u8: Array) -> dict[str, Array]:
    """{"cls", "registers", "patches"}: (B, depth, tokens of that kind) float32."""
    c, spec = model.config, model.preprocessing
    names = tuple(f"block{i}" for i in range(c.depth))
    _, found = model.module()(normalize(images_u8, spec.mean, spec.std), capture=names)
    norms = jax.numpy.stack([token_norms(found[name]) for name in names], axis=1)
    cls, prefix = int(c.class_token), c.prefix
    parts = {"cls": norms[..., :cls], "registers": norms[..., cls:prefix], "patches": norms[..., prefix:]}
    return {kind: sharding.constrain(part, sharding.BATCH) for kind, part in parts.items()}


def _figure(norms, block, limit):
    # The object interface: no window system, and no state shared with other pictures of the program.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    course, histogram = figure.subplots(1, 2)
    depth = norms["patches"].shape[1]
    values = np.percentile(norms["patches"], PERCENTILES, axis=(0, 2))
    for percent, line in zip(PERCENTILES, values, strict=True):
        label = {50: "median", 100: "largest"}.get(percent, f"{percent:g} %")
        course.plot(
            range(depth), line, label=label, marker=".", markersize=3, color="C0", alpha=0.35 + 0.0065 * percent
        )
    for kind, colour in (("cls", "C2"), ("registers", "C1")):
        if norms[kind].shape[-1]:
            course.plot(range(depth), np.median(norms[kind], axis=(0, 2)), label=f"{kind}, median", color=colour)
    course.axvline(block, color="0.8", linewidth=6, zorder=0)
    course.set(
        xlabel="block", ylabel="norm before the final norm", yscale="log", title="patches, class token, registers"
    )
    course.legend(fontsize=6)
    there = {kind: values[:, block].reshape(-1) for kind, values in norms.items() if values.shape[-1]}
    low, high = (f(values.min() if f is min else values.max() for values in there.values()) for f in (min, max))
    bins = np.geomspace(max(low, 1e-6) * 0.99, max(high, limit, 1e-6) * 1.01, 60)
    for kind, colour in (("patches", "C0"), ("registers", "C1"), ("cls", "C2")):
        if kind in there:
            histogram.hist(there[kind], bins=bins, label=kind, color=colour, alpha=0.7)
    histogram.axvline(limit, color="C3", linestyle="--", linewidth=1, label=f"cut-off {limit:.4g}")
    histogram.set(xscale="log", yscale="log", xlabel=f"norm after block {block}", ylabel="tokens")
    histogram.legend(fontsize=6)
    return figure


EVALUATOR = Norms
