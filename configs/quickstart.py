"""The quickstart: a small Vision Transformer with 4 registers learns 8 shapes from procedural scenes.

    python -m regvit_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

4,000 rendered scenes of 64 x 64 pixels, drawn on first use (30 s); 568 steps of 64, evaluated before and after. On 2
AMD EPYC cores eleven and a half minutes beside a test run. Expect, untrained and trained, k-NN top-1 .21 and .87,
linear top-1 .41 and .88, mIoU .18 and .33, depth RMSE 1.47 and 1.37 m; measured 2026-11-21, one seed, jax 0.10.2:
experiments/quickstart/README.md.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="supervised")
    c.model.name, c.model.image_size, c.model.registers = "vit_s8", 64, 4
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = 128, 4, 4, 512
    c.model.layerscale, c.model.position_init = 0.3, "sincos"
    c.data.train, c.data.scale, c.data.crop_ratio = "scenes:", (0.4, 1.0), 1.0
    c.batch_size, c.total_steps = 64, 568
    c.optim.lr, c.optim.warmup_steps, c.optim.weight_decay, c.optim.clip_norm = 1e-3, 56, 0.05, 3.0
    c.remat = "dots"  # a CPU recomputes faster than it fetches
    c.log_every, c.save_every, c.eval_every = 25, 200, 568
    c.evals.knn = evaluator("knn", at_start=True)
    c.evals.linear = evaluator("linear", at_start=True)
    c.evals.segmentation = evaluator(
        "segmentation", steps=300, lr=5e-3, ratio=(0.75, 1.5), distort=False, at_start=True
    )
    c.evals.depth = evaluator(
        "depth", steps=300, train_batch_size=16, lr=(1e-2,), warmup=0.2, batch_size=64, at_start=True
    )
    c.evals.maps = evaluator("maps", at_start=True)
    return c
