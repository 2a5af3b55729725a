"""The DINO loss: the student's view of an image predicts what the teacher says about another view."""

import jax
import jax.numpy as jnp

from regvit_jax.sharding import constrain_examples
from regvit_jax.trees import Array


def dino_loss(
    student_global: Array, student_local: Array | None, targets: Array, *, temperature: float = 0.1
) -> dict[str, Array]:
    """Cross-entropy of all pairs of a teacher's view and another view of the student's.

    With L local views there are 2 L + 2 such pairs, each the mean over the images and each of weight 1 / (2 L + 2):
    8 local views make 18 pairs. Without local views the two pairs weigh 1 / 3, as in the reference, which counts no
    fewer than one local pair.

    Args:
      student_global: (2, B, K) logits of the global views, any float dtype.
      student_local: (L, B, K) logits of the local views, or None.
      targets: (2, B, K) distributions of the teacher; targets[v] is about view v. They receive no gradient.
      temperature: of the student.

    Returns:
      {"global": scalar, "local": scalar} float32, to be added; "local" is 0 without local views.

    Raises:
      ValueError: if the shapes do not belong together.

    Source: DINO (Caron et al. 2021), equation 3, with the weights of the DINOv2 code.
    """
    local = 0 if student_local is None else student_local.shape[0]
    _check(student_global, student_local, targets)
    targets = jax.lax.stop_gradient(constrain_examples(targets, 1))
    pairs = 2 + max(2 * local, 1)
    # targets[::-1]: a view never predicts itself.
    losses_2b = cross_entropy(constrain_examples(student_global, 1), targets[::-1], temperature)
    total = {"global": losses_2b.mean(axis=1).sum() / pairs, "local": jnp.zeros((), jnp.float32)}
    if local:
        # Cross-entropy is linear in its targets: both teachers at once.
        losses_lb = cross_entropy(constrain_examples(student_local, 1), targets.sum(axis=0), temperature)
        total["local"] = losses_lb.mean(axis=1).sum() / pairs
    return total


def cross_entropy(logits: Array, targets: Array, temperature: float) -> Array:
    """-sum_k targets log softmax(logits / temperature) of every row, float32.

    Only the logits, the targets and two numbers a row are kept for the gradient, (sum(targets) softmax - targets) /
    temperature: with 100,000 prototypes an array of the size of the logits is what fills the memory.

    Args:
      logits: (..., K), any float dtype; the gradient has the same.
      targets: any shape that broadcasts against the logits; rows may sum to anything. A constant: its gradient is zero.
      temperature: scalar > 0, a constant too.
    """
    return _cross_entropy(logits, *jax.lax.stop_gradient((targets, jnp.asarray(temperature, jnp.float32))))


@jax.custom_vjp
def _cross_entropy(logits, targets, temperature):
    return _forward(logits, targets, temperature)[0]


def _forward(logits, targets, temperature):
    x = logits.astype(jnp.float32) / temperature
    largest = x.max(axis=-1, keepdims=True)
    log_sum = jnp.log(jnp.exp(x - largest).sum(axis=-1, keepdims=True))
    loss = -(targets.astype(jnp.float32) * (x - largest - log_sum)).sum(axis=-1)
    return loss, (logits, targets, temperature, largest, log_sum)


def _backward(saved, grad):
    # The barrier makes the compiler compute logits / temperature again instead of keeping it from the forward pass.
    logits, targets, temperature, largest, log_sum = jax.lax.optimization_barrier(saved)
    targets = targets.astype(jnp.float32)
    softmax = jnp.exp(logits.astype(jnp.float32) / temperature - largest - log_sum)
    slope = (targets.sum(axis=-1, keepdims=True) * softmax - targets) / temperature
    return (grad[..., None] * slope).astype(logits.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def _check(student_global: Array, student_local: Array | None, targets: Array) -> None:
    if student_global.ndim != 3 or len(student_global) != 2 or student_global.shape != targets.shape:
        raise ValueError(
            f"student and targets of the global views must both be (2, B, K), got {student_global.shape} and "
            f"{targets.shape}"
        )
    if student_local is not None and (student_local.ndim != 3 or student_local.shape[1:] != targets.shape[1:]):
        raise ValueError(f"local views must be (L, B, K) = (L, {targets.shape[1]}, {targets.shape[2]}), got "
                         f"{student_local.shape}")  # fmt: skip
