"""Accuracy of the head: counted by hand, without padding, the same on any mesh."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.data.decode import decode
from regvit_jax.data.sources import open_source
from regvit_jax.evals.accuracy import Accuracy


def with_bias(model, bias):
    """The model with a head that says the same of every image."""
    head = {"kernel": jnp.zeros_like(model.params["head"]["kernel"]), "bias": jnp.asarray(bias, jnp.float32)}
    return dataclasses.replace(model, params=model.params | {"head": head})


def test_a_constant_answer_is_right_as_often_as_its_class_occurs(make_model, make_npz, mesh, mesh8, tmp_path):
    path = make_npz("a.npz", test=[0, 0, 0, 1, 1, 2, 0])
    model = with_bias(make_model(num_classes=3), [2.0, 0.0, 0.0])
    options = Accuracy(eval_data=f"npz:{path}#test", batch_size=4)
    expected_loss = np.log(np.exp(2) + 2) - 2 * 4 / 7
    for where in (mesh, mesh8):
        found = options.run(model, mesh=where, out_dir=tmp_path)
        assert found["top1"] == pytest.approx(4 / 7)
        assert found["loss"] == pytest.approx(expected_loss, rel=1e-5)


def test_it_counts_what_the_logits_say(make_model, make_npz, mesh, tmp_path):
    path = make_npz("a.npz", test=[0, 1, 2, 3, 0, 1])
    model = make_model(num_classes=4, token_init_std=1.0)
    source = open_source(f"npz:{path}#test")
    images = model.preprocess([decode(source[i]["image"]) for i in range(6)])
    right = np.asarray(model.logits(images)).argmax(-1) == [source[i]["label"] for i in range(6)]
    found = Accuracy(eval_data=f"npz:{path}#test").run(model, mesh=mesh, out_dir=tmp_path)
    assert found["top1"] == pytest.approx(right.mean())


def test_models_and_data_that_do_not_fit_are_refused(make_model, make_npz, make_folder, mesh, tmp_path):
    labelled = f"npz:{make_npz('a.npz', test=[0, 1])}#test"
    with pytest.raises(ValueError, match="no classification head"):
        Accuracy(eval_data=labelled).run(make_model(), mesh=mesh, out_dir=tmp_path)
    with pytest.raises(ValueError, match="7 classes"):
        Accuracy(eval_data=labelled).run(make_model(num_classes=7), mesh=mesh, out_dir=tmp_path)
