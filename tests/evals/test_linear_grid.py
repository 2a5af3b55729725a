"""The grid of linear heads: SGD written out in NumPy, heads that do not disturb each other, stopping and going on."""

import json
import signal

import jax
import numpy as np
import pytest

from regvit_jax.data.feed import feed_rows
from regvit_jax.data.order import Order
from regvit_jax.evals import grid_heads, linear_grid
from regvit_jax.evals.features import Features
from regvit_jax.evals.grid_heads import GridLoss, Inputs, KeptFeatures, init_heads, measure, sgd
from regvit_jax.evals.head_training import train_head
from regvit_jax.evals.linear_grid import LinearGrid
from regvit_jax.evals.saved import Saved
from regvit_jax.stopping import Stop, Stopped

N, D, C, STEPS, BATCH, SEED = 40, 5, 7, 6, 16, 3
RATES = (0.01, 1e38, 2.0)  # One head diverges.
INPUTS = Inputs(((1, 0), (2, 1)))
# What the heads of each group see, of block -2 (0:5), block -1 (5:10) and the mean patch (10:15).
COLUMNS = {"1_blocks": slice(5, 10), "2_blocks_avgpool": slice(0, 15)}


def data(seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(C, size=N).astype(np.int32)
    arrays = {output: rng.normal(size=(N, D)).astype(np.float32) for output in INPUTS.outputs}
    arrays["cls"][np.arange(N), labels % D] += 2
    return arrays, labels


def train(mesh, saved=None, arrays=None, interrupt=lambda step: None):
    arrays, labels = data() if arrays is None else arrays

    def open_feed(first, rows):
        kept = dict(seed=SEED, batch_size=rows, start_step=first, stop_step=STEPS)
        stream = feed_rows(arrays | {"label": labels}, mesh, **kept)
        batches = stream.stream
        stream.stream = ((interrupt(step), batch)[1] for step, batch in enumerate(batches, first))
        return stream

    heads = train_head(
        None,
        open_feed,
        features=KeptFeatures(INPUTS.outputs),
        init_head=lambda key: init_heads(key, INPUTS, D, len(RATES), C),
        loss=GridLoss(INPUTS),
        tx=sgd(RATES, STEPS),
        steps=STEPS,
        batch_size=BATCH,
        seed=SEED,
        mesh=mesh,
        label="grid of a test",
        saved=saved,
    )
    return jax.tree.map(np.asarray, heads)


def by_hand(arrays, labels):
    """Each head on its own, float64: torch's SGD with momentum .9 and a cosine."""
    wide = np.concatenate([arrays[output] for output in INPUTS.outputs], axis=1).astype(np.float64)
    start = jax.tree.map(np.asarray, init_heads(jax.random.key(SEED), INPUTS, D, len(RATES), C))
    order, heads = Order(N, SEED), {}
    for group, columns in COLUMNS.items():
        for place, rate in ((0, RATES[0]), (2, RATES[2])):
            weight, bias = start[group]["kernel"][:, place].astype(np.float64), np.zeros(C)
            velocity = [np.zeros_like(weight), np.zeros_like(bias)]
            for step in range(STEPS):
                rows = order.index(np.arange(step * BATCH, (step + 1) * BATCH))
                x = wide[rows][:, columns]
                scores = x @ weight + bias
                error = np.exp(scores - scores.max(1, keepdims=True))
                error /= error.sum(1, keepdims=True)
                known = labels[rows] >= 0
                error[np.flatnonzero(known), labels[rows][known]] -= 1
                error *= known[:, None] / known.sum()
                lr = rate * (1 + np.cos(np.pi * step / STEPS)) / 2
                velocity = [0.9 * v + g for v, g in zip(velocity, (x.T @ error, error.sum(0)), strict=True)]
                weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
            heads[group, place] = weight, bias
    return heads


def test_each_head_is_that_of_sgd_in_numpy_on_one_device_and_on_eight(mesh, mesh8):
    """Two groups by three rates, of which one diverges and disturbs no other; five of the 40 rows have no label."""
    arrays, labels = data()
    labels[::8] = -1
    want = by_hand(arrays, labels)
    for where in (mesh, mesh8):
        heads = train(where, arrays=(arrays, labels))
        assert set(heads) == set(COLUMNS) and not np.isfinite(heads["1_blocks"]["kernel"][:, 1]).all()
        for (group, place), (weight, bias) in want.items():
            np.testing.assert_allclose(heads[group]["kernel"][:, place], weight, atol=1e-5)
            np.testing.assert_allclose(heads[group]["bias"][place], bias, atol=1e-5)


def test_what_each_group_sees():
    wide, want = np.arange(30).reshape(2, 15), COLUMNS | {"1_blocks_avgpool": slice(5, 15), "2_blocks": slice(0, 10)}
    inputs = Inputs(((1, 0), (1, 1), (2, 0), (2, 1)))
    parts = inputs.parts(wide)
    assert inputs.outputs == ("block-2/cls", "cls", "mean_patch") and set(parts) == set(want)
    assert all((parts[group] == wide[:, columns]).all() for group, columns in want.items())
    assert Inputs(((4, 0), (1, 0))).outputs == ("block-4/cls", "block-3/cls", "block-2/cls", "cls")


def test_a_fit_that_was_stopped_goes_on_as_if_it_had_not(mesh, tmp_path, caplog):
    caplog.set_level("INFO")
    whole = train(mesh)
    saved = Saved(tmp_path / "unfinished.npz", key="a")
    with Stop() as stop, stop.breaking(), pytest.raises(Stopped):
        train(mesh, saved=saved, interrupt=lambda step: step == 4 and stop._ask(signal.SIGTERM, None))
    for _ in range(2):  # The second time nothing is left to do.
        again = train(mesh, saved=saved)
        jax.tree.map(np.testing.assert_array_equal, again, whole)
    went_on = [record.args[1] for record in caplog.records if "goes on after step" in record.msg]
    assert went_on == [4, 6]


def test_only_a_whole_file_of_the_same_fit_is_gone_on_with(tmp_path, caplog):
    like = {"a": np.zeros((2, 3), np.float32)}
    saved = Saved(tmp_path / "new" / "state.npz", key="one", every=5)
    assert [step for step in range(1, 12) if saved.due(step)] == [5, 10]
    assert not Saved(saved.path, key="one").due(5) and saved.load(like) is None
    saved.save(7, {"a": np.ones((2, 3), np.float32)})
    step, state = saved.load(like)
    assert step == 7 and (state["a"] == 1).all()
    assert Saved(saved.path, key="two").load(like) is None
    assert saved.load({"a": np.zeros((2, 4), np.float32)}) is None and "other shapes" in caplog.text
    content = bytearray(saved.path.read_bytes())
    content[len(content) // 2] ^= 255
    saved.path.write_bytes(content)
    assert saved.load(like) is None and "starts anew" in caplog.text
    saved.remove()
    saved.remove()
    assert list(saved.path.parent.iterdir()) == []


def test_accuracies_of_heads_that_are_known(mesh, mesh8, monkeypatch):
    """Two rates of one group: the first head is the identity, the second prefers class 0; 11 samples, 3 at a time."""
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 2])
    x = 9 * np.eye(7, dtype=np.float32)[labels]
    x[-1] = 9 * np.eye(7)[5]  # Taken for class 5.
    kernel = np.stack([np.eye(7), np.zeros((7, 7))], axis=1).astype(np.float32)
    heads = {"1_blocks": {"kernel": kernel, "bias": np.array([[0] * 7, [7, 6, 5, 4, 3, 2, 1]], np.float32)}}
    features = Features({"cls": x}, labels, np.arange(11), tuple("abcdefg"), "", "")
    for where in (mesh, mesh8):
        placed = jax.tree.map(np.asarray, heads)
        found = measure(placed, Inputs(((1, 0),)), features, batch_size=3, mesh=where)
        np.testing.assert_allclose(found["top1"], [10 / 11, 3 / 11])
        np.testing.assert_allclose(found["top5"], [11 / 11, 9 / 11])
        known = np.log(1 + 6 * np.exp(-9))
        assert found["loss"][0] == pytest.approx((10 * known + known + 9) / 11, rel=1e-5)


def test_evaluator_learns_colours_and_survives_a_crash(model, mesh, make_npz, tmp_path, monkeypatch, caplog):
    """On the fly, two blocks of two (not four), and what follows the training fails the first time."""
    caplog.set_level("INFO")
    path = make_npz("colours.npz", train=[0, 1, 2, 3] * 10, test=[0, 1, 2, 3] * 3)
    options = dict(data=f"npz:{path}", eval_data=f"npz:{path}#test", batch_size=16, steps=12, train_batch_size=16)
    grid = LinearGrid(**options, avgpool=(1,), lr=(1e-3, 1.0))

    def crash(*args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(linear_grid, "measure", crash)
        with pytest.raises(OSError):
            grid.run(model, mesh=mesh, out_dir=tmp_path / "a")
    assert (tmp_path / "a" / "unfinished.npz").is_file()
    got = grid.run(model, mesh=mesh, out_dir=tmp_path / "a")
    assert "goes on after step 12 of 12" in caplog.text and "4 blocks of a network that has 2" in caplog.text
    assert set(got) == {"top1", "blocks", "avgpool", "lr"} and got["top1"] == 1.0
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["heads.json", "heads.png"]
    table = json.loads((tmp_path / "a" / "heads.json").read_text())
    assert [(row["blocks"], row["avgpool"], row["lr"]) for row in table["heads"]] == [
        (blocks, 1, lr) for blocks in (1, 2) for lr in (1e-3, 1.0)
    ]
    top1 = [row["top1"] for row in table["heads"]]
    assert table["best"] == top1.index(max(top1)), "the first of equals"
    assert table["heads"][1]["scaled_lr"] == 16 / 256


def test_cached_features_and_a_head_chosen_on_training_images(model, mesh, make_npz, tmp_path, monkeypatch):
    """A quarter of 40 is held out; of the training images those 10 and no others choose."""
    path = make_npz("colours.npz", train=[0, 1, 2, 3] * 10, test=[0, 1, 2, 3] * 3)
    options = dict(data=f"npz:{path}", eval_data=f"npz:{path}#test", batch_size=16, steps=12, train_batch_size=16)
    grid = LinearGrid(**options, cached=True, held_out=0.25, blocks=(1,), avgpool=(1,), lr=(1e-3, 1.0))
    seen = {}

    def spy(heads, inputs, features, **rest):
        seen[features.source] = features
        return grid_heads.measure(heads, inputs, features, **rest)

    monkeypatch.setattr(linear_grid, "measure", spy)
    got = grid.run(model, mesh=mesh, out_dir=tmp_path)
    assert got["top1"] == 1.0 and got["lr"] == 1.0
    table = json.loads((tmp_path / "heads.json").read_text())
    assert [row["held_out_top1"] for row in table["heads"]][table["best"]] == 1.0
    assert [len(features.labels) for features in seen.values()] == [12, 10]


def test_what_cannot_be_measured_is_refused(bare_model, model, mesh, make_npz, tmp_path):
    path = make_npz("four.npz", train=[0, 1, 2, 3])
    grid = LinearGrid(data=f"npz:{path}", eval_data=f"npz:{path}", held_out=0.9)
    with pytest.raises(ValueError, match="class token"):
        grid.run(bare_model, mesh=mesh, out_dir=tmp_path)
    with pytest.raises(ValueError, match="held_out=0.9 of 4 samples"):
        grid.run(model, mesh=mesh, out_dir=tmp_path)
    for options, says in [
        (dict(blocks=(0,)), "blocks must be"),
        (dict(blocks=(1, 1)), "blocks must be different"),
        (dict(avgpool=(2,)), "avgpool must be 0, 1"),
        (dict(lr=(0.0,)), "lr must be one or more positive"),
        (dict(held_out=1.0), "held_out must be"),
        (dict(steps=0), "steps must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            LinearGrid(**options)
    assert len(LinearGrid().lr) * 4 == 52
