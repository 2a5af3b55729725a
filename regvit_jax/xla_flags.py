"""Compiler flags that help on a device, appended to XLA_FLAGS before JAX starts its backend. Imports no JAX.

What the user already set in XLA_FLAGS stays as it is. `--config.xla_flags=none` or REGVIT_XLA_FLAGS=none in the
environment turns this off.

XLA ends the process at a flag that it does not know, and flags come and go with every jaxlib. So a child process lets
the installed jaxlib read the flags first (a quarter of a second, no device is touched), and only those that it accepts
are appended. The compiler of a GPU lives in a plugin, though: if its version is not that of jaxlib, nothing is.
"""

import functools
import glob
import logging
import os
import subprocess
import sys
from importlib import metadata

SWITCH = "REGVIT_XLA_FLAGS"
CHOICES = ("default", "none")

# One NVIDIA GPU and more. Triton's matrix products keep cuBLASLt from fusing bias and GELU into its own: without them
# ViT-L/14 forward made 2607 instead of 2413 images/s with tanh GELU, and as many as before with the exact one (one
# H100, batch 128).
GPU = ("--xla_gpu_enable_triton_gemm=false",)

# Several GPUs. Advice of JAX's and NVIDIA's guides to GPU performance, not measured here: overlap communication with
# computation, and gather or reduce a whole block at once. The bound is the float32 weights of a ViT-g block, 113 MB.
_BLOCK_BYTES = 128 * 2**20
SEVERAL_GPUS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    f"--xla_gpu_all_gather_combine_threshold_bytes={_BLOCK_BYTES}",
    f"--xla_gpu_reduce_scatter_combine_threshold_bytes={_BLOCK_BYTES}",
    f"--xla_gpu_all_reduce_combine_threshold_bytes={_BLOCK_BYTES}",
)

_GPU_FILES = ("/dev/nvidia[0-9]*", "/proc/driver/nvidia/gpus/*", "/dev/dxg")
_PROBE = "from jaxlib import _jax; _jax.CompileOptions().executable_build_options.debug_options"


def append(choice: str = "default", *, distributed: bool = False) -> tuple[str, ...]:
    """Appends what helps on the device here to os.environ["XLA_FLAGS"]. Call it before anything asks for a device.

    Args:
      choice: "default", or "none" to do nothing, as does REGVIT_XLA_FLAGS=none in the environment.
      distributed: the run has several processes, so several GPUs even where this process sees one.

    Returns:
      The flags that were appended: () on a CPU and on a TPU, where none was found to help.

    Raises:
      ValueError: for a choice that is neither.
    """
    for name, value in (("xla_flags", choice), (SWITCH, os.environ.get(SWITCH) or "default")):
        if value not in CHOICES:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(CHOICES)}")
        if value == "none":
            return ()
    if platform() != "cuda":
        return ()
    present = os.environ.get("XLA_FLAGS", "")
    if present.strip() and not present.lstrip().startswith("-"):
        logging.info("xla flags: none added, XLA_FLAGS names a file (%s)", present)
        return ()
    flags = GPU + SEVERAL_GPUS if distributed or num_gpus() > 1 else GPU
    named = {_name(flag) for flag in present.split()}
    flags = _known(tuple(flag for flag in flags if _name(flag) not in named))
    if flags:
        os.environ["XLA_FLAGS"] = " ".join([*present.split(), *flags])
        logging.info("xla flags: added %s (--config.xla_flags=none keeps them out)", " ".join(flags))
    return flags


def platform() -> str:
    """ "cuda", "tpu", … or "cpu": what JAX will run on, by JAX_PLATFORMS, device files and installed plugins."""
    asked = os.environ.get("JAX_PLATFORMS", "").split(",")[0].strip().lower()
    if asked:
        return "cuda" if asked == "gpu" and _plugin_versions() else asked
    if _plugin_versions() and num_gpus():
        return "cuda"
    return "tpu" if _version("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) else "cpu"


def num_gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    # The driver's files, where not all of them are shown to a container; and Windows' way to them.
    files = next((n for n in map(len, map(glob.glob, _GPU_FILES)) if n), 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return files
    names = [name.strip() for name in visible.split(",")]
    # CUDA stops at the first name that is none: "-1" or "" hides all.
    wanted = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return min(files, wanted) if files else 0


def _known(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `flags` that the installed XLA reads."""
    if not flags:
        return ()
    jaxlib, plugins = _version("jaxlib"), _plugin_versions()
    if any(version.split(".")[:3] != jaxlib.split(".")[:3] for version in plugins):
        logging.info("xla flags: none added, the CUDA plugin %s is not of jaxlib %s", ", ".join(plugins), jaxlib)
        return ()
    # All at once, as they nearly always pass; one by one if not.
    if _accepted(flags):
        return flags
    passed = tuple(flag for flag in flags if _accepted((flag,)))
    logging.info("xla flags: jaxlib %s does not know %s", jaxlib, " ".join(sorted({*flags} - {*passed})))
    return passed


@functools.cache
def _accepted(flags: tuple[str, ...]) -> bool:
    """Whether a fresh process whose XLA_FLAGS are `flags` survives reading them."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    try:
        child = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return child.returncode == 0


def _plugin_versions() -> tuple[str, ...]:
    """Versions of the installed packages that hold XLA for CUDA."""
    found = (_version(f"jax-cuda{major}-pjrt") for major in (12, 13, 14))
    return tuple(version for version in found if version)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _name(flag: str) -> str:
    return flag.lstrip("-").partition("=")[0]
