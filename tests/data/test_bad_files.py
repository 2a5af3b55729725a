"""A hundred damaged files of seven formats among good ones: no row of a batch is wrong, nothing hangs."""

import importlib.util
import json
import pathlib
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import open_source
from regvit_jax.data.loader import MAX_NAMED, decoded, eval_batches, replaced_index, train_batches
from regvit_jax.data.order import Order
from regvit_jax.data.transforms import TrainTransform


def read(name):
    """A file of tests/ that is no test."""
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).parents[1] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


damage, tiny = read("damage"), read("tiny")

GOOD, DAMAGED, BATCH, SEED = 120, 100, 16, 7
STEPS = 2 * (GOOD + DAMAGED) // BATCH + 1  # two passes
TRANSFORM = TrainTransform(damage.SIZE, crop="none")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return damage.write(tmp_path_factory.mktemp("bad") / "photos", good=GOOD, damaged=DAMAGED)


@pytest.fixture(autouse=True)
def in_time():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 60, "something waited"


def test_most_of_the_damaged_files_cannot_be_read(files):
    _, pixels = files
    bad = sum(image is None for image in pixels)
    assert DAMAGED / 2 < bad < DAMAGED, "some flipped bits leave an image, which is then what Pillow makes of it"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_of_training_is_the_right_file_or_its_replacement(files, workers, caplog):
    source, pixels = files
    batches = train_batches(
        source, TRANSFORM, seed=SEED, batch_size=BATCH, start_step=0, stop_step=STEPS, workers=workers
    )
    for step, batch in enumerate(batches):
        images, replaced = damage.read_at(pixels, np.arange(step * BATCH, (step + 1) * BATCH), SEED)
        np.testing.assert_array_equal(batch["image"], images)
        np.testing.assert_array_equal(batch["replaced_b"], replaced)
    assert step == STEPS - 1
    if not workers:
        said = [record.message for record in caplog.records if "is replaced by" in record.message]
        assert len(said) == MAX_NAMED and len(set(said)) == MAX_NAMED
        assert "further unreadable samples are counted, not named" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_gets_every_good_file_once_and_no_other(files, workers):
    source, pixels = files
    seen = []
    for number, batch in enumerate(eval_batches(source, TRANSFORM, batch_size=BATCH, workers=workers)):
        assert batch["image"].shape == (BATCH, damage.SIZE, damage.SIZE, 3)
        np.testing.assert_array_equal(batch["valid_b"], batch["index"] >= 0)
        assert not batch["image"][~batch["valid_b"]].any()
        for row in np.flatnonzero(batch["valid_b"]):
            assert batch["index"][row] == number * BATCH + row
            np.testing.assert_array_equal(batch["image"][row], pixels[batch["index"][row]])
            seen.append(batch["index"][row])
    assert seen == [index for index, image in enumerate(pixels) if image is not None]


def test_a_cache_holds_the_good_files_and_replaces_as_the_loader_does(files):
    source, pixels = files
    arrays, readable = decoded(source, TRANSFORM)
    assert readable.tolist() == [image is not None for image in pixels]
    positions = np.arange(STEPS * BATCH)
    index, replaced = replaced_index(Order(len(source), SEED), positions, readable)
    images, expected = damage.read_at(pixels, positions, SEED)
    np.testing.assert_array_equal(arrays["image"][index], images)
    np.testing.assert_array_equal(replaced, expected)


def test_damage_is_the_same_every_time(files):
    """A file that still decodes after its bits were flipped gives the same pixels again: Pillow hands over no memory
    that it did not fill."""
    source, pixels = files
    for index, image in enumerate(pixels):
        again = damage.pillow_alone(pathlib.Path(source.root, source.name(index)))
        assert (again is None) == (image is None)
        if image is not None:
            np.testing.assert_array_equal(again, image)


def test_a_run_logs_replaced_files_and_stops_past_the_share(tmp_path):
    """Of 48 files 4 are cut short; 2 may be. The third that is drawn ends the run, with the key and files named."""
    from regvit_jax.train import run

    for i in range(48):
        path = tmp_path / "photos" / f"class{i % 4}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (5 * i, 0, 0)).save(path)
    config = tiny.get_config()
    config.data.train = config.data.eval = f"folder:{tmp_path / 'photos'}"
    config.save_every, config.data.max_bad, config.model.depth = 0, 2 / 48, 1
    source = open_source(config.data.train)
    order = Order(48, config.seed).index(np.arange(48))
    drawn = [1, 10, 27, 44]  # in steps 1, 2, 4 and 6
    names = [source.name(int(order[position])) for position in drawn]
    for name in names:
        (tmp_path / "photos" / name).write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=f"3 training samples.*6.25 % of 1 x 48.*{names[0]}.*--config.data.max_bad"):
        run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # A step is logged while the next one runs, whose batch is drawn by then.
    assert [(line["step"], line["replaced"]) for line in lines] == [(1, 2), (2, 2)]
