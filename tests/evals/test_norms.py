"""Norms: percentiles against the residual stream of every block, outliers planted into it, a picture."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from regvit_jax.evals.features import source_of
from regvit_jax.evals.norms import Norms
from regvit_jax.models.model import intermediate


def test_numbers_are_of_the_residual_stream(model, mesh, mesh8, make_npz, tmp_path):
    spec = f"npz:{make_npz('data.npz', train=[0, 1, 2, 3, 0, 1])}"
    # Weights of other scale in the final norm must not matter.
    scaled = model.params | {"norm": {**model.params["norm"], "scale": 7.0 * model.params["norm"]["scale"]}}
    other = dataclasses.replace(model, params=scaled)
    got = Norms(eval_data=spec, n=5, batch_size=2, block=0).run(other, mesh=mesh, out_dir=tmp_path)
    images = jnp.asarray(model.preprocess([source_of(spec)[i]["image"] for i in range(5)]))
    (stream,) = intermediate(model, images, blocks=(0,))
    patch = np.linalg.norm(stream.patches, axis=-1)
    for name, percent in (("p50", 50), ("p99", 99), ("p99.9", 99.9), ("max", 100)):
        assert got[name] == pytest.approx(np.percentile(patch, percent), rel=1e-4)
    assert got["max_over_p50"] == pytest.approx(patch.max() / np.median(patch), rel=1e-4)
    assert got["registers_p50"] == pytest.approx(np.median(np.linalg.norm(stream.registers, axis=-1)), rel=1e-4)
    assert got["cls_p50"] == pytest.approx(np.median(np.linalg.norm(stream.cls, axis=-1)), rel=1e-4)
    assert got["outliers"] == 0
    eight = Norms(eval_data=spec, n=5, batch_size=8, block=0).run(model, mesh=mesh8, out_dir=tmp_path / "eight")
    assert eight == pytest.approx(got, rel=1e-4)
    width, height = Image.open(tmp_path / "norms.png").size
    assert width > 2 * height > 200


def test_planted_outliers_are_counted_where_they_are(model, mesh, make_npz, tmp_path):
    spec = f"npz:{make_npz('data.npz', train=[0, 1, 2])}"
    # One position of 16 with a huge embedding: an outlier in every image, always at the same cell.
    positions = model.params["pos_embed"].at[0, 1 + 5].set(40.0)
    planted = dataclasses.replace(model, params=model.params | {"pos_embed": positions})
    got = Norms(eval_data=spec).run(planted, mesh=mesh, out_dir=tmp_path)
    assert got["outliers"] == pytest.approx(1 / 16) and got["top_cell"] == 1.0
    assert got["p50"] < got["cutoff"] < got["max"]
    fixed = Norms(eval_data=spec, rule="absolute", value=1e9).run(planted, mesh=mesh, out_dir=tmp_path)
    assert fixed["outliers"] == 0 and fixed["cutoff"] == 1e9


def test_refusals(model, bare_model, mesh, make_npz, tmp_path):
    spec = f"npz:{make_npz('data.npz', train=[0, 1])}"
    with pytest.raises(ValueError, match="this network has 2 blocks"):
        Norms(eval_data=spec, block=2).run(model, mesh=mesh, out_dir=tmp_path)
    with pytest.raises(ValueError, match="value must be positive with rule='absolute'"):
        Norms(eval_data=spec, rule="absolute")
    bare = Norms(eval_data=spec).run(bare_model, mesh=mesh, out_dir=tmp_path)
    assert "cls_p50" not in bare and "registers_p50" not in bare
