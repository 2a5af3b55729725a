"""The iBOT loss: the student, who does not see a patch, predicts what the teacher says about it."""

import jax
import jax.numpy as jnp

from regvit_jax.losses.dino import cross_entropy
from regvit_jax.sharding import constrain_examples
from regvit_jax.trees import Array


def ibot_loss(student_mk: Array, targets_mk: Array, weights_m: Array, *, crops: int, temperature: float = 0.1) -> Array:
    """Sum over masked patches of weight times cross-entropy, divided by the number of crops.

    With weight 1 / (masked patches of its crop) every masked crop counts the same, however much of it is masked. Crops
    without a mask count in the divisor: half of them masked, the loss is half the mean of the masked ones.

    Args:
      student_mk: (M, K) logits of the masked patches alone (with padding), or (G, M, K); any float dtype.
      targets_mk: the same shape, distributions of the teacher on these patches. They receive no gradient.
      weights_m: (M,) or (G, M); 0 for padding.
      crops: number of all global crops, masked or not, of the global batch.
      temperature: of the student.

    Returns:
      float32 scalar.

    Raises:
      ValueError: if the shapes do not belong together.

    Source: iBOT (Zhou et al. 2022), equation 2, with the weights of the DINOv2 code.
    """
    if student_mk.shape != targets_mk.shape or student_mk.shape[:-1] != weights_m.shape:
        raise ValueError(
            f"student, targets and weights must be (M, K), (M, K) and (M,), got {student_mk.shape}, "
            f"{targets_mk.shape} and {weights_m.shape}"
        )
    losses_m = cross_entropy(constrain_examples(student_mk), constrain_examples(targets_mk), temperature)
    return jnp.sum(jax.lax.stop_gradient(weights_m.astype(jnp.float32)) * losses_m) / crops
