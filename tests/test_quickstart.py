"""The two quickstarts: the self-supervised one for 30 steps; both whole, which takes minutes, in `make soak` only."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from regvit_jax import loop, sharding, train

ROOT = pathlib.Path(__file__).parents[1]


def run(config, workdir):
    """(what the command of a quickstart printed, the lines of its metrics)."""
    command = [sys.executable, "-m", "regvit_jax.main", f"--config=configs/{config}", f"--workdir={workdir}"]
    # One device, as a user has it, and not the eight of the tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done, metrics(workdir)


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def before_and_after(lines):
    """The first and the last evaluation."""
    return (next(line for line in found if "knn/top1" in line) for found in (lines, lines[::-1]))


def test_thirty_steps_of_the_quickstart_without_labels(tmp_path, compiling_fast, monkeypatch, capsys):
    """All that the command does, on fewer scenes in smaller batches, and with probes that are not trained for long."""
    spec = importlib.util.spec_from_file_location("dinov2_scenes", ROOT / "configs" / "dinov2_scenes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.data.train, c.batch_size, c.total_steps, c.optim.warmup_steps = "scenes:?n=64&n_test=32", 16, 30, 3
    c.log_every, c.eval_every = 5, 30
    for options in c.evals.values():
        options.update({name: 2 for name in ("steps", "warmup_steps") if name in options})
    one = sharding.make_mesh(1, devices=jax.devices()[:1])
    monkeypatch.setattr(train.sharding, "make_mesh", lambda *sizes: one)
    monkeypatch.setattr(loop.flops, "measured_peak", lambda device, dtype: 1e11)
    with compiling_fast():
        result = train.run(c, tmp_path)
    assert (result.step, result.stopped) == (30, False)
    lines = metrics(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, *range(5, 31, 5)]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    most = math.log(c.dinov2.prototypes)
    assert all(0.01 * most < line["teacher_entropy"] < 0.99 * most for line in steps)
    # Sinkhorn-Knopp spreads 32 global crops over the prototypes.
    assert all(line["prototypes_used"] > 16 for line in steps)
    untrained, trained = before_and_after(lines)
    assert (untrained["step"], trained["step"]) == (0, 30)
    assert untrained.keys() == trained.keys() >= {"knn/top1", "linear/top1"}
    table = capsys.readouterr().out
    assert all(name in table for name in result.evals) and "untrained" in table
    assert (tmp_path / "eval/maps/maps.png").is_file() and (tmp_path / "checkpoints/30").is_dir()


@pytest.mark.soak
def test_the_quickstart_without_labels_learns_what_the_readme_says(tmp_path):
    _, lines = run("dinov2_scenes.py", tmp_path)
    untrained, trained = before_and_after(lines)
    assert untrained["step"] == 0 and trained["step"] == lines[-1]["step"]
    for probe in ("knn/top1", "linear/top1"):
        assert trained[probe] >= untrained[probe] + 0.12, probe


@pytest.mark.soak
def test_the_quickstart_learns_what_the_readme_says(tmp_path):
    done, lines = run("quickstart.py", tmp_path)
    untrained, trained = before_and_after(lines)
    assert (untrained["step"], trained["step"]) == (0, 568)
    assert untrained["knn/top1"] < 0.35 and trained["knn/top1"] > 0.8
    assert trained["linear/top1"] > 0.85
    assert trained["segmentation/miou"] > untrained["segmentation/miou"] + 0.08
    assert trained["depth/rmse"] < 0.97 * untrained["depth/rmse"]
    assert "knn/top1" in done.stdout and f"wrote {tmp_path / 'eval/maps/maps.png'}" in done.stderr
    assert (tmp_path / "eval/maps/maps.png").is_file()
