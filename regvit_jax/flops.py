"""FLOPs of a Vision Transformer by formula, the peak of a device, and what of it a run uses (MFU).

By formula, because a compiler's count sees the body of a scan once. One multiply-add is two FLOPs.
"""

import functools
import itertools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

_GATED = ("swiglu",)

# (pattern of device_kind, dense peak in 1e12 FLOP/s for 16-bit matmuls, the same for float32 as JAX runs it by default:
# TF32 where the GPU has it, plain float32 on older ones, one bfloat16 pass on a TPU). The first pattern that is found
# counts. Vendors' data sheets, without sparsity; GeForce: 16-bit with float32 accumulation. TPU v2 and v3 show each of
# their two cores as one device.
_PEAKS = (
    (r"B200", 2250, 1100),
    (r"H200 NVL|H100 NVL", 835, 418),
    (r"H200|GH200", 989, 494),
    (r"H100 PCIe", 756, 378),
    (r"H100", 989, 494),
    (r"A100", 312, 156),
    (r"A10\b", 125, 62.5),
    (r"V100-PCIE", 112, 14),
    (r"V100", 125, 15.7),
    (r"L40S", 362, 183),
    (r"L4\b", 121, 60),
    (r"T4\b", 65, 8.1),
    (r"RTX 5090", 209.5, 104.8),
    (r"RTX 4090", 165.2, 82.6),
    (r"RTX 3090", 71, 35.6),
    (r"TPU v2", 22.5, 22.5),
    (r"TPU v3", 61.5, 61.5),
    (r"TPU v4", 275, 275),
    (r"TPU v5 ?lite|TPU v5e", 197, 197),
    (r"TPU v5", 459, 459),
    (r"TPU v6", 918, 918),
)


def num_tokens(config, image_size: int | tuple[int, int] | None = None) -> int:
    """N: patches, registers and the class token of an image of `image_size` (None: config.image_size)."""
    size = config.image_size if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    patches = (height // config.patch_size) * (width // config.patch_size)
    return patches + config.registers + int(config.class_token)


def forward_flops(config, image_size: int | tuple[int, int] | None = None, *, kept: float = 1.0) -> float:
    """FLOPs of one image's forward pass: matmuls of the patch embedding, the blocks and the head.

    2 N per weight of the blocks, 4 N^2 D per block for attention (counted full: scores and weighted sum), 2 per patch
    and weight of the patch embedding, 2 per weight of the head. Norms, activations, softmax and an attention pooling
    head (under 2 %) are left out.

    Args:
      config: anything with width, depth, mlp_dim, activation, patch_size, image_size, registers, class_token and
          num_classes. `mlp_dim` is the hidden width after the gate of SwiGLU, which has three matrices and not two.
      image_size: side, or (height, width), in pixels; None: config.image_size.
      kept: share of the blocks' branches that is computed, where stochastic depth leaves some out.
    """
    tokens = num_tokens(config, image_size)
    patches = tokens - config.registers - int(config.class_token)
    matrices = 3 if config.activation in _GATED else 2
    block_weights = 4 * config.width**2 + matrices * config.width * config.mlp_dim
    blocks = config.depth * (2 * tokens * block_weights + 4 * tokens**2 * config.width)
    embedding = 2 * patches * 3 * config.patch_size**2 * config.width
    head = 2 * config.width * config.num_classes
    return float(kept * blocks + embedding + head)


def head_flops(config) -> float:
    """FLOPs of one token through a projection head and its prototypes.

    Args:
      config: anything with width, hidden, bottleneck, prototypes and layers (see `models.prototype_head.HeadConfig`).
    """
    sizes = [config.width, *[config.hidden] * (config.layers - 1), config.bottleneck, config.prototypes]
    return 2.0 * sum(inputs * outputs for inputs, outputs in itertools.pairwise(sizes))


def training_flops(config, image_size: int | tuple[int, int] | None = None) -> float:
    """FLOPs of one image's forward and backward pass, 3 x forward: what rematerialisation repeats does not count."""
    return 3.0 * forward_flops(config, image_size)


def peak_flops(device: jax.Device | str, dtype="bfloat16") -> float | None:
    """Peak matmul FLOP/s of one device by its `device_kind`; None for a CPU or a device that the table does not know.

    Args:
      device: a JAX device, or its device_kind.
      dtype: of the matmul operands: bfloat16, float16 or float32 (at JAX's default precision).

    Raises:
      ValueError: for another dtype.
    """
    column = {"bfloat16": 0, "float16": 0, "float32": 1}
    name = jnp.dtype(dtype).name
    if name not in column:
        raise ValueError(f"peaks are known for {', '.join(column)}, not for {name}")
    kind = device if isinstance(device, str) else device.device_kind
    for pattern, *peaks in _PEAKS:
        if re.search(pattern, kind):
            return peaks[column[name]] * 1e12
    return None


@functools.cache
def measured_peak(device: jax.Device, dtype="float32", n: int = 1024) -> float:
    """FLOP/s of an (n, n) matmul on this device, the best of a few: a stand-in where `peak_flops` is None.

    Measured once a process. It is a lower bound of what the hardware can do, and on a shared machine it varies: MFU
    against it is a rough figure.
    """
    with jax.default_device(device):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((n, n)), dtype)
        product = jax.jit(jnp.matmul)
        product(x, x).block_until_ready()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return 2.0 * n**3 / min(seconds)


def mfu(flops_per_image: float, images_per_second: float, num_devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation in [0, 1]: what the model needs over what the devices could do; None for an unknown peak.

    Args:
      flops_per_image: `training_flops` or `forward_flops` (summed over crops, where one image is seen as several).
      images_per_second: of all devices together.
      num_devices: how many share that work.
      peak: FLOP/s of one device, from `peak_flops` or `measured_peak`.
    """
    if peak is None:
        return None
    return flops_per_image * images_per_second / (num_devices * peak)
