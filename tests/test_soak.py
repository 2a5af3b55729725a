"""Hours in minutes: two hundred kills of one run, and twenty thousand steps in flat memory.

make soak ARGS="tests/test_soak.py -s"          prints what it sees
REGVIT_SOAK_KILLS=20 REGVIT_SOAK_STEPS=3000     makes it short, to look at the test itself
"""

import importlib.util
import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from regvit_jax.checkpoint import Checkpoints

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("REGVIT_SOAK_KILLS", "200"))
LANES = min(2, os.cpu_count() or 1)
STEPS = int(os.environ.get("REGVIT_SOAK_STEPS", "20000"))
# A run must outlast its kills: each lets it go on for about this many steps.
STEPS_A_KILL = 25
TOTAL = f"--config.total_steps={STEPS_A_KILL * KILLS // LANES}"
SAVING = ("--config.save_every=5", "--config.log_every=1", "--config.eval_every=0")


def read(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


running = read(Path(__file__).with_name("running.py"))
ended, tiny = running.ended, running.tiny


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    with running.runs(tmp_path_factory.mktemp("soak")) as start:
        yield start


def test_kills_at_random_moments_change_nothing(start, tmp_path):
    """A fifth of them while the process starts, the others from a random step on, a random part of a second later:
    within steps, saves and deletions of old checkpoints. After each, the workdir is looked at as it lies.

    As many runs at once as there are cores, at most two.
    """
    straight = tmp_path / "straight"
    ended(start(straight, "", TOTAL, *SAVING))
    with ThreadPoolExecutor(LANES) as pool:
        for kills in [pool.submit(killed_again_and_again, start, tmp_path / str(n), n) for n in range(LANES)]:
            assert kills.result() == KILLS // LANES
    for finished in tmp_path.glob("?/*"):
        assert tiny.losses(finished) == tiny.losses(straight)
        running.assert_bitwise(running.state(finished), running.state(straight))


def killed_again_and_again(start, workdir, lane):
    rng = random.Random(lane)
    kills = rounds = restored = 0
    began = time.monotonic()
    while kills < KILLS // LANES:
        here = workdir / str(rounds)
        process = start(here, "", TOTAL, *SAVING, f"--config.data.workers={int(rng.random() < 0.05)}")
        if rng.random() < 0.2:
            wait_until(process, lambda: False, seconds=rng.uniform(0, 8))
        else:
            goal = newest(here) + rng.randint(1, 2 * STEPS_A_KILL - 10)
            wait_until(process, lambda here=here, goal=goal: newest(here) >= goal, seconds=300)
            time.sleep(rng.uniform(0, 0.1))
        if process.poll() is not None:  # It was done before it was killed: another one.
            ended(process)
            rounds, restored = rounds + 1, 0
            continue
        process.kill()
        process.communicate(timeout=60)
        kills += 1
        restored = assert_sound(here, restored)
        if kills % 10 == 0:
            print(f"run {lane}: {kills} kills, step {restored}, {time.monotonic() - began:.0f} s", flush=True)
    if here.exists():
        ended(start(here, "", TOTAL, *SAVING))
    return kills


def assert_sound(workdir, before):
    """The newest checkpoint is whole and no older than before, metrics.jsonl has no gap. Returns its step."""
    if not (workdir / "checkpoints").is_dir() or not running.complete(workdir):
        assert before == 0
        return 0
    with Checkpoints(workdir, create=False) as checkpoints:
        latest = checkpoints.latest()
        assert checkpoints.data()["step"] == checkpoints.meta()["step"] == latest >= before
        for item in ("params", "opt"):
            assert checkpoints.restore_item(item, latest)
    assert not list((workdir / "checkpoints").glob("*.corrupt*"))
    steps = [record["step"] for record in lines(workdir)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= latest
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == STEPS_A_KILL * KILLS // LANES
    return latest


def lines(workdir):
    """The records of metrics.jsonl without the last line, where it is torn."""
    try:
        text = (workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def newest(workdir):
    """The last step that was logged, by the end of the file alone: it is asked often."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            whole = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    except FileNotFoundError:
        return 0
    return json.loads(whole)["step"] if whole else 0


def wait_until(process, reached, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not reached():
        time.sleep(0.003)


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_of_the_host_is_flat(start, tmp_path, workers):
    """Every image is decoded anew, a checkpoint is written every 500 steps, every tenth step is logged.

    With a worker a tenth of the steps: a step then costs several times as much.
    """
    steps = STEPS // 10 if workers else STEPS
    flags = ["--config.save_every=500", "--config.log_every=10", f"--config.data.workers={workers}"]
    # A pipe that nobody reads would hold the run up.
    with (tmp_path / "log").open("w") as log:
        process = start(tmp_path, "", f"--config.total_steps={steps}", *flags, output=log)
    measured = {}
    while process.poll() is None:
        if (step := newest(tmp_path)) and step not in measured:
            measured[step] = resident_mib(process.pid)
        time.sleep(0.02)
    ended(process)
    at, mib = np.array(list(measured)), np.array(list(measured.values()))
    for low in range(0, steps, max(1, steps // 20)):
        here = mib[(at >= low) & (at < low + steps // 20)]
        if here.size:
            print(f"workers={workers}, steps {low:6d} to {low + steps // 20:6d}: {here.mean():7.1f} MiB", flush=True)
    early, late = mib[(at > 0.1 * steps) & (at < 0.2 * steps)], mib[at > 0.9 * steps]
    assert early.size and late.size
    # The least of each: a save holds a copy of the state for a moment.
    assert late.min() - early.min() < 8


def resident_mib(pid):
    """What the process itself holds: pages of files come and go as the system likes."""
    try:
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
    except (FileNotFoundError, ProcessLookupError, TypeError):
        return float("nan")
