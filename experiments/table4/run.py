"""Table 4: what single tokens know of the image, without and with one register, on FGVC-Aircraft.

    python experiments/table4/run.py --model reg0=runs/dinov2_reg0 --model reg1=runs/dinov2_reg1 --data_root /data

The measurement is that of table 1. --stand_in runs it to the end on rendered scenes.
"""

import pathlib
import sys

# The shared modules, and the package where it is not installed.
sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[1:3])

import protocols  # noqa: E402
import report  # noqa: E402
from data_sets import TRANSFER, scenes  # noqa: E402

AIRCRAFT = next(dataset for dataset in TRANSFER if dataset.key == "aircraft")

EXPERIMENT = report.Experiment(
    name="table4",
    title="Table 4: single tokens without and with a register, FGVC-Aircraft",
    help=__doc__,
    columns=(protocols.token_column(AIRCRAFT),),
    published={
        "no register, cls": {"aircraft": 84.6},
        "no register, normal": {"aircraft": 15.5},
        "no register, outlier": {"aircraft": 73.3},
        "1 register, cls": {"aircraft": 85.2},
        "1 register, normal": {"aircraft": 14.5},
        "1 register, register": {"aircraft": 71.1},
    },
    measure=lambda args: [protocols.tokens(AIRCRAFT)],
    stand_in=lambda args: [protocols.tokens(scenes("top-1"), brief=True)],
    notes=(
        "Published: Darcet et al. 2024, table 4, at second hand. With a register there was no outlier. The network is "
        "not named beyond DINOv2; its outlier rule is not published.",
    ),
)

if __name__ == "__main__":
    sys.exit(report.main(EXPERIMENT))
