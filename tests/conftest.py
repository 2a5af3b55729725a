"""The machine every test runs on: 8 fake CPU devices, no display, caches in a temporary folder.

All of it is environment variables: JAX, BLAS and matplotlib read them once, when they are first imported, and child
processes inherit them.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    if "jax" in sys.modules:
        raise pytest.UsageError("a pytest plugin imported jax before tests/conftest.py could ask it for 8 fake devices")
    worker = os.environ.get("PYTEST_XDIST_WORKER")  # None in the process that the user started
    if worker is None:
        config.stash[CACHE] = tempfile.mkdtemp(prefix="regvit_tests_")
        os.environ["REGVIT_TESTS_CACHE"] = config.stash[CACHE]
    # One folder a test process: two that prepare the same scenes at once are a test of its own, no accident of timing.
    os.environ["REGVIT_CACHE"] = str(Path(os.environ["REGVIT_TESTS_CACHE"], worker or "main"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["MPLBACKEND"] = "Agg"
    # A compilation found in somebody's cache would hide that a step is compiled twice.
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    _add_xla_flags(
        "--xla_force_host_platform_device_count=8",
        # 8 devices take turns on 2 cores: a slow meeting of all of them is no deadlock.
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
    if worker is not None:
        share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"):  # XLA takes NPROC for the number of cores
            os.environ.setdefault(variable, str(share))


def pytest_unconfigure(config: pytest.Config) -> None:
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)


@pytest.fixture(scope="session")
def compiling_fast():
    """() -> a context in which programs are compiled fast instead of running fast, for tests that run each of them once
    or twice. What was jitted before, as by a decorator, gains less: it keeps its own compiler options."""
    import jax

    jit, options = jax.jit, {"xla_cpu_use_fusion_emitters": False}  # a third of the time
    try:
        jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # the newest jaxlib has no other emitters
        options = {}

    def fast(*args, compiler_options=None, **rest):
        return jit(*args, compiler_options=options | (compiler_options or {}) or None, **rest)

    @contextlib.contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "jit", fast)
            jax.config.update("jax_disable_most_optimizations", True)
            try:
                yield
            finally:
                jax.config.update("jax_disable_most_optimizations", False)

    return context


def _add_xla_flags(*flags: str) -> None:
    """Adds flags that the caller did not set: XLA takes the last of two, and the caller's choice is to win."""
    present = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in flags if flag.split("=")[0] not in present]
    os.environ["XLA_FLAGS"] = " ".join([present, *missing]).strip()
