"""The high-resolution stage of DINOv2: a trained ViT-L/14 with 4 registers goes on at 518 pixels for 10,000 steps.

    python -m regvit_jax.main --config=configs/dinov2_vitl14_reg4_518.py --workdir=runs/vitl14_reg4_518 \
        --config.data.train=imagenet22k:/data/imagenet22k

Not run. The paper says: from the trained weights, the same procedure, all schedules pressed into 10,000 iterations, the
learning rate reduced; the value was never published, a quarter is used here. It starts from the workdir of
dinov2_vitl14_reg4_in22k.py, runs/vitl14_reg4: positions are resampled to the larger grid, both heads go on. For other
weights --config.init_from=PATH; released ones have no heads: --config.dinov2.init_heads=False.

A mask may have 666 patches a block there; local crops stay at 98 pixels.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="dinov2")
    c.model.name, c.model.image_size, c.model.drop_path = "vit_l14_swiglu_reg4", 518, 0.4
    c.data.train, c.data.workers = "imagenet22k:/data/imagenet22k", 32
    c.init_from = "runs/vitl14_reg4"
    o = c.dinov2
    o.local_size = 98
    o.prototypes, o.bottleneck, o.centering = 131_072, 384, "sinkhorn"
    o.separate_head, o.ibot_prototypes, o.ibot_bottleneck = True, 131_072, 256
    o.init_heads = True
    o.momentum, o.weight_decay_end = 0.994, 0.2
    o.teacher_temp_warmup, o.freeze_last_layer = 600, 20
    c.batch_size, c.total_steps, c.groups = 3072, 10_000, 96
    c.optim.lr, c.optim.warmup_steps, c.optim.layer_decay = 5e-5, 1600, 1.0
    c.mesh.fsdp, c.remat = -1, "full"
    c.mesh.data = 1
    c.log_every, c.save_every, c.eval_every = 50, 1000, 2500
    c.evals.maps = evaluator("maps")
    return c
