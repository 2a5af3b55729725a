"""Data: sources named by one string, host transforms, the ordered loader, augmentation on the accelerator.

    source = open_source("folder:/photos#train[:80%]")
    for batch in train_batches(source, TrainTransform(64), seed=0, batch_size=128, start_step=0): ...

Only `augment` and `masking` import jax; name them by their module.
"""

from regvit_jax.data.sources import Source, eval_split, holdout, open_source

__all__ = ["Source", "eval_split", "holdout", "open_source"]
