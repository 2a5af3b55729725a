"""The tiny run in processes of its own, through the command; for tests of what may happen to it.

A test file reads this one by its path, as the command does a config: tests are no package.
"""

import contextlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from regvit_jax.checkpoint import Checkpoints
from regvit_jax.trees import named

TINY = Path(__file__).with_name("tiny.py")
STEPS = 12


def read(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = read(TINY)


@contextlib.contextmanager
def runs(folder):
    """Gives start(workdir, what_happens, *flags, devices=1, cwd=None, within=(), output=a pipe): the running command.

    `within`: a command that runs this one. `output`: where it prints to.
    """
    source = tiny.write_npz(folder / "data.npz")
    running = []

    def start(workdir, happens="", *flags, devices=1, cwd=None, within=(), output=subprocess.PIPE):
        config = f"{TINY}:{happens}" if happens else TINY
        environment = os.environ | {
            "PYTHONPATH": str(TINY.parent.parent),
            "REGVIT_CACHE": str(folder / "cache"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            # Compiling well takes seconds, running less well takes milliseconds.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [*within, sys.executable, "-m", "regvit_jax.main", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--config.data.train={source}", f"--config.total_steps={STEPS}", *flags]
        pipe = {"stdout": output, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, env=environment, cwd=cwd or folder, start_new_session=True, **pipe))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()


def two(start, workdir, happens, *flags):
    """The two processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = [f"--coordinator=localhost:{port}", "--num_processes=2", *flags]
    first = start(workdir, happens, *together, "--process_id=0")
    return first, start(workdir, "0-slowly" if "slowly" in happens else "", *together, "--process_id=1")


def ended(process, code=0):
    """What a process printed, once it ended with this exit code."""
    try:
        printed, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after 240 s:\n{process.communicate()[0]}") from None
    assert process.returncode == code, printed
    return printed


def first_step(printed):
    """The step of the first progress line."""
    return int(re.search(r"^[\d:]+ +(\d+)/\d+ ", printed, re.MULTILINE)[1])


def complete(workdir):
    """Steps of the checkpoints that are whole, by their folders alone."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def state(workdir):
    with Checkpoints(workdir, create=False) as checkpoints:
        return named({item: checkpoints.restore_item(item) for item in ("params", "opt")})


def assert_bitwise(got, want):
    assert got.keys() == want.keys()
    for path in got:
        assert got[path].tobytes() == want[path].tobytes(), path


def flip(folder):
    """Changes one bit in the largest file below a folder."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
