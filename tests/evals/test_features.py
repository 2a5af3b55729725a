"""Features: equal to calling the model, whatever the batch and the mesh; kept by what they depend on; refusals."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax import evaluate, sharding
from regvit_jax.data.sources import Source, open_source
from regvit_jax.evals import features
from regvit_jax.evals.accuracy import Accuracy
from regvit_jax.evals.features import extract, labelled_pair, shared
from regvit_jax.evals.knn import KNN
from regvit_jax.models.model import intermediate

LABELS = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


@pytest.fixture
def source(make_npz):
    return f"npz:{make_npz('data.npz', train=LABELS)}"


@pytest.fixture
def passes(monkeypatch):
    """The sources of all passes over images so far."""
    seen = []
    compute = features._compute

    def counted(model, source, source_spec, *args):
        seen.append(source_spec)
        return compute(model, source, source_spec, *args)

    monkeypatch.setattr(features, "_compute", counted)
    return seen


def direct(model, source):
    """Features of a source by the calls a user would make."""
    samples = open_source(source)
    return model(jnp.asarray(model.preprocess([samples[i]["image"] for i in range(len(samples))])))


def test_the_features_are_those_of_calling_the_model(model, mesh, source):
    got = extract(model, source, outputs=("cls", "mean_patch"), batch_size=4, mesh=mesh)
    tokens = direct(model, source)
    np.testing.assert_allclose(got.arrays["cls"], tokens.cls, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.arrays["mean_patch"], tokens.patches.mean(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.labels, LABELS)
    assert got.num_classes == 4
    assert got.joined(("cls", "mean_patch")).shape == (11, 64)


@pytest.mark.parametrize("batch_size", [1, 11, 256])
def test_neither_batch_nor_mesh_matters(batch_size, model, mesh, mesh8, source):
    """11 images: full batches, a padded last one, a batch larger than the source, and 8 devices that share 11 rows."""
    one = extract(model, source, batch_size=4, mesh=mesh)
    for where in (mesh, mesh8):
        other = extract(model, source, batch_size=batch_size, mesh=where)
        np.testing.assert_allclose(other.arrays["cls"], one.arrays["cls"], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(other.labels, LABELS)


def test_a_model_that_is_sharded_stays_so(model, mesh8, source):
    placed = sharding.shardings(model.params, mesh8, min_bytes=0)
    split = dataclasses.replace(model, params=jax.device_put(model.params, placed))
    assert features.place(split, mesh8) is split
    whole = extract(model, source, batch_size=8, mesh=mesh8).arrays["cls"]
    np.testing.assert_allclose(
        extract(split, source, batch_size=8, mesh=mesh8).arrays["cls"], whole, rtol=1e-5, atol=1e-5
    )


def test_all_batches_are_one_compilation(model, mesh, source):
    before = features.pooled._cache_size()
    extract(model, source, outputs=("block0/mean_patch",), batch_size=2, mesh=mesh)
    assert features.pooled._cache_size() == before + 1


def test_earlier_blocks_and_the_residual_stream(model, mesh, source):
    got = extract(model, source, outputs=("block0/cls", "block-1/mean_patch"), norm=False, batch_size=11, mesh=mesh)
    samples = open_source(source)
    images = jnp.asarray(model.preprocess([samples[i]["image"] for i in range(len(samples))]))
    first, last = intermediate(model, images, blocks=(0, 1))
    np.testing.assert_allclose(got.arrays["block0/cls"], first.cls, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.arrays["block-1/mean_patch"], last.patches.mean(1), rtol=1e-5, atol=1e-5)


def test_evaluators_that_share_pass_over_the_images_once(model, mesh, source, passes):
    with shared():
        cls = extract(model, source, outputs=("cls",), batch_size=4, mesh=mesh)
        both = extract(model, source, outputs=("cls", "mean_patch"), batch_size=8, mesh=mesh)
        assert both.arrays["cls"] is cls.arrays["cls"] and len(passes) == 1
        extract(model, source, outputs=("block0/cls",), batch_size=4, mesh=mesh)
        assert len(passes) == 2
    extract(model, source, batch_size=4, mesh=mesh)
    assert len(passes) == 3, "nothing is kept when sharing has ended"


def test_what_features_depend_on_is_their_key(model, mesh, source, make_npz, monkeypatch, tmp_path):
    passes = []

    def no_network(model, source, source_spec, outputs, *_):
        passes.append(source_spec)
        n = len(source)
        return {name: np.zeros((n, 1), np.float32) for name in outputs}, np.zeros(n, np.int32), np.arange(n)

    monkeypatch.setattr(features, "_compute", no_network)
    one_weight = jax.tree.map(lambda x: x, model.params)
    one_weight["norm"]["bias"] = one_weight["norm"]["bias"].at[0].add(1e-3)
    crop = dataclasses.replace(model.preprocessing, crop_ratio=1.0)
    changed = [
        dataclasses.replace(model, params=one_weight),
        dataclasses.replace(model, preprocessing=crop),
        dataclasses.replace(model, run=dataclasses.replace(model.run, dtype="bfloat16")),
        dataclasses.replace(model, config=dataclasses.replace(model.config, norm_eps=1e-3)),
    ]
    options = dict(batch_size=16, mesh=mesh, cache_dir=str(tmp_path / "cache"))
    extract(model, source, **options)
    for count, other in enumerate(changed, start=2):
        extract(other, source, **options)
        assert len(passes) == count
    extract(model, source, norm=False, **options)
    extract(model, source + "#[:5]", **options)
    extract(model, f"npz:{make_npz('other.npz', train=LABELS[::-1])}", **options)
    assert len(passes) == 8
    # Neither the place of the file nor how the network is computed changes what comes out.
    unrolled = dataclasses.replace(model, run=dataclasses.replace(model.run, unroll=True))
    extract(unrolled, f"npz:{make_npz('copy.npz', train=LABELS)}", **options)
    assert len(passes) == 8


def test_the_disk_cache_gives_the_same_numbers_and_survives_damage(model, mesh, source, passes, tmp_path, caplog):
    options = dict(outputs=("cls", "mean_patch"), batch_size=4, mesh=mesh, cache_dir=str(tmp_path / "cache"))
    first = extract(model, source, **options)
    again = extract(model, source, **options)
    assert len(passes) == 1
    np.testing.assert_array_equal(again.arrays["mean_patch"], first.arrays["mean_patch"])
    np.testing.assert_array_equal(again.labels, first.labels)

    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2, "one file a feature, and no unfinished ones"
    damaged = bytearray(files[0].read_bytes())
    damaged[len(damaged) // 3] ^= 255
    for broken in (bytes(damaged), files[0].read_bytes()[:200], b""):
        files[0].write_bytes(broken)
        passes.clear()
        with caplog.at_level(logging.WARNING):
            repaired = extract(model, source, **options)
        assert len(passes) == 1 and files[0].name in caplog.text
        np.testing.assert_array_equal(repaired.arrays["cls"], first.arrays["cls"])
        caplog.clear()


class Broken(Source):
    """An opened source of which some samples cannot be read, or only later."""

    def __init__(self, source, bad):
        self.source, self.bad = source, set(bad)
        self.class_names, self.splits = source.class_names, source.splits

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index] | ({"image": b"broken"} if index in self.bad else {})

    def name(self, index):
        return f"photo {index}"

    @property
    def fingerprint(self):
        return self.source.fingerprint


@pytest.fixture
def broken(source, monkeypatch):
    """broken(2, 5): from then on these samples of `source` cannot be read."""

    def make(*bad):
        opened = Broken(open_source(source), bad)
        monkeypatch.setattr("regvit_jax.evals.feature_cache.open_source", lambda spec: opened)
        return opened

    return make


@pytest.mark.parametrize("bad", [(2,), (0, 1, 2, 3, 9, 10)])
def test_images_that_cannot_be_read_are_left_out(bad, model, mesh, mesh8, source, broken, caplog):
    """One of 11, and a whole batch of 4 and the last rows: no row of theirs is among the features."""
    whole = extract(model, source, batch_size=4, mesh=mesh)
    broken(*bad)
    good = np.setdiff1d(np.arange(11), bad)
    for where in (mesh, mesh8):
        rest = extract(model, source, batch_size=4, mesh=where, max_bad=0.6)
        np.testing.assert_array_equal(rest.index, good)
        np.testing.assert_array_equal(rest.labels, np.array(LABELS)[good])
        np.testing.assert_allclose(rest.arrays["cls"], whole.arrays["cls"][good], rtol=1e-5, atol=1e-5)
    assert f"{len(bad)} of 11 images cannot be read and are left out: photo {bad[0]}" in caplog.text
    np.testing.assert_array_equal(rest.labelled().index, good)


def test_too_many_unreadable_images_are_an_error(model, mesh, source, broken):
    broken(2, 5)
    with pytest.raises(ValueError, match=r"2 of the 11 images .*\(photo 2, photo 5\), more than max_bad=0.01"):
        extract(model, source, batch_size=4, mesh=mesh)
    assert len(extract(model, source, batch_size=4, mesh=mesh, max_bad=2 / 11).index) == 9
    with pytest.raises(ValueError, match="KNN: max_bad must be a share, from 0 to 1"):
        KNN(max_bad=1.5)


def test_features_of_a_broken_set_are_not_kept_on_the_disk(model, mesh, source, broken, tmp_path):
    options = dict(batch_size=4, mesh=mesh, cache_dir=str(tmp_path / "cache"), max_bad=0.5)
    opened = broken(2)
    assert len(extract(model, source, **options).index) == 10
    assert not (tmp_path / "cache").exists()
    opened.bad.clear()
    assert len(extract(model, source, **options).index) == 11
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_two_passes_give_the_rows_that_both_could_read(model, mesh, source, broken):
    options = dict(batch_size=4, mesh=mesh, max_bad=0.5)
    opened = broken(2)
    with shared():
        first = extract(model, source, outputs=("cls",), **options)
        opened.bad = {5}
        both = extract(model, source, outputs=("cls", "block0/cls"), **options)
    good = [0, 1, 3, 4, 6, 7, 8, 9, 10]
    assert both.index.tolist() == good and both.labels.tolist() == [LABELS[i] for i in good]
    np.testing.assert_array_equal(both.arrays["cls"], first.arrays["cls"][np.isin(first.index, good)])
    assert both.joined(("cls", "block0/cls")).shape == (9, 64)


def test_every_evaluator_counts_what_it_left_out(make_model, make_npz, mesh, source, broken, tmp_path):
    """The two bad ones of 11 count neither as images nor as neighbours, and are told in results.json."""
    model = make_model(num_classes=4)
    options = {"accuracy": {"max_bad": 0.2}, "knn": {"max_bad": 0.2, "k": (1,)}, "maps": {"n": 2}}
    built = evaluate.build(
        {kind: {"type": kind, **given} for kind, given in options.items()}, data_train=source, data_eval=source
    )
    unlabelled = [-1 if i in (1, 2) else label for i, label in enumerate(LABELS)]
    without = Accuracy(eval_data=f"npz:{make_npz('nine.npz', train=unlabelled)}").run(model, mesh=mesh, out_dir="")
    broken(1, 2)
    found = evaluate.run(built, model, mesh=mesh, workdir=tmp_path)
    for kind, missed in (("accuracy", 2), ("knn", 2), ("maps", 1)):
        record = json.loads((tmp_path / f"eval/{kind}/results.json").read_text())
        assert [part["unreadable"] for part in record["data"].values()] == [missed] * len(built[kind].evaluator.NEEDS)
    # Every image is its own nearest neighbour, so all of those that are judged are right.
    assert found["knn/top1"] == 1.0
    assert {f"accuracy/{name}": pytest.approx(value) for name, value in without.items()}.items() <= found.items()
    with pytest.raises(ValueError, match="2 of the 11 images"):
        dataclasses.replace(built["accuracy"].evaluator, max_bad=0.1).run(model, mesh=mesh, out_dir=tmp_path)


def test_features_that_are_not_finite_are_refused(model, mesh, source):
    broken = dataclasses.replace(model, params=jax.tree.map(lambda x: x * jnp.nan, model.params))
    with pytest.raises(ValueError, match="NaN or infinite for 11 of 11 images"):
        extract(broken, source, batch_size=8, mesh=mesh)


def test_unknown_outputs_are_refused(bare_model, model, mesh, source):
    for name, says in [("patches", "no feature"), ("block2/cls", "blocks 0 to 1"), ("xcls", "no feature")]:
        with pytest.raises(ValueError, match=says):
            extract(model, source, outputs=(name,), batch_size=8, mesh=mesh)
    with pytest.raises(ValueError, match="use 'mean_patch'"):
        extract(bare_model, source, outputs=("cls",), batch_size=8, mesh=mesh)
    with shared():
        got = extract(bare_model, source, outputs=("mean_patch",), batch_size=8, mesh=mesh)
    assert set(got.arrays) == {"mean_patch"}


def test_labels_are_asked_for_and_missing_ones_left_out(model, mesh, make_folder, make_npz, caplog):
    unlabelled = extract(model, f"folder:{make_folder('photos', 'a.png', 'b.png')}", batch_size=8, mesh=mesh)
    assert unlabelled.labels.tolist() == [-1, -1]
    with pytest.raises(ValueError, match="photos.*no labels.*one folder a class"):
        unlabelled.labelled()
    some = extract(model, f"npz:{make_npz('some.npz', train=[1, -1, 0, -1])}", batch_size=8, mesh=mesh)
    kept = some.labelled()
    assert kept.labels.tolist() == [1, 0] and "2 of 4 samples have no label" in caplog.text
    np.testing.assert_array_equal(kept.arrays["cls"], some.arrays["cls"][[0, 2]])


def test_two_sources_must_have_the_same_classes(model, mesh, make_npz, caplog):
    three, four = (f"npz:{make_npz(f'{n}.npz', train=list(range(n)))}" for n in (3, 4))
    with pytest.raises(ValueError, match="same classes .only one has 3"):
        labelled_pair(KNN(data=three, eval_data=four), model, ("cls",), mesh)
    labelled_pair(KNN(data=four, eval_data=four), model, ("cls",), mesh)
    assert "the same samples" in caplog.text
