"""The feed of training: the same global batches from every cache, on any mesh, from any step on."""

import logging

import jax
import numpy as np
import pytest
from PIL import Image

from regvit_jax import sharding
from regvit_jax.data import open_source
from regvit_jax.data.feed import feed
from regvit_jax.data.order import Order
from regvit_jax.data.transforms import TrainTransform

TRAIN = 21


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(TRAIN):
        (folder / f"class{i % 4}").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).save(folder / f"class{i % 4}" / f"{i:02}.png")
    return open_source(f"folder:{folder}")


def mesh_of(data, fsdp=1):
    return sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


def batches(source, mesh, start=0, stop=6, crop="none", fields=("image", "label"), **options):
    transform = TrainTransform(4, crop=crop)
    order = {"seed": 3, "batch_size": 8, "start_step": start, "stop_step": stop}
    return list(feed(source, transform, mesh, fields=fields, **order, **options))


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        for name in batch.keys() | other.keys():
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize("cache", ["host", "device"])
@pytest.mark.parametrize("crop", ["none", "center"])
def test_caches_change_nothing(source, cache, crop, caplog):
    """Over more than two epochs of 21 samples in batches of 8."""
    caplog.set_level(logging.INFO)
    mesh = mesh_of(8)
    assert_same(batches(source, mesh, crop=crop, cache=cache), batches(source, mesh, crop=crop))
    assert f"21 decoded samples (0 MiB) kept on the {cache}" in caplog.text


@pytest.mark.parametrize("cache", ["none", "host", "device"])
def test_batches_lie_over_data_and_fsdp_and_do_not_depend_on_the_mesh(source, cache):
    whole = batches(source, mesh_of(1), cache=cache)
    split = batches(source, mesh_of(2, 4), cache=cache)
    assert_same(split, whole)
    for batch in split:
        assert batch["image"].sharding.spec[0] == ("data", "fsdp")
        assert batch["image"].addressable_shards[0].data.shape == (1, 4, 4, 3)


@pytest.mark.parametrize("cache", ["none", "host", "device"])
def test_a_later_start_gives_the_later_batches(source, cache):
    assert_same(batches(source, mesh_of(1), start=2, cache=cache), batches(source, mesh_of(1), cache=cache)[2:])
    assert (
        list(
            feed(
                source,
                TrainTransform(4),
                mesh_of(1),
                fields=("image",),
                seed=0,
                batch_size=8,
                start_step=2,
                stop_step=2,
            )
        )
        == []
    )


def test_rows_are_the_samples_of_the_order(source):
    labels = np.concatenate([batch["label"] for batch in batches(source, mesh_of(1), cache="host")])
    expected = [source[int(i)]["label"] for i in Order(TRAIN, 3).index(np.arange(48))]
    assert labels.tolist() == expected


def test_only_the_fields_that_are_asked_for_travel(source):
    for cache in ("none", "host", "device"):
        assert [set(batch) for batch in batches(source, mesh_of(1), stop=1, fields=("image",), cache=cache)] == [
            {"image"}
        ]


def test_random_crops_cannot_be_cached(source):
    with pytest.raises(ValueError, match="without randomness"):
        batches(source, mesh_of(1), crop="rrc", cache="host")


class Broken:
    """A source whose sample 3 cannot be read."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index] | ({"image": b"broken"} if index == 3 else {})

    def name(self, index):
        return f"sample {index}"


def test_replaced_samples_are_counted(source, caplog):
    found = batches(Broken(source), mesh_of(1))
    assert len(found) == 6 and "replaced_b" not in found[0]
    times = int((Order(TRAIN, 3).index(np.arange(48)) == 3).sum())
    assert f"{times} unreadable samples were replaced so far" in caplog.text
    assert "sample 3 is replaced by the next one" in caplog.text


def test_closing_ends_the_feed(source):
    stream = feed(
        source, TrainTransform(4), mesh_of(1), fields=("image",), seed=0, batch_size=8, start_step=0, stop_step=100
    )
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
