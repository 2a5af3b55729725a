"""DINOv2 ViT-L/14 with 4 registers on ImageNet-22k: the registers paper's run (Darcet et al. 2024, section 3.1).

    python -m regvit_jax.main --config=configs/dinov2_vitl14_reg4_in22k.py --workdir=runs/vitl14_reg4 \
        --config.data.train=imagenet22k:/data/imagenet22k

625,000 steps of 3,072 images in 96 groups of 32: the reference's vitl14 configuration, whose groups were 96 A100s, for
3.3 days. Not run here. Any number of devices that divides 96 gives the same losses. Expect, by linear probes on frozen
features (the paper's table 2a): ImageNet 84.8, ADE20k 47.9 mIoU, NYUd 0.366 RMSE. Without registers
(--config.model.registers=0): 84.3, 46.6, 0.378, and norm outliers in the patches.

SwiGLU, 131,072 prototypes, a head of their own for patches, positions resampled with antialiasing as released register
models are.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="dinov2")
    c.model.name, c.model.image_size, c.model.drop_path = "vit_l14_swiglu_reg4", 224, 0.4
    c.data.train, c.data.workers = "imagenet22k:/data/imagenet22k", 32
    o = c.dinov2
    o.prototypes, o.bottleneck, o.centering = 131_072, 384, "sinkhorn"
    o.separate_head, o.ibot_prototypes, o.ibot_bottleneck = True, 131_072, 256
    o.momentum, o.weight_decay_end = 0.994, 0.2
    c.batch_size, c.total_steps, c.groups = 3072, 625_000, 96
    c.optim.lr, c.optim.warmup_steps, c.optim.layer_decay = 2e-4, 100_000, 1.0
    c.mesh.fsdp, c.remat = -1, "named"
    c.mesh.data = 1
    c.log_every, c.save_every, c.eval_every = 100, 3750, 12_500
    c.evals.knn = evaluator("knn", k=(10, 20, 100, 200), data="imagenet:/data/imagenet")
    c.evals.maps = evaluator("maps")
    return c
