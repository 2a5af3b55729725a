"""Table 5 and figure 5b: what patches know of their place and pixels, outliers and normal ones, without and with a
register.

    python experiments/table5/run.py --model reg0=runs/dinov2_reg0 --model reg1=runs/dinov2_reg1 --data_root /data

--stand_in runs it to the end on rendered scenes.
"""

import pathlib
import sys

# The shared modules, and the package where it is not installed.
sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[1:3])

import protocols  # noqa: E402
import report  # noqa: E402
from results_table import Column  # noqa: E402

# Metric of the evaluator -> column. Everything is measured on the same images.
COLUMNS = {
    f"{what}_{group}": Column(f"{what}_{group}", "images not said", f"{group} patches: {measure}", scale, digits)
    for what, measure, scale, digits in (
        ("position", "place, top-1, %", 100.0, 1),
        ("distance", "distance to the place, patches", 1.0, 2),
        ("pixels", "pixels, L2 error", 1.0, 2),
    )
    for group in ("normal", "outlier")
}

EXPERIMENT = report.Experiment(
    name="table5",
    title="Table 5: place and pixels from single patches",
    help=__doc__,
    columns=tuple(COLUMNS.values()),
    published={
        "no register (table 5)": {"position_normal": 66.3, "pixels_normal": 15.9},
        "1 register (table 5)": {"position_normal": 65.8, "pixels_normal": 16.0},
        "DINOv2-g (figure 5b)": {
            "position_normal": 41.7,
            "position_outlier": 22.8,
            "distance_normal": 0.79,
            "distance_outlier": 5.09,
            "pixels_normal": 18.38,
            "pixels_outlier": 25.23,
        },
    },
    measure=lambda args: [protocols.local(COLUMNS)],
    stand_in=lambda args: [protocols.local(COLUMNS, brief=True)],
    notes=(
        "Published: Darcet et al. 2024, figure 5b, and table 5 at second hand. Images, solver, preparation and the "
        "unit of the error are not published: ours are the first 1,024 images of ImageNet's train and val, both probes "
        "fitted to their optimum, and the L2 norm over the 3 p p normalised values of a patch. So compare rows of one "
        "script with each other, not with the published ones.",
    ),
)

if __name__ == "__main__":
    sys.exit(report.main(EXPERIMENT))
