"""Damaged checkpoints, full disks and odd workdirs, in one process: what is noticed, what is said, what stays."""

import errno
import importlib.util
import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import regvit_jax as rv
from regvit_jax import config as configs
from regvit_jax import hub, main, metrics, sharding, stopping
from regvit_jax.checkpoint import CheckpointDamaged, CheckpointMismatch, CheckpointNotSaved, Checkpoints
from regvit_jax.data import workers
from regvit_jax.metrics import Writer
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model, abstract_params
from regvit_jax.trees import map_named
from regvit_jax.workdir import Workdir, WorkdirError

# Reads that Orbax began and gave up, after the first damaged file, end when nobody listens any more.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

VIT = ViTConfig(width=8, depth=1, num_heads=1, mlp_dim=8, patch_size=8, image_size=(8, 8), registers=1, num_classes=2)


def state(step):
    rng = np.random.default_rng(step)
    params = map_named(lambda _, leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), abstract_params(VIT))
    return {"step": np.int32(step), "params": params, "opt": {"mu": jnp.full(300, step, jnp.bfloat16)}, "extras": {}}


def wanted():
    one = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=one), state(0))


def save(checkpoints, step, **options):
    names = map_named(lambda path, _: f"params/{path}", abstract_params(VIT))
    meta = {"model": hub.locate(Model(names, VIT)), "note": "é"}
    return checkpoints.save(step, state(step), data={"step": step}, meta=meta, wait=True, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step)
    return workdir


@pytest.fixture
def workdir(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(step):
    os.truncate(largest(step / "params" / "ocdbt.process_0"), 100)


def empty(step):
    os.truncate(step / "opt" / "manifest.ocdbt", 0)


def flip_an_array(step):
    path = largest(step / "params" / "ocdbt.process_0")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def flip_a_text(step):
    """Still JSON: another name of the note."""
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"note"', '"nose"'))


DAMAGE = {
    "an array file that was cut": (cut, "OUT_OF_RANGE"),
    "an empty file": (empty, "DATA_LOSS"),
    "a missing description": (lambda step: (step / "params" / "_METADATA").unlink(), "AttributeError"),
    "no JSON": (lambda step: (step / "data" / "metadata").write_text('{"st'), "JSONDecodeError"),
    "a missing item": (lambda step: shutil.rmtree(step / "opt"), "the folder opt is missing"),
    "a folder with nothing in it": (lambda step: (shutil.rmtree(step), step.mkdir()), "KeyError"),
    "a bit of an array": (flip_an_array, "the bits of params are not those that were saved"),
    "a letter of the text": (flip_a_text, "data or meta is not what was saved"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_put_aside_and_saved_again(workdir, what, caplog):
    damage, why = DAMAGE[what]
    damage(workdir / "checkpoints" / "3")
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(CheckpointDamaged, match="checkpoint 3 in "):
            checkpoints.restore(wanted(), 3)
        restored, data, meta = checkpoints.restore(wanted())
        assert (int(restored["step"]), data["step"], meta["step"]) == (2, 2, 2)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), restored["params"], state(2)["params"]))
        assert "checkpoint 3 in " in caplog.text and why in caplog.text and "going back to step 2" in caplog.text
        assert checkpoints.steps() == [1, 2] and (workdir / "checkpoints" / "3.corrupt").is_dir()
        save(checkpoints, 3)
        damage(workdir / "checkpoints" / "3")
        assert int(checkpoints.restore(wanted())[0]["step"]) == 2
        assert (workdir / "checkpoints" / "3.corrupt1").is_dir(), "a second one does not overwrite the first"


@pytest.mark.parametrize("what", ["an array file that was cut", "a bit of an array", "no JSON"])
def test_reading_goes_back_too_and_moves_nothing(workdir, what, caplog):
    DAMAGE[what][0](workdir / "checkpoints" / "3")
    model = rv.load_model(workdir)
    assert (model.params["norm"]["scale"] == state(2)["params"]["norm"]["scale"]).all()
    assert "checkpoint 3 in " in caplog.text and "going back to step 2" in caplog.text
    with Checkpoints(workdir, create=False) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        assert checkpoints.restore_item("opt")["mu"][0] == (2 if what == "no JSON" else 3)


def test_when_all_are_damaged_each_is_named_and_none_is_touched(workdir):
    for step in (1, 2, 3):
        cut(workdir / "checkpoints" / str(step))
    with Checkpoints(workdir) as checkpoints, pytest.raises(CheckpointDamaged) as error:
        checkpoints.restore(wanted())
    for part in ("no checkpoint in ", *(f"checkpoint {step} in " for step in (1, 2, 3)), "Nothing was changed"):
        assert part in str(error.value)
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
    with pytest.raises(ValueError, match="no checkpoint in "):
        rv.load_model(workdir)


def test_another_model_is_no_damage(workdir):
    other = wanted()
    other["opt"] = {"mu": jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=other["opt"]["mu"].sharding)}
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(CheckpointMismatch, match=r"opt/mu: \(300,\) bfloat16 there, \(4,\) bfloat16 here"):
            checkpoints.restore(other)
        assert checkpoints.steps() == [1, 2, 3]


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(errno.EACCES, "no"), OSError(errno.EMFILE, "many")])
def test_what_this_machine_lacks_is_no_damage(workdir, monkeypatch, error):
    def fail(*args, **options):
        raise error

    with Checkpoints(workdir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(type(error)):
            checkpoints.restore(wanted())
        assert checkpoints.steps() == [1, 2, 3]


def test_a_checkpoint_without_checksums_is_taken(workdir):
    """As an older version wrote it."""
    for step in (2, 3):
        path = workdir / "checkpoints" / str(step) / "meta" / "metadata"
        before, _, after = path.read_text().partition('"checksums": {')
        path.write_text(before + '"older": {' + after)
    with Checkpoints(workdir) as checkpoints:
        assert int(checkpoints.restore(wanted())[0]["step"]) == 3


def test_a_score_that_comes_later_is_known_after_a_restart(workdir):
    with Checkpoints(workdir, keep=1, keep_best="knn/top1") as checkpoints:
        checkpoints.note(2, {"knn/top1": 0.9, "loss": float("nan")})
        checkpoints.note(3, {"knn/top1": 0.5})
        assert checkpoints.best() == 2
    with Checkpoints(workdir, keep=1, keep_best="knn/top1") as checkpoints:
        assert checkpoints.meta(2)["metrics"] == {"knn/top1": 0.9, "loss": None}
        save(checkpoints, 4)
        assert checkpoints.steps() == [2, 4]


def test_a_save_that_fails_says_where_the_run_can_go_on(workdir, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(workdir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(CheckpointNotSaved) as error:
            save(checkpoints, 4)
    for part in (
        "checkpoint 4 could not be written to ",
        "No space left",
        "MiB are free there",
        "checkpoint 3 is whole",
    ):
        assert part in str(error.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_told_of_metrics_and_does_not_hang_tensorboard(tmp_path, caplog):
    writer = Writer(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer._file.close()
    writer._file = open("/dev/full", "a")  # every write to it fails as on a full disk
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/metrics.jsonl'"):
        writer.write(2, {"loss": 1.0})
    events = writer._tensorboard.file_writer.event_writer
    events._ev_writer.write_event = lambda event: 1 / 0  # its thread ends as it does of a disk that is full
    writer._file = open(os.devnull, "a")
    for step in range(200):
        writer.write(step, {"loss": 1.0, "lr": 0.1})
        events._worker.join(timeout=1.0 if step == 0 else 0)
    writer.close()
    assert "TensorBoard events end here" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_line_of_metrics_that_is_no_text_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    with Writer(tmp_path) as writer, pytest.raises(ValueError, match="metrics.jsonl, line 2 is no JSON object"):
        writer.truncate_after(1)


@pytest.mark.parametrize("content", ["", '{"schema": ', "[1]", "\x00\x00"])
def test_a_damaged_config_json_is_refused_with_a_way_out(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with Workdir(tmp_path) as workdir, pytest.raises(WorkdirError, match="config.json is damaged.*delete it"):
        workdir.bind(configs.defaults("supervised"))
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_is_no_workdir(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkdirError, match="it is a file, or lies below one"):
        Workdir(tmp_path / "file" / below)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(WorkdirError, match=r"cannot be written \(Permission denied\): give a --workdir"):
        Workdir(tmp_path)
    with pytest.raises(WorkdirError, match="cannot be written"):
        Workdir("/proc/regvit")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with Workdir(tmp_path):
        assert "has no locks" in caplog.text and "no other run" in caplog.text


def test_what_a_stop_may_break_it_breaks_and_nothing_else():
    stopping.poll()
    stop = stopping.Stop()
    with stop.breaking():
        stopping.poll()
    stop._ask(15, None)
    stopping.poll()
    with pytest.raises(stopping.Stopped), stop.breaking():
        try:
            stopping.poll()
        except Exception:
            pytest.fail("an evaluator that catches everything would go on")
    stopping.poll()


def test_what_one_process_refuses_all_refuse(monkeypatch):
    """Seen from process 1, which has no error itself, and from one that has."""
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(stopping, "_told_by_everyone", lambda text: told.append(text) or ["in use", text])
    with pytest.raises(ValueError, match="^process 0: in use$"), stopping.together():
        pass
    with pytest.raises(KeyError, match="mine"), stopping.together():
        raise KeyError("mine")
    assert told == ["", "'mine'"]
    assert stopping.differing("another") == [1] and stopping.differing("in use") == []


def deaths(monkeypatch, after):
    """A Grain whose worker dies after so many batches, each time it is started. Returns where it was started."""
    starts = []

    def grain(batches, workers, start=0):
        starts.append(start)
        yield from range(start, min(start + after, len(batches)))
        if start + after < len(batches):
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs")

    monkeypatch.setattr(workers, "_grain", grain)
    return starts


def test_workers_that_die_now_and_then_are_started_again(monkeypatch):
    starts = deaths(monkeypatch, after=150)
    assert list(workers.iterate(range(1000), 2)) == list(range(1000))
    assert starts == [0, 150, 300, 450, 600, 750, 900]


def test_workers_that_die_at_once_end_the_run(monkeypatch, caplog):
    starts = deaths(monkeypatch, after=1)
    with pytest.raises(workers.WorkersDied, match="died 4 times within 100 batches.*exit code -9.*data.workers"):
        list(workers.iterate(range(10), 2))
    assert starts == [0, 1, 2, 3] and caplog.text.count("all are started again") == 3


def test_other_errors_of_workers_are_raised_as_they_are(monkeypatch):
    def grain(batches, workers, start=0):
        yield 1
        raise RuntimeError("a transform")

    monkeypatch.setattr(workers, "_grain", grain)
    with pytest.raises(RuntimeError, match="^a transform$"):
        list(workers.iterate(range(10), 2))


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/run/metrics.jsonl"), "/run/metrics.jsonl: No space left"),
        (CheckpointNotSaved("checkpoint 9 could not be written"), "checkpoint 9 could not be written"),
        (workers.WorkersDied("data workers died"), "data workers died"),
        (metrics.NonFiniteError("step 3"), "step 3"),
    ],
)
def test_what_ends_a_run_is_one_message_and_exit_code_1(monkeypatch, tmp_path, caplog, error, message):
    def run(config, workdir):
        raise error

    read = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
    tiny = importlib.util.module_from_spec(read)
    read.loader.exec_module(tiny)
    monkeypatch.setattr("regvit_jax.train.run", run)
    monkeypatch.setattr(main, "_CONFIG", type("Flag", (), {"value": tiny.get_config()}))
    monkeypatch.setattr(main, "_WORKDIR", type("Flag", (), {"value": str(tmp_path)}))
    monkeypatch.setattr(main, "set_up_logging", lambda: None)
    monkeypatch.setattr(main, "_leave", lambda code: code)
    monkeypatch.setenv("REGVIT_XLA_FLAGS", "none")
    flags.FLAGS.mark_as_parsed()
    assert main.main(["regvit"]) == 1
    assert [
        record.getMessage().startswith(message) for record in caplog.records if record.levelno == logging.ERROR
    ] == [True]
