"""Faults, with real processes: kills, signals in an evaluation, full disks, dead workers, damaged checkpoints.

Whatever happens to a run, the run that goes on from it ends with the losses, the evaluations and the bits of one that
nothing happened to.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from regvit_jax.checkpoint import Checkpoints
from regvit_jax.workdir import Workdir

pytestmark = pytest.mark.process

EVALUATING = ("--config.eval_every=4", "--config.keep=3")
FULL_THEN_LARGE = """
mount -t tmpfs -o size=$SIZE tmpfs $DISK || exit 99
"$@"
echo "ended with $?"
mount -o remount,size=64m $DISK
"$@" && cp -r $DISK/run $KEPT
"""


def read(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


running = read(Path(__file__).with_name("running.py"))
ended, first_step, complete = running.ended, running.first_step, running.complete


def records(workdir):
    """(step, loss and evaluations) of the lines of metrics.jsonl, in their order."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], {k: v for k, v in line.items() if k == "loss" or "/" in k}) for line in lines]


def assert_same_run(workdir, straight):
    assert records(workdir) == records(straight)
    running.assert_bitwise(running.state(workdir), running.state(straight))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    with running.runs(tmp_path_factory.mktemp("faults")) as start:
        yield start


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """The workdir of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("straight")
    ended(start(workdir, "", *EVALUATING))
    assert [step for step, values in records(workdir) if "accuracy/top1" in values] == [0, 4, 8, 12]
    assert complete(workdir) == [6, 9, 12]
    return workdir


def test_three_kills_lose_no_more_than_the_steps_since_the_last_checkpoint(start, straight, tmp_path):
    """Two within a tenth of a second, the time of some steps and a save, of a step that a seed names; one while a
    checkpoint is being written."""
    rng = random.Random(0)
    for newest in sorted(rng.sample(range(1, 8), 2)):
        process = start(tmp_path, "0-slightly", *EVALUATING)
        while process.poll() is None and newest not in records_so_far(tmp_path):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate(timeout=60)
        if (tmp_path / "checkpoints").exists() and complete(tmp_path):
            assert running.state(tmp_path)  # Orbax's half-written folders do not count.
    before = complete(tmp_path)[-1] if (tmp_path / "checkpoints").exists() and complete(tmp_path) else 0
    if before < 9:
        assert first_step(ended(start(tmp_path, "9-saving-SIGKILL", *EVALUATING), -signal.SIGKILL)) == before + 1
        assert complete(tmp_path)[-1] in (6, 9)  # 9 only if the disk was faster than the signal.
    ended(start(tmp_path, "", *EVALUATING))
    assert_same_run(tmp_path, straight)


def records_so_far(workdir):
    """Steps of a file whose last line may be torn, or that is not there yet."""
    try:
        text = (workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_signal_during_an_evaluation_saves_at_once_and_the_next_start_evaluates(start, straight, tmp_path):
    """At step 8, where no checkpoint is due; 4, the other evaluation, was finished before."""
    printed = ended(start(tmp_path, "8-evaluating-SIGTERM", *EVALUATING), 143)
    assert "the evaluation at step 8 is left to the next start" in printed and "stopped at step 8\n" in printed
    assert "Traceback" not in printed and complete(tmp_path)[-1] == 8
    assert records(tmp_path)[-1][0] == 8 and "loss" in records(tmp_path)[-1][1]
    ended(start(tmp_path, "", *EVALUATING))
    assert_same_run(tmp_path, straight)
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert set(checkpoints.meta(8)["metrics"]) == {"accuracy/top1", "accuracy/loss"}


def test_the_second_ctrl_c_interrupts_a_save_and_leaves_a_workdir_that_goes_on(start, straight, tmp_path):
    printed = ended(start(tmp_path, "6-saving-SIGINT-SIGINT", *EVALUATING), 130)
    assert "interrupted; the same command goes on from the newest checkpoint" in printed and "Traceback" not in printed
    last = complete(tmp_path)[-1]
    assert last in (3, 6)  # 6 only if the disk was faster than the signal.
    assert first_step(ended(start(tmp_path, "", *EVALUATING))) == last + 1
    assert_same_run(tmp_path, straight)


def test_a_data_worker_that_is_killed_is_replaced(start, straight, tmp_path):
    printed = ended(start(tmp_path, "3-worker-SIGKILL", *EVALUATING, "--config.data.workers=2"))
    assert "a data worker died (exit code -9, as when memory is full): all are started again at batch" in printed
    assert_same_run(tmp_path, straight)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(start, straight, tmp_path):
    """The newest has a byte changed in its arrays, which Orbax would not notice; the one before lacks a file."""
    shutil.copytree(straight, tmp_path / "run")
    running.flip(tmp_path / "run" / "checkpoints" / "12" / "params")
    (tmp_path / "run" / "checkpoints" / "9" / "opt" / "_METADATA").unlink()
    printed = ended(start(tmp_path / "run", "", *EVALUATING))
    assert "checkpoint 12 in " in printed and "(the bits of params are not those that were saved)" in printed
    assert "checkpoint 9 in " in printed and "going back to step 6" in printed and "Traceback" not in printed
    assert first_step(printed) == 7
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {
        *("6", "9", "12"),
        *("9.corrupt", "12.corrupt"),
    }
    assert_same_run(tmp_path / "run", straight)


def test_when_all_checkpoints_are_damaged_the_run_is_refused_and_nothing_changes(start, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    for step in ("6", "9", "12"):
        (tmp_path / "run" / "checkpoints" / step / "meta" / "metadata").write_text('{"step": ')
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    printed = ended(start(tmp_path / "run", "", *EVALUATING), 2)
    assert "error: no checkpoint in " in printed and "JSONDecodeError" in printed and "Traceback" not in printed
    assert "Put the folder back from a copy" in printed and "use another workdir" in printed
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before and complete(tmp_path / "run") == [6, 9, 12]


def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_room(start, straight, tmp_path):
    """A disk of memory that holds one checkpoint and a half; then the same disk, larger."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    alone = ["unshare", "-Urm"]
    try:
        subprocess.run([*alone, "mount", "-t", "tmpfs", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this system lets nobody mount a small disk: {error}")
    one = sum(4096 * (1 + path.stat().st_size // 4096) for path in (straight / "checkpoints" / "12").rglob("*"))
    within = [*alone, "env", f"SIZE={one * 3 // 2}", f"DISK={disk}", f"KEPT={kept}", "sh", "-c", FULL_THEN_LARGE, "-"]
    # Steps that take a moment and write nothing: so it is the checkpoint that fails, and not another file.
    printed = ended(start(disk / "run", "0-slightly", "--config.log_every=100", within=within))
    first, second = printed.split("ended with 1\n")
    told = first.splitlines()[-1]
    for part in (
        f"checkpoint 6 could not be written to {disk}/run/checkpoints: ",
        "RESOURCE_EXHAUSTED",
        " MiB are free there",
        "checkpoint 3 is whole, and the same command goes on from there",
    ):
        assert part in told, first
    assert "Traceback" not in first and first_step(second) == 4
    running.assert_bitwise(running.state(kept), running.state(straight))


def test_a_workdir_in_use_is_refused_by_both_processes(start, tmp_path):
    with Workdir(tmp_path):
        for process in running.two(start, tmp_path, ""):
            printed = ended(process, 2)
            assert "is in use by another run (host " in printed and f"process {os.getpid()}," in printed
            assert "Traceback" not in printed
    assert not (tmp_path / "config.json").exists()
