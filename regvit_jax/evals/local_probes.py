"""Local probes: how much patch tokens still know of their own place and pixels, outliers and normal ones apart.

Artifacts have given up their local content: linear probes find neither their position nor their pixels, and they stand
where a patch looks like its neighbours. Writes local.png: where outliers are, and how the two groups differ.
Source: Darcet et al. 2024, figure 5 and table 5, figure 10. What the paper leaves open (training images, solver) is
chosen here: both probes are fitted to their optimum, on the first images of the training source.
"""

import dataclasses
import logging
import pathlib

import jax
import numpy as np

from regvit_jax.data.sources import Subset
from regvit_jax.evals import option
from regvit_jax.evals.by_norm import ByNorm
from regvit_jax.evals.features import leave_out, source_of
from regvit_jax.evals.local_measures import collect, fit_probes, measure
from regvit_jax.evals.pictures import save

FILE = "local.png"

# Measure -> the metric it becomes, for each group that has patches.
METRICS = {"right": "position", "distance": "distance", "error": "pixels", "cosine": "cosine"}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalProbes(ByNorm):
    """Position probe, pixel probe and similarity to neighbours. See the top of the file.

    Metrics, over the evaluation images, of "_normal" patches and, where there are any, of "_outlier" ones:
    "position_…" (share of patches whose place in the grid the probe finds), "distance_…" (patches from there to the
    place it finds, mean), "pixels_…" (L2 norm of what the pixel probe leaves of the 3 p p normalised values, mean),
    "cosine_…" (with the neighbours, right after the patch projection, mean). Beside them "pixels_plain" (what the mean
    patch leaves: a probe that knows nothing), "outliers" (share of patches), "top_cell" (share of images with an
    outlier at the cell that has most), "cutoff", "images".
    """

    n: int = option(1024, "number of training images of the probes; their tokens are held in memory")
    n_eval: int = option(1024, "number of evaluation images; 0: all")
    l2: float = option(1e-5, "penalty of the position probe: l2 / 2 * |W|^2 beside the mean loss")
    ridge: float = option(1e-6, "penalty of the pixel probe, where the variance of a channel is 1")
    max_iter: int = option(500, "most L-BFGS steps of the position probe")

    def __post_init__(self):
        super().__post_init__()
        self.check("n", self.n >= 1, "at least 1")
        self.check("n_eval", self.n_eval >= 0, "0 or more")
        self.check("l2", self.l2 > 0, "positive")
        self.check("ridge", self.ridge > 0, "positive")
        self.check("max_iter", self.max_iter >= 1, "at least 1")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        self.check_block(model)
        how = dict(batch_size=self.batch_size, mesh=mesh, workers=self.workers)
        train, test = source_of(self.data), source_of(self.eval_data)
        train = Subset(train, 0, min(self.n, len(train)))
        test = Subset(test, 0, min(self.n_eval or len(test), len(test)))
        limit = self.limit(model, mesh)
        tokens, moments, index = collect(model, train, **how)
        leave_out(train, self.data, index, self.max_bad)
        probes, steps = fit_probes(tokens, moments, l2=self.l2, ridge=self.ridge, max_iter=self.max_iter, mesh=mesh)
        if steps >= self.max_iter:
            _log.warning("position probe: not converged after %d steps (max_iter)", self.max_iter)
        del tokens
        found, index = measure(model, probes, test, self.block, **how)
        leave_out(test, self.eval_data, index, self.max_bad)
        out = found["norm"] > limit
        metrics = {}
        for group, members in (("normal", ~out), ("outlier", out)):
            if members.any():
                metrics |= {f"{name}_{group}": float(found[key][members].mean()) for key, name in METRICS.items()}
        metrics |= {
            "pixels_plain": float(found["plain"].mean()),
            "outliers": float(out.mean()),
            "top_cell": float(out.mean(axis=0).max()),
            "cutoff": limit,
            "images": float(len(out)),
        }
        if jax.process_index() == 0:
            path = pathlib.Path(out_dir) / FILE
            save(path, _figure(found, out))
            _log.info("wrote %s", path)
        return metrics


def _figure(found, out):
    # The object interface: no window system, and no state shared with other pictures of the program.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    where, cosine, error = figure.subplots(1, 3)
    shown = where.imshow(out.mean(axis=0), vmin=0, cmap="viridis", interpolation="nearest")
    figure.colorbar(shown, ax=where, shrink=0.8)
    where.set(xticks=[], yticks=[], title="share of images with an outlier here")
    for axis, key, title in (
        (cosine, "cosine", "cosine with neighbours"),
        (error, "error", "error of the pixel probe"),
    ):
        values = found[key]
        bins = np.linspace(values.min(), max(values.max(), values.min() + 1e-6), 50)
        for group, members, colour in (("normal", ~out, "C0"), ("outlier", out, "C3")):
            if members.any():
                axis.hist(values[members], bins=bins, density=True, label=group, color=colour, alpha=0.6)
        axis.set(title=title, yticks=[])
        axis.legend(fontsize=7)
    return figure


EVALUATOR = LocalProbes
