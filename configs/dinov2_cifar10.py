"""DINOv2 with 4 registers on CIFAR-10, without its labels: the smallest self-supervised run on real images.

    python -m regvit_jax.main --config=configs/dinov2_cifar10.py --workdir=runs/dinov2_cifar10 \
        --config.data.train=npz:cifar10_jpeg.npz

ViT of width 192 and depth 6 on 32 x 32 pixels, patch 4, in bfloat16 on a GPU: 40,000 steps of 512, 410 passes over
50,000 images. On 2 CPU cores half an hour of a smaller one:

    --config.model.width=128 --config.model.depth=4 --config.model.num_heads=4 --config.model.mlp_dim=512 \
        --config.batch_size=128 --config.total_steps=3000 --config.optim.warmup_steps=300

Not run yet. k-NN on the class token is measured every 2,000 steps; the decoded images stay on the device.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="dinov2")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_s8", 32, 4, 4
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = 192, 6, 3, 768
    c.model.layerscale, c.model.position_init, c.model.drop_path = 0.1, "sincos", 0.1
    c.data.train, c.data.crop_ratio, c.data.cache = "npz:cifar10_jpeg.npz", 1.0, "device"
    c.data.mean, c.data.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    o = c.dinov2
    o.source_size, o.local_size, o.local_crops = 32, 16, 6
    # Nothing is left of so small a picture after a blur of 9 pixels.
    o.blur, o.solarize = (0.0, 0.0, 0.0), 0.1
    o.prototypes, o.head_hidden, o.bottleneck = 4096, 1024, 128
    o.centering, o.teacher_temp, o.teacher_temp_warmup = "sinkhorn", 0.06, 4000
    o.ibot_weight, o.momentum, o.lr_scaling, o.freeze_last_layer = 0.5, 0.99, "none", 100
    o.weight_decay_end = 0.2
    c.batch_size, c.total_steps = 512, 40_000
    c.optim.lr, c.optim.warmup_steps, c.optim.layer_decay, c.optim.b2 = 1e-3, 2000, 1.0, 0.99
    c.log_every, c.save_every, c.eval_every, c.keep_best = 50, 1000, 2000, "knn/top1"
    c.evals.knn = evaluator("knn", at_start=True)
    c.evals.linear = evaluator("linear", every=0)
    return c
