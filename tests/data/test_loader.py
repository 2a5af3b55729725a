"""Loader: the order is a function of (seed, position) only, whoever decodes; bad files, padding, stopping."""

import io
import itertools
import logging

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import open_source
from regvit_jax.data.loader import MAX_NAMED, MAX_REPLACEMENTS, decoded, eval_batches, replaced_index, train_batches
from regvit_jax.data.order import Order
from regvit_jax.data.sources import Source
from regvit_jax.data.transforms import EvalTransform, Preprocess, TrainTransform

N = 23
PLAIN = TrainTransform(4, crop="none")


class Numbers(Source):
    """Sample i is an image of the colour i with the label i; those in `bad` are cut short."""

    def __init__(self, n=N, bad=()):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (index % 256,) * 3).save(buffer, "PNG")
        whole = buffer.getvalue()
        return {"image": whole[:20] if index in self.bad else whole, "label": index}

    def name(self, index):
        return f"number {index}"


class Draw:
    """A transform that shows which random numbers a position gets."""

    def __call__(self, sample, rng):
        return {"label": np.int32(sample["label"]), "drawn": rng.integers(2**62)}


@pytest.fixture
def folder(tmp_path):
    for i in range(N):
        Image.new("RGB", (6, 5), (10 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    return open_source(f"folder:{tmp_path}")


def same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
            assert batch[name].dtype == other[name].dtype


def test_rows_are_the_positions_of_the_order():
    batches = list(train_batches(Numbers(), Draw(), seed=5, batch_size=8, start_step=2, stop_step=6))
    positions = np.arange(16, 48)
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), Order(N, 5).index(positions))
    drawn = [np.random.default_rng((5, p)).integers(2**62) for p in positions]
    np.testing.assert_array_equal(np.concatenate([b["drawn"] for b in batches]), drawn)


def test_a_batch_has_the_documented_arrays(folder):
    (batch,) = train_batches(folder, TrainTransform(4), seed=0, batch_size=8, start_step=0, stop_step=1)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "image": ((8, 4, 4, 3), "uint8"),
        "label": ((8,), "int32"),
        "replaced_b": ((8,), "int32"),
    }


def test_without_shuffling_passes_follow_each_other():
    batches = train_batches(Numbers(5), Draw(), seed=0, batch_size=4, start_step=0, stop_step=3, shuffle=False)
    assert np.concatenate([b["label"] for b in batches]).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_processes_resume_and_hosts_do_not_change_the_data(folder):
    common = {"seed": 1, "batch_size": 4, "stop_step": 9}
    whole = list(train_batches(folder, TrainTransform(4), start_step=0, **common))
    assert len(whole) == 9
    # Spawned processes: they import this module anew and unpickle source and transform.
    same(whole, train_batches(folder, TrainTransform(4), start_step=0, workers=2, **common))
    same(whole[3:], train_batches(folder, TrainTransform(4), start_step=3, **common))
    hosts = [
        train_batches(folder, TrainTransform(4), start_step=0, process_index=i, process_count=2, **common)
        for i in range(2)
    ]
    same(whole, ({name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*hosts, strict=True)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_endless_loader_stops_when_closed(workers):
    batches = train_batches(Numbers(), PLAIN, seed=0, batch_size=2, start_step=0, workers=workers)
    assert len(list(itertools.islice(batches, 3))) == 3
    batches.close()
    assert list(batches) == []


def test_no_steps_are_no_batches():
    assert list(train_batches(Numbers(), PLAIN, seed=0, batch_size=2, start_step=7, stop_step=7)) == []


def test_a_bad_sample_is_replaced_by_the_next_and_named_once(caplog):
    order = Order(N, 0).index(np.arange(2 * N))
    bad = {int(order[4]), int(order[5])}
    with caplog.at_level(logging.WARNING, "regvit_jax"):
        batches = list(train_batches(Numbers(bad=bad), PLAIN, seed=0, batch_size=N, start_step=0, stop_step=2))
    first = batches[0]["label"]
    # Both positions take position 6's sample; all others keep their own.
    assert first[4] == first[5] == order[6] and batches[0]["replaced_b"].tolist() == [0] * 4 + [1, 1] + [0] * (N - 6)
    kept = batches[0]["replaced_b"] == 0
    np.testing.assert_array_equal(first[kept], order[:N][kept])
    assert not bad & set(batches[1]["label"].tolist()) and batches[1]["replaced_b"].sum() == 2
    warnings = [record.message for record in caplog.records if "replaced" in record.message]
    assert len(warnings) == 2 and all(any(f"number {i} is" in text for text in warnings) for i in bad)


def test_a_log_names_the_first_of_many_bad_samples(caplog):
    bad = {int(i) for i in Order(200, 0).index(np.arange(100))[::2]}
    list(train_batches(Numbers(200, bad), PLAIN, seed=0, batch_size=100, start_step=0, stop_step=4))
    named = [record.message for record in caplog.records if "is replaced by the next one" in record.message]
    assert len(named) == MAX_NAMED == len(set(named))
    assert sum("counted, not named" in record.message for record in caplog.records) == 1


def test_replacements_can_be_told_from_what_is_readable():
    """The index of a cache is what the loader reads, over two passes in which the last positions are bad too."""
    bad = {int(i) for i in Order(N, 3).index(np.array([0, 1, N - 1, N + 5]))}
    batches = train_batches(Numbers(bad=bad), PLAIN, seed=3, batch_size=N, start_step=0, stop_step=2)
    readable = np.array([i not in bad for i in range(N)])
    for step, batch in enumerate(batches):
        index, replaced = replaced_index(Order(N, 3), step * N + np.arange(N), readable)
        np.testing.assert_array_equal(index, batch["label"])
        np.testing.assert_array_equal(replaced, batch["replaced_b"])
    with pytest.raises(ValueError, match=f"{MAX_REPLACEMENTS} samples in a row cannot be read"):
        replaced_index(Order(1000, 0), np.arange(4), np.zeros(1000, bool))


def test_a_replacement_stays_in_its_epoch():
    # The last position of an epoch takes the first sample of the same epoch, not one of the next.
    order = Order(5, 0).index(np.arange(5))
    source = Numbers(5, bad={int(order[4])})
    (batch,) = train_batches(source, PLAIN, seed=0, batch_size=5, start_step=0, stop_step=1)
    assert batch["label"].tolist() == [*order[:4], order[0]]


def test_a_deleted_file_is_replaced_too(tmp_path):
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    source = open_source(f"folder:{tmp_path}")
    len(source)
    (tmp_path / "1.png").unlink()
    (batch,) = train_batches(source, PLAIN, seed=0, batch_size=3, start_step=0, stop_step=1)
    assert batch["replaced_b"].sum() == 1


@pytest.mark.parametrize("n", [3, 1000])
def test_only_bad_samples_are_an_error(n):
    batches = train_batches(Numbers(n, bad=range(n)), PLAIN, seed=0, batch_size=2, start_step=0)
    with pytest.raises(ValueError, match=f"{min(n, MAX_REPLACEMENTS)} samples in a row cannot be read.* number"):
        next(batches)


def test_an_error_that_is_no_bad_file_names_the_sample():
    class Ragged(Numbers):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "mask": np.zeros((3, 3))}

    with pytest.raises(ValueError, match="they must agree") as caught:
        next(train_batches(Ragged(), PLAIN, seed=0, batch_size=2, start_step=0))
    assert any("number" in note for note in caught.value.__notes__)


def test_fields_that_differ_within_a_batch_are_named():
    class Ragged(Numbers):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "points": np.zeros(index + 1)}

    with pytest.raises(ValueError, match="'points' is"):
        next(train_batches(Ragged(), PLAIN, seed=0, batch_size=4, start_step=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3, "process_count": 2}, "multiple of the number of processes, 2"),
        ({"batch_size": 0}, "positive multiple"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"start_step": 5, "stop_step": 4}, "from step 5 to 4"),
        ({"process_index": 1}, "process_index 1 of 1"),
        ({"workers": -1}, "workers must be 0 or more"),
    ],
)
def test_wrong_numbers_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(Numbers(), PLAIN, **{"seed": 0, "batch_size": 2, "start_step": 0, **options})
    with pytest.raises(ValueError, match="no samples"):
        train_batches(Numbers(0), PLAIN, seed=0, batch_size=2, start_step=0)


# Evaluation


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_sample_is_evaluated_once_in_full_batches(processes):
    n, batch_size = 9, 8
    hosts = [
        list(eval_batches(Numbers(n), PLAIN, batch_size=batch_size, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    assert [len(batches) for batches in hosts] == [2] * processes
    seen = []
    for batch in itertools.chain(*hosts):
        valid = batch["valid_b"]
        assert batch["image"].shape == (batch_size // processes, 4, 4, 3) and valid.dtype == bool
        np.testing.assert_array_equal(batch["label"][valid], batch["index"][valid])
        assert (batch["image"][~valid] == 0).all() and (batch["index"][~valid] == -1).all()
        seen += batch["index"][valid].tolist()
    assert sorted(seen) == list(range(n))


def test_workers_evaluate_the_same(folder):
    transform = EvalTransform(Preprocess(4, 1.0))
    same(
        eval_batches(folder, transform, batch_size=8),
        eval_batches(folder, transform, batch_size=8, workers=2),
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_sample_is_left_out_of_an_evaluation_and_named(processes, caplog):
    # A whole batch is bad: 4 to 7; with two processes also all rows of one of them in the first batch.
    bad = {2, 3, 4, 5, 6, 7}
    hosts = [
        list(eval_batches(Numbers(10, bad), PLAIN, batch_size=4, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    assert [len(batches) for batches in hosts] == [3] * processes
    seen = []
    for batch in itertools.chain(*hosts):
        valid = batch["valid_b"]
        assert batch["image"].shape == (4 // processes, 4, 4, 3) and batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["label"][valid], batch["index"][valid])
        assert not batch["image"][~valid].any() and (batch["index"][~valid] == -1).all()
        seen += batch["index"][valid].tolist()
    assert sorted(seen) == [0, 1, 8, 9]
    for i in bad:
        assert f"number {i} cannot be read and is left out" in caplog.text


def test_an_evaluation_without_a_readable_sample_is_an_error():
    with pytest.raises(ValueError, match="none of the first 3 samples can be read: number 0"):
        list(eval_batches(Numbers(3, bad={0, 1, 2}), PLAIN, batch_size=2))


def test_decoded_is_the_whole_source_in_order():
    arrays, readable = decoded(Numbers(5), PLAIN)
    assert readable.all()
    assert arrays["label"].tolist() == [0, 1, 2, 3, 4] and arrays["image"].shape == (5, 4, 4, 3)
    assert arrays["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="without randomness"):
        decoded(Numbers(5), TrainTransform(4))
    arrays, readable = decoded(Numbers(4, bad={0, 2}), PLAIN)
    assert readable.tolist() == [False, True, False, True]
    assert arrays["image"][:, 0, 0, 0].tolist() == [0, 1, 0, 3] and arrays["label"].tolist() == [0, 1, 0, 3]
    with pytest.raises(ValueError, match="none of the 2 samples can be read: number 0"):
        decoded(Numbers(2, bad={0, 1}), PLAIN)
