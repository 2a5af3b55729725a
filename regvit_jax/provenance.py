"""Provenance: what computed a number, for records that outlive the machine."""

import functools
import os
import pathlib
import platform
from importlib import metadata

PACKAGES = ("regvit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


@functools.cache
def versions() -> dict[str, str]:
    """{package: version} of those installed that numbers depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """The commit that is checked out where the package lies; None where it was installed without its history.

    Changes that are not committed do not show.
    """
    git = pathlib.Path(__file__).parents[1] / ".git"
    try:
        if git.is_file():  # a linked worktree says where its own folder is
            git = (git.parent / git.read_text().removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        common = git / "commondir"
        folders = [git, *([(git / common.read_text().strip()).resolve()] if common.is_file() else [])]
        for folder in folders:
            if (folder / name).is_file():
                return (folder / name).read_text().strip()
        packed = (folders[-1] / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None


@functools.cache
def processor() -> str:
    """What the processor calls itself, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}"
