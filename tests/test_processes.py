"""Runs in processes of their own, through the command: signals, two processes, data workers, mistakes.

The runs of this file are one and the same in every number; what differs is what happens to them.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.process


def read(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


running = read(Path(__file__).with_name("running.py"))
tiny, ended, first_step, complete = running.tiny, running.ended, running.first_step, running.complete
state, assert_bitwise, STEPS = running.state, running.assert_bitwise, running.STEPS


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    with running.runs(tmp_path_factory.mktemp("processes")) as start:
        yield start


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


def test_no_worker_outlives_a_run_that_was_killed(start, tmp_path):
    """Workers hold the pipe that the run prints to: it ends when the last of them has ended."""
    run = start(tmp_path, "2-SIGKILL", "--config.data.workers=2")
    run.wait(timeout=240)
    run.communicate(timeout=20)


def test_one_process_two_processes_one_process(start, straight, tmp_path):
    """Each goes on where the one before stopped, but for a checkpoint that the disk damaged: the two agree on the one
    before. A signal to one of them, in the middle of an evaluation, stops both at the same place."""
    ended(start(tmp_path, "4-SIGTERM"), 143)
    running.flip(tmp_path / "checkpoints" / "4" / "params")
    evaluating = ["--config.eval_every=8", "--config.evals.accuracy.batch_size=1"]
    first, second = running.two(start, tmp_path, "8-evaluating-slowly-SIGTERM", *evaluating)
    printed, also = ended(first, 143), ended(second, 143)
    assert first_step(printed) == 4
    for text in (printed, also):
        assert "the bits of params are not those that were saved" in text and "going back to step 3" in text
        assert "the evaluation at step 8 is left to the next start" in text and "Traceback" not in text
    assert "stopped at step 8\n" in printed and complete(tmp_path)[-1] == 8
    assert list(tiny.losses(tmp_path)) == list(range(1, 9))
    assert first_step(ended(start(tmp_path))) == 9
    expected, got = tiny.losses(straight), tiny.losses(tmp_path)
    np.testing.assert_allclose([got[k] for k in expected], [expected[k] for k in expected], rtol=1e-5)


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
