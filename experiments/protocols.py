"""The measurements of the tables, by the paper's protocols, which configs/protocols/ holds.

`brief` ones are what a stand-in gets: the same code on few images, with few steps.
"""

import json
import pathlib

from data_sets import ADE20K, IMAGENET, NYUD, Dataset, scenes
from measurements import Measurement
from results_table import Column

from regvit_jax import config

PROTOCOLS = pathlib.Path(__file__).resolve().parents[1] / "configs" / "protocols"
# Classification is measured at 224 pixels, whatever size a network was trained at; positions are resampled to it.
SIZE = 224

MEASURES = {"top1": "top-1, %", "mean_per_class": "mean per class, %", "map11": "11-point mAP, %"}
LINEAR = Column("imagenet", "ImageNet", "top-1, %")
MIOU = Column("ade20k", "ADE20k", "mIoU, %")
MIOU_MS = Column("ade20k_ms", "ADE20k", "mIoU of +ms, %")
RMSE = {layers: Column(f"nyud_lin{layers}", "NYUd", f"RMSE of lin-{layers}, m", 1.0, 3) for layers in (1, 4)}

_BRIEF_DENSE = dict(steps=4, train_batch_size=2, batch_size=4, pictures=0)
_BRIEF_TOKENS = dict(C=(0.01, 1.0), draws=2, max_iter=20, batch_size=24, rule="percentile", value=99.0)


def token_column(dataset: Dataset) -> Column:
    """The column of table 1 for a data set."""
    return Column(dataset.key, dataset.title, MEASURES[dataset.metric])


def tokens(dataset: Dataset, *, brief: bool = False, **options) -> Measurement:
    """Logistic regression on single tokens: tables 1, 4 and 6."""
    return Measurement(
        f"tokens-{dataset.key}",
        "tokens",
        dataset,
        {r"cls|normal|outlier|register\d+": token_column(dataset)},
        {"metric": dataset.metric} | (_BRIEF_TOKENS if brief else {}) | options,
        {} if brief else {"size": SIZE},
        rows=True,
        note=_coverage,
    )


def linear(*, brief: bool = False) -> Measurement:
    """The grid of 52 linear heads."""
    few = dict(steps=4, train_batch_size=8, lr=(0.01, 0.1), blocks=(1,), batch_size=24)
    options, preparation = (few, {}) if brief else protocol("imagenet_linear")
    dataset = scenes("linear") if brief else IMAGENET
    return Measurement("linear", "linear_grid", dataset, {"top1": LINEAR}, options, preparation)


def segmentation(*, multi_scale: bool = False, brief: bool = False) -> Measurement:
    """The linear head on ADE20k: one scale, or "+ms"."""
    name = "segmentation-ms" if multi_scale else "segmentation"
    options, _ = (_BRIEF_DENSE, {}) if brief else protocol("ade20k_ms" if multi_scale else "ade20k_linear")
    dataset = scenes(name) if brief else ADE20K
    return Measurement(name, "segmentation", dataset, {"miou": MIOU_MS if multi_scale else MIOU}, options)


def depth(layers: int, *, brief: bool = False) -> Measurement:
    """The linear head on NYU Depth v2; `layers` 1 or 4, of which the paper does not say which."""
    few = _BRIEF_DENSE | {"flip": False, "layers": layers}
    options, _ = (few, {}) if brief else protocol(f"nyud_lin{layers}")
    dataset = scenes("depth") if brief else NYUD
    return Measurement(f"depth-lin{layers}", "depth", dataset, {"rmse": RMSE[layers]}, options)


def protocol(name: str) -> tuple[dict, dict]:
    """(options of the one evaluator, fields of Preprocess) of a file of configs/protocols/."""
    c = config.load(PROTOCOLS / f"{name}.py")
    (section,) = c.evals.values()
    run = ("type", "every", "at_start", "data", "eval_data")
    preparation = {"size": c.image_size, "crop_ratio": c.crop_ratio}
    return (
        {key: value for key, value in section.items() if key not in run},
        {key: value for key, value in preparation.items() if value is not None},
    )


def local(columns: dict[str, Column], *, brief: bool = False) -> Measurement:
    """Position and pixel probes: table 5, figure 5b."""
    return Measurement(
        "local",
        "local",
        scenes("local probes") if brief else IMAGENET,
        columns,
        apart=True,
        options=dict(n=24, n_eval=24, max_iter=20, batch_size=24, rule="percentile", value=99.0) if brief else {},
        preparation={} if brief else {"size": SIZE, "crop_ratio": 0.875},
    )


def _coverage(folder, options):
    """What a reader must know of outliers."""
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    rule = options["rule"] + (f" {options['value']:g}" if options["value"] >= 0 else "")
    shares = f"{100 * metrics['coverage_train']:.0f} % of training and {100 * metrics['coverage_test']:.0f} % of test"
    return (
        f"outliers: norm after block {options['block']} above {metrics['cutoff']:.4g} (rule {rule}), "
        f"in {shares} images; {options['draws']} draws"
    )
