"""The picture of a depth probe: image, truth, prediction and error, a row an image."""

import pathlib
from collections.abc import Mapping

import numpy as np

from regvit_jax.data.depth_transforms import DepthEvalTransform
from regvit_jax.data.sources import Source
from regvit_jax.evals import pictures
from regvit_jax.evals.depth_measure import Readout
from regvit_jax.evals.depth_metrics import valid_mask

_GREY = "0.6"


def draw(
    path: pathlib.Path,
    source: Source,
    depth: Mapping[int, np.ndarray],
    rmse: Mapping[int, float],
    readout: Readout,
) -> None:
    """Writes the picture of the samples of `depth`, {place: (H, W) metres predicted}.

    Truth and prediction have one scale of colours for the whole picture, the errors another; pixels that do not count
    are grey in truth and error.

    Args:
      rmse: of each, NaN where no pixel counts.
    """
    samples = [DepthEvalTransform()(source[place], np.random.default_rng(0)) for place in depth]
    truths, errors = [], []
    for sample, predicted in zip(samples, depth.values(), strict=True):
        counts = np.asarray(valid_mask(sample["depth"][None], *readout.ends, readout.crop))[0]
        truths.append(np.where(counts, sample["depth"], np.nan))
        errors.append(predicted - truths[-1])
    near, far = _ends(truths, (1, 99))
    bound = max(map(abs, _ends(errors, (2, 98))))
    metres, signed = _colours("viridis_r", near, far), _colours("RdBu_r", -bound, bound)
    rows = [
        [sample["image"], (truth, metres), (predicted, metres), (error, signed)]
        for sample, truth, predicted, error in zip(samples, truths, depth.values(), errors, strict=True)
    ]
    headings = ["image", "depth, measured", "depth, predicted", "error"]
    titles = [f"{pictures.short(source.name(place))}\n{_number(rmse[place])}" for place in depth]
    bars = {1: "m (grey: not measured)", 2: "m", 3: "m, too near (blue) or too far (red)"}
    pictures.grid(path, rows, headings, titles, bars=bars)


def _ends(maps, percentiles):
    known = np.concatenate([values[np.isfinite(values)] for values in maps])
    low, high = np.percentile(known, percentiles) if known.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-3))


def _colours(name, low, high):
    import matplotlib

    return {"cmap": matplotlib.colormaps[name].with_extremes(bad=_GREY), "vmin": low, "vmax": high}


def _number(rmse):
    return f"RMSE {rmse:.3f} m" if np.isfinite(rmse) else "nothing to measure on"
