"""The workdir: one run at a time, one config for good, files that are whole."""

import json
import logging
import os
import socket

import jax
import pytest

from regvit_jax import config as configs
from regvit_jax.workdir import Workdir, WorkdirError


@pytest.fixture
def config():
    c = configs.defaults("supervised")
    c.data.train, c.model.width, c.model.registers = "npz:data.npz", 32, 2
    return c


def test_config_json_is_the_config(config, tmp_path):
    with Workdir(tmp_path / "a" / "run") as workdir:
        workdir.bind(config)
    written = json.loads((tmp_path / "a" / "run" / "config.json").read_text())
    assert configs.differences(written, config) == ({}, {})
    assert written["schema"] == configs.SCHEMA and written["model"]["width"] == 32 and written["model"]["pool"] is None


def test_another_config_is_refused_with_every_difference(config, tmp_path):
    with Workdir(tmp_path) as workdir:
        workdir.bind(config)
        before = (tmp_path / "config.json").read_text()
        config.optim.lr, config.model.registers, config.log_every = 0.5, 7, 99
        with pytest.raises(WorkdirError) as refusal:
            workdir.bind(config)
    lines = str(refusal.value).splitlines()
    assert lines[1:3] == ["  model.registers: 2 there, 7 now", "  optim.lr: 0.001 there, 0.5 now"]
    assert str(tmp_path) in lines[0] and "another --workdir" in lines[3] and len(lines) == 4
    assert (tmp_path / "config.json").read_text() == before


def test_runtime_keys_may_change_and_are_told(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Workdir(tmp_path) as workdir:
        workdir.bind(config)
        config.mesh.fsdp, config.data.workers = 4, 2
        config.evals.knn = configs.evaluator("knn", k=(3,))
        workdir.bind(config)
    assert "config.mesh.fsdp: was 1, is now 4" in caplog.text and "config.data.workers: was 0, is now 2" in caplog.text
    assert "config.evals.knn.k: was None, is now [3]" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["fsdp"] == 4


@pytest.mark.parametrize("schema", [0, 2, None])
def test_a_config_of_another_schema_is_refused(config, tmp_path, schema):
    with Workdir(tmp_path) as workdir:
        workdir.bind(config)
        written = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(written | {"schema": schema}))
        with pytest.raises(WorkdirError, match=f"config.json has config schema {schema}, this version reads 1"):
            workdir.bind(config)


def test_two_runs_at_once_are_refused_naming_host_and_process(tmp_path):
    with Workdir(tmp_path):
        for _ in range(2):
            with pytest.raises(
                WorkdirError, match=f"in use .*host {socket.gethostname()}, process {os.getpid()}, since"
            ):
                Workdir(tmp_path)
    Workdir(tmp_path).close()


def test_a_process_that_is_not_the_first_neither_locks_nor_writes(config, tmp_path):
    with Workdir(tmp_path / "run", active=False) as workdir:
        workdir.bind(config)
        workdir.record_environment(jax.devices())
    assert not (tmp_path / "run").exists()
    with Workdir(tmp_path / "run") as first, Workdir(tmp_path / "run", active=False) as second:
        first.bind(config)
        config.seed = 1
        with pytest.raises(WorkdirError, match="seed: 0 there, 1 now"):
            second.bind(config)


def test_a_relative_workdir_stays_where_it_was(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Workdir("runs/a") as workdir:
        monkeypatch.chdir("/")
        workdir.bind(config)
    assert workdir.path == tmp_path / "runs" / "a" and (workdir.path / "config.json").is_file()


def test_the_environment_is_recorded(tmp_path):
    with Workdir(tmp_path) as workdir:
        workdir.record_environment(jax.devices())
    record = json.loads((tmp_path / "env.json").read_text())
    assert record["versions"]["jax"] == jax.__version__ and len(record["devices"]) == 8
    assert record["host"] == socket.gethostname() and record["environment"]["JAX_PLATFORMS"] == "cpu"
    assert {path.name for path in tmp_path.iterdir()} == {"env.json", ".lock"}
