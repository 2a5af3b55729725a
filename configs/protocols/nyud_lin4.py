"""NYU Depth v2 by a linear head on four blocks, DINOv2's and the registers paper's protocol, its "lin. 4".

    regvit eval --config=configs/protocols/nyud_lin4.py --model=dinov2_vitl14_reg4 \
        --data=nyud:/data/nyu --set workers=8 --out=nyud_lin4.json

/data/nyu has the lists nyudepthv2_train_files_with_gt.txt and nyudepthv2_test_files_with_gt.txt of BTS, sync/ and
official_splits/test/. 38,400 steps of 16 crops of 416 x 544; then 654 whole frames and their mirror images, measured
inside Eigen's box. The published learning rate is not known: four are trained at once, and a tenth of the training
frames (512 at most), which none sees, chooses. Not run yet. Killed, the same command goes on from the last 1,000 steps.

RMSE in metres to expect, without registers (Oquab et al. 2023, table 11): ViT-S/14 .417, B .362, L .333,
g .298. The
registers paper (table 2a; it does not say of how many blocks), without and with: DINOv2 L trained on ImageNet-22k .378
and .366, DeiT-III B .511 and .512, OpenCLIP B .702 and .661. It is a mean over images; the root of the mean over all
pixels is larger.
"""

from regvit_jax.config import evaluator, protocol


def get_config():
    c = protocol()
    c.evals.nyud_lin4 = evaluator(
        "depth",
        layers=4,
        min_depth=0.001,
        max_depth=10.0,
        crop="eigen",
        flip=True,
        border="nyu",
        train_crop=(416, 544),
        lr=(1e-4, 3e-4, 1e-3, 5e-3),
        steps=38_400,
        train_batch_size=16,
        warmup=1 / 3,
        beta1_cycle=True,
    )
    return c
