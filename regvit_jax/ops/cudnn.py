"""cuDNN's fused attention on an NVIDIA GPU: what it can do, and token counts of any parity around a kernel that wants
even ones."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regvit_jax.sharding import AXES, BATCH, constrain
from regvit_jax.trees import Array

DTYPES = ("bfloat16", "float16")
OLDEST = (8, 0)  # compute capability of Ampere, the first with cuDNN's fused attention
HOPPER = (9, 0)


class Device(NamedTuple):
    """What a computation runs on: "cpu", "gpu" or "tpu", and on an NVIDIA GPU its compute capability."""

    platform: str
    capability: tuple[int, int] | None = None


def device_of(x: Array) -> Device:
    """Where a computation on `x` runs, as far as that is known while it is traced.

    An array outside jit knows its device, a mesh in use its own; otherwise it is JAX's default device. A function that
    is jitted without a mesh for arrays committed elsewhere is not recognised.
    """
    if not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array):
        return _describe(next(iter(x.devices())).platform)
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return _describe(abstract.platform)
    default = jax.config.jax_default_device
    return _describe(getattr(default, "platform", default) or jax.default_backend())


def _describe(platform: str) -> Device:
    if platform not in ("gpu", "cuda"):
        return Device(platform)
    # ROCm is a "gpu" too; it names its capability differently.
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.local_devices(backend="gpu")[0], "compute_capability", "")))
    return Device("gpu", (int(found[1]), int(found[2])) if found else None)


def obstacle(device: Device, dtype: str, head_dim: int, segmented: bool) -> str | None:
    """Why cuDNN cannot compute an attention; None if it can."""
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, and this runs on a {device.platform.upper()}"
    if device.capability is None or device.capability < OLDEST:
        return "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    if dtype not in DTYPES:
        return f"it needs {' or '.join(DTYPES)}, not {dtype}"
    most = 256 if device.capability >= HOPPER else 128
    if head_dim % 8 or head_dim > most:
        return f"on this GPU it needs a head dim that is a multiple of 8 and at most {most}, not {head_dim}"
    if segmented:
        return "segment_ids would be a bias of (N, N) numbers a head, which costs what it saves"
    return None


def cudnn_attention(q_bnhk: Array, k_bnhk: Array, v_bnhk: Array, *, causal: bool) -> Array:
    """softmax(q k^T / sqrt(K)) v for any N, forward and backward.

    JAX refuses an odd N as soon as a gradient is taken (it does so for the sake of a bias, but asks nowhere whether
    there is one). So an odd N gets one more row, and the kernel gets the true lengths: it reads no key behind them.
    The row is cut off again, so its gradient starts at zero, and what the kernel returns as the gradient of the added
    row is dropped by the transpose of the padding: nothing of it reaches the caller, whatever it is.

    Raises:
      NotImplementedError, RuntimeError: from JAX, while tracing, if the kernel or cuDNN itself is not there.
    """
    n = q_bnhk.shape[1]
    q_bnhk, k_bnhk, v_bnhk = (_placed(x) for x in (q_bnhk, k_bnhk, v_bnhk))
    if n % 2 == 0:
        return kernel(q_bnhk, k_bnhk, v_bnhk, None, causal)
    lengths_b = _split(_lengths(q_bnhk[:, 0, 0, 0] == 0, n))
    padded = (_placed(jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))) for x in (q_bnhk, k_bnhk, v_bnhk))
    return kernel(*padded, lengths_b, causal)[:, :n]


def kernel(q_bnhk: Array, k_bnhk: Array, v_bnhk: Array, lengths_b: Array | None, causal: bool) -> Array:
    """The fused kernel as JAX offers it. A mask would be turned into a bias, so none is ever passed."""
    lengths = {} if lengths_b is None else {"query_seq_lengths": lengths_b, "key_value_seq_lengths": lengths_b}
    return jax.nn.dot_product_attention(q_bnhk, k_bnhk, v_bnhk, is_causal=causal, implementation="cudnn", **lengths)


def _lengths(like_b: Array, n: int) -> Array:
    """(B,) int32, all n, mapped by every vmap that maps `like_b`, whose values nothing reads.

    JAX before 0.12 wants lengths that carry the mapped axis like q does; a constant has none.
    """

    @jax.custom_batching.custom_vmap
    def lengths(like):
        return jnp.full(like.shape, n, jnp.int32)

    @lengths.def_vmap
    def _(size, mapped, like):
        return lengths(like), mapped[0]

    return lengths(like_b)


def _placed(x_bnhk: Array) -> Array:
    """`x` split over the batch and the heads of the mesh in use.

    The partitioner may otherwise give q, k and v different layouts, or split the tokens; this kernel then stops the
    compilation.
    """
    sizes = _mesh_sizes()
    if not sizes:
        return x_bnhk
    batch = BATCH if x_bnhk.shape[0] % (sizes["data"] * sizes["fsdp"]) == 0 else None
    return constrain(x_bnhk, batch, None, "tensor" if x_bnhk.shape[2] % sizes["tensor"] == 0 else None, None)


def _split(x_b: Array) -> Array:
    sizes = _mesh_sizes()
    return constrain(x_b, BATCH) if sizes and x_b.shape[0] % (sizes["data"] * sizes["fsdp"]) == 0 else x_b


def _mesh_sizes() -> dict[str, int]:
    """{axis: size} of the mesh in use; empty without one of ours, and inside shard_map, where all is local."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if set(AXES) <= set(mesh.axis_names) and not mesh.manual_axes else {}
