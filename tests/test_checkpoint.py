"""Checkpoints: bitwise round trips, any mesh, what is kept, what a kill leaves behind, errors that say what to do."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from regvit_jax import sharding
from regvit_jax.checkpoint import CheckpointMismatch, Checkpoints
from regvit_jax.trees import named

DATA, META = {"seed": 7, "fingerprint": "ab12"}, {"config": {"batch_size": 8}}


def values(step, width=8):
    rng = np.random.default_rng(step)
    kernel = rng.normal(size=(2, 4, width)).astype(np.float32)
    return {
        "step": np.int32(step),
        "params": {"blocks": {"kernel": kernel}, "bias": rng.normal(size=3).astype(np.float32)},
        "opt": {"mu": {"blocks": {"kernel": kernel.astype(jnp.bfloat16)}}, "count": np.int32(step)},
        "extras": {"centre": np.full(width, np.nan, np.float32)},
    }


def placed(tree, mesh):
    shardings = sharding.shardings(tree, mesh, 0)
    return jax.tree.map(lambda x, s: jax.device_put(jnp.array(x), s), tree, shardings)


def abstract(tree, mesh):
    shardings = sharding.shardings(tree, mesh, 0)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def mesh_of(count):
    return sharding.make_mesh(data=1, fsdp=count, devices=jax.devices()[:count])


def save(checkpoints, step, metrics=None, **options):
    state = placed(values(step), mesh_of(1))
    return checkpoints.save(step, state, data=DATA, meta=META, metrics=metrics, **options)


def assert_bitwise(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, leaf in named(got).items():
        expected = np.asarray(named(want)[path])
        assert leaf.dtype == expected.dtype, path
        assert np.asarray(leaf).tobytes() == expected.tobytes(), path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with one checkpoint, of step 5, written from 8 devices."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(5, placed(values(5), mesh_of(8)), data=DATA, meta=META, metrics={"top1": 0.5, "bad": np.inf})
    return workdir


@pytest.mark.parametrize("count", [8, 2, 1])
def test_restored_bitwise_onto_any_mesh(saved, count):
    mesh = mesh_of(count)
    with Checkpoints(saved, create=False) as checkpoints:
        state, data, meta = checkpoints.restore(abstract(values(0), mesh))
    assert_bitwise(state, values(5))
    spec = P(None, None, "fsdp") if count > 1 else P()
    assert state["params"]["blocks"]["kernel"].sharding == NamedSharding(mesh, spec)
    assert state["step"].sharding.is_fully_replicated and len(state["step"].sharding.device_set) == count
    assert data == DATA
    assert meta == META | {"step": 5, "metrics": {"top1": 0.5, "bad": None}}


def test_items_are_read_alone(saved):
    with Checkpoints(saved, create=False) as checkpoints:
        params = checkpoints.restore_item("params")
        state, _, _ = checkpoints.restore({"params": abstract(values(0)["params"], mesh_of(2))})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_bitwise(params, values(5)["params"])
    assert_bitwise(state, {"params": values(5)["params"]})


def test_items_lie_in_folders_of_their_own(saved):
    names = {p.name for p in (saved / "checkpoints" / "5").iterdir() if p.is_dir()}
    assert names == {"params", "opt", "extras", "data", "meta"}


def test_data_and_meta_need_no_array(saved, tmp_path):
    copy = tmp_path / "checkpoints" / "5"
    for name in ("data", "meta"):
        os.makedirs(copy / name)
    for source in (saved / "checkpoints" / "5").rglob("*"):
        relative = source.relative_to(saved / "checkpoints" / "5")
        if source.is_file() and relative.parts[0] not in ("params", "opt", "extras"):
            (copy / relative).write_bytes(source.read_bytes())
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.data() == DATA
        assert checkpoints.meta(5)["config"] == META["config"]


def test_a_step_that_donates_right_after_save_changes_nothing(tmp_path):
    mesh = mesh_of(8)
    tree = {"w": np.random.default_rng(0).normal(size=(8, 2**17)).astype(np.float32)}
    state = placed({"step": np.int32(1), "params": tree, "opt": {}, "extras": {}}, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0, out_shardings=shardings)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, data={}, meta={})
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        assert_bitwise(checkpoints.restore_item("params"), tree)


def test_empty_extras_come_back_empty(tmp_path):
    tree = values(1) | {"extras": {}, "opt": {"frozen": {}}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, placed(tree, mesh_of(1)), data={}, meta={})
        state, _, _ = checkpoints.restore(abstract(tree, mesh_of(1)))
        assert checkpoints.restore_item("extras") == {}
    assert_bitwise(state, tree)


def test_the_newest_and_the_best_stay(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.1, 4: None, 5: float("nan"), 6: 0.3}
    with Checkpoints(tmp_path, keep=2, keep_best="knn/top1") as checkpoints:
        for step, score in scores.items():
            save(checkpoints, step, None if score is None else {"knn/top1": score})
        assert checkpoints.best() == 2
        assert checkpoints.steps() == [2, 5, 6]
    with Checkpoints(tmp_path, keep=2, keep_best="knn/top1") as checkpoints:
        save(checkpoints, 7, {"knn/top1": 0.4})
        assert checkpoints.steps() == [2, 6, 7], "the best is known after a restart"
        save(checkpoints, 8, {"knn/top1": 0.95})
        assert checkpoints.best() == 8
        assert checkpoints.steps() == [7, 8], "a better one frees the old"


def test_best_can_be_the_smallest(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_best="rmse", best_mode="min") as checkpoints:
        for step, score in {1: 0.5, 2: 0.4, 3: 0.6}.items():
            save(checkpoints, step, {"rmse": score})
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.best() == 2


def test_half_written_checkpoints_are_not_seen_and_go_at_the_next_start(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3)
    folder = tmp_path / "checkpoints"
    torn = folder / "4.orbax-checkpoint-tmp"
    (torn / "params").mkdir(parents=True)
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.latest() == 3
    assert torn.exists(), "a reader clears nothing: another process may be writing it"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3
        save(checkpoints, 4)
        assert checkpoints.latest() == 4
    assert not torn.exists()


def test_relative_workdir_stays_where_it_was_opened(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/one") as checkpoints:
        monkeypatch.chdir(tmp_path / "elsewhere")
        save(checkpoints, 1, wait=True)
        assert (tmp_path / "runs/one/checkpoints/1/params").is_dir()


def test_saving_a_saved_step_again_writes_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert save(checkpoints, 2) is True
        assert save(checkpoints, 2, wait=True) is False
        with pytest.raises(ValueError, match="older than checkpoint 2"):
            save(checkpoints, 1)


def test_mismatch_names_the_leaves_and_the_remedy(saved):
    other = values(0)
    other["params"] = {"blocks": {"kernel": np.zeros((2, 4, 16), np.float32)}, "gamma": np.zeros(3, np.float32)}
    other["opt"]["count"] = np.float32(0)
    with Checkpoints(saved, create=False) as checkpoints, pytest.raises(CheckpointMismatch) as error:
        checkpoints.restore(abstract(other, mesh_of(1)))
    for part in (
        "differ (4)",
        "params/blocks/kernel: (2, 4, 8) float32 there, (2, 4, 16) float32 here",
        "params/gamma: absent there, (3,) float32 here",
        "params/bias: (3,) float32 there, absent here",
        "opt/count: () int32 there, () float32 here",
        "init_from",
    ):
        assert part in str(error.value)


def test_state_without_extras_does_not_take_a_checkpoint_with_them(saved):
    with Checkpoints(saved, create=False) as checkpoints, pytest.raises(CheckpointMismatch, match="extras/centre"):
        checkpoints.restore(abstract(values(0) | {"extras": {}}, mesh_of(1)))


def test_missing_checkpoints_are_named(saved, tmp_path):
    with Checkpoints(tmp_path / "none", create=False) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.best() is None
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*none"):
            checkpoints.restore_item("params")
        with pytest.raises(ValueError, match="create=False"):
            save(checkpoints, 1)
    assert not (tmp_path / "none").exists()
    there = r"step 4 .* there are \[5\]"
    with Checkpoints(saved, create=False) as checkpoints, pytest.raises(FileNotFoundError, match=there):
        checkpoints.meta(4)


def test_what_cannot_be_saved_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        good = placed(values(1), mesh_of(1))
        with pytest.raises(TypeError):
            checkpoints.save(1, good, data={"rng": object()}, meta={})
        with pytest.raises(ValueError, match="'metrics'"):
            checkpoints.save(1, good, data={}, meta={"metrics": 1})
        with pytest.raises(ValueError, match="state of step 1"):
            checkpoints.save(2, good, data={}, meta={})
        with pytest.raises(ValueError, match="params/registers has no elements"):
            checkpoints.save(1, good | {"params": {"registers": jnp.zeros((0, 4))}}, data={}, meta={})
        assert checkpoints.steps() == []


@pytest.mark.parametrize("options", [{"keep": 0}, {"best_mode": "highest"}])
def test_impossible_options(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Checkpoints(tmp_path, **options)


def test_meta_is_strict_json(saved):
    text = (saved / "checkpoints" / "5" / "meta" / "metadata").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["step"] == 5
