"""The training loop: the same numbers after every interruption and from every cache; what ends a run."""

import dataclasses
import importlib.util
import json
import logging
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax import hub, loop, main, sharding, stopping, train
from regvit_jax.checkpoint import Checkpoints
from regvit_jax.evaluate import Scheduled
from regvit_jax.metrics import NonFiniteError
from regvit_jax.recipes.base import Recipe
from regvit_jax.trees import named
from regvit_jax.workdir import WorkdirError


def read(path):
    """A config file is read by its path, as the command does."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = read(Path(__file__).with_name("tiny.py"))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The runs here are mostly one program, so it is kept; compiling it well would take longer than running it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.flops, "measured_peak", lambda device, dtype: 1e11)
        jax.config.update("jax_disable_most_optimizations", True)
        train.use_compilation_cache("default")
        yield
        jax.config.update("jax_disable_most_optimizations", False)
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "train.npz")


@pytest.fixture
def config(source):
    return tiny.everything(source)


def mesh_of(data, fsdp=1):
    return sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


def stop_at(monkeypatch, step):
    monkeypatch.setattr(stopping.Stop, "requested", lambda self, done: done == step)


def saved_state(workdir):
    """{path: leaf} of the newest checkpoint."""
    with Checkpoints(workdir, create=False) as checkpoints:
        items = {item: checkpoints.restore_item(item) for item in ("params", "opt", "extras")}
        return named(items)


def assert_bitwise(got, want):
    assert got.keys() == want.keys()
    for path, leaf in got.items():
        assert np.asarray(leaf).tobytes() == np.asarray(want[path]).tobytes(), path


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    """The workdir of a run of 10 steps that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("straight")
    result = train.run(tiny.everything(source), workdir)
    assert (result.step, result.stopped) == (10, False)
    return workdir


def test_a_stopped_and_resumed_run_is_bitwise_the_same(config, straight, tmp_path, monkeypatch, caplog):
    built = []
    build = train.build_step
    monkeypatch.setattr(train, "build_step", lambda *args: built.append(build(*args)) or built[-1])
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        result = train.run(config, tmp_path)
    assert (result.step, result.stopped) == (3, True)
    assert list(tiny.losses(tmp_path)) == [1, 2, 3]
    config.data.cache, config.save_every = "device", 4  # Keys that may change, and do not change a bit.
    assert train.run(config, tmp_path).step == 10
    assert tiny.losses(tmp_path) == tiny.losses(straight)
    assert_bitwise(saved_state(tmp_path), saved_state(straight))
    assert [step.update._cache_size() for step in built] == [1, 1]
    assert "resumed at step 3 of 10" in caplog.text
    assert "config.data.cache: was 'none', is now 'device'" in caplog.text
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.steps() == [8, 10]


def test_a_finished_run_does_nothing_when_it_is_started_again(config, straight):
    before = (straight / "metrics.jsonl").read_text()
    assert train.run(config, straight).step == 10
    assert (straight / "metrics.jsonl").read_text() == before


def test_the_saved_model_is_the_average_of_weights(straight):
    model, state = rv.load_model(straight), saved_state(straight)
    ema = {path.removeprefix("extras/ema/"): leaf for path, leaf in state.items() if path.startswith("extras/ema/")}
    assert_bitwise(named(model.params), ema)
    assert any((leaf != state[f"params/{path}"]).any() for path, leaf in ema.items())
    assert (model.config.num_classes, model.preprocessing.size) == (tiny.CLASSES, 16)


def test_a_run_can_start_from_the_weights_of_another(config, straight, tmp_path, monkeypatch):
    """Its optimiser and step start anew."""
    config.init_from = str(straight)
    loaded = {"init_from": hub.load_model(straight)}
    config, _, _ = train.prepare(config)
    mesh = mesh_of(1)
    with jax.set_mesh(mesh):
        state = train.build_step(config, mesh, loaded).init()
    assert_bitwise(named(state["params"]), named(loaded["init_from"].params))
    assert int(state["step"]) == 0 and not any(jnp.any(x) for x in jax.tree.leaves(state["opt"]))


def test_decoding_once_onto_the_host_changes_no_loss(config, straight, tmp_path):
    config.data.cache, config.save_every = "host", 0
    train.run(config, tmp_path)
    assert tiny.losses(tmp_path) == tiny.losses(straight)


def test_a_run_without_saves_and_evaluations(config, tmp_path):
    config.total_steps, config.save_every, config.log_every = 10, 0, 4
    config.evals = {"absent": {"type": "no such evaluator"}}
    result = train.run(config, tmp_path)
    assert list(tiny.losses(tmp_path)) == [1, 4, 8, 10]
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "eval").exists()
    assert np.isfinite(result.metrics["loss"])


def test_saving_turned_off_still_resumes(config, straight, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        train.run(config, tmp_path)
    config.save_every = 0
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        train.run(config, tmp_path)
    assert "stopped at step 5, which is not saved" in caplog.text
    assert list(tiny.losses(tmp_path)) == [1, 2, 3, 4, 5]
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.latest() == 3


def test_other_data_than_the_checkpoint_was_trained_on_is_refused(config, tmp_path, monkeypatch):
    config.data.train = tiny.write_npz(tmp_path / "data.npz")
    stop_at(monkeypatch, 2)
    train.run(config, tmp_path / "run")
    tiny.write_npz(tmp_path / "data.npz", seed=1)
    with pytest.raises(WorkdirError, match="its files have changed.*init_from"):
        train.run(config, tmp_path / "run")


def test_a_workdir_that_lost_its_config_json_still_knows_its_config(config, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2)
    train.run(config, tmp_path)
    (tmp_path / "config.json").unlink()
    config.optim.lr = 0.5
    with pytest.raises(WorkdirError, match="checkpoints of another config .optim.lr: 0.001 there, 0.5 now"):
        train.run(config, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(config, tmp_path, monkeypatch, caplog):
    """The first step has a learning rate of 0; the second throws the weights out of float32."""
    config.optim.lr, config.save_every = 1e38, 1
    monkeypatch.setattr(main, "_CONFIG", types.SimpleNamespace(value=config))
    monkeypatch.setattr(main, "_WORKDIR", types.SimpleNamespace(value=str(tmp_path)))
    monkeypatch.setattr(main, "set_up_logging", lambda: None)
    monkeypatch.setattr(Recipe, "WHEN_NOT_FINITE", "under this recipe also try a smaller step")
    assert main.main(["regvit"]) == 1
    assert "step 2: " in caplog.text and "update_norm is inf" in caplog.text
    assert "also try a smaller step" in caplog.text
    assert f"last good checkpoint: {tmp_path / 'checkpoints' / '1'}" in caplog.text
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["update_norm"]) == (2, "Infinity")
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.latest() == 1
    # The lock is free again, and the same command fails the same way from the checkpoint on.
    with pytest.raises(NonFiniteError, match="step 2"):
        train.run(config, tmp_path)


class Watched:
    """A metric that tells when it is read."""

    def __init__(self, value, step, events):
        self.value, self.step, self.events = value, step, events

    def __array__(self, dtype=None, copy=None):
        self.events.append(("read", self.step))
        return np.asarray(self.value)


def test_metrics_are_read_after_the_next_step_was_dispatched(config, tmp_path, monkeypatch):
    events, build = [], train.build_step

    def watched(*args):
        step = build(*args)

        def update(state, batch):
            state, metrics = step.update(state, batch)
            done = len([e for e in events if e[0] == "dispatched"]) + 1
            events.append(("dispatched", done))
            return state, {"loss": Watched(metrics["loss"], done, events)}

        return dataclasses.replace(step, update=update)

    monkeypatch.setattr(train, "build_step", watched)
    config.save_every = 0
    train.run(config, tmp_path)
    inside = [event for k in range(1, 10) for event in (("dispatched", k + 1), ("read", k))]
    assert events == [("dispatched", 1), *inside, ("read", 10)]


def test_evaluations_come_when_they_are_due_and_pick_the_best_checkpoint(config, tmp_path, monkeypatch, capsys):
    """Three of them: as the run's eval_every and at the start, of its own pace, only at the end."""
    scores = iter([0.1, 0.9, 0.5, 0.4, 0.3])
    seen = []

    def run(evaluators, model, *, mesh, workdir, step):
        seen.append((step, *evaluators))
        assert model.config.registers == 2 and workdir == tmp_path
        return {f"{name}/top1": next(scores) if name == "paced" else 0.5 for name in evaluators}

    plans = {"paced": Scheduled(None, -1, True), "often": Scheduled(None, 3), "last": Scheduled(None, 0)}
    monkeypatch.setattr(train.evaluate, "build", lambda *args, **options: plans)
    monkeypatch.setattr(train.evaluate, "run", run)
    config.evals = {"paced": {"type": "knn"}}
    config.eval_every, config.save_every, config.keep, config.keep_best = 4, 4, 1, "paced/top1"
    result = train.run(config, tmp_path)
    assert seen == [
        (0, "paced"),
        (3, "often"),
        (4, "paced"),
        (6, "often"),
        (8, "paced"),
        (9, "often"),
        (10, "paced", "often", "last"),
    ]
    assert result.evals == {"paced/top1": 0.4, "often/top1": 0.5, "last/top1": 0.5}
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.steps() == [4, 10]
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [(r["step"], r["paced/top1"]) for r in records if "paced/top1" in r] == [
        (0, 0.1),
        (4, 0.9),
        (8, 0.5),
        (10, 0.4),
    ]
    assert "paced/top1" in capsys.readouterr().out


def test_a_profile_of_chosen_steps(config, tmp_path):
    config.save_every, config.profile.start, config.profile.steps = 0, 4, 2
    train.run(config, tmp_path)
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.num_classes": 3}, "num_classes=3 is less than the 4 classes.*leave it unset"),
        ({"model.image_size": 20}, "config.model: .*20 is not a multiple of the patch size 8.* 16 and 24"),
        ({"mesh.tensor": 4, "mesh.fsdp": 1, "groups": 1}, "mesh.tensor=4 must divide the 2 heads and 64 hidden units"),
        ({"model.name": "vit_ti17"}, "config.model: unknown model 'vit_ti17'; nearest: vit_ti16"),
        ({"optim.schedule": "step"}, "config.optim.schedule must be one of cosine"),
        ({"batch_size": 12}, "batch_size=12.*data x fsdp = 8 devices; the nearest"),
        ({"data.train": "npz:absent.npz"}, "no such file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(config, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(jax, "jit", None)
    with config.unlocked():
        config.update_from_flattened_dict(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_without_an_evaluation_split_a_tenth_is_held_out(tmp_path):
    config = tiny.get_config()
    config.data.train = tiny.write_npz(tmp_path / "data.npz") + "#train[:20]"
    _, source, data = train.prepare(config)
    assert len(source) == 20 and data[1].endswith("#test")
    with np.load(tmp_path / "data.npz") as arrays:
        np.savez(tmp_path / "single.npz", **{name: arrays[name] for name in arrays if not name.startswith("test")})
    config.data.train = f"npz:{tmp_path / 'single.npz'}"
    filled, source, data = train.prepare(config)
    assert len(source) == 34 and "holdout=eval" in data[1]
    assert (filled.model.num_classes, config.model.num_classes) == (4, None)


class Draws(Recipe):
    """A recipe of one parameter that reports what its keys draw."""

    def init(self, key, loaded):
        return {"w": jax.random.uniform(key, (2,))}, {}

    def augment(self, batch, key, step):
        return batch | {"draw": jax.random.uniform(key)}

    def loss(self, params, extras, batch, key, step):
        metrics = {"step": step, "augment": batch["draw"], "loss_key": jax.random.uniform(key)}
        return jnp.sum(params["w"]), {"metrics": metrics}

    def eval_model(self, params, extras): ...


def test_every_step_and_purpose_has_a_key_of_its_own(monkeypatch):
    monkeypatch.setattr(train.configs, "recipe_class", lambda config: Draws)
    drawn = []
    for seed in (0, 0, 1):
        config = tiny.get_config()
        config.seed = seed
        with jax.set_mesh(mesh_of(1)):
            step = train.build_step(config, mesh_of(1))
            state = step.init()
            for _ in range(3):
                state, metrics = step.update(state, {"image": jnp.zeros(8)})
                drawn.append((float(metrics["augment"]), float(metrics["loss_key"])))
    assert drawn[:3] == drawn[3:6]
    assert len({value for pair in drawn[3:] for value in pair}) == 12


def test_streams_of_randomness_differ_by_name_and_by_seed():
    keys = {
        tuple(jax.random.key_data(train.stream(seed, name)).tolist())
        for seed in (0, 1)
        for name in ("init", "augment", "loss", "eval")
    }
    assert len(keys) == 8
