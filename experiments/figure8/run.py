"""Figure 8: how many registers: ImageNet accuracy, ADE20k mIoU and NYUd error over the number of registers.

    python experiments/figure8/run.py --data_root /data --dtype bfloat16 --out runs/figure8 \\
        --model R0=runs/reg0 --model R1=runs/reg1 --model R2=runs/reg2 \\
        --model R4=runs/reg4 --model R8=runs/reg8 --model R16=runs/reg16

The number is read from the weights. The measurements are those of table 2: with --out=runs/table2 what lies there is
used. --stand_in runs it to the end on rendered scenes.
"""

import json
import pathlib
import sys

# The shared modules, and the package where it is not installed.
sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[1:3])

import protocols  # noqa: E402
import report  # noqa: E402


def measure(args, brief=False):
    return [
        protocols.linear(brief=brief),
        protocols.segmentation(brief=brief),
        protocols.depth(1, brief=brief),
        protocols.depth(4, brief=brief),
    ]


def registers(row) -> int:
    """Of the network that a row of the table is about."""
    record = json.loads(pathlib.Path(next(iter(row.cells.values())).results).read_text())
    return record["model"]["config"]["registers"]


def draw(table, path):
    """A panel a column, over the number of registers."""
    from matplotlib.figure import Figure

    from regvit_jax.evals.pictures import save

    rows = sorted(((registers(row), row) for row in table.rows), key=lambda pair: pair[0])
    columns = [column for column in table.columns if any(column.key in row.cells for _, row in rows)]
    places = {number: place for place, number in enumerate(dict.fromkeys(number for number, _ in rows))}
    figure = Figure(figsize=(2.6 * len(columns), 2.6), layout="constrained")
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        points = [(places[number], row.cells[column.key].value) for number, row in rows if column.key in row.cells]
        axis.plot(*zip(*points, strict=True), "o-", color="C0", markersize=4)
        axis.set_xticks(range(len(places)), list(map(str, places)))
        axis.set_title(f"{column.title}\n{column.measure}", fontsize=7, parse_math=False, wrap=True)
        axis.set_xlabel("registers", fontsize=7)
        axis.tick_params(labelsize=7)
    save(path, figure)


EXPERIMENT = report.Experiment(
    name="figure8",
    title="Figure 8: the number of registers",
    help=__doc__,
    columns=(protocols.LINEAR, protocols.MIOU, *protocols.RMSE.values()),
    published={},
    measure=measure,
    stand_in=lambda args: measure(args, brief=True),
    notes=(
        "The paper has no numbers here, only curves (Darcet et al. 2024, figure 8: DINOv2 ViT-L/14 with 0, 1, 2, 4, 8 "
        "and 16 registers): one register removes the artifacts, dense tasks have an optimum, ImageNet keeps rising.",
    ),
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(report.main(EXPERIMENT))
