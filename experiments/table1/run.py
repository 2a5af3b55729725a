"""Table 1 (and 6): logistic regression on one token an image, on 14 data sets: class token, a random normal patch, a
random outlier patch, each register.

    python experiments/table1/run.py --model g=dinov2_vitg14 --data_root /data --set rule=absolute --set value=150

--stand_in runs it to the end on rendered scenes. README.md says what each data set needs.
"""

import pathlib
import sys

# The shared modules, and the package where it is not installed.
sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[1:3])

import protocols  # noqa: E402
import report  # noqa: E402
from data_sets import TRANSFER, scenes  # noqa: E402
from table1.datasets import DATASETS  # noqa: E402

EXPERIMENT = report.Experiment(
    name="table1",
    title="Table 1: what a single token knows of the image",
    help=__doc__,
    columns=tuple(map(protocols.token_column, TRANSFER)),
    published={
        f"DINOv2-g, {token}": {row.key: getattr(row, token) for row in DATASETS}
        for token in ("cls", "normal", "outlier")
    },
    measure=lambda args: [protocols.tokens(dataset) for dataset in TRANSFER],
    stand_in=lambda args: [protocols.tokens(scenes("top-1"), brief=True)],
    notes=(
        "Published: Darcet et al. 2024, table 1 (means) and table 6 (standard deviations over the draws of a token). "
        "Which block and preparation chose the outliers beyond their cut-off of 150 is not published.",
    ),
)

if __name__ == "__main__":
    sys.exit(report.main(EXPERIMENT))
