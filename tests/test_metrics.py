"""Clock, progress line, writer and NaN stop: numbers by hand, torn files, and what a resume leaves in them."""

import json
import logging
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.metrics import Clock, Delayed, NonFiniteError, Writer, check_finite, duration, progress_line


class Time:
    """Seconds that pass when told to."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds

    def spend(self, seconds):
        self.seconds += seconds


def test_rates_of_an_interval():
    now = Time()
    clock = Clock(32, 100, devices=4, train_flops_per_image=1e9, peak_flops=1e10, now=now)
    now.spend(8)
    metrics = clock.tick(10)
    assert metrics["images_per_s"] == 40
    assert metrics["images_per_s_device"] == 10
    assert metrics["s_per_step"] == 0.8
    assert metrics["mfu"] == pytest.approx(40e9 / 4e10)
    assert metrics["eta_s"] == pytest.approx(90 * 0.8)
    assert metrics["elapsed_s"] == 8
    assert metrics["device_hours"] == pytest.approx(4 * 8 / 3600)
    assert "paused_s" not in metrics and "compile_s" not in metrics


def test_mfu_needs_a_known_peak():
    clock = Clock(32, 100, train_flops_per_image=1e9, peak_flops=None)
    assert "mfu" not in clock.tick(1)


def test_compilation_and_pauses_count_for_no_rate():
    now = Time()
    clock = Clock(10, 100, now=now)
    with clock.compiling():
        now.spend(60)
    now.spend(1)
    first = clock.tick(1)
    assert first["images_per_s"] == 10 and first["compile_s"] == 60
    with clock.paused(), clock.waiting():
        now.spend(30)
    now.spend(2)
    second = clock.tick(3)
    assert second["images_per_s"] == 10 and second["paused_s"] == 30
    assert "compile_s" not in second
    assert second["input_wait"] == 0, "an evaluation's waiting is not the loop's"
    assert second["elapsed_s"] == 93
    assert second["eta_s"] == pytest.approx(97 * (1 + 30 / 3)), "evaluations go on being made"


def test_pause_ends_with_an_error_too():
    now = Time()
    clock = Clock(10, 100, now=now)
    with pytest.raises(KeyError), clock.paused():
        now.spend(5)
        raise KeyError
    now.spend(1)
    assert clock.tick(1)["s_per_step"] == 1


def test_input_wait_is_a_share_of_the_interval():
    now = Time()
    clock = Clock(10, 100, now=now)
    for _ in range(4):
        with clock.waiting():
            now.spend(1)
        now.spend(3)
    assert clock.tick(4)["input_wait"] == 0.25
    now.spend(4)
    assert clock.tick(5)["input_wait"] == 0


def test_eta_follows_the_recent_rate_and_forgets_a_slow_start():
    now = Time()
    clock = Clock(1, 1000, now=now)
    now.spend(500)
    clock.tick(1)
    for step in range(2, 60):
        now.spend(1)
        eta = clock.tick(step)["eta_s"]
    assert eta == pytest.approx(1000 - 59)


def test_a_resumed_run_counts_from_its_start():
    now = Time()
    clock = Clock(10, 100, 50, device_hours=7.0, now=now)
    now.spend(3600)
    metrics = clock.tick(60)
    assert metrics["s_per_step"] == 360
    assert metrics["device_hours"] == 8
    assert clock._eta(100) == 0


def test_tick_without_a_step_is_refused():
    clock = Clock(10, 100, 5)
    with pytest.raises(ValueError, match="no step has passed"):
        clock.tick(5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (11.7, "12s"), (59.6, "1m00s"), (200, "3m20s"), (3599.9, "1h00m"), (3720, "1h02m"), (183_600, "2d03h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_progress_line_reads_in_one_glance():
    metrics = {"loss": 2.10341, "lr": 1e-3, "grad_norm": 1.234, "accuracy": 0.5}
    speed = {"images_per_s": 1812.3, "mfu": 0.412, "input_wait": 0.03, "eta_s": 3720, "elapsed_s": 90}
    assert progress_line(120, 5000, metrics | speed) == (
        " 120/5000   2.4%  loss  2.1034  lr 1.00e-03  grad    1.234   1,812 img/s  mfu 41.2%  wait   3%"
        "  eta  1h02m  run  1m30s"
    )
    assert progress_line(5, 5, {}) == "5/5 100.0%"


def test_progress_lines_stay_aligned():
    early = progress_line(1, 1000, {"loss": 11.5, "grad_norm": 123.4, "images_per_s": 9.87, "eta_s": 7260})
    late = progress_line(1000, 1000, {"loss": 0.5, "grad_norm": 12345.6, "images_per_s": 12345.6, "eta_s": 0})
    assert len(early) == len(late)


def lines(workdir):
    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_one_line_a_call_with_every_digit_and_at_once(tmp_path):
    loss = np.float32(0.1)
    writer = Writer(tmp_path / "new")
    writer.write(3, {"loss": loss, "count": 4, "array": np.ones(())})
    writer.write(3, {"top1": 0.5}, prefix="eval/knn/")
    assert lines(tmp_path / "new") == [
        {"step": 3, "loss": float(loss), "count": 4, "array": 1.0},
        {"step": 3, "eval/knn/top1": 0.5},
    ]
    writer.close()


def test_what_json_lacks_is_written_as_text_that_float_reads(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(1, {"a": float("nan"), "b": np.float32(np.inf), "c": -np.inf})
    (line,) = lines(tmp_path)
    assert line == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    assert np.isnan(float(line["a"])) and float(line["c"]) == -np.inf


@pytest.mark.parametrize("metrics", [{"m": np.ones(2)}, {"m": "text"}, {"m": None}, {"step": 2}])
def test_what_is_no_scalar_metric_is_refused_by_name(tmp_path, metrics):
    with Writer(tmp_path) as writer, pytest.raises(ValueError, match=next(iter(metrics))):
        writer.write(1, metrics)


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\0\0\0\n", b'3\n{"ste', b"\xff\xfe"])
def test_torn_last_line_is_cut_on_opening(tmp_path, torn):
    whole = b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
    with Writer(tmp_path) as writer:
        writer.write(3, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_a_file_that_is_only_torn_becomes_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"st')
    Writer(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_resumed_run_reads_as_one_without_interruption(tmp_path):
    def run(workdir, first, last, restored=None):
        with Writer(workdir) as writer:
            if restored is not None:
                writer.truncate_after(restored)
            for step in range(first, last + 1):
                writer.write(step, {"loss": 1 / step})
                if step % 2 == 0:
                    writer.write(step, {"top1": step / 10}, prefix="eval/")

    run(tmp_path / "straight", 1, 6)
    run(tmp_path / "broken", 1, 5)
    run(tmp_path / "broken", 3, 6, restored=2)
    assert lines(tmp_path / "broken") == lines(tmp_path / "straight")


def test_names_at_tells_which_evaluations_a_kill_left_out(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(4, {"loss": 1.0})
        writer.write(4, {"top1": 0.5}, prefix="eval/knn/")
        writer.write(5, {"loss": 1.0})
    with Writer(tmp_path) as writer:
        writer.truncate_after(4)
        assert writer.names_at(4) == {"loss", "eval/knn/top1"}
        assert writer.names_at(5) == set()


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with Writer(tmp_path) as writer, pytest.raises(ValueError, match="line 2"):
        writer.truncate_after(1)


def test_inactive_writer_leaves_no_trace(tmp_path):
    with Writer(tmp_path / "none", active=False) as writer:
        writer.truncate_after(3)
        writer.write(1, {"loss": 1.0})
        writer.image("map", 1, np.zeros((2, 2, 3), np.uint8))
        assert writer.names_at(1) == set()
    assert not (tmp_path / "none").exists()


def test_bucket_is_refused():
    with pytest.raises(ValueError, match="local workdir"):
        Writer("gs://bucket/run")


def events(workdir):
    """The TensorBoard events of a folder, from their record framing: length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(workdir.glob("events.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack("<Q", content[at : at + 8])
            found.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def test_tensorboard_gets_the_same_numbers_and_voids_what_a_resume_repeats(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(7, {"loss": 0.25}, prefix="train/")
        writer.image("map", 7, np.zeros((2, 2, 3), np.uint8))
    values = [(e.step, v) for e in events(tmp_path) for v in e.summary.value]
    assert [(step, v.simple_value) for step, v in values if v.tag == "train/loss"] == [(7, 0.25)]
    assert [(step, v.tag) for step, v in values if v.HasField("image")] == [(7, "map")]
    with Writer(tmp_path) as writer:
        writer.truncate_after(5)
        writer.write(6, {"loss": 0.5})
    assert any(e.HasField("session_log") and e.step == 6 for e in events(tmp_path))


def test_without_tensorboard_jsonl_goes_on_and_the_log_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with caplog.at_level(logging.WARNING), Writer(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 1.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert sum("TensorBoard" in record.getMessage() for record in caplog.records) == 1


def test_metrics_come_one_step_late():
    delayed = Delayed()
    assert delayed.push(1, {"loss": jnp.float32(0.5), "lr": 0.1}) is None
    assert delayed.push(2, {"loss": jnp.float32(0.25)}) == (1, {"loss": 0.5, "lr": 0.1})
    assert delayed.flush() == (2, {"loss": 0.25})
    assert delayed.flush() is None
    assert list(delayed.recent) == [(1, {"loss": 0.5, "lr": 0.1}), (2, {"loss": 0.25})]


def test_push_does_not_wait_for_the_step_it_is_given():
    class Pending:
        """A metric whose step is still running: reading it now would block the loop."""

        done = False

        def __array__(self, dtype=None, copy=None):
            assert self.done, "read before the next step was dispatched"
            return np.zeros((), np.float32)

    first, second = Pending(), Pending()
    delayed = Delayed()
    delayed.push(1, {"loss": first})
    first.done = True
    assert delayed.push(2, {"loss": second}) == (1, {"loss": 0.0})


def test_metrics_on_every_device_are_read():
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    everywhere = jax.device_put(jnp.float32(3), jax.NamedSharding(mesh, jax.P()))
    delayed = Delayed()
    delayed.push(1, {"loss": everywhere})
    assert delayed.flush() == (1, {"loss": 3.0})


def test_finite_metrics_pass():
    check_finite(1, {"loss": 1e30, "lr": 0})


def test_nan_stops_and_tells_all_one_needs():
    metrics = {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-3}
    recent = [(110, {"loss": 2.5}), (111, {"loss": 9.0}), (112, metrics)]
    with pytest.raises(NonFiniteError) as error:
        check_finite(112, metrics, 100, recent)
    assert isinstance(error.value, FloatingPointError)
    for part in (
        "step 112: loss is nan, grad_norm is inf",
        "lr=0.001",
        "loss before: 2.5 (step 110), 9 (step 111)",
        "last good checkpoint: step 100",
        "optim.lr",
    ):
        assert part in str(error.value)


def test_nan_without_a_checkpoint():
    with pytest.raises(NonFiniteError, match="no checkpoint was saved"):
        check_finite(1, {"loss": float("inf")})
