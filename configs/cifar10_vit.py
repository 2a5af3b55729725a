"""A Vision Transformer with 4 registers on CIFAR-10: the smallest run on real images.

    python -m regvit_jax.main --config=configs/cifar10_vit.py --workdir=runs/cifar10 \
        --config.data.train=npz:cifar10_jpeg.npz

Three passes over 50,000 images: 1,170 steps of 128, 17 min 46 s on 2 AMD EPYC cores with three evaluations. Expect
54.8 % top-1 of the head (46.1 after one pass); measured 2026-11-21, one seed, jax 0.10.2.

The same from a plain folder of the same files, train/CLASS/*.jpg and test/CLASS/*.jpg: --config.data.train=folder:DIR
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="supervised")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_s8", 32, 4, 4
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = 128, 4, 4, 512
    c.model.layerscale, c.model.position_init = 0.3, "sincos"
    c.data.train, c.data.crop, c.data.crop_ratio, c.data.cache = "npz:cifar10_jpeg.npz", "none", 1.0, "device"
    c.data.mean, c.data.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    c.supervised.crop_pad = 2
    c.batch_size, c.total_steps = 128, 1170
    c.optim.lr, c.optim.warmup_steps, c.optim.weight_decay, c.optim.clip_norm = 1e-3, 100, 0.05, 3.0
    c.remat = "dots"  # a CPU recomputes faster than it fetches: 1.25 x the images/s
    c.log_every, c.save_every, c.eval_every = 50, 390, 390
    c.evals.accuracy = evaluator("accuracy")
    return c
