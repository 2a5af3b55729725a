"""Registers added to weights that have none, positions at another native size: what changes, stays and is said."""

import dataclasses
import logging

import jax.numpy as jnp
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax.convert import files, graft
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model, abstract_params
from regvit_jax.trees import map_named


def network(**changes):
    rng = np.random.default_rng(3)
    fields = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24, "patch_size": 4, "image_size": (12, 12)}
    config = ViTConfig(**(fields | changes))
    params = map_named(
        lambda path, leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), abstract_params(config)
    )
    return Model(params, config, preprocessing=Preprocess(size=12))


def test_fresh_registers_are_seeded_and_as_small_as_the_family_makes_them(theirs, tmp_path, caplog):
    files.write(tmp_path / "a.pth", theirs("deit3")[1])
    files.write(tmp_path / "b.pth", theirs("dinov2")[1])
    with caplog.at_level(logging.INFO):
        model = rv.load_model(tmp_path / "a.pth", registers=400, num_heads=2)
    tokens = model.params["register_tokens"]
    assert tokens.shape == (1, 400, 16) and model.config.registers == 400
    np.testing.assert_allclose(tokens.std(), 0.02, rtol=0.03)
    assert (
        tokens.tolist()
        == rv.load_model(tmp_path / "a.pth", registers=400, num_heads=2).params["register_tokens"].tolist()
    )
    note = "400 registers were added, freshly initialised (standard deviation 0.02, seed 0)"
    assert model.origin.notes == (note,) and note in caplog.text
    small = rv.load_model(tmp_path / "b.pth", registers=4, num_heads=2)
    assert 0 < abs(small.params["register_tokens"]).max() < 1e-5


def test_all_else_stays_as_it_was(theirs):
    model = network()
    grown, _ = graft.add_registers(model, 2)
    assert dataclasses.replace(grown.config, registers=0) == model.config
    assert {k: v for k, v in grown.params.items() if k != "register_tokens"}.keys() == model.params.keys()
    assert graft.add_registers(grown, 2) == (grown, [])
    assert graft.add_registers(model, 0) == (model, [])


@pytest.mark.parametrize("registers", [0, 3, 5])
def test_trained_registers_are_neither_dropped_nor_added_to(registers):
    with pytest.raises(ValueError, match=f"the weights have 4 registers, {registers} were asked for"):
        graft.add_registers(network(registers=4), registers)


def test_registers_have_no_position_where_every_token_had_one():
    grown, _ = graft.add_registers(network(position="all"), 2)
    assert grown.config.position == "cls"
    grown, _ = graft.add_registers(network(position="all", class_token=False, pool="avg"), 2)
    assert grown.config.position == "patches"


@pytest.mark.parametrize("resampler", ["antialias", "bicubic", "bicubic_offset"])
def test_at_the_new_native_size_the_outputs_are_the_old_ones(resampler):
    model = network(resampler=resampler, registers=1)
    images = np.random.default_rng(0).normal(size=(1, 20, 16, 3)).astype(np.float32)
    resized, notes = graft.resize(model, (20, 16))
    assert notes == [f"positions were resampled from 3 x 3 to 5 x 4 patches ({resampler})"]
    assert (resized.config.image_size, resized.preprocessing.size) == ((20, 16), 16)
    # What enters the first block is all that positions reach.
    got, want = (m.module().embed(jnp.asarray(images), (5, 4)) for m in (resized, model))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_same_size_changes_nothing_but_the_crop():
    model = dataclasses.replace(network(), preprocessing=Preprocess(size=8, crop_ratio=0.5))
    same, notes = graft.resize(model, 12)
    assert notes == [] and same.params["pos_embed"] is model.params["pos_embed"]
    assert same.preprocessing == Preprocess(size=12, crop_ratio=0.5)
    none, notes = graft.resize(network(position="none"), 24)
    assert notes == [] and none.config.grid == (6, 6)
