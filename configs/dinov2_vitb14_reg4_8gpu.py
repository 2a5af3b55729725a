"""DINOv2 ViT-B/14 with 4 registers on ImageNet-1k, one machine of 8 GPUs.

    python -m regvit_jax.main --config=configs/dinov2_vitb14_reg4_8gpu.py --workdir=runs/vitb14_reg4 \
        --config.data.train=imagenet:/data/imagenet

125,000 steps of 1,024 in 16 groups of 64 images, 100 passes over 1.28 M images. Not run. Every GPU has two groups, so
nothing but parameters and sums is sent; 8 x 2 groups are also right for 16 or 4 GPUs. Settings are the reference's
short run with targets by Sinkhorn-Knopp and drop path .2.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="dinov2")
    c.model.name, c.model.image_size, c.model.drop_path = "dinov2_vitb14_reg4", 224, 0.2
    c.data.train, c.data.workers = "imagenet:/data/imagenet", 32
    o = c.dinov2
    o.prototypes, o.centering = 65_536, "sinkhorn"
    c.batch_size, c.total_steps, c.groups = 1024, 125_000, 16
    c.remat = "named"
    c.log_every, c.save_every, c.eval_every, c.keep_best = 50, 2500, 12_500, "knn/top1"
    c.evals.knn = evaluator("knn", k=(10, 20, 100, 200))
    c.evals.linear = evaluator("linear", every=0)
    c.evals.maps = evaluator("maps")
    return c
