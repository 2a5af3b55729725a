"""Runs in processes of their own, through the command: signals, kills, two processes, data workers.

The runs of this file are one and the same in every number; what differs is what happens to them.
"""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from regvit_jax.checkpoint import Checkpoints
from regvit_jax.trees import named

pytestmark = pytest.mark.process

TINY = Path(__file__).with_name("tiny.py")
STEPS = 12


def read(path):
    """A config file is read by its path, as the command does."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = read(TINY)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(workdir, what_happens, *flags, devices=1, cwd=None): the running command."""
    folder = tmp_path_factory.mktemp("processes")
    source = tiny.write_npz(folder / "data.npz")
    running = []

    def start(workdir, happens="", *flags, devices=1, cwd=None):
        config = f"{TINY}:{happens}" if happens else TINY
        environment = os.environ | {
            "PYTHONPATH": str(TINY.parent.parent),
            "REGVIT_CACHE": str(folder / "cache"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            # Compiling well takes seconds, running less well takes milliseconds.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "regvit_jax.main", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--config.data.train={source}", f"--config.total_steps={STEPS}", *flags]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, env=environment, cwd=cwd or folder, start_new_session=True, **pipe))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()


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
    return int(re.search(rf"^[\d:]+ +(\d+)/{STEPS} ", printed, re.MULTILINE)[1])


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


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """The workdir of a run that nothing happened to, given relative to where it was started."""
    folder = tmp_path_factory.mktemp("straight")
    printed = ended(start("runs/a", cwd=folder))
    workdir = folder / "runs" / "a"
    assert list(tiny.losses(workdir)) == list(range(1, STEPS + 1))
    assert complete(workdir)[-1] == STEPS
    assert first_step(printed) == 1 and str(workdir) in printed and "Traceback" not in printed
    return workdir


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_next_process_goes_on_from_there(start, straight, tmp_path, name):
    """With workers, which a terminal's Ctrl-C reaches too. Data workers do not change a number either."""
    printed = ended(start(tmp_path, f"5-group-{name}", "--config.data.workers=2"), 143)
    assert f"{name}: saving and stopping after this step" in printed and "stopped at step 5\n" in printed
    assert "Traceback" not in printed
    assert complete(tmp_path)[-1] == 5 and list(tiny.losses(tmp_path)) == [1, 2, 3, 4, 5]
    assert first_step(ended(start(tmp_path))) == 6
    assert tiny.losses(tmp_path) == tiny.losses(straight)
    assert_bitwise(state(tmp_path), state(straight))


def test_kills_lose_no_more_than_the_steps_since_the_last_checkpoint(start, straight, tmp_path):
    """One between two saves, one while a checkpoint is being written."""
    ended(start(tmp_path, "5-settled-SIGKILL"), -signal.SIGKILL)
    assert complete(tmp_path) == [3] and list(tiny.losses(tmp_path))[-1] >= 4
    printed = ended(start(tmp_path, "9-saving-SIGKILL"), -signal.SIGKILL)
    assert first_step(printed) == 4
    last = complete(tmp_path)[-1]
    assert last in (6, 9)  # 9 only if the disk was faster than the signal.
    assert first_step(ended(start(tmp_path))) == last + 1
    assert tiny.losses(tmp_path) == tiny.losses(straight)
    assert_bitwise(state(tmp_path), state(straight))


def test_no_worker_outlives_a_run_that_was_killed(start, tmp_path):
    """Workers hold the pipe that the run prints to: it ends when the last of them has ended."""
    run = start(tmp_path, "2-SIGKILL", "--config.data.workers=2")
    run.wait(timeout=240)
    run.communicate(timeout=20)


def test_two_processes_train_like_one_stop_together_and_leave_a_checkpoint_for_one(start, straight, tmp_path):
    """A signal to one of them stops both after the same step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    first = start(tmp_path, "3-slowly-SIGTERM", *together, "--process_id=0")
    second = start(tmp_path, "0-slowly", *together, "--process_id=1")
    printed = ended(first, 143)
    ended(second, 143)
    stopped = int(re.search(r"stopped at step (\d+)\n", printed)[1])
    assert 3 <= stopped < STEPS and complete(tmp_path)[-1] == stopped
    expected, together = tiny.losses(straight), tiny.losses(tmp_path)
    assert list(together) == list(range(1, stopped + 1))
    np.testing.assert_allclose([together[k] for k in together], [expected[k] for k in together], rtol=1e-5)
    assert first_step(ended(start(tmp_path))) == stopped + 1
    alone = tiny.losses(tmp_path)
    np.testing.assert_allclose([alone[k] for k in expected], [expected[k] for k in expected], rtol=1e-5)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.optim.lrr=3", "config.optim.lrr is no key; did you mean lr? --keys lists all of them"),
        ("--config.batch_size=many", "flag --config.batch_size=many: invalid literal for int() with base 10: 'many'"),
        (
            "--confg=a.py",
            "Unknown command line flag 'confg'. Did you mean: config, config.data.train, config.total_steps ?",
        ),
        (
            "--config.model.image_size=20",
            "config.model: image height 20 is not a multiple of the patch size 8; "
            "the nearest valid sizes are 16 and 24",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(start, tmp_path, flag, message):
    printed = ended(start(tmp_path / "run", "", flag), 2)
    assert printed.splitlines()[-1] == f"error: {message}" and "Traceback" not in printed
    assert not (tmp_path / "run" / "config.json").exists()
