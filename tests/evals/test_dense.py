"""Dense probes: features against the tokens of the padded image, resizing against jax.image, fits on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regvit_jax.data.loader import train_batches
from regvit_jax.data.sources import Source
from regvit_jax.evals import dense, head_training
from regvit_jax.evals.dense import (
    STATISTICS,
    block_numbers,
    channels,
    dense_features,
    fit,
    padding,
    resize_matrix,
    token_matrix,
)
from regvit_jax.evals.saved import Saved
from regvit_jax.models.model import intermediate

pytestmark = pytest.mark.usefixtures("quick_to_compile")

FEATURES = dict(blocks=(1,), norm=True, cls=False)
# Of `dense_features`, the two that are compiled here.
PLAIN, FULL = dict(norm=False, cls=False), dict(norm=True, cls=True)
FORMS = {"clean": PLAIN, "dirty": PLAIN, "with cls": FULL}
features_of = jax.jit(dense_features, static_argnames=("blocks", "norm", "cls"))


def photos(batch, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)


# Padding and resizing


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), ((3, 3), (3, 3))),
        ((480, 640), ((5, 5), (2, 2))),
        ((416, 544), ((2, 2), (1, 1))),
        ((518, 513), ((0, 0), (2, 3))),
    ],
)
def test_padding_to_patches_of_14_is_that_of_dinov2(size, expected):
    assert padding(size, 14) == expected


def test_a_resize_matrix_by_hand():
    half = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_array_equal(resize_matrix(4, 2), half)
    # Twice smaller: the new centre lies between two old ones, nothing else is seen.
    np.testing.assert_array_equal(resize_matrix(2, 4), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_array_equal(resize_matrix(3, 3), np.eye(3))
    np.testing.assert_array_equal(resize_matrix(3, 1), np.ones((3, 1)))
    np.testing.assert_array_equal(resize_matrix(1, 5), [[0, 0, 1, 0, 0]])


@pytest.mark.parametrize(("new", "old"), [(37, 14), (512, 37), (14, 37), (683, 512), (50, 49)])
def test_resizing_is_bilinear_without_antialiasing(new, old):
    values = np.random.default_rng(0).normal(size=(old, 3)).astype(np.float32)
    expected = jax.image.resize(values, (new, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(resize_matrix(new, old) @ values, expected, atol=2e-4)
    np.testing.assert_allclose(resize_matrix(new, old).sum(axis=1), 1, atol=1e-6)


def test_padding_is_stretched_or_cut_off():
    # 6 pixels and patches of 4: two tokens over 8 pixels, 1 before and 1 behind.
    np.testing.assert_allclose(token_matrix(6, 4, "stretch"), resize_matrix(6, 2))
    np.testing.assert_allclose(token_matrix(6, 4, "crop"), resize_matrix(8, 2)[1:7])
    for mode in dense.PADDINGS:
        np.testing.assert_array_equal(token_matrix(8, 4, mode), resize_matrix(8, 2))


# Features


@pytest.mark.parametrize(("norm", "cls"), [(True, True), (False, False)])
def test_features_are_the_patches_of_the_padded_normalised_image(norm, cls, model):
    images, spec = photos(2, 29, 40), model.preprocessing  # to 32 x 40: 1 row above, 2 below
    padded = np.zeros((2, 32, 40, 3), np.float32)
    padded[:, 1:30] = (images / 255 - np.array(spec.mean)) / np.array(spec.std)
    expected = []
    for tokens in intermediate(model, jnp.asarray(padded), blocks=(0, 1), norm=norm):
        expected.append(tokens.map())
        if cls:
            expected.append(np.broadcast_to(np.asarray(tokens.cls)[:, None, None], (2, 4, 5, 32)))
    got = features_of(model, images, blocks=(-1, 0), norm=norm, cls=cls)
    assert got.dtype == jnp.float32 and got.shape == (2, 4, 5, channels(model, blocks=(-1, 0), cls=cls))
    np.testing.assert_allclose(got, np.concatenate(expected, axis=-1), rtol=1e-4, atol=1e-4)


def test_neither_class_token_nor_registers_are_among_the_features(model):
    """Where attention adds nothing, patches know of no other token: garbage there must leave every feature as it is."""
    blocks, attn = model.params["blocks"], model.params["blocks"]["attn"]
    silent = jax.tree.map(jnp.zeros_like, attn["proj"])
    deaf = model.params | {"blocks": blocks | {"attn": attn | {"proj": silent}}}
    tokens = ("cls_token", "register_tokens")
    garbage = {name: 9.0 + np.random.default_rng(0).normal(size=deaf[name].shape).astype(np.float32) for name in tokens}
    found = {
        kind: features_of(dataclasses.replace(model, params=params), photos(2, 29, 40), blocks=(-1, 0), **FORMS[kind])
        for kind, params in {"clean": deaf, "dirty": deaf | garbage, "with cls": deaf | garbage}.items()
    }
    np.testing.assert_array_equal(found["clean"], found["dirty"])
    patches, cls = np.split(np.asarray(found["with cls"]), 4, axis=-1)[:2]
    assert np.ptp(cls, axis=(0, 1, 2)).max() == 0 and np.ptp(patches, axis=(0, 1, 2)).min() > 0


def test_no_gradient_reaches_the_network(model):
    def total(params):
        changed = dataclasses.replace(model, params=params)
        return dense_features(changed, photos(1, 16, 16), blocks=(1,), norm=False, cls=False).sum()

    grads = jax.tree.leaves(jax.jit(jax.grad(total))(model.params))
    assert all(not np.asarray(leaf).any() for leaf in grads)


def test_blocks_and_class_tokens_that_are_not_there_are_refused(model, bare_model):
    assert block_numbers((-1, 0, 5), 12) == (0, 5, 11)
    for blocks, says in [((2,), "blocks 0 to 1"), ((-3,), "not -3"), ((1, -1), "different"), ((), "one or more")]:
        with pytest.raises(ValueError, match=says):
            block_numbers(blocks, 2)
    with pytest.raises(ValueError, match="has none"):
        dense_features(bare_model, photos(1, 16, 16), blocks=(0,), norm=True, cls=True)


# Fits


class Dots(Source):
    """40 images of one brightness each; the target is the brightness. `bad` ones cannot be read."""

    def __init__(self, bad=()):
        self.bad = bad

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError("gone")
        return {"image": np.full((16, 16, 3), 6 * index, np.uint8)}

    def name(self, index):
        return f"dot {index}"


def dot(sample, rng):
    """Picklable host transform: the image with noise, its brightness as the target."""
    noisy = sample["image"] + rng.integers(0, 5, (16, 16, 3))
    return {"image": noisy.astype(np.uint8), "target": np.float32(sample["image"].mean() / 255)}


def init_head(key):
    return {"kernel": 0.1 * jax.random.normal(key, (32,)), STATISTICS: {"rows": jnp.zeros(()), "kept": jnp.ones(3)}}


@dataclasses.dataclass(frozen=True)
class Squares:
    """Mean squared error; counts the rows that it was shown."""

    factor: float = 1.0

    def __call__(self, head, features, batch, step):
        miss = features.mean((1, 2)) @ head["kernel"] - batch["target"]
        statistics = head[STATISTICS] | {"rows": head[STATISTICS]["rows"] + len(features)}
        return self.factor * jnp.mean(miss**2) + 0 * step, head | {STATISTICS: statistics}


@functools.cache
def adamw():
    return optax.adamw(1e-2, weight_decay=0.1)


def fitted(model, mesh, source=None, steps=3, batch_size=8, **options):
    options = dict(loss=Squares(), tx=adamw(), seed=3, features=FEATURES, label="dots") | options
    return fit(
        *(model, source or Dots(), dot),
        init_head=init_head,
        steps=steps,
        batch_size=batch_size,
        mesh=mesh,
        **options,
    )


def test_a_fit_is_what_optax_does_to_the_head_step_by_step(model, mesh, mesh8):
    batches = train_batches(Dots(), dot, seed=3, batch_size=8, start_step=0, stop_step=3)
    kernel = np.asarray(init_head(jax.random.key(3))["kernel"])
    state, update = adamw().init(kernel), jax.jit(adamw().update)
    for batch in batches:
        x = np.asarray(features_of(model, batch["image"], **FEATURES)).mean((1, 2))
        miss = x @ kernel - batch["target"]
        updates, state = update(2 * miss @ x / 8, state, kernel)
        kernel = kernel + np.asarray(updates)
    for where in (mesh, mesh8):
        head = fitted(model, where)
        np.testing.assert_allclose(head["kernel"], kernel, rtol=2e-4, atol=2e-5)
        # Statistics are handed on: neither decayed nor stepped.
        assert float(head[STATISTICS]["rows"]) == 24
        np.testing.assert_array_equal(head[STATISTICS]["kept"], 1)
        assert head["kernel"].sharding.is_fully_replicated


def test_the_step_is_compiled_once_for_equal_parts(model, mesh):
    fitted(model, mesh)
    before = head_training._update._cache_size()
    fitted(model, mesh, steps=2, seed=4)
    assert head_training._update._cache_size() == before


def test_a_fit_that_was_killed_goes_on_bit_by_bit(model, mesh, mesh8, killed, tmp_path, caplog):
    """Images are augmented at random, and the head has statistics; the last save is one step old. Then on another mesh,
    which rounds differently."""
    caplog.set_level("INFO")
    whole, saved = fitted(model, mesh), Saved(tmp_path / "unfinished.npz", key="a", every=2)
    before = head_training._update._cache_size()
    for where, same in ((mesh, np.testing.assert_array_equal), (mesh8, np.testing.assert_allclose)):
        saved.remove()
        with killed(after=3):
            fitted(model, mesh, steps=4, saved=saved)
        again = fitted(model, where, saved=saved)
        jax.tree.map(functools.partial(same, **({} if where is mesh else {"rtol": 1e-4})), again, whole)
        assert head_training._update._cache_size() == before or where is mesh8, "nothing is compiled again"
    assert caplog.text.count("dots: goes on after step 2 of 3, found in") == 2


def test_a_batch_that_does_not_divide_over_the_mesh_keeps_its_size(model, mesh8):
    assert float(fitted(model, mesh8, batch_size=5)[STATISTICS]["rows"]) == 15


def test_a_loss_that_is_not_finite_ends_the_fit(model, mesh):
    with pytest.raises(ValueError, match="dots: the loss is inf at step 0: lower its lr"):
        fitted(model, mesh, loss=Squares(float("inf")))


def test_unreadable_images_are_replaced_up_to_a_share(model, mesh):
    fitted(model, mesh, Dots(bad={7}), max_bad=0.1)
    with pytest.raises(ValueError, match="more than max_bad of this evaluator=0.1 allows.*dot "):
        fitted(model, mesh, Dots(bad=set(range(0, 40, 2))), max_bad=0.1)
