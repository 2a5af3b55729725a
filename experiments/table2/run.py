"""Table 2: linear classifiers on frozen features: ImageNet accuracy, ADE20k segmentation, NYU depth.

    python experiments/table2/run.py --model reg0=runs/reg0 --model reg4=runs/reg4 --data_root /data --dtype bfloat16

--multi_scale adds DINOv2's "+ms" column of ADE20k. --stand_in runs it to the end on rendered scenes.
"""

import pathlib
import sys

# The shared modules, and the package where it is not installed.
sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[1:3])

import protocols  # noqa: E402
import report  # noqa: E402
from results_table import Column  # noqa: E402

ZERO_SHOT = Column("zero_shot", "ImageNet, zero-shot", "top-1, %")


def _published(imagenet, miou, rmse, zero_shot=None):
    # The paper does not say whether the head reads 1 layer or 4: its RMSE stands in both columns.
    row = {"imagenet": imagenet, "ade20k": miou, "nyud_lin1": rmse, "nyud_lin4": rmse}
    return row | ({} if zero_shot is None else {"zero_shot": zero_shot})


def measure(args, brief=False):
    wanted = [protocols.linear(brief=brief), protocols.segmentation(brief=brief)]
    wanted += [protocols.segmentation(multi_scale=True, brief=brief)] if args.multi_scale else []
    return [*wanted, protocols.depth(1, brief=brief), protocols.depth(4, brief=brief)]


EXPERIMENT = report.Experiment(
    name="table2",
    title="Table 2: linear probes of frozen features",
    help=__doc__,
    columns=(protocols.LINEAR, protocols.MIOU, *protocols.RMSE.values(), ZERO_SHOT),
    published={
        "DeiT-III": _published(84.7, 38.9, 0.511),
        "DeiT-III, 4 registers": _published(84.7, 39.1, 0.512),
        "OpenCLIP": _published(78.2, 26.6, 0.702, 59.9),
        "OpenCLIP, 4 registers": _published(78.1, 26.7, 0.661, 60.1),
        "DINOv2": _published(84.3, 46.6, 0.378),
        "DINOv2, 4 registers": _published(84.8, 47.9, 0.366),
    },
    measure=measure,
    stand_in=lambda args: measure(args, brief=True),
    notes=(
        "Published: Darcet et al. 2024, table 2 (ViT-B of DeiT-III and OpenCLIP, ViT-L of DINOv2, all trained for the "
        "paper, weights not released). It does not say whether the depth head reads one layer or four: its RMSE stands "
        "in both columns. The learning rate of that head is not published: the best of four on held-out images.",
        "The zero-shot column joins with the OpenCLIP recipe.",
    ),
    arguments=lambda parser: parser.add_argument("--multi_scale", action="store_true", help='ADE20k "+ms" too'),
)

if __name__ == "__main__":
    sys.exit(report.main(EXPERIMENT))
