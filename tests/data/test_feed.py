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
    """A source of which some samples cannot be read."""

    def __init__(self, source, bad=(3,)):
        self.source, self.bad = source, bad

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index] | ({"image": b"broken"} if index in self.bad else {})

    def name(self, index):
        return f"sample {index}"


def stream(source, *, start=0, stop=6, **options):
    order = {"seed": 3, "batch_size": 8, "start_step": start, "stop_step": stop}
    return feed(source, TrainTransform(4, crop="none"), mesh_of(1), fields=("image", "label"), **order, **options)


@pytest.mark.parametrize("cache", ["none", "host", "device"])
def test_replaced_samples_are_counted(source, cache, caplog):
    found = stream(Broken(source), cache=cache)
    order, replaced = Order(TRAIN, 3).index(np.arange(48)), []
    for batch in found:
        assert "replaced_b" not in batch
        replaced.append(found.replaced())
    assert replaced == [int((order[: 8 * step] == 3).sum()) for step in range(1, 7)] and replaced[-1] == 2
    said = [record.message for record in caplog.records if "replaced so far" in record.message]
    assert [text[:40] for text in said] == [f"data: {n} unreadable samples were replaced"[:40] for n in (1, 2)]
    assert "sample 3 " in caplog.text


@pytest.mark.parametrize("cache", ["host", "device"])
def test_caches_replace_the_same_samples(source, cache):
    broken = Broken(source, bad=(3, 4, 5, 17))
    assert_same(batches(broken, mesh_of(8), cache=cache), batches(broken, mesh_of(8)))


@pytest.mark.parametrize("cache", ["none", "host"])
def test_a_run_stops_past_the_share_of_bad_files(source, cache):
    """4 of 21 files are bad: the third that is met is more than 2 / 21, wherever it comes."""
    bad = (3, 4, 5, 17)
    order = Order(TRAIN, 3).index(np.arange(48))
    third = int(np.flatnonzero(np.isin(order, bad))[2])
    found = stream(Broken(source, bad), cache=cache, max_bad=2 / 21)
    got = []
    with pytest.raises(
        ValueError, match=r"could not be read.*max_bad=0.0952.*sample (3|4|5|17).*--config.data.max_bad"
    ):
        got.extend(found)
    assert len(got) == third // 8
    # Luck does not stop it: of the four, three come early in the second pass, 7 of the 32 samples drawn by then.
    assert np.isin(order[:32], bad).sum() == 7
    assert len(list(stream(Broken(source, bad), cache=cache, max_bad=4 / 21))) == 6
    # Counted is since this start.
    late = stream(Broken(source, bad), cache=cache, start=third // 8 + 1, stop=third // 8 + 2, max_bad=2 / 21)
    assert len(list(late)) == 1


def test_processes_agree_on_the_share(source, monkeypatch):
    """Two processes of which this one met fewer bad files: it sees none of the sum until both ask together."""
    from jax.experimental import multihost_utils

    found = stream(Broken(source), max_bad=0.5)
    for _ in range(3):
        next(found)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    asked = []
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: asked.append(int(own)) or np.array([own, 5]))
    assert found.replaced() == 6 and asked == [1]
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.array([own, 21]))
    with pytest.raises(ValueError, match="22 training samples.*52.4 % of 2 x 21.*sample 3"):
        found.replaced()


def test_closing_ends_the_feed(source):
    stream = feed(
        source, TrainTransform(4), mesh_of(1), fields=("image",), seed=0, batch_size=8, start_step=0, stop_step=100
    )
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
