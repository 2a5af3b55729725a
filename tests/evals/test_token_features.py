"""Token features: tokens of the model itself, drawn by sample and not by batch; kept in files; refusals."""

import logging
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.data.sources import open_source
from regvit_jax.evals import token_features
from regvit_jax.evals.by_norm import ByNorm, patch_norms
from regvit_jax.evals.token_features import draw_patches, extract_tokens
from regvit_jax.ops.outliers import cutoff

LABELS = [0, 1, 2, 3, 0, 1, 2]


@pytest.fixture
def source(make_npz):
    return f"npz:{make_npz('data.npz', train=LABELS)}"


@pytest.fixture
def split(model, source):
    """(tokens of all images, (N, P) norms of block 0, a limit that one image has no patch above)."""
    samples = open_source(source)
    images = jnp.asarray(model.preprocess([samples[i]["image"] for i in range(len(samples))]))
    tokens, found = model(images, capture=("block0",))
    norms = np.linalg.norm(found["block0"][:, model.config.prefix :], axis=-1)
    highest = np.sort(norms.max(axis=1))
    return tokens, norms, float(highest[:2].mean())


def test_tokens_are_those_of_the_model_whatever_batch_and_mesh(model, mesh, mesh8, source, split):
    tokens, norms, limit = split
    options = dict(limit=limit, block=0, draws=2)
    got = extract_tokens(model, source, batch_size=4, mesh=mesh, **options)
    draws = [f"{kind}/{draw}" for kind in ("normal", "outlier") for draw in range(2)]
    assert list(got.arrays) == ["cls", *draws, "register0", "register1"]
    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.arrays["cls"], tokens.cls, **close)
    np.testing.assert_allclose(got.arrays["register1"], tokens.registers[:, 1], **close)
    np.testing.assert_array_equal(got.outliers, (norms > limit).sum(axis=1))
    np.testing.assert_array_equal(got.labels, LABELS)
    assert got.patches == 16 and got.rows("outlier").sum() == 6 and got.rows("normal").sum() == 6
    for kind, members in (("normal", norms <= limit), ("outlier", norms > limit)):
        for draw in range(2):
            for row, found in enumerate(got.arrays[f"{kind}/{draw}"]):
                same = np.abs(np.asarray(tokens.patches[row]) - found).max(axis=1) < 1e-4
                assert members[row][same].all() and same.sum() == (members[row].any())
        assert not got.arrays[f"{kind}/0"][~got.rows(kind)].any()
    assert not np.array_equal(got.arrays["normal/0"], got.arrays["normal/1"])
    other = extract_tokens(model, source, batch_size=8, mesh=mesh8, **options)
    for name, array in got.arrays.items():
        np.testing.assert_allclose(other.arrays[name], array, err_msg=name, **close)


def test_draws_are_uniform_and_a_function_of_the_sample_alone():
    draw, key = jax.jit(draw_patches, static_argnums=3), jax.random.key(3)
    members = np.tile(np.array([1, 0, 1, 1, 0, 1], bool), (500, 1))
    members[:2] = [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]
    index = np.arange(500) * 7
    places = np.asarray(draw(key, index, members, 500))
    assert (places[0] == 4).all() and (places[1] == 0).all()
    # Of one sample in 500 draws, and of 498 samples in one: 125 each, standard deviation 9.7.
    for counts in (np.bincount(places[2], minlength=6), np.bincount(places[2:, 0], minlength=6)):
        assert counts[[1, 4]].sum() == 0 and np.abs(counts[[0, 2, 3, 5]] - 125).max() < 40
    # Two draws of a sample know nothing of one another, nor do two samples: a quarter agrees.
    assert 0.24 < (places[2:, 1:] == places[2:, :-1]).mean() < 0.26
    assert 0.24 < (places[3:] == places[2:-1]).mean() < 0.26
    # Alone, and with fewer draws: the same.
    np.testing.assert_array_equal(draw(key, index[9:10], members[9:10], 7)[0], places[9, :7])
    other = draw(jax.random.key(4), index, members, 500)
    assert 0.24 < (places[2:] == other[2:]).mean() < 0.26


def test_files_are_found_again_and_damaged_ones_made_anew(model, mesh, source, split, tmp_path, monkeypatch, caplog):
    options = dict(limit=split[2], block=0, draws=2, batch_size=4, mesh=mesh)
    plain = extract_tokens(model, source, **options)
    options["cache_dir"] = str(tmp_path / "cache")
    passes, compute = [], token_features._compute
    monkeypatch.setattr(token_features, "_compute", lambda *args: passes.append(args) or compute(*args))

    def check(found, count):
        assert len(passes) == count
        for name, array in plain.arrays.items():
            assert isinstance(found.arrays[name], np.memmap)
            np.testing.assert_allclose(found.arrays[name], array, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found.outliers, plain.outliers)
        np.testing.assert_array_equal(found.labels, plain.labels)

    check(extract_tokens(model, source, **options), 1)
    check(extract_tokens(model, source, **options), 1)
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "normal-0.npy").write_bytes((folder / "normal-0.npy").read_bytes()[:150])
    check(extract_tokens(model, source, **options), 2)
    assert "normal-0" in caplog.text or "cannot be used" in caplog.text
    (folder / "about.npz").write_bytes(b"no archive")
    check(extract_tokens(model, source, **options), 3)
    # What the draws depend on is in the name of the folder.
    monkeypatch.setattr(token_features, "_compute", lambda *args: passes.append(args) or plain)
    for other in ({"limit": 1.0}, {"seed": 1}, {"draws": 1}, {"kinds": ("cls",)}, {"block": 1}):
        extract_tokens(model, source, **options | other)
    check(extract_tokens(model, source, **options), 8)


def test_what_cannot_be_read_is_left_out_and_nothing_is_kept(model, mesh, tmp_path, make_folder, split, caplog):
    names = [f"{i}.png" for i in range(5)]
    folder = make_folder("photos", *names)
    (folder / "3.png").write_bytes(b"broken")
    options = dict(limit=split[2], block=0, draws=2, batch_size=4, mesh=mesh, cache_dir=str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        got = extract_tokens(model, f"folder:{folder}", max_bad=0.5, **options)
    assert got.readable.tolist() == [True, True, True, False, True] and not got.arrays["cls"][3].any()
    assert not got.rows("normal")[3] and not got.rows("cls")[3] and (got.labels == -1).all()
    assert "1 of 5 images cannot be read" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []
    assert np.abs(got.arrays["cls"][4]).sum() > 0, "what was mapped is still there"
    with pytest.raises(ValueError, match="more than max_bad=0.01"):
        extract_tokens(model, f"folder:{folder}", **options)


def test_room_is_asked_for_before_anything_is_computed(model, mesh, source, tmp_path, monkeypatch):
    options = dict(limit=1.0, batch_size=4, mesh=mesh)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with pytest.raises(ValueError, match="13 tokens of 32 for 7 images take 0.0 GB.*set cache_dir"):
        extract_tokens(model, source, **options)
    monkeypatch.setattr(token_features.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="has 0.0 GB free: make room"):
        extract_tokens(model, source, cache_dir=str(tmp_path), **options)


def test_a_model_of_patches_alone_is_asked_for_patches_alone(bare_model, mesh, source, monkeypatch):
    asked = []
    monkeypatch.setattr(token_features, "_compute", lambda *args: asked.append(args[4]) or types.SimpleNamespace())
    with pytest.raises(AttributeError, match="readable"):
        extract_tokens(bare_model, source, limit=1.0, draws=1, batch_size=7, mesh=mesh)
    assert asked[0].names == ["normal/0", "outlier/0"]


def test_tokens_that_are_not_finite_are_refused(model, mesh, source):
    broken = jax.tree.map(lambda x: x * jnp.nan, model)
    with pytest.raises(ValueError, match="NaN or infinite in 4 of 4 images"):
        extract_tokens(broken, source, limit=1.0, block=0, draws=2, batch_size=4, mesh=mesh)


def test_the_cutoff_is_found_in_the_first_training_images(model, mesh, source, split):
    _, norms, _ = split
    np.testing.assert_allclose(patch_norms(model, open_source(source), 0, batch_size=4, mesh=mesh), norms, rtol=1e-4)
    rule = dict(data=source, batch_size=4, block=0, rule="percentile", value=60.0)
    found = [ByNorm(calibrate=n, **rule).limit(model, mesh) for n in (4, 0)]
    expected = [float(cutoff(part, "percentile", 60.0)) for part in (norms[:4], norms)]
    assert found == pytest.approx(expected, rel=1e-4) and expected[0] != pytest.approx(expected[1], rel=1e-3)
    assert ByNorm(data="npz:nowhere.npz", rule="absolute", value=150).limit(model, mesh) == 150.0
    with pytest.raises(ValueError, match="this network has 2 blocks"):
        ByNorm(block=-3).check_block(model)
    for option, bad in (("rule", {"rule": "mode"}), ("value", {"rule": "absolute"}), ("calibrate", {"calibrate": -1})):
        with pytest.raises(ValueError, match=f"ByNorm: {option} must be"):
            ByNorm(**bad)
